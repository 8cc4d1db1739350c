"""Objectives weighted by a continuous label such as age.

Shape legend: N scans, R = 2 N rows (first views, then second views), D embedding size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from core.losses.contrastive import log_softmax_others, own_view, two_views
from core.losses.kernels import check_positive, rbf


@dataclass(frozen=True, kw_only=True)
class YAware:
    """y-aware InfoNCE: scans of similar age are positives, the more so the closer in age.

    -mean_i sum_{k != i} w_ik / (sum_{j != i} w_ij) log softmax_{a != i}(z_i.z_a / temperature)_k,
    w_ik = exp(-(age_i - age_k)^2 / (2 bandwidth^2)) (Dufumier et al., MICCAI 2021, eq. 2, rows normalised).
    A scan of unknown age is drawn to its own other view alone; bandwidth -> 0 gives NT-Xent.

    >>> z = torch.eye(4)
    >>> ages = {"age_years": torch.tensor([20.0, 80.0])}
    >>> round(float(YAware(temperature=1.0, bandwidth_years=1.0)(z[:2], z[:2], ages)), 4)
    0.5514
    """

    temperature: float = 0.1
    bandwidth_years: float = 5.0
    couples_scans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("objective yaware", temperature=self.temperature, bandwidth_years=self.bandwidth_years)

    def __call__(self, z1_ND: Tensor, z2_ND: Tensor, metadata: Mapping[str, Tensor]) -> Tensor:
        """Loss of two views, (N, D) each, with ``metadata["age_years"]`` (N,), NaN where unknown."""
        z_RD = two_views(z1_ND, z2_ND)
        age_R = metadata["age_years"].to(z_RD).repeat(2)
        weights_RR = torch.maximum(rbf(age_R, age_R, self.bandwidth_years), own_view(len(z1_ND), z_RD.device).to(z_RD))
        weights_RR.fill_diagonal_(0.0)
        weights_RR /= weights_RR.sum(dim=1, keepdim=True)
        return -(weights_RR * log_softmax_others(z_RD, self.temperature)).sum(dim=1).mean()
