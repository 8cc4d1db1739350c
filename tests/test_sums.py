"""Probes from sums: equal to scikit-learn on pooled data, whatever the order of sites, and what a site withholds is named."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
from torch import Tensor

from core.evaluation import probes
from core.evaluation.age_sums import (
    WHOLE,
    AgeErrors,
    FoldMoments,
    RidgeCandidates,
    age_errors,
    age_scores,
    choose_alpha,
    fit_ridge,
    fold_moments,
)
from core.evaluation.class_sums import (
    ClassMoments,
    LogisticGradient,
    SiteProbe,
    class_moments,
    count_classes,
    fit_lda,
    fit_logistic,
    logistic_gradient,
    site_score,
)
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import NotEvaluableError
from core.evaluation.score_sums import area_under_curve, score_counts
from core.evaluation.sums import between_group_directions, mean_of_shares, random_directions, standardised, subject_folds
from core.moments import Reference, feature_sums, reference_from
from core.settings import MomentPolicy

ALL = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)
POLICY = MomentPolicy(min_group=10, diagonal_subjects=30, covariance_subjects_per_feature=3, round_counts_to=5)

Table = dict[str, Tensor]


def hospitals(num_sites: int, *, features: int = 6, seed: int = 0, first: int = 7) -> dict[str, Table]:
    """Sites of unequal sizes, every third with two scanners, the first small: features, age, scanner, train or not."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=g, dtype=torch.float64)
    found = {}
    for number in range(num_sites):
        size = first if number == 0 else 40 + int(torch.randint(0, 60, (1,), generator=g))
        scanner = torch.arange(size) // 3 % 2 if number % 3 == 2 else torch.zeros(size, dtype=torch.long)
        age = 18 + 60 * torch.rand(size, generator=g, dtype=torch.float64)
        x = torch.randn(size, features, generator=g, dtype=torch.float64) @ mixing
        x = x + torch.randn(2, features, generator=g, dtype=torch.float64)[scanner]
        x[:, 0] += age / 15
        train = torch.arange(size) % 4 != 3
        # As the encoder gives them.
        found[f"site{number:02d}"] = {"x": x.float(), "age": age, "scanner": scanner, "train": train}
    return found


def reference_of(sites: Mapping[str, Table], policy: MomentPolicy = ALL) -> Reference:
    reference = reference_from([feature_sums(s["x"][s["train"]], policy) for s in sites.values()])
    assert reference is not None
    return reference


def part_of(sites: Mapping[str, Table], train: bool, directions_KF: Tensor | None = None) -> dict[str, Table]:
    """Standardised features with their labels, of the training or of the held-out subjects."""
    reference = reference_of(sites)
    return {
        name: {
            "x": standardised(s["x"][s["train"] == train], reference, directions_KF),
            "age": s["age"][s["train"] == train],
            "scanner": s["scanner"][s["train"] == train],
        }
        for name, s in sites.items()
    }


def pooled(tables: Mapping[str, Table], key: str = "x") -> np.ndarray:
    return torch.cat([tables[name][key] for name in sorted(tables)]).numpy()


def class_numbers(tables: Mapping[str, Table]) -> np.ndarray:
    names = sorted({(name, int(code)) for name, t in tables.items() for code in t["scanner"]})
    return np.array([names.index((name, int(code))) for name in sorted(tables) for code in tables[name]["scanner"]])


def classes_told(tables: Mapping[str, Table], policy: MomentPolicy = ALL) -> dict[str, ClassMoments]:
    return {name: class_moments(t["x"], t["scanner"], policy=policy) for name, t in tables.items()}


Ask = Callable[[SiteProbe, Tensor], dict[str, LogisticGradient]]


def asking(tables: Mapping[str, Table], policy: MomentPolicy = ALL) -> Ask:
    def ask(probe: SiteProbe, class_weight_K: Tensor) -> dict[str, LogisticGradient]:
        return {
            name: logistic_gradient(probe, class_weight_K, t["x"], t["scanner"], site=name, policy=policy)
            for name, t in tables.items()
        }

    return ask


