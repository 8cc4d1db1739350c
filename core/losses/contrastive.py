"""Objectives on two views of each scan.

Shape legend: N scans, R = 2 N rows (first views, then second views), D embedding size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from core.losses.kernels import check_positive


def two_views(z1_ND: Tensor, z2_ND: Tensor) -> Tensor:
    """Stack two views to (R, D) rows of unit length; a zero row stays zero and its gradient finite."""
    if z1_ND.shape != z2_ND.shape or z1_ND.ndim != 2:
        raise ValueError(
            f"loss: z1 and z2 must be matrices of the same shape (scans, features), "
            f"got {tuple(z1_ND.shape)} and {tuple(z2_ND.shape)}."
        )
    return torch.nn.functional.normalize(torch.cat([z1_ND, z2_ND]), dim=1)


def log_softmax_others(z_RD: Tensor, temperature: float) -> Tensor:
    """Log-probability, (R, R), of picking row k for anchor i among all rows but i; the diagonal is 0."""
    logits_RR = z_RD @ z_RD.T / temperature
    itself_RR = torch.eye(len(z_RD), dtype=torch.bool, device=z_RD.device)
    return torch.log_softmax(logits_RR.masked_fill(itself_RR, float("-inf")), dim=1).masked_fill(itself_RR, 0.0)


def own_view(num_scans: int, device: torch.device) -> Tensor:
    """(R, R) mask of the pairs that are two views of one scan."""
    return torch.eye(num_scans, dtype=torch.bool, device=device).repeat(2, 2).fill_diagonal_(False)


@dataclass(frozen=True, kw_only=True)
class NTXent:
    """Normalised temperature-scaled cross-entropy: find the other view of a scan among all rows.

    -mean_i [ l_ii' - log sum_{a != i} exp(l_ia) ], l = z.z' / temperature (SimCLR, Chen et al. 2020, eq. 1).
    Equal to y-aware InfoNCE when every label is unknown.

    >>> z = torch.eye(4)
    >>> round(float(NTXent(temperature=1.0)(z[:2], z[:2], {})), 4)  # -[1 - log(e + 2)]
    0.5514
    """

    temperature: float = 0.1
    couples_scans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("objective ntxent", temperature=self.temperature)

    def __call__(self, z1_ND: Tensor, z2_ND: Tensor, metadata: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """Loss of two views, (N, D) each; the metadata plays no part."""
        log_probability_RR = log_softmax_others(two_views(z1_ND, z2_ND), self.temperature)
        return -log_probability_RR[own_view(len(z1_ND), z1_ND.device)].mean()
