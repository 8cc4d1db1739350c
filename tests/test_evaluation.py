"""Embeddings, the subject bootstrap and the probes, on data whose truth is known."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from core.evaluation import outcomes, probes
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import (
    Evaluation,
    NotEvaluableError,
    read_metrics,
    subject_bootstrap,
    write_metrics,
)
from core.evaluation.predictions import Predictions, evaluate_predictions
from core.targets import Target

PROBES = (
    "balanced_accuracy",
    "balanced_accuracy_knn",
    "balanced_accuracy_boosting",
    "balanced_accuracy_heldout",
    "balanced_accuracy_knn_heldout",
)
RUN = {"stage": "pretrained", "regime": "federated", "seed": 0}


def cohort(
    h_NF=None, *, sites=("A", "B", "C"), subjects=30, scans=2, features=12, age_by_site=0.0, patients_at=("C",), seed=0
) -> Embeddings:
    """Sites of equal size, every subject with as many scans; h is noise unless given."""
    random = np.random.default_rng(seed)
    site, subject = np.meshgrid(np.arange(len(sites)), np.arange(subjects), indexing="ij")
    site, subject = np.repeat(site.ravel(), scans), np.repeat(subject.ravel(), scans)
    num_scans = len(site)
    person = site * subjects + subject
    age = (random.uniform(20, 60, len(sites) * subjects))[person] + age_by_site * site
    names = np.array(sites)[site]
    patient = np.isin(names, patients_at) & (subject % 2 == 1)
    return Embeddings(
        h_NF=(random.normal(size=(num_scans, features)) if h_NF is None else h_NF).astype(np.float32),
        subject=subject,
        site=names,
        scanner=np.where((site == 0) & (person % 4 < 2), "second", "first"),
        sex=np.where(person % 3 == 0, "F", "M"),
        diagnosis=np.where(patient, "patient", "control"),
        split=np.array(["train", "test", "train", "val", "test"])[(subject // 2) % 5],
        age_years=age,
    )


def by_name(evaluations: list[Evaluation]) -> dict[tuple[str, str], Evaluation]:
    return {(e.task, e.metric): e for e in evaluations if e.site == "all"}


# embeddings


def test_embeddings_survive_saving_selecting_and_joining(tmp_path):
    whole = cohort()
    whole.save(tmp_path / "h.npz")
    loaded = Embeddings.load(tmp_path / "h.npz")
    halves = [whole.select(whole.site == "A"), whole.select(whole.site != "A")]
    for other in (loaded, Embeddings.concatenate(halves)):
        for field in fields(Embeddings):
            mine, theirs = getattr(whole, field.name), getattr(other, field.name)
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["h.npz"]
    assert len(whole.select(np.zeros(len(whole), dtype=bool))) == 0


def test_subjects_are_told_apart_by_site():
    embeddings = cohort(sites=("A", "B"), subjects=4, scans=2)
    assert embeddings.subject.max() == 3
    assert np.bincount(embeddings.subjects).tolist() == [2] * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h_NF": np.zeros((4, 3))}, "h_NF must be a float32 matrix"),
        ({"h_NF": np.full((4, 3), np.nan, np.float32)}, "h_NF must be finite, got 4 scans"),
        ({"subject": np.zeros(3, dtype=int)}, "subject must be one number for each of the 4 scans"),
        ({"subject": np.zeros(4)}, "subject must be one number"),
        ({"subject": np.array([0, 0, 1, -1])}, "subject must be an index of at least 0, got -1"),
        ({"site": np.array(["A", "A", "A", ""])}, "site must be a non-empty text"),
        ({"sex": np.array(["F", "M", "x", ""])}, "sex must be one of .* got 'x'"),
        ({"diagnosis": np.array(["healthy"] * 4)}, "diagnosis must be one of"),
        ({"split": np.array(["train", "train", "test", "eval"])}, "split must be one of"),
        ({"age_years": np.array([1.0, np.inf, 2, 3])}, "age_years must be at least 0 or nan"),
        ({"split": np.array(["train", "test", "test", "test"])}, "a subject must be in one split, got 1"),
    ],
)
def test_embeddings_refuse(change, message):
    right = {
        "h_NF": np.zeros((4, 3), np.float32),
        "subject": np.array([0, 0, 1, 2]),
        "site": np.array(["A"] * 4),
        "scanner": np.array([""] * 4),
        "sex": np.array(["F", "M", "", ""]),
        "diagnosis": np.array([""] * 4),
        "split": np.array(["train", "train", "val", "test"]),
        "age_years": np.array([1.0, np.nan, 2, 3]),
    }
    Embeddings(**right)
    with pytest.raises(ValueError, match=message):
        Embeddings(**right | change)


def test_joining_refuses_different_widths_and_loading_other_arrays(tmp_path):
    with pytest.raises(ValueError, match=r"one number of features, got \[5, 6\]"):
        Embeddings.concatenate([cohort(features=5), cohort(features=6)])
    with pytest.raises(ValueError, match="one number of features"):
        Embeddings.concatenate([])
    np.savez(tmp_path / "other.npz", h=np.zeros(3))
    with pytest.raises(ValueError, match="must hold the arrays"):
        Embeddings.load(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", h=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="must hold the arrays"):
        Embeddings.load(tmp_path / "objects.npz")


# intervals


def test_interval_covers_the_truth_as_often_as_it_says():
    """Subjects ~ N(0, 1) with two scans each: the 95 % interval of the mean holds 0 in about 95 of 100 samples."""
    covered = 0
    for sample in range(300):
        random = np.random.default_rng(sample)
        value_N = np.repeat(random.normal(size=50), 2) + 0.1 * random.normal(size=100)
        _, low, high = subject_bootstrap(
            np.repeat(np.arange(50), 2), lambda chosen, v=value_N: v[chosen].mean(), num_resamples=200, seed=sample
        )
        covered += low <= 0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_a_second_scan_of_the_same_subjects_does_not_narrow_the_interval():
    value_S = np.random.default_rng(0).normal(size=40)
    once = subject_bootstrap(np.arange(40), lambda chosen: value_S[chosen].mean())
    twice_N = np.repeat(value_S, 2)
    twice = subject_bootstrap(np.repeat(np.arange(40), 2), lambda chosen: twice_N[chosen].mean())
    np.testing.assert_allclose(once, twice, rtol=1e-12)


def test_resamples_bring_all_scans_of_whole_subjects():
    groups_N = np.array(["a", "b", "b", "c", "c", "c"])
    seen = []
    subject_bootstrap(groups_N, lambda chosen: seen.append(chosen) or 0.0, num_resamples=50)
    scans_of = {"a": [0], "b": [1, 2], "c": [3, 4, 5]}
    for chosen in seen:
        counts = np.bincount(chosen, minlength=6)
        assert all(len(set(counts[scans].tolist())) == 1 for scans in scans_of.values())
        assert sum(counts[scans[0]] for scans in scans_of.values()) == 3


def test_undefined_resamples_are_redrawn_and_refused_past_a_share():
    kept = []

    def minority(labels_N):
        def statistic(chosen):
            share = labels_N[chosen].mean()
            kept.append(share)
            return share if 0 < share < 1 else float("nan")

        return statistic

    # P(no positive among 20) with 3 positives: 0.85^20 = 4 %; with 1 positive: 0.95^20 = 36 %.
    value, low, _ = subject_bootstrap(np.arange(20), minority(np.arange(20) < 3), num_resamples=500)
    assert value == 0.15
    assert low > 0
    assert len(kept) > 501
    with pytest.raises(NotEvaluableError, match="at most 20% of 500, got 101"):
        subject_bootstrap(np.arange(20), minority(np.arange(20) < 1), num_resamples=500)


def test_bootstrap_refuses_what_has_no_interval():
    with pytest.raises(NotEvaluableError, match="number of subjects must be at least 2 for an interval, got 1"):
        subject_bootstrap(np.zeros(5), lambda _: 1.0)
    with pytest.raises(NotEvaluableError, match="must be defined on all scans, got nan"):
        subject_bootstrap(np.arange(5), lambda _: float("nan"))
    with pytest.raises(ValueError, match="num_resamples must be at least 1, got 0"):
        subject_bootstrap(np.arange(5), lambda _: 1.0, num_resamples=0)


EVALUATION = Evaluation(
    stage="pretrained",
    task="site",
    metric="balanced_accuracy",
    value=0.4,
    low=0.3,
    high=0.5,
    regime="federated",
    site="all",
    num_subjects=7,
    seed=0,
)


def test_metrics_survive_writing(tmp_path):
    written = [EVALUATION, replace(EVALUATION, stage="chance", value=0.25, low=None, high=None)]
    write_metrics(tmp_path / "metrics.json", written)
    assert read_metrics(tmp_path / "metrics.json") == written
    keys = ["stage", "task", "metric", "value", "low", "high", "regime", "site", "num_subjects", "seed"]
    assert [list(entry) for entry in json.loads((tmp_path / "metrics.json").read_text())] == [keys, keys]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "must be finite"),
        ({"high": float("inf")}, "must be finite"),
        ({"low": None, "high": None}, "must be finite"),
        ({"low": 0.6}, "low must be at most high"),
        ({"stage": "chance"}, "low and high must be None for a constant"),
        ({"site": ""}, "site must be a non-empty text"),
        ({"seed": 0.5}, "seed must be an int"),
        ({"num_subjects": -1}, "num_subjects must be an int of at least 0"),
    ],
)
def test_evaluation_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(EVALUATION, **change)


def test_metrics_with_other_keys_are_refused(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps([EVALUATION.to_dict() | {"extra": 1}]))
    with pytest.raises(ValueError, match="must have the keys"):
        read_metrics(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a list of objects"):
        read_metrics(path)


# scores


def test_scores_equal_scikit_learn_on_resamples():
    random = np.random.default_rng(0)
    truth_N, predicted_N = random.integers(4, size=80), random.integers(4, size=80)
    label_N, score_N = random.integers(2, size=80), random.integers(6, size=80) / 5
    accuracy = outcomes.balanced_accuracy(truth_N, predicted_N)
    area = outcomes.area_under_curve(label_N, score_N)
    for _ in range(20):
        chosen = random.integers(80, size=80)
        assert accuracy(chosen) == pytest.approx(balanced_accuracy_score(truth_N[chosen], predicted_N[chosen]), abs=1e-12)
        assert area(chosen) == pytest.approx(roc_auc_score(label_N[chosen], score_N[chosen]), abs=1e-12)
    assert np.isnan(accuracy(np.flatnonzero(truth_N == 2)))
    assert np.isnan(area(np.flatnonzero(label_N == 1)))


# probes


def test_noise_is_at_chance_and_one_hot_sites_are_read_without_error():
    noise = cohort(subjects=60, patients_at=())
    found = by_name(probes.site_predictability(noise, **RUN)[0])
    for metric in PROBES:
        e = found["site", metric]
        assert e.low <= 1 / 3 <= e.high
        assert e.num_subjects == 3 * 24

    one_hot = cohort((noise.site[:, None] == ["A", "B", "C"]).astype(float), subjects=60, patients_at=())
    for e in probes.site_predictability(one_hot, **RUN)[0]:
        assert (e.value, e.low, e.high) == (1.0, 1.0, 1.0)


def test_neighbours_and_boosting_see_a_site_that_a_linear_probe_cannot():
    """Site A lies inside, site B on a ring around it: no line separates them."""
    random = np.random.default_rng(0)
    where = cohort(sites=("A", "B"), subjects=80, patients_at=())
    angle_N = random.uniform(0, 2 * np.pi, len(where))
    radius_N = np.where(where.site == "A", 0.2, 2.0)
    ring = replace(where, h_NF=(radius_N * np.array([np.cos(angle_N), np.sin(angle_N)])).T.astype(np.float32))
    found = by_name(probes.site_predictability(ring, **RUN)[0])
    assert found["site", "balanced_accuracy"].value < 0.7
    for metric in ("balanced_accuracy_knn", "balanced_accuracy_boosting", "balanced_accuracy_knn_heldout"):
        assert found["site", metric].value > 0.97


@pytest.mark.usefixtures("quick_probes")
def test_nothing_depends_on_the_scale_of_h():
    plain = cohort(age_by_site=5)
    leaking = replace(plain, h_NF=plain.h_NF + (plain.site == "B")[:, None] * np.float32(0.6))
    reference, notes = probes.evaluate(leaking, num_resamples=50, **RUN)
    scaled, scaled_notes = probes.evaluate(replace(leaking, h_NF=leaking.h_NF / 1024), num_resamples=50, **RUN)
    assert scaled == reference
    assert scaled_notes == notes
    thousandth, _ = probes.evaluate(replace(leaking, h_NF=leaking.h_NF * np.float32(0.001)), num_resamples=50, **RUN)
    for mine, theirs in zip(thousandth, reference, strict=True):
        assert mine.value == pytest.approx(theirs.value, abs=1e-4)


@pytest.mark.usefixtures("quick_probes")
def test_evaluate_is_deterministic_and_says_what_is_missing():
    embeddings = cohort(subjects=60)
    assert probes.evaluate(embeddings, num_resamples=30, **RUN) == probes.evaluate(embeddings, num_resamples=30, **RUN)
    single = embeddings.select(embeddings.site == "B")
    found, notes = probes.evaluate(single, num_resamples=30, **RUN)
    assert {e.task for e in found} == {"age", "sex"}
    assert any("site: sites with at least 5 train subjects" in note and "got ['B']" in note for note in notes)
    assert any(note.startswith("Not evaluated: scanner:") for note in notes)
    assert any(note.startswith("Not evaluated: diagnosis:") for note in notes)


@pytest.mark.usefixtures("quick_probes")
def test_constant_representation_is_at_chance_for_everything():
    flat = cohort(np.ones((180, 4)))
    found = by_name(probes.evaluate(flat, num_resamples=30, **RUN)[0])
    assert found["site", "balanced_accuracy"].value == pytest.approx(1 / 3)
    assert found["sex", "auc"].value == 0.5
    assert found["age", "r2"].value <= 0


def test_folds_and_probes_keep_subjects_whole():
    """h names the subject and nothing else: a probe that met a subject's first scan would know the second."""
    plain = cohort(sites=("A", "B"), subjects=50, scans=2, patients_at=())
    identity = (plain.subjects[:, None] == np.arange(100)).astype(float)
    found = by_name(probes.site_predictability(replace(plain, h_NF=identity.astype(np.float32)), **RUN)[0])
    assert found["site", "balanced_accuracy"].value == pytest.approx(0.5, abs=0.1)

    fold_N = probes._folds(plain.subjects, (plain.site == "B").astype(np.int64), seed=3)
    for subject in np.unique(plain.subjects):
        assert len(set(fold_N[plain.subjects == subject].tolist())) == 1
    assert np.unique(np.stack([fold_N, plain.site == "B"]), axis=1, return_counts=True)[1].tolist() == [20] * 10


