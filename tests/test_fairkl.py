"""FairKL and the exchange of moments: by loops, against the pooled embeddings, at the limits."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from core.losses import EmbeddedViews, EnD, FairKL, Kernel, ReleasedFairKL
from core.losses.fairkl import gaussian_kl
from core.moments import (
    GroupMoments,
    Reference,
    age_groups,
    concatenate,
    feature_sums,
    groups_of,
    reference_from,
    site_moments,
    told_subjects,
)
from core.settings import MomentPolicy

NAN = math.nan
EXACT = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)
DIVERGENCES = ["kl", "jeffreys", "moments", "mean"]
STATISTICS = ["per_anchor", "per_batch"]


def age_kernel(bandwidth_years: float) -> Kernel:
    return Kernel(bandwidths={"age_years": bandwidth_years})


def cohort(seed: int = 0, per_site: int = 24, features: int = 6) -> dict[str, Tensor]:
    """Three sites, the last with two scanners; ages on a few exact values; unit-length rows that depend on both."""
    g = torch.Generator().manual_seed(seed)
    site = torch.arange(3).repeat_interleave(per_site)
    scanner = site.clone()
    scanner[site == 2] = 2 + torch.arange(per_site) % 2
    age = 20.0 + 10.0 * torch.randint(0, 4, (3 * per_site,), generator=g)
    z = torch.randn(3 * per_site, features, generator=g, dtype=torch.float64)
    z[:, 0] += scanner
    z[:, 1] += age / 20
    return {
        "site": site,
        "scanner": scanner,
        "age_years": age.double(),
        "sex": torch.randint(0, 2, (3 * per_site,), generator=g).double(),
        "z": torch.nn.functional.normalize(z, dim=1),
    }


def part(data: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in data.items()}


def pooled(debias: FairKL | ReleasedFairKL | EnD, data: dict[str, Tensor]) -> Tensor:
    """Of one view."""
    return debias.of(EmbeddedViews([data["z"]], data))


def moments_of(data: dict[str, Tensor], *labels: str) -> GroupMoments:
    """What a site sends when its policy withholds nothing."""
    told = {name: data[name] for name in labels or ("age_years",)}
    moments, withheld = site_moments(data["z"], told, data["scanner"], bin_years=10.0, policy=EXACT)
    assert withheld == 0
    return moments


class Rows:
    """What the loops below see: unit rows of V views of N scans, in Python's numbers, and labels of every row."""

    def __init__(self, views: Sequence[Tensor], metadata: dict[str, Tensor]) -> None:
        self.num_scans = len(views[0])
        raw = [row for view in views for row in view.tolist()]
        self.unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in raw]
        self.all = range(len(raw))
        self.labels = {
            name: values.tolist() * len(views) if values.ndim == 1 else values.flatten().tolist()
            for name, values in metadata.items()
        }

    def same_scan(self, i: int, j: int) -> bool:
        return i % self.num_scans == j % self.num_scans

    def s(self, i: int, j: int) -> float:
        return sum(a * b for a, b in zip(self.unit[i], self.unit[j], strict=True))


def kernel_weight(rows: Rows, i: int, j: int, kernel: Kernel) -> float:
    product = 1.0
    for label, bandwidth in kernel.bandwidths.items():
        y, other = rows.labels[label][i], rows.labels[label][j]
        product *= float(y == other) if bandwidth == 0 else math.exp(-0.5 * ((y - other) / bandwidth) ** 2)
    return product


def divergence_of(aligned: list[tuple[float, float]], conflicting: list[tuple[float, float]], fairkl: FairKL) -> float | None:
    """Of two lists of weights and similarities; None where a list weighs too little."""
    moments = []
    for pairs in (aligned, conflicting):
        size = sum(w for w, _ in pairs)
        if size < fairkl.min_weight:
            return None
        mean = sum(w * s for w, s in pairs) / size
        moments.append((mean, sum(w * (s - mean) ** 2 for w, s in pairs) / size + fairkl.variance_floor))
    (mu_a, v_a), (mu_c, v_c) = moments

    def kl(mean: float, variance: float, of_mean: float, of_variance: float) -> float:
        return 0.5 * ((variance + (mean - of_mean) ** 2) / of_variance - math.log(variance / of_variance) - 1)

    return {
        "kl": kl(mu_a, v_a, mu_c, v_c),
        "jeffreys": kl(mu_a, v_a, mu_c, v_c) + kl(mu_c, v_c, mu_a, v_a),
        "moments": (mu_a - mu_c) ** 2 + (math.sqrt(v_a) - math.sqrt(v_c)) ** 2,
        "mean": (mu_a - mu_c) ** 2,
    }[fairkl.divergence]


