"""Erasure of site and scanner before or behind the encoder, from sums; what age, sex and diagnosis explain stays.

A linear probe cannot tell classes whose means are equal (Belrose et al. 2023, arXiv 2306.03819, theorem 3.1). The means of the
scanners at equal covariates are made equal by projecting out the directions in which they differ: one affine map, which needs no
site label when it is used. The offsets of the scanners are those of the least-squares regression of the features on scanner and
covariates over all subjects of all sites, exactly, because its normal equations are sums (Frisch and Waugh 1933). No covariance
of the features is exchanged.

Shape legend: N subjects, F features, P covariates, S scanners, K directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.moments import Reference
from core.settings import MomentPolicy

AGE_CENTRE_YEARS, AGE_UNIT_YEARS = 50.0, 20.0
FEATURES_A_DIRECTION = 20
FLOOR_TOLERANCE = 1.1


def covariates(age_N: Tensor, sex_N: Tensor, patient_N: Tensor, *, age_degree: int = 1) -> Tensor:
    """What is held fixed when scanners are compared, (N, P) float64: sex, diagnosis, and powers of age in public units.

    Args:
        age_N: years, NaN where unknown: such a row is NaN.
        sex_N: 0 for F, 1 for M, NaN where unknown, which counts as halfway.
        patient_N: 1 for patients, 0 for controls.
        age_degree: highest power of age. One more needs more subjects at a site before it tells its slopes.
    """
    age_N = (age_N.double() - AGE_CENTRE_YEARS) / AGE_UNIT_YEARS
    powers = [age_N**power for power in range(1, age_degree + 1)]
    return torch.stack([sex_N.double().nan_to_num(0.5), patient_N.double(), *powers], dim=1)


@dataclass(frozen=True)
class ScannerSums:
    """What a site tells of its scanners' standardised features, beside covariates.

    Attributes:
        count_S: subjects of each scanner, rounded by the site.
        mean_SF: mean features of each.
        covariate_SP: mean covariates of each.
        gram_PP: sum over the site's subjects of c c' with c the covariates about their scanner's mean; NaN where withheld.
        cross_PF: the same sum of c x' with x the features about their scanner's mean; NaN where withheld.
    """

    count_S: Tensor
    mean_SF: Tensor
    covariate_SP: Tensor
    gram_PP: Tensor
    cross_PF: Tensor

    def __post_init__(self) -> None:
        scanners, features = self.mean_SF.shape
        num_covariates = self.covariate_SP.shape[-1]
        shapes = {
            "count_S": (scanners,),
            "covariate_SP": (scanners, num_covariates),
            "gram_PP": (num_covariates, num_covariates),
            "cross_PF": (num_covariates, features),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"scanner sums: {name} must have shape {shape}, got {tuple(getattr(self, name).shape)}.")
        if not (self.mean_SF.isfinite().all() and self.covariate_SP.isfinite().all() and (self.count_S > 0).all()):
            raise ValueError("scanner sums: means must be finite and counts positive. Ask the site for its log.")
        if self.gram_PP.isinf().any() or self.cross_PF.isinf().any():
            raise ValueError("scanner sums: products must be finite, or NaN where withheld. Ask the site for its log.")

    @property
    def num_features(self) -> int:
        """F."""
        return self.mean_SF.shape[1]

    @property
    def tells_slopes(self) -> bool:
        """Whether the site tells how its features change with the covariates."""
        return not bool(self.gram_PP.isnan().any() or self.cross_PF.isnan().any())


@dataclass(frozen=True)
class Eraser:
    """Affine map that removes K directions of the standardised features.

    Attributes:
        mean_F: mean of the features.
        scale_F: their standard deviation.
        directions_KF: orthonormal rows.
    """

    mean_F: Tensor
    scale_F: Tensor
    directions_KF: Tensor

    @property
    def takes_little(self) -> bool:
        """Whether the directions are so few of the features that what they hold of anatomy by chance does not count."""
        return FEATURES_A_DIRECTION * len(self.directions_KF) <= len(self.mean_F)

    def __call__(self, features_NF: Tensor) -> Tensor:
        """The features without the directions, (N, F), in their own units."""
        standard_NF = (features_NF - self.mean_F.to(features_NF)) / self.scale_F.to(features_NF)
        directions_KF = self.directions_KF.to(features_NF)
        return features_NF - (standard_NF @ directions_KF.T @ directions_KF) * self.scale_F.to(features_NF)


def scanner_sums(
    standard_NF: Tensor, covariates_NP: Tensor, scanner_N: Tensor, *, policy: MomentPolicy
) -> tuple[ScannerSums, int]:
    """What a site sends, and the number of subjects withheld: of scanners below the policy's floor, or of unknown age.

    How features change with the covariates is told by a site with ``policy.min_group`` subjects for each vector of features
    that leaves it, a mean a scanner and one a covariate that varies there: so a subject weighs in these sums, on average, no
    more than in the mean of a group of ``min_group``.

    Args:
        standard_NF: standardised features, one row a subject.
        covariates_NP: of `covariates`.
        scanner_N: integer code of the scanner.
        policy: what the site lets out.
    """
    told = told_scanners(covariates_NP, scanner_N, policy)
    x_NF, c_NP = standard_NF.double(), covariates_NP.double()
    num_features, num_covariates = x_NF.shape[1], c_NP.shape[1]
    cross_PF = torch.full((num_covariates, num_features), torch.nan, dtype=torch.float64)
    gram_PP = torch.full((num_covariates, num_covariates), torch.nan, dtype=torch.float64)
    num_told = sum(map(len, told))
    if told:
        x_nF = torch.cat([x_NF[members] - x_NF[members].mean(dim=0) for members in told])
        c_nP = torch.cat([c_NP[members] - c_NP[members].mean(dim=0) for members in told])
        # A least-squares fit weighs each subject by its leverage, which averages (fitted numbers) / (subjects).
        vectors = len(told) + int((c_nP.abs().amax(dim=0) > 1e-9).sum())
        if num_told >= policy.min_group * vectors:
            gram_PP, cross_PF = c_nP.T @ c_nP, c_nP.T @ x_nF
    sums = ScannerSums(
        torch.tensor([float(policy.rounded(len(members))) for members in told], dtype=torch.float64),
        torch.stack([x_NF[members].mean(dim=0) for members in told]) if told else x_NF[:0],
        torch.stack([c_NP[members].mean(dim=0) for members in told]) if told else c_NP[:0],
        gram_PP,
        cross_PF,
    )
    return sums, len(x_NF) - num_told


def scanner_offsets(parts: Sequence[ScannerSums]) -> tuple[Tensor, Tensor] | None:
    """Offset of every scanner's features at equal covariates about their mean (S, F), and counts (S,).

    Equal to the coefficients of the pooled least-squares regression on scanner and covariates when every site tells all. None
    when no site tells slopes, or there are fewer than two scanners: covariates and scanner could not be told apart.
    """
    slopes = [part for part in parts if part.tells_slopes]
    count_S = torch.cat([part.count_S for part in parts]).double() if parts else torch.zeros(0)
    if len(count_S) < 2 or not slopes:
        return None
    gram_PP = torch.stack([part.gram_PP.double() for part in slopes]).sum(dim=0)
    cross_PF = torch.stack([part.cross_PF.double() for part in slopes]).sum(dim=0)
    # The pseudo-inverse leaves a covariate that never varies without effect.
    slope_PF = torch.linalg.pinv(gram_PP, rtol=1e-9, hermitian=True) @ cross_PF
    mean_SF = torch.cat([part.mean_SF for part in parts]).double()
    covariate_SP = torch.cat([part.covariate_SP for part in parts]).double()
    offset_SF = mean_SF - covariate_SP @ slope_PF
    return offset_SF - (count_S @ offset_SF) / count_S.sum(), count_S


def told_scanners(covariates_NP: Tensor, scanner_N: Tensor, policy: MomentPolicy) -> list[Tensor]:
    """Indices of the subjects of known covariates of each scanner that is told, in the order of the scanners' codes."""
    known_N = ~covariates_NP.isnan().any(dim=1)
    members = [(known_N & (scanner_N == code)).nonzero().squeeze(1) for code in torch.unique(scanner_N)]
    return [index for index in members if len(index) >= policy.min_group]