@pytest.mark.usefixtures("quick_probes")
def test_patients_take_no_part_in_site_and_age():
    """Only patients leak their site and lose their age: healthy subjects must not show it."""
    plain = cohort(patients_at=("A", "B", "C"), subjects=60)
    healthy = plain.diagnosis == "control"
    loud = np.where(healthy[:, None], plain.h_NF, plain.h_NF + 9 * (plain.site == "A")[:, None])
    assert (
        probes.site_predictability(replace(plain, h_NF=loud.astype(np.float32)), num_resamples=20, **RUN)[0]
        == probes.site_predictability(plain.select(healthy), num_resamples=20, **RUN)[0]
    )
    unknown = replace(plain, diagnosis=np.where(healthy, "control", ""))
    assert probes.age_error(plain, num_resamples=5, **RUN)[1] == []
    assert any("180 scans of unknown diagnosis" in note for note in probes.age_error(unknown, num_resamples=5, **RUN)[1])
    nameless = replace(plain, diagnosis=np.full(len(plain), ""))
    found, notes = probes.age_error(nameless, num_resamples=5, **RUN)
    assert by_name(found)["age", "mae"].num_subjects == 3 * 24
    assert any("no scan has a diagnosis" in note for note in notes)


@pytest.mark.usefixtures("quick_probes")
def test_small_sites_are_named_and_left_out():
    embeddings = cohort(sites=("A", "B", "Tiny"), patients_at=())
    keep = (embeddings.site != "Tiny") | (embeddings.subject < 4)
    found, notes = probes.site_predictability(embeddings.select(keep), num_resamples=20, **RUN)
    assert by_name(found)["site", "balanced_accuracy"].num_subjects == 24
    assert any("Tiny (2 train, 2 test)" in note for note in notes)