def looped(fairkl: FairKL, views: Sequence[Tensor], metadata: dict[str, Tensor]) -> float:
    """FairKL, one anchor and one pair at a time."""
    rows = Rows(views, metadata)
    read = [*fairkl.kernel.bandwidths, fairkl.bias]
    known = [not any(math.isnan(rows.labels[name][i]) for name in read) for i in rows.all]
    total = 0.0
    for positive in (True, False):
        anchors = []
        for i in rows.all:
            groups: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for j in rows.all:
                if known[i] and known[j] and not rows.same_scan(i, j):
                    weight = kernel_weight(rows, i, j, fairkl.kernel)
                    same_bias = rows.labels[fairkl.bias][i] == rows.labels[fairkl.bias][j]
                    groups[same_bias].append((weight if positive else 1 - weight, rows.s(i, j)))
            anchors.append((groups[True], groups[False]))
        if fairkl.statistics == "per_batch":
            anchors = [([pair for one, _ in anchors for pair in one], [pair for _, other in anchors for pair in other])]
        values = [divergence_of(*anchor, fairkl) for anchor in anchors]
        counting = [value for value in values if value is not None]
        total += sum(counting) / len(counting) if counting else 0.0
    return total


def unknown_and_uneven(views: int, labels_of_views: bool, per_site: int = 5) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A batch of several views with an unknown age, sex and scanner; labels of each view where two scans are paired."""
    data = cohort(per_site=per_site)
    embedded = [data["z"].roll(view, 0) + 0.1 * view for view in range(views)]
    metadata = {name: data[name].double() for name in ("age_years", "sex", "scanner")}
    for name, scan in {"age_years": 1, "sex": 4, "scanner": 8}.items():
        metadata[name][scan] = NAN
    if labels_of_views:
        metadata = {name: torch.stack([value.roll(2 * view, 0) for view in range(views)]) for name, value in metadata.items()}
    return embedded, metadata


KERNELS = {
    "age": age_kernel(7.0),
    "sex": Kernel(bandwidths={"sex": 0}),
    "age_and_sex": Kernel(bandwidths={"age_years": 12.0, "sex": 0}),
}


@pytest.mark.parametrize("labels_of_views", [False, True], ids=["labels_of_scans", "labels_of_views"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_formula_in_loops(divergence: Any, statistics: Any, kernel: str, views: int, labels_of_views: bool) -> None:
    fairkl = FairKL(kernel=KERNELS[kernel], divergence=divergence, statistics=statistics, min_weight=0.5)
    embedded, metadata = unknown_and_uneven(views, labels_of_views)
    expected = looped(fairkl, embedded, metadata)
    assert expected > 1e-3
    assert float(fairkl.of(EmbeddedViews(embedded, metadata))) == pytest.approx(expected, rel=1e-10)


def test_the_anchors_that_count_are_those_with_enough_on_both_sides() -> None:
    # Four of one scanner, two of another, all of one age: only the four have two conflicting scans and two of their own.
    data = part(cohort(per_site=6), slice(0, 6))
    data |= {"age_years": torch.full((6,), 30.0), "scanner": torch.tensor([0, 0, 0, 0, 1, 1])}
    for least, anchors in ((1.0, 6), (2.0, 4), (2.5, 0)):
        fairkl = FairKL(divergence="mean", min_weight=least)
        s = data["z"] @ data["z"].T
        squares = []
        for i in range(anchors):
            own = [j for j in range(6) if j != i and data["scanner"][j] == data["scanner"][i]]
            other = [j for j in range(6) if data["scanner"][j] != data["scanner"][i]]
            squares.append(float(s[i, own].mean() - s[i, other].mean()) ** 2)
        expected = sum(squares) / anchors if anchors else 0.0
        assert float(pooled(fairkl, data)) == pytest.approx(expected, rel=1e-10)
        assert expected == pytest.approx(looped(fairkl, [data["z"]], {name: data[name] for name in ("age_years", "scanner")}))


def test_two_views_of_a_scan_are_no_pair() -> None:
    # Two identical views of each scan: every pair four times, as every similarity once; the scan's own never.
    data = cohort(per_site=6)
    once, twice = FairKL(min_weight=0.1), FairKL(min_weight=0.2)
    expected = float(pooled(once, data))
    assert expected > 0.1
    assert float(twice(data["z"], data["z"], data)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kernel", ["age", "sex", "age_and_sex"])
def test_moment_exchange_equals_pooled_embeddings(kernel: str, divergence: Any, views: int, seed: int) -> None:
    """Identity 6: every site computes FairKL from its own rows and the others' moments; together they give the pooled one."""
    data = cohort(seed=seed, per_site=30)
    # Sites of different sizes.
    data = part(data, torch.cat([torch.arange(0, 30), torch.arange(30, 50), torch.arange(60, 90)]))
    fairkl = FairKL(kernel=KERNELS[kernel], divergence=divergence, min_weight=1e-9)
    sites = [part(data, data["site"] == site) for site in range(3)]
    sent = [moments_of(site, *fairkl.kernel.labels) for site in sites]
    total = 0.0
    for number, site in enumerate(sites):
        remote = concatenate([moments for other, moments in enumerate(sent) if other != number])
        total += float(fairkl.of(EmbeddedViews([site["z"]] * views, site), remote)) * len(site["z"])
    expected = float(fairkl.of(EmbeddedViews([data["z"]] * views, data)))
    assert expected > 1e-3
    assert total / len(data["z"]) == pytest.approx(expected, abs=1e-10)
    # Without the exchange the one-scanner sites have nothing to compare with: the figure is another.
    assert float(pooled(fairkl, sites[0])) == 0.0


