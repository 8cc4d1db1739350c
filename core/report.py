"""From the evaluations of a run to one page a person can read offline.

`write_report` draws the figures and writes report.html; what it says first is computed from the numbers.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.metrics import roc_curve

from core import __version__
from core.checkpoint import write_atomically
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, NotEvaluableError
from core.evaluation.predictions import Predictions, confusion, operating_points, reliability, subject_rows
from core.evaluation.probes import planar_map
from core.evaluation.words import LINEAR_PROBES, figure, find, linear_probe, verdict, with_interval
from core.report_page import PAGE
from core.stages import STAGES as TUNED_STAGES

STAGES = {
    "raw": "Raw voxels + PCA",
    "untrained": "Untrained encoder",
    "pretrained": "Pretrained encoder",
    "erased": "Pretrained, site erased",
    "linear_probe": "Linear probe",
    "last_block": "Last block",
    "full_finetuning": "Full fine-tuning",
    "frozen_then_unfrozen": "Frozen, then unfrozen",
    "from_scratch": "From scratch",
    "age_sex_floor": "Floor: age and sex only",
    "chance": "Chance",
    "pretrain": "Pretraining",
}
METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "balanced_accuracy_knn": "balanced accuracy, 10-NN",
    "balanced_accuracy_boosting": "balanced accuracy, boosting",
    "balanced_accuracy_heldout": "balanced accuracy among held-out",
    "balanced_accuracy_knn_heldout": "balanced accuracy among held-out, 10-NN",
    "balanced_accuracy_lda": "balanced accuracy, discriminants from sums",
    "balanced_accuracy_logistic": "balanced accuracy, logistic from gradients",
    "balanced_accuracy_nearest": "balanced accuracy, nearest mean",
    "balanced_accuracy_binned": "balanced accuracy, counted at the sites",
    "ilisi": "sites mixed, iLISI",
    "ilisi_normalised": "sites mixed, share of random",
    "silhouette": "silhouette",
    "mmd2": "MMD² between sites",
    "explained_variance": "variance explained",
    "auc": "AUC",
    "auc_lda": "AUC, discriminants from sums",
    "auc_binned": "AUC, from histograms",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier score",
    "ece": "calibration error",
    "rmse": "RMSE, years",
    "pearson": "correlation",
    "calibration_slope": "slope of true on predicted",
    "mae": "MAE, years",
    "mae_sums": "MAE from sums, years",
    "mae_sums_unseen": "MAE from sums at unseen sites, years",
    "r2_sums": "R² from sums",
    "mae_unseen": "MAE at unseen sites, years",
    "mae_leave_site_out": "MAE, site left out of the fit, years",
    "r2": "R²",
    "slope": "slope of predicted on true",
    "bias": "bias, years",
    "bias_unseen": "bias at unseen sites, years",
    "openbhb_bacc": "OpenBHB balanced accuracy",
    "openbhb_mae": "OpenBHB MAE, years",
    "openbhb_mae_unseen": "OpenBHB MAE at unseen sites, years",
    "openbhb_score": "OpenBHB score",
}
REFERENCES = ("chance", "age_sex_floor")
ENDINGS = {"_female": ", female subjects", "_male": ", male subjects", "_unseen": " at unseen sites"}
# What a table of a fine-tuned model shows beside its first figures, and of whom.
DETAILS = (
    "average_precision",
    "sensitivity",
    "specificity",
    "accuracy",
    "brier",
    "ece",
    "rmse",
    "pearson",
    "calibration_slope",
)
FIRST = ("auc", "balanced_accuracy", "mae", "r2")
OF_WHOM = (*FIRST, "sensitivity", "specificity")
# Filled: a linear probe; the floor and chance drawn are those of the probe fitted on train.
PROBE_MARKERS = {
    **dict.fromkeys(LINEAR_PROBES, "o"),
    "balanced_accuracy_knn": "o",
    "balanced_accuracy_boosting": "s",
    "balanced_accuracy_heldout": "D",
}
HOLLOW = (
    "balanced_accuracy_knn",
    "balanced_accuracy_nearest",
    "balanced_accuracy_boosting",
    "mae_unseen",
    "mae_sums_unseen",
    "auc_unseen",
)
AGE_ERRORS = ("mae", "mae_unseen", "mae_sums", "mae_sums_unseen")
AREAS = ("auc", "auc_lda", "auc_binned")
TARGET_FIGURE = "target_"
DIAGNOSIS_TITLE = "Diagnosis AUC"
MAX_SCANS_IN_MAP = 1000
MAX_SITES_IN_LEGEND = 21

# Okabe and Ito's colours without yellow, which is too light on white; the marker tells sites apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
INK, SOFT, GRID = "#1c2530", "#5d6975", "#e2e6ea"
FROZEN = ("raw", "untrained", "pretrained", "erased")
TUNED_COLOURS = {**{str(stage): "#0072B2" for stage in TUNED_STAGES}, "from_scratch": "#D55E00", "pretrained": INK}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#aab3bb",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a report is made of; any part may be empty.

    Attributes:
        name: Of the run.
        config: The run's configuration, nested.
        status: How it ended, in words.
        sites: One mapping a site: name, role, scans, subjects, scanners (a number or names), age_range (text),
            problems ({what: count}).
        rounds: The lines of rounds.jsonl: stage, round, seconds, sites {site: {"loss": ..., "fairkl": ...}},
            failures {site: text}.
        evaluations: As in metrics.json.
        maps: Embeddings by stage, those that were shared.
        notes: Sentences on what was left out, and why.
        traffic: Bytes of arrays that crossed the wire, by what they are and "to sites" or "from sites".
        predictions: What fine-tuned models say of single scans, by stage, where sites share it.
    """

    name: str
    status: str
    config: Mapping[str, Any] = field(default_factory=dict)
    sites: Sequence[Mapping[str, Any]] = ()
    rounds: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Evaluation] = ()
    maps: Mapping[str, Embeddings] = field(default_factory=dict)
    notes: Sequence[str] = ()
    traffic: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    predictions: Mapping[str, Predictions] = field(default_factory=dict)


