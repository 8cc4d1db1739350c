"""FairKL and its relatives: similarities must not tell whether two scans share a bias attribute.

Shape legend: R rows, D embedding size, G remote groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from core.losses.embedded import EmbeddedViews, group_moments
from core.losses.kernels import Kernel, check_at_least_zero, check_positive
from core.moments import GroupMoments

Divergence = Literal["kl", "jeffreys", "moments", "mean"]
Statistics = Literal["per_anchor", "per_batch"]


def gaussian_kl(mean_a: Tensor, variance_a: Tensor, mean_c: Tensor, variance_c: Tensor) -> Tensor:
    """KL( N(mean_a, variance_a) || N(mean_c, variance_c) ), element by element (Barbano et al., ICLR 2023, eq. 10).

    >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
    >>> round(float(gaussian_kl(one, one, two, two)), 4)  # [ (1 + 1) / 2 + log 2 - 1 ] / 2
    0.3466
    """
    return 0.5 * ((variance_a + (mean_a - mean_c).square()) / variance_c - (variance_a / variance_c).log() - 1)


@dataclass(frozen=True, kw_only=True)
class FairKL:
    """Divergence between the similarities of bias-aligned and of bias-conflicting pairs, at like labels and at unlike ones.

    For every anchor and each sign (positives weighted w_ij, negatives 1 - w_ij, w the kernel of the labels; a bandwidth of 0
    for classes), the similarities to aligned rows ~ N(mu_a, v_a) and to conflicting rows ~ N(mu_c, v_c) give
    KL = 1/2 [ (v_a + (mu_a - mu_c)^2) / v_c - log(v_a / v_c) - 1 ] (Barbano et al., ICLR 2023, eq. 10).
    Two rows of one scan are no pair, nor is a row of unknown label or bias attribute part of any. Remote groups, known by
    their moments alone, join the conflicting side as constants; with a full batch and exact age bins that equals FairKL on the
    pooled embeddings. A sign counts where both sides weigh at least ``min_weight`` scans; where none does, the loss is 0.

    Where the covariance of a remote group is withheld, the divergence is taken at one common variance, the mean of the anchors'
    v_a: (mu_a - mu_c)^2 / (2 v). Free of scale, it cannot be lowered by shrinking all similarities together; common, it is not
    ruled by the anchors whose few pairs happen to agree.

    Attributes:
        kernel: of the labels that may be seen in the embedding, such as age.
        bias: metadata that holds the bias attribute, such as the scanner.
        divergence: "kl", "jeffreys" (both directions added), "moments" (squared differences of means and of standard
            deviations) or "mean" (of means alone, the idea of EnD).
        statistics: "per_anchor", averaged over the anchors, or "per_batch", of all pairs together as in the paper.
        min_weight: scans that each side must weigh: for an anchor, or in all.
        variance_floor: added to every variance.

    >>> z, one_scanner = torch.eye(4).double(), torch.zeros(4)
    >>> float(FairKL()(z, z, {"age_years": torch.full((4,), 30.0), "scanner": one_scanner}))  # nothing conflicts
    0.0
    >>> z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).double()  # two scanners, a direction for each
    >>> fairkl = FairKL(divergence="mean", min_weight=1)
    >>> float(fairkl(z, z, {"age_years": torch.full((4,), 30.0), "scanner": torch.tensor([0, 0, 1, 1])}))  # (1 - 0)^2
    1.0
    """

    kernel: Kernel = field(default_factory=Kernel)
    bias: str = "scanner"
    divergence: Divergence = "kl"
    statistics: Statistics = "per_anchor"
    min_weight: float = 4.0
    variance_floor: float = 1e-2
    couples_scans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("debias fairkl", min_weight=self.min_weight, variance_floor=self.variance_floor)
        for name, value, choices in (
            ("divergence", self.divergence, ("kl", "jeffreys", "moments", "mean")),
            ("statistics", self.statistics, ("per_anchor", "per_batch")),
        ):
            if value not in choices:
                raise ValueError(f"debias fairkl: {name} must be one of {choices}, got {value!r}.")

    def __call__(self, z1_ND: Tensor, z2_ND: Tensor, metadata: Mapping[str, Tensor]) -> Tensor:
        """The divergence, a scalar, of two views (N, D) each, with the metadata that ``kernel`` and ``bias`` name."""
        return self.of(EmbeddedViews((z1_ND, z2_ND), metadata))

    def of(self, views: EmbeddedViews, remote: GroupMoments | None = None, remote_scale: float = 1.0) -> Tensor:
        """The divergence, a scalar, summed over positives and negatives.

        Args:
            views: of a batch, with metadata.
            remote: moments of other sites' groups; every one conflicts with every row here.
            remote_scale: scans of the batch over scans of this site, so that groups weigh as they would in a pooled batch.
        """
        with torch.autocast(views.z_VND.device.type, enabled=False):
            return self._divergence(views, remote, remote_scale)

    def _divergence(self, views: EmbeddedViews, remote: GroupMoments | None, remote_scale: float) -> Tensor:
        labels = views.labels(self.kernel.labels)
        bias_R = views.label(self.bias)
        known_R = _known(bias_R)
        for label_R in labels.values():
            known_R = known_R & _known(label_R)
        codes_R = torch.unique(bias_R, return_inverse=True)[1]
        groups_RB = torch.nn.functional.one_hot(codes_R).to(views.z_VND.dtype) * known_R[:, None]
        everyone_RR = views.fill_own_(torch.ones_like(views.similarity, requires_grad=False), 0.0)
        everyone = self._by_side(views, everyone_RR, groups_RB)
        alike_RR = views.fill_own_(views.kernel_weights(self.kernel), 0.0)
        alike = self._by_side(views, alike_RR, groups_RB)
        far = _Remote.of(self.kernel, views, labels, remote, remote_scale) if remote is not None and len(remote) else None

        total = views.zero()
        for positive in (True, False):
            aligned, conflicting = (
                one if positive else one.taken_from(every, self.kernel.peak) for one, every in zip(alike, everyone, strict=True)
            )
            if far is not None:
                conflicting = conflicting + far.weighted(positive)
            total = total + self._of_sign(aligned, conflicting, known_R, far is None or far.exact)
        return total

    @staticmethod
    def _by_side(views: EmbeddedViews, weights_RR: Tensor, groups_RB: Tensor) -> "tuple[_Sums, _Sums]":
        """Weighted sums over the rows that share an anchor's bias attribute, and over the others."""
        sums = weights_RR @ groups_RB, *group_moments(views, weights_RR, groups_RB)
        aligned = [(sum_RB * groups_RB).sum(dim=1) for sum_RB in sums]
        return _Sums(*aligned), _Sums(*(sum_RB.sum(dim=1) - own for sum_RB, own in zip(sums, aligned, strict=True)))

    def _of_sign(self, aligned: "_Sums", conflicting: "_Sums", known_R: Tensor, exact: bool) -> Tensor:
        aligned, conflicting = aligned.of(known_R), conflicting.of(known_R)
        if self.statistics == "per_batch":
            aligned, conflicting = aligned.over_anchors(), conflicting.over_anchors()
        counts = (aligned.size >= self.min_weight) & (conflicting.size >= self.min_weight)
        (mu_a, v_a), (mu_c, v_c) = (
            sums.mean_and_variance(self.min_weight, self.variance_floor) for sums in (aligned, conflicting)
        )
        num_counting = counts.sum().clamp_min(1)
        if self.divergence == "mean":
            divergence = (mu_a - mu_c).square()
        elif self.divergence == "moments":
            divergence = (mu_a - mu_c).square() + ((v_a.sqrt() - v_c.sqrt()).square() if exact else 0.0)
        elif exact:
            divergence = gaussian_kl(mu_a, v_a, mu_c, v_c)
            if self.divergence == "jeffreys":
                divergence = divergence + gaussian_kl(mu_c, v_c, mu_a, v_a)
        else:
            common = torch.where(counts, v_a, 0.0).sum() / num_counting
            directions = 2.0 if self.divergence == "jeffreys" else 1.0
            divergence = directions * (mu_a - mu_c).square() / (2 * common.clamp_min(self.variance_floor))
        return torch.where(counts, divergence, 0.0).sum() / num_counting


