"""FairKL and the exchange of moments: by loops, against the pooled embeddings, at the limits."""

import math

import pytest
import torch

from core.losses import FairKL
from core.moments import (
    GroupMoments,
    MomentPolicy,
    Reference,
    age_groups,
    concatenate,
    feature_sums,
    reference_from,
    site_moments,
)

EXACT = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)


def cohort(seed: int = 0, per_site: int = 24, features: int = 6) -> dict[str, torch.Tensor]:
    """Three sites, the last with two scanners; ages on a few exact values; unit-length rows that depend on both."""
    g = torch.Generator().manual_seed(seed)
    site = torch.arange(3).repeat_interleave(per_site)
    scanner = site.clone()
    scanner[site == 2] = 2 + torch.arange(per_site) % 2
    age = 20.0 + 10.0 * torch.randint(0, 4, (3 * per_site,), generator=g)
    z = torch.randn(3 * per_site, features, generator=g, dtype=torch.float64)
    z[:, 0] += scanner
    z[:, 1] += age / 20
    return {"site": site, "scanner": scanner, "age": age.double(), "z": torch.nn.functional.normalize(z, dim=1)}


def looped(fairkl: FairKL, z: torch.Tensor, age: torch.Tensor, bias: torch.Tensor, scan: torch.Tensor) -> float:
    """FairKL, one anchor and one pair at a time."""
    total = 0.0
    for positive in (True, False):
        values = []
        for i in range(len(z)):
            groups: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for j in range(len(z)):
                if scan[i] == scan[j] or torch.isnan(age[i]) or torch.isnan(age[j]):
                    continue
                kernel = math.exp(-0.5 * float((age[i] - age[j]) / fairkl.bandwidth_years) ** 2)
                groups[bool(bias[i] == bias[j])].append((kernel if positive else 1 - kernel, float(z[i] @ z[j])))
            mean, variance, size = {}, {}, {}
            for aligned, pairs in groups.items():
                size[aligned] = sum(w for w, _ in pairs)
                if size[aligned] >= fairkl.min_weight:
                    mean[aligned] = sum(w * s for w, s in pairs) / size[aligned]
                    variance[aligned] = sum(w * (s - mean[aligned]) ** 2 for w, s in pairs) / size[aligned]
            if len(mean) == 2:
                v_a, v_c = variance[True] + fairkl.variance_floor, variance[False] + fairkl.variance_floor
                values.append(0.5 * ((v_a + (mean[True] - mean[False]) ** 2) / v_c - math.log(v_a / v_c) - 1))
        total += sum(values) / len(values) if values else 0.0
    return total


def pooled(fairkl: FairKL, data: dict[str, torch.Tensor]) -> torch.Tensor:
    return fairkl(data["z"], data["age"], data["scanner"], torch.arange(len(data["z"])))


def test_equals_the_formula_in_loops() -> None:
    data = cohort(per_site=8)
    data["age"][3] = math.nan
    fairkl = FairKL(bandwidth_years=7.0, min_weight=0.5)
    expected = looped(fairkl, data["z"], data["age"], data["scanner"], torch.arange(24))
    assert expected > 0.1
    assert float(pooled(fairkl, data)) == pytest.approx(expected, rel=1e-10)