def test_a_batch_weighs_remote_groups_as_a_pooled_batch_would() -> None:
    # Half the scans of a site see half of what every remote group counts: as if they held half as many.
    data = cohort()
    sites = [part(data, data["site"] == site) for site in (0, 2)]
    batch, remote = part(sites[1], slice(0, 12)), moments_of(sites[0])
    halved = GroupMoments(remote.label_GL, remote.count_G / 2, remote.mean_GD, remote.covariance_GDD)
    fairkl, views = FairKL(min_weight=0.5), EmbeddedViews([batch["z"]], batch)
    assert float(fairkl.of(views, remote, 0.5)) == pytest.approx(float(fairkl.of(views, halved)), rel=1e-12)
    assert float(fairkl.of(views, remote, 0.5)) != pytest.approx(float(fairkl.of(views, remote)), rel=1e-3)


def test_no_remote_group_is_as_no_exchange() -> None:
    data = cohort()
    nobody, _ = site_moments(
        data["z"][:1], {"age_years": torch.full((1,), NAN)}, data["scanner"][:1], bin_years=10.0, policy=MomentPolicy()
    )
    assert len(nobody) == 0
    views = EmbeddedViews([data["z"]], data)
    assert float(FairKL().of(views, nobody)) == float(FairKL().of(views))


def test_remote_groups_must_tell_every_label_of_the_kernel() -> None:
    data = cohort()
    with pytest.raises(ValueError, match=r"must tell the kernel's labels \['age_years', 'sex'\], got 1 labels"):
        FairKL(kernel=KERNELS["age_and_sex"]).of(EmbeddedViews([data["z"]], data), moments_of(data))


def test_gradient_flows_through_the_anchor_and_not_through_the_moments() -> None:
    data = cohort()
    own = part(data, data["site"] == 0)
    remote = moments_of(part(data, data["site"] != 0))
    z = own["z"].clone().requires_grad_()
    remote.mean_GD.requires_grad_()
    loss = FairKL().of(EmbeddedViews([z], own), remote)
    loss.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert float(z.grad.abs().max()) > 1e-3


def test_descent_makes_sites_alike() -> None:
    """What it is for: moving the rows of one site down the gradient brings the sites' means together."""
    data = cohort(per_site=40)
    own = part(data, data["site"] == 0)
    remote = moments_of(part(data, data["site"] != 0))
    far = data["z"][40:].mean(0)
    free = own["z"].clone().requires_grad_()
    optimiser = torch.optim.Adam([free], lr=0.02)
    before = float((own["z"].mean(0) - far).norm())
    for _ in range(100):
        loss = FairKL().of(EmbeddedViews([free], own), remote)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = float((torch.nn.functional.normalize(free.detach(), dim=1).mean(0) - far).norm())
    assert after < 0.5 * before


