"""Probes across sites that keep every scan's representation at home: fitted from sums, their errors counted at the sites.

Three steps a probe, one exchange each: a site function (features, labels, policy) -> a small dataclass of arrays; a server
function (those of all sites, by name) -> what to try; a site function -> counts. Fitted on the same subjects, a probe is the
same as on pooled data. What a site withholds it says in words, and the result repeats it under the site's name.

Age: ridge regression. Site or scanner: linear discriminant analysis, one exchange; or multinomial logistic regression, one
exchange a step. Each step of the latter tells K weighted means of the site's subjects: after T steps as much as T K means,
which LDA never does. Prefer LDA where single subjects must stay hidden behind the first exchange's sums.

Features come standardised by the `core.moments.Reference` of all sites (`standardised`), and projected to few directions where
covariances of all features would need more subjects than sites have. Intervals are in closed form, since no subject can be
resampled: normal for errors, Wilson's (Zou & Donner 2008, doi:10.1002/sim.3095) for a mean of recalls.

Shapes: N subjects, F features, D = F + 1 features and age, G groups, L folds, A regularisations, K classes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from core.evaluation.intervals import NotEvaluableError
from core.moments import MomentPolicy, Reference

Floats = npt.NDArray[np.float64]

NUM_FOLDS = 5
RIDGE_ALPHAS = tuple(10.0**exponent for exponent in range(-2, 5))
SHRINKAGE = 0.1
Z_95 = 1.959963984540054
SCORE_BINS = 20
SHARED = ""
"""Owner of classes that mean the same at every site, such as a diagnosis, in place of a site's name."""
WHOLE = -1
"""Fold of a site that tells all its subjects as one group."""


# What a probe sees.


def standardised(features_NF: Tensor, reference: Reference, directions_KF: Tensor | None = None) -> Tensor:
    """Features in units of all sites' standard deviation, float64, as coordinates along the directions where these are given."""
    standard_NF = (features_NF.double() - reference.mean_D.double()) / reference.scale_D.double()
    seen_NF: Tensor = standard_NF if directions_KF is None else standard_NF @ directions_KF.double().T
    return seen_NF


def random_directions(features: int, count: int, *, seed: int) -> Tensor:
    """Orthonormal rows (count, F) that depend on the seed alone, never on data.

    Raises:
        ValueError: more directions than features.
    """
    if not 1 <= count <= features:
        raise ValueError(f"random_directions: count must be 1 to the {features} features, got {count!r}.")
    normal_FK = torch.from_numpy(np.random.default_rng(seed).normal(size=(features, count)))
    basis_FK, triangle_KK = torch.linalg.qr(normal_FK)
    directions_KF: Tensor = (basis_FK * triangle_KK.diagonal().sign()).T.contiguous()
    return directions_KF


def between_group_directions(count_G: Tensor, mean_GF: Tensor, count: int) -> Tensor:
    """Orthonormal rows (at most count, F): where group means that sites may send (`GroupMeans`, `ClassMoments`) differ most.

    Fewer than asked for when the means span fewer. A probe of the groups' labels loses least on these directions.

    Raises:
        ValueError: fewer than two groups that differ.
    """
    weight_G = count_G.double() / count_G.sum()
    centred_GF = mean_GF.double() - weight_G @ mean_GF.double()
    _, size_R, directions_RF = torch.linalg.svd(weight_G.sqrt()[:, None] * centred_GF, full_matrices=False)
    rank = int((size_R > 1e-10 * (1 + mean_GF.abs().max())).sum())
    if rank == 0:
        raise ValueError("between_group_directions: at least two group means must differ, got none that do.")
    kept_KF: Tensor = directions_RF[: min(count, rank)]
    return kept_KF


def subject_folds(subjects: Sequence[str], site: str, num_folds: int = NUM_FOLDS) -> Tensor:
    """(N,) fold of each subject, by a hash of the site and the subject: the same in every run, whoever else takes part."""
    digests = [hashlib.sha256(json.dumps([site, subject]).encode()).digest() for subject in subjects]
    return torch.tensor([int.from_bytes(digest[:8], "big") % num_folds for digest in digests], dtype=torch.long)


def num_bytes(message: Any) -> int:
    """Bytes of the arrays of one of this module's dataclasses (or of `core.combat`'s): what crosses the wire."""
    values = [getattr(message, field.name) for field in fields(message)]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


