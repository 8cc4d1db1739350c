"""Objectives weighted by how alike two scans' labels are, such as age: no positives and negatives, but degrees.

Shape legend: V views, N scans, R = V N rows (all first views, then all second views ...), D embedding size.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from core.losses.contrastive import RELEASED_TEMPERATURE
from core.losses.embedded import LOWEST, EmbeddedViews, Objective, draw_and_repel, weighted_cross_entropy
from core.losses.kernels import Kernel, check_positive


@dataclass(frozen=True, kw_only=True)
class _Weighted(Objective):
    """What the weakly supervised objectives share.

    Attributes:
        temperature: of the softmax.
        kernel: weight of a pair from the labels of its scans. Two views of one scan weigh the kernel's peak, labelled or not.
    """

    temperature: float = 0.1
    kernel: Kernel = field(default_factory=Kernel)

    def __post_init__(self) -> None:
        check_positive(f"objective {type(self).__name__}", temperature=self.temperature)

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of the kernel."""
        return self.kernel.labels


@dataclass(frozen=True, kw_only=True)
class YAware(_Weighted):
    """y-aware InfoNCE: scans of similar age are positives, the more so the closer in age.

    -mean_i sum_{k != i} w_ik / (sum_{j != i} w_ij) log softmax_{a != i}(z_i.z_a / temperature)_k, w the kernel of the labels
    (Dufumier et al., MICCAI 2021, eq. 2, rows normalised). A scan of unknown age is drawn to its own other views alone;
    bandwidth -> 0 gives NT-Xent.

    ``released``: "miccai2021" divides the weights by the sum of their column and sums the two directions, as the authors' code
    and nidl do; "isbi2023" multiplies by temperature / 0.07, as Barbano et al. do. Both for reproduction.

    >>> z, ages = torch.eye(4), {"age_years": torch.tensor([20.0, 80.0])}
    >>> round(float(YAware(temperature=1.0)(z[:2], z[:2], ages)), 4)  # sixty years apart: NT-Xent
    0.5514
    >>> round(float(YAware(temperature=1.0)(z[:2], z[:2], {"age_years": torch.tensor([50.0, 50.0])})), 4)  # log(e + 2) - 1/3
    1.2181
    """

    released: Literal["miccai2021", "isbi2023"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.released not in (None, "miccai2021", "isbi2023"):
            raise ValueError(f"objective YAware: released must be 'miccai2021', 'isbi2023' or absent, got {self.released!r}.")

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        weights_RR = views.pair_weights(self.kernel)
        drawn_R, log_partition_R = draw_and_repel(views, weights_RR, 1.0 / self.temperature)
        if self.released == "miccai2021":
            size_R = weights_RR.sum(dim=1)
            inverse_R = torch.where(size_R > 0, 1.0 / size_R, 0.0)
            # sum_ik w_ik / c_k (log_partition_i - l_ik), with c_k the sum of column k
            logit_R = inverse_R * drawn_R / self.temperature
            return 2.0 * (log_partition_R * (weights_RR @ inverse_R) - logit_R).mean()
        loss = weighted_cross_entropy(weights_RR, drawn_R, log_partition_R, self.temperature).mean()
        return loss * (self.temperature / RELEASED_TEMPERATURE) if self.released else loss


@dataclass(frozen=True, kw_only=True)
class Exp(_Weighted):
    """L^exp: the more alike two labels, the less the pair repels.

    -mean_i sum_{k != i} w_ik / (sum_j w_ij) [ l_ik - log sum_{t != i} exp(l_it (1 - w_it)) ], w the kernel of the labels
    (Barbano et al., ISBI 2023, eq. 6). It changes when all l change by a constant: the published figures come from code that
    takes l = (z.z' - 1) / temperature, the default here; ``shifted=False`` takes l = z.z' / temperature, the paper's formula.

    ``released`` multiplies by temperature / 0.07, as the authors' code does.

    >>> z, ages = torch.eye(4), {"age_years": torch.tensor([20.0, 80.0])}
    >>> round(float(Exp(temperature=1.0)(z[:2], z[:2], ages)), 4)  # log(1 + 2 / e), the other view attracts at l = 0
    0.5514
    >>> round(float(Exp(temperature=1.0, shifted=False)(z[:2], z[:2], ages)), 4)  # log(1 + 2) - 1
    0.0986
    """

    shifted: bool = True
    released: bool = False

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        weights_RR = views.pair_weights(self.kernel)
        shift = 1.0 if self.shifted else 0.0
        repulsion_RR = torch.sub(1.0 / self.temperature, weights_RR, alpha=1.0 / self.temperature)
        largest = max(1.0, self.kernel.peak) * (1.0 + shift) / self.temperature
        drawn_R, log_partition_R = draw_and_repel(views, weights_RR, repulsion_RR, shift=shift, largest=largest)
        log_partition_R = log_partition_R + shift / self.temperature
        loss = weighted_cross_entropy(weights_RR, drawn_R, log_partition_R, self.temperature).mean()
        return loss * (self.temperature / RELEASED_TEMPERATURE) if self.released else loss


@dataclass(frozen=True, kw_only=True)
class Threshold(_Weighted):
    """L^thr: a scan repels only those whose labels are further from the anchor's than its own.

    -mean_i sum_k w_ik / (sum_j w_ij) [ l_ik - log sum_{t != i, w_it < w_ik} e^{l_it} ], w the kernel of the labels,
    l = z.z' / temperature (Barbano et al., ISBI 2023, eq. 5); a scan that is further than no other repels none: no term.

    ``released``: the authors' code instead weighs the repulsion of t from i by the number of rows k with w_tk < w_ti ("sum"),
    or their share ("mean"), in O(n^3) memory, and multiplies by temperature / 0.07. Both are O(n^2) here, by sorting.

    >>> z, ages = torch.eye(4), {"age_years": torch.tensor([20.0, 80.0])}
    >>> round(float(Threshold(temperature=1.0)(z[:2], z[:2], ages)), 4)  # log(2) - 1: the two rows further away
    -0.3069
    """

    released: Literal["sum", "mean"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.released not in (None, "sum", "mean"):
            raise ValueError(f"objective Threshold: released must be 'sum', 'mean' or absent, got {self.released!r}.")

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        weights_RR = views.pair_weights(self.kernel)
        if self.released:
            # The code compares with the anchor itself too, at the weight of equal labels.
            with_itself_RR = weights_RR.clone().fill_diagonal_(self.kernel.peak)
            sorted_RR = with_itself_RR.sort(dim=1).values
            nearer_RR = torch.searchsorted(sorted_RR, with_itself_RR).to(weights_RR).T
            factor_RR = (nearer_RR / (len(nearer_RR) if self.released == "mean" else 1.0)).fill_diagonal_(0.0)
            logits_RR = views.any_similarity / self.temperature + factor_RR.log().clamp_min(-LOWEST)
            drawn_R = (views.any_similarity * weights_RR).sum(dim=1)
            loss_R = weighted_cross_entropy(weights_RR, drawn_R, torch.logsumexp(logits_RR, dim=1), self.temperature)
            # An anchor that nothing repels, where the authors' code is infinite or NaN, has no term.
            loss_R = torch.where(factor_RR.sum(dim=1) > 0, loss_R, 0.0)
            return loss_R.mean() * (self.temperature / RELEASED_TEMPERATURE)
        # The anchor itself comes last in its row, where nothing is compared with it.
        sorted_RR, order_RR = weights_RR.clone().fill_diagonal_(torch.inf).sort(dim=1)
        logits_RR = (views.any_similarity / self.temperature).gather(1, order_RR)
        first_equal_RR = torch.searchsorted(sorted_RR, sorted_RR)
        # In float64, where no temperature above .003 underflows.
        terms_RR = (logits_RR.double() - 1.0 / self.temperature).exp()
        log_sums_RR = (terms_RR.cumsum(dim=1).clamp_min(1e-300).log() + 1.0 / self.temperature).to(logits_RR)
        log_sums_RR = log_sums_RR.gather(1, (first_equal_RR - 1).clamp_min(0))
        counts_RR = (first_equal_RR > 0) & sorted_RR.isfinite()
        share_RR = torch.where(counts_RR, sorted_RR, 0.0) / weights_RR.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return (share_RR * (log_sums_RR - logits_RR)).sum(dim=1).mean()
