"""Kernels of labels: shapes against numpy, products, classes, unknown labels."""

import math

import numpy as np
import pytest
import torch

from core.losses import EmbeddedViews, Kernel
from core.losses.kernels import SHAPES

# Of a distance in units of the bandwidth.
FORMULAS = {
    "rbf": lambda d: np.exp(-(d**2) / 2),
    "cauchy": lambda d: 1 / (1 + d**2),
    "epanechnikov": lambda d: np.maximum(1 - d**2, 0),
    "exponential": lambda d: np.exp(-d),
    "linear": lambda d: np.maximum(1 - d, 0),
    "cosine": lambda d: np.where(d < 1, np.cos(np.pi * d / 2), 0),
    "gaussian": lambda d: np.exp(-(d**2) / 2),
}
AGES = torch.tensor([20.0, 23.5, 30.0, 30.0, 61.0, 97.0], dtype=torch.float64)


def ages(*values: float) -> dict[str, torch.Tensor]:
    return {"age_years": torch.tensor(values, dtype=torch.float64)}


def test_every_shape_has_its_formula_here() -> None:
    assert FORMULAS.keys() == SHAPES.keys()


@pytest.mark.parametrize("shape", FORMULAS)
@pytest.mark.parametrize("bandwidth", [0.7, 5.0, 40.0])
def test_shapes_are_their_formulas(shape: str, bandwidth: float) -> None:
    distance = np.abs(AGES.numpy()[:, None] - AGES.numpy()[None, :]) / bandwidth
    expected = FORMULAS[shape](distance)
    if shape == "gaussian":
        expected = expected / (math.sqrt(2 * math.pi) * bandwidth)
    kernel = Kernel(shape=shape, bandwidths={"age_years": bandwidth})
    weights = kernel.weights({"age_years": AGES})
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12, atol=1e-16)
    assert kernel.peak == pytest.approx(float(expected.max()), rel=1e-12)
    assert torch.equal(weights, weights.T)
    # Between rows and other rows: the same numbers.
    others = kernel.weights({"age_years": AGES[:2]}, {"age_years": AGES[2:]})
    assert torch.equal(others, weights[:2, 2:])


@pytest.mark.parametrize("shape", FORMULAS)
def test_the_labels_are_left_as_they_are(shape: str) -> None:
    # Shapes work in place, on the differences alone.
    labels = {"age_years": AGES.clone()}
    Kernel(shape=shape).weights(labels)
    assert torch.equal(labels["age_years"], AGES)


@pytest.mark.parametrize("shape", FORMULAS)
def test_several_labels_multiply(shape: str) -> None:
    labels = {"age_years": AGES, "volume_ml": torch.tensor([900.0, 1000, 1100, 950, 1020, 990], dtype=torch.float64)}
    both = Kernel(shape=shape, bandwidths={"age_years": 30.0, "volume_ml": 200.0})
    age, volume = (Kernel(shape=shape, bandwidths={name: both.bandwidths[name]}) for name in labels)
    torch.testing.assert_close(both.weights(labels), age.weights(labels) * volume.weights(labels), rtol=1e-12, atol=0)
    assert both.peak == pytest.approx(age.peak * volume.peak, rel=1e-12)
    assert both.labels == ("age_years", "volume_ml")