@dataclass(frozen=True)
class _Sums:
    """Weight of the pairs of each anchor, their weighted sum of similarities and of squares; scalars over all anchors."""

    size: Tensor
    first: Tensor
    second: Tensor

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.size + other.size, self.first + other.first, self.second + other.second)

    def taken_from(self, every: "_Sums", peak: float) -> "_Sums":
        """Sums weighted by peak - w, from those weighted by w and those over all pairs."""
        return _Sums(peak * every.size - self.size, peak * every.first - self.first, peak * every.second - self.second)

    def of(self, anchors_R: Tensor) -> "_Sums":
        """0 for all anchors but these."""
        return _Sums(*(torch.where(anchors_R, sum_R, 0.0) for sum_R in (self.size, self.first, self.second)))

    def over_anchors(self) -> "_Sums":
        return _Sums(self.size.sum(), self.first.sum(), self.second.sum())

    def mean_and_variance(self, least: float, floor: float) -> tuple[Tensor, Tensor]:
        """Where the size is less than ``least`` they are finite and mean nothing."""
        size = self.size.clamp_min(least)
        mean = self.first / size
        return mean, (self.second / size - mean.square()).clamp_min(0.0) + floor


def _known(label_R: Tensor) -> Tensor:
    return ~label_R.isnan() if label_R.is_floating_point() else torch.ones_like(label_R, dtype=torch.bool)


