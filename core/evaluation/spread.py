"""How held-out representations lie by site, without a probe: mixing of sites, distance between them, variance they explain.

All on healthy test subjects with a known age at sites with 5 of them; one row a subject (the mean of the scans), z-scored
by these rows themselves. A probe asks what can be found out; these figures ask how large the site effect is.

Shapes: N subjects, F features, K sites, V neighbours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import NotEvaluableError
from core.evaluation.outcomes import Floats, Ints, Notes, Outcome, Statistic, mean_value
from core.evaluation.participants import healthy_with_age, held_out_classes

MAX_NEIGHBORS = 30
NUM_AGE_BINS = 4
NUM_SHUFFLES = 200


def spread_outcomes(embeddings: Embeddings, notes: Notes, *, seed: int) -> list[Outcome]:
    """Every distribution figure the data allow.

    * `ilisi` of site: inverse Simpson index of the sites among a subject's nearest neighbours (plain nearest neighbours, up to
      30, not the perplexity weights of Korsunsky et al. 2019), from 1 (each site for itself) to the number of sites.
    * `ilisi_normalised`: the same, 0 for 1, and 1 for what neighbours drawn at random would give.
    * `silhouette` of site (0 or below when mixed) and of age (quarters of the subjects by age).
    * `mmd2` of site: squared maximum mean discrepancy (Gretton et al. 2012, equation 3: unbiased, so about 0, and as
      often below as above, without a site effect), mean over pairs of sites, kernel exp(-d^2 / 2m), m the median d^2.
    * `explained_variance` of site: share of the variance of h that site explains beyond age and sex; of age: beyond site and
      sex. See `explained_beyond`.

    A site effect that comes from the ages of a site counts in all but the explained variance.

    Args:
        embeddings: Test scans; others are not used.
        notes: Takes what was left out.
        seed: Of the draws that `ilisi_normalised` is compared with.

    Returns:
        Outcomes; their intervals keep the neighbourhoods, the kernel and the linear fits.

    Raises:
        NotEvaluableError: Fewer than 2 sites with 5 subjects, or representations that do not differ.
    """
    rows = _rows(embeddings, notes)
    ilisi_N, at_random = inverse_simpson(rows.h_NF, rows.site_N, seed=seed)
    by_row = [
        ("site", "ilisi", ilisi_N),
        ("site", "ilisi_normalised", (ilisi_N - 1) / (at_random - 1)),
        ("site", "silhouette", np.asarray(silhouette_samples(rows.h_NF, rows.site_N), dtype=np.float64)),
    ]
    age_bin_N = np.searchsorted(np.quantile(rows.age_N, np.arange(1, NUM_AGE_BINS) / NUM_AGE_BINS), rows.age_N)
    if len(np.unique(age_bin_N)) > 1:
        by_row.append(("age", "silhouette", np.asarray(silhouette_samples(rows.h_NF, age_bin_N), dtype=np.float64)))
    else:
        notes.add("age: no silhouette, all held-out subjects are of one age")
    outcomes = [
        Outcome(
            task=task,
            metric=metric,
            measure=mean_value,
            truth_N=np.zeros(len(value_N)),
            predicted_N=value_N,
            subjects_N=rows.subjects_N,
            site_N=rows.site_N,
        )
        for task, metric, value_N in by_row
    ]
    outcomes.append(rows.outcome("site", "mmd2", discrepancy(rows.h_NF, rows.site_N)))
    one_hot_NK = (rows.site_N[:, None] == np.unique(rows.site_N)).astype(np.float64)
    age_N2 = np.stack([rows.age_N, np.square(rows.age_N - rows.age_N.mean())], axis=1)
    if (rows.sex_N == "").any():
        notes.add("explained variance: sex is left out of it, it is not known of every subject")
    sex_N2 = (rows.sex_N[:, None] == ["F", "M"]).astype(np.float64)
    for task, about, given in (("site", one_hot_NK, age_N2), ("age", age_N2, one_hot_NK)):
        try:
            statistic = explained_beyond(rows.h_NF, about, np.hstack([given, sex_N2]))
        except NotEvaluableError as reason:
            notes.refused(reason)
            continue
        outcomes.append(rows.outcome(task, "explained_variance", statistic))
    return outcomes


def inverse_simpson(h_NF: Floats, site_N: npt.NDArray[Any], *, seed: int) -> tuple[Floats, float]:
    """(N,) effective number of sites among each row's nearest neighbours, and its mean for neighbours drawn at random.

    The number of neighbours is 30, or a third of the rows where that is less. Neighbours at random have less than all sites
    too, the less the fewer they are and the more unequal the sites: shuffled sites say how many.
    """
    num_neighbors = max(1, min(MAX_NEIGHBORS, (len(h_NF) - 1) // 3))
    nearest_NV = NearestNeighbors(n_neighbors=num_neighbors, algorithm="brute").fit(h_NF).kneighbors(return_distance=False)
    code_N = np.unique(site_N, return_inverse=True)[1]

    def effective_number(sites_N: Ints) -> Floats:
        share_NK = (sites_N[nearest_NV][:, :, None] == np.arange(code_N.max() + 1)).mean(axis=1)
        return np.asarray(1 / np.square(share_NK).sum(axis=1))

    random = np.random.default_rng(seed)
    at_random = np.mean([effective_number(random.permutation(code_N)).mean() for _ in range(NUM_SHUFFLES)])
    return effective_number(code_N), float(at_random)


def discrepancy(h_NF: Floats, site_N: npt.NDArray[Any]) -> Statistic:
    """Unbiased squared maximum mean discrepancy, mean over pairs of sites, as a function of chosen rows.

    A row and its repeat in a resample are no pair: that would make every site look tighter than it is. A site with fewer than
    two different rows in a resample takes no part in it; nan when there are not two sites.
    """
    order = np.argsort(site_N, kind="stable")
    sites, first_K = np.unique(site_N[order], return_index=True)
    gram_NN = h_NF[order] @ h_NF[order].T
    square_N = np.diag(gram_NN)
    distance_NN = np.maximum(square_N[:, None] + square_N - 2 * gram_NN, 0)
    median = np.median(distance_NN[np.triu_indices(len(order), 1)])
    kernel_NN = np.exp(-distance_NN / (2 * median)) if median > 0 else (distance_NN == 0).astype(np.float64)
    np.fill_diagonal(kernel_NN, 0)
    place_N = np.argsort(order)

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        weight_N = np.bincount(place_N[chosen], minlength=len(order)).astype(np.float64)
        sum_KK = np.add.reduceat(np.add.reduceat(kernel_NN * weight_N, first_K, axis=1) * weight_N[:, None], first_K)
        size_K = np.add.reduceat(weight_N, first_K)
        pairs_KK = np.outer(size_K, size_K) - np.diag(np.add.reduceat(np.square(weight_N), first_K))
        there_K = np.diag(pairs_KK) > 0
        if there_K.sum() < 2:
            return float("nan")
        mean_KK = sum_KK[np.ix_(there_K, there_K)] / pairs_KK[np.ix_(there_K, there_K)]
        within_K = np.diag(mean_KK)
        return float((within_K[:, None] + within_K - 2 * mean_KK)[np.triu_indices(len(within_K), 1)].mean())

    assert len(sites) == len(first_K)
    return statistic


def explained_beyond(h_NF: Floats, about_NP: Floats, given_NQ: Floats) -> Statistic:
    """Share of the variance of h that one set of columns explains beyond another, as a function of chosen rows.

    Two nested linear models, squared residuals summed over features, each divided by 1 - the row's leverage: both residual
    variances are then unbiased, and the share is about 0 without an effect, however many columns there are (as omega squared and
    adjusted R2). A row that a model fits by itself (leverage 1) takes no part.

    Args:
        h_NF: (N, F) features.
        about_NP: (N, P) columns whose share is asked for.
        given_NQ: (N, Q) columns that come first; a constant is added.

    Raises:
        NotEvaluableError: No row is left, or nothing is left to explain.
    """
    residual_2N, leverage_2N = [], []
    for columns in (given_NQ, np.hstack([given_NQ, about_NP])):
        left_NR = _span(np.hstack([np.ones((len(h_NF), 1)), columns]))
        residual_2N.append(np.square(h_NF - left_NR @ (left_NR.T @ h_NF)).sum(axis=1))
        leverage_2N.append(np.square(left_NR).sum(axis=1))
    free_N = leverage_2N[1] < 1 - 1e-6
    reduced_N, full_N = (
        np.where(free_N, residual_N / np.where(free_N, 1 - leverage_N, 1), 0.0)
        for residual_N, leverage_N in zip(residual_2N, leverage_2N, strict=True)
    )
    if not reduced_N.sum() > 1e-9 * np.square(h_NF).sum():
        raise NotEvaluableError("explained variance: representations must vary beyond the other columns, got no variance.")

    def statistic(chosen: npt.NDArray[np.intp]) -> float:
        total = reduced_N[chosen].sum()
        return float(1 - full_N[chosen].sum() / total) if total > 0 else float("nan")

    return statistic


def _span(columns: Floats) -> Floats:
    """(N, R) orthonormal basis of what the columns span."""
    scale_P = np.sqrt(np.square(columns).sum(axis=0))
    left, singular, _ = np.linalg.svd(columns / np.where(scale_P > 0, scale_P, 1), full_matrices=False)
    return np.asarray(left[:, singular > 1e-9 * singular[0]])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """One row a held-out healthy subject."""

    h_NF: Floats
    site_N: npt.NDArray[np.str_]
    sex_N: npt.NDArray[np.str_]
    age_N: Floats
    subjects_N: Ints

    def outcome(self, task: str, metric: str, statistic: Statistic) -> Outcome:
        """A figure of all rows at once."""
        return Outcome(
            task=task,
            metric=metric,
            measure=lambda _truth, _predicted: statistic,
            truth_N=np.zeros(len(self.h_NF)),
            predicted_N=np.zeros(len(self.h_NF)),
            subjects_N=self.subjects_N,
            site_N=self.site_N,
            exchangeable=False,
        )


def _rows(embeddings: Embeddings, notes: Notes) -> _Rows:
    test, _ = held_out_classes(healthy_with_age(embeddings, notes), "site", notes)
    subjects, first_N, code_N = np.unique(test.subjects, return_index=True, return_inverse=True)
    count_N = np.bincount(code_N)
    sum_NF = np.zeros((len(subjects), test.h_NF.shape[1]))
    np.add.at(sum_NF, code_N, test.h_NF.astype(np.float64))
    h_NF = StandardScaler().fit_transform(sum_NF / count_N[:, None])
    if not h_NF.any():
        raise NotEvaluableError("spread: representations must differ between subjects, got one value for all.")
    age_N = np.bincount(code_N, weights=test.age_years) / count_N
    return _Rows(h_NF=h_NF, site_N=test.site[first_N], sex_N=test.sex[first_N], age_N=age_N, subjects_N=subjects)
