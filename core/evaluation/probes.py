"""Frozen probes: what can be read from a representation of held-out subjects.

A probe is fitted on the scans of split `train`, z-scored with their statistics, its regularisation chosen by 5-fold
cross-validation over train subjects, and scored on the scans of split `test`. The probes named `heldout` never see
`train`: they are cross-validated among the test subjects, because an eraser or a harmonisation that was fitted on `train`
can hide the site from every probe fitted there and still leave it in new subjects. Intervals resample test subjects; the
fitted probe is kept, so they tell how far other subjects could move the figure, not another training.

Shapes: N scans, F features, K classes, A regularisation strengths. Everything is deterministic given the seed.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, NotEvaluableError
from core.evaluation.openbhb import openbhb_outcomes
from core.evaluation.outcomes import (
    Floats,
    Ints,
    Ledger,
    Notes,
    Outcome,
    Results,
    area_under_curve,
    balanced_accuracy,
    explained_share,
    mean_absolute_error,
    mean_bias,
    slope,
)
from core.evaluation.participants import (
    MIN_TRAIN_SUBJECTS,
    Attribute,
    age_and_sex,
    at_sites,
    healthy_scans,
    healthy_with_age,
    held_out_classes,
    labels_of,
    num_subjects,
    site_classes,
    train_test,
)
from core.evaluation.spread import spread_outcomes

logger = logging.getLogger(__name__)

LOGISTIC_C = (1e-2, 1e-1, 1e0, 1e1, 1e2)
RIDGE_ALPHAS = tuple(10.0**exponent for exponent in range(-2, 5))
NUM_FOLDS = 5
NUM_NEIGHBORS = 10
MAX_BOOSTED_COMPONENTS = 50
Given = ParamSpec("Given")
Told = TypeVar("Told")
BOOSTING = {"max_iter": 50, "learning_rate": 0.1, "max_leaf_nodes": 8, "min_samples_leaf": 5, "max_bins": 31}


def one_thread(function: Callable[Given, Told]) -> Callable[Given, Told]:
    """Keep BLAS and OpenMP to one thread: small fits lose many times over, waiting for each other, what threads gain in them."""

    @wraps(function)
    def limited(*args: Given.args, **kwargs: Given.kwargs) -> Told:
        with threadpool_limits(limits=1):
            return function(*args, **kwargs)

    return limited


def evaluate(
    embeddings: Embeddings,
    *,
    stage: str,
    regime: str,
    seed: int,
    num_resamples: int = 1000,
    known_sites: Collection[str] | None = None,
    official: bool = False,
    outcomes: tuple[list[Outcome], list[str]] | None = None,
) -> Results:
    """Every figure the data allow: site and scanner predictability, age, sex, diagnosis, and how sites lie.

    Args:
        embeddings: Train and test scans.
        stage: raw, untrained, pretrained or erased; another word for somebody else's representation.
        regime: federated, pooled or local-only.
        seed: Of the run.
        num_resamples: Of the bootstrap.
        known_sites: The sites that took part in pretraining; site, scanner and age are probed there, and age also at
            the other sites as unseen ones. All sites when not given.
        official: Whether to add the OpenBHB protocol, whose solver is slow: minutes with many sites.
        outcomes: What `probe_outcomes` gave for these scans and arguments, when it is at hand.

    Returns:
        The evaluations, and one note for each task or figure that could not be evaluated and each group left out.
        The constants to compare with come from `chance_and_floor`, once a run.
    """
    found, texts = outcomes or probe_outcomes(embeddings, seed=seed, known_sites=known_sites, official=official)
    ledger = Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    ledger.notes.texts += [text if text.startswith("Not evaluated: ") else f"{stage}: {text}" for text in texts]
    return ledger.add(found).results


@one_thread
def probe_outcomes(
    embeddings: Embeddings, *, seed: int, known_sites: Collection[str] | None = None, official: bool = False
) -> tuple[list[Outcome], list[str]]:
    """What every probe and distribution figure says of each held-out scan.

    Two tables of the same scans give outcomes that `outcomes.paired_difference` compares; `evaluate` turns them into figures
    without fitting a probe again.

    Args:
        embeddings: Train and test scans.
        seed: Of folds and draws.
        known_sites: As in `evaluate`.
        official: As in `evaluate`.

    Returns:
        Outcomes over all sites and, of age, at each; notes on what is missing and why.
    """
    notes = Notes()
    at_known = embeddings.select(at_sites(embeddings, known_sites))
    tasks: list[Callable[[], list[Outcome]]] = [
        partial(_site_outcomes, at_known, "site", notes, seed=seed),
        partial(_held_out_outcomes, at_known, "site", notes, seed=seed),
        partial(_site_outcomes, at_known, "scanner", notes, seed=seed),
        partial(_held_out_outcomes, at_known, "scanner", notes, seed=seed),
        partial(spread_outcomes, at_known, notes, seed=seed),
        partial(_age_outcomes, embeddings, notes, seed=seed, known_sites=known_sites),
        partial(_leave_site_out_outcomes, at_known, notes, seed=seed),
        partial(_sex_outcomes, embeddings, notes, seed=seed),
        partial(_diagnosis_outcomes, embeddings, notes, seed=seed),
    ]
    if official:
        tasks.append(partial(openbhb_outcomes, embeddings, notes, seed=seed, known_sites=known_sites))
    return _all_that_apply(tasks, notes), list(dict.fromkeys(notes.texts))


@one_thread
def chance_and_floor(embeddings: Embeddings, *, regime: str, seed: int, num_resamples: int = 1000) -> Results:
    """What site predictability is compared with: chance, and what age and sex alone give away.

    Chance is 1 / number of sites: of the probes fitted on train, and of those among held-out subjects, where fewer sites may have
    enough. The floor is every site probe on a spline of age, and sex, in place of h, each under the metric of the probe it is
    the floor of: site is confounded with age, so a representation that keeps all of age cannot be expected below it. The
    same for scanners. Call it once a run, with the embeddings of any stage: h is not used. Healthy scans without age or sex
    take no part in the floor.

    Returns:
        Evaluations of stages chance and age_sex_floor, and notes.
    """
    ledger = Ledger(stage="age_sex_floor", regime=regime, seed=seed, num_resamples=num_resamples)
    healthy = healthy_scans(embeddings, ledger.notes)
    known = np.isfinite(healthy.age_years) & (healthy.sex != "")

    def chance(attribute: Attribute, metric: str, num_classes: int, test: Embeddings) -> None:
        ledger.evaluations.append(
            Evaluation(
                stage="chance",
                task=attribute,
                metric=metric,
                value=1 / num_classes,
                low=None,
                high=None,
                regime=regime,
                site="all",
                num_subjects=num_subjects(test),
                seed=seed,
            )
        )

    def of_train(attribute: Attribute) -> list[Outcome]:
        _, test, classes = site_classes(healthy, attribute, ledger.notes)
        chance(attribute, "balanced_accuracy", len(classes), test)
        return floor(_site_outcomes, attribute)

    def of_held_out(attribute: Attribute) -> list[Outcome]:
        test, classes = held_out_classes(healthy, attribute, ledger.notes)
        chance(attribute, "balanced_accuracy_heldout", len(classes), test)
        return floor(_held_out_outcomes, attribute)

    def floor(outcomes_of: Callable[..., list[Outcome]], attribute: Attribute) -> list[Outcome]:
        if not known.any():
            ledger.notes.add(f"{attribute}: no healthy scan has both an age and a sex")
            return []
        if not known.all():
            ledger.notes.add(f"{attribute}: {(~known).sum()} healthy scans without age or sex take no part")
        return outcomes_of(age_and_sex(healthy.select(known)), attribute, ledger.notes, seed=seed)

    tasks = [partial(of, attribute) for attribute in ("site", "scanner") for of in (of_train, of_held_out)]
    return ledger.add(_all_that_apply(tasks, ledger.notes)).results


def site_predictability(
    embeddings: Embeddings,
    *,
    attribute: Attribute = "site",
    stage: str,
    regime: str,
    seed: int,
    num_resamples: int = 1000,
) -> Results:
    """Balanced accuracy of predicting the site (or scanner) of healthy subjects from h.

    A linear probe (multinomial logistic regression) and, because a linear one can be fooled, 10 nearest neighbours with
    votes weighted by inverse class frequency, and gradient-boosted trees on at most 50 principal components. A scanner is one
    scanner of one site. A class takes part with at least 5 train subjects and 1 test subject; the others are named in
    the notes. In a resample without any subject of a class the mean runs over the classes it has.

    The linear probe and the neighbours also among held-out subjects alone (`balanced_accuracy_heldout`,
    `balanced_accuracy_knn_heldout`): cross-validated over test subjects, the choice of C inside each fold, classes with at
    least 5 of them. Far fewer scans fit these probes, so they are weaker: compare them with their own chance and floor.
    Clearly below chance, they say that whatever removed the site had met these scans.

    Raises:
        NotEvaluableError: Fewer than 2 such classes, or scanners that are the sites.
    """
    ledger = Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    outcomes = _site_outcomes(embeddings, attribute, ledger.notes, seed=seed)
    outcomes += _all_that_apply([partial(_held_out_outcomes, embeddings, attribute, ledger.notes, seed=seed)], ledger.notes)
    return ledger.add(outcomes).results


def age_error(
    embeddings: Embeddings,
    *,
    stage: str,
    regime: str,
    seed: int,
    num_resamples: int = 1000,
    known_sites: Collection[str] | None = None,
) -> Results:
    """Error in years of age from h by ridge regression, healthy subjects: mean absolute error, bias, R2 and slope.

    `mae` and `bias` (predicted minus true) overall and by site; `r2` and `slope` (of predicted on true: below 1 the old are
    taken for too young) overall. With `known_sites` the probe is fitted and tested there, and its error on every healthy
    subject of the other sites, which neither it nor the encoder has met, is `mae_unseen` and `bias_unseen`.

    `mae_leave_site_out`: the same test subjects, each scored by a ridge fitted on the train subjects of all other known
    sites. Its difference from `mae` is what it costs the probe not to have met the site; the encoder has met it.

    Raises:
        NotEvaluableError: Fewer than 5 train or 1 test subjects with an age.
    """
    ledger = Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    outcomes = _age_outcomes(embeddings, ledger.notes, seed=seed, known_sites=known_sites)
    at_known = embeddings.select(at_sites(embeddings, known_sites))
    outcomes += _all_that_apply([partial(_leave_site_out_outcomes, at_known, ledger.notes, seed=seed)], ledger.notes)
    return ledger.add(outcomes).results


def sex_auc(embeddings: Embeddings, *, stage: str, regime: str, seed: int, num_resamples: int = 1000) -> Results:
    """Area under the ROC curve of sex (male positive) from h by a logistic probe, all scans with a known sex.

    Raises:
        NotEvaluableError: A sex with fewer than 5 train or 1 test subjects.
    """
    ledger = Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    return ledger.add(_sex_outcomes(embeddings, ledger.notes, seed=seed)).results


def diagnosis_auc(embeddings: Embeddings, *, stage: str, regime: str, seed: int, num_resamples: int = 1000) -> Results:
    """Area under the ROC curve of diagnosis (patient positive) from h by a logistic probe.

    Only sites with both patients and controls in train take part: elsewhere the site would give the diagnosis away.

    Raises:
        NotEvaluableError: A diagnosis with fewer than 5 train or 1 test subjects at those sites.
    """
    ledger = Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    return ledger.add(_diagnosis_outcomes(embeddings, ledger.notes, seed=seed)).results


def planar_map(embeddings: Embeddings, *, seed: int = 0) -> Floats:
    """(N, 2) t-SNE coordinates of z-scored h, started from its principal components.

    Raises:
        NotEvaluableError: Fewer than 5 scans, or all representations equal.
    """
    if len(embeddings) < 5:
        raise NotEvaluableError(f"planar_map: scans must be at least 5 for a map, got {len(embeddings)!r}.")
    z_scored_NF = StandardScaler().fit_transform(embeddings.h_NF.astype(np.float64))
    if not z_scored_NF.any():
        raise NotEvaluableError("planar_map: representations must differ between scans, got one value for all.")
    components = min(50, *z_scored_NF.shape)
    reduced_NC = PCA(components, svd_solver="full").fit_transform(z_scored_NF)
    if components < 2:
        reduced_NC = np.pad(reduced_NC, ((0, 0), (0, 1)))
    start_N2 = reduced_NC[:, :2] / reduced_NC[:, 0].std() * 1e-4
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    layout = TSNE(perplexity=perplexity, init=start_N2.astype(np.float32), random_state=seed, max_iter=500)
    return np.asarray(layout.fit_transform(reduced_NC), dtype=np.float64)


def _all_that_apply(tasks: Sequence[Callable[[], list[Outcome]]], notes: Notes) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for task in tasks:
        try:
            outcomes += task()
        except NotEvaluableError as reason:
            notes.refused(reason)
    return outcomes


def _of_scans(scans: Embeddings, task: str, metric: str, measure: Any, truth_N: Any, predicted_N: Any) -> Outcome:
    return Outcome(
        task=task,
        metric=metric,
        measure=measure,
        truth_N=truth_N,
        predicted_N=predicted_N,
        subjects_N=scans.subjects,
        site_N=scans.site,
    )


def _site_outcomes(embeddings: Embeddings, attribute: Attribute, notes: Notes, *, seed: int) -> list[Outcome]:
    train, test, classes = site_classes(healthy_scans(embeddings, notes), attribute, notes)
    train_class_N = np.searchsorted(classes, labels_of(train, attribute))
    test_class_N = np.searchsorted(classes, labels_of(test, attribute))
    predicted = {
        "balanced_accuracy": _logistic_probe(train, train_class_N, test, seed).argmax(axis=1),
        "balanced_accuracy_knn": _neighbor_probe(train, train_class_N, test),
        "balanced_accuracy_boosting": _boosting_probe(train, train_class_N, test, seed),
    }
    return [_of_scans(test, attribute, metric, balanced_accuracy, test_class_N, p_N) for metric, p_N in predicted.items()]


def _held_out_outcomes(embeddings: Embeddings, attribute: Attribute, notes: Notes, *, seed: int) -> list[Outcome]:
    scans, classes = held_out_classes(healthy_scans(embeddings, notes), attribute, notes)
    class_N = np.searchsorted(classes, labels_of(scans, attribute))
    fold_N = _folds(scans.subjects, class_N, seed)
    linear_N, neighbors_N = np.empty_like(class_N), np.empty_like(class_N)
    for fold in range(NUM_FOLDS):
        inside = scans.select(fold_N != fold)
        outside = scans.select(fold_N == fold)
        linear_N[fold_N == fold] = _logistic_probe(inside, class_N[fold_N != fold], outside, seed).argmax(axis=1)
        neighbors_N[fold_N == fold] = _neighbor_probe(inside, class_N[fold_N != fold], outside)
    return [
        _of_scans(scans, attribute, "balanced_accuracy_heldout", balanced_accuracy, class_N, linear_N),
        _of_scans(scans, attribute, "balanced_accuracy_knn_heldout", balanced_accuracy, class_N, neighbors_N),
    ]


def _age_outcomes(
    embeddings: Embeddings, notes: Notes, *, seed: int, known_sites: Collection[str] | None = None
) -> list[Outcome]:
    healthy = healthy_with_age(embeddings, notes)
    at_known = at_sites(healthy, known_sites)
    train, test = train_test(healthy.select(at_known))
    num_train, num_test = num_subjects(train), num_subjects(test)
    if num_train < MIN_TRAIN_SUBJECTS or num_test < 1:
        raise NotEvaluableError(
            f"age: healthy subjects with an age must be at least {MIN_TRAIN_SUBJECTS} in train and 1 in test, "
            f"got {(num_train, num_test)!r}."
        )
    predict = _ridge_probe(train, seed)
    outcomes = []
    for ending, scans in (("", test), ("_unseen", healthy.select(~at_known))):
        if not len(scans):
            continue
        predicted_N = predict(scans)
        mae = _of_scans(scans, "age", f"mae{ending}", mean_absolute_error, scans.age_years, predicted_N)
        bias = replace(mae, metric=f"bias{ending}", measure=mean_bias)
        outcomes += [mae, *mae.by_site()]
        if not ending:
            outcomes += [replace(mae, metric="r2", measure=explained_share), replace(mae, metric="slope", measure=slope)]
        outcomes += [bias, *bias.by_site()]
    return outcomes


def _leave_site_out_outcomes(embeddings: Embeddings, notes: Notes, *, seed: int) -> list[Outcome]:
    train, test = train_test(healthy_with_age(embeddings, notes))
    predicted_N = np.full(len(test), np.nan)
    for name in np.unique(test.site).tolist():
        others = train.select(train.site != name)
        if num_subjects(others) >= MIN_TRAIN_SUBJECTS:
            predicted_N[test.site == name] = _ridge_probe(others, seed)(test.select(test.site == name))
        else:
            notes.add(f"age: site {name} cannot be left out, other sites have fewer than {MIN_TRAIN_SUBJECTS} train subjects")
    scored = test.select(np.isfinite(predicted_N))
    if not len(scored):
        raise NotEvaluableError("age: a site must be left and others to fit the probe on for leave-site-out, got none.")
    error = _of_scans(
        scored, "age", "mae_leave_site_out", mean_absolute_error, scored.age_years, predicted_N[np.isfinite(predicted_N)]
    )
    return [error, *error.by_site()]


def _sex_outcomes(embeddings: Embeddings, notes: Notes, *, seed: int) -> list[Outcome]:
    known = embeddings.sex != ""
    if not known.all():
        notes.add(f"sex: {(~known).sum()} scans of unknown sex take no part")
    return [_binary_outcome(embeddings.select(known), "sex", ("F", "M"), seed)]


def _diagnosis_outcomes(embeddings: Embeddings, notes: Notes, *, seed: int) -> list[Outcome]:
    train = embeddings.select(embeddings.split == "train")
    both = sorted(set(train.site[train.diagnosis == "patient"].tolist()) & set(train.site[train.diagnosis == "control"].tolist()))
    others = sorted(set(embeddings.site.tolist()) - set(both))
    if both and others:
        notes.add(f"diagnosis: sites without both patients and controls in train take no part: {', '.join(others)}")
    known = np.isin(embeddings.site, both) & (embeddings.diagnosis != "")
    return [_binary_outcome(embeddings.select(known), "diagnosis", ("control", "patient"), seed)]


def _binary_outcome(embeddings: Embeddings, task: str, names: tuple[str, str], seed: int) -> Outcome:
    train, test = train_test(embeddings)
    train_label_N = (getattr(train, task) == names[1]).astype(np.int64)
    test_label_N = (getattr(test, task) == names[1]).astype(np.int64)
    for value, name in enumerate(names):
        num_train = num_subjects(train.select(train_label_N == value))
        num_test = num_subjects(test.select(test_label_N == value))
        if num_train < MIN_TRAIN_SUBJECTS or num_test < 1:
            raise NotEvaluableError(
                f"{task}: subjects labelled {name} must be at least {MIN_TRAIN_SUBJECTS} in train and 1 in test, "
                f"got {(num_train, num_test)!r}."
            )
    decision_N = _logistic_probe(train, train_label_N, test, seed)[:, 1]
    # Ranks, so that the predictions of two representations can be exchanged in a paired test.
    return _of_scans(test, task, "auc", area_under_curve, test_label_N, rankdata(decision_N) / len(decision_N))


def _folds(subjects_N: Ints, class_N: Ints, seed: int) -> Ints:
    """(N,) fold of each scan: whole subjects, dealt out class by class so that folds have even shares of a class."""
    subjects, first_N, code_N = np.unique(subjects_N, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(subjects))
    by_class = shuffled[np.argsort(class_N[first_N][shuffled], kind="stable")]
    fold_S = np.empty(len(subjects), dtype=np.int64)
    fold_S[by_class] = np.arange(len(subjects)) % NUM_FOLDS
    return fold_S[code_N]


def _z_scored(train: Embeddings, test: Embeddings) -> tuple[Floats, Floats]:
    """Both h in units of the train scans' standard deviation about their mean; 0 where a feature does not vary in train."""
    scaler = StandardScaler().fit(train.h_NF.astype(np.float64))
    return scaler.transform(train.h_NF.astype(np.float64)), scaler.transform(test.h_NF.astype(np.float64))


