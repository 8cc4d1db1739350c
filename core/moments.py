"""A site's embedding moments: what sites exchange so that each can compute FairKL against all the others.

For unit vectors the first two moments of the similarity between an anchor z and a remote group g need only that group's
mean m_g and covariance C_g: E[z.z'] = z.m_g and Var[z.z'] = z' C_g z. No embedding of a scan leaves its site.

Shape legend: N scans, D features, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MomentPolicy:
    """What a site lets out about a group; fewer subjects than this tell who is in it (membership inference).

    Attributes:
        min_group: smallest group whose mean may be sent.
        diagonal_subjects: smallest group whose variances may be sent.
        covariance_subjects_per_feature: a full covariance needs this many subjects for each feature.
        round_counts_to: counts are sent rounded to a multiple of this, at least one multiple.
    """

    min_group: int = 10
    diagonal_subjects: int = 60
    covariance_subjects_per_feature: int = 12
    round_counts_to: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "covariance_subjects_per_feature" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"site policy: {field.name} must be at least {least}, got {getattr(self, field.name)!r}.")

    def rounded(self, count: int) -> int:
        """A count as it may be sent."""
        return self.round_counts_to * max(1, round(count / self.round_counts_to))


@dataclass(frozen=True)
class GroupMoments:
    """Moments of unit-length embeddings of G groups (one scanner, neighbouring ages); never of a single scan.

    Attributes:
        label_G: mean target label (age in years) of each group.
        count_G: number of subjects in each group, rounded by the site that sends it.
        mean_GD: mean embedding.
        variance_GD: variance of each feature, NaN where the site withholds it.
        covariance_GDD: covariance, NaN where the site withholds it; (0, D, D) when every group's is withheld.
    """

    label_G: Tensor
    count_G: Tensor
    mean_GD: Tensor
    variance_GD: Tensor
    covariance_GDD: Tensor

    def __post_init__(self) -> None:
        groups, features = self.mean_GD.shape
        shapes = {
            "label_G": (groups,),
            "count_G": (groups,),
            "variance_GD": (groups, features),
            "covariance_GDD": (groups if len(self.covariance_GDD) else 0, features, features),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"moments: {name} must have shape {shape}, got {tuple(getattr(self, name).shape)}.")
        if not (self.label_G.isfinite().all() and self.mean_GD.isfinite().all() and (self.count_G > 0).all()):
            raise ValueError("moments: labels and means must be finite and counts positive. Ask the site for its log.")
        if not (self.mean_GD.norm(dim=1) <= 1 + 1e-3).all():
            raise ValueError("moments: means of unit vectors must lie in the unit ball. Ask the site for its log.")
        if self.variance_GD.isinf().any() or (self.variance_GD < 0).any() or self.covariance_GDD.isinf().any():
            raise ValueError("moments: variances must be finite and not negative. Ask the site for its log.")

    def __len__(self) -> int:
        return len(self.count_G)

    @property
    def num_features(self) -> int:
        """D."""
        return self.mean_GD.shape[1]

    def to(self, like: Tensor) -> "GroupMoments":
        """The same moments with the device and dtype of another tensor."""
        return GroupMoments(*(getattr(self, field.name).to(like) for field in fields(self)))

    def similarity(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, (N, G) each, of the similarity of every anchor to each group; variance NaN where withheld."""
        mean_NG = z_ND @ self.mean_GD.T
        variance_NG = z_ND.square() @ self.variance_GD.T
        if len(self.covariance_GDD):
            # NaN must not enter the product: its gradient would be NaN even where the result is not used.
            withheld_G = self.covariance_GDD.isnan().flatten(1).any(dim=1)
            known_GDD = self.covariance_GDD.masked_fill(withheld_G[:, None, None], 0.0)
            full_NG = torch.einsum("nd,gde,ne->ng", z_ND, known_GDD, z_ND)
            variance_NG = torch.where(withheld_G, variance_NG, full_NG)
        return mean_NG, variance_NG


@dataclass(frozen=True)
class Reference:
    """Mean and standard deviation of every feature over all sites, the same constants everywhere.

    Representations share a large common part, which would hide every difference between sites from their similarities;
    standardised by it they spread over the sphere, as a z-scored probe sees them.
    """

    mean_D: Tensor
    scale_D: Tensor

    def __post_init__(self) -> None:
        if self.mean_D.ndim != 1 or self.mean_D.shape != self.scale_D.shape:
            raise ValueError(
                f"reference: mean and scale must be vectors of one length, got {tuple(self.mean_D.shape)} and "
                f"{tuple(self.scale_D.shape)}."
            )
        if not (self.mean_D.isfinite().all() and self.scale_D.isfinite().all() and (self.scale_D > 0).all()):
            raise ValueError("reference: means must be finite and scales positive. Look at the sites' losses.")

    def standard(self, features_ND: Tensor) -> Tensor:
        """Standardised rows."""
        return (features_ND - self.mean_D.to(features_ND)) / self.scale_D.to(features_ND)

    def rows(self, features_ND: Tensor) -> Tensor:
        """Standardised rows of unit length."""
        return torch.nn.functional.normalize(self.standard(features_ND), dim=1)


