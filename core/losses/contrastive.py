"""Objectives that tell positives from negatives: two views of a scan, or two scans of a class.

Shape legend: V views, N scans, R = V N rows (all first views, then all second views ...), D embedding size.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.losses.embedded import (
    EmbeddedViews,
    Objective,
    draw_and_repel,
    log_add_exp,
    log_sum_exp,
    margin_loss,
    weighted_cross_entropy,
)
from core.losses.kernels import check_positive

RELEASED_TEMPERATURE = 0.07  # released code of the SupCon family multiplies its losses by temperature / 0.07
RELEASED_GUARD = 1e-6  # and adds this to the sum in the logarithm, after subtracting the largest logit


@dataclass(frozen=True, kw_only=True)
class NTXent(Objective):
    """Normalised temperature-scaled cross-entropy: find the other views of a scan among all rows.

    -mean_i [ mean_i' l_ii' - log sum_{a != i} exp(l_ia) ], l = z.z' / temperature (SimCLR, Chen et al. 2020, eq. 1; the code
    of SimCLR and of y-aware sum the two directions: twice this mean). Equal to y-aware InfoNCE when every label is unknown.

    >>> z = torch.eye(4)
    >>> round(float(NTXent(temperature=1.0)(z[:2], z[:2])), 4)  # -[1 - log(e + 2)]
    0.5514
    """

    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_positive("objective ntxent", temperature=self.temperature)

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of two views or more; a single view of each scan has no positives and its loss is 0."""
        if views.num_views == 1:
            return views.zero()
        return (log_sum_exp(views, 1.0 / self.temperature) - views.own_similarity() / self.temperature).mean()