# Age by ridge regression.


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
        _check("fold moments", self, shapes, self.count_G)


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
        (folds, alphas) = self.fold_absolute_LA.shape
        shapes = {"fold_count_L": (folds,), "count": (1,), "absolute_A": (alphas,), "square_A": (alphas,), "age_2": (2,)}
        _check("age errors", self, shapes, None)


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
        standard_NF: (N, F) from `standardised`, one row a training subject.
        age_N: (N,) years, NaN where unknown: that subject takes no part.
        fold_N: (N,) from `subject_folds`.
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
        torch.stack([_covariance(group) for group, _ in groups]) if groups else rows_ND.new_zeros(0, columns, columns),
        withheld + reason,
    )


def fit_ridge(parts: Mapping[str, FoldMoments], alphas: Sequence[float] = RIDGE_ALPHAS) -> RidgeCandidates:
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
    notes = _notes(parts)
    if len(folds) < 2:
        raise NotEvaluableError(f"age: folds told by the sites must be at least 2, got {len(folds)!r}. {'; '.join(notes)}")
    count_G, mean_GD, covariance_GDD = torch.cat(count), torch.cat(mean), torch.cat(covariance)
    alpha_A = torch.tensor(alphas, dtype=torch.float64)
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
        raise NotEvaluableError("age: errors of at least one fold must be told, got none. See the notes.")
    error_LA = torch.einsum("sl,sla->la", count_SL, absolute_SLA)[count_L > 0] / count_L[count_L > 0, None]
    return int(error_LA.mean(dim=0).argmin())


def age_scores(parts: Mapping[str, AgeErrors], alpha: int) -> tuple[dict[str, ErrorScore], tuple[str, ...]]:
    """Scores of one candidate, at "all" sites together and at each, and notes on the sites that withhold.

    Raises:
        NotEvaluableError: every site withholds.
    """
    told = {site: part for site, part in sorted(parts.items()) if part.count > 0}
    notes = _notes(parts)
    if not told:
        raise NotEvaluableError(f"age: errors of at least one site must be told, got none. {'; '.join(notes)}")
    return {"all": _error_score([*told.values()], alpha), **{s: _error_score([part], alpha) for s, part in told.items()}}, notes


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


# Site or scanner.


@dataclass(frozen=True)
class ClassMoments:
    """What a site sends of its scanners: their means, and the covariance inside them together.

    Attributes:
        scanner_C: (C,) code of each scanner, unique inside the site.
        count_C: (C,) subjects, rounded by the site.
        mean_CF: (C, F) means of the standardised features.
        within_FF: (F, F) covariance about the scanners' means, divided by the count; (0, 0) where withheld.
        withheld: what is not told and why.
    """

    scanner_C: Tensor
    count_C: Tensor
    mean_CF: Tensor
    within_FF: Tensor
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        classes, features = self.mean_CF.shape
        width = features if len(self.within_FF) else 0
        _check("class moments", self, {"scanner_C": (classes,), "count_C": (classes,), "within_FF": (width, width)}, self.count_C)


@dataclass(frozen=True)
class SiteProbe:
    """A linear probe of K classes: the largest of x W' + b wins.

    Attributes:
        classes: site and scanner code of each class, or `SHARED` and the label's code, sorted.
        weight_KF: (K, F) of the standardised features.
        intercept_K: (K,).
        notes: what took no part and why.
    """

    classes: tuple[tuple[str, int], ...]
    weight_KF: Tensor
    intercept_K: Tensor
    notes: tuple[str, ...] = ()

    def decisions(self, standard_NF: Tensor) -> Tensor:
        """(N, K) decision values."""
        return standard_NF.double() @ self.weight_KF.T + self.intercept_K

    def indices(self, site: str, scanner_N: Tensor) -> Tensor:
        """(N,) class of each subject of a site, -1 for a scanner that is no class."""
        position = {code: index for index, (owner, code) in enumerate(self.classes) if owner in (site, SHARED)}
        return torch.tensor([position.get(int(code), -1) for code in scanner_N], dtype=torch.long)


@dataclass(frozen=True)
class ClassCounts:
    """How many held-out subjects of each of a site's scanners the probe takes for each class.

    Attributes:
        class_C: (C,) the scanners' classes in the probe.
        count_CK: (C, K) predictions, each rounded by the site.
        withheld: what is not told and why.
    """

    class_C: Tensor
    count_CK: Tensor
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("class counts", self, {"class_C": (len(self.count_CK),)}, self.count_CK.sum(dim=1))
        if (self.count_CK < 0).any():
            raise ValueError("class counts: counts must be at least 0, got some below. Ask the site for its log.")


