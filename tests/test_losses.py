"""Objectives: against explicit loops, at the limits, in every precision and every degenerate batch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.losses import (
    OBJECTIVES,
    AlignmentUniformity,
    BarlowTwins,
    DecoupledConditional,
    DecoupledUniformity,
    EmbeddedViews,
    EpsSupInfoNCE,
    Exp,
    FairKL,
    InfoNCE,
    Joint,
    Kernel,
    NTXent,
    Objective,
    SupCon,
    Threshold,
    YAware,
)

NAN, INF = math.nan, math.inf
AGE = Kernel(bandwidths={"age_years": 8.0})
AGE_AND_SEX = Kernel(shape="cauchy", bandwidths={"age_years": 8.0, "sex": 0})
DENSITY = Kernel(shape="gaussian", bandwidths={"age_years": 8.0})
# Below 1/30 an exponential could leave float32: the losses take another path.
TEMPERATURES = [0.5, 0.1, 0.02]


def batch(
    views: int = 2, scans: int = 5, features: int = 4, seed: int = 0, labels_of_views: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Random embeddings with uneven classes, equal ages and equal differences of age, and a scan of each unknown label.

    With ``labels_of_views`` every view has labels of its own, as where two views come from two scans.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    metadata = {
        "age_years": [30.0, 40, 40, NAN, 50, 61, 61, 72],
        "sex": [0.0, 0, 1, 0, NAN, 1, 1, 0],
        "diagnosis": [1.0, 0, NAN, 1, 1, 0, NAN, 2],
        "confidence": [1.0, 0.25, 0.5, 0.75, NAN, 0, 0.5, 1],
        "scanner": [0.0, 1, 0, 1, 1, 0, NAN, 0],
    }
    rows = views if labels_of_views else 1
    values = {
        name: torch.tensor([[value[(scan + 3 * row) % 8] for scan in range(scans)] for row in range(rows)], dtype=torch.float64)
        for name, value in metadata.items()
    }
    logits = random(rows, scans, 3)
    if not labels_of_views:
        values, logits = {name: value[0] for name, value in values.items()}, logits[0]
    return [random(scans, features) for _ in range(views)], {**values, "logits": logits}


class Rows:
    """What the loops below see of a batch, in Python's numbers: unit rows, similarities, labels of every row."""

    def __init__(self, views: Sequence[Tensor], metadata: Mapping[str, Tensor]) -> None:
        self.num_views, self.num_scans = len(views), len(views[0])
        self.raw = [row for view in views for row in view.tolist()]
        self.unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in self.raw]
        self.all = range(len(self.raw))
        self.s = [[sum(a * b for a, b in zip(one, two, strict=True)) for two in self.unit] for one in self.unit]
        self.labels = {
            name: values.tolist() * self.num_views if len(values.shape) == 1 else [v for view in values.tolist() for v in view]
            for name, values in metadata.items()
            if name != "logits"
        }
        logits = metadata["logits"].tolist()
        self.logits = logits * self.num_views if metadata["logits"].ndim == 2 else [row for view in logits for row in view]

    def same_scan(self, i: int, k: int) -> bool:
        return i % self.num_scans == k % self.num_scans

    def same_view(self, i: int, k: int) -> bool:
        return i // self.num_scans == k // self.num_scans

    def others(self, i: int) -> list[int]:
        return [k for k in self.all if k != i]

    def own(self, i: int) -> list[int]:
        return [k for k in self.others(i) if self.same_scan(i, k)]

    def positives(self, i: int, label: str, bin_width: float | None) -> list[int]:
        """Other rows of the class or of the scan of a row."""
        classes = self.labels[label]
        if bin_width is not None:
            classes = [y if math.isnan(y) else y // bin_width for y in classes]
        return [k for k in self.others(i) if self.same_scan(i, k) or classes[k] == classes[i]]

    def weight(self, i: int, k: int, kernel: Kernel) -> float:
        """Of a pair of two rows, by the formulas in the kernel's docstring."""
        product, peak = 1.0, 1.0
        for label, bandwidth in kernel.bandwidths.items():
            y, other = self.labels[label][i], self.labels[label][k]
            if kernel.shape == "gaussian":
                peak /= math.sqrt(2 * math.pi) * bandwidth
            if math.isnan(y) or math.isnan(other):
                product = 0.0
            elif bandwidth == 0:
                product *= float(y == other)
            else:
                square = ((y - other) / bandwidth) ** 2
                product *= 1 / (1 + square) if kernel.shape == "cauchy" else math.exp(-square / 2)
        return peak if self.same_scan(i, k) else peak * product


def mean(values: Sequence[float] | Iterator[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def ntxent(rows: Rows, temperature: float) -> float:
    def of(i: int) -> float:
        partition = sum(math.exp(rows.s[i][a] / temperature) for a in rows.others(i))
        return -mean(rows.s[i][p] / temperature - math.log(partition) for p in rows.own(i))

    return mean(of(i) for i in rows.all) if rows.num_views > 1 else 0.0


def infonce(rows: Rows, temperature: float, margin: float) -> float:
    def of(i: int, p: int) -> float:
        positive = rows.s[i][p] / temperature
        negatives = sum(math.exp(rows.s[i][n] / temperature) for n in rows.all if not rows.same_scan(i, n))
        return -math.log(math.exp(positive) / (math.exp(positive - margin) + negatives))

    return mean(mean(of(i, p) for p in rows.own(i)) for i in rows.all) if rows.num_views > 1 else 0.0


def supcon(
    rows: Rows,
    temperature: float,
    margin: float = 0.0,
    label: str = "sex",
    bin_width: float | None = None,
    first_view: bool = False,
    released: bool = False,
) -> float:
    def of(i: int) -> float:
        positives = rows.positives(i, label, bin_width)
        # Released code subtracts the largest logit, of the row to itself, before it adds 1e-6.
        logit = [s / temperature - (1 / temperature if released else 0.0) for s in rows.s[i]]
        drawn = sum(math.exp(logit[p] - margin) for p in positives)
        repelled = sum(math.exp(logit[n]) for n in rows.others(i) if n not in positives)
        partition = drawn + repelled + (1e-6 if released else 0.0)
        return -mean(logit[p] - math.log(partition) for p in positives) if positives else 0.0

    anchors = range(rows.num_scans) if first_view else rows.all
    return mean(of(i) for i in anchors) * (temperature / 0.07 if released else 1.0)


def eps_supinfonce(
    rows: Rows, temperature: float, margin: float, form: str = "out", label: str = "sex", released: bool = False
) -> float:
    def of(i: int) -> float:
        positives = rows.positives(i, label, None)
        if not positives:
            return 0.0
        # Released code subtracts the largest logit, of the row to itself, before it adds 1e-6, in the form "out" alone.
        logit = [s / temperature - (1 / temperature if released else 0.0) for s in rows.s[i]]
        negatives = sum(math.exp(logit[n]) for n in rows.others(i) if n not in positives)
        if form == "in":
            drawn = sum(math.exp(logit[p]) for p in positives)
            return -math.log(drawn / (mean(math.exp(logit[p] - margin) for p in positives) + negatives))
        guard = 1e-6 if released else 0.0
        return -mean(math.log(math.exp(logit[p]) / (math.exp(logit[p] - margin) + negatives + guard)) for p in positives)

    return mean(of(i) for i in rows.all) * (temperature / 0.07 if released else 1.0)


def yaware(rows: Rows, temperature: float, kernel: Kernel, released: str | None = None) -> float:
    total = 0.0
    for i in rows.all:
        partition = sum(math.exp(rows.s[i][a] / temperature) for a in rows.others(i))
        for k in rows.others(i):
            # The code of 2021 divides the weight of k by the sum of k's column, not by that of the anchor's row.
            of = k if released == "miccai2021" else i
            size = sum(rows.weight(j, of, kernel) for j in rows.others(of))
            if size:
                total -= rows.weight(i, k, kernel) / size * (rows.s[i][k] / temperature - math.log(partition))
    scale = {None: 1.0, "miccai2021": 2.0, "isbi2023": temperature / 0.07}[released]
    return scale * total / len(rows.all)


def exp(rows: Rows, temperature: float, kernel: Kernel, shifted: bool = True, released: bool = False) -> float:
    total = 0.0
    for i in rows.all:
        logit = [(s - (1.0 if shifted else 0.0)) / temperature for s in rows.s[i]]
        partition = sum(math.exp(logit[t] * (1 - rows.weight(i, t, kernel))) for t in rows.others(i))
        size = sum(rows.weight(i, k, kernel) for k in rows.others(i))
        for k in rows.others(i):
            if size:
                total -= rows.weight(i, k, kernel) / size * (logit[k] - math.log(partition))
    return total / len(rows.all) * (temperature / 0.07 if released else 1.0)


def threshold(rows: Rows, temperature: float, kernel: Kernel) -> float:
    total = 0.0
    for i in rows.all:
        weight = {k: rows.weight(i, k, kernel) for k in rows.others(i)}
        for k, w_k in weight.items():
            repulsion = sum(math.exp(rows.s[i][t] / temperature) for t, w_t in weight.items() if w_t < w_k)
            if repulsion:
                total -= w_k / sum(weight.values()) * (rows.s[i][k] / temperature - math.log(repulsion))
    return total / len(rows.all)


def released_threshold(rows: Rows, temperature: float, kernel: Kernel, reduction: str) -> float:
    """How many rows k are less like t than i is: with that, the repulsion of t from i is weighted; t is one of the rows."""
    weight = [[kernel.peak if i == k else rows.weight(i, k, kernel) for k in rows.all] for i in rows.all]
    total = 0.0
    for i in rows.all:
        repulsion = 0.0
        for t in rows.others(i):
            less_like = sum(weight[t][k] < weight[t][i] for k in rows.all)
            repulsion += less_like / (len(rows.all) if reduction == "mean" else 1) * math.exp(rows.s[i][t] / temperature)
        size = sum(weight[i][k] for k in rows.others(i))
        for k in rows.others(i):
            if repulsion and size:
                total -= weight[i][k] / size * (rows.s[i][k] / temperature - math.log(repulsion))
    return total / len(rows.all) * temperature / 0.07


def alignment_uniformity(rows: Rows, kernel: Kernel, alignment: float, uniformity: float, scale: float) -> float:
    def distance(i: int, k: int) -> float:
        return sum((a - b) ** 2 for a, b in zip(rows.unit[i], rows.unit[k], strict=True))

    total = 0.0
    across = [(i, k) for i in rows.all for k in rows.all if not rows.same_view(i, k)]
    if across:
        weighted = sum(rows.weight(i, k, kernel) * distance(i, k) for i, k in across)
        total += alignment * weighted / sum(rows.weight(i, k, kernel) for i, k in across)
    within = [(i, k) for i in rows.all for k in rows.others(i) if rows.same_view(i, k)]
    potential = [(kernel.peak - rows.weight(i, k, kernel)) * math.exp(-scale * distance(i, k)) for i, k in within]
    return total + (uniformity * math.log(mean(potential)) if sum(potential) else 0.0)


def decoupled_uniformity(rows: Rows, scale: float, kernel: Kernel | None = None, regularisation: float = 0.01) -> float:
    scans = range(rows.num_scans)
    centroids = np.array([np.mean([rows.unit[k] for k in rows.all if rows.same_scan(i, k)], axis=0) for i in scans])
    if kernel:
        # Labels of the first view; an unlabelled scan is like itself alone.
        k = np.array([[rows.weight(i, j, kernel) for j in scans] for i in scans])
        centroids = np.linalg.solve(k + regularisation * np.eye(len(k)), k @ centroids)
    pairs = [(i, j) for i in scans for j in scans if i < j]
    return math.log(mean(math.exp(-scale * float(((centroids[i] - centroids[j]) ** 2).sum())) for i, j in pairs))


def barlow_twins(rows: Rows, redundancy_weight: float, variance_epsilon: float) -> float:
    n, features = rows.num_scans, range(len(rows.raw[0]))

    def standardised(view: int, feature: int) -> list[float]:
        values = [rows.raw[view * n + i][feature] for i in range(n)]
        variance = mean((value - mean(values)) ** 2 for value in values) + variance_epsilon
        return [(value - mean(values)) / math.sqrt(variance) for value in values]

    total = 0.0
    for d in features:
        for e in features:
            correlation = mean(a * b for a, b in zip(standardised(0, d), standardised(1, e), strict=True))
            total += (1 - correlation) ** 2 if d == e else redundancy_weight * correlation**2
    return total


def decoupled_conditional(rows: Rows, temperature: float, confidence: str | None = None) -> float:
    def weight(i: int, k: int) -> float:
        if rows.same_scan(i, k):
            return 1.0
        if rows.labels["diagnosis"][i] != rows.labels["diagnosis"][k]:
            return 0.0
        sure = [rows.labels[confidence][row] for row in (i, k)] if confidence else [1.0, 1.0]
        return 0.0 if any(map(math.isnan, sure)) else sure[0] * sure[1]

    total = 0.0
    for i in rows.all:
        negatives = sum(math.exp(rows.s[i][a] / temperature) for a in rows.others(i) if weight(i, a) == 0)
        size = sum(weight(i, k) for k in rows.others(i))
        for k in rows.others(i):
            if size:
                repelled = math.log(negatives) if negatives else 0.0
                total -= weight(i, k) / size * (rows.s[i][k] / temperature - repelled)
    return total / len(rows.all)


def joint(rows: Rows, weak: float, supervised_weight: float) -> float:
    labelled = [i for i in rows.all if not math.isnan(rows.labels["diagnosis"][i])]
    errors = [
        math.log(sum(math.exp(logit) for logit in rows.logits[i])) - rows.logits[i][int(rows.labels["diagnosis"][i])]
        for i in labelled
    ]
    return weak + supervised_weight * (mean(errors) if errors else 0.0)


Build = Callable[[float], Objective]
Loop = Callable[[Rows, float], float]

# Every objective and option, at a temperature T, with its loop.
WITH_TEMPERATURE: dict[str, tuple[Build, Loop]] = {
    "ntxent": (lambda T: NTXent(temperature=T), ntxent),
    "infonce": (lambda T: InfoNCE(temperature=T), lambda r, T: infonce(r, T, 0.0)),
    "infonce_margin": (lambda T: InfoNCE(temperature=T, margin=0.3), lambda r, T: infonce(r, T, 0.3)),
    "infonce_decoupled": (lambda T: InfoNCE(temperature=T, margin=INF), lambda r, T: infonce(r, T, INF)),
    "supcon": (lambda T: SupCon(temperature=T), supcon),
    "supcon_margin": (lambda T: SupCon(temperature=T, margin=0.4), lambda r, T: supcon(r, T, 0.4)),
    "supcon_largest_margin": (lambda T: SupCon(temperature=T, margin=20.0), lambda r, T: supcon(r, T, 20.0)),
    "supcon_first_view": (
        lambda T: SupCon(temperature=T, anchors="first_view", label="diagnosis"),
        lambda r, T: supcon(r, T, label="diagnosis", first_view=True),
    ),
    "supcon_bins": (
        lambda T: SupCon(temperature=T, label="age_years", bin_width=15.0),
        lambda r, T: supcon(r, T, label="age_years", bin_width=15.0),
    ),
    "supcon_released": (
        lambda T: SupCon(temperature=T, margin=0.25, released=True),
        lambda r, T: supcon(r, T, 0.25, released=True),
    ),
    "eps_supinfonce": (lambda T: EpsSupInfoNCE(temperature=T), lambda r, T: eps_supinfonce(r, T, 0.0)),
    "eps_supinfonce_margin": (lambda T: EpsSupInfoNCE(temperature=T, margin=0.25), lambda r, T: eps_supinfonce(r, T, 0.25)),
    "eps_supinfonce_largest_margin": (
        lambda T: EpsSupInfoNCE(temperature=T, margin=20.0),
        lambda r, T: eps_supinfonce(r, T, 20.0),
    ),
    "eps_supinfonce_in": (
        lambda T: EpsSupInfoNCE(temperature=T, margin=0.25, form="in", label="diagnosis"),
        lambda r, T: eps_supinfonce(r, T, 0.25, "in", "diagnosis"),
    ),
    "eps_supinfonce_released": (
        lambda T: EpsSupInfoNCE(temperature=T, margin=0.25, released=True),
        lambda r, T: eps_supinfonce(r, T, 0.25, released=True),
    ),
    "eps_supinfonce_in_released": (
        lambda T: EpsSupInfoNCE(temperature=T, margin=0.25, form="in", released=True),
        lambda r, T: eps_supinfonce(r, T, 0.25, "in", released=True),
    ),
    "yaware": (lambda T: YAware(temperature=T, kernel=AGE), lambda r, T: yaware(r, T, AGE)),
    "yaware_age_and_sex": (lambda T: YAware(temperature=T, kernel=AGE_AND_SEX), lambda r, T: yaware(r, T, AGE_AND_SEX)),
    "yaware_miccai2021": (
        lambda T: YAware(temperature=T, kernel=AGE, released="miccai2021"),
        lambda r, T: yaware(r, T, AGE, "miccai2021"),
    ),
    "yaware_isbi2023": (
        lambda T: YAware(temperature=T, kernel=DENSITY, released="isbi2023"),
        lambda r, T: yaware(r, T, DENSITY, "isbi2023"),
    ),
    "exp": (lambda T: Exp(temperature=T, kernel=AGE), lambda r, T: exp(r, T, AGE)),
    "exp_paper": (lambda T: Exp(temperature=T, kernel=AGE, shifted=False), lambda r, T: exp(r, T, AGE, False)),
    "exp_released": (
        lambda T: Exp(temperature=T, kernel=DENSITY, released=True),
        lambda r, T: exp(r, T, DENSITY, released=True),
    ),
    "threshold": (lambda T: Threshold(temperature=T, kernel=AGE), lambda r, T: threshold(r, T, AGE)),
    "threshold_age_and_sex": (
        lambda T: Threshold(temperature=T, kernel=AGE_AND_SEX),
        lambda r, T: threshold(r, T, AGE_AND_SEX),
    ),
    "threshold_sum": (
        lambda T: Threshold(temperature=T, kernel=AGE, released="sum"),
        lambda r, T: released_threshold(r, T, AGE, "sum"),
    ),
    "threshold_mean": (
        lambda T: Threshold(temperature=T, kernel=DENSITY, released="mean"),
        lambda r, T: released_threshold(r, T, DENSITY, "mean"),
    ),
    "decoupled_conditional": (lambda T: DecoupledConditional(temperature=T), decoupled_conditional),
    "decoupled_conditional_confidence": (
        lambda T: DecoupledConditional(temperature=T, confidence="confidence"),
        lambda r, T: decoupled_conditional(r, T, "confidence"),
    ),
    "joint": (
        lambda T: Joint(weak=YAware(temperature=T, kernel=AGE), supervised_weight=0.5),
        lambda r, T: joint(r, yaware(r, T, AGE), 0.5),
    ),
}
WITHOUT_TEMPERATURE: dict[str, tuple[Objective, Callable[[Rows], float]]] = {
    "alignment_uniformity": (AlignmentUniformity(kernel=AGE), lambda r: alignment_uniformity(r, AGE, 1, 1, 2)),
    "alignment_uniformity_weights": (
        AlignmentUniformity(kernel=DENSITY, alignment_weight=0.5, uniformity_weight=3.0, scale=10.0),
        lambda r: alignment_uniformity(r, DENSITY, 0.5, 3.0, 10.0),
    ),
    "decoupled_uniformity": (DecoupledUniformity(), lambda r: decoupled_uniformity(r, 2.0)),
    "decoupled_uniformity_kernel": (
        DecoupledUniformity(scale=1.5, kernel=AGE, regularisation=0.1),
        lambda r: decoupled_uniformity(r, 1.5, AGE, 0.1),
    ),
    "decoupled_uniformity_age_and_sex": (
        DecoupledUniformity(kernel=AGE_AND_SEX),
        lambda r: decoupled_uniformity(r, 2.0, AGE_AND_SEX),
    ),
    "barlow_twins": (BarlowTwins(), lambda r: barlow_twins(r, 0.0051, 1e-5)),
    "barlow_twins_exact": (
        BarlowTwins(redundancy_weight=0.2, variance_epsilon=0.0),
        lambda r: barlow_twins(r, 0.2, 0.0),
    ),
}
# On the path of most temperatures and, where there is one, on that of the lowest.
EVERY: dict[str, Objective] = {name: objective for name, (objective, _) in WITHOUT_TEMPERATURE.items()}
EVERY |= {f"{name}_{T}": build(T) for name, (build, _) in WITH_TEMPERATURE.items() for T in (0.1, 0.02)}
every_objective = pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY)
# Barlow Twins alone takes embeddings at their length, and two views only.
ON_THE_SPHERE = {name: objective for name, objective in EVERY.items() if not isinstance(objective, BarlowTwins)}
every_objective_on_the_sphere = pytest.mark.parametrize("objective", ON_THE_SPHERE.values(), ids=ON_THE_SPHERE)


def of(objective: Objective, views: Sequence[Tensor], metadata: Mapping[str, Tensor]) -> Tensor:
    return objective.of(EmbeddedViews(views, metadata))


def gradients(loss: Tensor, views: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(views), **options)


def leaves(views: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [view.detach().clone().to(dtype).requires_grad_() for view in views]


def test_every_objective_is_here() -> None:
    assert {type(objective) for objective in EVERY.values()} == set(OBJECTIVES.values())
    assert all(repr(objective).startswith(type(objective).__name__ + "(") for objective in EVERY.values())


# Against loops.


@pytest.mark.parametrize("labels_of_views", [False, True], ids=["labels_of_scans", "labels_of_views"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_against_loops(name: str, temperature: float, views: int, labels_of_views: bool) -> None:
    build, loop = WITH_TEMPERATURE[name]
    embedded, metadata = batch(views, seed=views, labels_of_views=labels_of_views)
    expected = loop(Rows(embedded, metadata), temperature)
    assert float(of(build(temperature), embedded, metadata)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("labels_of_views", [False, True], ids=["labels_of_scans", "labels_of_views"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("name", WITHOUT_TEMPERATURE)
def test_objectives_without_a_temperature_against_loops(name: str, views: int, labels_of_views: bool) -> None:
    objective, loop = WITHOUT_TEMPERATURE[name]
    embedded, metadata = batch(views, seed=views, labels_of_views=labels_of_views)
    if isinstance(objective, BarlowTwins) and views != 2:
        with pytest.raises(ValueError, match=f"objective barlow_twins: there must be two views, got {views}"):
            of(objective, embedded, metadata)
        return
    expected = loop(Rows(embedded, metadata))
    assert float(of(objective, embedded, metadata)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
@pytest.mark.parametrize("case", ["all_of_one_class", "all_unknown", "two_scans"])
@pytest.mark.parametrize("views", [1, 2])
def test_against_loops_where_groups_are_empty(name: str, case: str, views: int) -> None:
    build, loop = WITH_TEMPERATURE[name]
    embedded, metadata = batch(views, scans=2 if case == "two_scans" else 4)
    if case != "two_scans":
        fill = NAN if case == "all_unknown" else 1.0
        metadata |= {key: torch.full_like(value, fill) for key, value in metadata.items() if key != "logits"}
    for temperature in (0.1, 0.02):
        expected = loop(Rows(embedded, metadata), temperature)
        assert float(of(build(temperature), embedded, metadata)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_infinite_margin_holds_at_low_temperatures_and_far_negatives() -> None:
    # Two scans at opposite poles, twice the same view: l = 1/T for the positive, -1/T for the two negatives.
    z = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)
    loss = InfoNCE(temperature=0.01, margin=INF)(z, z)
    assert float(loss) == pytest.approx(math.log(2) - 200, rel=1e-12)


# Derivatives.


@every_objective
def test_the_gradient_is_the_derivative_and_has_one_itself(objective: Objective) -> None:
    views, metadata = batch(2, scans=4, features=3, seed=4)

    def loss(*views: Tensor) -> Tensor:
        return of(objective, views, metadata)

    # Where the temperature is low, the second derivative is of the order of its square.
    assert torch.autograd.gradcheck(loss, leaves(views), atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradgradcheck(loss, leaves(views), atol=1e-4, rtol=1e-4, fast_mode=True)


@every_objective
def test_the_gradient_is_the_same_whether_or_not_it_is_differentiated_again(objective: Objective) -> None:
    views, metadata = batch(2, scans=6, seed=5)
    views = leaves(views)
    loss = of(objective, views, metadata)
    first = gradients(loss, views, retain_graph=True)
    second = gradients(loss, views, retain_graph=True)
    differentiable = gradients(loss, views, create_graph=True)
    for one, again, other in zip(first, second, differentiable, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@every_objective
@pytest.mark.parametrize("case", ["all_of_one_class", "all_unknown", "two_scans", "one_scan"])
def test_second_derivatives_are_finite_where_groups_are_empty(objective: Objective, case: str) -> None:
    for count in (1, 2):
        views, metadata = batch(count, scans={"two_scans": 2, "one_scan": 1}.get(case, 4))
        if "all" in case:
            fill = NAN if case == "all_unknown" else 1.0
            metadata |= {key: torch.full_like(value, fill) for key, value in metadata.items() if key != "logits"}
        if isinstance(objective, BarlowTwins) and count == 1:
            continue
        views = leaves(views)
        loss = of(objective, views, metadata)
        norm = sum(g.square().sum() for g in gradients(loss, views, create_graph=True))
        assert isinstance(norm, Tensor)
        if norm.requires_grad:
            assert all(g.isfinite().all() for g in gradients(norm, views, allow_unused=True) if g is not None)


@every_objective
def test_the_flag_couples_scans_tells_the_truth(objective: Objective) -> None:
    # d/dz_j of the gradient at z_i is not zero: the scans are coupled, DP-SGD on single scans would be void.
    views, metadata = batch(2, scans=5, seed=6)
    views = leaves(views)
    (gradient,) = torch.autograd.grad(of(objective, views, metadata), views[0], create_graph=True)
    (mixed,) = torch.autograd.grad(gradient[0].sum(), views[0])
    assert bool((mixed[1:].abs() > 1e-9).any()) == objective.couples_scans


def test_the_gradient_of_a_classifier_flows_to_its_logits_of_labelled_scans() -> None:
    views, metadata = batch()
    metadata["logits"].requires_grad_()
    (gradient,) = torch.autograd.grad(of(Joint(), views, metadata), metadata["logits"])
    assert (gradient.abs().sum(dim=1) > 0).tolist() == (~metadata["diagnosis"].isnan()).tolist()


# Precision and degenerate batches.

SITUATIONS = [
    "random",
    "collapsed",
    "zero_rows",
    "all_zero",
    "one_scan",
    "one_view",
    "one_view_of_one_scan",
    "one_class",
    "all_unknown",
    "one_scanner",
]


def situation(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    views, metadata = batch(1 if "one_view" in name else 2, scans=1 if name.endswith("one_scan") else 6)
    match name:
        case "collapsed":
            views = [torch.full_like(view, 0.3) for view in views]
        case "zero_rows":
            for view in views:
                view[::2] = 0.0
        case "all_zero":
            views = [torch.zeros_like(view) for view in views]
        case "one_class":
            metadata |= {key: torch.ones_like(metadata[key]) for key in ("sex", "diagnosis")}
            metadata["age_years"] = torch.full_like(metadata["age_years"], 40.0)
        case "all_unknown":
            metadata |= {key: torch.full_like(value, NAN) for key, value in metadata.items() if key != "logits"}
        case "one_scanner":
            metadata["scanner"] = torch.zeros_like(metadata["scanner"])
    return views, metadata


@every_objective
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "autocast"])
def test_loss_and_gradient_are_finite(objective: Objective, name: str, precision: str) -> None:
    views, metadata = situation(name)
    if isinstance(objective, BarlowTwins) and len(views) == 1:
        with pytest.raises(ValueError, match="there must be two views, got 1"):
            of(objective, views, metadata)
        return
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    views, metadata = leaves(views, dtype), {key: value.float() for key, value in metadata.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        # Under autocast a layer's embeddings come in half precision.
        embedded = [torch.nn.functional.linear(view, torch.eye(4).to(view)) for view in views]
        loss = of(objective, embedded, metadata)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert math.isfinite(float(loss.detach()))
    # No value stands for an infinite one.
    assert abs(float(loss.detach())) < 1e4
    for gradient in gradients(loss, views):
        assert gradient.isfinite().all()
        if name == "collapsed" and precision in ("float64", "float32"):
            assert float(gradient.abs().max()) < 1e3
    if precision == "autocast":
        assert float(loss.detach()) == float(of(objective, [view.detach().float() for view in embedded], metadata))


@every_objective
def test_float32_is_close_to_float64(objective: Objective) -> None:
    views, metadata = batch(2, scans=8, features=16, seed=7)
    exact, single = leaves(views), leaves(views, torch.float32)
    expected, loss = (of(objective, some, metadata) for some in (exact, single))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5, abs=2e-5)
    for one, two in zip(gradients(loss, single), gradients(expected, exact), strict=True):
        assert float((one - two).norm()) <= 1e-4 * float(two.norm()) + 1e-6


@pytest.mark.parametrize("temperature", [0.0115, 0.005])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_float32_holds_the_lowest_temperatures(name: str, temperature: float) -> None:
    # Logits up to 87, whose exponentials just fit but sums of them not, and up to 200.
    objective = WITH_TEMPERATURE[name][0](temperature)
    views, metadata = batch(2, scans=8, features=4, seed=7)
    exact, single = leaves(views), leaves(views, torch.float32)
    expected, loss = (of(objective, some, metadata) for some in (exact, single))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-4)
    for one, two in zip(gradients(loss, single), gradients(expected, exact), strict=True):
        assert float((one - two).norm()) <= 1e-3 * float(two.norm()) + 1e-6


def test_exp_holds_densities_far_above_one() -> None:
    # A narrow Gaussian density weighs up to 40: logits times 1 - w reach 780.
    views, metadata = batch(2)
    objective = Exp(temperature=0.1, kernel=Kernel(shape="gaussian", bandwidths={"age_years": 0.01}))
    single = leaves(views, torch.float32)
    loss = of(objective, single, metadata)
    assert float(loss.detach()) == pytest.approx(exp(Rows(views, metadata), 0.1, objective.kernel), rel=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, single))


@every_objective_on_the_sphere
def test_no_gradient_where_there_is_nothing_to_learn(objective: Objective) -> None:
    # One view of one scan: no pair.
    views, metadata = situation("one_view_of_one_scan")
    views = leaves(views)
    loss = of(objective, views, metadata)
    if not isinstance(objective, Joint):
        assert float(loss.detach()) == 0.0
    assert float(gradients(loss, views)[0].abs().max()) == 0.0


def test_a_loss_of_an_embedding_that_is_not_a_number_is_not_a_number() -> None:
    # A zero for want of pairs must not hide a diverged encoder.
    views = [torch.full((1, 3), NAN)]
    for objective in (NTXent(), InfoNCE(), AlignmentUniformity(), DecoupledUniformity()):
        assert math.isnan(float(of(objective, views, {"age_years": torch.tensor([30.0])})))


# Symmetries, sharing, size.


@every_objective
@pytest.mark.parametrize("labels_of_views", [False, True], ids=["labels_of_scans", "labels_of_views"])
def test_the_order_of_scans_and_of_views_does_not_matter(objective: Objective, labels_of_views: bool) -> None:
    views, metadata = batch(2, scans=6, seed=8, labels_of_views=labels_of_views)
    expected = float(of(objective, views, metadata))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    shuffled = {key: value[:, order] if labels_of_views else value[order] for key, value in metadata.items()}
    assert float(of(objective, [view[order] for view in views], shuffled)) == pytest.approx(expected, rel=1e-11)
    one_sided = isinstance(objective, SupCon) and objective.anchors == "first_view"
    # The prior of decoupled uniformity takes the labels of the first view.
    one_sided |= isinstance(objective, DecoupledUniformity) and objective.kernel is not None and labels_of_views
    if not one_sided:
        turned = {key: value.flip(0) if labels_of_views else value for key, value in metadata.items()}
        assert float(of(objective, views[::-1], turned)) == pytest.approx(expected, rel=1e-11)


@every_objective
def test_labels_of_scans_are_the_same_labels_of_every_view(objective: Objective) -> None:
    views, metadata = batch(2, seed=9)
    each = {key: torch.stack([value, value]) for key, value in metadata.items()}
    assert float(of(objective, views, each)) == pytest.approx(float(of(objective, views, metadata)), rel=1e-12)


@every_objective_on_the_sphere
def test_the_length_of_an_embedding_does_not_matter(objective: Objective) -> None:
    views, metadata = batch(2, seed=10)
    longer = [view * torch.arange(1.0, 6.0, dtype=torch.float64)[:, None] for view in views]
    assert float(of(objective, longer, metadata)) == pytest.approx(float(of(objective, views, metadata)), rel=1e-11)


class Watch(TorchDispatchMode):
    """Largest number of entries of any tensor that is made, and number of products of two (R, D) matrices."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, self.largest, self.similarities = features, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func is torch.ops.aten.mm.default and args[0].shape[1] == self.features:
            self.similarities += 1
        return made


@every_objective
def test_memory_is_that_of_a_few_matrices_of_pairs(objective: Objective) -> None:
    # 256 scans of two views: 512^2 pairs; 512^3 triples, as released code has them, would be 512 times as many.
    views, metadata = batch(2, scans=256 if isinstance(objective, Threshold) else 64, features=8)
    views, pairs = leaves(views, torch.float32), (2 * len(views[0])) ** 2
    with Watch(features=8) as watch:
        of(objective, views, metadata).backward()
    assert watch.largest <= pairs


@every_objective
def test_an_objective_shares_its_similarities_with_fairkl(objective: Objective) -> None:
    views, metadata = batch(2, scans=8, features=5, seed=11)
    views = leaves(views)
    fairkl = FairKL(kernel=AGE, min_weight=0.5)
    with Watch(features=5) as watch:
        embedded = EmbeddedViews(views, metadata)
        together = objective.of(embedded) + 0.7 * fairkl.of(embedded)
        assert embedded.similarity is embedded.similarity
        assert embedded.any_similarity.data_ptr() == embedded.similarity.data_ptr()
    # Centroids, and features, have a product of their own.
    assert watch.similarities == 1 + isinstance(objective, DecoupledUniformity)
    apart = of(objective, views, metadata) + 0.7 * fairkl.of(EmbeddedViews(views, metadata))
    assert float(together.detach()) == pytest.approx(float(apart.detach()), rel=1e-12)
    for one, two in zip(gradients(together, views), gradients(apart, views), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_similarities_keep_their_precision_under_autocast() -> None:
    # Also where a loss is not what asks for them first.
    views = [view.float() for view in batch(2)[0]]
    expected = EmbeddedViews(views).similarity
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = EmbeddedViews(views)
        assert torch.equal(embedded.any_similarity, expected)
        assert torch.equal(embedded.similarity, expected)


# Limits.


LIMITS: dict[str, tuple[Build, Build]] = {
    "unknown_labels_make_yaware_ntxent": (
        lambda T: YAware(temperature=T, kernel=Kernel(bandwidths={"unknown": 5.0})),
        lambda T: NTXent(temperature=T),
    ),
    "a_narrow_kernel_makes_yaware_ntxent": (
        lambda T: YAware(temperature=T, kernel=Kernel(bandwidths={"different": 1e-6})),
        lambda T: NTXent(temperature=T),
    ),
    "classes_make_yaware_supcon": (
        lambda T: YAware(temperature=T, kernel=Kernel(bandwidths={"sex": 0})),
        lambda T: SupCon(temperature=T, label="sex"),
    ),
    "a_class_of_its_own_makes_supcon_ntxent": (
        lambda T: SupCon(temperature=T, label="different"),
        lambda T: NTXent(temperature=T),
    ),
    "no_class_makes_supcon_ntxent": (lambda T: SupCon(temperature=T, label="unknown"), lambda T: NTXent(temperature=T)),
    "no_margin_makes_infonce_ntxent": (lambda T: InfoNCE(temperature=T), lambda T: NTXent(temperature=T)),
    "a_class_of_its_own_makes_eps_supinfonce_infonce": (
        lambda T: EpsSupInfoNCE(temperature=T, margin=0.3, label="different"),
        lambda T: InfoNCE(temperature=T, margin=0.3),
    ),
    "one_positive_makes_the_forms_of_eps_supinfonce_one": (
        lambda T: EpsSupInfoNCE(temperature=T, margin=0.3, label="different", form="in"),
        lambda T: EpsSupInfoNCE(temperature=T, margin=0.3, label="different"),
    ),
    "no_label_makes_decoupled_conditional_decoupled": (
        lambda T: DecoupledConditional(temperature=T, label="unknown"),
        lambda T: InfoNCE(temperature=T, margin=INF),
    ),
    "no_confidence_makes_decoupled_conditional_decoupled": (
        lambda T: DecoupledConditional(temperature=T, confidence="none"),
        lambda T: InfoNCE(temperature=T, margin=INF),
    ),
    "full_confidence_is_none": (
        lambda T: DecoupledConditional(temperature=T, confidence="full"),
        lambda T: DecoupledConditional(temperature=T),
    ),
    "a_narrow_kernel_makes_threshold_decoupled": (
        lambda T: Threshold(temperature=T, kernel=Kernel(bandwidths={"different": 1e-6})),
        lambda T: InfoNCE(temperature=T, margin=INF),
    ),
    "bins_are_classes": (
        lambda T: SupCon(temperature=T, label="different", bin_width=1e6),
        lambda T: SupCon(temperature=T, label="one"),
    ),
    "no_weight_of_the_classifier_leaves_the_weak_objective": (
        lambda T: Joint(weak=YAware(temperature=T, kernel=AGE), supervised_weight=0.0),
        lambda T: YAware(temperature=T, kernel=AGE),
    ),
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, temperature: float) -> None:
    one, other = (build(temperature) for build in LIMITS[name])
    views, metadata = batch(2, scans=6, seed=12)
    ones = torch.ones(6, dtype=torch.float64)
    metadata |= {"unknown": NAN * ones, "different": torch.arange(6.0).double(), "none": 0 * ones, "full": ones, "one": ones}
    views = leaves(views)
    losses = [of(objective, views, metadata) for objective in (one, other)]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-10)
    for a, b in zip(*(gradients(loss, views) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_unlabelled_alignment_and_uniformity_are_those_of_wang_and_isola() -> None:
    views, _ = batch(2)
    x, y = (view / view.norm(dim=1, keepdim=True) for view in views)
    align = (x - y).norm(dim=1).pow(2).mean()
    potentials = torch.cat([torch.pdist(x).pow(2), torch.pdist(y).pow(2)]).mul(-2).exp()
    loss = of(AlignmentUniformity(), views, {"age_years": torch.full((5,), NAN)})
    assert float(loss) == pytest.approx(float(align + potentials.mean().log()), rel=1e-12)


def test_a_wide_kernel_leaves_uniformity_nothing_to_spread() -> None:
    # All scans of one age: alignment of all pairs, and no unlike pair.
    views, metadata = batch(2)
    metadata["age_years"] = torch.full((5,), 40.0, dtype=torch.float64)
    assert float(of(AlignmentUniformity(alignment_weight=0.0), views, metadata)) == 0.0


def test_the_prior_of_decoupled_uniformity_fades() -> None:
    # Labels that tell nothing apart: K = I, centroids shrink by 1 + regularisation; with little of it, nothing is left of it.
    views, metadata = batch(2)
    metadata["different"] = torch.arange(5.0)
    plain = float(of(DecoupledUniformity(), views, metadata))
    prior = DecoupledUniformity(kernel=Kernel(bandwidths={"different": 0}), regularisation=1e-9)
    assert float(of(prior, views, metadata)) == pytest.approx(plain, rel=1e-7)
    half = float(of(DecoupledUniformity(kernel=Kernel(bandwidths={"different": 0}), regularisation=1.0), views, metadata))
    assert half == pytest.approx(float(of(DecoupledUniformity(scale=0.5), views, metadata)), rel=1e-10)


def test_barlow_twins_is_zero_for_equal_views_of_uncorrelated_features_and_dead_ones_count_one_each() -> None:
    z = torch.tensor([[1.0, 1, 7], [1, -1, 7], [-1, 1, 7], [-1, -1, 7]], dtype=torch.float64, requires_grad=True)
    exact = BarlowTwins(variance_epsilon=0.0)
    assert float(exact(z[:, :2], z[:, :2]).detach()) == 0.0
    loss = exact(z, z)
    assert float(loss.detach()) == 1.0
    assert torch.autograd.grad(loss, z)[0][:, 2].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("form", ["out", "in"])
def test_the_margin_raises_what_is_asked_of_positives(form: str) -> None:
    # At a margin m an anchor without negatives is at -m, and is asked for no more.
    views, metadata = batch(2)
    metadata["sex"] = torch.zeros(5)
    views = leaves(views)
    loss = of(EpsSupInfoNCE(margin=0.5, form=form), views, metadata)
    # "in": log of the sum over nine positives, against their mean at the margin.
    assert float(loss.detach()) == pytest.approx(-0.5 - (math.log(9) if form == "in" else 0.0), rel=1e-12)
    assert max(float(g.abs().max()) for g in gradients(loss, views)) < 1e-12


# What is refused.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NTXent(temperature=0), "objective ntxent: temperature must be positive and finite, got 0"),
        (lambda: NTXent(temperature=NAN), "objective ntxent: temperature must be positive and finite, got nan"),
        (lambda: InfoNCE(temperature=-1), "objective infonce: temperature must be positive and finite, got -1"),
        (lambda: InfoNCE(margin=-0.1), "objective infonce: margin must be 0 or positive, got -0.1"),
        (lambda: InfoNCE(margin=NAN), "objective infonce: margin must be 0 or positive, got nan"),
        (lambda: SupCon(temperature=INF), "objective SupCon: temperature must be positive and finite, got inf"),
        (lambda: SupCon(margin=21), "objective SupCon: margin must be between 0 and 20, got 21"),
        (lambda: SupCon(margin=INF), "objective SupCon: margin must be between 0 and 20, got inf"),
        (lambda: SupCon(bin_width=0.0), "objective SupCon: bin_width must be positive and finite, got 0.0"),
        (lambda: SupCon(anchors="second_view"), "objective SupCon: anchors must be 'all' or 'first_view', got 'second_view'"),
        (lambda: EpsSupInfoNCE(form="through"), "objective EpsSupInfoNCE: form must be 'out' or 'in', got 'through'"),
        (lambda: EpsSupInfoNCE(margin=NAN), "objective EpsSupInfoNCE: margin must be between 0 and 20, got nan"),
        (lambda: YAware(temperature=0), "objective YAware: temperature must be positive and finite, got 0"),
        (lambda: YAware(released="2021"), "released must be 'miccai2021', 'isbi2023' or absent, got '2021'"),
        (lambda: Exp(temperature=0), "objective Exp: temperature must be positive and finite, got 0"),
        (lambda: Threshold(temperature=0), "objective Threshold: temperature must be positive and finite, got 0"),
        (lambda: Threshold(released="median"), "released must be 'sum', 'mean' or absent, got 'median'"),
        (lambda: AlignmentUniformity(scale=0), "objective alignment_uniformity: scale must be positive and finite, got 0"),
        (lambda: AlignmentUniformity(alignment_weight=-1), "alignment_weight must be 0 or positive and finite, got -1"),
        (lambda: AlignmentUniformity(uniformity_weight=NAN), "uniformity_weight must be 0 or positive and finite, got nan"),
        (lambda: DecoupledUniformity(scale=-2), "objective decoupled_uniformity: scale must be positive and finite, got -2"),
        (lambda: DecoupledUniformity(regularisation=0), "regularisation must be positive and finite, got 0"),
        (lambda: BarlowTwins(redundancy_weight=-1), "objective barlow_twins: redundancy_weight must be 0 or positive"),
        (lambda: BarlowTwins(variance_epsilon=INF), "variance_epsilon must be 0 or positive and finite, got inf"),
        (lambda: DecoupledConditional(temperature=0), "objective decoupled_conditional: temperature must be positive"),
        (lambda: Joint(supervised_weight=-1), "objective joint: supervised_weight must be 0 or positive and finite, got -1"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], Objective], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("shape", ["epanechnikov", "cosine"])
def test_a_kernel_without_an_inverse_is_refused_as_a_prior(shape: str) -> None:
    # These are not positive definite: of 24 ages the matrix has eigenvalues below -0.01.
    with pytest.raises(ValueError, match="objective decoupled_uniformity: the kernel must be positive definite"):
        DecoupledUniformity(kernel=Kernel(shape=shape))


@pytest.mark.parametrize("views", [[], [(3, 2), (2, 2)], [(3, 2), (3, 1)], [(3,), (3,)], [(3, 2, 1)], [(0, 2), (0, 2)]], ids=str)
def test_views_of_other_shapes_are_refused(views: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="loss: views must be matrices of the same shape"):
        EmbeddedViews([torch.ones(shape) for shape in views])


def test_metadata_that_is_missing_or_of_another_shape_is_refused() -> None:
    z = torch.eye(3)
    with pytest.raises(ValueError, match=r"loss: metadata must hold 'age_years', got \['sex'\]"):
        YAware()(z, z, {"sex": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"loss: metadata must hold 'sex', got \[\]"):
        SupCon()(z, z)
    with pytest.raises(ValueError, match="loss: metadata must hold 'logits' of a classifier, got"):
        Joint()(z, z, {"age_years": torch.ones(3), "diagnosis": torch.ones(3)})
    for shape in [(2,), (6,), (3, 2), (3, 3), (1, 3), ()]:
        with pytest.raises(ValueError, match=r"metadata 'age_years' must have shape \(3,\) or \(2, 3\), got"):
            YAware()(z, z, {"age_years": torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(2, 4), (1, 6, 4), (3, 2, 4), (6, 4), (4,)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    z, metadata = torch.eye(3), {"age_years": torch.ones(3), "diagnosis": torch.ones(3)}
    with pytest.raises(ValueError, match="loss: metadata 'logits' must have shape"):
        Joint()(z, z, {**metadata, "logits": torch.zeros(shape)})


@pytest.mark.parametrize("value", [-1.0, 3.0, 0.5, INF])
def test_a_diagnosis_that_is_no_class_is_refused(value: float) -> None:
    views, metadata = batch()
    metadata["diagnosis"][0] = value
    with pytest.raises(ValueError, match=r"objective joint: diagnosis must be .*between 0 and 2, got others"):
        of(Joint(), views, metadata)


@pytest.mark.parametrize("value", [-0.1, 1.1, INF])
def test_a_confidence_that_is_none_is_refused(value: float) -> None:
    views, metadata = batch()
    metadata["confidence"][0] = value
    with pytest.raises(ValueError, match="objective decoupled_conditional: confidence must be between 0 and 1, got others"):
        of(DecoupledConditional(confidence="confidence"), views, metadata)


def test_labels_name_what_is_read() -> None:
    assert NTXent().labels == InfoNCE().labels == BarlowTwins().labels == DecoupledUniformity().labels == ()
    assert SupCon(label="age_years", bin_width=10.0).labels == ("age_years",)
    assert YAware(kernel=AGE_AND_SEX).labels == Exp(kernel=AGE_AND_SEX).labels == ("age_years", "sex")
    assert DecoupledUniformity(kernel=AGE).labels == AlignmentUniformity().labels == ("age_years",)
    assert DecoupledConditional(confidence="confidence").labels == ("diagnosis", "confidence")
    assert Joint(weak=SupCon(label="diagnosis")).labels == ("diagnosis",)
    assert Joint().labels == ("diagnosis", "age_years")


@every_objective
def test_nothing_is_read_that_labels_do_not_name(objective: Objective) -> None:
    views, metadata = batch()
    read = {name: metadata[name] for name in objective.labels}
    if isinstance(objective, Joint):
        read["logits"] = metadata["logits"]
    assert float(of(objective, views, read)) == float(of(objective, views, metadata))