def test_scanners_are_told_apart_within_a_site_and_not_by_name():
    embeddings = cohort(subjects=60, patients_at=())
    second = (embeddings.scanner == "second")[:, None]
    site = embeddings.site[:, None] == ["B", "C"]
    telling = replace(embeddings, h_NF=np.hstack([site, second]).astype(np.float32))
    found = by_name(probes.site_predictability(telling, attribute="scanner", **RUN)[0])
    assert found["scanner", "balanced_accuracy"].value == 1.0
    one_each = replace(embeddings, scanner=np.full(len(embeddings), "3T"))
    with pytest.raises(NotEvaluableError, match="a site must have two scanners"):
        probes.site_predictability(one_each, attribute="scanner", **RUN)


def test_floor_is_chance_without_confounding_and_high_with_it():
    def floor(age_by_site):
        found, notes = probes.chance_and_floor(
            cohort(subjects=60, age_by_site=age_by_site, patients_at=()), regime="federated", seed=0, num_resamples=200
        )
        assert not notes
        return {(e.stage, e.task, e.metric): e for e in found}

    equal, apart = floor(0.0), floor(40.0)
    for ending in ("", "_heldout"):
        assert equal["chance", "site", f"balanced_accuracy{ending}"].value == pytest.approx(1 / 3)
        assert equal["chance", "scanner", f"balanced_accuracy{ending}"].value == 0.25
    for metric in PROBES:
        assert equal["age_sex_floor", "site", metric].low <= 1 / 3 <= equal["age_sex_floor", "site", metric].high
        assert apart["age_sex_floor", "site", metric].value > 0.9
        assert apart["age_sex_floor", "scanner", metric].value > 0.5

    ageless = replace(cohort(), age_years=np.full(180, np.nan))
    found, notes = probes.chance_and_floor(ageless, regime="federated", seed=0)
    assert {e.stage for e in found} == {"chance"}
    assert any("no healthy scan has both an age and a sex" in note for note in notes)