@dataclass(frozen=True)
class AccuracyScore:
    """Balanced accuracy with its 95 % interval, and what it comes from.

    Attributes:
        balanced_accuracy: mean recall over the classes that were told.
        low: lower bound.
        high: upper bound.
        classes: those classes.
        count_CK: (C, K) their subjects by predicted class.
        notes: what took no part and why.
    """

    balanced_accuracy: float
    low: float
    high: float
    classes: tuple[tuple[str, int], ...]
    count_CK: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LogisticGradient:
    """A site's part of the loss at one step.

    Attributes:
        loss: (1,) sum over its subjects of class weight times cross entropy.
        gradient_KD: (K, D) its gradient, the intercept last; (0, 0) where withheld.
        withheld: why it is.
    """

    loss: Tensor
    gradient_KD: Tensor
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("logistic gradient", self, {"loss": (1,)}, None)


def class_moments(standard_NF: Tensor, scanner_N: Tensor, *, policy: MomentPolicy) -> ClassMoments:
    """What a site sends for `fit_lda` and `fit_logistic`.

    Args:
        standard_NF: (N, F) from `standardised`, one row a training subject.
        scanner_N: (N,) integer code of the scanner; zeros to tell sites, not scanners, apart; the code of a label, such as the
            diagnosis, for a probe of shared classes.
        policy: what the site lets out.
    """
    x_NF, features = standard_NF.double(), standard_NF.shape[1]
    codes, count_C = torch.unique(scanner_N, return_counts=True)
    told = count_C >= policy.min_group
    withheld = tuple(f"scanner {int(code)} is no class: its mean needs {policy.min_group} subjects" for code in codes[~told])
    groups = [x_NF[scanner_N == code] for code in codes[told]]
    least = policy.covariance_subjects_per_feature * features
    within_FF = x_NF.new_zeros(0, 0)
    if groups and int(count_C[told].sum()) >= least:
        within_FF = _covariance(torch.cat([group - group.mean(dim=0) for group in groups]))
    elif groups:
        withheld += (f"site probe: only means are told, a covariance of {features} features needs {least} subjects",)
    return ClassMoments(
        codes[told].double(),
        torch.tensor([float(policy.rounded(len(group))) for group in groups], dtype=torch.float64),
        torch.stack([group.mean(dim=0) for group in groups]) if groups else x_NF.new_zeros(0, features),
        within_FF,
        withheld,
    )


