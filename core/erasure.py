"""Erasure of site and scanner behind the encoder, from the means that sites may send; what age explains stays.

A linear probe cannot tell classes whose means are equal (Belrose et al. 2023, arXiv 2306.03819, theorem 3.1). The means of the
scanners at equal age are made equal by projecting out the directions in which they differ: one affine map behind the encoder,
which needs no site label when it is used. Only group means are exchanged, no covariance.

Shape legend: N scans, D features, G groups (one scanner, neighbouring ages), S scanners, K directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from core.moments import MomentPolicy, Reference, groups_of

AGE_CENTRE_YEARS, AGE_UNIT_YEARS = 50.0, 20.0


@dataclass(frozen=True)
class GroupMeans:
    """Means of the standardised features of a site's groups.

    Attributes:
        label_G: mean age of each group in years.
        count_G: subjects in each, rounded by the site.
        scanner_G: code of the scanner, unique inside the site.
        mean_GD: mean of the standardised features.
    """

    label_G: Tensor
    count_G: Tensor
    scanner_G: Tensor
    mean_GD: Tensor

    def __post_init__(self) -> None:
        if self.mean_GD.ndim != 2 or any(
            value.shape != self.mean_GD.shape[:1] for value in (self.label_G, self.count_G, self.scanner_G)
        ):
            raise ValueError(f"group means: one label, count and scanner a group is needed, got {tuple(self.mean_GD.shape)}.")
        if not all(getattr(self, field.name).isfinite().all() for field in fields(self)) or (self.count_G <= 0).any():
            raise ValueError("group means: values must be finite and counts positive. Ask the site for its log.")


@dataclass(frozen=True)
class Eraser:
    """Affine map h -> h that removes K directions of the standardised features.

    Attributes:
        mean_D: mean of the features.
        scale_D: their standard deviation.
        directions_KD: orthonormal rows.
    """

    mean_D: Tensor
    scale_D: Tensor
    directions_KD: Tensor

    def __call__(self, features_ND: Tensor) -> Tensor:
        """The features without the directions, (N, D), in their own units."""
        standard_ND = (features_ND - self.mean_D.to(features_ND)) / self.scale_D.to(features_ND)
        directions_KD = self.directions_KD.to(features_ND)
        return features_ND - (standard_ND @ directions_KD.T @ directions_KD) * self.scale_D.to(features_ND)


def group_means(
    features_ND: Tensor, age_N: Tensor, scanner_N: Tensor, *, reference: Reference, bin_years: float, policy: MomentPolicy
) -> GroupMeans:
    """What a site sends: means of its standardised features by scanner and age, for groups that its policy lets out.

    Args:
        features_ND: (N, D) features, one row a subject.
        age_N: (N,) years, NaN where unknown.
        scanner_N: (N,) integer code of the scanner.
        reference: what features are standardised by.
        bin_years: width of the public age cells that groups are joined from.
        policy: what the site lets out.
    """
    standard_ND = (features_ND - reference.mean_D.to(features_ND)) / reference.scale_D.to(features_ND)
    groups = groups_of(age_N, scanner_N, bin_years=bin_years, policy=policy)
    return GroupMeans(
        standard_ND.new_tensor([float(age_N[group].mean()) for group in groups]),
        standard_ND.new_tensor([float(policy.rounded(len(group))) for group in groups]),
        standard_ND.new_tensor([float(scanner_N[group[0]]) for group in groups]),
        torch.stack([standard_ND[group].mean(dim=0) for group in groups]) if groups else standard_ND[:0],
    )


def fit_eraser(parts: Sequence[GroupMeans], reference: Reference) -> Eraser | None:
    """The eraser of the scanners' mean differences at equal age, from the group means of every site.

    The means are regressed on scanner and a polynomial of age (of degree 2, or less where no scanner has three age groups),
    weighted by the counts; the scanners' coefficients about their mean span what is erased. None when there are fewer than two
    scanners, or when no scanner has two age groups: age and scanner could not be told apart, and age would be erased too.
    """
    if not parts:
        return None
    scanner_G, first = [], 0
    for part in parts:
        codes, inverse_G = torch.unique(part.scanner_G, return_inverse=True)
        scanner_G.append(inverse_G + first)
        first += len(codes)
    code_G = torch.cat(scanner_G)
    mean_GD = torch.cat([part.mean_GD for part in parts]).double()
    count_G = torch.cat([part.count_G for part in parts]).double()
    age_G = (torch.cat([part.label_G for part in parts]).double() - AGE_CENTRE_YEARS) / AGE_UNIT_YEARS
    degree = min(2, int(code_G.bincount().max()) - 1)
    if first < 2 or degree < 1:
        return None
    one_hot_GS = torch.nn.functional.one_hot(code_G, first).double()
    design = torch.cat([one_hot_GS, torch.stack([age_G**power for power in range(1, degree + 1)], dim=1)], dim=1)
    weight_G1 = count_G.sqrt()[:, None]
    coefficients = torch.linalg.lstsq(design * weight_G1, mean_GD * weight_G1, driver="gelsd").solution
    offset_SD = coefficients[:first]
    offset_SD = offset_SD - (one_hot_GS.T @ count_G / count_G.sum()) @ offset_SD
    _, _, directions_KD = torch.linalg.svd(offset_SD, full_matrices=False)
    return Eraser(reference.mean_D, reference.scale_D, directions_KD[: first - 1])