def embeddings_of(sites: Mapping[str, Table]) -> Embeddings:
    x = torch.cat([s["x"] for s in sites.values()]).numpy()
    size = [len(s["x"]) for s in sites.values()]
    return Embeddings(
        h_NF=x,
        subject=np.concatenate([np.arange(n) for n in size]),
        site=np.repeat(list(sites), size),
        scanner=np.full(len(x), "A"),
        sex=np.full(len(x), ""),
        diagnosis=np.full(len(x), "control"),
        split=np.where(torch.cat([s["train"] for s in sites.values()]).numpy(), "train", "test"),
        age_years=torch.cat([s["age"] for s in sites.values()]).numpy(),
    )


def age_probe(
    sites: Mapping[str, Table], fold: Mapping[str, Tensor], policy: MomentPolicy = ALL
) -> tuple[RidgeCandidates, dict[str, AgeErrors]]:
    train, test = part_of(sites, True), part_of(sites, False)
    candidates = fit_ridge({n: fold_moments(t["x"], t["age"], fold[n], policy=policy) for n, t in train.items()})
    errors = {
        n: age_errors(
            candidates, (train[n]["x"], train[n]["age"], fold[n]), (test[n]["x"], test[n]["age"]), site=n, policy=policy
        )
        for n in sites
    }
    return candidates, errors


@pytest.mark.parametrize(("num_sites", "features"), [(2, 3), (5, 6), (24, 12)])
def test_age_from_sums_is_the_pooled_probe(num_sites: int, features: int) -> None:
    sites = hospitals(num_sites, features=features, seed=num_sites)
    evaluations, _ = probes.age_error(embeddings_of(sites), stage="raw", regime="pooled", seed=4, num_resamples=20)
    # The probe's own folds, in place of those by hash.
    train = embeddings_of(sites).select(embeddings_of(sites).split == "train")
    fold_N = torch.from_numpy(probes._folds(train.subjects, np.zeros(len(train), dtype=np.int64), 4))
    fold = {name: fold_N[torch.from_numpy(train.site == name)] for name in sites}
    candidates, errors = age_probe(sites, fold)
    assert candidates.folds == ("0", "1", "2", "3", "4")
    scores, notes = age_scores(errors, choose_alpha(errors))
    assert notes == ()
    expected = {(e.metric, e.site): e.value for e in evaluations}
    assert scores["all"].r2 == pytest.approx(expected["r2", "all"], abs=1e-8)
    assert set(scores) == {"all", *sites}
    told = {name: scores[name].mae for name in scores if ("mae", name) in expected}
    # A site of one held-out subject has no bootstrap interval, hence no figure there.
    assert len(told) >= num_sites
    assert told == pytest.approx({name: expected["mae", name] for name in told}, abs=1e-8)
    assert scores["all"].low < scores["all"].mae < scores["all"].high
    assert scores["all"].num_subjects == sum(int((~s["train"]).sum()) for s in sites.values())


def test_the_normal_interval_covers_as_often_as_it_says() -> None:
    g = torch.Generator().manual_seed(0)
    zeros = torch.zeros(0), torch.zeros(0, 1)
    covered = 0
    for _ in range(400):
        error = torch.randn(80, generator=g, dtype=torch.float64)
        parts = {
            name: AgeErrors(
                *zeros,
                torch.tensor([float(len(part))]),
                part.abs().mean()[None],
                part.square().mean()[None],
                torch.tensor([50.0, 9.0]),
            )
            for name, part in (("a", error[:30]), ("b", error[30:]))
        }
        score = age_scores(parts, 0)[0]["all"]
        covered += score.low <= math.sqrt(2 / math.pi) <= score.high
    assert 0.92 < covered / 400 < 0.97


def test_the_order_of_sites_changes_nothing() -> None:
    sites = hospitals(5)
    other = dict(reversed(sites.items()))
    # The reference is a sum over sites in their order: the same one for both.
    train = part_of(sites, True)
    back = {name: train[name] for name in other}
    fold = {name: subject_folds([str(i) for i in range(len(t["x"]))], name) for name, t in train.items()}
    one = fit_ridge({n: fold_moments(t["x"], t["age"], fold[n], policy=ALL) for n, t in train.items()})
    two = fit_ridge({n: fold_moments(t["x"], t["age"], fold[n], policy=ALL) for n, t in back.items()})
    assert torch.equal(one.weight_LAF, two.weight_LAF)
    assert torch.equal(fit_lda(classes_told(train)).weight_KF, fit_lda(classes_told(back)).weight_KF)
    logistic = [fit_logistic(classes_told(tables), asking(tables)).weight_KF for tables in (train, back)]
    assert torch.equal(*logistic)


