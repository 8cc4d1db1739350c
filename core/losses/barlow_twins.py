"""Objectives that make the features of two views the same and different features different.

Shape legend: N scans, D embedding size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.losses.embedded import EmbeddedViews, Objective
from core.losses.kernels import check_at_least_zero


@dataclass(frozen=True, kw_only=True)
class BarlowTwins(Objective):
    """Barlow Twins: the correlations over the batch of the features of two views form an identity matrix.

    sum_d (1 - C_dd)^2 + redundancy_weight sum_{d != e} C_de^2, C_de the correlation of feature d of the first views with feature
    e of the second (Zbontar et al., ICML 2021, eq. 1). Features are standardised with the batch's variance plus
    ``variance_epsilon``: 1e-5 as the authors' BatchNorm does, 0 for correlations to the letter. A feature that does not vary
    correlates with none. Embeddings are taken as they are, not at unit length. Two views only.

    >>> z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double()
    >>> float(BarlowTwins(variance_epsilon=0.0)(z, z))  # two features, uncorrelated
    0.0
    """

    redundancy_weight: float = 0.0051
    variance_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_at_least_zero(
            "objective barlow_twins", redundancy_weight=self.redundancy_weight, variance_epsilon=self.variance_epsilon
        )

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of two views."""
        if views.num_views != 2:
            raise ValueError(f"objective barlow_twins: there must be two views, got {views.num_views}.")
        one_ND, two_ND = (standardised(view_ND, self.variance_epsilon) for view_ND in views.views)
        correlation_DD = one_ND.T @ two_ND / views.num_scans
        with torch.no_grad():
            identity_DD = torch.eye(len(correlation_DD), dtype=correlation_DD.dtype, device=correlation_DD.device)
            weights_DD = torch.full_like(correlation_DD, self.redundancy_weight).fill_diagonal_(1.0)
        return (weights_DD * (correlation_DD - identity_DD).square()).sum()


def standardised(values_ND: Tensor, variance_epsilon: float) -> Tensor:
    """Features of mean 0 and variance 1 over the batch; 0, with a gradient of 0, where a feature does not vary."""
    if variance_epsilon:
        return torch.batch_norm(values_ND, None, None, None, None, True, 0.0, variance_epsilon, False)
    centred_ND = values_ND - values_ND.mean(dim=0)
    variance_D = centred_ND.square().mean(dim=0) + variance_epsilon
    alive_D = variance_D > 0
    return torch.where(alive_D, centred_ND / torch.where(alive_D, variance_D, 1.0).sqrt(), 0.0)
