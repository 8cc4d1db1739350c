"""Objectives: by hand, against explicit loops, at the limits."""

import math

import pytest
import torch

from core.losses import NTXent, YAware

OBJECTIVES = [NTXent(temperature=0.2), YAware(temperature=0.2, bandwidth_years=4.0)]


def two(n: int = 6, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return z1, z2, {"age_years": torch.rand(n, generator=g, dtype=torch.float64) * 20 + 30}


def looped(z1: torch.Tensor, z2: torch.Tensor, ages: list[float], temperature: float, bandwidth: float | None) -> float:
    """The papers' formulas, one anchor and one pair at a time; no bandwidth is NT-Xent."""
    n = len(z1)
    rows = [[float(v) for v in row] for row in torch.cat([z1, z2])]
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in rows]
    total = 0.0
    for i in range(2 * n):
        logit = [sum(a * b for a, b in zip(rows[i], row, strict=True)) / temperature for row in rows]
        denominator = math.log(sum(math.exp(logit[a]) for a in range(2 * n) if a != i))
        weight = {}
        for k in range(2 * n):
            if k == i:
                continue
            own = k % n == i % n
            if own:
                weight[k] = 1.0
            elif bandwidth is not None and not math.isnan(ages[k % n]) and not math.isnan(ages[i % n]):
                weight[k] = math.exp(-0.5 * ((ages[i % n] - ages[k % n]) / bandwidth) ** 2)
        total -= sum(w * (logit[k] - denominator) for k, w in weight.items()) / sum(weight.values())
    return total / (2 * n)


def test_ntxent_by_hand() -> None:
    # Two orthogonal scans, equal views: every anchor sees its view at e^1 and two strangers at e^0.
    # -[1 - log(e + 1 + 1)] = log(e + 2) - 1 = 0.551445
    z = torch.eye(2, dtype=torch.float64)
    assert float(NTXent(temperature=1.0)(z, z, {})) == pytest.approx(0.5514447139320511, rel=1e-12)


def test_yaware_by_hand() -> None:
    # The same two scans, now of equal age: all three others weigh 1/3; logits 1, 0, 0; log-partition log(e + 2).
    # -(1/3)(1 + 0 + 0) + log(e + 2) = 1.218111
    z = torch.eye(2, dtype=torch.float64)
    loss = YAware(temperature=1.0, bandwidth_years=5.0)(z, z, {"age_years": torch.tensor([40.0, 40.0])})
    assert float(loss) == pytest.approx(math.log(math.e + 2) - 1 / 3, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_against_explicit_loops(seed: int) -> None:
    z1, z2, metadata = two(seed=seed)
    metadata["age_years"][1] = math.nan
    ages = metadata["age_years"].tolist()
    assert float(NTXent(temperature=0.2)(z1, z2, metadata)) == pytest.approx(looped(z1, z2, ages, 0.2, None), rel=1e-10)
    yaware = YAware(temperature=0.2, bandwidth_years=4.0)
    assert float(yaware(z1, z2, metadata)) == pytest.approx(looped(z1, z2, ages, 0.2, 4.0), rel=1e-10)


def test_yaware_without_ages_or_with_a_narrow_kernel_is_ntxent() -> None:
    z1, z2, metadata = two()
    expected = float(NTXent(temperature=0.3)(z1, z2, {}))
    unknown = {"age_years": torch.full((6,), math.nan)}
    assert float(YAware(temperature=0.3)(z1, z2, unknown)) == pytest.approx(expected, rel=1e-12)
    assert float(YAware(temperature=0.3, bandwidth_years=1e-6)(z1, z2, metadata)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_order_of_scans_and_of_views_does_not_matter(objective: NTXent | YAware) -> None:
    z1, z2, metadata = two()
    expected = float(objective(z1, z2, metadata))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    shuffled = {"age_years": metadata["age_years"][order]}
    assert float(objective(z1[order], z2[order], shuffled)) == pytest.approx(expected, rel=1e-12)
    assert float(objective(z2, z1, metadata)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("case", ["random", "collapsed", "zero", "one_scan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_finite(objective: NTXent | YAware, case: str, dtype: torch.dtype) -> None:
    z1, z2, metadata = two()
    if case == "collapsed":
        z1 = z2 = torch.ones_like(z1)
    if case == "zero":
        z1 = z2 = torch.zeros_like(z1)
    if case == "one_scan":
        z1, z2, metadata = z1[:1], z2[:1], {"age_years": metadata["age_years"][:1]}
    z1, z2 = (z.detach().clone().to(dtype).requires_grad_() for z in (z1, z2))
    loss = objective(z1, z2, metadata)
    loss.backward()
    assert torch.isfinite(loss)
    assert z1.grad is not None
    assert torch.isfinite(z1.grad).all()
    assert (case == "random") == bool((z1.grad.abs() > 1e-6).any())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_flag_couples_scans_tells_the_truth(objective: NTXent | YAware) -> None:
    # d/dz_j of the gradient at z_i is not zero: the scans are coupled, DP-SGD on single scans would be void.
    z1, z2, metadata = two()
    z1.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(z1, z2, metadata), z1, create_graph=True)
    (mixed,) = torch.autograd.grad(gradient[0].sum(), z1)
    assert bool((mixed[1:].abs() > 1e-9).any()) == objective.couples_scans


def test_bad_settings_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        NTXent(temperature=0)
    with pytest.raises(ValueError, match="bandwidth_years must be positive and finite, got nan"):
        YAware(bandwidth_years=math.nan)
    with pytest.raises(ValueError, match="same shape"):
        NTXent()(torch.ones(3, 2), torch.ones(2, 2), {})
