"""Transfer: what a pretrained encoder is worth to a small labelled data set, by how many labels there are.

python -m simulations.transfer experiment=breastmnist data.root=/folder/breastmnist.npz
python -m simulations.transfer experiment=mcic data.root=/folder --leave-each-out

Every start is fine-tuned with the same steps on the same fractions of the same labels: random weights, and encoders that the
real apps pretrained on the sites' training scans without these labels. A seed is another pretraining, another draw of the labels
and, where the data tell no splits, another split. Beside them stands PCA and logistic regression on the inputs, sites pooled.
"""

import contextlib
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from core.checkpoint import write_atomically
from core.cli import Overrides, checked, decode_first
from core.config import RunConfig, load_config, quoted
from core.data.site import default_cache_root
from core.evaluation.predictions import MAIN_FIGURE, Predictions, evaluate_predictions, resampled_figure
from core.finetune_command import Job, held_out_scans, open_job, prepared, tune
from core.finetuning import training_scans
from simulations.study import Step, settings_of, side_by_side

STARTS: Mapping[str, str] = {
    "scratch": "",
    "pca": "",
    "simclr": "objective=ntxent debias=none",
    "barlow_twins": "objective=barlow_twins debias=none",
    "micle": "objective=ntxent debias=none sampling=multi_instance",
    "yaware": "objective=yaware debias=none",
    "yaware_fairkl": "objective=yaware debias=fairkl_only",
}
"""How each start's encoder is pretrained, as overrides; scratch and pca begin with none."""
LABELS: Mapping[str, str] = {
    "scratch": "from scratch",
    "pca": "PCA + logistic regression, pooled",
    "simclr": "SimCLR",
    "barlow_twins": "Barlow Twins",
    "micle": "MICLe (SimCLR on two scans of a subject)",
    "yaware": "y-aware",
    "yaware_fairkl": "y-aware + FairKL",
}
ALONE: Mapping[str, str] = {"scratch": "from_scratch", "pca": "linear"}
"""The one stage of the starts without an encoder."""
WITHOUT_PRETRAINING = ("num_rounds=0", "warmup_rounds=0", "debias=none")
NUM_RESAMPLES = 1000
MAX_COMPONENTS = 100
EVERYWHERE = "everywhere"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@dataclass(frozen=True)
class Point:
    """A condition that every start is fine-tuned under.

    Attributes:
        fraction: of the labels.
        epsilon: that DP-SGD may spend; infinite clips without noise; None: the usual steps.
        delta: that goes with it.
    """

    fraction: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-4

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.fraction:g}" if self.epsilon is None else f"epsilon{self.epsilon:g}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What it sets."""
        if self.epsilon is None:
            return (f"finetune.label_fraction={self.fraction!r}",)
        private = ("finetune.class_weights=none", "finetune.patience=null", "finetune.label_fraction=1")
        spent = "inf" if self.epsilon == math.inf else f"{self.epsilon}"
        return ("privacy=dp_sgd", f"privacy.target_epsilon={spent}", f"privacy.delta={self.delta}", *private)

    @property
    def order(self) -> tuple[float, float]:
        """Private ones first, the most private of them first; then by the number of labels."""
        return (-1.0, self.epsilon) if self.epsilon is not None else (self.fraction, 0.0)


@dataclass(frozen=True)
class Part:
    """What one process carries out: a start, pretrained with one seed, fine-tuned under every condition.

    Attributes:
        overrides: of every run.
        start: of `STARTS`.
        seed: of all of it.
        left_out: the site that neither pretrains nor fine-tunes; "" for none.
        points: the conditions.
        stages: of fine-tuning from an encoder.
        folder: of the study.
    """

    overrides: tuple[str, ...]
    start: str
    seed: int
    left_out: str
    points: tuple[Point, ...]
    stages: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """Of its folders."""
        return f"{self.start}-seed{self.seed}" + (f"-without-{self.left_out}" if self.left_out else "")

    @property
    def seeded(self) -> tuple[str, ...]:
        """The overrides with the seed, and without the site that is left out."""
        more = [f"data.unseen_sites=[{self.left_out}]", "data.pretrain_sites=null"] if self.left_out else []
        return (*self.overrides, f"seed={self.seed}", f"data.split_seed={self.seed}", *more)

    @property
    def own_stages(self) -> tuple[str, ...]:
        """What is fine-tuned from this start."""
        return (ALONE[self.start],) if self.start in ALONE else self.stages

    @property
    def own_points(self) -> tuple[Point, ...]:
        """The conditions that this start has: the linear baseline is never private, a site is left out with all labels alone."""
        points = [point for point in self.points if self.start != "pca" or point.epsilon is None]
        most = max(point.fraction for point in points)
        return tuple(point for point in points if not self.left_out or (point.epsilon is None and point.fraction == most))

    def result(self, point: Point) -> Path:
        """Where the figures of a condition are kept."""
        return self.folder / "results" / f"{self.name}-{point.name}.json"

    def settings(self, point: Point) -> dict[str, Any]:
        """Everything that is set, by default or by the overrides: of the pretraining, and of the fine-tuning."""
        tuned = (*self.seeded, "start=random", *WITHOUT_PRETRAINING, *point.overrides)
        return {
            "pretraining": pretraining_settings((*self.seeded, *shlex.split(STARTS[self.start]))),
            "finetuning": settings_of(tuned),
            "stages": list(self.own_stages),
        }

    def finished(self, point: Point) -> bool:
        """Whether these figures are there, of the same settings."""
        path = self.result(point)
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["settings"] == self.settings(point)


def pretraining_settings(overrides: tuple[str, ...]) -> dict[str, Any]:
    """What of it pretraining depends on."""
    return {key: value for key, value in settings_of(overrides).items() if key not in ("finetune", "evaluation", "name")}


def carry_out(part: Part) -> None:
    """Pretrain and fine-tune what is missing; the figures of every condition are written as soon as they are known."""
    torch.set_num_threads(1)
    logging.getLogger("isocenter").setLevel(logging.ERROR)
    missing = [point for point in part.own_points if not part.finished(point)]
    if not missing:
        return
    started = time.monotonic()
    run = Path("random") if part.start in ALONE else pretrained(part)
    pretraining_s = time.monotonic() - started
    for point in missing:
        started = time.monotonic()
        evaluations, notes, labels = [], list[str](), 0
        known: set[str] = set()
        for stage in part.own_stages:
            job = finetuning_job(part, run, point, stage)
            if part.start == "pca":
                predictions = linear_baseline(job)
            else:
                tuned = tune(job)
                predictions = tuned.predictions[stage]
                notes += tuned.notes
            known = set(job.targets)
            labels = sum(count_subjects(job, site) for site in job.targets)
            predictions.save(part.folder / "predictions" / f"{part.name}-{point.name}-{stage}.npz")
            found, more = evaluate_predictions(predictions, stage=stage, regime=part.start, seed=part.seed, known_sites=known)
            evaluations += [evaluation.to_dict() for evaluation in found]
            notes += more
        about = {
            "settings": part.settings(point),
            "targets": sorted(known),
            "labels": labels,
            "seconds": round(time.monotonic() - started, 1),
            "pretraining_seconds": round(pretraining_s, 1),
            "notes": list(dict.fromkeys(notes)),
            "evaluations": evaluations,
        }
        write_atomically(part.result(point), json.dumps(about, indent=1).encode())


def count_subjects(job: Job, site: str) -> int:
    """Subjects whose labels a site trains on."""
    return len({scan.subject for scan in training_scans(job.held[site].splits["train"], job.config).scans})


def pretrained(part: Part) -> Path:
    """The folder of the run that pretrains a start's encoder: server and sites in this process, unless it is there."""
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.in_process import run_in_process

    logging.getLogger("flwr").setLevel(logging.ERROR)  # which its import has set
    folder = part.folder / "pretraining" / part.name
    where = [f"output={quoted(str(folder.parent.resolve()))}", f"name={part.name}"]
    overrides = (*part.seeded, *shlex.split(STARTS[part.start]), "finetune=none", "evaluation=none", *where)
    config, stamp = load_config(overrides), folder / "pretrained.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == pretraining_settings(overrides):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    num_sites = len(config.data.source(default_cache_root(), config.data.places).sites())
    nodes = {number + 1: {"partition-id": number, "num-partitions": num_sites} for number in range(num_sites)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{part.name}.log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        run_in_process(server_app, client_app, shlex.join(overrides), nodes)
    write_atomically(stamp, json.dumps(pretraining_settings(overrides)).encode())
    return folder


def finetuning_job(part: Part, run: Path, point: Point, stage: str) -> Job:
    """A stage of fine-tuning from a start under a condition; one of other settings in its folder is thrown away."""
    chosen = f"finetune.stages=[{'from_scratch' if part.start == 'pca' else stage}]"
    config, start = prepared(run, [*part.seeded, *WITHOUT_PRETRAINING, *point.overrides, chosen])
    folder = part.folder / "finetuning" / f"{part.name}-{point.name}-{stage}"
    stamp, settings = folder.with_suffix(".json"), part.settings(point)
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != settings:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(stamp, json.dumps(settings).encode())
    return open_job(config, start, folder, torch.device("cpu"), lambda _line: None)


def linear_baseline(job: Job) -> Predictions:
    """PCA and logistic regression (ridge for numbers) on the inputs, target sites pooled; the penalty by cross-validation."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    target = job.config.finetune.target
    if target.kind == "multilabel":
        raise ValueError("transfer: the start pca is for one label, got several. Leave it out.")
    cpu = torch.device("cpu")
    rows, values = [], []
    for site in job.targets:
        data = training_scans(job.held[site].splits["train"], job.config)
        rows.append(data.inputs(range(len(data)), cpu).flatten(1).nan_to_num(nan=0.0).numpy())
        values.append(target.values(data.scans)[:, 0].numpy())
    x_NI, y_N = np.concatenate(rows), np.concatenate(values)
    fewest = min(np.unique(y_N, return_counts=True)[1]) if target.names else len(y_N)
    folds = int(max(2, min(5, fewest)))
    last = (
        RidgeCV(np.logspace(-2, 4, 13))
        if target.kind == "regression"
        else LogisticRegressionCV(
            Cs=np.logspace(-4, 1, 6),
            cv=folds,
            scoring="neg_log_loss",
            class_weight="balanced",
            max_iter=2000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        )
    )
    components = min(MAX_COMPONENTS, len(x_NI) * (folds - 1) // folds - 1)
    model = make_pipeline(StandardScaler(), PCA(components, random_state=job.config.seed), StandardScaler(), last)
    model.fit(x_NI, y_N if target.kind == "regression" else y_N.astype(int))
    parts = []
    for splits in held_out_scans(job, job.targets, alone=False, notes=[]).values():
        for split, data in splits.items():
            inputs = data.inputs(range(len(data)), cpu).flatten(1).nan_to_num(nan=0.0).numpy()
            if len(data) == 0:
                continue
            scores = model.predict(inputs)[:, None] if target.kind == "regression" else model.predict_proba(inputs)
            parts.append(Predictions.of(data, target, scores[:, 1:] if target.kind == "binary" else scores, split))
    return Predictions.concatenate(parts)


@dataclass(frozen=True)
class Cell:
    """A figure of a start and stage under a condition.

    Attributes:
        labels: subjects whose labels were trained on, mean over the seeds.
        mean: over the seeds.
        interval: 95 %, over resamples of the held-out subjects, of the mean over the seeds.
        lead: its difference from scratch under the same condition, with its interval over the same resamples; None for scratch.
        second: mean over the seeds of accuracy, or with a number of r2; None where a seed has none.
        unseen: the figure at the sites left out, with its interval likewise; None where there are none.
    """

    labels: float
    mean: float
    interval: tuple[float, float]
    lead: tuple[float, float, float] | None
    second: float | None
    unseen: tuple[float, float, float] | None


Study = dict[tuple[str, str, Point], Cell]
"""By start, stage and condition."""


def read_study(parts: Sequence[Part], config: RunConfig) -> Study:
    """Every cell whose seeds are all finished; the sites that were left out, one after the other, count as one unseen part."""
    study: Study = {}
    reference: dict[Point, NDArray[np.float64]] = {}
    by_start = {start: [part for part in parts if part.start == start] for start in dict.fromkeys(part.start for part in parts)}
    for start in sorted(by_start, key=lambda name: name != "scratch"):
        inside = [part for part in by_start[start] if not part.left_out]
        outside = [part for part in by_start[start] if part.left_out]
        for stage in by_start[start][0].own_stages:
            for point in by_start[start][0].own_points:
                if not all(part.finished(point) for part in by_start[start] if point in part.own_points):
                    continue
                told = [json.loads(part.result(point).read_text(encoding="utf-8")) for part in inside]
                sampled_R = mean_over_seeds(inside, stage, point, unseen=False)
                if start == "scratch":
                    reference[point] = sampled_R
                lead_R = sampled_R - reference[point] if point in reference and start != "scratch" else None
                second = "r2" if config.finetune.target.kind == "regression" else "accuracy"
                values = [figure(about, stage, second) for about in told]
                unseen_R = mean_over_sites(outside, stage, point) if outside and point in outside[0].own_points else None
                study[start, stage, point] = Cell(
                    labels=float(np.mean([about["labels"] for about in told])),
                    mean=float(sampled_R[0]),
                    interval=between(sampled_R),
                    lead=None if lead_R is None else (float(lead_R[0]), *between(lead_R)),
                    second=None if None in values else float(np.mean([v for v in values if v is not None])),
                    unseen=None if unseen_R is None else (float(unseen_R[0]), *between(unseen_R)),
                )
    return study


def between(sampled_R: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of what was resampled; the first is the figure itself."""
    low, high = np.nanquantile(sampled_R[1:], [0.025, 0.975])
    return float(low), float(high)


def figure(about: Mapping[str, Any], stage: str, metric: str) -> float | None:
    """A figure over all target sites."""
    found = [row["value"] for row in about["evaluations"] if (row["stage"], row["metric"], row["site"]) == (stage, metric, "all")]
    return found[0] if found else None


def mean_over_seeds(parts: Sequence[Part], stage: str, point: Point, *, unseen: bool) -> NDArray[np.float64]:
    """The main figure, then its resamples, mean over the seeds, (1 + R,); seeds of the same subjects share their resamples."""
    sampled = []
    for part in parts:
        target = load_config(part.seeded).finetune.target
        predictions = Predictions.load(part.folder / "predictions" / f"{part.name}-{point.name}-{stage}.npz", target)
        targets = set(json.loads(part.result(point).read_text(encoding="utf-8"))["targets"])
        sites = {str(site) for site in np.unique(predictions.site)}
        chosen = sites - targets if unseen else sites & targets
        sampled.append(resampled_figure(predictions, sites=chosen, num_resamples=NUM_RESAMPLES, seed=0))
    return np.asarray(np.mean(sampled, axis=0))


def mean_over_sites(parts: Sequence[Part], stage: str, point: Point) -> NDArray[np.float64]:
    """The main figure at the sites left out, each scored by the encoders that never saw it: mean over sites, then over seeds."""
    sites = sorted({part.left_out for part in parts})
    each = [mean_over_seeds([part for part in parts if part.left_out == site], stage, point, unseen=True) for site in sites]
    return np.asarray(np.mean(each, axis=0))


def verdicts(study: Study, config: RunConfig) -> list[str]:
    """How many labels each start needs for what scratch reaches with all, in sentences."""
    metric, more_is_better = MAIN_FIGURE[config.finetune.target.kind]
    usual = {key: cell for key, cell in study.items() if key[2].epsilon is None}
    whole = {point.fraction: cell for (start, _, point), cell in usual.items() if start == "scratch"}
    if not whole:
        return []
    best = whole[max(whole)]
    lines = []
    for start, stage in dict.fromkeys((start, stage) for start, stage, _ in usual if start != "scratch"):
        course = sorted((cell.labels, cell.mean) for (s, t, _), cell in usual.items() if (s, t) == (start, stage))
        reached = labels_for(best.mean, course, more_is_better=more_is_better)
        goal = f"the {metric} of scratch with all {best.labels:.0f} labels ({best.mean:.3f})"
        if reached is None:
            lines.append(f"{LABELS[start]}, {stage}: {goal} is not reached.")
        else:
            at_most = "at most " if reached == course[0][0] else "about "
            saved = f", {1 - reached / best.labels:.0%} fewer" if reached < best.labels else ""
            lines.append(f"{LABELS[start]}, {stage}: {goal} is reached with {at_most}{reached:.0f} labels{saved}.")
    return lines


def labels_for(goal: float, course: Sequence[tuple[float, float]], *, more_is_better: bool) -> float | None:
    """The fewest labels with which a course of (labels, figure) reaches a goal, between two points on a log scale; None: never.

    >>> round(labels_for(0.8, [(10, 0.7), (100, 0.9)], more_is_better=True), 3)  # halfway on a log scale
    31.623
    >>> labels_for(5.0, [(10, 4.0), (100, 3.0)], more_is_better=False), labels_for(0.95, [(10, 0.7)], more_is_better=True)
    (10, None)
    """
    sign = 1 if more_is_better else -1
    before: tuple[float, float] | None = None
    for labels, value in course:
        if sign * value >= sign * goal:
            if before is None:
                return labels
            share = (goal - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(labels) - math.log(before[0])))
        before = (labels, value)
    return None