def test_sites_too_small_for_folds_are_told_as_a_whole_and_smaller_ones_not_at_all() -> None:
    sites = hospitals(4, features=2, seed=1, first=9)
    fold = {n: subject_folds([str(i) for i in range(int(s["train"].sum()))], n) for n, s in sites.items()}
    large = max(sites, key=lambda name: len(fold[name]))
    fold[large] = torch.arange(len(fold[large])) % 3
    candidates, errors = age_probe(sites, fold, POLICY)
    whole = [name for name in sites if name not in ("site00", large)]
    assert candidates.folds == ("0", "1", "2", *(f"site {name}" for name in whole))
    assert "site00: age probe: a covariance of 3 columns needs 10 subjects" in candidates.notes
    assert all(f"{n}: age probe: told as a whole, since folds need 10 subjects each" in candidates.notes for n in whole)
    assert all((part.fold_count_L > 0).sum() == {"site00": 0, large: 3}.get(name, 1) for name, part in errors.items())
    scores, notes = age_scores(errors, choose_alpha(errors))
    assert "site00" not in scores
    assert "site00: errors of age need 10 held-out subjects" in notes
    assert scores["all"].num_subjects % 5 == 0

    # A whole site left out is a model of the others alone.
    train = part_of(sites, True)
    kept = {n: fold_moments(t["x"], t["age"], fold[n], policy=POLICY) for n, t in train.items() if n != whole[0]}
    torch.testing.assert_close(fit_ridge(kept).weight_LAF[-1], candidates.weight_LAF[3])


def test_an_unseen_site_is_scored_by_the_model_of_all() -> None:
    sites = hospitals(4, seed=6)
    unseen = sites.pop("site03")
    fold = {n: torch.arange(int(s["train"].sum())) % 5 for n, s in sites.items()}
    candidates, errors = age_probe(sites, fold)
    x = standardised(unseen["x"], reference_of(sites))
    alpha = choose_alpha(errors)
    part = age_errors(candidates, None, (x, unseen["age"]), site="site03", policy=ALL)
    expected = (x @ candidates.weight_LAF[-1, alpha] + candidates.intercept_LA[-1, alpha] - unseen["age"]).abs().mean()
    assert age_scores({"site03": part}, alpha)[0]["site03"].mae == pytest.approx(float(expected))


def test_unknown_ages_take_no_part_and_are_named() -> None:
    sites = hospitals(3)
    fold = {n: torch.arange(int(s["train"].sum())) % 5 for n, s in sites.items()}
    sites["site01"]["age"][[0, 3]] = math.nan
    candidates, errors = age_probe(sites, fold)
    assert candidates.notes == ("site01: subjects without an age take no part in the age probe",)
    assert age_scores(errors, 0)[1] == ("site01: held-out subjects without an age take no part in the age probe",)
    assert candidates.weight_LAF.isfinite().all()


def test_one_fold_or_none_is_no_age_probe() -> None:
    one = {"site00": fold_moments(torch.randn(30, 2), 20 + torch.rand(30), torch.zeros(30).long(), policy=POLICY)}
    with pytest.raises(NotEvaluableError, match="folds told by the sites must be at least 2, got 1"):
        fit_ridge(one)
    small = fold_moments(torch.randn(5, 2), torch.rand(5), torch.zeros(5).long(), policy=POLICY)
    with pytest.raises(NotEvaluableError, match=r"got 0. a: age probe: a covariance of 3 columns needs 10 subjects"):
        fit_ridge({"a": small})
    candidates = fit_ridge({"a": fold_moments(torch.randn(30, 2), torch.rand(30), torch.arange(30) % 2, policy=POLICY)})
    nothing = age_errors(candidates, None, (torch.randn(3, 2), torch.rand(3)), site="b", policy=POLICY)
    with pytest.raises(NotEvaluableError, match="errors of at least one fold must be told"):
        choose_alpha({"b": nothing})
    with pytest.raises(NotEvaluableError, match=r"errors of at least one site must be told, got none. b: errors of age need 10"):
        age_scores({"b": nothing}, 0)


