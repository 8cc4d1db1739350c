"""What an encoder of rows begins with, from sums over all sites: mean, standard deviation, directions of site and scanner.

Shape legend: N subjects, I features, S sites.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.erasure import Eraser
from core.models import CONSTANTS
from core.moments import Reference, feature_sums, reference_from
from core.settings import MomentPolicy


def input_sums(rows_NI: Tensor, policy: MomentPolicy) -> Tensor:
    """Count, sum and sum of squares of every feature over the subjects that have it, (3, I) float64, one row a subject.

    The policy holds for each feature: NaN where fewer subjects than it asks for have the feature.
    """
    sums_3I = torch.full((3, rows_NI.shape[1]), torch.nan, dtype=torch.float64)
    known_NI = ~rows_NI.isnan()
    complete_I = known_NI.all(dim=0)
    if len(rows_NI) and complete_I.any():
        sums_3I[:, complete_I] = feature_sums(rows_NI[:, complete_I], policy)
    for feature in (~complete_I & known_NI.any(dim=0)).nonzero().flatten().tolist():
        sums_3I[:, [feature]] = feature_sums(rows_NI[known_NI[:, feature]][:, [feature]], policy)
    return sums_3I


def without_rare_values(rows_NI: Tensor, scanner_N: Tensor, policy: MomentPolicy) -> Tensor:
    """The rows with NaN for each feature that fewer than ``policy.min_group`` subjects of a scanner have, at that scanner.

    A scanner's mean of what is missing for nearly all would be the value of the few who have it.

    Args:
        rows_NI: one row a subject that is told, NaN where a value is missing.
        scanner_N: integer code of each row's scanner.
        policy: what the site lets out.
    """
    rows_NI = rows_NI.clone()
    for code in torch.unique(scanner_N):
        members_N = scanner_N == code
        rare_I = (~rows_NI[members_N].isnan()).sum(dim=0) < policy.min_group
        rows_NI[members_N[:, None] & rare_I] = torch.nan
    return rows_NI


def standardisation_from(sums: Sequence[Tensor]) -> Reference:
    """Mean and standard deviation of every feature from the `input_sums` of the sites; 1 for a feature that never varies.

    Raises:
        ValueError: a feature whose sum of squares no site tells: its values would enter the encoder in their own unit.
    """
    sums_S3I = torch.stack(list(sums))
    untold = sums_S3I[:, 2].isnan().all(dim=0).nonzero().flatten().tolist()
    if untold:
        raise ValueError(
            f"standardisation: at least one site must tell the sum of squares of each feature, got none for {len(untold)} of "
            f"{sums_S3I.shape[2]}, the first is number {untold[0] + 1} by name. Fewer healthy training subjects have these than "
            "diagonal-subjects of every site, or policy.diagonal_subjects of the run, asks for: lower both where the sites "
            "allow it, or leave the features out with data.columns.ignore."
        )
    parts = [reference_from(list(sums_S3I[:, :, [feature]])) for feature in range(sums_S3I.shape[2])]
    told = [part for part in parts if part is not None]
    return Reference(torch.cat([part.mean_D for part in told]), torch.cat([part.scale_D for part in told]))


def standardising(reference: Reference, eraser: Eraser | None = None, left: Reference | None = None) -> dict[str, Tensor]:
    """The constants that an encoder of rows begins with, float32, by their names in the model.

    Args:
        reference: mean and standard deviation of each feature, I of them.
        eraser: of site and scanner, fitted to the standardised features; None erases nothing.
        left: standard deviation of what the eraser leaves; None: 1.
    """
    parts = {
        "mean": reference.mean_D,
        "scale": reference.scale_D,
        "directions": reference.mean_D.new_zeros(0, len(reference.mean_D)) if eraser is None else eraser.directions_KF,
        "erased_scale": torch.ones_like(reference.scale_D) if left is None else left.scale_D,
    }
    return {f"{CONSTANTS}{name}": value.float() for name, value in parts.items()}