def write_report(folder: Path, record: RunRecord) -> Path:
    """Write report.html and figures/*.png into an existing folder.

    Returns:
        The path of report.html, which holds the figures itself and fetches nothing.
    """
    looks = _site_looks(record)
    figures, map_notes = _figures(record, looks)
    for name, png in figures.items():
        write_atomically(folder / "figures" / f"{name}.png", png)
    path = folder / "report.html"
    write_atomically(path, _page(record, looks, figures, map_notes).encode())
    return path


# ---- numbers and words


def _stage(stage: str) -> str:
    return STAGES.get(stage, stage)


def _metric(metric: str, task: str) -> str:
    """A metric in words, of whom, and in years only where it is of ages."""
    words = METRICS.get(metric, metric)
    for ending, of_whom in ENDINGS.items():
        base = metric.removesuffix(ending)
        if metric not in METRICS and base != metric and base in METRICS:
            words = METRICS[base] + of_whom
    return words.replace(", years", "") if task != "age" and metric.startswith(("mae", "rmse")) else words


def _measure(e: Evaluation) -> str:
    return f"{e.task}: {_metric(e.metric, e.task)}"


def _in_order(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """By task and metric as they came, then by stage as known, constants last."""
    rows = list(evaluations)
    kinds = list(dict.fromkeys((e.task, e.metric.removesuffix("_knn")) for e in rows))
    stages = [*STAGES, *dict.fromkeys(e.stage for e in rows if e.stage not in STAGES)]
    return sorted(rows, key=lambda e: (kinds.index((e.task, e.metric.removesuffix("_knn"))), stages.index(e.stage)))


def _row_labels(rows: Sequence[Evaluation]) -> list[str]:
    """The stage, and whatever else differs between rows."""
    regimes, seeds = len({e.regime for e in rows}) > 1, len({e.seed for e in rows}) > 1
    return [_stage(e.stage) + (f", {e.regime}" if regimes else "") + (f", seed {e.seed}" if seeds else "") for e in rows]


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
        cards.append({"title": title.replace("{stage}", _stage(now.stage).lower()), "now": now, "beside": ", ".join(beside)})
    return cards


def _capital(task: str) -> str:
    return task[:1].upper() + task[1:]


@dataclass(frozen=True)
class _Tuned:
    """What is fine-tuned: the stages, the tasks of the section, and the labels that are one task together."""

    stages: tuple[str, ...]
    tasks: tuple[str, ...]
    labels: tuple[str, ...]

    def owns(self, e: Evaluation) -> bool:
        """Whether a figure belongs to the section: probes of age and of site have their own."""
        if e.stage in self.stages:
            return e.task in (*self.tasks, *self.labels)
        return e.task in self.tasks and e.task not in ("site", "scanner", "age")

    def is_detail(self, e: Evaluation) -> bool:
        """Whether it is shown in a table of details only."""
        by_metric = e.metric.startswith(DETAILS) or e.metric.endswith(tuple(ENDINGS))
        return e.stage in self.stages and (e.task in self.labels or by_metric)


def _tuned(record: RunRecord) -> _Tuned:
    stages = (*TUNED_STAGES, *(stage for stage in record.predictions if stage not in TUNED_STAGES))
    told = [e.task for e in record.evaluations if e.stage in stages]
    tasks = dict.fromkeys([*(found.target.task for found in record.predictions.values()), *told])
    labels = [task for task in tasks if "findings" in tasks and task != "findings"]
    return _Tuned(stages, tuple(dict.fromkeys([*(task for task in tasks if task not in labels), "diagnosis"])), tuple(labels))


def _details(evaluations: Sequence[Evaluation], tuned: _Tuned) -> list[dict[str, Any]]:
    """Tables of fine-tuned models over all sites, a column a stage: further figures, of whom, of each label."""
    rows = [e for e in _in_order(evaluations) if e.stage in tuned.stages and e.site == "all"]
    of_tasks = [e for e in rows if e.task in tuned.tasks]
    of_groups = [e for e in of_tasks if e.metric.endswith(tuple(ENDINGS))]
    plain = [e for e in of_tasks if e.metric in DETAILS]
    first = [e for ending in ENDINGS for e in of_groups if e.metric.removesuffix(ending) in OF_WHOM]
    labels = [e for e in rows if e.task in tuned.labels and e.metric == "auc"]
    wanted = (
        ("Further figures", plain, _measure),
        ("Of whom, and at unseen sites", first, _measure),
        ("AUC of each label", labels, lambda e: e.task),
    )
    tables = []
    for title, chosen, name in wanted:
        columns = list(dict.fromkeys(_row_labels(chosen)))
        cells: dict[str, dict[str, Evaluation]] = {}
        for e, column in zip(chosen, _row_labels(chosen), strict=True):
            cells.setdefault(name(e), {}).setdefault(column, e)
        if chosen:
            listed = [(row, [of_row.get(column) for column in columns]) for row, of_row in cells.items()]
            tables.append({"title": title, "first": "Measure", "columns": columns, "rows": listed})
    return tables


def _at_known_sites(record: RunRecord) -> dict[str, Predictions]:
    """By stage, of the sites that it was trained at: the unseen ones have figures of their own."""
    unseen = {(e.stage, e.site) for e in record.evaluations if e.metric.endswith("_unseen")}
    return {
        stage: found.select(np.array([(stage, site) not in unseen for site in found.site.tolist()], dtype=bool))
        for stage, found in record.predictions.items()
    }


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
            tables.append({"first": f"{_stage(stage)}: truly", "columns": heads, "rows": rows})
            continue
        several = len(target.labels) > 1
        thresholds_L, _ = operating_points(found)
        no, yes = ("absent", "present") if several else target.names
        heads = ["from score", f"{yes}: told", f"{yes}: missed", f"{no}: told", f"{no}: taken for {yes}"]
        for label, threshold, counts in zip(target.labels, thresholds_L, counts_LCC, strict=True):
            cells = [f"{threshold:.3f}", *map(str, (counts[1, 1], counts[1, 0], counts[0, 0], counts[0, 1]))]
            pairs.setdefault(tuple(heads), []).append((f"{_stage(stage)}, {label}" if several else _stage(stage), cells))
    return tables + [{"first": "Stage", "columns": list(heads), "rows": rows} for heads, rows in pairs.items()]


def _pivots(evaluations: Sequence[Evaluation], sites: Sequence[str], tuned: _Tuned) -> list[dict[str, Any]]:
    """Figures of single sites: a table a task, a row a site, a column a stage and metric."""
    tables = []
    first = [e for e in evaluations if e.task in tuned.tasks and e.metric.removesuffix("_unseen") in FIRST]
    single = _in_order(e for e in evaluations if e.site != "all" and (e in first or not tuned.is_detail(e)))
    for task in dict.fromkeys(e.task for e in single):
        rows = [e for e in single if e.task == task]
        columns: dict[str, dict[str, Evaluation]] = {}
        for e, label in zip(rows, _row_labels(rows), strict=True):
            metric = e.metric.removesuffix("_unseen")
            columns.setdefault(f"{label}: {_metric(metric, task)}", {}).setdefault(e.site, e)
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
        stage = _stage(str(line["stage"]))
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
        facts.append(f"{_stage(stage).lower()} {len(of_stage)} rounds in {_duration(sum(x['seconds'] for x in of_stage))}")
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


def _page(record: RunRecord, looks: Mapping[str, "_Look"], figures: Mapping[str, bytes], map_notes: Sequence[str]) -> str:
    overall = _in_order(e for e in record.evaluations if e.site == "all")
    tuned = _tuned(record)
    probed = [e for e in overall if not tuned.owns(e)]
    shown = ("site", "scanner", "age")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(figure=figure, stage=_stage, measure=_measure)
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
        confusions=_confusions(_at_known_sites(record)),
        other_rows=[e for e in probed if e.task not in shown],
        pivots=_pivots(record.evaluations, list(looks), tuned),
        problems=_problems(record),
        traffic=_traffic_rows(record.traffic),
        colours={site: look.colour for site, look in looks.items()},
    )