def fit_lda(parts: Mapping[str, ClassMoments], *, shrinkage: float = SHRINKAGE, shared: bool = False) -> SiteProbe:
    """Linear discriminants of equally likely classes, from the `class_moments` of the sites, by name.

    The covariance inside classes is the mean over subjects of the sites that tell theirs, with ``shrinkage`` of the way to a
    multiple of the identity (Friedman 1989): scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr")`` but for the priors.

    Args:
        parts: `class_moments` by site.
        shrinkage: 0 for none, 1 for a multiple of the identity.
        shared: codes mean the same at every site.

    Raises:
        NotEvaluableError: fewer than two classes, or every site withholds its covariance.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"fit_lda: shrinkage must be between 0 and 1, got {shrinkage!r}.")
    classes, _, mean_KF, within_FF = _classes(parts, shared, _notes(parts))
    if within_FF is None:
        raise NotEvaluableError(
            f"site: the covariance of at least one site must be told, got none; project to fewer directions. "
            f"{'; '.join(_notes(parts))}"
        )
    features = len(within_FF)
    within_FF = (1 - shrinkage) * within_FF + shrinkage * within_FF.trace() / features * torch.eye(features).double()
    weight_KF = (torch.linalg.pinv(within_FF, hermitian=True) @ mean_KF.T).T
    return SiteProbe(classes, weight_KF, -(weight_KF * mean_KF).sum(dim=1) / 2, _notes(parts))


def logistic_gradient(
    probe: SiteProbe, class_weight_K: Tensor, standard_NF: Tensor, scanner_N: Tensor, *, site: str, policy: MomentPolicy
) -> LogisticGradient:
    """A site's part of the loss and its gradient; subjects whose scanner is no class take no part.

    A gradient is K weighted means, as a covariance is F: it needs ``covariance_subjects_per_feature * K`` subjects, at each step.

    Args:
        probe: weights of this step.
        class_weight_K: (K,) from `class_weights`.
        standard_NF: (N, F) what the site gave `class_moments`.
        scanner_N: (N,) likewise.
        site: its name.
        policy: what the site lets out.
    """
    class_N = probe.indices(site, scanner_N)
    x_NF, class_N = standard_NF[class_N >= 0].double(), class_N[class_N >= 0]
    least = max(policy.min_group, policy.covariance_subjects_per_feature * len(probe.classes))
    if len(class_N) < least:
        reason = f"logistic site probe: gradients of {len(probe.classes)} classes need {least} subjects"
        return LogisticGradient(torch.zeros(1, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64), (reason,))
    log_probability_NK = probe.decisions(x_NF).log_softmax(dim=1)
    weight_N = class_weight_K[class_N]
    error_NK = weight_N[:, None] * (log_probability_NK.exp() - torch.nn.functional.one_hot(class_N, len(probe.classes)))
    loss = -(weight_N * log_probability_NK.gather(1, class_N[:, None]).squeeze(1)).sum()
    return LogisticGradient(loss[None], torch.cat([error_NK.T @ x_NF, error_NK.sum(dim=0)[:, None]], dim=1))


def fit_logistic(
    parts: Mapping[str, ClassMoments],
    ask: Callable[[SiteProbe, Tensor], Mapping[str, LogisticGradient]],
    *,
    c: float = 1.0,
    shared: bool = False,
    tolerance: float = 1e-3,
    max_exchanges: int = 100,
) -> SiteProbe:
    """Multinomial logistic regression with class-balanced weights, by gradients from the sites.

    The minimum of c * (weighted cross entropy) + |W|^2 / 2 with free intercepts, as scikit-learn's `LogisticRegression` on
    pooled data, by L-BFGS in coordinates in which the loss is round at zero weights: they come from the class moments and
    save exchanges. Sites that withhold their gradient are left out, with their classes, after the first.

    Args:
        parts: `class_moments` by site.
        ask: sends weights and class weights to the sites and brings their `logistic_gradient` by name.
        c: inverse strength of the penalty.
        shared: codes mean the same at every site.
        tolerance: largest entry of the gradient at the end, in coordinates in which the curvature at zero is 1.
        max_exchanges: the fit stops once it had as many, and says so in a note when it had not converged.

    Raises:
        NotEvaluableError: fewer than two classes are told.
    """
    notes = _notes(parts)
    classes, count_K, mean_KF, within_FF = _classes(parts, shared, notes)
    zero = SiteProbe(classes, torch.zeros_like(mean_KF), torch.zeros(len(classes), dtype=torch.float64), notes)
    first = ask(zero, class_weights(count_K))
    notes += tuple(note for note in _notes(first) if note not in notes)
    silent = {site for site, part in first.items() if not len(part.gradient_KD)}
    if silent:
        parts = {site: part for site, part in parts.items() if site not in silent}
        classes, count_K, mean_KF, within_FF = _classes(parts, shared, notes)
    features, weight_K = mean_KF.shape[1], class_weights(count_K)
    # Two classes have one vector of weights in scikit-learn: |w|^2 of it is twice |W|^2 of ours, (-w / 2, w / 2).
    penalty = 2.0 if len(classes) == 2 else 1.0
    curvature = c * float(count_K.sum()) / len(classes)
    spread_FF = torch.eye(features).double() if within_FF is None else within_FF + mean_KF.T @ mean_KF / len(classes)
    root_FF = torch.linalg.cholesky(curvature * spread_FF + penalty * torch.eye(features).double())

    def at(theta: Floats) -> SiteProbe:
        round_KD = torch.from_numpy(theta).reshape(len(classes), features + 1)
        weight_KF = torch.linalg.solve_triangular(root_FF, round_KD[:, :-1], upper=False, left=False)
        return SiteProbe(classes, weight_KF, round_KD[:, -1] / math.sqrt(curvature), notes)

    def objective(theta: Floats) -> tuple[float, Floats]:
        probe = at(theta)
        answers = ask(probe, weight_K)
        told = [answers[site] for site in sorted(parts)]
        gradient_KD = c * torch.stack([part.gradient_KD.double() for part in told]).sum(dim=0)
        gradient_KF = gradient_KD[:, :-1] + penalty * probe.weight_KF
        back_KF = torch.linalg.solve_triangular(root_FF.T, gradient_KF, upper=True, left=False)
        loss = c * float(torch.cat([part.loss for part in told]).sum()) + penalty * float(probe.weight_KF.square().sum()) / 2
        return loss, torch.cat([back_KF, gradient_KD[:, -1:] / math.sqrt(curvature)], dim=1).flatten().numpy()

    found = minimize(
        objective,
        np.zeros(len(classes) * (features + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxcor": 50, "ftol": 0.0, "gtol": tolerance, "maxfun": max_exchanges - 1},
    )
    largest = float(np.abs(found.jac).max())
    if largest > tolerance:
        notes += (f"logistic site probe: not converged after {found.nfev + 1} exchanges, largest gradient {largest:.1e}",)
    return at(found.x)


def class_weights(count_K: Tensor) -> Tensor:
    """(K,) weights by which every class counts as much: mean count over count."""
    return count_K.sum() / (len(count_K) * count_K)


def count_classes(probe: SiteProbe, standard_NF: Tensor, scanner_N: Tensor, *, site: str, policy: MomentPolicy) -> ClassCounts:
    """How the probe takes a site's held-out subjects, for scanners with as many as the site's policy asks for a mean.

    Args:
        probe: fitted.
        standard_NF: (N, F) from `standardised`, one row a held-out subject.
        scanner_N: (N,) integer code of the scanner.
        site: its name.
        policy: what the site lets out; counts are rounded by it, small ones to 0.
    """
    class_N, predicted_N = probe.indices(site, scanner_N), probe.decisions(standard_NF).argmax(dim=1)
    withheld: tuple[str, ...] = ()
    told, counts = [], []
    for index, (owner, code) in enumerate(probe.classes):
        if owner not in (site, SHARED):
            continue
        count_K = predicted_N[class_N == index].bincount(minlength=len(probe.classes)).double()
        rounded_K = policy.round_counts_to * (count_K / policy.round_counts_to).round()
        if count_K.sum() < policy.min_group or not rounded_K.any():
            withheld += (f"scanner {code} is not scored: that needs {policy.min_group} held-out subjects",)
            continue
        told.append(float(index))
        counts.append(rounded_K)
    return ClassCounts(
        torch.tensor(told, dtype=torch.float64),
        torch.stack(counts) if counts else torch.zeros(0, len(probe.classes), dtype=torch.float64),
        withheld,
    )


def site_score(probe: SiteProbe, parts: Mapping[str, ClassCounts]) -> AccuracyScore:
    """Balanced accuracy from the `count_classes` of the sites, by name.

    Raises:
        NotEvaluableError: fewer than two classes are told.
    """
    notes = probe.notes + tuple(note for note in _notes(parts) if note not in probe.notes)
    count_of: dict[int, Tensor] = {}
    for site in sorted(parts):
        for k, row_K in zip(parts[site].class_C.long().tolist(), parts[site].count_CK.double(), strict=True):
            count_of[k] = count_of.get(k, torch.zeros_like(row_K)) + row_K
    if len(count_of) < 2:
        raise NotEvaluableError(f"site: classes scored must be at least 2, got {len(count_of)!r}. {'; '.join(notes)}")
    count_CK = torch.stack([count_of[k] for k in sorted(count_of)])
    hits_C, total_C = torch.stack([count_of[k][k] for k in sorted(count_of)]), count_CK.sum(dim=1)
    value, low, high = mean_of_shares(hits_C, total_C)
    return AccuracyScore(value, low, high, tuple(probe.classes[k] for k in sorted(count_of)), count_CK, notes)


def mean_of_shares(hits_C: Tensor, total_C: Tensor) -> tuple[float, float, float]:
    """Mean of independent shares with its 95 % interval from each one's Wilson interval (Zou & Donner 2008, section 2)."""
    share_C = hits_C / total_C
    centre_C = (hits_C + Z_95**2 / 2) / (total_C + Z_95**2)
    half_C = Z_95 / (total_C + Z_95**2) * (hits_C * (1 - share_C) + Z_95**2 / 4).sqrt()
    below = float((share_C - centre_C + half_C).norm()) / len(share_C)
    above = float((centre_C + half_C - share_C).norm()) / len(share_C)
    value = float(share_C.mean())
    return value, max(value - below, 0.0), min(value + above, 1.0)