@dataclass(frozen=True)
class _Remote:
    """Moments of the similarities of every anchor to remote groups, and what each group weighs."""

    mean_RG: Tensor
    second_RG: Tensor
    kernel_RG: Tensor
    count_G: Tensor
    peak: float
    exact: bool

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        views: EmbeddedViews,
        labels: Mapping[str, Tensor],
        remote: GroupMoments,
        remote_scale: float,
    ) -> "_Remote":
        if remote.label_GL.shape[1] != len(kernel.labels):
            raise ValueError(
                f"debias fairkl: remote groups must tell the kernel's labels {list(kernel.labels)}, got "
                f"{remote.label_GL.shape[1]} labels."
            )
        remote = remote.to(views.rows)
        mean_RG, variance_RG = remote.similarity(views.rows)
        count_G = remote.count_G * remote_scale * views.num_views
        return cls(
            mean_RG,
            mean_RG.square() + (0.0 if variance_RG is None else variance_RG),
            kernel.weights(labels, dict(zip(kernel.labels, remote.label_GL.unbind(dim=1), strict=True))).to(mean_RG),
            count_G,
            kernel.peak,
            variance_RG is not None,
        )

    def weighted(self, positive: bool) -> _Sums:
        weight_RG = (self.kernel_RG if positive else self.peak - self.kernel_RG) * self.count_G
        return _Sums(weight_RG.sum(dim=1), (weight_RG * self.mean_RG).sum(dim=1), (weight_RG * self.second_RG).sum(dim=1))


@dataclass(frozen=True, kw_only=True)
class ReleasedFairKL:
    """FairKL as EIDOSLAB's code computes it, to the letter, so that results obtained with it can be reproduced; nothing else.

    Over all R x R entries, pairs of a row with itself among the aligned positives: squared differences of the means of aligned
    and conflicting similarities, of positives and of negatives, plus ``spread_weight`` times those of standard deviations taken
    over the masked matrix with its zeros, minus the mean of conflicting positives, plus that of aligned negatives. Not the
    paper's divergence: on a batch with one bias attribute it pulls positives apart. The authors give one row a scan.

    >>> z, ones = torch.eye(2).double(), torch.ones(2)
    >>> views = EmbeddedViews((z,), {"sex": ones, "scanner": ones})
    >>> round(float(ReleasedFairKL().of(views)), 4)  # (mean of I)^2 + (sd of I)^2 = 1/4 + 1/3, where the true value is 0
    0.5833
    """

    label: str = "sex"
    bias: str = "scanner"
    temperature: float = 1.0
    spread_weight: float = 1.0
    couples_scans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("debias released_fairkl", temperature=self.temperature)
        check_at_least_zero("debias released_fairkl", spread_weight=self.spread_weight)

    def __call__(self, z1_ND: Tensor, z2_ND: Tensor, metadata: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of two views (N, D) each, with the metadata that ``label`` and ``bias`` name."""
        return self.of(EmbeddedViews((z1_ND, z2_ND), metadata))

    def of(self, views: EmbeddedViews) -> Tensor:
        """The loss, a scalar, of any number of views. A single row, where the authors' code is NaN, has no spread: 0 for it."""
        with torch.autocast(views.z_VND.device.type, enabled=False):
            similarity_RR = views.any_similarity / self.temperature
            same_label_RR, same_bias_RR = (
                values_R[:, None] == values_R[None, :] for values_R in (views.label(self.label), views.label(self.bias))
            )
            total = views.zero()
            means: dict[tuple[bool, bool], Tensor] = {}
            for positive in (True, False):
                spreads = []
                for aligned in (True, False):
                    mask_RR = (same_label_RR == positive) & (same_bias_RR == aligned)
                    masked_RR = similarity_RR * mask_RR
                    means[positive, aligned] = masked_RR.sum() / mask_RR.sum().clamp_min(1)
                    spreads.append(_standard_deviation(masked_RR))
                total = total + (means[positive, True] - means[positive, False]).square()
                total = total + self.spread_weight * (spreads[0] - spreads[1]).square()
            return total - means[True, False] + means[False, True]


def _standard_deviation(values: Tensor) -> Tensor:
    """Unbiased, over all entries; 0 with a gradient of 0 where they are equal or only one."""
    variance = (values - values.mean()).square().sum() / max(1, values.numel() - 1)
    return torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)