def _tuned_title(record: RunRecord, tuned: _Tuned) -> str:
    """Diagnosis AUC where nothing else is fine-tuned."""
    if tuned.tasks == ("diagnosis",) and not record.predictions:
        return DIAGNOSIS_TITLE
    return f"Fine-tuning: {', '.join(_told(record, task) for task in tuned.tasks if task != 'diagnosis') or 'diagnosis'}"


def _told(record: RunRecord, task: str) -> str:
    """A task by what is told in it."""
    labels = {found.target.labels for found in record.predictions.values() if found.target.task == task}
    return ", ".join(min(labels)) if labels else task


# ---- figures


@dataclass(frozen=True)
class _Look:
    """How a site is drawn, everywhere."""

    colour: str
    marker: str
    line: str


def _site_looks(record: RunRecord) -> dict[str, _Look]:
    named = [str(site["name"]) for site in record.sites]
    met = [site for line in record.rounds for site in line["sites"]]
    met += [site for embeddings in record.maps.values() for site in np.unique(embeddings.site).tolist()]
    met += [e.site for e in record.evaluations if e.site != "all"]
    met += [site for found in record.predictions.values() for site in np.unique(found.site).tolist()]
    sites = [*dict.fromkeys(named), *sorted(set(met) - set(named))]
    return {
        site: _Look(
            COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)]
        )
        for i, site in enumerate(sites)
    }


