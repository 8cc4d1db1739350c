"""The protocol and score of the OpenBHB challenge, as published, so that its figures can be compared with.

Beside our own probes, for it is not scale-invariant: h is not z-scored, and its solver stops after 150 steps,
converged or not.

Shapes: N scans, F features.
"""

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import NotEvaluableError
from core.evaluation.outcomes import Notes, Outcome, Statistic, balanced_accuracy, mean_absolute_error
from core.evaluation.participants import at_sites, healthy_with_age, num_subjects, train_test

GRID = tuple(10.0**exponent for exponent in range(-2, 3))
NUM_FOLDS = 5
MAX_STEPS = 150
BALANCED_ACCURACY_EXPONENT = 0.3


def openbhb_outcomes(
    embeddings: Embeddings, notes: Notes, *, seed: int, known_sites: Collection[str] | None = None
) -> list[Outcome]:
    """Site, age and combined score of the challenge (Dufumier et al. 2022, NeuroImage; its kit's `problem.py`).

    Fitted on healthy train scans of known sites. `openbhb_bacc` of site and `openbhb_mae` of age are on their test scans,
    `openbhb_mae_unseen` on every healthy scan of the other sites, `openbhb_score` of site is MAE unseen x BAcc^0.3, lower is
    better. Sites too small for our own probes take part, as they do there.

    Raises:
        NotEvaluableError: Fewer than 2 sites, a train scan fewer than folds, or no test scan.
    """
    healthy = healthy_with_age(embeddings, notes)
    at_known = at_sites(healthy, known_sites)
    train, test = train_test(healthy.select(at_known))
    unseen = healthy.select(~at_known)
    num_sites = len(np.unique(train.site))
    if num_sites < 2 or len(train) < NUM_FOLDS or not len(test):
        raise NotEvaluableError(
            f"openbhb: sites must be at least 2, healthy train scans {NUM_FOLDS} and test scans 1, "
            f"got {(num_sites, len(train), len(test))!r}."
        )
    sites = np.unique(np.concatenate([train.site, test.site]))
    site_model, age_model = fit_openbhb(
        train.h_NF.astype(np.float64), train.age_years, np.searchsorted(sites, train.site), notes, seed=seed
    )

    def age_outcome(metric: str, scans: Embeddings) -> Outcome:
        return Outcome(
            task="age",
            metric=metric,
            measure=mean_absolute_error,
            truth_N=scans.age_years,
            predicted_N=age_model.predict(scans.h_NF.astype(np.float64)),
            subjects_N=scans.subjects,
            site_N=scans.site,
        )

    by_age = age_outcome("openbhb_mae", test)
    by_site = replace(
        by_age,
        task="site",
        metric="openbhb_bacc",
        measure=balanced_accuracy,
        truth_N=np.searchsorted(sites, test.site),
        predicted_N=site_model.predict(test.h_NF.astype(np.float64)),
    )
    if not len(unseen):
        notes.add("openbhb: no site is unseen, so there is no MAE there and no score")
        return [by_site, by_age]
    elsewhere = age_outcome("openbhb_mae_unseen", unseen)
    score = Outcome(
        task="site",
        metric="openbhb_score",
        measure=lambda _truth, _predicted: _score(by_site, elsewhere),
        truth_N=np.zeros(len(test) + len(unseen)),
        predicted_N=np.zeros(len(test) + len(unseen)),
        subjects_N=np.concatenate([test.subjects, num_subjects(test) + unseen.subjects]),
        site_N=np.concatenate([test.site, unseen.site]),
        exchangeable=False,
    )
    return [by_site, by_age, elsewhere, score]


def fit_openbhb(
    h_NF: npt.NDArray[np.float64], age_N: npt.NDArray[np.float64], site_N: npt.NDArray[Any], notes: Notes, *, seed: int
) -> tuple[GridSearchCV, GridSearchCV]:
    """The challenge's two estimators, fitted: of site (classes) and of age (years). What scikit-learn warns of becomes a note."""
    site_model = GridSearchCV(
        LogisticRegression(solver="saga", max_iter=MAX_STEPS, random_state=seed),
        {"C": GRID},
        cv=NUM_FOLDS,
        scoring="balanced_accuracy",
    )
    age_model = GridSearchCV(Ridge(), {"alpha": GRID}, cv=NUM_FOLDS, scoring="r2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        site_model.fit(h_NF, site_N)
        age_model.fit(h_NF, age_N)
    for kind in dict.fromkeys(warning.category.__name__ for warning in caught):
        first, *others = (str(warning.message) for warning in caught if warning.category.__name__ == kind)
        notes.add(f"openbhb: {kind} in {1 + len(others)} fits, as the protocol has it: {first.splitlines()[0].removesuffix('.')}")
    return site_model, age_model


def _score(by_site: Outcome, elsewhere: Outcome) -> Statistic:
    """MAE unseen x BAcc^0.3 of chosen rows: first those of the internal test, then those of the unseen sites."""
    accuracy, error, num_internal = by_site.statistic(), elsewhere.statistic(), len(by_site.truth_N)

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        inside, outside = chosen[chosen < num_internal], chosen[chosen >= num_internal] - num_internal
        if not len(inside) or not len(outside):
            return float("nan")
        return float(error(outside) * accuracy(inside) ** BALANCED_ACCURACY_EXPONENT)

    return statistic
