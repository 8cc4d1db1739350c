"""Figures in words: digits by metric, an interval, and one sentence on how far site can be read."""

import math
from collections.abc import Iterable, Sequence

from core.evaluation.intervals import Evaluation

PROBES = {
    "balanced_accuracy": "linear",
    "balanced_accuracy_knn": "10-NN",
    "balanced_accuracy_boosting": "boosting",
    "balanced_accuracy_heldout": "linear among held-out subjects",
    "balanced_accuracy_knn_heldout": "10-NN among held-out subjects",
    "balanced_accuracy_lda": "discriminants from sums",
    "balanced_accuracy_logistic": "logistic from gradients",
    "balanced_accuracy_nearest": "nearest means",
}
LINEAR_PROBES = ("balanced_accuracy", "balanced_accuracy_lda", "balanced_accuracy_logistic", "balanced_accuracy_nearest")
YEARS = ("mae", "rmse", "bias", "openbhb_mae", "openbhb_score")
THREE_DIGITS = ("mmd2", "explained_variance", "silhouette", "brier", "ece")
ERRORS = ("mae", "rmse")


def find(evaluations: Iterable[Evaluation], stage: str, task: str, metric: str) -> Evaluation | None:
    """The first such figure over all sites."""
    wanted = (stage, task, metric, "all")
    return next((e for e in evaluations if (e.stage, e.task, e.metric, e.site) == wanted), None)


def digits(number: float, metric: str, *, signed: bool = False) -> str:
    """As many digits as a figure of this metric deserves, with a plus sign where `signed`."""
    places = 1 if metric.startswith(YEARS) else 3 if metric.startswith(THREE_DIGITS) else 2
    return f"{number:{'+' if signed else ''}.{places}f}"


def figure(number: float, e: Evaluation) -> str:
    """A number beside the value of `e`, in its digits: an error in another unit than years has three significant ones."""
    if e.task != "age" and e.metric.startswith(ERRORS):
        places = 2 - math.floor(math.log10(abs(e.value))) if e.value else 2
        return f"{number:.{max(places, 0)}f}"
    return digits(number, e.metric)


def with_interval(e: Evaluation) -> str:
    """The value, and its interval in brackets."""
    bounds = f" [{figure(e.low, e)}, {figure(e.high, e)}]" if e.low is not None and e.high is not None else ""
    return f"{figure(e.value, e)}{bounds}"


def linear_probe(evaluations: Iterable[Evaluation]) -> str:
    """The metric of the linear site probe: of single scans, else the one from sums that reads most from what is delivered."""
    listed = list(evaluations)
    for stage in ("erased", "pretrained"):
        found = [e for metric in LINEAR_PROBES if (e := find(listed, stage, "site", metric)) is not None]
        if found:
            return LINEAR_PROBES[0] if found[0].metric == LINEAR_PROBES[0] else max(found, key=lambda e: e.value).metric
    return LINEAR_PROBES[0]


def verdict(evaluations: Sequence[Evaluation], stage: str | None = None) -> str:
    """What the numbers alone say of site predictability: the linear probe in one sentence, then which probes pass their floor.

    Args:
        evaluations: Of one run, chance and floor among them.
        stage: Whose site predictability; what a run delivers (erased, else pretrained) when not given.
    """
    metric = linear_probe(evaluations)
    plain = find(evaluations, "pretrained", "site", metric)
    erased = find(evaluations, "erased", "site", metric)
    now = find(evaluations, stage, "site", metric) if stage else erased or plain
    if now is None:
        if stage:
            return f"Site predictability of {stage} was not evaluated; a note says why."
        return "Site predictability of the pretrained encoder was not evaluated in this run."
    chance, floor, before = (find(evaluations, name, "site", metric) for name in ("chance", "age_sex_floor", "untrained"))
    beside = [
        f"{words} {digits(e.value, e.metric)}"
        for words, e in (
            ("chance", chance),
            ("floor from age and sex", floor),
            ("before pretraining", before),
            ("before erasure", plain if now.stage == "erased" else None),
        )
        if e is not None and e is not now
    ]
    place = ""
    if floor is not None and now.low is not None and now.high is not None:
        # Age and sex cannot give less away than nothing: a floor below chance is one that came out low.
        bar = max(floor.value, chance.value) if chance else floor.value
        below, above = bar < now.low, bar > now.high
        place = ", above the floor" if below else ", below the floor" if above else ", not told apart from the floor"
    return (
        f"Site can be read from the {now.stage} representation with balanced accuracy {with_interval(now)}{place}"
        + (f" ({', '.join(beside)})" if beside else "")
        + "."
        + _above_own_floor(evaluations, now.stage)
    )


def chance_beside(evaluations: Iterable[Evaluation], e: Evaluation) -> Evaluation | None:
    """Chance for a site probe: among held-out subjects there may be fewer classes."""
    if not e.metric.startswith("balanced_accuracy"):
        return None
    if e.metric in LINEAR_PROBES:
        return find(evaluations, "chance", e.task, e.metric)
    return find(evaluations, "chance", e.task, f"balanced_accuracy{'_heldout' if e.metric.endswith('_heldout') else ''}")


def _above_own_floor(evaluations: Sequence[Evaluation], stage: str) -> str:
    """A sentence on all probes that have a floor, where there are several."""
    judged, above = 0, []
    for metric, name in PROBES.items():
        e, floor = (find(evaluations, of, "site", metric) for of in (stage, "age_sex_floor"))
        if e is None or e.low is None or floor is None:
            continue
        judged += 1
        chance = chance_beside(evaluations, e)
        if e.low > max(floor.value, chance.value if chance else 0):
            above.append(name)
    if judged < 2:
        return ""
    return (
        f" Of {judged} probes, {len(above)} read site above their own floor: {', '.join(above)}."
        if above
        else f" None of {judged} probes reads site above its own floor."
    )