def _figures(record: RunRecord, looks: Mapping[str, _Look]) -> tuple[dict[str, bytes], list[str]]:
    """PNG by name, those for which there is something to draw, and remarks on the map."""
    tuned = _tuned(record)
    with rc_context(STYLE):
        map_figure, map_notes = _draw_maps(record.maps, looks)
        drawn = {
            "losses_pretraining": _draw_losses(record.rounds, looks, pretraining=True),
            "losses_finetuning": _draw_losses(record.rounds, looks, pretraining=False),
            "embeddings": map_figure,
            "site_predictability": _draw_site_predictability(record.evaluations),
            "age_error": _draw_age_error([e for e in record.evaluations if not tuned.owns(e)], looks),
            **{
                "diagnosis_auc" if task == "diagnosis" else f"{TARGET_FIGURE}{number}": _draw_target(
                    [e for e in record.evaluations if e.task == task and tuned.owns(e)], looks
                )
                for number, task in enumerate(tuned.tasks, start=1)
            },
            "predictions": _draw_predictions(_at_known_sites(record), looks),
        }
        return {name: _png(figure) for name, figure in drawn.items() if figure is not None}, map_notes


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=170, metadata={"Software": None})
    return content.getvalue()


def _short(name: str, length: int = 26) -> str:
    """A name for a legend, which leaves out what starts with an underscore."""
    name = " ".join(name.split())
    name = name if len(name) <= length else name[: length - 1] + "…"
    return f" {name}" if name.startswith("_") else name


