"""Site-effect removal, every method on the same held-out subjects: one table, one figure, one JSON.

python -m simulations.site_removal experiment=abide data.table=/folder/FS_features_ABIDE_males.csv
python -m simulations.site_removal data=mcic data.root=/folder

Each seed draws another split of the subjects and another training. Ours run through the real apps, the baselines through the
same local loop; all get the same sites, rounds, steps, views and probes. Site is told by probes on held-out subjects: one
fitted on the training subjects, on whom an eraser or ComBat was fitted too, and one that has never seen these.
"""

import contextlib
import json
import logging
import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy import stats

from core.checkpoint import last_checkpoints, load_checkpoint, write_atomically
from core.cli import Overrides, checked
from core.config import RunConfig, load_config, quoted
from core.erasure import Eraser
from core.evaluation.embeddings import Embeddings
from core.evaluation.outcomes import Outcome, compare_outcomes
from core.evaluation.probes import chance_and_floor, evaluate, probe_outcomes
from simulations.baselines import SitesData, open_sites, run_baseline
from simulations.methods import Trained
from simulations.study import Step, settings_of, side_by_side

OURS: Mapping[str, str] = {
    "fairkl": "debias=fairkl_only",
    "erasure": "debias=erasure",
    "fairkl_erasure": "debias=fairkl",
}
"""Overrides of the methods that run through the real apps."""
REFERENCE = "fedavg"
FLOOR = "floor"
LABELS: Mapping[str, str] = {
    FLOOR: "floor: age and sex alone",
    "raw": "raw inputs (volumes: PCA)",
    "untrained": "untrained encoder",
    "local_only": "local only (largest site)",
    "pooled": "pooled, no debiasing",
    "fedavg": "FedAvg, no debiasing",
    "fedprox": "FedProx",
    "fedbn": "FedBN-like",
    "feddapl": "FedDAPL (adversarial)",
    "fedharmony": "FedHarmony (Gaussian replay)",
    "combat_raw": "ComBat on the inputs",
    "combat_h": "ComBat on h (distributed)",
    "combat_input": "ComBat on the inputs, then FedAvg",
    "fairkl": "FairKL by moment exchange",
    "erasure": "erasure from sums",
    "fairkl_erasure": "FairKL and erasure",
}
Figure = tuple[str, str]
SITE, HELD_OUT, KNN, BOOSTING = (("site", f"balanced_accuracy{suffix}") for suffix in ("", "_heldout", "_knn", "_boosting"))
AGE, UNSEEN, DIAGNOSIS = ("age", "mae"), ("age", "mae_unseen"), ("diagnosis", "auc")
COLUMNS: Mapping[Figure, str] = {
    SITE: "site, linear",
    HELD_OUT: "site, linear, held-out only",
    KNN: "site, 10-NN",
    BOOSTING: "site, boosting",
    ("site", "explained_variance"): "variance by site",
    AGE: "age error",
    UNSEEN: "age error, unseen sites",
    DIAGNOSIS: "diagnosis AUC",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@dataclass(frozen=True)
class Job:
    """One seed of the study.

    Attributes:
        overrides: of every run.
        seed: of split and training.
        methods: what is measured.
        folder: of the study.
    """

    overrides: tuple[str, ...]
    seed: int
    methods: tuple[str, ...]
    folder: Path

    @property
    def seeded(self) -> tuple[str, ...]:
        """The overrides with the seed."""
        return (*self.overrides, f"seed={self.seed}", f"data.split_seed={self.seed}", "finetune=none")

    def result(self, method: str) -> Path:
        """Where the figures of a method are kept."""
        return self.folder / "results" / f"{method}-seed{self.seed}.json"

    def settings(self, method: str) -> dict[str, Any]:
        """Everything that is set for a method, by default or by the overrides."""
        return settings_of((*self.seeded, *shlex.split(OURS.get(method, ""))))

    def finished(self, method: str) -> bool:
        """Whether these figures are there, of the same settings."""
        path = self.result(method)
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["settings"] == self.settings(method)


def carry_out(job: Job) -> None:
    """Measure what is missing of a seed; every method's figures are written as soon as they are known."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.getLogger("isocenter").setLevel(logging.ERROR)
    missing = [method for method in (FLOOR, *job.methods) if not job.finished(method)]
    if not missing:
        return
    config = load_config(job.seeded)
    data = open_sites(config)
    reference: list[Outcome] = []
    # The reference first: the others are compared with it.
    for method in sorted(missing, key=lambda name: (name != REFERENCE, (*LABELS,).index(name))):
        started = time.monotonic()
        about: dict[str, Any] = {"method": method, "seed": job.seed, "settings": job.settings(method)}
        if method == FLOOR:
            evaluations, notes = chance_and_floor(
                data.table.select(np.isin(data.table.site, data.known)), regime=FLOOR, seed=job.seed
            )
        else:
            embeddings, more = represent(method, job, data)
            outcomes, notes = outcomes_of(embeddings, data, job.seed)
            evaluations, more_notes = evaluate(
                embeddings, stage=method, regime=method, seed=job.seed, known_sites=data.known, outcomes=(outcomes, notes)
            )
            notes = [*more.pop("notes"), *more_notes]
            about |= more
            if method == REFERENCE:
                reference = outcomes
            elif not reference and REFERENCE in job.methods:
                reference, _ = outcomes_of(Embeddings.load(table_of(job, REFERENCE)), data, job.seed)
            if reference and method != REFERENCE:
                differences, _ = compare_outcomes(reference, outcomes, seed=job.seed)
                about["differences"] = [asdict(difference) for difference in differences]
        about["seconds"] = round(time.monotonic() - started, 1)
        about["notes"] = list(dict.fromkeys([*data.notes, *notes]))
        about["evaluations"] = [evaluation.to_dict() for evaluation in evaluations]
        write_atomically(job.result(method), json.dumps(about, indent=1).encode())


def outcomes_of(embeddings: Embeddings, data: SitesData, seed: int) -> tuple[list[Outcome], list[str]]:
    """What every probe says of the held-out subjects."""
    return probe_outcomes(embeddings, seed=seed, known_sites=data.known)


def table_of(job: Job, method: str) -> Path:
    """Where a method's representations are kept."""
    return job.folder / "embeddings" / f"{method}-seed{job.seed}.npz"


def represent(method: str, job: Job, data: SitesData) -> tuple[Embeddings, dict[str, Any]]:
    """The representations that a method gives, kept in the study's folder, and what there is to say about it."""
    about: dict[str, Any] = {"notes": []}
    if method in OURS:
        embeddings, about = through_the_apps(method, job, data)
    else:
        embeddings = run_baseline(method, data)
    embeddings.save(table_of(job, method))
    return embeddings, about


def through_the_apps(method: str, job: Job, data: SitesData) -> tuple[Embeddings, dict[str, Any]]:
    """A run of server and sites in this process, and the representations of what it delivers."""
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.in_process import run_in_process

    name = f"{method}-seed{job.seed}"
    folder = job.folder / "runs" / name
    if folder.exists():  # left by a study that was stopped in the middle
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    where = [f"output={quoted(str(folder.parent.resolve()))}", f"name={name}"]
    overrides = [*job.seeded, *shlex.split(OURS[method]), "evaluation=none", *where]
    num_sites = len(data.config.data.source(Path(), data.config.data.places).sites())
    nodes = {number + 1: {"partition-id": number, "num-partitions": num_sites} for number in range(num_sites)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        run_in_process(server_app, client_app, shlex.join(overrides), nodes)
    state = load_checkpoint(last_checkpoints(folder)["pretrain"]).state
    embeddings = data.embed(Trained(state, {}), torch.device("cpu"))
    for path in (folder / "checkpoints").glob("eraser-*.safetensors"):
        eraser = Eraser(**load_checkpoint(path).state)
        h_NF = eraser(torch.from_numpy(embeddings.h_NF).double()).float().numpy()
        embeddings = Embeddings(**{**vars(embeddings), "h_NF": h_NF})
    return embeddings, {
        "traffic": json.loads((folder / "traffic.json").read_text(encoding="utf-8")),
        "notes": [
            line.removeprefix("isocenter| ")
            for line in (folder.parent / f"{name}.log").read_text().splitlines()
            if "erased" in line
        ],
    }


@dataclass(frozen=True)
class Summary:
    """A figure over the seeds: mean, and the 95 % t-interval of the mean (None for one seed)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean over seeds."""
        if len(self.values) < 2:
            return None
        half = float(stats.t.ppf(0.975, len(self.values) - 1) * np.std(self.values, ddof=1) / math.sqrt(len(self.values)))
        return self.mean - half, self.mean + half


Study = dict[str, dict[Figure, Summary]]


def read_study(jobs: Sequence[Job]) -> Study:
    """Every figure over all sites, by method, over the seeds that are finished."""
    study: Study = {}
    for method in (FLOOR, *jobs[0].methods):
        values: dict[Figure, list[float]] = {}
        for job in jobs:
            if job.finished(method):
                for row in json.loads(job.result(method).read_text(encoding="utf-8"))["evaluations"]:
                    if row["site"] == "all" and row["stage"] != "chance":
                        values.setdefault((row["task"], row["metric"]), []).append(row["value"])
        study[method] = {figure: Summary(tuple(numbers)) for figure, numbers in values.items()}
    return study


def dominated(study: Study, site: Figure, age: Figure = AGE) -> dict[str, list[str]]:
    """For each method those that are no worse on site and age error, and better on one.

    A site probe below its floor counts as at the floor: there is nothing left to win but what age itself tells.
    """
    floor = study[FLOOR][site].mean
    pairs = {
        method: (max(found[site].mean - floor, 0.0), found[age].mean)
        for method, found in study.items()
        if site in found and age in found
    }
    return {
        method: [
            other for other, theirs in pairs.items() if all(a <= b for a, b in zip(theirs, own, strict=True)) and theirs != own
        ]
        for method, own in pairs.items()
    }


def verdicts(study: Study) -> list[str]:
    """What the study shows of ours, in sentences."""
    lines = []
    for method in OURS:
        found, plain = study.get(method, {}), study.get(REFERENCE, {})
        if not found or not plain:
            continue
        facts = []
        for figure in (SITE, KNN, HELD_OUT):
            if figure in found and SITE in study[FLOOR]:
                own_floor = study[FLOOR][HELD_OUT if figure == HELD_OUT else SITE].mean
                facts.append(f"{COLUMNS[figure]} {found[figure].mean / own_floor:.2f} x the linear floor")
        facts += [
            f"{COLUMNS[figure]} {100 * (found[figure].mean / plain[figure].mean - 1):+.1f} % against FedAvg"
            for figure in (AGE, UNSEEN)
            if figure in found and figure in plain
        ]
        if DIAGNOSIS in found and DIAGNOSIS in plain:
            facts.append(f"diagnosis AUC {found[DIAGNOSIS].mean - plain[DIAGNOSIS].mean:+.3f}")
        for site in (SITE, HELD_OUT):
            if site not in found:
                continue
            table = dominated(study, site)
            beaten = [LABELS[other] for other, by in table.items() if method in by]
            facts.append(
                f"on ({COLUMNS[site]}, age error) dominated by "
                f"{', '.join(LABELS[other] for other in table[method]) or 'none'}, dominates {', '.join(beaten) or 'none'}"
            )
        lines.append(f"{LABELS[method]}: {'; '.join(facts)}.")
    return lines


def wire(jobs: Sequence[Job]) -> dict[str, dict[str, int]]:
    """Bytes that crossed the wire in all runs of ours, to and from sites, by method and kind."""
    crossed: dict[str, dict[str, int]] = {}
    for method in [method for method in jobs[0].methods if method in OURS]:
        total: Counter[str] = Counter()
        for job in jobs:
            if job.finished(method):
                traffic = json.loads(job.result(method).read_text(encoding="utf-8"))["traffic"]
                total.update({kind: sum(directions.values()) for kind, directions in traffic.items()})
        crossed[method] = dict(total)
    return crossed


def wire_lines(crossed: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What crossed the wire beside the weights, in sentences."""
    lines = []
    for method, bytes_of in crossed.items():
        weights = bytes_of.get("weights", 0)
        if weights:
            shares = {kind: size / weights for kind, size in sorted(bytes_of.items()) if kind != "weights"}
            kinds = ", ".join(f"{kind} {share:.2%}" for kind, share in shares.items())
            lines.append(f"{LABELS[method]}: beside the weights crossed {sum(shares.values()):.2%} of their bytes ({kinds}).")
    return lines


def draw(study: Study, path: Path) -> None:
    """Site balanced accuracy against age error, every method a point with its interval, for both linear probes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    mpl.use("agg")
    canvas = Canvas(figsize=(12.5, 5.6), layout="constrained")
    for axes, site in zip(canvas.subplots(1, 2, sharey=True), (SITE, HELD_OUT), strict=True):
        for number, (method, found) in enumerate(study.items()):
            if site not in found or AGE not in found:
                continue
            x, y = found[site], found[AGE]
            bars = [None if s.interval is None else [[s.mean - s.interval[0]], [s.interval[1] - s.mean]] for s in (x, y)]
            ours = method in OURS
            colour = f"C{list(OURS).index(method) * 2 + 1}" if ours else "#5d6975"
            axes.errorbar(
                x.mean, y.mean, xerr=bars[0], yerr=bars[1], fmt="D" if ours else "o", color=colour, ms=8 if ours else 5, lw=0.8
            )
            axes.annotate(
                LABELS[method],
                (x.mean, y.mean),
                xytext=(5, 5 + 9 * (number % 2)),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
            )
        floor = study[FLOOR].get(site)
        if floor is not None:
            axes.axvspan(0, floor.mean, color="#009E73", alpha=0.08, lw=0)
            axes.axvline(floor.mean, color="#009E73", lw=1, ls="--")
            axes.annotate(
                "floor: age and sex alone", (floor.mean, 0.01), xycoords=("data", "axes fraction"), fontsize=7.5, color="#009E73"
            )
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{COLUMNS[site]}: balanced accuracy (lower is better)")
    canvas.axes[0].set_ylabel("age error in years (lower is better)")
    canvas.savefig(path, dpi=150)


def _cell(summary: Summary | None, separator: str) -> str:
    """Mean and interval of a figure as text, a dash where there is none."""
    if summary is None:
        return "-"
    interval = summary.interval
    return f"{summary.mean:.3f}" + (f"{separator}[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def show(study: Study, seeds: int) -> None:
    """Print the table and the sentences."""
    from rich.console import Console
    from rich.table import Table

    figures = [figure for figure in COLUMNS if any(figure in found for found in study.values())]
    table = Table(title=f"held-out subjects, mean over {seeds} seeds [95 % interval of the mean]")
    table.add_column("method", no_wrap=True)
    for figure in figures:
        table.add_column(COLUMNS[figure], justify="right")
    for method, found in study.items():
        if not found:
            continue
        cells = [_cell(found.get(figure), "\n") for figure in figures]
        table.add_row(LABELS[method], *cells, style="bold" if method in OURS else None)
    Console(width=190).print(table)
    for line in verdicts(study):
        typer.echo(line)


def markdown(study: Study) -> str:
    """The table as Markdown."""
    figures = [figure for figure in COLUMNS if any(figure in found for found in study.values())]
    lines = ["| method | " + " | ".join(COLUMNS[figure] for figure in figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for method, found in study.items():
        cells = [_cell(found.get(figure), " ") for figure in figures]
        if found:
            lines.append(f"| {LABELS[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def default_methods(config: RunConfig) -> tuple[str, ...]:
    """Every method that the data allow, in the order of the table."""
    return tuple(m for m in LABELS if m != FLOOR and (m != "combat_input" or config.data.kind == "table"))


@app.command()
def main(
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Splits and trainings, with seeds 0, 1, ...")] = 5,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Measure this one; repeat for more. All: {', '.join(LABELS)}.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the study. Default: runs/site-removal-<name of the run>.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Seeds at once; 0: one a CPU core.")] = 0,
) -> None:
    """Compare ways to remove site effects on held-out subjects, over seeds; started again, it goes on where it stopped.

    The pair that matters is (how well a probe tells the site, how well it tells the age): the table, table.md, figure.png and
    study.json in the output folder tell both for every method, beside the floor that age and sex alone give.
    """
    config = checked(overrides or [])
    methods = tuple(m for m in default_methods(config) if method is None or m in {*method, REFERENCE})
    if unknown := set(method or ()) - set(default_methods(config)):
        typer.echo(f"site_removal: method must be one of {list(default_methods(config))}, got {sorted(unknown)}.", err=True)
        raise typer.Exit(2)
    if config.data.root is None:
        typer.echo(f"site_removal: data.{config.data.PLACES[0]} must name the data, got null. Add it to the overrides.", err=True)
        raise typer.Exit(2)
    for ours in [OURS[name] for name in methods if name in OURS]:
        checked([*(overrides or ()), *shlex.split(ours)])
    folder = output or Path("runs") / f"site-removal-{config.name}"
    jobs = [Job(tuple(overrides or ()), seed, methods, folder) for seed in range(seeds)]
    measure(jobs, workers or len(os.sched_getaffinity(0)))
    study = read_study(jobs)
    plain = {
        name: {
            f"{task} {metric}": {"mean": s.mean, "interval": s.interval, "values": s.values}
            for (task, metric), s in found.items()
        }
        for name, found in study.items()
    }
    crossed = wire(jobs)
    about = {"overrides": overrides or [], "seeds": seeds, "figures": plain, "verdicts": verdicts(study), "traffic": crossed}
    write_atomically(folder / "study.json", json.dumps(about, indent=1).encode())
    write_atomically(folder / "table.md", markdown(study).encode())
    draw(study, folder / "figure.png")
    show(study, seeds)
    for line in wire_lines(crossed):
        typer.echo(line)
    typer.echo(f"table, figure and figures of every seed: {folder}")


def measure(jobs: Sequence[Job], workers: int) -> None:
    """Carry out the jobs side by side."""

    def step(job: Job, method: str) -> Step:
        def told() -> str:
            seconds = json.loads(job.result(method).read_text(encoding="utf-8"))["seconds"]
            return f"seed {job.seed}: {LABELS[method]} ({seconds:.0f} s)"

        return Step(lambda: job.finished(method), told)

    steps = [step(job, method) for job in jobs for method in (FLOOR, *job.methods)]
    side_by_side("site_removal", "methods x seeds", carry_out, jobs, steps, workers)


if __name__ == "__main__":
    sys.exit(app())