def test_folds_depend_on_the_subject_and_the_site_alone() -> None:
    names = [f"sub-{i:03d}" for i in range(500)]
    fold = subject_folds(names, "north")
    assert torch.equal(subject_folds(names[::-1], "north"), fold.flip(0))
    assert not torch.equal(subject_folds(names, "south"), fold)
    assert fold.bincount().min() > 70
    assert len(fold.bincount()) == 5


@pytest.mark.parametrize(("num_sites", "shrinkage"), [(2, 0.0), (4, 0.1), (24, 0.5)])
def test_lda_from_sums_is_scikit_learns(num_sites: int, shrinkage: float) -> None:
    train = part_of(hospitals(num_sites, seed=num_sites, first=12), True)
    probe = fit_lda(classes_told(train), shrinkage=shrinkage)
    y = class_numbers(train)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(pooled(train), y)
    decisions = pooled(train) @ theirs.coef_.T + theirs.intercept_
    ours = probe.decisions(torch.from_numpy(pooled(train))).numpy()
    if num_sites == 2:
        ours = ours[:, 1:] - ours[:, :1]
    priors = np.log(theirs.priors_) if num_sites > 2 else np.log(theirs.priors_[1] / theirs.priors_[0])
    np.testing.assert_allclose(ours, decisions - priors, atol=1e-9)


@pytest.mark.parametrize(("num_sites", "c"), [(2, 1.0), (3, 100.0), (6, 0.1), (24, 1.0)])
@pytest.mark.parametrize("with_covariance", [True, False])
def test_logistic_regression_from_gradients_is_scikit_learns(num_sites: int, c: float, with_covariance: bool) -> None:
    train = part_of(hospitals(num_sites, seed=num_sites), True)
    told = classes_told(train, ALL if with_covariance else replace(ALL, covariance_subjects_per_feature=1000))
    probe = fit_logistic(told, asking(train), c=c, tolerance=1e-9, max_exchanges=2000)
    theirs = LogisticRegression(C=c, class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=1000)
    theirs.fit(pooled(train), class_numbers(train))
    decisions = theirs.decision_function(pooled(train))
    ours = probe.decisions(torch.from_numpy(pooled(train))).numpy()
    if num_sites == 2:
        np.testing.assert_allclose(ours[:, 1] - ours[:, 0], decisions, atol=1e-6)
    else:
        np.testing.assert_allclose(ours, decisions, atol=1e-6)
        np.testing.assert_allclose(probe.weight_KF.numpy(), theirs.coef_, atol=1e-6)


def test_the_gradient_is_the_losses() -> None:
    train = part_of(hospitals(4), True)
    zero = fit_lda(classes_told(train))
    weight_K = torch.arange(1.0, len(zero.classes) + 1, dtype=torch.float64)
    table = train["site02"]

    def loss(weight_KF: Tensor, intercept_K: Tensor) -> Tensor:
        probe = replace(zero, weight_KF=weight_KF, intercept_K=intercept_K)
        return logistic_gradient(probe, weight_K, table["x"], table["scanner"], site="site02", policy=ALL).loss

    given = logistic_gradient(zero, weight_K, table["x"], table["scanner"], site="site02", policy=ALL)
    by_weight, by_intercept = torch.autograd.functional.jacobian(loss, (zero.weight_KF, zero.intercept_K))
    torch.testing.assert_close(given.gradient_KD, torch.cat([by_weight[0], by_intercept[0][:, None]], dim=1))


def test_the_usual_tolerance_gives_the_same_predictions_in_few_exchanges() -> None:
    train = part_of(hospitals(8, seed=5), True)
    exchanges = []

    def ask(probe: SiteProbe, weight_K: Tensor) -> dict[str, LogisticGradient]:
        exchanges.append(1)
        return asking(train)(probe, weight_K)

    x = torch.from_numpy(pooled(train))
    probe = fit_logistic(classes_told(train), ask)
    assert len(exchanges) < 40
    assert probe.notes == ()
    exact = fit_logistic(classes_told(train), asking(train), tolerance=1e-9, max_exchanges=2000)
    assert float((probe.decisions(x).argmax(1) == exact.decisions(x).argmax(1)).double().mean()) > 0.995
    stopped = fit_logistic(classes_told(train), asking(train), max_exchanges=4)
    assert stopped.notes[-1].startswith("logistic site probe: not converged after ")