def _draw_losses(rounds: Sequence[Mapping[str, Any]], looks: Mapping[str, _Look], *, pretraining: bool) -> Figure | None:
    lines = [line for line in rounds if (line["stage"] == "pretrain") == pretraining]
    panels = [(stage, "loss") for stage in dict.fromkeys(line["stage"] for line in lines)]
    if any(values.get("fairkl") for line in lines for values in line["sites"].values()):
        panels += [(stage, "fairkl") for stage, _ in panels]
    if not panels:
        return None
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (stage, metric) in zip(axes, panels, strict=True):
        for site, look in looks.items():
            points = [
                (line["round"], line["sites"][site][metric])
                for line in lines
                if line["stage"] == stage and metric in line["sites"].get(site, {})
            ]
            finite = [(number, value) for number, value in points if math.isfinite(value)]
            every = max(1, len(finite) // 8)
            if finite:
                axis.plot(
                    *zip(*finite, strict=True),
                    color=look.colour,
                    linestyle=look.line,
                    marker=look.marker,
                    markersize=4,
                    markevery=every,
                )
        axis.set_title(f"{_short(_stage(stage))}, {'FairKL' if metric == 'fairkl' else metric}")
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y")
    present = [site for site in looks if any(site in line["sites"] for line in lines)]
    _site_legend(figure, present, looks, lines=True)
    return figure


def _site_legend(figure: Figure, sites: Sequence[str], looks: Mapping[str, _Look], *, lines: bool) -> None:
    shown = sites[:MAX_SITES_IN_LEGEND]
    handles = [
        Line2D(
            [],
            [],
            color=looks[site].colour,
            marker=looks[site].marker,
            linestyle=looks[site].line if lines else "none",
            markersize=5.5,
            label=_short(site),
        )
        for site in shown
    ]
    if len(sites) > len(shown):
        handles.append(Line2D([], [], linestyle="none", label=f"and {len(sites) - len(shown)} more sites"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), columnspacing=2.2)


def _draw_maps(maps: Mapping[str, Embeddings], looks: Mapping[str, _Look]) -> tuple[Figure | None, list[str]]:
    """Rows are stages, columns are site, age and diagnosis."""
    notes, rows = [], []
    for stage in sorted(maps, key=lambda stage: (*STAGES, stage).index(stage)):
        embeddings = maps[stage]
        if len(embeddings) > MAX_SCANS_IN_MAP:
            notes.append(f"{_stage(stage)}: {MAX_SCANS_IN_MAP} of {len(embeddings)} scans are drawn, chosen at random.")
            chosen = np.random.default_rng(0).choice(len(embeddings), MAX_SCANS_IN_MAP, replace=False)
            embeddings = embeddings.select(np.sort(chosen))
        try:
            rows.append((stage, embeddings, planar_map(embeddings)))
        except NotEvaluableError as reason:
            notes.append(f"{_stage(stage)}: {reason}")
    if not rows:
        return None, notes
    ages = np.concatenate([embeddings.age_years for _, embeddings, _ in rows])
    has_ages = bool(np.isfinite(ages).any())
    figure = Figure(figsize=(10, 3.15 * len(rows) + 0.75), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for axes_row, (stage, embeddings, place_N2) in zip(axes, rows, strict=True):
        for axis, title in zip(axes_row, ("by site", "by age", "by diagnosis"), strict=True):
            axis.set(xticks=[], yticks=[], title=f"{_short(_stage(stage))}, {title}")
            axis.set_box_aspect(0.86)
            axis.margins(0.06)
            axis.spines[:].set(visible=True, color=GRID)
        for held_out in (False, True):
            size, opacity, edge = (30, 0.95, 0.5) if held_out else (11, 0.4, 0.0)
            common = {"s": size, "alpha": opacity, "linewidths": edge, "edgecolors": "white"}
            part = (embeddings.split == "test") == held_out
            for site in [site for site in looks if (embeddings.site[part] == site).any()]:
                at = place_N2[part & (embeddings.site == site)]
                axes_row[0].scatter(*at.T, color=looks[site].colour, marker=looks[site].marker, **common)
            unknown = part & ~np.isfinite(embeddings.age_years)
            axes_row[1].scatter(*place_N2[unknown].T, color="#c9cfd4", marker="x", s=size, alpha=opacity, linewidths=0.8)
            if has_ages:
                known = part & ~unknown
                points = axes_row[1].scatter(
                    *place_N2[known].T,
                    c=embeddings.age_years[known],
                    cmap="viridis",
                    vmin=np.nanmin(ages),
                    vmax=np.nanmax(ages),
                    **common,
                )
            for diagnosis, (colour, marker, _) in DIAGNOSIS_LOOKS.items():
                at = place_N2[part & (embeddings.diagnosis == diagnosis)]
                axes_row[2].scatter(*at.T, color=colour, marker=marker, **common)
    if has_ages:
        bar = figure.colorbar(points, cax=axes[-1, 1].inset_axes((0.12, -0.075, 0.76, 0.035)), orientation="horizontal")
        bar.outline.set_visible(False)
        bar.set_label("age, years", labelpad=1)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=5.5, label=label)
        for diagnosis, (colour, marker, label) in DIAGNOSIS_LOOKS.items()
        if any((embeddings.diagnosis == diagnosis).any() for _, embeddings, _ in rows)
    ]
    axes[-1, 2].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(handles))
    present = [site for site in looks if any((embeddings.site == site).any() for _, embeddings, _ in rows)]
    _site_legend(figure, present, looks, lines=False)
    return figure, notes