@pytest.mark.parametrize("shape", sorted(set(FORMULAS) - {"gaussian"}))
def test_bandwidth_zero_asks_for_equal_labels_whatever_the_shape(shape: str) -> None:
    labels = {"sex": torch.tensor([0, 1, 1, 2]), **ages(20, 30, 40, 30)}
    same = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    assert Kernel(shape=shape, bandwidths={"sex": 0}).weights(labels).tolist() == same.tolist()
    mixed = Kernel(shape=shape, bandwidths={"age_years": 25.0, "sex": 0}).weights(labels)
    age = Kernel(shape=shape, bandwidths={"age_years": 25.0}).weights(labels)
    torch.testing.assert_close(mixed, age * same, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", sorted(set(FORMULAS) - {"gaussian"}))
def test_bandwidth_zero_is_the_limit_of_a_narrow_one(shape: str) -> None:
    labels = ages(20, 20, 21, 40)
    narrow = Kernel(shape=shape, bandwidths={"age_years": 1e-9}).weights(labels)
    torch.testing.assert_close(narrow, Kernel(shape=shape, bandwidths={"age_years": 0}).weights(labels), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", FORMULAS)
@pytest.mark.parametrize("zero", [0.0, 1e-3])
def test_an_unknown_label_is_like_no_other_and_never_age_zero(shape: str, zero: float) -> None:
    # A newborn at 0, an unknown, another unknown: NaN read as 0 would make the unknown the newborn's twin.
    kernel = Kernel(shape=shape, bandwidths={"age_years": 5.0})
    weights = kernel.weights(ages(zero, math.nan, math.nan))
    assert weights[0, 0] == pytest.approx(kernel.peak)
    assert weights.count_nonzero() == 1
    assert kernel.weights(ages(zero), ages(math.nan)).tolist() == [[0.0]]
    assert kernel.weights(ages(math.nan), ages(zero)).tolist() == [[0.0]]


def test_an_unknown_label_among_several_or_of_bandwidth_zero_leaves_no_weight() -> None:
    labels = {"sex": torch.tensor([0.0, math.nan, 0.0]), **ages(20, 20, math.nan)}
    assert Kernel(bandwidths={"age_years": 5.0, "sex": 0}).weights(labels).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert Kernel(bandwidths={"sex": 0}).weights(labels).tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_class_codes_too_large_for_float32_are_told_apart() -> None:
    # 2**24 + 1 is the first whole number that float32 does not hold; 2**53 + 1 the first that float64 does not.
    for codes in ([2**24, 2**24 + 1], [2**53, 2**53 + 1], [-(2**24) - 1, -(2**24)]):
        weights = Kernel(bandwidths={"scanner": 0}).weights({"scanner": torch.tensor(codes)})
        assert weights.tolist() == [[1, 0], [0, 1]]


def test_equal_distances_weigh_exactly_the_same() -> None:
    # Threshold compares weights: a tie must not depend on the side or the place.
    labels = {"age_years": torch.tensor([10.0, 20, 30, 40, 50], dtype=torch.float64), "sex": torch.tensor([0, 1, 0, 1, 0])}
    for shape in FORMULAS:
        weights = Kernel(shape=shape, bandwidths={"age_years": 17.0}).weights(labels)
        for offset in range(5):
            assert len(set(weights.diagonal(offset).tolist() + weights.diagonal(-offset).tolist())) == 1
    both = Kernel(bandwidths={"age_years": 17.0, "sex": 0}).weights(labels)
    assert both[0, 2] == both[2, 0] == both[2, 4] == both[1, 3]


def test_whole_numbers_are_labels_too() -> None:
    expected = Kernel().weights(ages(20, 25, 30))
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32):
        weights = Kernel().weights({"age_years": torch.tensor([20, 25, 30], dtype=dtype)})
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
    assert Kernel(bandwidths={"sex": 0}).weights({"sex": torch.tensor([True, False])}).tolist() == [[1, 0], [0, 1]]


def test_no_gradient_flows_to_a_label() -> None:
    assert not Kernel().weights({"age_years": AGES.clone().requires_grad_()}).requires_grad


def test_a_label_without_bandwidth_is_left_out() -> None:
    kernel = Kernel(bandwidths={"age_years": 5.0, "sex": None})
    assert kernel.labels == ("age_years",)
    assert torch.equal(kernel.weights(ages(20, 25)), Kernel().weights(ages(20, 25)))


@pytest.mark.parametrize("shape", ["rbf", "gaussian"])
def test_pair_weights_of_views(shape: str) -> None:
    # Two views of a scan weigh the peak, labelled or not; a row is no pair of itself.
    kernel = Kernel(shape=shape, bandwidths={"age_years": 10.0})
    z = torch.eye(3, dtype=torch.float64)
    weights = EmbeddedViews((z, z), ages(20, 30, math.nan)).pair_weights(kernel)
    near = kernel.peak * math.exp(-0.5)
    block = [[kernel.peak, near, 0], [near, kernel.peak, 0], [0, 0, kernel.peak]]
    expected = torch.tensor([row + row for row in block] * 2, dtype=torch.float64).fill_diagonal_(0.0)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_pair_weights_of_views_with_labels_of_their_own() -> None:
    # Scan 0 was seen at 20 and at 30 years, scan 1 at 20 twice.
    z = torch.eye(2, dtype=torch.float64)
    metadata = {"age_years": torch.tensor([[20.0, 20.0], [30.0, 20.0]], dtype=torch.float64)}
    near = math.exp(-0.5)
    expected = [[0, 1, 1, 1], [1, 0, near, 1], [1, near, 0, near], [1, 1, near, 0]]
    weights = EmbeddedViews((z, z), metadata).pair_weights(Kernel(bandwidths={"age_years": 10.0}))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "square"}, "kernel: shape must be one of .*'rbf'.*, got 'square'"),
        ({"bandwidths": {}}, "kernel: bandwidths must name at least one label, got {}"),
        ({"bandwidths": {"sex": None}}, "kernel: bandwidths must name at least one label, got {'sex': None}"),
        ({"bandwidths": {"age_years": -1.0}}, "the bandwidth of age_years must be 0 or positive and finite, got -1.0"),
        ({"bandwidths": {"age_years": math.nan}}, "the bandwidth of age_years must be 0 or positive and finite, got nan"),
        ({"bandwidths": {"age_years": math.inf}}, "the bandwidth of age_years must be 0 or positive and finite, got inf"),
        ({"shape": "gaussian", "bandwidths": {"sex": 0}}, "the bandwidth of sex must be positive with shape gaussian"),
    ],
)
def test_bad_kernels_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kernel(**options)