def _logistic_probe(train: Embeddings, class_N: Ints, test: Embeddings, seed: int) -> Floats:
    """(N test, K) decision values of the logistic probe whose C has the best out-of-fold balanced accuracy.

    Among equals the smallest C is taken. Class-balanced weights; two classes give the columns (-d, d).
    """
    x_NF, test_NF = _z_scored(train, test)
    fold_N = _folds(train.subjects, class_N, seed)
    predicted_CN = np.empty((len(LOGISTIC_C), len(class_N)), dtype=np.int64)
    for fold in range(NUM_FOLDS):
        model = _logistic()
        for i, c in enumerate(LOGISTIC_C):
            model.set_params(C=c).fit(x_NF[fold_N != fold], class_N[fold_N != fold])
            predicted_CN[i, fold_N == fold] = model.predict(x_NF[fold_N == fold])
    every_scan = np.arange(len(class_N))
    accuracy_C = [balanced_accuracy(class_N, predicted_N)(every_scan) for predicted_N in predicted_CN]
    model = _logistic().set_params(C=LOGISTIC_C[int(np.argmax(accuracy_C))]).fit(x_NF, class_N)
    decision = np.asarray(model.decision_function(test_NF))
    return decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1)


def _logistic() -> LogisticRegression:
    return LogisticRegression(class_weight="balanced", solver="lbfgs", max_iter=5000, warm_start=True)