def draw(study: Study, config: RunConfig, path: Path) -> None:
    """The main figure against the number of labels, and against epsilon where that varies: a panel a stage, a line a start."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    mpl.use("agg")
    stages = list(dict.fromkeys(stage for start, stage, _ in study if start not in ALONE)) or ["from_scratch"]
    epsilons = sorted({point.epsilon for _, _, point in study if point.epsilon is not None})
    panels = [(stage, private) for private in ([False, True] if epsilons else [False]) for stage in stages]
    canvas = Canvas(figsize=(5.4 * len(stages) + 0.8, 4.6 * len(panels) / len(stages)), layout="constrained")
    axes_of = canvas.subplots(len(panels) // len(stages), len(stages), sharey=True, squeeze=False).flat
    metric, _ = MAIN_FIGURE[config.finetune.target.kind]
    starts = list(dict.fromkeys(start for start, _, _ in study))
    for axes, (stage, private) in zip(axes_of, panels, strict=True):
        for number, start in enumerate(starts):
            own = ALONE.get(start, stage)
            cells = {
                (epsilons.index(point.epsilon) if point.epsilon is not None else cell.labels): cell
                for (s, t, point), cell in study.items()
                if (s, t) == (start, own) and (point.epsilon is not None) == private
            }
            if not cells:
                continue
            places = sorted(cells)
            means = [cells[place].mean for place in places]
            low_high = [[abs(cells[place].interval[side] - cells[place].mean) for place in places] for side in (0, 1)]
            # Side by side, so that intervals can be told apart.
            aside = number - len(starts) / 2
            shifted = [place + 0.04 * aside if private else place * 1.03**aside for place in places]
            style = {"color": "#5d6975", "ls": "--" if start == "scratch" else ":"} if start in ALONE else {"color": f"C{number}"}
            axes.errorbar(
                shifted, means, yerr=low_high, marker="o", ms=4, lw=1.4, elinewidth=0.8, capsize=2, label=LABELS[start], **style
            )
        if private:
            axes.set_xticks(range(len(epsilons)), ["clipped, no noise" if e == math.inf else f"{e:g}" for e in epsilons])
            axes.set_xlabel("epsilon of DP-SGD, all labels")
        else:
            axes.set_xscale("log")
            ticks = sorted({round(cell.labels) for (_, _, point), cell in study.items() if point.epsilon is None})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_xlabel("subjects with labels")
        axes.set_title(stage.replace("_", " "), fontsize=10)
        axes.set_ylabel(f"{config.finetune.target.task}: {metric} on held-out subjects")
        axes.label_outer()
    canvas.axes[len(stages) - 1].legend(fontsize=8, frameon=False)
    canvas.savefig(path, dpi=150)


def rows_of(study: Study, config: RunConfig) -> tuple[list[str], list[list[str]]]:
    """The study as a table: headings and cells."""
    metric, _ = MAIN_FIGURE[config.finetune.target.kind]
    second = "r2" if config.finetune.target.kind == "regression" else "accuracy"
    unseen = any(cell.unseen for cell in study.values())
    headings = [
        "start",
        "stage",
        "labels",
        f"{metric} [95 %]",
        "against scratch",
        second,
        *([f"{metric}, left-out sites"] * unseen),
    ]
    order = list(STARTS)
    rows = []
    by_place = sorted(study.items(), key=lambda item: (order.index(item[0][0]), item[0][1], item[0][2].order))
    for (start, stage, point), cell in by_place:
        row = [
            LABELS[start],
            stage,
            f"{cell.labels:.0f} ({point.fraction:.0%})"
            if point.epsilon is None
            else f"{cell.labels:.0f}, epsilon {point.epsilon:g}",
            f"{cell.mean:.3f} [{cell.interval[0]:.3f}, {cell.interval[1]:.3f}]",
            "-" if cell.lead is None else f"{cell.lead[0]:+.3f} [{cell.lead[1]:+.3f}, {cell.lead[2]:+.3f}]",
            "-" if cell.second is None else f"{cell.second:.3f}",
        ]
        if unseen:
            row.append("-" if cell.unseen is None else f"{cell.unseen[0]:.3f} [{cell.unseen[1]:.3f}, {cell.unseen[2]:.3f}]")
        rows.append(row)
    return headings, rows


def show(study: Study, config: RunConfig, seeds: int) -> None:
    """Print the table and the sentences."""
    from rich.console import Console
    from rich.table import Table

    headings, rows = rows_of(study, config)
    table = Table(title=f"{config.name}: {config.finetune.target.task} on held-out subjects, mean over {seeds} seeds")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=190).print(table)
    for line in verdicts(study, config):
        typer.echo(line)


def default_starts(config: RunConfig) -> tuple[str, ...]:
    """Every start that the data allow but MICLe, which needs subjects of two scans; images without ages leave y-aware out."""
    without = {"micle"} | ({"yaware", "yaware_fairkl"} if config.data.kind == "medmnist" else set())
    without |= {"pca"} if config.finetune.target.kind == "multilabel" else set()
    return tuple(start for start in STARTS if start not in without)


@app.command()
def main(
    overrides: Overrides = None,
    start: Annotated[list[str] | None, typer.Option(help=f"Measure this one; repeat for more. All: {', '.join(STARTS)}.")] = None,
    fraction: Annotated[
        list[float] | None, typer.Option(help="Share of the labels; repeat for more. Default: 0.1 0.5 1.")
    ] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Also fine-tune with DP-SGD that spends this, on all labels; inf clips alone; repeat for more."),
    ] = None,
    delta: Annotated[float, typer.Option(help="Of DP-SGD; less than 1 / subjects of the smallest target site.")] = 1e-4,
    stage: Annotated[list[str] | None, typer.Option(help="Stage from an encoder; repeat for more. Default: the run's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pretrainings, draws and fine-tunings, with seeds 0, 1, ...")] = 3,
    leave_each_out: Annotated[
        bool, typer.Option("--leave-each-out", help="Also leave each target site out of everything, and score it unseen.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of the study. Default: runs/transfer-<name of the run>.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes at once; 0: one a CPU core.")] = 0,
) -> None:
    """Compare starts of fine-tuning by the number of labels; started again, it goes on where it stopped.

    table.md, figure.png and study.json in the output folder hold the figure that counts (AUC; years or units of a number) on
    held-out subjects for every start, stage and number of labels, and its difference from scratch, both with intervals over these
    subjects; and how many labels a start needs for what scratch reaches with all.
    """
    config = checked(overrides or [])
    starts = tuple(start or default_starts(config))
    fractions = tuple(sorted(set(fraction or (0.1, 0.5, 1.0))))
    points = (*(Point(part) for part in fractions), *(Point(epsilon=value, delta=delta) for value in sorted(set(epsilon or ()))))
    stages = tuple(stage or [name for name in config.finetune.stages if name != "from_scratch"])
    wrong = [f"--start must be of {list(STARTS)}, got {name!r}" for name in starts if name not in STARTS]
    wrong += [f"--fraction must be more than 0 and at most 1, got {value}" for value in fractions if not 0 < value <= 1]
    if not stages:
        wrong.append("finetune.stages must name one beside from_scratch, or --stage one, got none")
    if config.data.root is None:
        wrong.append(f"data.{config.data.PLACES[0]} must name the data, got null")
    if wrong:
        typer.echo(f"transfer: {wrong[0]}.", err=True)
        raise typer.Exit(2)
    for name in starts:
        checked([*(overrides or ()), *shlex.split(STARTS[name])])
    for point in points:
        tuned = f"finetune.stages=[{','.join(stages)}]"
        checked([*(overrides or ()), "start=random", *WITHOUT_PRETRAINING, *point.overrides, tuned])
    source = config.data.source(default_cache_root(), config.data.places)
    decode_first(source)
    folder = output or Path("runs") / f"transfer-{config.name}"
    left_out = ("", *(config.data.target_sites or source.sites())) if leave_each_out else ("",)
    parts = [
        Part(tuple(overrides or ()), name, seed, site, points, stages, folder)
        for site in left_out
        for seed in range(seeds)
        for name in starts
    ]
    measure(parts, workers or len(os.sched_getaffinity(0)))
    study = read_study(parts, config)
    about = {
        "overrides": overrides or [],
        "seeds": seeds,
        "cells": [
            {"start": name, "stage": tuned, "condition": point.name, **asdict(cell)}
            for (name, tuned, point), cell in study.items()
        ],
        "verdicts": verdicts(study, config),
        "seconds": seconds_of(parts),
    }
    write_atomically(folder / "study.json", json.dumps(about, indent=1).encode())
    headings, rows = rows_of(study, config)
    lines = [headings, ["---"] * len(headings), *rows]
    write_atomically(folder / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
    draw(study, config, folder / "figure.png")
    show(study, config, seeds)
    typer.echo(f"{about['seconds']:.0f} s of one core each in all; table, figure and every figure: {folder}")


def seconds_of(parts: Sequence[Part]) -> float:
    """What all of it took, each process for itself."""
    told = [[json.loads(part.result(point).read_text(encoding="utf-8")) for point in part.own_points] for part in parts]
    return float(
        sum(max(about["pretraining_seconds"] for about in part) + sum(about["seconds"] for about in part) for part in told)
    )


def measure(parts: Sequence[Part], workers: int) -> None:
    """Carry out the parts side by side."""

    def step(part: Part, point: Point) -> Step:
        def told() -> str:
            about = json.loads(part.result(point).read_text(encoding="utf-8"))
            private = "" if point.epsilon is None else f", epsilon {point.epsilon:g}"
            return f"{part.name}, {about['labels']} labels{private} ({about['seconds']:.0f} s)"

        return Step(lambda: part.finished(point), told)

    steps = [step(part, point) for part in parts for point in part.own_points]
    side_by_side("transfer", "starts x conditions x seeds", carry_out, parts, steps, workers)


if __name__ == "__main__":
    sys.exit(app())