def _classes(
    parts: Mapping[str, ClassMoments], shared: bool, notes: tuple[str, ...]
) -> tuple[tuple[tuple[str, int], ...], Tensor, Tensor, Tensor | None]:
    """Classes in order, their counts and means, and the covariance inside them over the sites that tell it."""
    rows = [(site, int(code)) for site in sorted(parts) for code in parts[site].scanner_C]
    names = [(SHARED, code) if shared else (site, code) for site, code in rows]
    classes = tuple(sorted(set(names)))
    if len(classes) < 2:
        raise NotEvaluableError(f"site: classes told must be at least 2, got {len(classes)!r}. {'; '.join(notes)}")
    class_R = torch.tensor([classes.index(name) for name in names])
    count_R = torch.cat([parts[site].count_C.double() for site in sorted(parts)])
    mean_RF = torch.cat([parts[site].mean_CF.double() for site in sorted(parts)])
    member_KR = (torch.arange(len(classes))[:, None] == class_R) * count_R
    count_K = member_KR.sum(dim=1)
    mean_KF = member_KR @ mean_RF / count_K[:, None]
    told = [site for site in sorted(parts) if len(parts[site].within_FF)]
    if not told:
        return classes, count_K, mean_KF, None
    count_S = torch.stack([parts[site].count_C.double().sum() for site in told])
    within_FF = torch.einsum("s,sfg->fg", count_S, torch.stack([parts[site].within_FF.double() for site in told]))
    # Sites that share a class scatter about its mean; where classes are the sites' own this is zero.
    weight_R = count_R * torch.tensor([site in told for site, _ in rows])
    offset_RF = mean_RF - mean_KF[class_R]
    return classes, count_K, mean_KF, (within_FF + (weight_R[:, None] * offset_RF).T @ offset_RF) / count_S.sum()