def _neighbor_probe(train: Embeddings, class_N: Ints, test: Embeddings) -> Ints:
    """(N test,) class with most votes among 10 nearest train scans, each vote weighted by inverse class frequency."""
    x_NF, test_NF = _z_scored(train, test)
    neighbors = NearestNeighbors(n_neighbors=min(NUM_NEIGHBORS, len(train)), algorithm="brute").fit(x_NF)
    nearest_NV = neighbors.kneighbors(test_NF, return_distance=False)
    votes_NK = (class_N[nearest_NV][:, :, None] == np.arange(class_N.max() + 1)).sum(axis=1)
    return np.asarray((votes_NK / np.bincount(class_N)).argmax(axis=1))


def _boosting_probe(train: Embeddings, class_N: Ints, test: Embeddings, seed: int) -> Ints:
    """(N test,) class by 50 rounds of small gradient-boosted trees, class-balanced weights, one fixed setting.

    More than 50 features are first reduced to the 50 principal components of z-scored train scans, for time: what lies in
    the components left out is hidden from this probe, not from the linear one.
    """
    x_NF, test_NF = _z_scored(train, test)
    if x_NF.shape[1] > MAX_BOOSTED_COMPONENTS:
        _, _, axes = np.linalg.svd(x_NF, full_matrices=False)
        x_NF, test_NF = x_NF @ axes[:MAX_BOOSTED_COMPONENTS].T, test_NF @ axes[:MAX_BOOSTED_COMPONENTS].T
    model = HistGradientBoostingClassifier(**BOOSTING, class_weight="balanced", early_stopping=False, random_state=seed)
    return np.asarray(model.fit(x_NF, class_N).predict(test_NF))