def test_age_that_is_in_h_is_read_and_errors_are_counted_by_site():
    plain = cohort(subjects=60, patients_at=())
    telling = replace(plain, h_NF=np.column_stack([plain.age_years, plain.h_NF]).astype(np.float32))
    found, notes = probes.age_error(telling, num_resamples=50, **RUN)
    assert by_name(found)["age", "mae"].value < 0.2
    assert by_name(found)["age", "r2"].value > 0.99
    by_site = {e.site: e for e in found if e.metric == "mae"}
    assert set(by_site) == {"all", "A", "B", "C"}
    mean = np.mean([by_site[site].value for site in "ABC"])
    assert by_site["all"].value == pytest.approx(mean)
    assert not notes

    ages = np.where(plain.subject == 4, np.nan, plain.age_years)
    assert any("6 healthy scans without an age" in note for note in probes.age_error(replace(plain, age_years=ages), **RUN)[1])
    with pytest.raises(NotEvaluableError, match="healthy subjects with an age must be at least 5 in train"):
        probes.age_error(replace(plain, age_years=np.full(len(plain), np.nan)), **RUN)


@pytest.mark.usefixtures("quick_probes")
def test_unseen_sites_are_scored_by_a_probe_that_never_met_them():
    """At site C the age in h is off by 10 years; a probe fitted at A and B must be wrong by just that."""
    plain = cohort(subjects=60, patients_at=())
    shifted = plain.age_years + 10 * (plain.site == "C")
    telling = replace(plain, h_NF=shifted[:, None].astype(np.float32))
    found, _ = probes.evaluate(telling, num_resamples=20, known_sites={"A", "B"}, **RUN)
    unseen = {e.site: e for e in found if e.metric == "mae_unseen"}
    assert unseen["all"].value == pytest.approx(10, abs=0.2)
    assert unseen["all"].num_subjects == 60
    assert set(unseen) == {"all", "C"}
    seen = {e.site: e for e in found if e.metric == "mae"}
    assert set(seen) == {"all", "A", "B"}
    assert seen["all"].value < 0.2
    assert by_name(found)["site", "balanced_accuracy"].num_subjects == 2 * 24


