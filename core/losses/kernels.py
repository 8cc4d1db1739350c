"""How alike two scans' labels are: what weights pairs in every weakly supervised loss.

Shape legend: R rows, M other rows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

# Of a difference of labels and a bandwidth; each is 1 at 0. They work in place: the difference is theirs.
SHAPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "rbf": lambda d, bandwidth: d.square_().mul_(-0.5 / bandwidth**2).exp_(),
    "gaussian": lambda d, bandwidth: d.square_().mul_(-0.5 / bandwidth**2).exp_(),
    "cauchy": lambda d, bandwidth: d.div_(bandwidth).square_().add_(1.0).reciprocal_(),
    "epanechnikov": lambda d, bandwidth: d.div_(bandwidth).square_().neg_().add_(1.0).clamp_min_(0.0),
    "exponential": lambda d, bandwidth: d.abs_().mul_(-1.0 / bandwidth).exp_(),
    "linear": lambda d, bandwidth: d.abs_().mul_(-1.0 / bandwidth).add_(1.0).clamp_min_(0.0),
    "cosine": lambda d, bandwidth: d.div_(bandwidth).clamp_(-1.0, 1.0).mul_(math.pi / 2).cos_(),
}
Shape = Literal["rbf", "gaussian", "cauchy", "epanechnikov", "exponential", "linear", "cosine"]
AGE = MappingProxyType({"age_years": 5.0})


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Weight w(y, y') of a pair of scans, 1 for equal labels and less the further they are apart; several labels multiply.

    With d = |y - y'| / bandwidth, label by label: ``rbf`` exp(-d^2 / 2), ``cauchy`` 1 / (1 + d^2), ``epanechnikov``
    (1 - d^2)+, ``exponential`` exp(-d), ``linear`` (1 - d)+, ``cosine`` cos(pi d / 2)+; ``gaussian`` is ``rbf`` divided by
    sqrt(2 pi) bandwidth, the density that the code of Barbano et al. (ISBI 2023) offers, so that its weights do not reach 1.
    A bandwidth of 0 asks for equal labels, the limit of every shape: so sex, or a class, is a label like age.
    A scan with an unknown (NaN) label is like no other scan: its weights are 0, never those of age 0.

    Attributes:
        shape: of the weight over distance.
        bandwidths: for each label its bandwidth, in the label's unit; None leaves the label out.

    >>> Kernel(bandwidths={"age_years": 10.0}).weights({"age_years": torch.tensor([20.0, 30.0, torch.nan])})
    tensor([[1.0000, 0.6065, 0.0000],
            [0.6065, 1.0000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    >>> same_sex = Kernel(shape="linear", bandwidths={"age_years": 20.0, "sex": 0})
    >>> same_sex.weights({"age_years": torch.tensor([20.0, 30.0, 30.0]), "sex": torch.tensor([0, 0, 1])})
    tensor([[1.0000, 0.5000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """

    shape: Shape = "rbf"
    bandwidths: Mapping[str, float | None] = field(default_factory=lambda: dict(AGE))

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"kernel: shape must be one of {sorted(SHAPES)}, got {self.shape!r}.")
        if not self.labels:
            raise ValueError(f"kernel: bandwidths must name at least one label, got {dict(self.bandwidths)!r}.")
        for label in self.labels:
            bandwidth = self.bandwidths[label]
            assert bandwidth is not None
            if not 0 <= bandwidth < math.inf:
                raise ValueError(f"kernel: the bandwidth of {label} must be 0 or positive and finite, got {bandwidth!r}.")
            if bandwidth == 0 and self.shape == "gaussian":
                raise ValueError(f"kernel: the bandwidth of {label} must be positive with shape gaussian, a density, got 0.")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that count."""
        return tuple(label for label, bandwidth in self.bandwidths.items() if bandwidth is not None)

    @property
    def peak(self) -> float:
        """The weight of two scans whose labels are equal."""
        if self.shape != "gaussian":
            return 1.0
        return 1.0 / math.prod(math.sqrt(2 * math.pi) * (self.bandwidths[label] or 1.0) for label in self.labels)

    @torch.no_grad()
    def weights(self, labels: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weights (R, M) between rows and other rows, between the rows themselves without these; 0 where a label is unknown.

        Args:
            labels: for each label its values, (R,), floating-point (NaN: unknown) or whole numbers.
            others: the same for the other rows, (M,).
        """
        product: Tensor | None = None
        for label in self.labels:
            bandwidth = self.bandwidths[label]
            one_R, other_M = (values[label] for values in (labels, others or labels))
            if bandwidth:
                one_R, other_M = _floating(one_R), _floating(other_M)
                weight = SHAPES[self.shape](one_R[:, None] - other_M[None, :], bandwidth)
                if one_R.isnan().any() or other_M.isnan().any():
                    weight.nan_to_num_(nan=0.0)
            else:
                weight = (one_R[:, None] == other_M[None, :]).to(_floating(one_R).dtype)
            product = weight if product is None else product.mul_(weight)
        assert product is not None
        return product if self.peak == 1.0 else product.mul_(self.peak)


def _floating(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.float()


def check_positive(where: str, **values: float) -> None:
    """Refuse hyper-parameters that are not finite and positive."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{where}: {name} must be positive and finite, got {value!r}.")


def check_at_least_zero(where: str, **values: float) -> None:
    """Refuse hyper-parameters that are not finite or negative."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{where}: {name} must be 0 or positive and finite, got {value!r}.")
