"""Age by ridge regression from sums: moments of features and age by fold, every candidate solved from them, errors counted.

A fold, or a site that is told as a whole, is left out by summing the others.

Shapes: N subjects, F features, D = F + 1 features and age, G groups, L folds, A regularisations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.evaluation.intervals import NotEvaluableError
from core.evaluation.sums import Z_95, covariance_of
from core.messages import check_fields, notes_of
from core.settings import MomentPolicy

RIDGE_ALPHAS = tuple(10.0**exponent for exponent in range(-2, 5))
WHOLE = -1
"""Fold of a site that tells all its subjects as one group."""


@dataclass(frozen=True)
class FoldMoments:
    """What a site sends for the age probe: moments of features and age together, a group a fold, age last.

    Attributes:
        fold_G: (G,) fold of each group; `WHOLE` alone where folds are too small to be told.
        count_G: (G,) subjects, rounded by the site.
        mean_GD: (G, D) means.
        covariance_GDD: (G, D, D) covariances, divided by the count.
        withheld: what is not told and why.
    """

    fold_G: Tensor
    count_G: Tensor
    mean_GD: Tensor
    covariance_GDD: Tensor
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        groups, columns = self.mean_GD.shape
        shapes = {"fold_G": (groups,), "count_G": (groups,), "covariance_GDD": (groups, columns, columns)}
        check_fields("fold moments", self, shapes, positive=self.count_G)


@dataclass(frozen=True)
class RidgeCandidates:
    """Ridge models of every fold left out, and of none (the last), for every regularisation.

    Attributes:
        folds: what each but the last model never saw: a fold's number, or "site NAME".
        alpha_A: (A,) penalties of the squared weights.
        weight_LAF: (L, A, F) years a unit of the standardised features, L = folds + 1.
        intercept_LA: (L, A) years.
        notes: what took no part and why.
    """

    folds: tuple[str, ...]
    alpha_A: Tensor
    weight_LAF: Tensor
    intercept_LA: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AgeErrors:
    """A site's errors of every candidate: of each fold's model on the fold, of the last model on held-out subjects.

    Attributes:
        fold_count_L: (L - 1,) subjects, rounded, 0 where too few or none.
        fold_absolute_LA: (L - 1, A) mean absolute errors in years, 0 where the count is.
        count: (1,) held-out subjects, rounded, 0 where too few.
        absolute_A: (A,) their mean absolute errors.
        square_A: (A,) their mean squared errors.
        age_2: (2,) mean and variance of their age.
        withheld: what is not told and why.
    """

    fold_count_L: Tensor
    fold_absolute_LA: Tensor
    count: Tensor
    absolute_A: Tensor
    square_A: Tensor
    age_2: Tensor
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        folds, alphas = self.fold_absolute_LA.shape
        shapes = {"fold_count_L": (folds,), "count": (1,), "absolute_A": (alphas,), "square_A": (alphas,), "age_2": (2,)}
        check_fields("age errors", self, shapes)


@dataclass(frozen=True)
class ErrorScore:
    """Mean absolute error in years with its 95 % normal interval, R2 (NaN where age does not vary), rounded subjects."""

    mae: float
    low: float
    high: float
    r2: float
    num_subjects: int


def fold_moments(standard_NF: Tensor, age_N: Tensor, fold_N: Tensor, *, policy: MomentPolicy) -> FoldMoments:
    """What a site sends for `fit_ridge`: by fold where every fold has the subjects a covariance needs, else as a whole.

    Args:
        standard_NF: (N, F) from `sums.standardised`, one row a training subject.
        age_N: (N,) years, NaN where unknown: that subject takes no part.
        fold_N: (N,) from `sums.subject_folds`.
        policy: what the site lets out.
    """
    known_N = age_N.isfinite()
    withheld: tuple[str, ...] = () if known_N.all() else ("subjects without an age take no part in the age probe",)
    rows_ND = torch.cat([standard_NF.double(), age_N.double()[:, None]], dim=1)[known_N]
    told_N, reason = _told_folds(fold_N[known_N], rows_ND.shape[1], policy)
    groups = [(rows_ND[told_N == fold], fold) for fold in torch.unique(told_N).tolist()] if told_N is not None else []
    columns = rows_ND.shape[1]
    return FoldMoments(
        torch.tensor([fold for _, fold in groups], dtype=torch.float64),
        torch.tensor([float(policy.rounded(len(group))) for group, _ in groups], dtype=torch.float64),
        torch.stack([group.mean(dim=0) for group, _ in groups]) if groups else rows_ND.new_zeros(0, columns),
        torch.stack([covariance_of(group) for group, _ in groups]) if groups else rows_ND.new_zeros(0, columns, columns),
        withheld + reason,
    )


def fit_ridge(parts: Mapping[str, FoldMoments]) -> RidgeCandidates:
    """Every candidate from the `fold_moments` of the sites, by name.

    A fold is left out by summing the others. A site told as a whole is a fold of its own.

    Raises:
        NotEvaluableError: fewer than two folds are told: nothing could be left out.
    """
    names, count, mean, covariance = [], [], [], []
    for site in sorted(parts):
        part = parts[site]
        names += [f"site {site}" if fold == WHOLE else str(int(fold)) for fold in part.fold_G.tolist()]
        count.append(part.count_G.double())
        mean.append(part.mean_GD.double())
        covariance.append(part.covariance_GDD.double())
    folds = tuple(sorted(set(names)))
    notes = notes_of(parts)
    if len(folds) < 2:
        raise NotEvaluableError(f"age: folds told by the sites must be at least 2, got {len(folds)!r}. {'; '.join(notes)}")
    count_G, mean_GD, covariance_GDD = torch.cat(count), torch.cat(mean), torch.cat(covariance)
    alpha_A = torch.tensor(RIDGE_ALPHAS, dtype=torch.float64)
    models = [
        _ridge(*_merged(count_G[kept], mean_GD[kept], covariance_GDD[kept]), alpha_A)
        for left_out in (*folds, None)
        for kept in [torch.tensor([name != left_out for name in names])]
    ]
    weights, intercepts = zip(*models, strict=True)
    return RidgeCandidates(folds, alpha_A, torch.stack(weights), torch.stack(intercepts), notes)


def age_errors(
    candidates: RidgeCandidates,
    train: tuple[Tensor, Tensor, Tensor] | None,
    test: tuple[Tensor, Tensor],
    *,
    site: str,
    policy: MomentPolicy,
) -> AgeErrors:
    """A site's errors, as means over no fewer subjects than its policy asks for a mean.

    Args:
        candidates: from `fit_ridge`.
        train: what the site gave `fold_moments`; None at a site that took no part in the fit.
        test: features (N, F) and age (N,) of held-out subjects; unknown ages take no part.
        site: its name.
        policy: what the site lets out.
    """
    folds, alphas = len(candidates.folds), len(candidates.alpha_A)
    fold_count_L, fold_absolute_LA = torch.zeros(folds), torch.zeros(folds, alphas, dtype=torch.float64)
    if train is not None:
        x_NF, age_N, fold_N = train
        known_N = age_N.isfinite()
        told_N, _ = _told_folds(fold_N[known_N], x_NF.shape[1] + 1, policy)
        for fold in torch.unique(told_N).tolist() if told_N is not None else ():
            position = candidates.folds.index(f"site {site}" if fold == WHOLE else str(fold))
            members = told_N == fold
            error_NA = _errors(candidates, position, x_NF[known_N][members], age_N[known_N][members])
            fold_count_L[position] = policy.rounded(len(error_NA))
            fold_absolute_LA[position] = error_NA.abs().mean(dim=0)
    known_N = test[1].isfinite()
    withheld: tuple[str, ...] = () if known_N.all() else ("held-out subjects without an age take no part in the age probe",)
    x_NF, age_N = test[0][known_N], test[1][known_N].double()
    if len(age_N) < policy.min_group:
        zero_A = fold_absolute_LA.new_zeros(alphas)
        withheld += (f"errors of age need {policy.min_group} held-out subjects",)
        return AgeErrors(fold_count_L, fold_absolute_LA, torch.zeros(1), zero_A, zero_A, zero_A.new_zeros(2), withheld)
    error_NA = _errors(candidates, folds, x_NF, age_N)
    return AgeErrors(
        fold_count_L,
        fold_absolute_LA,
        torch.tensor([float(policy.rounded(len(age_N)))]),
        error_NA.abs().mean(dim=0),
        error_NA.square().mean(dim=0),
        torch.stack([age_N.mean(), age_N.var(correction=0)]),
        withheld,
    )


def choose_alpha(parts: Mapping[str, AgeErrors]) -> int:
    """Position of the regularisation with the smallest mean over folds of the fold's mean absolute error; the first of equals.

    Raises:
        NotEvaluableError: no fold is told.
    """
    count_SL = torch.stack([parts[site].fold_count_L.double() for site in sorted(parts)])
    absolute_SLA = torch.stack([parts[site].fold_absolute_LA.double() for site in sorted(parts)])
    count_L = count_SL.sum(dim=0)
    if not count_L.any():
        raise NotEvaluableError("age: errors of at least one fold must be told, got none.")
    error_LA = torch.einsum("sl,sla->la", count_SL, absolute_SLA)[count_L > 0] / count_L[count_L > 0, None]
    return int(error_LA.mean(dim=0).argmin())


def age_scores(parts: Mapping[str, AgeErrors], alpha: int) -> tuple[dict[str, ErrorScore], tuple[str, ...]]:
    """Scores of one candidate, at "all" sites together and at each, and notes on the sites that withhold.

    Raises:
        NotEvaluableError: every site withholds.
    """
    told = {site: part for site, part in sorted(parts.items()) if part.count > 0}
    notes = notes_of(parts)
    if not told:
        raise NotEvaluableError(f"age: errors of at least one site must be told, got none. {'; '.join(notes)}")
    return {"all": _error_score([*told.values()], alpha), **{s: _error_score([part], alpha) for s, part in told.items()}}, notes


def r2_interval(score: ErrorScore) -> tuple[float, float]:
    """A 95 % interval of R2 = 1 - MSE / variance of age that is rather too wide, for normal errors and ages.

    The logarithms of both have variance 2 / N each, and would covary only to narrow it (delta method).
    """
    half = Z_95 * 2 / math.sqrt(score.num_subjects)
    return 1 - (1 - score.r2) * math.exp(half), 1 - (1 - score.r2) * math.exp(-half)


def _told_folds(fold_N: Tensor, columns: int, policy: MomentPolicy) -> tuple[Tensor | None, tuple[str, ...]]:
    """The fold each subject is told in, None when the site withholds, and why."""
    least = max(1, policy.min_group, policy.covariance_subjects_per_feature * columns)
    if len(fold_N) < least:
        return None, (f"age probe: a covariance of {columns} columns needs {least} subjects",)
    if int(torch.unique(fold_N, return_counts=True)[1].min()) < least:
        return torch.full_like(fold_N, WHOLE), (f"age probe: told as a whole, since folds need {least} subjects each",)
    return fold_N, ()


def _ridge(count: Tensor, mean_D: Tensor, covariance_DD: Tensor, alpha_A: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalue_F, basis_FF = torch.linalg.eigh(count * covariance_DD[:-1, :-1])
    rotated_F = basis_FF.T @ (count * covariance_DD[:-1, -1])
    weight_AF = (rotated_F / (eigenvalue_F.clamp_min(0.0) + alpha_A[:, None])) @ basis_FF.T
    return weight_AF, mean_D[-1] - weight_AF @ mean_D[:-1]


def _errors(candidates: RidgeCandidates, model: int, x_NF: Tensor, age_N: Tensor) -> Tensor:
    return age_N.double()[:, None] - x_NF.double() @ candidates.weight_LAF[model].T - candidates.intercept_LA[model]


def _error_score(parts: Sequence[AgeErrors], alpha: int) -> ErrorScore:
    count_S = torch.cat([part.count for part in parts]).double()
    share_S = count_S / count_S.sum()
    mae = float(share_S @ torch.stack([part.absolute_A[alpha].double() for part in parts]))
    square = float(share_S @ torch.stack([part.square_A[alpha].double() for part in parts]))
    mean_S, variance_S = torch.stack([part.age_2.double() for part in parts]).T
    spread = float(share_S @ (variance_S + (mean_S - share_S @ mean_S).square()))
    half = Z_95 * math.sqrt(max(square - mae**2, 0.0) / float(count_S.sum()))
    r2 = 1 - square / spread if spread > 0 else math.nan
    return ErrorScore(mae, max(mae - half, 0.0), mae + half, r2, int(count_S.sum()))


def _merged(count_G: Tensor, mean_GD: Tensor, covariance_GDD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and covariance of all groups together."""
    share_G = count_G / count_G.sum()
    mean_D = share_G @ mean_GD
    offset_GD = mean_GD - mean_D
    covariance_DD = torch.einsum("g,gde->de", share_G, covariance_GDD) + (share_G[:, None] * offset_GD).T @ offset_GD
    return count_G.sum(), mean_D, covariance_DD
