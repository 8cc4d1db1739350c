"""Objectives for scans of which some carry a diagnosis, some a doubtful one and some none.

Shape legend: V views, N scans, R = V N rows (all first views, then all second views ...), C classes.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from core.losses.embedded import EmbeddedViews, Objective, draw_and_repel, weighted_cross_entropy
from core.losses.kernels import check_at_least_zero, check_positive
from core.losses.weak import YAware


@dataclass(frozen=True, kw_only=True)
class DecoupledConditional(Objective):
    """Decoupled conditional contrastive loss: classes whose labels may be doubtful, and unlabelled scans.

    -mean_i sum_k w_ik / (sum_j w_ij) [ l_ik - log sum_{a != i, w_ia = 0} e^{l_ia} ], w_ik = [y_i = y_k] c_i c_k, c the confidence
    of a label between 0 and 1, 1 for two views of one scan, l = z.z' / temperature (Ruppli et al. 2023). Positives are no part
    of the denominator. An unlabelled scan (NaN) is drawn to its own views alone. An anchor that nothing repels is only drawn.
    Without ``confidence`` every label is certain; with every scan unlabelled it is decoupled contrastive learning, `InfoNCE`
    with an infinite margin.

    >>> z = torch.eye(4)
    >>> round(float(DecoupledConditional(temperature=1.0)(z[:2], z[:2], {"diagnosis": torch.tensor([0.0, 1.0])})), 4)  # log 2 - 1
    -0.3069
    """

    temperature: float = 0.1
    label: str = "diagnosis"
    confidence: str | None = None

    def __post_init__(self) -> None:
        check_positive("objective decoupled_conditional", temperature=self.temperature)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class, and the confidence in it."""
        return (self.label, self.confidence) if self.confidence else (self.label,)

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        class_R = views.label(self.label)
        weights_RR = (class_R[:, None] == class_R[None, :]).to(views.z_VND.dtype)
        if self.confidence:
            confidence_R = views.label(self.confidence).to(weights_RR)
            if not bool(((confidence_R >= 0) & (confidence_R <= 1) | confidence_R.isnan()).all()):
                raise ValueError("objective decoupled_conditional: confidence must be between 0 and 1, got others.")
            confidence_R = confidence_R.nan_to_num(nan=0.0)
            weights_RR = weights_RR * confidence_R[:, None] * confidence_R[None, :]
        weights_RR = views.fill_own_(weights_RR, 1.0).fill_diagonal_(0.0)
        negatives_RR = (weights_RR == 0).to(weights_RR).fill_diagonal_(0.0)
        repelled_R = negatives_RR.sum(dim=1) > 0
        drawn_R, log_negatives_R = draw_and_repel(views, weights_RR, 1.0 / self.temperature, negatives_RR)
        log_negatives_R = torch.where(repelled_R, log_negatives_R, 0.0)
        return weighted_cross_entropy(weights_RR, drawn_R, log_negatives_R, self.temperature).mean()


@dataclass(frozen=True, kw_only=True)
class Joint(Objective):
    """Weak and supervised together: a classifier's cross-entropy where a label is known, beside a contrastive objective.

    weak + supervised_weight * mean over labelled rows of -log softmax(logits)_y (Sarfati et al., MICCAI 2023). The metadata hold
    the ``label`` (whole numbers, or NaN where unknown) and ``logits``, (N, C) or (V, N, C), of a head on the representation,
    trained by this loss. Without a labelled row the second term is 0.

    >>> z, joint = torch.eye(4), Joint(weak=YAware(temperature=1.0))
    >>> metadata = {"age_years": torch.tensor([20.0, 80.0]), "diagnosis": torch.tensor([1.0, torch.nan])}
    >>> round(float(joint(z[:2], z[:2], {**metadata, "logits": torch.zeros(2, 2)})), 4)  # .5514 + log 2
    1.2446
    """

    weak: Objective = field(default_factory=YAware)
    label: str = "diagnosis"
    supervised_weight: float = 1.0
    __pydantic_config__: ClassVar[dict[str, bool]] = {"arbitrary_types_allowed": True}  # for ``weak``

    def __post_init__(self) -> None:
        check_at_least_zero("objective joint", supervised_weight=self.supervised_weight)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class and the weak objective's."""
        return (self.label, *(name for name in self.weak.labels if name != self.label))

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        logits_RC = views.logits()
        class_R = views.label(self.label).to(logits_RC)
        known_R = ~class_R.isnan()
        target_R = torch.where(known_R, class_R, 0.0).long()
        whole_R = (target_R == class_R) | ~known_R
        if not bool((whole_R & (target_R >= 0) & (target_R < logits_RC.shape[1])).all()):
            raise ValueError(
                f"objective joint: {self.label} must be whole numbers between 0 and {logits_RC.shape[1] - 1}, got others."
            )
        errors_R = torch.nn.functional.cross_entropy(logits_RC, target_R, reduction="none")
        supervised = torch.where(known_R, errors_R, 0.0).sum() / known_R.sum().clamp_min(1)
        return self.weak.loss(views) + self.supervised_weight * supervised