def nearest_mean_hits(
    standard_NF: Tensor, told: Sequence[Tensor], mean_SF: Tensor, directions_KF: Tensor, *, first: int, policy: MomentPolicy
) -> Tensor:
    """How many subjects of each of a site's told scanners are nearest to their own scanner's mean, (scanners, K + 1) float64.

    Column k is after the first k directions are erased. A subject takes no part in the mean of its own scanner. Rounded as
    the policy rounds counts; none may be 0.

    Args:
        standard_NF: standardised features.
        told: of `told_scanners`.
        mean_SF: means of all scanners of all sites.
        directions_KF: orthonormal rows, in the order in which they are erased.
        first: row of the site's first told scanner in ``mean_SF``; its others follow.
        policy: what the site lets out.
    """
    hits = torch.zeros(len(told), len(directions_KF) + 1, dtype=torch.float64)
    mean_SF, directions_KF = mean_SF.double(), directions_KF.double()
    for row, members in enumerate(told):
        x_nF = standard_NF[members].double()
        own_nF = (len(members) * x_nF.mean(dim=0) - x_nF) / max(1, len(members) - 1)
        difference_nSF = x_nF[:, None] - mean_SF
        difference_nSF[:, first + row] = x_nF - own_nF
        distance_nS = difference_nSF.square().sum(dim=2)
        along_nSK = difference_nSF @ directions_KF.T
        for erased in range(len(directions_KF) + 1):
            left_nS = distance_nS - along_nSK[:, :, :erased].square().sum(dim=2)
            hits[row, erased] = float((left_nS.argmin(dim=1) == first + row).sum())
    return (hits / policy.round_counts_to).round() * policy.round_counts_to