def test_a_site_that_withholds_its_gradient_leaves_with_its_classes() -> None:
    train = part_of(hospitals(4, first=14), True)
    policy = replace(ALL, covariance_subjects_per_feature=3)
    probe = fit_logistic(classes_told(train, policy), asking(train, policy), tolerance=1e-9)
    assert "site00: logistic site probe: gradients of 5 classes need 15 subjects" in probe.notes
    rest = {name: table for name, table in train.items() if name != "site00"}
    alone = fit_logistic(classes_told(rest), asking(rest), tolerance=1e-9)
    assert probe.classes == alone.classes
    torch.testing.assert_close(probe.weight_KF, alone.weight_KF, atol=1e-6, rtol=0)
    all_silent = replace(ALL, covariance_subjects_per_feature=1000)
    with pytest.raises(NotEvaluableError, match=r"classes told must be at least 2, got 0. .*gradients of 5 classes need 5000"):
        fit_logistic(classes_told(train), asking(train, all_silent))


def test_counts_at_the_sites_are_the_pooled_confusion() -> None:
    sites = hospitals(5, seed=8)
    train, test = part_of(sites, True), part_of(sites, False)
    probe = fit_lda(classes_told(train))
    counts = {n: count_classes(probe, t["x"], t["scanner"], site=n, policy=ALL) for n, t in test.items()}
    score = site_score(probe, counts)
    truth, predicted = class_numbers(test), probe.decisions(torch.from_numpy(pooled(test))).argmax(dim=1).numpy()
    np.testing.assert_array_equal(score.count_CK.numpy(), confusion_matrix(truth, predicted))
    assert score.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert score.low < score.balanced_accuracy < score.high
    assert score.classes == probe.classes
    assert score.notes == ()


def test_small_scanners_are_withheld_rounded_and_named() -> None:
    sites = hospitals(5, seed=8)
    train, test = part_of(sites, True), part_of(sites, False)
    told = classes_told(train, POLICY)
    probe = fit_lda(told)
    assert probe.notes == ("site00: scanner 0 is no class: its mean needs 10 subjects",)
    counts = {n: count_classes(probe, t["x"], t["scanner"], site=n, policy=POLICY) for n, t in test.items()}
    score = site_score(probe, counts)
    assert (score.count_CK % 5 == 0).all()
    unscored = {
        (n, code) for n, t in test.items() for code in t["scanner"].unique().tolist() if (t["scanner"] == code).sum() < 10
    }
    assert set(score.classes) == set(probe.classes) - unscored
    assert ("site02", 0) in unscored
    assert "site02: scanner 0 is not scored: that needs 10 held-out subjects" in score.notes
    with pytest.raises(NotEvaluableError, match="classes scored must be at least 2, got 0"):
        site_score(probe, {"site00": counts["site00"]})
    with pytest.raises(NotEvaluableError, match="classes told must be at least 2, got 1"):
        fit_lda({"site01": told["site01"]})


def test_sites_without_a_covariance_tell_their_means() -> None:
    train = part_of(hospitals(4, seed=2, first=16), True)
    policy = replace(ALL, covariance_subjects_per_feature=4)
    probe = fit_lda(classes_told(train, policy))
    assert probe.notes == ("site00: site probe: only means are told, a covariance of 6 features needs 24 subjects",)
    assert ("site00", 0) in probe.classes
    with pytest.raises(NotEvaluableError, match="the covariance of at least one site must be told, got none; project"):
        fit_lda(classes_told(train, replace(ALL, covariance_subjects_per_feature=1000)))
    with pytest.raises(ValueError, match=r"shrinkage must be between 0 and 1, got 1.5"):
        fit_lda(classes_told(train), shrinkage=1.5)


