"""ComBat from sums: the published code's numbers, a reference written with data in one place, and what a site withholds."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.combat import BatchMoments, Combat, batch_moments, fit_combat, pooled_combat
from core.settings import MomentPolicy

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
WHY_NOT = "../shared/golden is not here: the authors' numbers lie beside the checkout, not in it"
CASES = ("three_sites_age", "three_sites_noage", "two_sites_small", "tiny_site_of_2", "single_site")
ALL = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)

Site = dict[str, Tensor]


def hospitals(num_sites: int, *, features: int = 9, seed: int = 0) -> dict[str, Site]:
    """Sites of unequal sizes, every third with two scanners, the first with three subjects; age and sex matter."""
    g = torch.Generator().manual_seed(seed)
    age_slope, sex_slope = torch.randn(2, features, generator=g, dtype=torch.float64)
    found = {}
    for number in range(num_sites):
        size = 3 if number == 0 else 20 + int(torch.randint(0, 40, (1,), generator=g))
        scanner = torch.arange(size) % 2 if number % 3 == 2 else torch.zeros(size, dtype=torch.long)
        age = (18 + 60 * torch.rand(size, generator=g, dtype=torch.float64)).round()
        sex = torch.randint(0, 2, (size,), generator=g).double()
        noise = torch.randn(size, features, generator=g, dtype=torch.float64) * (1 + scanner[:, None] + 0.2 * number)
        offset = torch.randn(2, features, generator=g, dtype=torch.float64)[scanner]
        x = 20 + noise + offset + age[:, None] / 20 * age_slope + sex[:, None] * sex_slope
        found[f"site{number:02d}"] = {"x": x, "scanner": scanner, "covariates": torch.stack([age, sex], dim=1)}
    return found


def told(sites: dict[str, Site], policy: MomentPolicy = ALL) -> dict[str, BatchMoments]:
    return {name: batch_moments(s["x"], s["scanner"], s["covariates"], policy=policy) for name, s in sites.items()}


def harmonised(combat: Combat, sites: dict[str, Site]) -> Tensor:
    return torch.cat([combat(s["x"], combat.indices(name, s["scanner"]), s["covariates"]) for name, s in sites.items()])


def published(sites: dict[str, Site], reference: int | None) -> np.ndarray[Any, Any]:
    """Johnson 2007 step by step on all subjects in one table, with the prior's own parameters and one feature at a time."""
    x = torch.cat([s["x"] for s in sites.values()]).numpy()
    names = sorted({(n, int(code)) for n, s in sites.items() for code in s["scanner"]})
    batch = np.array([names.index((n, int(code))) for n, s in sites.items() for code in s["scanner"]])
    one_hot = np.eye(len(names))[batch]
    covariates = torch.cat([s["covariates"] for s in sites.values()]).numpy()
    design = np.hstack([one_hot, covariates])
    coefficients = np.linalg.lstsq(design, x, rcond=None)[0]
    residual = x - design @ coefficients
    used = np.full(len(x), True) if reference is None else batch == reference
    sigma = np.sqrt((residual[used] ** 2).mean(axis=0))
    intercepts = coefficients[: len(names)]
    grand = one_hot.mean(axis=0) @ intercepts if reference is None else intercepts[reference]
    expected = grand + covariates @ coefficients[len(names) :]
    z = (x - expected) / sigma
    out = x.copy()
    for b in range(len(names)):
        if b == reference:
            continue
        rows = z[batch == b]
        n, hat, spread = len(rows), rows.mean(axis=0), rows.var(axis=0, ddof=1)
        m, s2, bar, t2 = spread.mean(), spread.var(ddof=1), hat.mean(), hat.var(ddof=1)
        a_prior, b_prior = (2 * s2 + m**2) / s2, (m * s2 + m**3) / s2
        g, d, change = hat, spread, 1.0
        while change > 1e-4:
            new_g = (t2 * n * hat + d * bar) / (t2 * n + d)
            new_d = (0.5 * ((rows - new_g) ** 2).sum(axis=0) + b_prior) / (n / 2 + a_prior - 1)
            change = max((abs(new_g - g) / g).max(), (abs(new_d - d) / d).max())
            g, d = new_g, new_d
        out[batch == b] = sigma * (rows - g) / np.sqrt(d) + expected[batch == b]
    return out


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=WHY_NOT)
@pytest.mark.parametrize("case", CASES)
def test_the_published_codes_numbers(case: str) -> None:
    with np.load(GOLDEN / "combat.npz") as arrays:
        x, site, age = (torch.from_numpy(arrays[f"{case}/in/{name}"].T) for name in ("X", "site", "age"))
        expected = arrays[f"{case}/out/pooled"].T
    with_age = {entry["id"]: entry["covariate_age"] for entry in json.loads((GOLDEN / "combat.json").read_text())["cases"]}
    assert sorted(with_age) == sorted(CASES)
    # Their code reads covariates as float32.
    covariates = age.float().double()[:, None] if with_age[case] else None
    combat = pooled_combat(x, site, covariates)
    np.testing.assert_allclose(combat(x, combat.indices("pooled", site), covariates), expected, atol=1e-9)
    # One site a hospital, each telling its own sums.
    parts = {
        f"site{k}": batch_moments(
            x[site == k], site[site == k], None if covariates is None else covariates[site == k], policy=ALL
        )
        for k in site.unique().tolist()
    }
    federated = fit_combat(parts)
    position = torch.cat([federated.indices(f"site{k}", site[site == k]) for k in site.unique().tolist()])
    np.testing.assert_allclose(federated(x, position, covariates), expected, atol=1e-9)


