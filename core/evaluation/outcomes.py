"""What each held-out scan said of a figure, the figure from it, and the difference of two figures on the same scans.

A figure is a statistic of outcomes: the truth and the prediction of every scored row. Kept as such, a figure, its interval, its
value at one site and its paired difference from another representation all come from one fitted probe.

Shapes: N scored rows, K classes, S subjects.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from core.evaluation.intervals import Evaluation, NotEvaluableError, subject_bootstrap

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Results = tuple[list[Evaluation], list[str]]
Statistic = Callable[[npt.NDArray[np.intp]], float]
Measure = Callable[[npt.NDArray[Any], npt.NDArray[Any]], Statistic]

NUM_PERMUTATIONS = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a figure is computed from.

    Attributes:
        task: What is predicted, as in `Evaluation`.
        metric: As in `Evaluation`.
        measure: (truth, prediction) -> statistic of (M,) row indices.
        truth_N: (N,) class or number; zeros where a row has a value but no truth (mixing, silhouette).
        predicted_N: (N,) what was predicted for the row.
        subjects_N: (N,) the subject of each row, unique across sites.
        site_N: (N,) the site of each row.
        site: Name of the site whose rows these are, or "all".
        exchangeable: Whether the prediction of one row may be exchanged for another representation's: not where the figure is
            of all rows at once.
    """

    task: str
    metric: str
    measure: Measure
    truth_N: npt.NDArray[Any]
    predicted_N: npt.NDArray[Any]
    subjects_N: Ints
    site_N: npt.NDArray[np.str_]
    site: str = "all"
    exchangeable: bool = True

    def statistic(self) -> Statistic:
        """The figure as a function of (M,) row indices, for the bootstrap."""
        return self.measure(self.truth_N, self.predicted_N)

    def by_site(self) -> Iterator["Outcome"]:
        """The same figure at each site alone."""
        for name in np.unique(self.site_N).tolist():
            of_site = self.site_N == name
            columns = ("truth_N", "predicted_N", "subjects_N", "site_N")
            yield replace(self, site=name, **{column: getattr(self, column)[of_site] for column in columns})


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A figure of a second representation minus that of a first, on the same held-out subjects.

    Attributes:
        task: What is predicted.
        metric: As in `Evaluation`.
        site: Name of a site, or "all".
        first: The figure of the first representation.
        second: The figure of the second.
        value: second - first.
        low: Lower bound of the 95 % paired subject-bootstrap interval of `value`.
        high: Upper bound.
        p_value: Two-sided, of the permutation test that exchanges the two representations subject by subject; None where the
            outcomes are not exchangeable.
        num_subjects: Subjects behind both figures.
    """

    task: str
    metric: str
    site: str
    first: float
    second: float
    value: float
    low: float
    high: float
    p_value: float | None
    num_subjects: int


def paired_difference(
    first: Outcome,
    second: Outcome,
    *,
    num_resamples: int = 1000,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> Difference:
    """Difference of one figure between two representations of the same scans.

    The interval resamples subjects and takes both figures on each resample. The test exchanges the outcomes of the two
    representations for a random half of the subjects, which changes nothing when they are as good: for a mean over subjects
    that is the sign-flip test, for an area under the curve, whose predictions are ranks, that of Venkatraman and Begg (1996).
    Both keep the fitted probes: they speak of other subjects, not of another training run.

    Args:
        first: Outcome of the representation to start from.
        second: Outcome of the other one.
        num_resamples: Of the bootstrap.
        num_permutations: Of the test; the smallest possible p is 1 / (num_permutations + 1).
        seed: Of both.

    Returns:
        The difference `second - first`, its 95 % interval and its two-sided p.

    Raises:
        ValueError: The outcomes are of different figures, or not of the same scans in the same order.
        NotEvaluableError: The difference has no interval.
    """
    figures = [(o.task, o.metric, o.site) for o in (first, second)]
    if figures[0] != figures[1]:
        raise ValueError(f"paired_difference: both outcomes must be of one figure, got {figures!r}.")
    for name in ("subjects_N", "site_N", "truth_N"):
        if not np.array_equal(getattr(first, name), getattr(second, name)):
            raise ValueError(
                f"paired_difference: {first.task} {first.metric}: the scans must be the same in the same order, got another "
                f"{name}. Embed one set of scans with both encoders."
            )
    if num_permutations < 1:
        raise ValueError(f"paired_difference: num_permutations must be at least 1, got {num_permutations!r}.")
    of_first, of_second = first.statistic(), second.statistic()
    value, low, high = subject_bootstrap(
        first.subjects_N, lambda chosen: of_second(chosen) - of_first(chosen), num_resamples=num_resamples, seed=seed
    )
    every_row = np.arange(len(first.truth_N))
    return Difference(
        task=first.task,
        metric=first.metric,
        site=first.site,
        first=of_first(every_row),
        second=of_second(every_row),
        value=value,
        low=low,
        high=high,
        p_value=_exchange_test(first, second, abs(value), num_permutations, seed) if first.exchangeable else None,
        num_subjects=len(np.unique(first.subjects_N)),
    )


def _exchange_test(first: Outcome, second: Outcome, distance: float, num_permutations: int, seed: int) -> float:
    """Share of exchanges, subject by subject, after which the figures are at least so far apart; the observed one counts."""
    every_row = np.arange(len(first.truth_N))
    subjects, code_N = np.unique(first.subjects_N, return_inverse=True)
    random = np.random.default_rng(seed)
    at_least = 1
    for _ in range(num_permutations):
        swapped_N = (random.random(len(subjects)) < 0.5)[code_N]
        mixed = [
            first.measure(first.truth_N, np.where(swap_N, second.predicted_N, first.predicted_N))(every_row)
            for swap_N in (swapped_N, ~swapped_N)
        ]
        at_least += abs(mixed[1] - mixed[0]) >= distance - 1e-12
    return at_least / (1 + num_permutations)


def compare_outcomes(
    first: list[Outcome], second: list[Outcome], *, num_resamples: int = 1000, seed: int = 0
) -> tuple[list[Difference], list[str]]:
    """`paired_difference` of every figure over all sites that both have, and a note on each that has none."""
    differences, notes = [], []
    others = {(o.task, o.metric): o for o in second if o.site == "all"}
    for outcome in first:
        other = others.get((outcome.task, outcome.metric))
        if outcome.site != "all":
            continue
        if other is None:
            notes.append(f"{outcome.task} {outcome.metric} has no value in the second representation, so no difference.")
            continue
        try:
            differences.append(paired_difference(outcome, other, num_resamples=num_resamples, seed=seed))
        except NotEvaluableError as reason:
            notes.append(f"{outcome.task} {outcome.metric} has no difference: {reason}")
    return differences, notes


@dataclass
class Notes:
    """Sentences on what was left out, and why, as they come up."""

    prefix: str = ""
    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """One remark, without its full stop."""
        logger.info("%s%s.", self.prefix, text)
        self.texts.append(f"{self.prefix}{text}.")

    def refused(self, reason: NotEvaluableError) -> None:
        """A question that the data cannot answer."""
        logger.info("Not evaluated: %s", reason)
        self.texts.append(f"Not evaluated: {reason}")


@dataclass(kw_only=True)
class Ledger:
    """Evaluations of one stage as they are made, and notes on what could not be."""

    stage: str
    regime: str
    seed: int
    num_resamples: int
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: Notes = field(init=False)

    def __post_init__(self) -> None:
        self.notes = Notes(f"{self.stage}: ")

    def score(self, task: str, metric: str, statistic: Statistic, subjects_N: Ints, *, site: str = "all") -> None:
        """Add one evaluation with its interval, or the reason why there is none."""
        try:
            value, low, high = subject_bootstrap(subjects_N, statistic, num_resamples=self.num_resamples, seed=self.seed)
        except NotEvaluableError as reason:
            self.notes.add(f"{task} {metric} at site {site} has no value: {str(reason).removesuffix('.')}")
            return
        self.evaluations.append(
            Evaluation(
                stage=self.stage,
                task=task,
                metric=metric,
                value=value,
                low=low,
                high=high,
                regime=self.regime,
                site=site,
                num_subjects=len(np.unique(subjects_N)),
                seed=self.seed,
            )
        )

    def add(self, outcomes: list[Outcome]) -> "Ledger":
        """Add an evaluation of every outcome."""
        for outcome in outcomes:
            self.score(outcome.task, outcome.metric, outcome.statistic(), outcome.subjects_N, site=outcome.site)
        return self

    @property
    def results(self) -> Results:
        """What was evaluated, and the notes, each once."""
        return self.evaluations, list(dict.fromkeys(self.notes.texts))


def balanced_accuracy(truth_N: Ints, predicted_N: Ints) -> Statistic:
    """Mean recall over the classes among the chosen rows; nan when there is only one."""
    hit_N = (truth_N == predicted_N).astype(np.float64)
    num_classes = int(truth_N.max()) + 1

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        class_M = truth_N[chosen]
        count_K = np.bincount(class_M, minlength=num_classes)
        hits_K = np.bincount(class_M, weights=hit_N[chosen], minlength=num_classes)
        present_K = count_K > 0
        return float((hits_K[present_K] / count_K[present_K]).mean()) if present_K.sum() > 1 else float("nan")

    return statistic


def area_under_curve(label_N: Ints, score_N: Floats) -> Statistic:
    """Share of (positive, negative) pairs in the right order among the chosen rows, ties half; nan without a pair."""
    levels, level_N = np.unique(score_N, return_inverse=True)
    place_N = 2 * level_N + label_N

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        negative_L, positive_L = np.bincount(place_N[chosen], minlength=2 * len(levels)).reshape(-1, 2).T
        pairs = negative_L.sum() * positive_L.sum()
        won = (positive_L * (negative_L.cumsum() - negative_L / 2)).sum()
        return float(won / pairs) if pairs else float("nan")

    return statistic


def mean_absolute_error(truth_N: Floats, predicted_N: Floats) -> Statistic:
    """Mean distance of the prediction from the truth over the chosen rows."""
    magnitude_N = np.abs(truth_N - predicted_N)
    return lambda chosen: float(magnitude_N[chosen].mean())


def mean_bias(truth_N: Floats, predicted_N: Floats) -> Statistic:
    """Mean of prediction minus truth over the chosen rows: positive where too much is predicted."""
    excess_N = predicted_N - truth_N
    return lambda chosen: float(excess_N[chosen].mean())


def mean_value(_truth_N: Floats, predicted_N: Floats) -> Statistic:
    """Mean over the chosen rows of a value that has no truth."""
    return lambda chosen: float(predicted_N[chosen].mean())


def explained_share(truth_N: Floats, predicted_N: Floats) -> Statistic:
    """R2 over the chosen rows; nan when the truth does not vary among them."""
    square_N = np.square(truth_N - predicted_N)

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        truth_M = truth_N[chosen]
        spread = np.square(truth_M - truth_M.mean()).sum()
        return float(1 - square_N[chosen].sum() / spread) if spread > 0 else float("nan")

    return statistic


def slope(truth_N: Floats, predicted_N: Floats) -> Statistic:
    """Least-squares slope of the prediction on the truth: 1 when calibrated, below 1 when drawn to the mean, nan if undefined."""

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        deviation_M = truth_N[chosen] - truth_N[chosen].mean()
        spread = np.square(deviation_M).sum()
        return float(deviation_M @ predicted_N[chosen] / spread) if spread > 0 else float("nan")

    return statistic