@pytest.mark.parametrize("codes", [2, 3])
def test_labels_that_sites_share_are_one_class(codes: int) -> None:
    train = part_of(hospitals(4, seed=3), True)
    for number, table in enumerate(train.values()):
        table["scanner"] = (table["age"] + 5 * number).long() % codes
    y = pooled(train, "scanner")
    x = torch.from_numpy(pooled(train))
    lda = fit_lda(classes_told(train), shrinkage=0.2, shared=True)
    assert lda.classes == tuple(("", code) for code in range(codes))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(x.numpy(), y)
    means = np.stack([x.numpy()[y == k].mean(axis=0) for k in range(codes)])
    weights = np.linalg.solve(theirs.covariance_, means.T).T
    np.testing.assert_allclose(lda.weight_KF.numpy(), weights, atol=1e-9)
    probe = fit_logistic(classes_told(train), asking(train), shared=True, tolerance=1e-9, max_exchanges=2000)
    ref = LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-12).fit(x.numpy(), y)
    ours = probe.decisions(x).numpy()
    np.testing.assert_allclose(ours[:, 1] - ours[:, 0] if codes == 2 else ours, ref.decision_function(x.numpy()), atol=1e-6)
    counts = {n: count_classes(probe, t["x"], t["scanner"], site=n, policy=ALL) for n, t in train.items()}
    np.testing.assert_array_equal(site_score(probe, counts).count_CK, confusion_matrix(y, ours.argmax(axis=1)))


def test_the_interval_of_a_mean_of_shares() -> None:
    # One share is Wilson's interval: 8 of 10 gives [0.4902, 0.9433] (Wilson 1927; scipy's binomtest agrees).
    one = mean_of_shares(torch.tensor([8.0]), torch.tensor([10.0]))
    assert one == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)
    assert mean_of_shares(torch.tensor([10.0, 20.0]), torch.tensor([10.0, 20.0]))[1:] == pytest.approx((0.8395, 1.0), abs=1e-3)
    g = np.random.default_rng(0)
    total, share = np.array([12.0, 30.0, 18.0, 60.0]), np.array([0.9, 0.4, 0.7, 0.2])
    covered = 0
    for _ in range(1000):
        _, low, high = mean_of_shares(
            torch.from_numpy(g.binomial(total.astype(int), share).astype(float)), torch.from_numpy(total)
        )
        covered += low <= share.mean() <= high
    assert 0.92 < covered / 1000 < 0.98


def test_auc_from_histograms_is_within_its_bound() -> None:
    g = torch.Generator().manual_seed(0)
    sites = {}
    for name, size in (("a", 30), ("b", 70), ("c", 4)):
        label = torch.arange(size) % 2
        sites[name] = torch.sigmoid(torch.randn(size, generator=g, dtype=torch.float64) + label), label
    parts = {name: score_counts(*site, policy=ALL, bins=50) for name, site in sites.items()}
    value, bound, notes = area_under_curve(parts)
    exact = roc_auc_score(torch.cat([s[1] for s in sites.values()]), torch.cat([s[0] for s in sites.values()]))
    assert notes == ()
    assert abs(value - exact) <= bound < 0.02
    halves = {name: (torch.where(s > 0.5, 0.75, 0.25), label) for name, (s, label) in sites.items()}
    coarse = area_under_curve({name: score_counts(*site, policy=ALL, bins=2) for name, site in halves.items()})[0]
    labels, scores = (torch.cat([s[k] for s in halves.values()]) for k in (1, 0))
    assert coarse == pytest.approx(roc_auc_score(labels, scores))
    rounded = {name: score_counts(*site, policy=POLICY, bins=5) for name, site in sites.items()}
    assert (torch.cat([part.count_2E for part in rounded.values()], dim=1) % 5 == 0).all()
    assert area_under_curve(rounded)[2] == ("c: scores need 10 held-out subjects of each label",)
    with pytest.raises(NotEvaluableError, match=r"scores of both labels must be told.*c: scores need 10"):
        area_under_curve({"c": rounded["c"]})
    with pytest.raises(ValueError, match="scores must be probabilities"):
        score_counts(torch.tensor([0.5, 1.5]), torch.tensor([0, 1]), policy=ALL)