@dataclass(frozen=True, kw_only=True)
class EnD:
    """Entangling and disentangling, the ancestor of FairKL that knows means only (Tartaglione et al., CVPR 2021, eqs. 4-6).

    disentangle_weight / M sum_b | sum of the similarities of pairs of bias attribute b |, over the M pairs that share one, plus
    entangle_weight ( 1 - mean (1 + s) / 2 ) over pairs of one class and two bias attributes; each pair once, two rows of one
    scan are no pair.

    ``released``: the authors' code entangles only those pairs whose later row has the lower bias attribute, so that its value
    depends on the order of the scans; for reproduction.

    >>> z, metadata = torch.eye(2).double(), {"sex": torch.ones(2), "scanner": torch.tensor([0, 1])}
    >>> round(float(EnD().of(EmbeddedViews((z,), metadata))), 4)  # one conflicting pair at similarity 0: 1 - 1/2
    0.5
    """

    label: str = "sex"
    bias: str = "scanner"
    disentangle_weight: float = 1.0
    entangle_weight: float = 1.0
    released: bool = False
    couples_scans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least_zero("debias end", disentangle_weight=self.disentangle_weight, entangle_weight=self.entangle_weight)

    def __call__(self, z1_ND: Tensor, z2_ND: Tensor, metadata: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of two views (N, D) each, with the metadata that ``label`` and ``bias`` name."""
        return self.of(EmbeddedViews((z1_ND, z2_ND), metadata))

    def of(self, views: EmbeddedViews) -> Tensor:
        """The loss, a scalar, of any number of views."""
        with torch.autocast(views.z_VND.device.type, enabled=False):
            similarity_RR = views.any_similarity
            bias_R, label_R = views.label(self.bias), views.label(self.label)
            later_RR = views.fill_own_(torch.ones_like(similarity_RR, dtype=torch.bool, requires_grad=False), False).tril(-1)
            aligned_RR = later_RR & (bias_R[:, None] == bias_R[None, :])
            conflicting_RR = later_RR & _known(bias_R)[:, None] & _known(bias_R)[None, :] & ~aligned_RR
            entangled_RR = conflicting_RR & (label_R[:, None] == label_R[None, :])
            if self.released:
                entangled_RR &= bias_R[:, None] < bias_R[None, :]
            # One sum for each bias attribute: of the rows of the matrix, then of the rows that share it.
            codes_R = torch.unique(bias_R, return_inverse=True)[1]
            sums = similarity_RR.new_zeros(len(bias_R)).index_add(0, codes_R, (similarity_RR * aligned_RR).sum(dim=1))
            disentangle = sums.abs().sum() / aligned_RR.sum().clamp_min(1)
            size = entangled_RR.sum()
            entangle = (0.5 * (1.0 - similarity_RR) * entangled_RR).sum() / size.clamp_min(1)
            return self.disentangle_weight * disentangle + self.entangle_weight * entangle
