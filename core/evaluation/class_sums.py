"""Site, scanner or another label from sums: linear discriminants, logistic regression, and a count of their predictions.

Linear discriminants take one exchange, multinomial logistic regression one a step. Each step of the latter tells K weighted means
of the site's subjects: after T steps as much as T K means, which LDA never does. Prefer LDA where single subjects must stay
hidden behind the first exchange's sums.

Shapes: N subjects, F features, D = F + 1 features and intercept, C classes of a site, K classes, R classes as sites tell them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from core.evaluation.intervals import NotEvaluableError
from core.evaluation.sums import covariance_of, mean_of_shares
from core.messages import check_fields, notes_of
from core.settings import MomentPolicy

Floats = npt.NDArray[np.float64]

SHRINKAGE = 0.1
SHARED = ""
"""Owner of classes that mean the same at every site, such as a diagnosis, in place of a site's name."""


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
        shapes = {"scanner_C": (classes,), "count_C": (classes,), "within_FF": (width, width)}
        check_fields("class moments", self, shapes, positive=self.count_C)


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
        check_fields("class counts", self, {"class_C": (len(self.count_CK),)}, positive=self.count_CK.sum(dim=1))
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
        check_fields("logistic gradient", self, {"loss": (1,)})


def class_moments(standard_NF: Tensor, scanner_N: Tensor, *, policy: MomentPolicy) -> ClassMoments:
    """What a site sends for `fit_lda` and `fit_logistic`.

    Args:
        standard_NF: (N, F) from `sums.standardised`, one row a training subject.
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
        within_FF = covariance_of(torch.cat([group - group.mean(dim=0) for group in groups]))
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
    classes, _, mean_KF, within_FF = _classes(parts, shared, notes_of(parts))
    if within_FF is None:
        raise NotEvaluableError(
            f"site: the covariance of at least one site must be told, got none; project to fewer directions. "
            f"{'; '.join(notes_of(parts))}"
        )
    features = len(within_FF)
    within_FF = (1 - shrinkage) * within_FF + shrinkage * within_FF.trace() / features * torch.eye(features).double()
    weight_KF = (torch.linalg.pinv(within_FF, hermitian=True) @ mean_KF.T).T
    return SiteProbe(classes, weight_KF, -(weight_KF * mean_KF).sum(dim=1) / 2, notes_of(parts))


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
    notes = notes_of(parts)
    classes, count_K, mean_KF, within_FF = _classes(parts, shared, notes)
    zero = SiteProbe(classes, torch.zeros_like(mean_KF), torch.zeros(len(classes), dtype=torch.float64), notes)
    first = ask(zero, class_weights(count_K))
    notes += tuple(note for note in notes_of(first) if note not in notes)
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
        standard_NF: (N, F) from `sums.standardised`, one row a held-out subject.
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
    notes = probe.notes + tuple(note for note in notes_of(parts) if note not in probe.notes)
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