def test_directions_are_orthonormal_public_and_find_the_groups() -> None:
    random = random_directions(12, 5, seed=3)
    torch.testing.assert_close(random @ random.T, torch.eye(5).double())
    assert torch.equal(random, random_directions(12, 5, seed=3))
    assert not torch.equal(random, random_directions(12, 5, seed=4))
    with pytest.raises(ValueError, match="count must be 1 to the 12 features, got 13"):
        random_directions(12, 13, seed=0)
    train = part_of(hospitals(3), True)
    told = classes_told(train)
    count = torch.cat([part.count_C for part in told.values()])
    mean = torch.cat([part.mean_CF for part in told.values()])
    found = between_group_directions(count, mean, 32)
    assert found.shape == (3, 6)  # four scanners differ in three directions
    torch.testing.assert_close(found @ found.T, torch.eye(3).double())
    centred = mean - count @ mean / count.sum()
    torch.testing.assert_close(centred @ found.T @ found, centred)
    with pytest.raises(ValueError, match="at least two group means must differ"):
        between_group_directions(count, torch.ones(len(count), 6), 3)
    # Where classes share their covariance and no shrinkage is used, projected probes see what these directions hold.
    small = fit_lda(classes_told(part_of(hospitals(3), True, found)))
    assert small.weight_KF.shape == (4, 3)


def test_a_constant_feature_and_a_site_of_one_subject_stay_finite() -> None:
    sites = hospitals(4, first=1)
    for site in sites.values():
        site["x"][:, 2] = 5.0
    fold = {n: torch.arange(int(s["train"].sum())) % 5 for n, s in sites.items()}
    candidates, errors = age_probe(sites, fold)
    assert candidates.weight_LAF.isfinite().all()
    assert candidates.weight_LAF[:, :, 2].abs().max() < 1e-9
    scores, notes = age_scores(errors, choose_alpha(errors))
    assert math.isfinite(scores["all"].mae)
    assert notes == ("site00: errors of age need 1 held-out subjects",)
    train, test = part_of(sites, True), part_of(sites, False)
    for probe in (fit_lda(classes_told(train), shrinkage=0.0), fit_logistic(classes_told(train), asking(train))):
        counts = {n: count_classes(probe, t["x"], t["scanner"], site=n, policy=ALL) for n, t in test.items()}
        score = site_score(probe, counts)
        assert ("site00", 0) not in score.classes
        assert 0.2 < score.balanced_accuracy <= 1


def test_messages_that_cannot_be_are_refused() -> None:
    train = part_of(hospitals(2), True)["site01"]
    folds = fold_moments(train["x"], train["age"], torch.zeros(len(train["x"])).long(), policy=ALL)
    with pytest.raises(ValueError, match=r"fold moments: mean_GD must|fold moments: covariance_GDD must have shape"):
        replace(folds, covariance_GDD=folds.covariance_GDD[:, :3])
    with pytest.raises(ValueError, match="fold moments: values must be finite"):
        FoldMoments(folds.fold_G, folds.count_G, folds.mean_GD * math.inf, folds.covariance_GDD)
    with pytest.raises(ValueError, match="fold moments: counts must be positive"):
        replace(folds, count_G=-folds.count_G)
    classes = class_moments(train["x"], train["scanner"], policy=ALL)
    with pytest.raises(ValueError, match=r"class moments: within_FF must have shape \(6, 6\), got \(2, 6\)"):
        replace(classes, within_FF=classes.within_FF[:2])
    counts = count_classes(fit_lda({"a": classes, "b": classes}), train["x"], train["scanner"], site="a", policy=ALL)
    with pytest.raises(ValueError, match="class counts: counts must be at least 0"):
        replace(counts, count_CK=torch.tensor([[9.0, -1.0]]))
    scores = score_counts(torch.rand(9), torch.arange(9) % 2, policy=ALL)
    with pytest.raises(ValueError, match="score counts: counts must be at least 0"):
        replace(scores, count_2E=-scores.count_2E - 1)
    with pytest.raises(ValueError, match=r"logistic gradient: loss must have shape \(1,\)"):
        LogisticGradient(torch.zeros(2), torch.zeros(0, 0))
    assert WHOLE == -1