@pytest.mark.parametrize("case", ["one_scanner", "one_scan", "no_ages", "no_scanners", "every_scan_its_scanner", "collapsed"])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_empty_groups_contribute_exactly_nothing(divergence: Any, statistics: Any, case: str) -> None:
    data = cohort(per_site=8)
    data["scanner"] = data["scanner"].double()
    match case:
        case "one_scanner":
            data["scanner"][:] = 0
        case "one_scan":
            data = part(data, slice(0, 1))
        case "no_ages":
            data["age_years"][:] = NAN
        case "no_scanners":
            data["scanner"][:] = NAN
        case "every_scan_its_scanner":
            data["scanner"] = torch.arange(24.0)
        case "collapsed":
            data["z"] = torch.ones_like(data["z"])
    z = data["z"].clone().requires_grad_()
    loss = FairKL(divergence=divergence, statistics=statistics).of(EmbeddedViews([z], data))
    (gradient,) = torch.autograd.grad(loss, z)
    if case == "collapsed":
        # Nothing tells two scanners apart.
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
        assert float(gradient.abs().max()) < 1e-7
    else:
        assert float(loss.detach()) == 0.0
        assert float(gradient.abs().max()) == 0.0


def test_an_empty_sign_leaves_the_other_as_it_is() -> None:
    # Classes, each on both scanners, and no two scans of different classes known: negatives are empty.
    data = part(cohort(per_site=12), slice(12, 36))
    data["sex"][:] = 1.0
    fairkl = FairKL(kernel=Kernel(bandwidths={"sex": 0}), min_weight=1)
    positives_alone = float(pooled(fairkl, data))
    assert positives_alone > 1e-3
    # A scanner that holds a class of its own: no conflicting positives, and the positives count no more.
    data["sex"] = data["scanner"].double()
    confounded = looped(fairkl, [data["z"]], {name: data[name].double() for name in ("sex", "scanner")})
    assert float(pooled(fairkl, data)) == pytest.approx(confounded, rel=1e-10, abs=1e-15)
    assert confounded == 0.0  # nor are there aligned negatives


@pytest.mark.parametrize("name", ["age_years", "scanner"])
def test_a_scan_of_unknown_label_or_scanner_is_as_if_it_were_not_there(name: str) -> None:
    data = cohort(per_site=8)
    data["scanner"] = data["scanner"].double()
    for statistics in STATISTICS:
        fairkl = FairKL(min_weight=0.5, statistics=statistics)
        without = float(pooled(fairkl, part(data, data["site"] != 1)))
        unknown = {**data, name: torch.where(data["site"] == 1, NAN, data[name])}
        assert float(pooled(fairkl, unknown)) == pytest.approx(without, rel=1e-12)


def test_scanner_codes_may_be_numbers_of_any_kind() -> None:
    data = cohort(per_site=8)
    expected = float(pooled(FairKL(), data))
    for scanner in (data["scanner"].double(), data["scanner"] * -7 + 2**40, data["scanner"].to(torch.uint8)):
        assert float(pooled(FairKL(), {**data, "scanner": scanner})) == pytest.approx(expected, rel=1e-12)
    halves = {**data, "scanner": data["scanner"] > 1}
    assert float(pooled(FairKL(), halves)) == pytest.approx(
        float(pooled(FairKL(), {**data, "scanner": halves["scanner"].double()})), rel=1e-12
    )


def test_withheld_variance_compares_means_at_equal_variance() -> None:
    # Anchor e0: aligned rows at similarity .6 and .8 (mean .7, variance .01), the remote group at mean .2: difference .5.
    # All anchors share one variance, the mean of theirs plus the floor: mean of (difference^2) / (2 v).
    z = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0.8, 0, 0.6]], dtype=torch.float64)
    remote = GroupMoments(
        torch.tensor([[30.0]]),
        torch.tensor([10.0]),
        torch.tensor([[0.2, 0.0, 0.0]]),
        torch.zeros(0, 3, 3),
    )
    metadata = {"age_years": torch.full((3,), 30.0), "scanner": torch.zeros(3)}
    squares, variances = [], []
    for i in range(3):
        s = [float(z[i] @ z[j]) for j in range(3) if j != i]
        mean = sum(s) / 2
        variances.append(sum((v - mean) ** 2 for v in s) / 2 + 1e-2)
        squares.append((mean - float(z[i, 0]) * 0.2) ** 2)
    assert (squares[0], variances[0]) == pytest.approx((0.25, 0.02), rel=1e-9)
    mean_square, common = sum(squares) / 3, sum(variances) / 3
    expected = {"kl": mean_square / (2 * common), "jeffreys": mean_square / common, "moments": mean_square, "mean": mean_square}
    for divergence in DIVERGENCES:
        fairkl = FairKL(min_weight=1.5, divergence=divergence)
        assert float(fairkl.of(EmbeddedViews([z], metadata), remote)) == pytest.approx(expected[divergence], rel=1e-7)


