"""Erasure: equal to the pooled regression, equal means afterwards, age kept, nothing told below the policy's floor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.erasure import (
    Eraser,
    ScannerSums,
    covariates,
    fewest_directions,
    fit_eraser,
    nearest_mean_hits,
    scanner_offsets,
    scanner_sums,
    told_scanners,
)
from core.moments import Reference
from core.settings import MomentPolicy

ALL = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)
Site = dict[str, torch.Tensor]


def sites(per_site: int = 60, seed: int = 0) -> list[Site]:
    """Three sites of different ages, the last with two scanners; features carry age, sex, scanner and noise."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for number in range(3):
        age = 20.0 + 12.0 * number + 40 * torch.rand(per_site, generator=g, dtype=torch.float64)
        sex = torch.randint(0, 2, (per_site,), generator=g)
        scanner = torch.arange(per_site) % 2 if number == 2 else torch.zeros(per_site, dtype=torch.long)
        x = torch.randn(per_site, 12, generator=g, dtype=torch.float64)
        x[:, 0] += age / 5
        x[:, 1] += age / 10 + 4 * number
        x[:, 2] += sex - 9 * scanner + 5 * number
        found.append({"x": x, "age": age, "scanner": scanner, "sex": sex, "patient": torch.zeros(per_site)})
    return found


def reference_of(data: list[Site]) -> Reference:
    x = torch.cat([site["x"] for site in data])
    return Reference(x.mean(dim=0), x.std(dim=0))


def sums_of(site: Site, reference: Reference, policy: MomentPolicy, age_degree: int = 1) -> tuple[ScannerSums, int]:
    given = covariates(site["age"], site["sex"], site["patient"], age_degree=age_degree)
    return scanner_sums(reference.standard(site["x"]), given, site["scanner"], policy=policy)


def fit(data: list[Site], policy: MomentPolicy = ALL, **options: int) -> Eraser | None:
    reference = reference_of(data)
    return fit_eraser([sums_of(site, reference, policy)[0] for site in data], reference, **options)


def pooled_offsets(data: list[Site], x: list[torch.Tensor], age_degree: int = 1) -> torch.Tensor:
    """Scanner coefficients of the pooled least squares on scanner and covariates, about their mean over the subjects."""
    code = torch.cat([number + s["scanner"] for number, s in enumerate(data)])
    one_hot = torch.nn.functional.one_hot(code).double()
    given = torch.cat([covariates(s["age"], s["sex"], s["patient"], age_degree=age_degree) for s in data])
    design = torch.cat([one_hot, given], dim=1)
    offset = torch.linalg.lstsq(design, torch.cat(x), driver="gelsd").solution[: one_hot.shape[1]]
    return offset - one_hot.mean(dim=0) @ offset


@pytest.mark.parametrize("age_degree", [1, 2])
def test_offsets_from_sums_are_those_of_the_pooled_regression(age_degree: int) -> None:
    data = sites()
    reference = reference_of(data)
    found = scanner_offsets([sums_of(site, reference, ALL, age_degree)[0] for site in data])
    assert found is not None
    torch.testing.assert_close(
        found[0], pooled_offsets(data, [reference.standard(s["x"]) for s in data], age_degree), atol=1e-9, rtol=0
    )
    assert found[1].tolist() == [60, 60, 30, 30]


def test_erased_features_have_equal_means_at_equal_covariates() -> None:
    data = sites()
    eraser = fit(data)
    assert eraser is not None
    assert eraser.directions_KF.shape == (3, 12)
    scale = reference_of(data).scale_D
    assert float((pooled_offsets(data, [s["x"] for s in data]) / scale).norm()) > 1
    assert float((pooled_offsets(data, [eraser(s["x"]) for s in data]) / scale).norm()) < 1e-9


def test_age_is_kept_and_erasing_twice_changes_nothing_more() -> None:
    data = sites()
    eraser = fit(data)
    assert eraser is not None
    x, age = torch.cat([s["x"] for s in data]), torch.cat([s["age"] for s in data])
    once = eraser(x)
    torch.testing.assert_close(eraser(once), once, atol=1e-9, rtol=0)
    assert float(torch.corrcoef(torch.stack([once[:, 0], age]))[0, 1]) > 0.9


def test_a_planted_direction_is_all_that_goes() -> None:
    g = torch.Generator().manual_seed(3)
    planted = torch.nn.functional.normalize(torch.randn(10, generator=g, dtype=torch.float64), dim=0)
    age = 20 + 60 * torch.rand(4000, generator=g, dtype=torch.float64)
    site = torch.arange(4000) % 2
    x = torch.randn(4000, 10, generator=g, dtype=torch.float64) + 3.0 * site[:, None] * planted
    x[:, 4] += (age - 50) / 10
    data = [
        {"x": x[m], "age": age[m], "scanner": torch.zeros(2000, dtype=torch.long)}
        | {"sex": torch.ones(2000), "patient": torch.zeros(2000)}
        for m in (site == 0, site == 1)
    ]
    eraser = fit(data)
    assert eraser is not None
    assert len(eraser.directions_KF) == 1
    moved = eraser(x) - x
    along = (moved @ planted)[:, None] * planted
    assert float((moved - along).norm() / along.norm()) < 0.05
    assert float(eraser(x)[site == 1].mean(dim=0).sub(eraser(x)[site == 0].mean(dim=0)) @ planted) == pytest.approx(0, abs=0.02)