def test_diagnosis_is_probed_only_where_both_are_found():
    """h names the site: across all sites it would tell patients (all at C) from controls; within C it cannot."""
    plain = cohort(subjects=80)
    telling = replace(plain, h_NF=(plain.site[:, None] == ["A", "B", "C"]).astype(np.float32))
    found, notes = probes.diagnosis_auc(telling, **RUN)
    assert [e.value for e in found] == [0.5]
    assert found[0].num_subjects == 32
    assert any("take no part: A, B" in note for note in notes)

    patient = (plain.diagnosis == "patient")[:, None].astype(np.float32)
    assert probes.diagnosis_auc(replace(plain, h_NF=patient), num_resamples=20, **RUN)[0][0].value == 1.0
    assert probes.sex_auc(replace(plain, h_NF=(plain.sex == "M")[:, None].astype(np.float32)), **RUN)[0][0].value == 1.0


def test_predictions_are_scored_overall_and_by_site():
    labels = np.array([0.0, 1, 0, 1, 0, 1] * 10)
    site = np.repeat(["X", "Y"], 30)

    def predicted(labels) -> Predictions:
        scores = np.where(site == "X", labels, 1 - labels) * 0.8 + 0.1
        columns = {"subject": np.tile(np.arange(30), 2), "site": site, "sex": np.full(60, ""), "split": np.full(60, "test")}
        return Predictions(target=Target(), values_NL=labels[:, None], scores_NK=scores[:, None], **columns)

    found, notes = evaluate_predictions(predicted(labels), stage="linear_probe", regime="federated", seed=4, num_resamples=50)
    values = {(e.site, e.metric): e.value for e in found if e.metric in ("auc", "balanced_accuracy")}
    assert values == {
        ("all", "auc"): 0.5,
        ("all", "balanced_accuracy"): 0.5,
        ("X", "auc"): 1.0,
        ("X", "balanced_accuracy"): 1.0,
        ("Y", "auc"): 0.0,
        ("Y", "balanced_accuracy"): 0.0,
    }
    assert {(e.task, e.stage, e.seed) for e in found} == {("diagnosis", "linear_probe", 4)}
    assert {(e.site, e.num_subjects) for e in found} == {("all", 60), ("X", 30), ("Y", 30)}
    assert any("val has not both classes" in note for note in notes)

    found, notes = evaluate_predictions(predicted(np.where(site == "Y", 0.0, labels)), num_resamples=50, **RUN)
    assert {e.site for e in found if e.metric == "auc"} == {"all", "X"}
    assert any("diagnosis auc, " in note and "at site Y have no value" in note for note in notes)


def test_planar_map_keeps_far_groups_apart():
    plain = cohort(subjects=20, patients_at=())
    telling = replace(plain, h_NF=plain.h_NF + 30 * (plain.site == "A")[:, None].astype(np.float32))
    place_N2 = probes.planar_map(telling)
    assert place_N2.shape == (len(plain), 2)
    np.testing.assert_array_equal(place_N2, probes.planar_map(telling))
    inside = place_N2[plain.site == "A"]
    spread = np.linalg.norm(inside - inside.mean(axis=0), axis=1).max()
    nearest = np.linalg.norm(place_N2[plain.site != "A"] - inside.mean(axis=0), axis=1).min()
    assert nearest > spread
    assert probes.planar_map(plain.select(np.arange(6))).shape == (6, 2)
    with pytest.raises(NotEvaluableError, match="representations must differ"):
        probes.planar_map(replace(plain, h_NF=np.ones_like(plain.h_NF)))
    with pytest.raises(NotEvaluableError, match="scans must be at least 5"):
        probes.planar_map(plain.select(np.arange(4)))