def test_gaussian_kl_is_that_of_torch() -> None:
    g = torch.Generator().manual_seed(0)
    mean_a, mean_c = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    sd_a, sd_c = (torch.rand(20, generator=g, dtype=torch.float64) + 0.01 for _ in range(2))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean_a, sd_a), normal(mean_c, sd_c))
    torch.testing.assert_close(gaussian_kl(mean_a, sd_a**2, mean_c, sd_c**2), expected, rtol=1e-12, atol=1e-14)


# The code of the authors, and the ancestor.


def looped_released(debias: ReleasedFairKL, rows: Rows) -> float:
    """All R x R entries, a row with itself among them."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    means, spreads = {}, {}
    for positive, aligned in itertools.product((True, False), repeat=2):
        chosen, entries = [], []
        for i, j in itertools.product(rows.all, repeat=2):
            same_label = rows.labels[debias.label][i] == rows.labels[debias.label][j]
            same_bias = rows.labels[debias.bias][i] == rows.labels[debias.bias][j]
            inside = (same_label, same_bias) == (positive, aligned)
            entries.append(rows.s(i, j) / debias.temperature if inside else 0.0)
            chosen += [rows.s(i, j) / debias.temperature] if inside else []
        means[positive, aligned] = mean(chosen)
        spreads[positive, aligned] = math.sqrt(sum((e - mean(entries)) ** 2 for e in entries) / (len(entries) - 1))
    total = -means[True, False] + means[False, True]
    for positive in (True, False):
        total += (means[positive, True] - means[positive, False]) ** 2
        total += debias.spread_weight * (spreads[positive, True] - spreads[positive, False]) ** 2
    return total


def looped_end(debias: EnD, rows: Rows) -> float:
    label, bias = rows.labels[debias.label], rows.labels[debias.bias]
    pairs = [(i, j) for i, j in itertools.product(rows.all, repeat=2) if j < i and not rows.same_scan(i, j)]
    sharing = [(i, j) for i, j in pairs if bias[i] == bias[j]]
    sums = [abs(sum(rows.s(i, j) for i, j in sharing if bias[i] == value)) for value in set(bias)]
    crossing = [
        (i, j)
        for i, j in pairs
        if label[i] == label[j] and bias[i] != bias[j] and not math.isnan(bias[i] + bias[j])
        if not debias.released or bias[i] < bias[j]
    ]
    total = debias.disentangle_weight * sum(sums) / len(sharing) if sharing else 0.0
    if crossing:
        total += debias.entangle_weight * (1 - sum((1 + rows.s(i, j)) / 2 for i, j in crossing) / len(crossing))
    return total


@pytest.mark.parametrize("labels_of_views", [False, True], ids=["labels_of_scans", "labels_of_views"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(
    "debias",
    [
        ReleasedFairKL(),
        ReleasedFairKL(temperature=0.1, spread_weight=0.3),
        EnD(),
        EnD(disentangle_weight=0.3, entangle_weight=2.0),
        EnD(released=True),
    ],
    ids=repr,
)
def test_released_fairkl_and_end_equal_loops(debias: ReleasedFairKL | EnD, views: int, labels_of_views: bool) -> None:
    embedded, metadata = unknown_and_uneven(views, labels_of_views, per_site=4)
    rows = Rows(embedded, metadata)
    expected = looped_released(debias, rows) if isinstance(debias, ReleasedFairKL) else looped_end(debias, rows)
    assert abs(expected) > 1e-3
    assert float(debias.of(EmbeddedViews(embedded, metadata))) == pytest.approx(expected, rel=1e-10)


def test_the_released_form_pulls_positives_apart_where_fairkl_is_silent() -> None:
    """Why it is never the default: one class on one scanner, nothing to debias."""
    data = part(cohort(), slice(0, 24))
    data["sex"][:] = 0
    metadata = {"age_years": torch.full((24,), 30.0), **{name: data[name] for name in ("sex", "scanner")}}
    z = data["z"].clone().requires_grad_()
    views = EmbeddedViews([z], metadata)
    assert float(FairKL().of(views).detach()) == 0.0
    (gradient,) = torch.autograd.grad(ReleasedFairKL().of(views), z)
    step = torch.nn.functional.normalize(z.detach() - 5 * gradient, dim=1)
    assert float((step @ step.T).mean()) < float((data["z"] @ data["z"].T).mean()) - 0.05


def test_the_released_form_of_end_depends_on_the_order_of_scans() -> None:
    data = part(cohort(per_site=6), slice(0, 12))
    turned = {name: value.flip(0) for name, value in data.items()}
    assert float(pooled(EnD(released=True), turned)) != pytest.approx(float(pooled(EnD(released=True), data)), rel=1e-3)
    assert float(pooled(EnD(), turned)) == pytest.approx(float(pooled(EnD(), data)), rel=1e-12)


# Derivatives, precision, order.

ALL = [
    *(
        FairKL(divergence=divergence, statistics=statistics, min_weight=0.5)  # type: ignore[arg-type]
        for divergence in DIVERGENCES
        for statistics in STATISTICS
    ),
    FairKL(kernel=Kernel(bandwidths={"sex": 0}), min_weight=1),
    ReleasedFairKL(),
    EnD(),
    EnD(released=True),
]
every_debiasing = pytest.mark.parametrize("debias", ALL, ids=repr)


@every_debiasing
def test_the_gradient_is_the_derivative_and_has_one_itself(debias: Any) -> None:
    embedded, metadata = unknown_and_uneven(2, labels_of_views=False, per_site=3)
    metadata["scanner"][:] = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, NAN])
    views = [view[:, :3].clone().requires_grad_() for view in embedded]

    def loss(*views: Tensor) -> Tensor:
        return debias.of(EmbeddedViews(views, metadata))

    assert float(loss(*views).detach()) != 0.0
    assert torch.autograd.gradcheck(loss, views, atol=1e-6, rtol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, views, atol=1e-5, rtol=1e-4, fast_mode=True)
    value = loss(*views)
    first, again = (torch.autograd.grad(value, views, retain_graph=True) for _ in range(2))
    for one, two, other in zip(first, again, torch.autograd.grad(value, views, create_graph=True), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    # The flag: d/dz_j of the gradient at z_i is not zero.
    (mixed,) = torch.autograd.grad(torch.autograd.grad(loss(*views), views[0], create_graph=True)[0][0].sum(), views[0])
    assert bool((mixed[1:].abs() > 1e-9).any()) == debias.couples_scans


@every_debiasing
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("case", ["random", "collapsed", "zero_rows", "one_scan", "one_view", "one_class", "unknown", "one_bias"])
def test_loss_and_gradient_are_finite(debias: Any, precision: str, case: str) -> None:
    embedded, metadata = unknown_and_uneven(1 if case == "one_view" else 2, labels_of_views=False)
    match case:
        case "collapsed":
            embedded = [torch.full_like(view, 0.3) for view in embedded]
        case "zero_rows":
            embedded = [view * (torch.arange(15) % 2)[:, None] for view in embedded]
        case "one_scan":
            embedded, metadata = [view[:1] for view in embedded], part(metadata, slice(0, 1))
        case "one_class":
            metadata |= {"sex": torch.zeros(15), "age_years": torch.full((15,), 30.0)}
        case "unknown":
            metadata = {name: torch.full_like(value, NAN) for name, value in metadata.items()}
        case "one_bias":
            metadata["scanner"] = torch.zeros(15)
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    views = [view.to(dtype).requires_grad_() for view in embedded]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        made = [torch.nn.functional.linear(view, torch.eye(6).to(view)) for view in views]
        loss = debias.of(EmbeddedViews(made, metadata))
    assert loss.dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert math.isfinite(float(loss.detach()))
    assert abs(float(loss.detach())) < 1e4
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, views))
    if precision == "autocast":
        assert float(loss.detach()) == float(debias.of(EmbeddedViews([view.detach().float() for view in made], metadata)))


@every_debiasing
def test_float32_is_close_to_float64(debias: Any) -> None:
    # Embeddings with a large common part: similarities are near 1, and their variances small differences of squares.
    data = cohort(per_site=20)
    metadata = {name: data[name].double() for name in ("age_years", "sex", "scanner")}
    for common in (0.0, 1.0):
        exact = (data["z"] + common).requires_grad_()
        single = exact.detach().float().requires_grad_()
        expected, loss = (debias.of(EmbeddedViews([z], metadata)) for z in (exact, single))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-6)
        (gradient,), (theirs,) = torch.autograd.grad(loss, single), torch.autograd.grad(expected, exact)
        assert float((gradient - theirs).norm()) <= 1e-3 * float(theirs.norm()) + 1e-6


@pytest.mark.parametrize("debias", [one for one in ALL if one != EnD(released=True)], ids=repr)
def test_the_order_of_scans_and_of_views_does_not_matter(debias: Any) -> None:
    embedded, metadata = unknown_and_uneven(2, labels_of_views=True)
    expected = float(debias.of(EmbeddedViews(embedded, metadata)))
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    shuffled = {name: value[:, order] for name, value in metadata.items()}
    assert float(debias.of(EmbeddedViews([view[order] for view in embedded], shuffled))) == pytest.approx(expected, rel=1e-11)
    turned = {name: value.flip(0) for name, value in metadata.items()}
    assert float(debias(embedded[1], embedded[0], turned)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FairKL(min_weight=0), "debias fairkl: min_weight must be positive and finite, got 0"),
        (lambda: FairKL(variance_floor=NAN), "debias fairkl: variance_floor must be positive and finite, got nan"),
        (lambda: FairKL(divergence="js"), r"debias fairkl: divergence must be one of \('kl', .*\), got 'js'"),
        (lambda: FairKL(statistics="per_site"), r"debias fairkl: statistics must be one of .*, got 'per_site'"),
        (lambda: ReleasedFairKL(temperature=0), "debias released_fairkl: temperature must be positive and finite, got 0"),
        (lambda: ReleasedFairKL(spread_weight=-1), "debias released_fairkl: spread_weight must be 0 or positive"),
        (lambda: EnD(disentangle_weight=-1), "debias end: disentangle_weight must be 0 or positive and finite, got -1"),
        (lambda: EnD(entangle_weight=NAN), "debias end: entangle_weight must be 0 or positive and finite, got nan"),
    ],
)
def test_bad_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_missing_labels_are_refused() -> None:
    z = torch.eye(3)
    with pytest.raises(ValueError, match=r"loss: metadata must hold 'scanner', got \['age_years'\]"):
        FairKL()(z, z, {"age_years": torch.ones(3)})
    with pytest.raises(ValueError, match=r"metadata 'scanner' must have shape \(3,\) or \(2, 3\), got \(4,\)"):
        FairKL()(z, z, {"age_years": torch.ones(3), "scanner": torch.ones(4)})
    for debias in (ReleasedFairKL(), EnD()):
        with pytest.raises(ValueError, match="loss: metadata must hold"):
            debias(z, z, {"sex": torch.ones(3)})


# What a site sends.


def test_policy_decides_what_leaves() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(400, 4, generator=g, dtype=torch.float64), dim=1)
    age = torch.cat([torch.full((9,), 20.0), torch.full((30,), 40.0), torch.full((61,), 60.0), torch.full((300,), 80.0)])
    scanner = torch.zeros(400)
    policy = MomentPolicy(min_group=10, covariance_subjects_per_feature=25, round_counts_to=5)
    moments, withheld = site_moments(z, {"age_years": age.double()}, scanner, bin_years=5.0, policy=policy)
    # 9 of age 20 join the 30 of age 40 (39, count 40); 61, count 60; of 300 >= 25 x 4 the covariance is told too.
    assert moments.count_G.tolist() == [40.0, 60.0, 300.0]
    assert withheld == 0
    assert moments.covariance_GDD.isnan().flatten(1).any(dim=1).tolist() == [True, True, False]
    few, withheld = site_moments(z[:9], {"age_years": age[:9].double()}, scanner[:9], bin_years=5.0, policy=policy)
    assert (len(few), withheld) == (0, 9)


def test_groups_of_a_kernel_with_sex_are_of_one_sex_and_above_the_floor() -> None:
    g = torch.Generator().manual_seed(4)
    age = torch.rand(90, generator=g, dtype=torch.float64) * 60 + 20
    sex = (torch.arange(90) % 3 == 0).double()  # 60 of one, 30 of the other
    age[:2], sex[2:5] = NAN, NAN
    scanner = (torch.arange(90) >= 70).long()
    labels, policy = {"age_years": age, "sex": sex}, MomentPolicy(min_group=10)
    groups = groups_of(labels, scanner, bin_years=2.0, policy=policy)
    for group in groups:
        assert len(group) >= 10
        assert len(set(sex[group].tolist())) == len(set(scanner[group].tolist())) == 1
        # Edges are multiples of the cell: nobody of the same cell, scanner and sex is outside.
        inside = (scanner == scanner[group[0]]) & (sex == sex[group[0]])
        cells = torch.floor(age[group] / 2.0)
        same = inside & torch.isin(torch.floor(age / 2.0), cells)
        assert set(same.nonzero().flatten().tolist()) == set(group.tolist())
    z = torch.nn.functional.normalize(torch.randn(90, 4, generator=g, dtype=torch.float64), dim=1)
    moments, withheld = site_moments(z, labels, scanner, bin_years=2.0, policy=policy)
    # The 6 of the rarer sex at the smaller scanner, two unknown ages and three unknown sexes are withheld.
    assert withheld == 6 + 2 + 3 == 90 - sum(map(len, groups))
    assert moments.label_GL.tolist() == [[float(age[group].mean()), float(sex[group[0]])] for group in groups]
    alone, _ = site_moments(z, {"sex": sex}, scanner, bin_years=2.0, policy=policy)
    assert alone.label_GL.flatten().tolist() == [0.0, 1.0, 0.0]


def test_no_group_is_smaller_than_the_policy_says() -> None:
    g = torch.Generator().manual_seed(3)
    for _ in range(50):
        age = torch.rand(int(torch.randint(1, 90, (), generator=g)), generator=g) * 60 + 20
        groups = age_groups(age, bin_years=2.0, min_group=10)
        assert all(len(group) >= 10 for group in groups)
        members = torch.cat(groups).tolist() if groups else []
        assert sorted(members) == (list(range(len(age))) if len(age) >= 10 else [])


def test_moments_that_cannot_be_are_refused() -> None:
    good = {
        "label_GL": torch.tensor([[30.0]]),
        "count_G": torch.tensor([10.0]),
        "mean_GD": torch.tensor([[0.5, 0.5]]),
        "covariance_GDD": torch.zeros(0, 2, 2),
    }
    assert len(GroupMoments(**good)) == 1
    for name, value, match in [
        ("mean_GD", torch.tensor([[2.0, 0.0]]), "unit ball"),
        ("mean_GD", torch.tensor([[NAN, 0.0]]), "finite"),
        ("count_G", torch.tensor([0.0]), "positive"),
        ("covariance_GDD", -torch.eye(2)[None], "not negative"),
        ("covariance_GDD", torch.zeros(2, 2, 2), "shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            GroupMoments(**{**good, name: value})
    with pytest.raises(ValueError, match="min_group must be at least 1, got 0"):
        MomentPolicy(min_group=0)


def test_reference_from_sums_is_that_of_the_pooled_features() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4, 0]) + 7
    parts = [features[:70], features[70:135], features[135:]]
    reference = reference_from([feature_sums(part, MomentPolicy()) for part in parts])
    assert reference is not None
    assert torch.allclose(reference.mean_D, features.mean(dim=0), atol=1e-12)
    assert torch.allclose(reference.scale_D[:4], features.std(dim=0, correction=0)[:4], atol=1e-12)
    assert float(reference.scale_D[4]) == 1.0  # never varies
    rows = reference.rows(features)
    assert torch.allclose(rows.norm(dim=1), torch.ones(200, dtype=torch.float64))


def test_sums_are_of_the_scanners_that_are_told() -> None:
    """The sums of a site less what it tells of its large scanner would be the sums of its small one."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(80, 3, generator=g, dtype=torch.float64)
    scanner, taken = (torch.arange(80) >= 72).long(), torch.ones(80, dtype=torch.bool)
    taken[:5] = False
    policy = MomentPolicy(min_group=10, diagonal_subjects=60)
    told = told_subjects(taken, scanner, policy)
    assert torch.equal(told, taken & (scanner == 0))
    sums = feature_sums(features[told], policy)
    assert torch.allclose(sums[1], 67 * features[5:72].mean(dim=0), atol=1e-12)  # the difference is nothing
    features[72:] = 1e6
    features[:5] = 1e6
    assert torch.equal(feature_sums(features[told], policy), sums)
    assert not told_subjects(taken[:14], scanner[:14], policy).any()  # 9 taken of 14
    assert feature_sums(features[:0], policy).isnan().all()


def test_small_sites_withhold_their_sums() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(100, 3, generator=g, dtype=torch.float64)
    policy = MomentPolicy(min_group=10, diagonal_subjects=60)
    assert feature_sums(features[:9], policy).isnan().all()
    fifty = feature_sums(features[:50], policy)
    assert fifty.isnan().tolist() == [[False] * 3, [False] * 3, [True] * 3]
    assert reference_from([feature_sums(features[:9], policy)]) is None
    # A site of 50 tells its mean; the spread comes from the site of 90 alone, about the mean of both.
    both = reference_from([feature_sums(features[:50], policy), feature_sums(features[10:], policy)])
    assert both is not None
    mean = torch.cat([features[:50], features[10:]]).mean(dim=0)
    assert torch.allclose(both.mean_D, mean, atol=1e-12)
    assert torch.allclose(both.scale_D, (features[10:] - mean).square().mean(dim=0).sqrt(), atol=1e-12)
    alone = reference_from([fifty])
    assert alone is not None
    assert alone.scale_D.tolist() == [1.0] * 3


def test_a_reference_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="vectors of one length"):
        Reference(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="scales positive"):
        Reference(torch.zeros(2), torch.zeros(2))