def test_the_largest_differences_go_first() -> None:
    data = sites()
    all_of_it, one = fit(data), fit(data, max_directions=1)
    assert all_of_it is not None
    assert one is not None
    torch.testing.assert_close(one.directions_KF, all_of_it.directions_KF[:1])
    sizes = [
        float((pooled_offsets(data, [e(s["x"]) for s in data]) / reference_of(data).scale_D).norm()) for e in (one, all_of_it)
    ]
    assert sizes[1] < sizes[0] < float((pooled_offsets(data, [s["x"] for s in data]) / reference_of(data).scale_D).norm())
    none = fit(data, max_directions=0)
    assert none is not None
    assert torch.equal(none(data[0]["x"]), data[0]["x"])


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_no_subject_weighs_more_than_one_in_min_group(num_subjects: int, min_group: int, seed: int) -> None:
    site = sites(per_site=max(num_subjects, 1), seed=seed)[0]
    site = {name: value[:num_subjects] for name, value in site.items()}
    policy = MomentPolicy(min_group=min_group)
    sums, withheld = sums_of(site, Reference(torch.zeros(12).double(), torch.ones(12).double()), policy)
    if num_subjects < min_group:
        assert (len(sums.count_S), withheld) == (0, num_subjects)
        assert not sums.tells_slopes
    else:
        assert (len(sums.count_S), withheld) == (1, 0)
        assert sums.count_S.tolist() == [policy.rounded(num_subjects)]
        varying = sum(len(torch.unique(site[name])) > 1 for name in ("age", "sex"))
        assert sums.tells_slopes == (num_subjects >= min_group * (1 + varying))


def test_scanners_below_the_floor_and_unknown_ages_are_withheld_and_counted() -> None:
    site = sites()[2]
    site["age"][:7] = torch.nan
    site["scanner"][:] = 0
    site["scanner"][-9:] = 1
    sums, withheld = sums_of(site, Reference(torch.zeros(12).double(), torch.ones(12).double()), MomentPolicy())
    assert withheld == 7 + 9
    assert sums.count_S.tolist() == [45]
    torch.testing.assert_close(sums.mean_SF[0], site["x"][7:-9].mean(dim=0))


def test_nothing_is_erased_when_covariates_and_scanner_cannot_be_told_apart() -> None:
    data = sites()
    assert fit(data[:1]) is None
    assert scanner_offsets([]) is None
    assert fit(data, MomentPolicy(min_group=30)) is None  # means of three scanners, slopes of none
    assert fit(data, MomentPolicy(min_group=61)) is None


def test_sites_with_the_same_means_lose_nothing() -> None:
    site = sites()[0]
    eraser = fit([site, site])
    assert eraser is not None
    assert len(eraser.directions_KF) == 0
    assert torch.equal(eraser(site["x"]), site["x"])


def test_sums_that_make_no_sense_are_refused() -> None:
    good = sums_of(sites()[0], reference_of(sites()), ALL)[0]
    fields = vars(good)
    for wrong, message in (
        ({"count_S": torch.zeros(1)}, "counts positive"),
        ({"mean_SF": good.mean_SF * torch.nan}, "means must be finite"),
        ({"cross_PF": good.cross_PF[:, :5]}, "cross_PF must have shape"),
        ({"gram_PP": good.gram_PP * torch.inf}, "products must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ScannerSums(**fields | wrong)


def test_nearest_mean_hits_are_those_of_a_plain_loop() -> None:
    data = sites(per_site=24)
    reference = reference_of(data)
    parts = [sums_of(site, reference, ALL)[0] for site in data]
    eraser = fit_eraser(parts, reference)
    assert eraser is not None
    means = torch.cat([part.mean_SF for part in parts])
    directions = eraser.directions_KF
    first, found = 0, []
    for site in data:
        given = covariates(site["age"], site["sex"], site["patient"])
        told = told_scanners(given, site["scanner"], ALL)
        x = reference.standard(site["x"])
        found.append(nearest_mean_hits(x, told, means, directions, first=first, policy=ALL))
        for row, members in enumerate(told):
            for k in range(len(directions) + 1):
                keep = torch.eye(12, dtype=torch.float64) - directions[:k].T @ directions[:k]
                hits = 0
                for i in members.tolist():
                    others = means.clone()
                    others[first + row] = x[[j for j in members.tolist() if j != i]].mean(dim=0)
                    hits += int(((x[i] - others) @ keep).square().sum(dim=1).argmin()) == first + row
                assert found[-1][row, k] == hits
        first += len(told)
    counts = torch.cat([part.count_S for part in parts])
    hits = torch.cat(found)
    every, course = fewest_directions(hits, counts, 0.0)
    assert every == len(directions)
    assert course[0] > 0.8
    assert float(course[-1]) < 0.6  # what age tells of the site stays
    some, _ = fewest_directions(hits, counts, float(course[1]))
    assert some == 1
    assert fewest_directions(hits, counts, 1.0)[0] == 0
    needed, _ = fewest_directions(hits, counts)
    assert float(course[needed]) <= max(0.25, 1.1 * float(course[-1])) < float(course[needed - 1])


def test_hits_are_rounded_as_counts_are() -> None:
    site = sites(per_site=23)[0]
    told = [torch.arange(23)]
    means = torch.stack([site["x"].mean(dim=0), site["x"].mean(dim=0) + 100])
    hits = nearest_mean_hits(site["x"], told, means, torch.eye(12)[:2], first=0, policy=MomentPolicy())
    assert hits.tolist() == [[25.0, 25.0, 25.0]]
    assert fewest_directions(hits, torch.tensor([20.0]), 1.0)[1].tolist() == [1.0, 1.0, 1.0]
