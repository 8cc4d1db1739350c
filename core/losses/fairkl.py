"""FairKL: similarities must not tell whether two scans share a bias attribute.

Shape legend: R rows, D embedding size, G remote groups.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from core.losses.kernels import check_positive, rbf
from core.moments import GroupMoments


@dataclass(frozen=True, kw_only=True)
class FairKL:
    """Kullback-Leibler divergence between similarities of bias-aligned and of bias-conflicting pairs, for a continuous label.

    For every anchor and each sign (positives weighted w_ij, negatives 1 - w_ij, w the kernel of the age difference), the
    similarities to aligned rows ~ N(mu_a, v_a) and to conflicting rows ~ N(mu_c, v_c) give
    KL = 1/2 [ (v_a + (mu_a - mu_c)^2) / v_c - log(v_a / v_c) - 1 ] (Barbano et al., ICLR 2023, eq. 10; theirs is per batch).
    Two rows of one scan are no pair. Remote groups, known by their moments alone, join the conflicting side as constants;
    with a full batch and exact age bins that equals FairKL on the pooled embeddings.
    Where the variance of a remote group is withheld, the divergence is taken at one common variance, the mean of the anchors'
    v_a: (mu_a - mu_c)^2 / (2 v). Free of scale, it cannot be lowered by shrinking all similarities together; common, it is not
    ruled by the anchors whose few pairs happen to agree. An anchor counts only when both sides weigh at least ``min_weight``
    scans; without any, the loss is 0.

    >>> z, age = torch.eye(4)[:, :3].double(), torch.tensor([30.0, 30, 30, 30])
    >>> scan, one_scanner = torch.arange(4), torch.zeros(4)
    >>> float(FairKL()(z, age, one_scanner, scan))
    0.0
    """

    bandwidth_years: float = 5.0
    min_weight: float = 4.0
    variance_floor: float = 1e-2
    couples_scans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(
            "debias fairkl",
            bandwidth_years=self.bandwidth_years,
            min_weight=self.min_weight,
            variance_floor=self.variance_floor,
        )

    def __call__(
        self,
        z_RD: Tensor,
        age_R: Tensor,
        bias_R: Tensor,
        scan_R: Tensor,
        remote: GroupMoments | None = None,
        remote_scale: float = 1.0,
    ) -> Tensor:
        """The divergence, a scalar; mean over anchors, summed over positives and negatives.

        Args:
            z_RD: (R, D) unit-length rows.
            age_R: (R,) years; rows of unknown age (NaN) take no part.
            bias_R: (R,) code of the bias attribute, e.g. the scanner.
            scan_R: (R,) code of the scan a row shows.
            remote: moments of other sites' groups; every one conflicts with every row here.
            remote_scale: scans of the batch over scans of this site, so that groups weigh as they would in a pooled batch.
        """
        similarity_RR = z_RD @ z_RD.T
        known_R = ~age_R.isnan()
        other_RR = (scan_R[:, None] != scan_R[None, :]) & known_R[:, None] & known_R[None, :]
        aligned_RR = other_RR & (bias_R[:, None] == bias_R[None, :])
        conflicting_RR = other_RR & ~aligned_RR
        kernel_RR = rbf(age_R.to(z_RD), age_R.to(z_RD), self.bandwidth_years)

        if remote is not None and len(remote):
            remote = remote.to(z_RD)
            mean_RG, variance_RG = remote.similarity(z_RD)
            count_G = remote.count_G * remote_scale * (len(z_RD) / len(torch.unique(scan_R)))
            kernel_RG = rbf(age_R.to(z_RD), remote.label_G, self.bandwidth_years)
            exact = not variance_RG.isnan().any()
            second_RG = mean_RG.square() + (variance_RG if exact else 0.0)
            known_RG = known_R[:, None].to(z_RD)
        else:
            exact = True
            mean_RG = second_RG = kernel_RG = known_RG = z_RD.new_zeros(len(z_RD), 0)
            count_G = z_RD.new_zeros(0)

        total = z_RD.new_zeros(())
        for positive in (True, False):
            weight_RR = kernel_RR if positive else 1 - kernel_RR
            weight_RG = (kernel_RG if positive else 1 - kernel_RG) * count_G * known_RG
            a_RR, c_RR = weight_RR * aligned_RR, weight_RR * conflicting_RR
            size_a_R = a_RR.sum(dim=1)
            size_c_R = c_RR.sum(dim=1) + weight_RG.sum(dim=1)
            counts_R = (size_a_R >= self.min_weight) & (size_c_R >= self.min_weight)
            if not counts_R.any():
                continue
            size_a_R, size_c_R = size_a_R[counts_R], size_c_R[counts_R]
            s_RR = similarity_RR[counts_R]
            mu_a_R = (a_RR[counts_R] * s_RR).sum(dim=1) / size_a_R
            mu_c_R = ((c_RR[counts_R] * s_RR).sum(dim=1) + (weight_RG[counts_R] * mean_RG[counts_R]).sum(dim=1)) / size_c_R
            v_a_R = (a_RR[counts_R] * (s_RR - mu_a_R[:, None]).square()).sum(dim=1) / size_a_R + self.variance_floor
            if exact:
                second_c_R = (c_RR[counts_R] * s_RR.square()).sum(dim=1) + (weight_RG[counts_R] * second_RG[counts_R]).sum(dim=1)
                v_c_R = (second_c_R / size_c_R - mu_c_R.square()).clamp_min(0.0) + self.variance_floor
                divergence_R = 0.5 * ((v_a_R + (mu_a_R - mu_c_R).square()) / v_c_R - (v_a_R / v_c_R).log() - 1)
            else:
                divergence_R = 0.5 * (mu_a_R - mu_c_R).square() / v_a_R.mean()
            total = total + divergence_R.mean()
        return total