@pytest.mark.parametrize("num_sites", [2, 3, 7, 24])
@pytest.mark.parametrize("reference", [None, 1])
def test_sums_give_what_pooled_data_give(num_sites: int, reference: int | None) -> None:
    sites = hospitals(num_sites, seed=num_sites)
    combat = fit_combat(told(sites), reference=None if reference is None else ("site01", 0))
    assert len(combat.batches) == num_sites + num_sites // 3
    np.testing.assert_allclose(harmonised(combat, sites), published(sites, reference), atol=1e-9)
    if reference is not None:
        own = sites["site01"]
        torch.testing.assert_close(combat(own["x"], combat.indices("site01", own["scanner"]), own["covariates"]), own["x"])


def test_the_order_of_sites_changes_no_bit() -> None:
    parts = told(hospitals(5))
    one, other = fit_combat(parts), fit_combat(dict(reversed(parts.items())))
    assert one.batches == other.batches
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True) if isinstance(a, Tensor))


def test_held_out_subjects_of_a_known_scanner_come_closer_and_keep_age() -> None:
    sites = hospitals(6, seed=3)
    train = {name: {key: value[::2] for key, value in s.items()} for name, s in sites.items() if name != "site00"}
    test = {name: {key: value[1::2] for key, value in s.items()} for name, s in sites.items() if name != "site00"}
    combat = fit_combat(told(train))
    raw = torch.cat([s["x"] for s in test.values()])
    age = torch.cat([s["covariates"] for s in test.values()])

    def share_of_batches(x: Tensor) -> float:
        batch = torch.cat([combat.indices(name, s["scanner"]) for name, s in test.items()])
        return float(pooled_combat(x, batch, age).explained_F.mean())

    clean = harmonised(combat, test)
    # By chance six degrees of freedom explain 6 / 110 of noise.
    assert share_of_batches(clean) < 0.5 * share_of_batches(raw)
    slope = torch.linalg.lstsq(torch.cat([torch.ones(len(clean), 1), age], dim=1), clean).solution[1]
    assert float(torch.corrcoef(torch.stack([slope, combat.slope_CF[0]]))[0, 1]) > 0.9


def test_the_share_that_scanners_explain_is_the_pooled_regressions() -> None:
    sites = hospitals(4, seed=2)
    x = torch.cat([s["x"] for s in sites.values()])
    covariates = torch.cat([s["covariates"] for s in sites.values()])
    combat = fit_combat(told(sites))
    batch = torch.cat([combat.indices(name, s["scanner"]) for name, s in sites.items()])
    left = []
    for columns in (torch.ones(len(x), 1).double(), torch.nn.functional.one_hot(batch).double()):
        design = torch.cat([columns, covariates], dim=1)
        left.append((x - design @ torch.linalg.lstsq(design, x).solution).square().sum(dim=0))
    torch.testing.assert_close(combat.explained_F, 1 - left[1] / left[0], atol=1e-10, rtol=0)


def test_an_unknown_scanner_comes_back_as_it_is() -> None:
    sites = hospitals(3)
    combat = fit_combat(told(sites))
    position = combat.indices("elsewhere", torch.zeros(4, dtype=torch.long))
    assert position.tolist() == [-1] * 4
    assert combat.indices("site02", torch.tensor([0, 1, 7])).tolist() == [2, 3, -1]
    unknown = torch.full((4, 2), math.nan, dtype=torch.float64)
    x = torch.randn(4, 9)
    assert torch.equal(combat(x, position, unknown), x)
    assert combat(x, position, unknown).dtype == torch.float32


