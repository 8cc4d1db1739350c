"""Erasure: equal to the pooled regression, equal means afterwards, age kept, nothing erased when age cannot be told apart."""

import pytest
import torch

from core.erasure import GroupMeans, fit_eraser, group_means
from core.moments import MomentPolicy, feature_sums, reference_from

ALL = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)


def sites(per_site: int = 60, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Three sites of different ages, the last with two scanners; features carry age, scanner and noise."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for number in range(3):
        age = 20.0 + 10.0 * number + 5.0 * torch.randint(0, 8, (per_site,), generator=g)
        scanner = torch.arange(per_site) % 2 if number == 2 else torch.zeros(per_site, dtype=torch.long)
        x = torch.randn(per_site, 12, generator=g, dtype=torch.float64) * (1 + torch.arange(12))
        x[:, 0] += age / 5
        x[:, 1] += age / 10 + 4 * number
        x[:, 2] -= 9 * scanner + 5 * number
        found.append({"x": x + 30, "age": age.double(), "scanner": scanner})
    return found


def fit(data: list[dict[str, torch.Tensor]], policy: MomentPolicy, bin_years: float = 5.0):  # type: ignore[no-untyped-def]
    reference = reference_from([feature_sums(site["x"], policy) for site in data])
    assert reference is not None
    means = [group_means(s["x"], s["age"], s["scanner"], reference=reference, bin_years=bin_years, policy=policy) for s in data]
    return fit_eraser(means, reference), reference


def offsets(data: list[dict[str, torch.Tensor]], x: list[torch.Tensor]) -> torch.Tensor:
    """Scanner coefficients of the pooled regression on scanner, age and age squared, about their mean."""
    age = (torch.cat([s["age"] for s in data]) - 50) / 20
    code = torch.cat([number + s["scanner"] for number, s in enumerate(data)])
    design = torch.cat([torch.nn.functional.one_hot(code).double(), age[:, None], age[:, None] ** 2], dim=1)
    coefficients = torch.linalg.lstsq(design, torch.cat(x)).solution[:4]
    return coefficients - coefficients.mean(dim=0)


def test_with_exact_age_groups_scanners_are_equal_in_the_pooled_regression() -> None:
    data = sites()
    eraser, reference = fit(data, ALL)
    assert eraser is not None
    assert eraser.directions_KD.shape == (3, 12)
    before = offsets(data, [s["x"] for s in data]) / reference.scale_D
    after = offsets(data, [eraser(s["x"]) for s in data]) / reference.scale_D
    assert float(before.norm()) > 1
    assert float(after.norm()) < 1e-9


def test_age_is_kept_and_erasing_twice_changes_nothing_more() -> None:
    data = sites()
    eraser, _ = fit(data, ALL)
    assert eraser is not None
    x, age = torch.cat([s["x"] for s in data]), torch.cat([s["age"] for s in data])
    once = eraser(x)
    assert torch.allclose(eraser(once), once, atol=1e-9)
    assert abs(float(torch.corrcoef(torch.stack([once[:, 0], age]))[0, 1])) > 0.9
    assert not torch.allclose(once, x, atol=0.1)


def test_with_the_default_policy_most_of_the_difference_goes() -> None:
    data = sites(per_site=80)
    eraser, reference = fit(data, MomentPolicy(), bin_years=2.0)
    assert eraser is not None
    before = float((offsets(data, [s["x"] for s in data]) / reference.scale_D).norm())
    after = float((offsets(data, [eraser(s["x"]) for s in data]) / reference.scale_D).norm())
    assert after < 0.15 * before


def test_nothing_is_erased_when_age_and_scanner_cannot_be_told_apart() -> None:
    data = [{**site, "age": torch.full((60,), 30.0 + 10 * n, dtype=torch.float64)} for n, site in enumerate(sites())]
    assert fit(data, ALL)[0] is None
    assert fit(sites()[:1], ALL)[0] is None  # one scanner only
    assert fit_eraser([], fit(sites(), ALL)[1]) is None


def test_small_groups_are_not_told() -> None:
    site = sites(per_site=9)[0]
    reference = fit(sites(), ALL)[1]
    means = group_means(site["x"], site["age"], site["scanner"], reference=reference, bin_years=5.0, policy=MomentPolicy())
    assert len(means.label_G) == 0
    assert means.mean_GD.shape == (0, 12)


def test_means_that_cannot_be_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="one label, count and scanner a group"):
        GroupMeans(one, torch.ones(2), one, torch.ones(1, 3))
    with pytest.raises(ValueError, match="finite and counts positive"):
        GroupMeans(one, -one, one, torch.ones(1, 3))
