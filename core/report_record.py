"""What a report is made of, in which order and in which words.

Stages and metrics are those of metrics.json.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation
from core.evaluation.predictions import Predictions
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


def stage_words(stage: str) -> str:
    """A stage in words."""
    return STAGES.get(stage, stage)


def metric_words(metric: str, task: str) -> str:
    """A metric in words, of whom, and in years only where it is of ages."""
    words = METRICS.get(metric, metric)
    for ending, of_whom in ENDINGS.items():
        base = metric.removesuffix(ending)
        if metric not in METRICS and base != metric and base in METRICS:
            words = METRICS[base] + of_whom
    return words.replace(", years", "") if task != "age" and metric.startswith(("mae", "rmse")) else words


def measure_words(e: Evaluation) -> str:
    """What a figure is of, in words."""
    return f"{e.task}: {metric_words(e.metric, e.task)}"


def in_order(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """By task and metric as they came, then by stage as known, constants last."""
    rows = list(evaluations)
    kinds = list(dict.fromkeys((e.task, e.metric.removesuffix("_knn")) for e in rows))
    stages = [*STAGES, *dict.fromkeys(e.stage for e in rows if e.stage not in STAGES)]
    return sorted(rows, key=lambda e: (kinds.index((e.task, e.metric.removesuffix("_knn"))), stages.index(e.stage)))


def row_labels(rows: Sequence[Evaluation]) -> list[str]:
    """The stage, and whatever else differs between rows."""
    regimes, seeds = len({e.regime for e in rows}) > 1, len({e.seed for e in rows}) > 1
    return [stage_words(e.stage) + (f", {e.regime}" if regimes else "") + (f", seed {e.seed}" if seeds else "") for e in rows]


@dataclass(frozen=True)
class Tuned:
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


def tuned_of(record: RunRecord) -> Tuned:
    """What of a record is of fine-tuning; tasks in the order in which they came, diagnosis always."""
    stages = (*TUNED_STAGES, *(stage for stage in record.predictions if stage not in TUNED_STAGES))
    told = [e.task for e in record.evaluations if e.stage in stages]
    tasks = dict.fromkeys([*(found.target.task for found in record.predictions.values()), *told])
    labels = [task for task in tasks if "findings" in tasks and task != "findings"]
    return Tuned(stages, tuple(dict.fromkeys([*(task for task in tasks if task not in labels), "diagnosis"])), tuple(labels))


def at_known_sites(record: RunRecord) -> dict[str, Predictions]:
    """By stage, of the sites that it was trained at: the unseen ones have figures of their own."""
    unseen = {(e.stage, e.site) for e in record.evaluations if e.metric.endswith("_unseen")}
    return {
        stage: found.select(np.array([(stage, site) not in unseen for site in found.site.tolist()], dtype=bool))
        for stage, found in record.predictions.items()
    }