def feature_sums(features_ND: Tensor, policy: MomentPolicy) -> Tensor:
    """Count, sum and sum of squares of every feature, (3, D) float64, one row a subject: what a site sends for the reference.

    All is NaN below ``policy.min_group`` subjects, the squares below ``policy.diagonal_subjects``.
    """
    features_ND = features_ND.double()
    count_D = torch.full_like(features_ND[0], len(features_ND))
    sums_3D = torch.stack([count_D, features_ND.sum(dim=0), features_ND.square().sum(dim=0)])
    if len(features_ND) < policy.diagonal_subjects:
        sums_3D[2] = torch.nan
    if len(features_ND) < policy.min_group:
        sums_3D[:] = torch.nan
    return sums_3D


def reference_from(sums: Sequence[Tensor]) -> Reference | None:
    """The reference over all sites from their `feature_sums`, None when every site withholds.

    The mean is over the sites that tell their sum, the variance about it over those that tell their squares; without any of
    these, and for a feature that never varies, the scale is 1.
    """
    sums_S3D = torch.stack(list(sums)).double()
    told_S3D = sums_S3D[~sums_S3D[:, 1].isnan().any(dim=1)]
    if not len(told_S3D):
        return None
    mean_D = told_S3D[:, 1].sum(dim=0) / told_S3D[:, 0].sum(dim=0)
    count_D, sum_D, square_D = told_S3D[~told_S3D[:, 2].isnan().any(dim=1)].sum(dim=0)
    variance_D = ((square_D - 2 * mean_D * sum_D) / count_D + mean_D.square()).nan_to_num(nan=1.0).clamp_min(0.0)
    return Reference(mean_D, torch.where(variance_D > 1e-12 * (1 + mean_D.square()), variance_D.sqrt(), 1.0))


def concatenate(parts: Sequence[GroupMoments]) -> GroupMoments:
    """All groups of several sites, in the order given."""
    if any(len(part.covariance_GDD) for part in parts):
        parts = [
            part
            if len(part.covariance_GDD)
            else GroupMoments(
                part.label_G,
                part.count_G,
                part.mean_GD,
                part.variance_GD,
                torch.full_like(part.variance_GD, torch.nan)[:, :, None].expand(-1, -1, part.mean_GD.shape[1]),
            )
            for part in parts
        ]
    return GroupMoments(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(GroupMoments)))


def age_groups(age_N: Tensor, *, bin_years: float, min_group: int) -> list[Tensor]:
    """Indices of the scans of each age group: unions of neighbouring public cells [k b, (k + 1) b) with ``min_group`` scans.

    Cells are joined from the youngest up until they hold enough; what is left at the old end joins the last group. Fewer
    than ``min_group`` scans in all give no group. Unknown ages (NaN) belong to none.
    """
    known = (~age_N.isnan()).nonzero().squeeze(1)
    cell = torch.floor(age_N[known] / bin_years)
    groups: list[list[Tensor]] = []
    pending: list[Tensor] = []
    for value in torch.unique(cell):
        pending.append(known[cell == value])
        if sum(map(len, pending)) >= min_group:
            groups.append(pending)
            pending = []
    if pending and groups:
        groups[-1] += pending
    return [torch.cat(group) for group in groups]


def groups_of(age_N: Tensor, scanner_N: Tensor, *, bin_years: float, policy: MomentPolicy) -> list[Tensor]:
    """Indices of the scans of each group: one scanner, neighbouring ages, as many subjects as the policy asks for."""
    return [
        members[group]
        for scanner in torch.unique(scanner_N)
        for members in [(scanner_N == scanner).nonzero().squeeze(1)]
        for group in age_groups(age_N[members], bin_years=bin_years, min_group=policy.min_group)
    ]


def site_moments(
    z_ND: Tensor, age_N: Tensor, scanner_N: Tensor, *, bin_years: float, policy: MomentPolicy
) -> tuple[GroupMoments, int]:
    """Moments of a site's embeddings by scanner and age, as far as its policy allows, and the number of withheld scans.

    Args:
        z_ND: (N, D) unit-length embeddings, one row a subject, float64 for exact results.
        age_N: (N,) years, NaN where unknown.
        scanner_N: (N,) integer code of the scanner.
        bin_years: width of the public age cells that groups are joined from.
        policy: what the site lets out.
    """
    features = z_ND.shape[1]
    groups = groups_of(age_N, scanner_N, bin_years=bin_years, policy=policy)
    withheld = len(z_ND) - sum(map(len, groups))
    no_covariance_0DD = z_ND.new_zeros(0, features, features)
    if not groups:
        empty = z_ND.new_zeros
        return GroupMoments(empty(0), empty(0), empty(0, features), empty(0, features), no_covariance_0DD), withheld
    parts = []
    for group in groups:
        mean_D = z_ND[group].mean(dim=0)
        centred_nD = z_ND[group] - mean_D
        covariance_DD = centred_nD.T @ centred_nD / len(group)
        full = len(group) >= policy.covariance_subjects_per_feature * features
        diagonal = full or len(group) >= policy.diagonal_subjects
        parts.append(
            GroupMoments(
                age_N[group].to(z_ND).mean()[None],
                z_ND.new_tensor([float(policy.rounded(len(group)))]),
                mean_D[None],
                covariance_DD.diagonal()[None] if diagonal else torch.full_like(mean_D, torch.nan)[None],
                covariance_DD[None] if full else no_covariance_0DD,
            )
        )
    return concatenate(parts), withheld