# A binary label by its scores.


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
        _check("score counts", self, {"count_2E": (2, self.count_2E.shape[-1])}, None)
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


def area_under_curve(parts: Mapping[str, ScoreCounts]) -> tuple[float, float, tuple[str, ...]]:
    """Area under the ROC curve of all sites' subjects, its largest error by binning, and notes.

    Pairs in one bin count half, as ties: the area of the unbinned scores is not further away than half of their share. What
    rounding of the counts adds is not in that bound.

    Raises:
        NotEvaluableError: no site tells a label's scores.
    """
    notes = _notes(parts)
    told = [parts[site].count_2E.double() for site in sorted(parts) if parts[site].count_2E.shape[1]]
    if not told or not torch.stack(told).sum(dim=(0, 2)).all():
        raise NotEvaluableError(f"auc: scores of both labels must be told, got none of one. {'; '.join(notes)}")
    negative_E, positive_E = torch.stack(told).sum(dim=0)
    pairs = negative_E.sum() * positive_E.sum()
    tied = float((positive_E * negative_E).sum() / pairs) / 2
    below = float((positive_E * (negative_E.cumsum(0) - negative_E)).sum() / pairs)
    return below + tied, tied, notes


# What all share.


def _covariance(rows_ND: Tensor) -> Tensor:
    centred_ND = rows_ND - rows_ND.mean(dim=0)
    return centred_ND.T @ centred_ND / len(rows_ND)


def _merged(count_G: Tensor, mean_GD: Tensor, covariance_GDD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and covariance of all groups together."""
    share_G = count_G / count_G.sum()
    mean_D = share_G @ mean_GD
    offset_GD = mean_GD - mean_D
    covariance_DD = torch.einsum("g,gde->de", share_G, covariance_GDD) + (share_G[:, None] * offset_GD).T @ offset_GD
    return count_G.sum(), mean_D, covariance_DD


def _notes(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{site}: {reason}" for site in sorted(parts) for reason in parts[site].withheld)


def _check(where: str, message: Any, shapes: Mapping[str, tuple[int, ...]], count: Tensor | None) -> None:
    for name, shape in shapes.items():
        if tuple(getattr(message, name).shape) != shape:
            raise ValueError(f"{where}: {name} must have shape {shape}, got {tuple(getattr(message, name).shape)}.")
    values = [getattr(message, field.name) for field in fields(message)]
    if not all(value.isfinite().all() for value in values if isinstance(value, Tensor)):
        raise ValueError(f"{where}: values must be finite, got some that are not. Ask the site for its log.")
    if count is not None and (count <= 0).any():
        raise ValueError(f"{where}: counts must be positive, got {count.tolist()!r}. Ask the site for its log.")