@dataclass(frozen=True, kw_only=True)
class InfoNCE(Objective):
    """InfoNCE with a margin: each positive is compared with itself, lowered by the margin, and the negatives alone.

    -mean_i mean_p log [ e^{l_ip} / ( e^{l_ip - margin} + sum_n e^{l_in} ) ], positives p the other views of the scan, negatives
    n the rows of other scans, l = z.z' / temperature (epsilon-InfoNCE, Barbano et al., ICLR 2023, eq. 8). The margin is in
    units of l, as in their code. Margin 0 with two views is NT-Xent; an infinite margin takes the positive out of the
    denominator: minus ``margin`` aside, decoupled contrastive learning (Yeh et al., ECCV 2022).

    >>> z = torch.eye(4)
    >>> round(float(InfoNCE(temperature=1.0)(z[:2], z[:2])), 4)  # log(e + 2) - 1
    0.5514
    >>> round(float(InfoNCE(temperature=1.0, margin=math.inf)(z[:2], z[:2])), 4)  # log(2) - 1
    -0.3069
    """

    temperature: float = 0.1
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_positive("objective infonce", temperature=self.temperature)
        if not self.margin >= 0:
            raise ValueError(f"objective infonce: margin must be 0 or positive, got {self.margin!r}.")

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of two views or more; a single view of each scan has no positives and its loss is 0."""
        if views.num_views == 1 or (self.margin == math.inf and views.num_scans == 1):
            return views.zero()
        negatives_RR = views.fill_own_(torch.ones_like(views.similarity, requires_grad=False), 0.0)
        log_negatives_VN = views.by_view(log_sum_exp(views, 1.0 / self.temperature, negatives_RR))
        rows_VND = views.by_view(views.rows)
        per_positive = [
            _margin_loss(log_negatives_VN[v], (rows_VND[v] * rows_VND[u]).sum(dim=1) / self.temperature, self.margin)
            for v in range(views.num_views)
            for u in range(views.num_views)
            if u != v
        ]
        return torch.stack(per_positive).mean()


def _margin_loss(log_negatives: Tensor, positive: Tensor, margin: float) -> Tensor:
    """-log [ e^p / ( e^{p - margin} + e^n ) ]; without negatives -margin."""
    if margin == math.inf:
        return log_negatives - positive
    return -torch.nn.functional.logsigmoid(positive - margin - log_negatives) - margin


@dataclass(frozen=True, kw_only=True)
class _OverClasses(Objective):
    """What objectives over classes share: which rows are positives.

    Attributes:
        temperature: of the softmax.
        margin: taken from a positive in its own denominator, in units of the logit.
        label: metadata that holds the class; NaN is no class, such a scan has its own views as positives only.
        bin_width: makes classes of a continuous label, [k w, (k + 1) w); None takes its values as they are.
        released: to the letter of the authors' code, for reproduction: times temperature / 0.07, 1e-6 added in the logarithm.
    """

    temperature: float = 0.1
    margin: float = 0.0
    label: str = "sex"
    bin_width: float | None = None
    released: bool = False

    def __post_init__(self) -> None:
        where = f"objective {type(self).__name__}"
        check_positive(where, temperature=self.temperature)
        if not 0 <= self.margin <= 20:
            raise ValueError(f"{where}: margin must be between 0 and 20, got {self.margin!r}.")
        if self.bin_width is not None:
            check_positive(where, bin_width=self.bin_width)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class."""
        return (self.label,)

    def positives(self, views: EmbeddedViews) -> Tensor:
        """Ones for pairs of one class and of one scan, 0 on the diagonal."""
        class_R = views.label(self.label)
        if self.bin_width is not None:
            class_R = torch.floor(class_R / self.bin_width)
        positives_RR = (class_R[:, None] == class_R[None, :]).to(views.z_VND.dtype)
        return views.fill_own_(positives_RR, 1.0).fill_diagonal_(0.0)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss in the scale that is asked for."""
        return loss * (self.temperature / RELEASED_TEMPERATURE) if self.released else loss


@dataclass(frozen=True, kw_only=True)
class SupCon(_OverClasses):
    """Supervised contrastive loss, with a margin epsilon-SupCon: scans of a class are drawn together.

    -mean_i 1/|P| sum_p [ l_ip - log( e^-margin sum_P e^l + sum_N e^l ) ], P the other rows of the anchor's class or scan, N all
    rows of others, l = z.z' / temperature (Khosla et al. 2020, eq. 2; Barbano et al., ICLR 2023, eq. 18). 0 for an anchor
    without positives. Margin 0 and every scan a class of its own is NT-Xent.

    ``anchors``: "first_view" averages over the anchors of the first view only (``contrast_mode="one"`` of the authors).

    >>> z = torch.eye(4)
    >>> one_class = {"sex": torch.zeros(2)}
    >>> round(float(SupCon(temperature=1.0)(z[:2], z[:2], one_class)), 4)  # log(e + 2) - 1/3
    1.2181
    """

    anchors: Literal["all", "first_view"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchors not in ("all", "first_view"):
            raise ValueError(f"objective SupCon: anchors must be 'all' or 'first_view', got {self.anchors!r}.")

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        positives_RR = self.positives(views)
        factor_RR = None
        if self.margin:
            # Not 1 - (1 - e^-margin) P, which would keep little of e^-margin in float32.
            factor_RR = (1.0 - positives_RR).add_(positives_RR, alpha=math.exp(-self.margin)).fill_diagonal_(0.0)
        shift = 1.0 if self.released else 0.0  # released code subtracts the largest similarity, that of a row to itself
        drawn_R, log_partition_R = draw_and_repel(views, positives_RR, 1.0 / self.temperature, factor_RR, shift=shift)
        if self.released:
            guard = log_partition_R.new_tensor(math.log(RELEASED_GUARD))
            log_partition_R = log_add_exp(guard, log_partition_R) + shift / self.temperature
        loss_R = weighted_cross_entropy(positives_RR, drawn_R, log_partition_R, self.temperature)
        return self.scaled((loss_R if self.anchors == "all" else loss_R[: views.num_scans]).mean())


@dataclass(frozen=True, kw_only=True)
class EpsSupInfoNCE(_OverClasses):
    """epsilon-SupInfoNCE: every positive is compared with the negatives alone, at a margin.

    ``form="out"``: -mean_i 1/|P| sum_p log [ e^{l_ip} / ( e^{l_ip - margin} + sum_N e^{l_in} ) ]; ``form="in"``:
    -mean_i log [ sum_P e^{l_ip} / ( 1/|P| sum_P e^{l_ip - margin} + sum_N e^{l_in} ) ], P the other rows of the anchor's class
    or scan, N all rows of others, l = z.z' / temperature (Barbano et al., ICLR 2023, eqs. 7-9). 0 for an anchor without
    positives, where the authors' code is infinite in the form "in". Every scan a class of its own is `InfoNCE`.

    >>> z = torch.eye(4)
    >>> two_classes = {"sex": torch.tensor([0.0, 1.0])}
    >>> round(float(EpsSupInfoNCE(temperature=1.0)(z[:2], z[:2], two_classes)), 4)  # log(e + 2) - 1
    0.5514
    """

    form: Literal["out", "in"] = "out"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("out", "in"):
            raise ValueError(f"objective EpsSupInfoNCE: form must be 'out' or 'in', got {self.form!r}.")

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        positives_RR = self.positives(views)
        size_R = positives_RR.sum(dim=1)
        some_R = size_R > 0
        size_R = size_R.clamp_min(1.0)
        if self.form == "out":
            # Released code adds 1e-6 to exp(l - l_max): in our unshifted sum that is 1e-6 exp(l_max).
            guard = RELEASED_GUARD * math.exp(1.0 / self.temperature) if self.released else 0.0
            loss_R = margin_loss(views, self.temperature, positives_RR, self.margin, guard) / size_R
        else:
            log_negatives_R = log_sum_exp(views, 1.0 / self.temperature, (1.0 - positives_RR).fill_diagonal_(0.0))
            log_positives_R = log_sum_exp(views, 1.0 / self.temperature, positives_RR)
            loss_R = log_add_exp(log_positives_R - self.margin - size_R.log(), log_negatives_R) - log_positives_R
        return self.scaled(torch.where(some_R, loss_R, 0.0).mean())