def _ridge_probe(train: Embeddings, seed: int) -> Callable[[Embeddings], Floats]:
    """Scans -> age in years, by ridge regression on z-scored h, the penalty that of least out-of-fold absolute error."""
    scaler = StandardScaler().fit(train.h_NF.astype(np.float64))
    x_NF = scaler.transform(train.h_NF.astype(np.float64))
    fold_N = _folds(train.subjects, np.zeros(len(train), dtype=np.int64), seed)
    error_FA = []
    for fold in range(NUM_FOLDS):
        weights_AF, intercept_A = _ridge_path(x_NF[fold_N != fold], train.age_years[fold_N != fold])
        predicted_NA = x_NF[fold_N == fold] @ weights_AF.T + intercept_A
        error_FA.append(np.abs(predicted_NA - train.age_years[fold_N == fold][:, None]).mean(axis=0))
    best = int(np.argmin(np.mean(error_FA, axis=0)))
    weights_AF, intercept_A = _ridge_path(x_NF, train.age_years)
    return lambda scans: scaler.transform(scans.h_NF.astype(np.float64)) @ weights_AF[best] + intercept_A[best]


def _ridge_path(x_NF: Floats, y_N: Floats) -> tuple[Floats, Floats]:
    """(A, F) weights and (A,) intercepts of ridge regression at every penalty, from one decomposition."""
    mean_F, mean = x_NF.mean(axis=0), y_N.mean()
    left_NR, singular_R, axes_RF = np.linalg.svd(x_NF - mean_F, full_matrices=False)
    shrunk_AR = singular_R / (np.square(singular_R) + np.array(RIDGE_ALPHAS)[:, None])
    weights_AF = (shrunk_AR * (left_NR.T @ (y_N - mean))) @ axes_RF
    return weights_AF, mean - weights_AF @ mean_F
