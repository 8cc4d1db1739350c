"""A site's embedding moments: what sites exchange so that each can compute FairKL against all the others.

For unit vectors the first two moments of the similarity between an anchor z and a remote group g need only that group's
mean m_g and covariance C_g: E[z.z'] = z.m_g and Var[z.z'] = z' C_g z. No embedding of a scan leaves its site.

Shape legend: N scans, D features, G groups, L labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from core.settings import MomentPolicy

AGE = "age_years"


@dataclass(frozen=True)
class GroupMoments:
    """Moments of unit-length embeddings of G groups (one scanner, one sex, neighbouring ages); never of a single scan.

    Attributes:
        label_GL: mean of each label of the run's kernel, in its order, such as age in years and sex.
        count_G: number of subjects in each group, rounded by the site that sends it.
        mean_GD: mean embedding.
        covariance_GDD: covariance, NaN where the site withholds it; (0, D, D) when every group's is withheld.
    """

    label_GL: Tensor
    count_G: Tensor
    mean_GD: Tensor
    covariance_GDD: Tensor

    def __post_init__(self) -> None:
        groups, features = self.mean_GD.shape
        shapes = {
            "label_GL": (groups, self.label_GL.shape[-1]),
            "count_G": (groups,),
            "covariance_GDD": (groups if len(self.covariance_GDD) else 0, features, features),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"moments: {name} must have shape {shape}, got {tuple(getattr(self, name).shape)}.")
        if not (self.label_GL.isfinite().all() and self.mean_GD.isfinite().all() and (self.count_G > 0).all()):
            raise ValueError("moments: labels and means must be finite and counts positive. Ask the site for its log.")
        if not (self.mean_GD.norm(dim=1) <= 1 + 1e-3).all():
            raise ValueError("moments: means of unit vectors must lie in the unit ball. Ask the site for its log.")
        variance_GD = self.covariance_GDD.diagonal(dim1=1, dim2=2)
        if self.covariance_GDD.isinf().any() or (variance_GD < 0).any():
            raise ValueError("moments: covariances must be finite and variances not negative. Ask the site for its log.")

    def __len__(self) -> int:
        return len(self.count_G)

    @property
    def num_features(self) -> int:
        """D."""
        return self.mean_GD.shape[1]

    def to(self, like: Tensor) -> "GroupMoments":
        """The same moments with the device and dtype of another tensor."""
        return GroupMoments(*(getattr(self, field.name).to(like) for field in fields(self)))

    def similarity(self, z_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and variance, (N, G) each, of the similarity of every anchor to each group; no variance where one is withheld.

        The variances of single features would not do: features vary together, and z' C z is many times what its diagonal gives.
        """
        mean_NG = z_ND @ self.mean_GD.T
        if not len(self.covariance_GDD) or bool(self.covariance_GDD.isnan().any()):
            return mean_NG, None
        return mean_NG, torch.einsum("nd,gde,ne->ng", z_ND, self.covariance_GDD, z_ND)


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


def told_subjects(taken_N: Tensor, scanner_N: Tensor, policy: MomentPolicy) -> Tensor:
    """Whether each subject may count in a sum, (N,): taken, and at a scanner that has ``policy.min_group`` of the taken.

    A sum over a whole site, less the means of the scanners told, would be the sum of a scanner that the site withholds.
    """
    size_N = ((scanner_N[:, None] == scanner_N[None, :]) & taken_N[None, :]).sum(dim=1)
    return taken_N & (size_N >= policy.min_group)


def feature_sums(features_ND: Tensor, policy: MomentPolicy) -> Tensor:
    """Count, sum and sum of squares of every feature, (3, D) float64, one row a subject: what a site sends for the reference.

    All is NaN below ``policy.min_group`` subjects, the squares below ``policy.diagonal_subjects``.
    """
    features_ND = features_ND.double()
    count_D = features_ND.new_full((features_ND.shape[1],), len(features_ND))
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
                part.label_GL,
                part.count_G,
                part.mean_GD,
                torch.full_like(part.mean_GD, torch.nan)[:, :, None].expand(-1, -1, part.num_features),
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


def groups_of(labels: Mapping[str, Tensor], scanner_N: Tensor, *, bin_years: float, policy: MomentPolicy) -> list[Tensor]:
    """Indices of the scans of each group: as many subjects as the policy asks for, of one scanner and of like labels.

    Ages are joined by `age_groups`; of any other label, such as sex, a group has one value. The edges that groups may have are
    so the same at every site and known to all. Scans with an unknown (NaN) label belong to none.
    """
    classes_NC = torch.stack([scanner_N.double(), *(value_N.double() for name, value_N in labels.items() if name != AGE)], dim=1)
    known_N = ~torch.stack([value_N.isnan() for value_N in labels.values()]).any(dim=0)
    groups = []
    for class_C in torch.unique(classes_NC[known_N], dim=0):
        members = (known_N & (classes_NC == class_C).all(dim=1)).nonzero().squeeze(1)
        if AGE in labels:
            joined = age_groups(labels[AGE][members], bin_years=bin_years, min_group=policy.min_group)
            groups += [members[group] for group in joined]
        elif len(members) >= policy.min_group:
            groups.append(members)
    return groups


def site_moments(
    z_ND: Tensor, labels: Mapping[str, Tensor], scanner_N: Tensor, *, bin_years: float, policy: MomentPolicy
) -> tuple[GroupMoments, int]:
    """Moments of a site's embeddings by scanner and labels, as far as its policy allows, and the number of withheld scans.

    Args:
        z_ND: (N, D) unit-length embeddings, one row a subject, float64 for exact results.
        labels: those of the run's kernel, in its order: (N,) values each, NaN where unknown.
        scanner_N: (N,) integer code of the scanner.
        bin_years: width of the public age cells that groups are joined from.
        policy: what the site lets out.
    """
    features = z_ND.shape[1]
    groups = groups_of(labels, scanner_N, bin_years=bin_years, policy=policy)
    withheld = len(z_ND) - sum(map(len, groups))
    no_covariance_0DD = z_ND.new_zeros(0, features, features)
    if not groups:
        empty = z_ND.new_zeros
        none = GroupMoments(empty(0, len(labels)), empty(0), empty(0, features), no_covariance_0DD)
        return none, withheld
    parts = []
    for group in groups:
        mean_D = z_ND[group].mean(dim=0)
        centred_nD = z_ND[group] - mean_D
        full = len(group) >= policy.covariance_subjects_per_feature * features
        parts.append(
            GroupMoments(
                torch.stack([value_N[group].to(z_ND).mean() for value_N in labels.values()])[None],
                z_ND.new_tensor([float(policy.rounded(len(group)))]),
                mean_D[None],
                (centred_nD.T @ centred_nD / len(group))[None] if full else no_covariance_0DD,
            )
        )
    return concatenate(parts), withheld