def test_two_views_of_a_scan_are_no_pair() -> None:
    data = cohort(per_site=6)
    rows, scan = torch.cat([data["z"], data["z"].roll(1, 0)]), torch.arange(18).repeat(2)
    fairkl = FairKL(min_weight=0.1)
    expected = looped(fairkl, rows, data["age"].repeat(2), data["scanner"].repeat(2), scan)
    assert float(fairkl(rows, data["age"].repeat(2), data["scanner"].repeat(2), scan)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_moment_exchange_equals_pooled_embeddings(seed: int) -> None:
    """Identity 6: every site computes FairKL from its own rows and the others' moments; together they give the pooled one."""
    data = cohort(seed=seed, per_site=30)
    # Sites of different sizes.
    keep = torch.cat([torch.arange(0, 30), torch.arange(30, 50), torch.arange(60, 90)])
    data = {name: value[keep] for name, value in data.items()}
    fairkl = FairKL(bandwidth_years=8.0, min_weight=1e-9)
    sent = []
    for site in range(3):
        own = data["site"] == site
        moments, withheld = site_moments(data["z"][own], data["age"][own], data["scanner"][own], bin_years=10.0, policy=EXACT)
        assert withheld == 0
        sent.append(moments)
    total, scans = 0.0, 0
    for site in range(3):
        own = data["site"] == site
        remote = concatenate([sent[other] for other in range(3) if other != site])
        value = fairkl(data["z"][own], data["age"][own], data["scanner"][own], torch.arange(int(own.sum())), remote)
        total += float(value) * int(own.sum())
        scans += int(own.sum())
    expected = float(pooled(fairkl, data))
    assert expected > 0.1
    assert total / scans == pytest.approx(expected, abs=1e-10)
    # Without the exchange the one-scanner sites have nothing to compare with: the figure is another.
    alone = float(fairkl(data["z"][:30], data["age"][:30], data["scanner"][:30], torch.arange(30)))
    assert alone == 0.0


def test_gradient_flows_through_the_anchor_and_not_through_the_moments() -> None:
    data = cohort()
    own = data["site"] == 0
    remote, _ = site_moments(data["z"][~own], data["age"][~own], data["scanner"][~own], bin_years=10.0, policy=EXACT)
    z = data["z"][own].clone().requires_grad_()
    loss = FairKL()(z, data["age"][own], data["scanner"][own], torch.arange(24), remote)
    loss.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert float(z.grad.abs().max()) > 1e-3


def test_descent_makes_sites_alike() -> None:
    """What it is for: moving the rows of one site down the gradient brings the sites' means together."""
    data = cohort(per_site=40)
    own = data["site"] == 0
    remote, _ = site_moments(data["z"][~own], data["age"][~own], data["scanner"][~own], bin_years=10.0, policy=EXACT)
    far = data["z"][~own].mean(0)
    free = data["z"][own].clone().requires_grad_()
    optimiser = torch.optim.Adam([free], lr=0.02)
    before = float((data["z"][own].mean(0) - far).norm())
    for _ in range(100):
        z = torch.nn.functional.normalize(free, dim=1)
        loss = FairKL()(z, data["age"][own], data["scanner"][own], torch.arange(40), remote)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = float((torch.nn.functional.normalize(free.detach(), dim=1).mean(0) - far).norm())
    assert after < 0.5 * before


@pytest.mark.parametrize("case", ["one_scanner", "one_scan", "no_ages", "collapsed"])
def test_empty_groups_contribute_exactly_nothing(case: str) -> None:
    data = cohort(per_site=8)
    z, age, scanner = data["z"].clone(), data["age"].clone(), data["scanner"].clone()
    if case == "one_scanner":
        scanner[:] = 0
    if case == "one_scan":
        z, age, scanner = z[:1], age[:1], scanner[:1]
    if case == "no_ages":
        age[:] = math.nan
    if case == "collapsed":
        z = torch.nn.functional.normalize(torch.ones_like(z), dim=1)
    z.requires_grad_()
    loss = FairKL()(z, age, scanner, torch.arange(len(z)))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert loss.isfinite()
    if loss.requires_grad:
        loss.backward()
        assert z.grad is not None
        assert torch.isfinite(z.grad).all()


def test_withheld_variance_compares_means_at_equal_variance() -> None:
    # Anchor e0: aligned rows at similarity .6 and .8 (mean .7, variance .01), the remote group at mean .2: difference .5.
    # All anchors share one variance, the mean of theirs plus the floor: mean of (difference^2) / (2 v).
    z = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0.8, 0, 0.6]], dtype=torch.float64)
    remote = GroupMoments(
        torch.tensor([30.0]),
        torch.tensor([10.0]),
        torch.tensor([[0.2, 0.0, 0.0]]),
        torch.full((1, 3), math.nan),
        torch.zeros(0, 3, 3),
    )
    age, one = torch.full((3,), 30.0), torch.zeros(3)
    squares, variances = [], []
    for i in range(3):
        s = [float(z[i] @ z[j]) for j in range(3) if j != i]
        mean = sum(s) / 2
        variances.append(sum((v - mean) ** 2 for v in s) / 2 + 1e-2)
        squares.append((mean - float(z[i, 0]) * 0.2) ** 2)
    assert (squares[0], variances[0]) == pytest.approx((0.25, 0.02), rel=1e-9)
    expected = sum(squares) / 3 / (2 * sum(variances) / 3)
    assert float(FairKL(min_weight=1.5)(z, age, one, torch.arange(3), remote)) == pytest.approx(expected, rel=1e-7)


def test_policy_decides_what_leaves() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(400, 4, generator=g, dtype=torch.float64), dim=1)
    age = torch.cat([torch.full((9,), 20.0), torch.full((30,), 40.0), torch.full((61,), 60.0), torch.full((300,), 80.0)])
    scanner = torch.zeros(400)
    policy = MomentPolicy(min_group=10, diagonal_subjects=60, covariance_subjects_per_feature=25, round_counts_to=5)
    moments, withheld = site_moments(z, age.double(), scanner, bin_years=5.0, policy=policy)
    # 9 of age 20 join the 30 of age 40 (39: mean only, count 40); 61: variances, count 60; 300 >= 25 x 4: covariance.
    assert moments.count_G.tolist() == [40.0, 60.0, 300.0]
    assert withheld == 0
    assert moments.variance_GD.isnan().any(dim=1).tolist() == [True, False, False]
    assert moments.covariance_GDD.isnan().flatten(1).any(dim=1).tolist() == [True, True, False]
    few, withheld = site_moments(z[:9], age[:9].double(), scanner[:9], bin_years=5.0, policy=policy)
    assert (len(few), withheld) == (0, 9)


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
        "label_G": torch.tensor([30.0]),
        "count_G": torch.tensor([10.0]),
        "mean_GD": torch.tensor([[0.5, 0.5]]),
        "variance_GD": torch.zeros(1, 2),
        "covariance_GDD": torch.zeros(0, 2, 2),
    }
    assert len(GroupMoments(**good)) == 1
    for name, value, match in [
        ("mean_GD", torch.tensor([[2.0, 0.0]]), "unit ball"),
        ("mean_GD", torch.tensor([[math.nan, 0.0]]), "finite"),
        ("count_G", torch.tensor([0.0]), "positive"),
        ("variance_GD", torch.tensor([[-1.0, 0.0]]), "not negative"),
        ("variance_GD", torch.zeros(2, 2), "shape"),
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