def test_what_is_withheld_is_named() -> None:
    sites = hospitals(3)
    parts = told(sites, replace(ALL, diagonal_subjects=12, round_counts_to=5))
    combat = fit_combat(parts)
    assert combat.batches == (("site01", 0), ("site02", 0), ("site02", 1))
    assert combat.notes == ("site00: scanner 0 is not harmonised: its variances need 12 subjects",)
    assert (torch.cat([part.count_B for part in parts.values()]) % 5 == 0).all()
    own = sites["site00"]
    assert torch.equal(combat(own["x"], combat.indices("site00", own["scanner"]), own["covariates"]), own["x"])
    with pytest.raises(ValueError, match=r"at least one scanner must be told, got none. site00: scanner 0 is not harm"):
        fit_combat(told(sites, MomentPolicy()))
    with pytest.raises(ValueError, match="No site answered"):
        fit_combat({})


def test_a_site_of_one_subject_and_one_without_an_age_are_named_and_all_stays_finite() -> None:
    sites = hospitals(3)
    sites["site00"] = {key: value[:1] for key, value in sites["site00"].items()}
    sites["site01"]["covariates"][0, 0] = math.nan
    combat = fit_combat(told(sites))
    assert combat.notes == (
        "site00: scanner 0 is not harmonised: its variances need 2 subjects",
        "site01: subjects without all covariates take no part",
    )
    assert all(value.isfinite().all() for value in vars(combat).values() if isinstance(value, Tensor))
    own = sites["site01"]
    with pytest.raises(ValueError, match="must be finite, got 1 subjects without"):
        combat(own["x"], combat.indices("site01", own["scanner"]), own["covariates"])


def test_features_that_do_not_vary_stay_as_they_are() -> None:
    sites = hospitals(3)
    for number, site in enumerate(sites.values()):
        site["x"][:, 0] = 7.1
        site["x"][:, 1] = 3.3 * number
    combat = fit_combat(told(sites))
    out = harmonised(combat, sites)
    assert torch.equal(out[:, :2], torch.cat([s["x"] for s in sites.values()])[:, :2])
    assert out.isfinite().all()
    assert combat.notes == ("2 features do not vary and stay as they are",)
    without = {name: {**s, "x": s["x"][:, 2:]} for name, s in sites.items()}
    torch.testing.assert_close(out[:, 2:], harmonised(fit_combat(told(without)), without))
    for site in sites.values():
        site["x"][:, :8] = 1.0
    with pytest.raises(ValueError, match="at least 2 features must vary for a prior over features, got 1"):
        fit_combat(told(sites))


def test_what_cannot_be_fitted_is_refused() -> None:
    sites = hospitals(3)
    with pytest.raises(ValueError, match=r"reference must be one of .* got \('site09', 0\)"):
        fit_combat(told(sites), reference=("site09", 0))
    combat = fit_combat(told(sites))
    with pytest.raises(ValueError, match="covariates must be the 2 of the fit, got 0"):
        combat(sites["site01"]["x"], combat.indices("site01", sites["site01"]["scanner"]))
    alike = {**sites, "site00": {key: value[:1].expand(3, *value.shape[1:]) for key, value in sites["site00"].items()}}
    with pytest.raises(ValueError, match="subjects of site site00, scanner 0 must differ"):
        fit_combat(told(alike))
    for name, site in sites.items():
        site["covariates"][:, 1] = float(name == "site01")
    with pytest.raises(ValueError, match="must vary inside a scanner"):
        fit_combat(told(sites))
    for site in sites.values():
        site["covariates"][:, 1] = 2 * site["covariates"][:, 0] + 1
    with pytest.raises(ValueError, match="must not determine one another"):
        fit_combat(told(sites))


def test_moments_that_cannot_be_are_refused() -> None:
    part = told(hospitals(2))["site01"]
    with pytest.raises(ValueError, match=r"variance_BF must have shape \(1, 9\), got \(1, 3\)"):
        replace(part, variance_BF=part.variance_BF[:, :3])
    with pytest.raises(ValueError, match="values must be finite"):
        replace(part, mean_BF=part.mean_BF * math.nan)
    with pytest.raises(ValueError, match="counts be at least 2"):
        replace(part, count_B=part.count_B * 0)