def fewest_directions(hits_SK: Tensor, count_S: Tensor, target: float | None = None) -> tuple[int, Tensor]:
    """How many directions to erase until the nearest-mean probe's balanced accuracy is at most a target, and its course (K + 1,).

    All of them when even that does not reach it. A direction more than needed takes what it holds of anatomy for no gain.

    Args:
        hits_SK: of `nearest_mean_hits`, one row a scanner of any site.
        count_S: subjects of each.
        target: balanced accuracy, the mean over scanners; None: the floor, within a tenth of what is left when all directions
            are erased, or chance where that is more.
    """
    accuracy_K = (hits_SK / count_S[:, None]).clamp_max(1.0).mean(dim=0)
    if target is None:
        target = max(1 / len(count_S), FLOOR_TOLERANCE * float(accuracy_K[-1]))
    reached = (accuracy_K <= target).nonzero().flatten()
    return int(reached[0]) if len(reached) else len(accuracy_K) - 1, accuracy_K


def fit_eraser(parts: Sequence[ScannerSums], reference: Reference, *, max_directions: int | None = None) -> Eraser | None:
    """The eraser of the scanners' offsets at equal covariates, from the sums of every site.

    Args:
        parts: of every site that tells any.
        reference: what the features were standardised by.
        max_directions: erase the so many directions that hold most of the variance between scanners; None erases all, after
            which the means of all told scanners are equal at equal covariates.

    Returns:
        None where `scanner_offsets` is.
    """
    found = scanner_offsets(parts)
    if found is None:
        return None
    offset_SF, count_S = found
    _, size_K, directions_KF = torch.linalg.svd(offset_SF * count_S.sqrt()[:, None], full_matrices=False)
    rank = int((size_K > 1e-9 * count_S.sum().sqrt()).sum())  # standardised features: a difference of 1 is a large one
    keep = min(rank, len(offset_SF) - 1, *([] if max_directions is None else [max_directions]))
    return Eraser(reference.mean_D, reference.scale_D, directions_KF[:keep])
