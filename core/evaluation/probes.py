"""Frozen probes: what can be read from a representation of held-out subjects.

Every probe is fitted on the scans of split `train`, z-scored with their statistics, its regularisation chosen by 5-fold
cross-validation over train subjects, and scored on the scans of split `test`. Intervals resample test subjects; the
fitted probe is kept, so they tell how far other subjects could move the figure, not another training.

Shapes: N scans, F features, K classes. Everything is deterministic given the seed.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import SplineTransformer, StandardScaler

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, NotEvaluableError, subject_bootstrap

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Results = tuple[list[Evaluation], list[str]]
Statistic = Callable[[npt.NDArray[np.intp]], float]

LOGISTIC_C = (1e-2, 1e-1, 1e0, 1e1, 1e2)
RIDGE_ALPHAS = tuple(10.0**exponent for exponent in range(-2, 5))
NUM_FOLDS = 5
MIN_TRAIN_SUBJECTS = 5
NUM_NEIGHBORS = 10


def evaluate(
    embeddings: Embeddings,
    *,
    stage: str,
    regime: str,
    seed: int,
    num_resamples: int = 1000,
    known_sites: Collection[str] | None = None,
) -> Results:
    """Every probe the data allow: site and scanner predictability, age, sex, diagnosis.

    Args:
        embeddings: Train and test scans.
        stage: raw, untrained or pretrained.
        regime: federated, pooled or local-only.
        seed: Of the run.
        num_resamples: Of the bootstrap.
        known_sites: The sites that took part in pretraining; site, scanner and age are probed there, and age also at
            the other sites as unseen ones. All sites when not given.

    Returns:
        The evaluations, and one note for each task or figure that could not be evaluated and each group left out.
        The constants to compare with come from `chance_and_floor`, once a run.
    """
    settings: dict[str, Any] = {"stage": stage, "regime": regime, "seed": seed, "num_resamples": num_resamples}
    at_known = embeddings.select(_at_sites(embeddings, known_sites))
    return _all_that_apply(
        partial(site_predictability, at_known, attribute="site", **settings),
        partial(site_predictability, at_known, attribute="scanner", **settings),
        partial(age_error, embeddings, known_sites=known_sites, **settings),
        partial(sex_auc, embeddings, **settings),
        partial(diagnosis_auc, embeddings, **settings),
    )


def chance_and_floor(embeddings: Embeddings, *, regime: str, seed: int, num_resamples: int = 1000) -> Results:
    """What site predictability is compared with: chance, and what age and sex alone give away.

    Chance is 1 / number of sites. The floor is the linear site probe on a spline of age, and sex, in place of h: site
    is confounded with age, so a representation that keeps all of age cannot be expected below it. The same for
    scanners. Call it once a run, with the embeddings of any stage: h is not used. Healthy scans without age or sex
    take no part in the floor.

    Returns:
        Evaluations of stages chance and age_sex_floor, and notes.
    """

    def compare(attribute: Literal["site", "scanner"]) -> Results:
        ledger = _Ledger(stage="age_sex_floor", regime=regime, seed=seed, num_resamples=num_resamples)
        healthy = _healthy(embeddings, ledger)
        _, test, classes = _site_classes(healthy, attribute, ledger)
        chance = Evaluation(
            stage="chance",
            task=attribute,
            metric="balanced_accuracy",
            value=1 / len(classes),
            low=None,
            high=None,
            regime=regime,
            site="all",
            num_subjects=len(np.unique(test.subjects)),
            seed=seed,
        )
        known = np.isfinite(healthy.age_years) & (healthy.sex != "")
        if not known.any():
            ledger.note(f"{attribute}: no healthy scan has both an age and a sex")
            return [chance, *ledger.evaluations], ledger.notes
        if not known.all():
            ledger.note(f"{attribute}: {(~known).sum()} healthy scans without age or sex take no part")
        _score_site_probe(_age_and_sex(healthy.select(known)), attribute, ledger, with_neighbors=False)
        return [chance, *ledger.evaluations], ledger.notes

    return _all_that_apply(partial(compare, "site"), partial(compare, "scanner"))


def site_predictability(
    embeddings: Embeddings,
    *,
    attribute: Literal["site", "scanner"] = "site",
    stage: str,
    regime: str,
    seed: int,
    num_resamples: int = 1000,
) -> Results:
    """Balanced accuracy of predicting the site (or scanner) of healthy subjects from h.

    A linear probe (multinomial logistic regression) and, because a linear one can be fooled, 10 nearest neighbours with
    votes weighted by inverse class frequency. A scanner is one scanner of one site. A class takes part with at least
    5 train subjects and 1 test subject; the others are named in the notes. In a resample without any subject of a class
    the mean runs over the classes it has.

    Raises:
        NotEvaluableError: Fewer than 2 such classes, or scanners that are the sites.
    """
    ledger = _Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    _score_site_probe(_healthy(embeddings, ledger), attribute, ledger, with_neighbors=True)
    return ledger.evaluations, ledger.notes


def age_error(
    embeddings: Embeddings,
    *,
    stage: str,
    regime: str,
    seed: int,
    num_resamples: int = 1000,
    known_sites: Collection[str] | None = None,
) -> Results:
    """Mean absolute error in years (overall and by site) and R2 of age from h by ridge regression, healthy subjects.

    With `known_sites` the probe is fitted and tested there, and its error on every healthy subject of the other sites,
    which neither it nor the encoder has met, is metric `mae_unseen`.

    Raises:
        NotEvaluableError: Fewer than 5 train or 1 test subjects with an age.
    """
    ledger = _Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    healthy = _healthy(embeddings, ledger)
    with_age = np.isfinite(healthy.age_years)
    if not with_age.all():
        ledger.note(f"age: {(~with_age).sum()} healthy scans without an age take no part")
    healthy = healthy.select(with_age)
    at_known = _at_sites(healthy, known_sites)
    train, test = _train_test(healthy.select(at_known))
    num_train, num_test = len(np.unique(train.subjects)), len(np.unique(test.subjects))
    if num_train < MIN_TRAIN_SUBJECTS or num_test < 1:
        raise NotEvaluableError(
            f"age: healthy subjects with an age must be at least {MIN_TRAIN_SUBJECTS} in train and 1 in test, "
            f"got {(num_train, num_test)!r}."
        )
    scaler = StandardScaler().fit(train.h_NF.astype(np.float64))
    fold_N = _folds(train.subjects, np.zeros(len(train), dtype=np.int64), seed)
    folds = [(np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)) for fold in range(NUM_FOLDS)]
    ridge = RidgeCV(RIDGE_ALPHAS, cv=folds, scoring="neg_mean_absolute_error")
    ridge.fit(scaler.transform(train.h_NF.astype(np.float64)), train.age_years)

    for metric, scans in (("mae", test), ("mae_unseen", healthy.select(~at_known))):
        if not len(scans):
            continue
        error_N = scans.age_years - ridge.predict(scaler.transform(scans.h_NF.astype(np.float64)))
        ledger.score("age", metric, _mean_magnitude(error_N), scans.subjects)
        if metric == "mae":
            ledger.score("age", "r2", _explained_share(scans.age_years, error_N), scans.subjects)
        for name in np.unique(scans.site).tolist():
            of_site = scans.site == name
            ledger.score("age", metric, _mean_magnitude(error_N[of_site]), scans.subjects[of_site], site=name)
    return ledger.evaluations, ledger.notes


def sex_auc(embeddings: Embeddings, *, stage: str, regime: str, seed: int, num_resamples: int = 1000) -> Results:
    """Area under the ROC curve of sex (male positive) from h by a logistic probe, all scans with a known sex.

    Raises:
        NotEvaluableError: A sex with fewer than 5 train or 1 test subjects.
    """
    ledger = _Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    known = embeddings.sex != ""
    if not known.all():
        ledger.note(f"sex: {(~known).sum()} scans of unknown sex take no part")
    _score_binary_probe(embeddings.select(known), "sex", ("F", "M"), ledger)
    return ledger.evaluations, ledger.notes


def diagnosis_auc(embeddings: Embeddings, *, stage: str, regime: str, seed: int, num_resamples: int = 1000) -> Results:
    """Area under the ROC curve of diagnosis (patient positive) from h by a logistic probe.

    Only sites with both patients and controls in train take part: elsewhere the site would give the diagnosis away.

    Raises:
        NotEvaluableError: A diagnosis with fewer than 5 train or 1 test subjects at those sites.
    """
    ledger = _Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    train = embeddings.select(embeddings.split == "train")
    both = sorted(set(train.site[train.diagnosis == "patient"].tolist()) & set(train.site[train.diagnosis == "control"].tolist()))
    others = sorted(set(embeddings.site.tolist()) - set(both))
    if both and others:
        ledger.note(f"diagnosis: sites without both patients and controls in train take no part: {', '.join(others)}")
    known = np.isin(embeddings.site, both) & (embeddings.diagnosis != "")
    _score_binary_probe(embeddings.select(known), "diagnosis", ("control", "patient"), ledger)
    return ledger.evaluations, ledger.notes


def evaluate_predictions(
    labels: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    subjects: npt.NDArray[Any],
    site: npt.NDArray[np.str_],
    *,
    stage: str,
    regime: str,
    seed: int,
    task: str = "diagnosis",
    num_resamples: int = 1000,
) -> Results:
    """AUC and balanced accuracy (at probability 0.5) of a classifier's predictions on held-out scans.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) predicted probability of 1.
        subjects: (N,) site-local subject index.
        site: (N,) site names.
        stage: linear_probe, full_finetuning or from_scratch.
        regime: federated, pooled or local-only.
        seed: Of the run.
        task: What the label says.
        num_resamples: Of the bootstrap.

    Returns:
        Evaluations over all sites (site "all") and, where there are several, for each; notes on what has no value.

    Raises:
        ValueError: Lengths differ, a label is not 0 or 1, or a score is not a probability.
    """
    lengths = (len(labels), len(scores), len(subjects), len(site))
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"evaluate_predictions: labels, scores, subjects and site must be as long, got {lengths!r}.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"evaluate_predictions: labels must be 0 or 1, got {np.unique(labels).tolist()!r}.")
    if not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(
            f"evaluate_predictions: scores must be probabilities, got {(scores.min(), scores.max())!r}; apply the sigmoid first."
        )
    ledger = _Ledger(stage=stage, regime=regime, seed=seed, num_resamples=num_resamples)
    sites = np.unique(site)
    truth_N = np.asarray(labels).astype(np.int64)
    scores_N = np.asarray(scores).astype(np.float64)
    subject_N = np.unique(np.stack([np.searchsorted(sites, site), subjects]), axis=1, return_inverse=True)[1].reshape(-1)
    groups = {"all": np.full(len(site), True)} | ({str(name): site == name for name in sites} if len(sites) > 1 else {})
    for name, mask in groups.items():
        auc = _area_under_curve(truth_N[mask], scores_N[mask])
        accuracy = _balanced_accuracy(truth_N[mask], (scores_N[mask] >= 0.5).astype(np.int64))
        ledger.score(task, "auc", auc, subject_N[mask], site=name)
        ledger.score(task, "balanced_accuracy", accuracy, subject_N[mask], site=name)
    return ledger.evaluations, ledger.notes


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


@dataclass(kw_only=True)
class _Ledger:
    """Evaluations of one stage as they are made, and notes on what could not be."""

    stage: str
    regime: str
    seed: int
    num_resamples: int
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        logger.info("%s: %s.", self.stage, text)
        self.notes.append(f"{self.stage}: {text}.")

    def score(self, task: str, metric: str, statistic: Statistic, subjects_N: Ints, *, site: str = "all") -> None:
        """Add one evaluation with its interval, or the reason why there is none."""
        try:
            value, low, high = subject_bootstrap(subjects_N, statistic, num_resamples=self.num_resamples, seed=self.seed)
        except NotEvaluableError as reason:
            self.note(f"{task} {metric} at site {site} has no value: {str(reason).removesuffix('.')}")
            return
        self.evaluations.append(
            Evaluation(
                stage=self.stage,
                task=task,
                metric=metric,
                value=value,
                low=low,
                high=high,
                regime=self.regime,
                site=site,
                num_subjects=len(np.unique(subjects_N)),
                seed=self.seed,
            )
        )


def _all_that_apply(*probes: Callable[[], Results]) -> Results:
    evaluations: list[Evaluation] = []
    notes: list[str] = []
    for probe in probes:
        try:
            more, remarks = probe()
        except NotEvaluableError as reason:
            logger.info("Not evaluated: %s", reason)
            more, remarks = [], [f"Not evaluated: {reason}"]
        evaluations += more
        notes += remarks
    return evaluations, list(dict.fromkeys(notes))


def _healthy(embeddings: Embeddings, ledger: _Ledger) -> Embeddings:
    """Controls only, since diagnosis would confound site and age; all scans where no diagnosis is known at all."""
    if (embeddings.diagnosis == "").all():
        ledger.note("no scan has a diagnosis, all are taken as healthy for site, scanner and age")
        return embeddings
    unknown = int((embeddings.diagnosis == "").sum())
    if unknown:
        ledger.note(f"{unknown} scans of unknown diagnosis take no part in site, scanner and age")
    return embeddings.select(embeddings.diagnosis == "control")


def _at_sites(embeddings: Embeddings, names: Collection[str] | None) -> npt.NDArray[np.bool_]:
    return np.full(len(embeddings), True) if names is None else np.isin(embeddings.site, sorted(names))


def _train_test(embeddings: Embeddings) -> tuple[Embeddings, Embeddings]:
    return embeddings.select(embeddings.split == "train"), embeddings.select(embeddings.split == "test")


def _age_and_sex(embeddings: Embeddings) -> Embeddings:
    """The same scans with a cubic spline of age, and sex, in place of h."""
    age_N1 = embeddings.age_years[:, None]
    male_N1 = (embeddings.sex == "M").astype(np.float64)[:, None]
    columns = [male_N1]
    train_age = age_N1[embeddings.split == "train"]
    if len(train_age) and train_age.min() < train_age.max():
        spline = SplineTransformer(n_knots=5, degree=3, include_bias=False, extrapolation="constant").fit(train_age)
        columns.append(spline.transform(age_N1))
    return replace(embeddings, h_NF=np.hstack(columns).astype(np.float32))


def _site_classes(
    embeddings: Embeddings, attribute: Literal["site", "scanner"], ledger: _Ledger
) -> tuple[Embeddings, Embeddings, list[str]]:
    """Train and test scans of the sites or scanners that take part, and their names."""
    label_N = _labels(embeddings, attribute)
    if attribute == "scanner":
        sites_without = sorted(set(embeddings.site[embeddings.scanner == ""].tolist()))
        if sites_without:
            ledger.note(f"scanner: unnamed scanners count as one a site at {', '.join(sites_without)}")
        if len(np.unique(label_N)) == len(np.unique(embeddings.site)):
            raise NotEvaluableError("scanner: a site must have two scanners to tell them from sites, got 1 at each.")
    classes, small = [], []
    for name in np.unique(label_N).tolist():
        of_class = embeddings.select(label_N == name)
        train, test = _train_test(of_class)
        num_train, num_test = len(np.unique(train.subjects)), len(np.unique(test.subjects))
        if num_train >= MIN_TRAIN_SUBJECTS and num_test >= 1:
            classes.append(name)
        else:
            small.append(f"{name} ({num_train} train, {num_test} test)")
    if small:
        ledger.note(
            f"{attribute}: left out for fewer than {MIN_TRAIN_SUBJECTS} train subjects or no test subject: {', '.join(small)}"
        )
    if len(classes) < 2:
        raise NotEvaluableError(
            f"{attribute}: {attribute}s with at least {MIN_TRAIN_SUBJECTS} train subjects and 1 test subject must be "
            f"at least 2, got {classes!r}."
        )
    return *_train_test(embeddings.select(np.isin(label_N, classes))), classes


def _labels(embeddings: Embeddings, attribute: Literal["site", "scanner"]) -> npt.NDArray[np.str_]:
    if attribute == "site":
        return embeddings.site
    return np.array([f"{site} / {scanner}" for site, scanner in zip(embeddings.site, embeddings.scanner, strict=True)])


def _score_site_probe(
    embeddings: Embeddings, attribute: Literal["site", "scanner"], ledger: _Ledger, *, with_neighbors: bool
) -> None:
    train, test, classes = _site_classes(embeddings, attribute, ledger)
    train_class_N = np.searchsorted(classes, _labels(train, attribute))
    test_class_N = np.searchsorted(classes, _labels(test, attribute))
    decision_NK = _logistic_probe(train, train_class_N, test, ledger.seed)
    linear = _balanced_accuracy(test_class_N, decision_NK.argmax(axis=1))
    ledger.score(attribute, "balanced_accuracy", linear, test.subjects)
    if with_neighbors:
        neighbors = _balanced_accuracy(test_class_N, _neighbor_probe(train, train_class_N, test))
        ledger.score(attribute, "balanced_accuracy_knn", neighbors, test.subjects)


def _score_binary_probe(embeddings: Embeddings, task: str, names: tuple[str, str], ledger: _Ledger) -> None:
    train, test = _train_test(embeddings)
    train_label_N = (getattr(train, task) == names[1]).astype(np.int64)
    test_label_N = (getattr(test, task) == names[1]).astype(np.int64)
    for value, name in enumerate(names):
        num_train = len(np.unique(train.subjects[train_label_N == value]))
        num_test = len(np.unique(test.subjects[test_label_N == value]))
        if num_train < MIN_TRAIN_SUBJECTS or num_test < 1:
            raise NotEvaluableError(
                f"{task}: subjects labelled {name} must be at least {MIN_TRAIN_SUBJECTS} in train and 1 in test, "
                f"got {(num_train, num_test)!r}."
            )
    decision_NK = _logistic_probe(train, train_label_N, test, ledger.seed)
    ledger.score(task, "auc", _area_under_curve(test_label_N, decision_NK[:, 1]), test.subjects)


def _folds(subjects_N: Ints, class_N: Ints, seed: int) -> Ints:
    """(N,) fold of each scan: whole subjects, dealt out class by class so that folds have even shares of a class."""
    subjects, first_N, code_N = np.unique(subjects_N, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(subjects))
    by_class = shuffled[np.argsort(class_N[first_N][shuffled], kind="stable")]
    fold_S = np.empty(len(subjects), dtype=np.int64)
    fold_S[by_class] = np.arange(len(subjects)) % NUM_FOLDS
    return fold_S[code_N]


def _logistic_probe(train: Embeddings, class_N: Ints, test: Embeddings, seed: int) -> Floats:
    """(N test, K) decision values of the logistic probe whose C has the best out-of-fold balanced accuracy.

    Among equals the smallest C is taken. Class-balanced weights; two classes give the columns (-d, d).
    """
    scaler = StandardScaler().fit(train.h_NF.astype(np.float64))
    x_NF = scaler.transform(train.h_NF.astype(np.float64))
    fold_N = _folds(train.subjects, class_N, seed)
    predicted_CN = np.empty((len(LOGISTIC_C), len(class_N)), dtype=np.int64)
    for fold in range(NUM_FOLDS):
        model = _logistic()
        for i, c in enumerate(LOGISTIC_C):
            model.set_params(C=c).fit(x_NF[fold_N != fold], class_N[fold_N != fold])
            predicted_CN[i, fold_N == fold] = model.predict(x_NF[fold_N == fold])
    every_scan = np.arange(len(class_N))
    accuracy_C = [_balanced_accuracy(class_N, predicted_N)(every_scan) for predicted_N in predicted_CN]
    model = _logistic().set_params(C=LOGISTIC_C[int(np.argmax(accuracy_C))]).fit(x_NF, class_N)
    decision = np.asarray(model.decision_function(scaler.transform(test.h_NF.astype(np.float64))))
    return decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1)


def _logistic() -> LogisticRegression:
    return LogisticRegression(class_weight="balanced", solver="lbfgs", max_iter=5000, warm_start=True)


def _neighbor_probe(train: Embeddings, class_N: Ints, test: Embeddings) -> Ints:
    """(N test,) class with most votes among 10 nearest train scans, each vote weighted by inverse class frequency."""
    scaler = StandardScaler().fit(train.h_NF.astype(np.float64))
    neighbors = NearestNeighbors(n_neighbors=min(NUM_NEIGHBORS, len(train)), algorithm="brute")
    neighbors.fit(scaler.transform(train.h_NF.astype(np.float64)))
    nearest_NV = neighbors.kneighbors(scaler.transform(test.h_NF.astype(np.float64)), return_distance=False)
    votes_NK = (class_N[nearest_NV][:, :, None] == np.arange(class_N.max() + 1)).sum(axis=1)
    return np.asarray((votes_NK / np.bincount(class_N)).argmax(axis=1))


def _balanced_accuracy(truth_N: Ints, predicted_N: Ints) -> Statistic:
    """Mean recall over the classes among the chosen scans; nan when there is only one."""
    hit_N = (truth_N == predicted_N).astype(np.float64)
    num_classes = int(truth_N.max()) + 1

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        class_M = truth_N[chosen]
        count_K = np.bincount(class_M, minlength=num_classes)
        hits_K = np.bincount(class_M, weights=hit_N[chosen], minlength=num_classes)
        present_K = count_K > 0
        return float((hits_K[present_K] / count_K[present_K]).mean()) if present_K.sum() > 1 else float("nan")

    return statistic


def _area_under_curve(label_N: Ints, score_N: Floats) -> Statistic:
    """Share of (positive, negative) pairs in the right order among the chosen scans, ties half; nan without a pair."""
    levels, level_N = np.unique(score_N, return_inverse=True)
    place_N = 2 * level_N + label_N

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        negative_L, positive_L = np.bincount(place_N[chosen], minlength=2 * len(levels)).reshape(-1, 2).T
        pairs = negative_L.sum() * positive_L.sum()
        won = (positive_L * (negative_L.cumsum() - negative_L / 2)).sum()
        return float(won / pairs) if pairs else float("nan")

    return statistic


def _mean_magnitude(error_N: Floats) -> Statistic:
    magnitude_N = np.abs(error_N)
    return lambda chosen: float(magnitude_N[chosen].mean())


def _explained_share(truth_N: Floats, error_N: Floats) -> Statistic:
    """R2 over the chosen scans; nan when the truth does not vary among them."""

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        truth_M = truth_N[chosen]
        spread = np.square(truth_M - truth_M.mean()).sum()
        return float(1 - np.square(error_N[chosen]).sum() / spread) if spread > 0 else float("nan")

    return statistic
