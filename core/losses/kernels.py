"""How alike two target labels are."""

import torch
from torch import Tensor


def rbf(labels_N: Tensor, other_M: Tensor, bandwidth: float) -> Tensor:
    """Weights exp(-d^2 / (2 bandwidth^2)), (N, M), of the label differences; an unknown label (NaN) is like no other: 0.

    Args:
        labels_N: (N,) labels, e.g. ages in years.
        other_M: (M,) labels in the same unit.
        bandwidth: positive, in the label's unit.
    """
    difference_NM = labels_N[:, None] - other_M[None, :]
    return torch.exp(-0.5 * (difference_NM / bandwidth) ** 2).nan_to_num(nan=0.0)


def check_positive(where: str, **values: float) -> None:
    """Refuse hyper-parameters that are not finite and positive."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{where}: {name} must be positive and finite, got {value!r}.")
