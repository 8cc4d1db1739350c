"""From the evaluations of a run to one page a person can read offline.

`write_report` draws the figures and writes report.html; what it says first is computed from the numbers.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from core import __version__
from core.checkpoint import write_atomically
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation
from core.evaluation.predictions import Predictions, confusion, operating_points
from core.evaluation.words import LINEAR_PROBES, figure, find, verdict
from core.report_figures import TARGET_FIGURE, Look, draw_figures, site_looks
from core.report_page import PAGE
from core.report_record import (
    DETAILS,
    ENDINGS,
    RunRecord,
    Tuned,
    at_known_sites,
    in_order,
    measure_words,
    metric_words,
    row_labels,
    stage_words,
    tuned_of,
)

FIRST = ("auc", "balanced_accuracy", "mae", "r2")
OF_WHOM = (*FIRST, "sensitivity", "specificity")
DIAGNOSIS_TITLE = "Diagnosis AUC"


def write_report(folder: Path, record: RunRecord) -> Path:
    """Write report.html and figures/*.png into an existing folder.

    Returns:
        The path of report.html, which holds the figures itself and fetches nothing.
    """
    looks = site_looks(record)
    figures, map_notes = draw_figures(record, looks)
    for name, png in figures.items():
        write_atomically(folder / "figures" / f"{name}.png", png)
    path = folder / "report.html"
    write_atomically(path, _page(record, looks, figures, map_notes).encode())
    return path


def _cards(evaluations: Sequence[Evaluation], tasks: Sequence[str]) -> list[dict[str, Any]]:
    cards = []
    tuned = ("full_finetuning", "frozen_then_unfrozen", "last_block", "linear_probe")
    for title, stages, task, metrics, others in (
        (
            "Site predictability, {stage}",
            ("erased", "pretrained"),
            "site",
            LINEAR_PROBES,
            (("untrained", "before"), ("age_sex_floor", "floor"), ("chance", "chance")),
        ),
        ("Age error in years, {stage}", ("erased", "pretrained"), "age", ("mae", "mae_sums"), (("untrained", "before"),)),
        *(
            (
                f"{_capital(task)} {words}, {{stage}}",
                (*tuned, "pretrained") if words == "AUC" else tuned,
                task,
                metrics,
                (("from_scratch", "from scratch"),),
            )
            for task in tasks
            for words, metrics in (("AUC", ("auc", "auc_binned", "auc_lda")), ("MAE", ("mae",)))
        ),
    ):
        found = (find(evaluations, stage, task, metric) for metric in metrics for stage in stages)
        now = next((e for e in found if e is not None), None)
        if now is None:
            continue
        beside = [
            f"{words} {figure(e.value, e)}"
            for stage, words in others
            if (e := find(evaluations, stage, task, now.metric)) is not None
        ]
        cards.append({"title": title.replace("{stage}", stage_words(now.stage).lower()), "now": now, "beside": ", ".join(beside)})
    return cards


def _capital(task: str) -> str:
    return task[:1].upper() + task[1:]


def _details(evaluations: Sequence[Evaluation], tuned: Tuned) -> list[dict[str, Any]]:
    """Tables of fine-tuned models over all sites, a column a stage: further figures, of whom, of each label."""
    rows = [e for e in in_order(evaluations) if e.stage in tuned.stages and e.site == "all"]
    of_tasks = [e for e in rows if e.task in tuned.tasks]
    of_groups = [e for e in of_tasks if e.metric.endswith(tuple(ENDINGS))]
    plain = [e for e in of_tasks if e.metric in DETAILS]
    first = [e for ending in ENDINGS for e in of_groups if e.metric.removesuffix(ending) in OF_WHOM]
    labels = [e for e in rows if e.task in tuned.labels and e.metric == "auc"]
    wanted = (
        ("Further figures", plain, measure_words),
        ("Of whom, and at unseen sites", first, measure_words),
        ("AUC of each label", labels, lambda e: e.task),
    )
    tables = []
    for title, chosen, name in wanted:
        columns = list(dict.fromkeys(row_labels(chosen)))
        cells: dict[str, dict[str, Evaluation]] = {}
        for e, column in zip(chosen, row_labels(chosen), strict=True):
            cells.setdefault(name(e), {}).setdefault(column, e)
        if chosen:
            listed = [(row, [of_row.get(column) for column in columns]) for row, of_row in cells.items()]
            tables.append({"title": title, "first": "Measure", "columns": columns, "rows": listed})
    return tables


def _confusions(known: Mapping[str, Predictions]) -> list[dict[str, Any]]:
    """Tables of held-out subjects by what they are and what they are taken for: of two classes a row a stage."""
    tables = []
    pairs: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for stage, found in known.items():
        target = found.target
        if target.kind == "regression":
            continue
        counts_LCC = confusion(found)
        if target.kind == "multiclass":
            heads = [f"taken for {name}" for name in target.names]
            rows = [(name, [str(count) for count in counts]) for name, counts in zip(target.names, counts_LCC[0], strict=True)]
            tables.append({"first": f"{stage_words(stage)}: truly", "columns": heads, "rows": rows})
            continue
        several = len(target.labels) > 1
        thresholds_L, _ = operating_points(found)
        no, yes = ("absent", "present") if several else target.names
        heads = ["from score", f"{yes}: told", f"{yes}: missed", f"{no}: told", f"{no}: taken for {yes}"]
        for label, threshold, counts in zip(target.labels, thresholds_L, counts_LCC, strict=True):
            cells = [f"{threshold:.3f}", *map(str, (counts[1, 1], counts[1, 0], counts[0, 0], counts[0, 1]))]
            pairs.setdefault(tuple(heads), []).append(
                (f"{stage_words(stage)}, {label}" if several else stage_words(stage), cells)
            )
    return tables + [{"first": "Stage", "columns": list(heads), "rows": rows} for heads, rows in pairs.items()]


def _pivots(evaluations: Sequence[Evaluation], sites: Sequence[str], tuned: Tuned) -> list[dict[str, Any]]:
    """Figures of single sites: a table a task, a row a site, a column a stage and metric."""
    tables = []
    first = [e for e in evaluations if e.task in tuned.tasks and e.metric.removesuffix("_unseen") in FIRST]
    single = in_order(e for e in evaluations if e.site != "all" and (e in first or not tuned.is_detail(e)))
    for task in dict.fromkeys(e.task for e in single):
        rows = [e for e in single if e.task == task]
        columns: dict[str, dict[str, Evaluation]] = {}
        for e, label in zip(rows, row_labels(rows), strict=True):
            metric = e.metric.removesuffix("_unseen")
            columns.setdefault(f"{label}: {metric_words(metric, task)}", {}).setdefault(e.site, e)
        named = [site for site in sites if any(site in column for column in columns.values())]
        cells = [(site, [column.get(site) for column in columns.values()]) for site in named]
        tables.append({"title": task.capitalize(), "first": "Site", "columns": list(columns), "rows": cells})
    return tables


def _site_table(record: RunRecord) -> list[dict[str, str]]:
    table = []
    for site in record.sites:
        scanners = site.get("scanners", "—")
        problems = [f"{count} {what}" for what, count in _problem_counts(site)]
        table.append(
            {
                "name": str(site["name"]),
                "role": str(site.get("role") or "—"),
                "subjects": str(site.get("subjects", "—")),
                "scans": str(site.get("scans", "—")),
                "scanners": ", ".join(map(str, scanners)) if isinstance(scanners, list | tuple) else str(scanners),
                "ages": str(site.get("age_range") or _age_range(record.maps, str(site["name"]))),
                "problems": ", ".join(problems) or "none",
            }
        )
    return table


def _age_range(maps: Mapping[str, Embeddings], site: str) -> str:
    ages = [e.age_years[(e.site == site) & np.isfinite(e.age_years)] for e in maps.values()]
    known = np.concatenate(ages) if ages else np.empty(0)
    return f"{known.min():.0f} to {known.max():.0f}" if len(known) else "—"


def _problem_counts(site: Mapping[str, Any]) -> list[tuple[str, int]]:
    problems = site.get("problems") or {}
    return [(str(what).replace("_", " "), int(count)) for what, count in problems.items() if int(count)]


def _problems(record: RunRecord) -> list[str]:
    """What went wrong at the sites and in the rounds, counted."""
    problems = [f"{site['name']}: {count} {what}." for site in record.sites for what, count in _problem_counts(site)]
    failed: dict[tuple[str, str, str], list[int]] = {}
    not_finite: dict[tuple[str, str], list[int]] = {}
    for line in record.rounds:
        stage = stage_words(str(line["stage"]))
        for site, text in line.get("failures", {}).items():
            failed.setdefault((stage, site, str(text)), []).append(int(line["round"]))
        for site, values in line["sites"].items():
            if not all(math.isfinite(value) for value in values.values()):
                not_finite.setdefault((stage, site), []).append(int(line["round"]))
    for (stage, site, text), rounds in failed.items():
        problems.append(f"{stage}, {_rounds(rounds)}: {site} took no part: {text}")
    for (stage, site), rounds in not_finite.items():
        problems.append(f"{stage}, {_rounds(rounds)}: {site} reported a number that is not finite; it is not drawn.")
    return problems


TRAFFIC = {
    "weights": "Weights",
    "constants": "Constants that no one trains: standardisation and erasure of inputs",
    "sums": "Sums of inputs or representations",
    "reference": "Mean and spread that all sites standardise by",
    "moments": "Moments of groups, for FairKL across sites",
    "scanners": "Sums by scanner, for the erasure",
    "eraser": "The eraser, for the evaluation",
    "probes": "Evaluation from sums: moments, probes, counts",
    "embeddings": "Representations of single scans, where sites share them",
    "predictions": "Scores of single scans, where sites share them",
}


def _traffic_rows(traffic: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, str]]:
    """What crossed the wire, to sites and from sites, in words."""
    return [
        (TRAFFIC.get(kind, kind), _size(sizes.get("to sites", 0)), _size(sizes.get("from sites", 0)))
        for kind, sizes in traffic.items()
    ]


def _size(num_bytes: int) -> str:
    return "—" if not num_bytes else f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _rounds(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"round {shown}" if len(numbers) == 1 else f"{len(numbers)} rounds ({shown})"


def _facts(record: RunRecord) -> list[str]:
    facts = [record.status]
    if record.sites:
        facts.append(f"{len(record.sites)} sites")
    for stage in dict.fromkeys(str(line["stage"]) for line in record.rounds):
        of_stage = [line for line in record.rounds if line["stage"] == stage]
        facts.append(f"{stage_words(stage).lower()} {len(of_stage)} rounds in {_duration(sum(x['seconds'] for x in of_stage))}")
    return facts


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _config_groups(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Nested keys as dotted lines, one group a top-level mapping, the plain keys first."""
    plain = [(key, _words(value)) for key, value in config.items() if not isinstance(value, Mapping)]
    groups = [
        (key, [(".".join(path), _words(leaf)) for path, leaf in _leaves(value)])
        for key, value in config.items()
        if isinstance(value, Mapping)
    ]
    return ([("run", plain)] if plain else []) + [group for group in groups if group[1]]


def _leaves(tree: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    leaves: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves += [((str(key), *path), leaf) for path, leaf in _leaves(value)]
        else:
            leaves.append(((str(key),), value))
    return leaves


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "—" if value is None or value == {} else f"{value:g}" if isinstance(value, float) else str(value)


def _page(record: RunRecord, looks: Mapping[str, Look], figures: Mapping[str, bytes], map_notes: Sequence[str]) -> str:
    overall = in_order(e for e in record.evaluations if e.site == "all")
    tuned = tuned_of(record)
    probed = [e for e in overall if not tuned.owns(e)]
    shown = ("site", "scanner", "age")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(figure=figure, stage=stage_words, measure=measure_words)
    return page.from_string(PAGE).render(
        record=record,
        version=__version__,
        facts=_facts(record),
        verdict=verdict(record.evaluations),
        cards=_cards(record.evaluations, tuned.tasks),
        sites=_site_table(record),
        config=_config_groups(record.config),
        figures={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in figures.items()},
        map_notes=map_notes,
        site_rows=[e for e in probed if e.task in ("site", "scanner")],
        age_rows=[e for e in probed if e.task == "age"],
        tuned_rows=[e for e in overall if tuned.owns(e) and not tuned.is_detail(e)],
        tuned_title=_tuned_title(record, tuned),
        diagnosis_title=DIAGNOSIS_TITLE,
        tuned_figures=[name for name in figures if name.startswith(TARGET_FIGURE)],
        details=_details(record.evaluations, tuned),
        confusions=_confusions(at_known_sites(record)),
        other_rows=[e for e in probed if e.task not in shown],
        pivots=_pivots(record.evaluations, list(looks), tuned),
        problems=_problems(record),
        traffic=_traffic_rows(record.traffic),
        colours={site: look.colour for site, look in looks.items()},
    )


def _tuned_title(record: RunRecord, tuned: Tuned) -> str:
    """Diagnosis AUC where nothing else is fine-tuned."""
    if tuned.tasks == ("diagnosis",) and not record.predictions:
        return DIAGNOSIS_TITLE
    return f"Fine-tuning: {', '.join(_told(record, task) for task in tuned.tasks if task != 'diagnosis') or 'diagnosis'}"


def _told(record: RunRecord, task: str) -> str:
    """A task by what is told in it."""
    labels = {found.target.labels for found in record.predictions.values() if found.target.task == task}
    return ", ".join(min(labels)) if labels else task
