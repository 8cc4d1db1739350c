"""One evaluated figure, its 95 % subject-bootstrap interval, and the file that holds them all."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.checkpoint import write_atomically

logger = logging.getLogger(__name__)

CONSTANT_STAGES = ("chance",)
MAX_UNDEFINED_SHARE = 0.2


class NotEvaluableError(ValueError):
    """The data cannot answer this question; the message says why."""


def subject_bootstrap(
    groups_N: npt.NDArray[Any],
    statistic: Callable[[npt.NDArray[np.intp]], float],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Value of a statistic and its 95 % percentile interval under resampling of subjects.

    Subjects are drawn with replacement and bring all their scans. A resample in which the statistic is undefined
    (it returns nan, say because a class is missing) is redrawn and counted.

    Args:
        groups_N: (N,) the subject of each scan, unique across sites.
        statistic: Function of (M,) scan indices (with repeats), nan where undefined.
        num_resamples: Number of resamples in which the statistic is defined.
        seed: Of the resampling.

    Returns:
        (value on all scans, 2.5 % bound, 97.5 % bound).

    Raises:
        NotEvaluableError: Fewer than 2 subjects, an undefined value, or more than a fifth of the resamples undefined.
    """
    if num_resamples < 1:
        raise ValueError(f"subject_bootstrap: num_resamples must be at least 1, got {num_resamples!r}.")
    subjects, code_N = np.unique(groups_N, return_inverse=True)
    num_subjects = len(subjects)
    if num_subjects < 2:
        raise NotEvaluableError(
            f"subject_bootstrap: the number of subjects must be at least 2 for an interval, got {num_subjects!r}."
        )
    scans_by_subject_N = np.argsort(code_N, kind="stable")
    count_S = np.bincount(code_N)
    first_S = np.cumsum(count_S) - count_S

    value = float(statistic(np.arange(len(code_N))))
    if not math.isfinite(value):
        raise NotEvaluableError(
            f"subject_bootstrap: the statistic must be defined on all scans, got {value!r}; "
            "it needs every class, or values that vary."
        )

    random = np.random.default_rng(seed)
    values: list[float] = []
    undefined = 0
    while len(values) < num_resamples:
        drawn_S = random.integers(num_subjects, size=num_subjects)
        repeats_S = count_S[drawn_S]
        offset_S = first_S[drawn_S] - (np.cumsum(repeats_S) - repeats_S)
        resampled = float(statistic(scans_by_subject_N[np.repeat(offset_S, repeats_S) + np.arange(repeats_S.sum())]))
        if math.isfinite(resampled):
            values.append(resampled)
            continue
        undefined += 1
        if undefined > MAX_UNDEFINED_SHARE * num_resamples:
            raise NotEvaluableError(
                f"subject_bootstrap: resamples in which the statistic is undefined must be at most "
                f"{MAX_UNDEFINED_SHARE:.0%} of {num_resamples}, got {undefined!r} beside {len(values)} defined ones; "
                "a class has too few subjects for an interval."
            )
    if undefined:
        logger.info("subject_bootstrap: %d resamples were undefined and redrawn (%d kept).", undefined, num_resamples)
    low, high = np.quantile(values, [0.025, 0.975])
    return value, float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One figure of metrics.json.

    Attributes:
        stage: What was evaluated: raw, untrained, pretrained, linear_probe, full_finetuning, from_scratch, or one
            of the constants age_sex_floor, chance.
        task: What is predicted: site, scanner, age, sex, diagnosis.
        metric: balanced_accuracy, balanced_accuracy_knn, auc, mae and mae_unseen (years), r2.
        value: Finite.
        low: Lower bound of the 95 % subject-bootstrap interval; None only for stage chance.
        high: Upper bound, likewise.
        regime: federated, pooled or local-only.
        site: Name of a site, or "all".
        num_subjects: Held-out subjects behind the value.
        seed: Seed of the run.
    """

    stage: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    regime: str
    site: str
    num_subjects: int
    seed: int

    def __post_init__(self) -> None:
        where = f"Evaluation {self.stage}/{self.task}/{self.metric}"
        for name in ("stage", "task", "metric", "regime", "site"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{where}: {name} must be a non-empty text, got {getattr(self, name)!r}.")
        for name in ("num_subjects", "seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{where}: {name} must be an int of at least 0, got {getattr(self, name)!r}.")
        numbers = [self.value] if self.stage in CONSTANT_STAGES else [self.value, self.low, self.high]
        if self.stage in CONSTANT_STAGES and (self.low, self.high) != (None, None):
            raise ValueError(f"{where}: low and high must be None for a constant, got {(self.low, self.high)!r}.")
        for number in numbers:
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(
                    f"{where}: value, low and high must be finite, got {(self.value, self.low, self.high)!r}; "
                    "leave out what cannot be evaluated and say why in a note."
                )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"{where}: low must be at most high, got {(self.low, self.high)!r}.")

    def to_dict(self) -> dict[str, str | float | int | None]:
        """The object as written to metrics.json."""
        return asdict(self)


def write_metrics(path: Path, evaluations: Iterable[Evaluation]) -> None:
    """Write evaluations as a JSON list, whole or not at all."""
    text = json.dumps([evaluation.to_dict() for evaluation in evaluations], indent=1, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_metrics(path: Path) -> list[Evaluation]:
    """Read what `write_metrics` wrote.

    Raises:
        ValueError: Not a list of objects with exactly the keys of `Evaluation`, or a value out of range.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    keys = {field.name for field in fields(Evaluation)}
    if not isinstance(entries, list):
        raise ValueError(f"read_metrics: {path.name} must be a list of objects, got {type(entries).__name__!r}.")
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != keys:
            raise ValueError(f"read_metrics: an entry of {path.name} must have the keys {sorted(keys)}, got {entry!r}.")
    return [Evaluation(**entry) for entry in entries]
