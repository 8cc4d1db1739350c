"""What `isocenter evaluate` does: read representations, evaluate and compare them, print tables and one sentence on each."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.checkpoint import write_atomically
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, write_metrics
from core.evaluation.outcomes import Difference, Outcome, compare_outcomes
from core.evaluation.probes import chance_and_floor, evaluate, probe_outcomes
from core.evaluation.reading import read_representations
from core.evaluation.words import chance_beside, digits, find, verdict, with_interval

Row = TypeVar("Row", Evaluation, Difference)
Outcomes = tuple[list[Outcome], list[str]]
MIN_WIDTH = 110


def evaluate_and_print(
    paths: Sequence[Path], *, unseen: Collection[str], official: bool, seed: int, output: Path | None, num_resamples: int = 1000
) -> None:
    """Evaluate what lies at the paths, print it, and write it to `output` where one is given.

    Sites that one of the runs says were unseen count as unseen beside those of `unseen`.

    One path: every stage found there, the others compared with the first. Several: the representation that each delivers
    (erased, else pretrained, else the last), compared with that of the first path.

    Raises:
        ValueError: Something cannot be read, an unseen site is not there, or representations are not of the same scans.
    """
    sources = [read_representations(path) for path in paths]
    by_run = {site for source in sources for site in source.unseen}
    for source in sources:
        sites = {str(site) for embeddings in source.by_stage.values() for site in np.unique(embeddings.site)}
        for site in unseen:
            if site not in sites:
                raise ValueError(f"--unseen: it must be a site of {source.name} ({', '.join(sorted(sites))}), got {site!r}.")
        if sites <= {*unseen, *by_run}:
            raise ValueError(f"--unseen: at least one site of {source.name} must have been seen, got all of them.")
    chosen = [
        (source.name, stage, embeddings)
        for source in sources
        for stage, embeddings in source.by_stage.items()
        if len(sources) == 1 or stage == source.delivered
    ]
    labels = _labels([(name, stage) for name, stage, _ in chosen])
    console = Console()
    console.width = max(MIN_WIDTH, console.width)
    evaluations: list[Evaluation] = []
    notes = [note for source in sources for note in source.notes]
    if by_run:
        notes.append(f"Unseen in pretraining, as the run says: {', '.join(sorted(by_run))}.")
    differences: dict[str, list[Difference]] = {}
    outcomes: list[Outcomes] = []
    with Progress(console=console, transient=True) as progress:
        steps = progress.add_task("", total=2 * len(chosen))
        for (name, stage, embeddings), label in zip(chosen, labels, strict=True):
            progress.update(steps, description=f"probing {label}")
            known = set(np.unique(embeddings.site).tolist()) - {*unseen, *by_run}
            outcomes.append(probe_outcomes(embeddings, seed=seed, known_sites=known, official=official))
            settings: dict[str, Any] = {"regime": name, "seed": seed, "num_resamples": num_resamples}
            found, remarks = evaluate(embeddings, stage=stage, known_sites=known, outcomes=outcomes[-1], **settings)
            progress.advance(steps)
            progress.update(steps, description=f"comparing {label}")
            if all(e.regime != name for e in evaluations):
                floor, floor_remarks = chance_and_floor(embeddings.select(np.isin(embeddings.site, sorted(known))), **settings)
                evaluations += floor
                remarks = remarks + floor_remarks
            if len(outcomes) > 1:
                _check_same_scans(chosen[0][2], embeddings, (labels[0], label))
                differences[label], more = compare_outcomes(
                    outcomes[0][0], outcomes[-1][0], num_resamples=num_resamples, seed=seed
                )
                remarks = remarks + [f"{label}: {note}" for note in more]
            evaluations += found
            notes += remarks
            progress.advance(steps)
    notes = list(dict.fromkeys(notes))
    for (name, stage, _), label in zip(chosen, labels, strict=True):
        of_regime = [e for e in evaluations if e.regime == name]
        console.print(_figures_table(of_regime, stage, label))
        console.print(verdict(of_regime, stage), highlight=False)
        console.print()
    for label, of_label in differences.items():
        console.print(_differences_table(of_label, labels[0], label))
    for note in notes:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)
    if output is not None:
        _write(output, evaluations, differences, {label: e for (_, _, e), label in zip(chosen, labels, strict=True)}, notes)
        console.print(f"open {output / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _labels(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The stage where there is one source, else the source; both where that says too little."""
    for candidate in ([stage for _, stage in pairs], [name for name, _ in pairs], [f"{name} {stage}" for name, stage in pairs]):
        several_sources = len({name for name, _ in pairs}) > 1
        if len(set(candidate)) == len(pairs) and not (several_sources and candidate == [stage for _, stage in pairs]):
            return candidate
    raise ValueError(f"evaluate: what is compared must have different names, got {[f'{n} {s}' for n, s in pairs]!r}. Rename one.")


