"""A binary label by its scores, from histograms: the area under the ROC curve, and how far binning may have moved it.

Shapes: N subjects, E bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.evaluation.intervals import NotEvaluableError
from core.messages import check_fields, notes_of
from core.settings import MomentPolicy

SCORE_BINS = 20


@dataclass(frozen=True)
class ScoreCounts:
    """Histograms of a score over equal bins of [0, 1], of subjects with label 0 and label 1.

    Attributes:
        count_2E: (2, E) subjects, each count rounded by the site; (2, 0) where withheld.
        withheld: why it is.
    """

    count_2E: Tensor
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields("score counts", self, {"count_2E": (2, self.count_2E.shape[-1])})
        if (self.count_2E < 0).any():
            raise ValueError("score counts: counts must be at least 0, got some below. Ask the site for its log.")


def score_counts(score_N: Tensor, label_N: Tensor, *, policy: MomentPolicy, bins: int = SCORE_BINS) -> ScoreCounts:
    """What a site sends for `area_under_curve`, where each label has the subjects its policy asks for a mean.

    Args:
        score_N: (N,) probabilities of label 1, one held-out subject each.
        label_N: (N,) 0 or 1.
        policy: what the site lets out; counts are rounded by it, small ones to 0.
        bins: number of bins, the same at every site.

    Raises:
        ValueError: a score that is no probability.
    """
    if not ((score_N >= 0) & (score_N <= 1)).all():
        raise ValueError(f"score_counts: scores must be probabilities, got {score_N.min().item(), score_N.max().item()!r}.")
    bin_N = (score_N * bins).long().clamp_max(bins - 1)
    exact_2E = torch.stack([bin_N[label_N == label].bincount(minlength=bins) for label in (0, 1)]).double()
    if exact_2E.sum(dim=1).min() < policy.min_group:
        reason = f"scores need {policy.min_group} held-out subjects of each label"
        return ScoreCounts(torch.zeros(2, 0, dtype=torch.float64), (reason,))
    return ScoreCounts(policy.round_counts_to * (exact_2E / policy.round_counts_to).round())


def pooled_counts(parts: Mapping[str, ScoreCounts]) -> Tensor:
    """(2, E) subjects of all sites by label and bin; (2, 0) where none tells."""
    told = [parts[site].count_2E.double() for site in sorted(parts) if parts[site].count_2E.shape[1]]
    return torch.stack(told).sum(dim=0) if told else torch.zeros(2, 0, dtype=torch.float64)


def area_under_curve(parts: Mapping[str, ScoreCounts]) -> tuple[float, float, tuple[str, ...]]:
    """Area under the ROC curve of all sites' subjects, its largest error by binning, and notes.

    Pairs in one bin count half, as ties: the area of the unbinned scores is not further away than half of their share. What
    rounding of the counts adds is not in that bound.

    Raises:
        NotEvaluableError: no site tells a label's scores.
    """
    notes = notes_of(parts)
    negative_E, positive_E = pooled_counts(parts)
    if not negative_E.any() or not positive_E.any():
        raise NotEvaluableError(f"auc: scores of both labels must be told, got none of one. {'; '.join(notes)}")
    pairs = negative_E.sum() * positive_E.sum()
    tied = float((positive_E * negative_E).sum() / pairs) / 2
    below = float((positive_E * (negative_E.cumsum(0) - negative_E)).sum() / pairs)
    return below + tied, tied, notes


def area_variance(count_2E: Tensor) -> float:
    """Variance of the area under the ROC curve of binned scores (DeLong et al. 1988, doi:10.2307/2531595), from (2, E) counts."""
    negative_E, positive_E = count_2E
    num_negative, num_positive = negative_E.sum(), positive_E.sum()
    below_E = (negative_E.cumsum(0) - negative_E / 2) / num_negative
    above_E = (num_positive - positive_E.cumsum(0) + positive_E / 2) / num_positive
    area = (positive_E * below_E).sum() / num_positive
    of_positive = (positive_E * (below_E - area).square()).sum() / (num_positive - 1).clamp_min(1) / num_positive
    of_negative = (negative_E * (above_E - area).square()).sum() / (num_negative - 1).clamp_min(1) / num_negative
    return float(of_positive + of_negative)