DIAGNOSIS_LOOKS = {
    "": ("#c9cfd4", ".", "unknown"),
    "control": ("#56B4E9", "o", "control"),
    "patient": ("#D55E00", "^", "patient"),
}


def _draw_site_predictability(evaluations: Sequence[Evaluation]) -> Figure | None:
    panels = []
    for task in ("site", "scanner"):
        rows = _in_order(
            e
            for e in evaluations
            if e.task == task and e.site == "all" and e.stage not in REFERENCES and e.metric in PROBE_MARKERS
        )
        if rows:
            panels.append((task, rows))
    if not panels:
        return None
    tallest = max(len(rows) for _, rows in panels)
    figure = Figure(figsize=(10, 1.5 + 0.3 * tallest), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, rows) in zip(axes, panels, strict=True):
        for stage, colour in (("chance", SOFT), ("age_sex_floor", "#009E73")):
            reference = find(evaluations, stage, task, linear_probe(evaluations))
            if reference is None:
                continue
            axis.axvline(reference.value, color=colour, linewidth=1.2, linestyle=":" if stage == "chance" else "-", zorder=1)
            if reference.low is not None:
                axis.axvspan(reference.low, reference.high, color=colour, alpha=0.1, linewidth=0, zorder=0)
        labels = _row_labels(rows)
        colours = [INK if e.stage == "pretrained" else SOFT for e in rows]
        _dots(axis, rows, labels, colours, [PROBE_MARKERS[e.metric] for e in rows])
        if axis is not axes[0] and labels == _row_labels(panels[0][1]):
            axis.set_yticklabels([])
        axis.set(title=f"Which {task}?", xlabel="balanced accuracy", xlim=(0, 1))
    handles = [
        Line2D([], [], color=INK, marker="o", linestyle="-", linewidth=1.2, label="linear probe"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="-", linewidth=1.2, label="10-NN"),
        Line2D([], [], color=INK, marker="s", markerfacecolor="white", linestyle="-", linewidth=1.2, label="boosting"),
        Line2D([], [], color=INK, marker="D", linestyle="-", linewidth=1.2, label="linear, among held-out subjects"),
        Line2D([], [], color="#009E73", linewidth=1.2, label="floor of the linear probe: age and sex only, 95 % band"),
        Line2D([], [], color=SOFT, linewidth=1.2, linestyle=":", label="chance"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=2.2)
    return figure


def _draw_age_error(evaluations: Sequence[Evaluation], looks: Mapping[str, _Look]) -> Figure | None:
    errors = [e for e in evaluations if e.task == "age" and e.metric in AGE_ERRORS]
    overall = _in_order(e for e in errors if e.site == "all")
    if not overall:
        return None
    last = "pretrained" if any(e.stage == "pretrained" for e in overall) else overall[-1].stage
    single = [e for site in looks for e in errors if e.site == site and e.stage == last]
    panels = 2 if single else 1
    figure = Figure(figsize=(10, 1.2 + 0.3 * max(len(overall), len(single))), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharex=True)[0]
    unseen = {True: ", unseen sites", False: ""}
    labels = [f"{label}{unseen[e.metric.endswith('_unseen')]}" for e, label in zip(overall, _row_labels(overall), strict=True)]
    _dots(axes[0], overall, labels, [INK if e.stage == "pretrained" else SOFT for e in overall])
    axes[0].set(title="All sites", xlabel="mean absolute error, years")
    if single:
        labels = [f"{_short(e.site)}{' (unseen)' if e.metric.endswith('_unseen') else ''}" for e in single]
        markers = [looks[e.site].marker for e in single]
        _dots(axes[1], single, labels, [looks[e.site].colour for e in single], markers)
        axes[1].set(title=f"{_short(_stage(last))}, by site", xlabel="mean absolute error, years")
    axes[0].set_xlim(left=0)
    return figure


def _draw_target(evaluations: Sequence[Evaluation], looks: Mapping[str, _Look]) -> Figure | None:
    """AUC, or the mean absolute error, of a task that is fine-tuned: by stage, and by site of the last stage but from scratch."""
    areas = any(e.metric in AREAS and e.site == "all" for e in evaluations)
    metrics, unseen = (AREAS, "auc_unseen") if areas else (("mae",), "mae_unseen")
    rows = _in_order(e for e in evaluations if e.site == "all" and e.metric in (*metrics, unseen))
    if not rows:
        return None
    by_site = [e for site in looks for e in evaluations if e.site == site and e.metric in (*metrics, unseen)]
    stages = [e.stage for e in rows if any(e.stage == single.stage for single in by_site)]
    last = next((stage for stage in reversed(stages) if stage != "from_scratch"), stages[-1] if stages else None)
    single = [e for e in by_site if e.stage == last and e.regime == by_site[-1].regime]
    figure = Figure(figsize=(10, 1.1 + 0.32 * max(len(rows), len(single))), layout="constrained")
    axes = figure.subplots(1, 2 if single else 1, squeeze=False, sharex=True)[0]
    labels = [
        f"{label}{', frozen' if e.stage in FROZEN[:3] else ''}{', unseen sites' if e.metric == unseen else ''}"
        for e, label in zip(rows, _row_labels(rows), strict=True)
    ]
    _dots(axes[0], rows, labels, [TUNED_COLOURS.get(e.stage, SOFT) for e in rows])
    if single:
        labels = [f"{_short(e.site)}{' (unseen)' if e.metric == unseen else ''}" for e in single]
        _dots(axes[1], single, labels, [looks[e.site].colour for e in single], [looks[e.site].marker for e in single])
        axes[0].set_title("All sites")
        axes[1].set_title(f"{_short(_stage(str(last)))}, by site")
    for axis in axes:
        if areas:
            low = min(0.4, *(e.value if e.low is None else e.low for e in [*rows, *single]))
            axis.axvline(0.5, color=SOFT, linewidth=1.2, linestyle=":", zorder=1)
            axis.set(xlabel="area under the ROC curve (dotted: 0.5, a coin)", xlim=(max(0.0, low - 0.03), 1))
        else:
            axis.set_xlabel(f"mean absolute error{', years' if rows[0].task == 'age' else ''}")
            axis.set_xlim(left=0)
    return figure


def _draw_predictions(known: Mapping[str, Predictions], looks: Mapping[str, _Look]) -> Figure | None:
    """By stage, of held-out subjects: the ROC curve, how often scores come true, or predicted against true numbers."""
    panels: dict[str, list[str]] = {}
    for stage, found in known.items():
        if len(subject_rows(found, "test").truth_M):
            kinds = {"regression": ("scatter",), "binary": ("roc", "reliability")}.get(found.target.kind, ("reliability",))
            for kind in kinds:
                panels.setdefault(kind, []).append(stage)
    if not panels:
        return None
    most = max(map(len, panels.values()))
    grid = (
        [[(kind, stage) for kind in panels for stage in panels[kind]]]
        if most == 1
        else [[(kind, stage) for stage in stages] for kind, stages in panels.items()]
    )
    columns = max(3, *map(len, grid))
    figure = Figure(figsize=(10, (10 / columns + 0.35) * len(grid) + 0.5), layout="constrained")
    axes = figure.subplots(len(grid), columns, squeeze=False)
    draw = {"roc": _draw_roc, "reliability": _draw_reliability}
    for axes_row, row in zip(axes, grid, strict=True):
        for axis, place in zip(axes_row, [*row, *[None] * (columns - len(row))], strict=True):
            if place is None:
                axis.set_axis_off()
                continue
            kind, stage = place
            axis.set_box_aspect(1)
            axis.grid()
            if kind == "scatter":
                _draw_scatter(axis, known[stage], looks)
            else:
                draw[kind](axis, known[stage], TUNED_COLOURS.get(stage, SOFT))
                axis.plot((0, 1), (0, 1), color=SOFT, linewidth=1.2, linestyle=":", zorder=1)
                axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axis.set_title(_short(_stage(stage)))
            if axis is not axes_row[0] and kind == row[0][0]:
                axis.set_ylabel("")
    if "scatter" in panels:
        present = [site for site in looks if any((found.site == site).any() for found in known.values())]
        _site_legend(figure, present, looks, lines=False)
        return figure
    handles = [
        Line2D([], [], color=INK, marker="o", markersize=7, linestyle="-", label="ROC curve, operating point"),
        Line2D([], [], color=INK, marker="s", markersize=5, linestyle="-", linewidth=1.2, label="share that came true, 95 %"),
        Line2D(
            [],
            [],
            color=SOFT,
            linewidth=1.2,
            linestyle=":",
            label=f"{'a coin; ' if 'roc' in panels else ''}scores that mean what they say",
        ),
    ]
    figure.legend(handles=handles if "roc" in panels else handles[1:], loc="outside lower center", ncols=3, columnspacing=2.2)
    return figure


def _draw_roc(axis: Any, found: Predictions, colour: str) -> None:
    """The curve of held-out subjects, and where the operating point chosen on val lies on it."""
    rows = subject_rows(found, "test")
    axis.set(xlabel="1 - specificity", ylabel="sensitivity")
    positive_M, score_M = rows.truth_M == 1, rows.score_MK[:, 0]
    if positive_M.all() or not positive_M.any():
        axis.text(0.5, 0.5, "one class only", ha="center", va="center", color=SOFT)
        return
    false, true, _ = roc_curve(positive_M, score_M)
    axis.plot(false, true, color=colour, zorder=2)
    threshold = operating_points(found)[0][0]
    sensitivity, specificity = (score_M[positive_M] >= threshold).mean(), (score_M[~positive_M] < threshold).mean()
    axis.plot(1 - specificity, sensitivity, marker="o", color=colour, markersize=7, zorder=3)
    lines = (f"from score {threshold:.2f}", f"sensitivity {sensitivity:.2f}", f"specificity {specificity:.2f}")
    axis.text(0.97, 0.05, "\n".join(lines), ha="right", va="bottom", fontsize=8, color=SOFT, linespacing=1.4)


def _draw_reliability(axis: Any, found: Predictions, colour: str) -> None:
    """How often scores come true."""
    bins = reliability(found)
    what = "probability of the class told" if found.target.kind == "multiclass" else "predicted probability"
    axis.set(xlabel=what, ylabel="share that came true")
    if not bins:
        axis.text(0.5, 0.5, "too few subjects", ha="center", va="center", color=SOFT)
        return
    for place in bins:
        axis.plot([place.mean_score] * 2, [place.low, place.high], color=colour, linewidth=1.2, alpha=0.55, zorder=2)
    axis.plot(
        [place.mean_score for place in bins],
        [place.frequency for place in bins],
        color=colour,
        marker="s",
        markersize=4.5,
        linewidth=1.2,
        zorder=3,
    )


def _draw_scatter(axis: Any, found: Predictions, looks: Mapping[str, _Look]) -> None:
    """Predicted against true numbers of held-out subjects, by site."""
    rows = subject_rows(found, "test")
    for site in [site for site in looks if (rows.site_M == site).any()]:
        at = rows.site_M == site
        common = {"color": looks[site].colour, "marker": looks[site].marker, "s": 20, "alpha": 0.75, "linewidths": 0.4}
        axis.scatter(rows.truth_M[at], rows.score_MK[at, 0], edgecolors="white", zorder=2, **common)
    low, high = (limit(rows.truth_M.tolist() + rows.score_MK[:, 0].tolist()) for limit in (min, max))
    margin = 0.05 * (high - low) or 1.0
    axis.plot((low, high), (low, high), color=SOFT, linewidth=1.2, linestyle=":", zorder=1)
    unit = ", years" if found.target.task == "age" else ""
    limits = (low - margin, high + margin)
    axis.set(xlabel=_short(f"true {found.target.task}{unit}"), ylabel=_short(f"predicted{unit}"), xlim=limits, ylim=limits)


def _dots(
    axis: Any,
    rows: Sequence[Evaluation],
    labels: Sequence[str],
    colours: Sequence[str],
    markers: Sequence[str] | None = None,
) -> None:
    """One line a figure, from the top: the value as a dot, hollow for the second probe or set, its interval, the number."""
    for place, (e, colour, marker) in enumerate(zip(rows, colours, markers or ["o"] * len(rows), strict=True)):
        hollow = e.metric in HOLLOW
        if e.low is not None:
            axis.plot([e.low, e.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="round", zorder=2)
        axis.plot(
            e.value,
            place,
            marker=marker,
            color=colour,
            markersize=7,
            markerfacecolor="white" if hollow else colour,
            markeredgewidth=1.6,
            zorder=3,
        )
        axis.annotate(
            with_interval(e),
            (1.015, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=colour if colour == INK else SOFT,
        )
    axis.set_yticks(range(len(rows)), [_short(label, 40) for label in _once(labels)])
    axis.tick_params(axis="y", labelcolor=INK)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)


def _once(labels: Sequence[str]) -> list[str]:
    """Labels without what repeats the line above."""
    return ["" if i and label == labels[i - 1] else label for i, label in enumerate(labels)]