def _check_same_scans(first: Embeddings, second: Embeddings, labels: tuple[str, str]) -> None:
    for column in ("subject", "site", "scanner", "sex", "diagnosis", "split", "age_years"):
        mine, theirs = getattr(first, column), getattr(second, column)
        if not np.array_equal(mine, theirs, equal_nan=column == "age_years"):
            raise ValueError(
                f"evaluate: {labels[0]} and {labels[1]} must be of the same scans in the same order, got another {column}. "
                "Embed one set of scans with both encoders, or evaluate them one by one."
            )


def _table(title: str, headings: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]) -> Table:
    """Tasks in the order in which they came, the figures of each together."""
    table = Table(title=title)
    for heading in ("task", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for task in dict.fromkeys(row.task for row in rows):
        table.add_section()
        of_task = [row for row in rows if row.task == task]
        for number, row in enumerate(of_task):
            table.add_row("" if number else task, row.metric, *cells(row))
    return table


def _figures_table(evaluations: Sequence[Evaluation], stage: str, label: str) -> Table:
    """Figures over all sites, each beside chance and floor."""

    def cells(e: Evaluation) -> Sequence[str]:
        floor = find(evaluations, "age_sex_floor", e.task, e.metric)
        chance = chance_beside(evaluations, e)
        return (
            digits(e.value, e.metric),
            with_interval(e).partition(" ")[2],
            digits(floor.value, e.metric) if floor else "",
            digits(chance.value, e.metric) if chance else "",
            str(e.num_subjects),
        )

    rows = [e for e in evaluations if (e.stage, e.site) == (stage, "all")]
    return _table(f"{label}: held-out subjects", ("value", "95 % interval", "floor", "chance", "subjects"), rows, cells)


def _differences_table(differences: Sequence[Difference], first: str, second: str) -> Table:
    def cells(d: Difference) -> Sequence[str]:
        return (
            digits(d.first, d.metric),
            digits(d.second, d.metric),
            digits(d.value, d.metric, signed=True),
            f"[{digits(d.low, d.metric)}, {digits(d.high, d.metric)}]",
            "" if d.p_value is None else f"{d.p_value:.3f}" if d.p_value >= 0.001 else "< 0.001",
        )

    title = f"{second} (second) minus {first} (first): the same held-out subjects"
    return _table(title, ("first", "second", "difference", "95 % interval", "p"), differences, cells)


def _write(
    folder: Path,
    evaluations: Sequence[Evaluation],
    differences: dict[str, list[Difference]],
    maps: dict[str, Embeddings],
    notes: Sequence[str],
) -> None:
    from core.report import write_report
    from core.report_record import RunRecord

    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(folder / "metrics.json", evaluations)
    listed = [{"second": label, **asdict(d)} for label, of_label in differences.items() for d in of_label]
    write_atomically(folder / "differences.json", (json.dumps(listed, indent=1, allow_nan=False) + "\n").encode())
    record = RunRecord(name=folder.name, status="evaluated", evaluations=evaluations, maps=maps, notes=notes)
    write_report(folder, record)
