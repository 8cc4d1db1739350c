"""Predictions of a fine-tuned model: their figures against scikit-learn and loops, their table, and what has no figure."""

import csv
import hashlib
import hmac
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, pearsonr
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    r2_score,
    recall_score,
    roc_auc_score,
    roc_curve,
    root_mean_squared_error,
)

from core.evaluation import outcomes
from core.evaluation.intervals import Evaluation, subject_bootstrap
from core.evaluation.predictions import (
    Predictions,
    Rows,
    confusion,
    evaluate_predictions,
    operating_points,
    reliability,
    subject_rows,
)
from core.targets import Target

RUN = {"stage": "full_finetuning", "regime": "federated", "seed": 3, "num_resamples": 60}
BINARY = Target()
STAGES = Target(kind="multiclass", labels=("stage",), classes=("absent", "mild", "severe"))
FINDINGS = Target(kind="multilabel", labels=("lesion", "atrophy", "bleed"))
AGE = Target(kind="regression", labels=("age_years",))


def predictions(
    target: Target, values: np.ndarray, scores: np.ndarray, *, sites: tuple[str, ...] = ("X", "Y"), test: float = 0.7, **columns
) -> Predictions:
    """One scan a subject unless told; sites, sexes and splits mixed."""
    count = len(values)
    place = np.arange(count)
    given = {
        "subject": place,
        "site": np.array(sites)[place % len(sites)],
        "sex": np.where(place // 2 % 2 == 0, "F", "M"),
        "split": np.where(place / count < test, "test", "val"),
        **columns,
    }
    return Predictions(target=target, values_NL=values.reshape(count, -1), scores_NK=scores.reshape(count, -1), **given)


def binary(count: int = 90, seed: int = 0, **columns) -> Predictions:
    random = np.random.default_rng(seed)
    values = random.integers(2, size=count).astype(float)
    # Rounded, so that there are ties.
    scores = np.clip(0.5 + 0.2 * (values - 0.5) + random.normal(0, 0.2, count), 0, 1).round(2)
    return predictions(BINARY, values, scores, **columns)


def classes(count: int = 90, seed: int = 1, **columns) -> Predictions:
    random = np.random.default_rng(seed)
    values = random.integers(3, size=count)
    logits = random.normal(size=(count, 3)) + np.eye(3)[values]
    return predictions(STAGES, values.astype(float), np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), **columns)


def findings(count: int = 90, seed: int = 2, **columns) -> Predictions:
    random = np.random.default_rng(seed)
    values = random.integers(2, size=(count, 3)).astype(float)
    return predictions(FINDINGS, values, np.clip(0.3 * values + random.uniform(0, 0.7, (count, 3)), 0, 1), **columns)


def ages(count: int = 90, seed: int = 4, **columns) -> Predictions:
    random = np.random.default_rng(seed)
    values = random.uniform(20, 80, count)
    return predictions(AGE, values, 20 + 0.6 * values + random.normal(0, 4, count), **columns)


def by_name(found: list[Evaluation]) -> dict[tuple[str, str, str], float]:
    return {(e.task, e.metric, e.site): e.value for e in found}


def of_test(told: Predictions) -> tuple[np.ndarray, np.ndarray]:
    test = told.split == "test"
    return told.values_NL[test], told.scores_NK[test]


# figures


def test_binary_figures_agree_with_scikit_learn():
    told = binary()
    found, notes = evaluate_predictions(told, **RUN)
    assert notes == []
    values = by_name(found)
    val = told.split == "val"
    false, true, thresholds = roc_curve(told.values_NL[val, 0], told.scores_NK[val, 0], drop_intermediate=False)
    threshold = thresholds[np.argmax(true - false)]
    assert operating_points(told)[0] == [threshold]
    assert threshold != 0.5
    test = told.split == "test"
    for ending, site, mask in (
        ("", "all", test),
        ("_female", "all", test & (told.sex == "F")),
        ("_male", "all", test & (told.sex == "M")),
        ("", "X", test & (told.site == "X")),
        ("", "Y", test & (told.site == "Y")),
    ):
        truth, score = told.values_NL[mask, 0], told.scores_NK[mask, 0]
        predicted = score >= threshold
        edges = np.quantile(score, np.linspace(0, 1, 11)[1:-1])
        bin_of = np.array([(edges < s).sum() for s in score])
        gaps = [abs((score - truth)[bin_of == b].sum()) for b in range(10)]
        expected = {
            "auc": roc_auc_score(truth, score),
            "average_precision": average_precision_score(truth, score),
            "balanced_accuracy": balanced_accuracy_score(truth, predicted),
            "accuracy": accuracy_score(truth, predicted),
            "sensitivity": recall_score(truth, predicted),
            "specificity": recall_score(truth, predicted, pos_label=0),
            "brier": brier_score_loss(truth, score),
            "ece": sum(gaps) / len(score),
        }
        for metric, value in expected.items():
            assert values["diagnosis", metric + ending, site] == pytest.approx(value, abs=1e-12), (metric, ending, site)
    assert len(found) == 5 * 8
    assert {e.num_subjects for e in found if e.site == "all" and "male" not in e.metric} == {int(test.sum())}
    np.testing.assert_array_equal(
        confusion(told)[0], confusion_matrix(told.values_NL[test, 0], told.scores_NK[test, 0] >= threshold)
    )


def test_multiclass_figures_agree_with_scikit_learn():
    told = classes(sites=("X",))
    found, notes = evaluate_predictions(told, **RUN)
    assert notes == []
    truth_N1, score_NK = of_test(told)
    truth, top = truth_N1[:, 0], score_NK.argmax(axis=1)
    values = by_name(found)
    assert values["stage", "auc", "all"] == pytest.approx(roc_auc_score(truth, score_NK, multi_class="ovr"))
    assert values["stage", "balanced_accuracy", "all"] == pytest.approx(balanced_accuracy_score(truth, top))
    assert values["stage", "accuracy", "all"] == pytest.approx(accuracy_score(truth, top))
    right, mean = calibration_curve(truth == top, score_NK.max(axis=1), n_bins=10, strategy="quantile")
    sizes = np.array([found_bin.size for found_bin in reliability(told)])
    assert values["stage", "ece", "all"] == pytest.approx(np.abs(right - mean) @ sizes / sizes.sum())
    np.testing.assert_array_equal(confusion(told)[0], confusion_matrix(truth, top))
    # One site: its figures are those of all.
    assert {e.site for e in found} == {"all"}


def test_findings_are_scored_together_and_singly():
    told = findings()
    found, notes = evaluate_predictions(told, **RUN)
    assert notes == []
    values, (truth_NL, score_NL) = by_name(found), of_test(told)
    thresholds_L = operating_points(told)[0]
    for column, label in enumerate(FINDINGS.labels):
        assert values[label, "auc", "all"] == pytest.approx(roc_auc_score(truth_NL[:, column], score_NL[:, column]))
    assert values["findings", "auc", "all"] == pytest.approx(roc_auc_score(truth_NL, score_NL, average="macro"))
    recalls = [balanced_accuracy_score(truth_NL[:, n], score_NL[:, n] >= thresholds_L[n]) for n in range(3)]
    assert values["findings", "balanced_accuracy", "all"] == pytest.approx(np.mean(recalls))


def test_figures_of_numbers_agree_with_scikit_learn():
    told = ages()
    values, (truth_NL, score_NK) = by_name(evaluate_predictions(told, **RUN)[0]), of_test(told)
    truth, score = truth_NL[:, 0], score_NK[:, 0]
    expected = {
        "mae": np.abs(truth - score).mean(),
        "rmse": root_mean_squared_error(truth, score),
        "r2": r2_score(truth, score),
        "pearson": pearsonr(truth, score).statistic,
        "calibration_slope": np.polyfit(score, truth, 1)[0],
    }
    for metric, value in expected.items():
        assert values["age", metric, "all"] == pytest.approx(value), metric
    assert ("age", "mae_male", "all") in values
    with pytest.raises(ValueError, match="the target must have classes"):
        reliability(told)


def test_intervals_are_those_of_the_subject_bootstrap():
    """The same resamples, redraws included: few positives, and subjects with scans of both classes."""
    random = np.random.default_rng(7)
    truth = np.array([1.0, 1, 1] + [0.0] * 37)
    subject = np.arange(40) % 20
    told = predictions(
        BINARY,
        truth,
        random.uniform(size=40).round(1),
        sites=("X",),
        subject=subject,
        split=np.full(40, "test"),
        sex=np.full(40, ""),
    )
    found, notes = evaluate_predictions(told, **{**RUN, "num_resamples": 200})
    rows = subject_rows(told, "test")
    assert (len(rows.truth_M), rows.num_subjects) == (23, 20)
    assert any("3 times a subject's scans are of two classes" in note for note in notes)
    for metric, statistic in (
        ("auc", outcomes.area_under_curve(rows.truth_M.astype(int), rows.score_MK[:, 0])),
        ("balanced_accuracy", outcomes.balanced_accuracy(rows.truth_M.astype(int), (rows.score_MK[:, 0] >= 0.5).astype(int))),
        ("brier", outcomes.mean_value(rows.truth_M, np.square(rows.score_MK[:, 0] - rows.truth_M))),
    ):
        expected = subject_bootstrap(rows.subject_M, statistic, num_resamples=200, seed=RUN["seed"])
        (e,) = [e for e in found if e.metric == metric]
        assert (e.value, e.low, e.high) == pytest.approx(expected, abs=1e-12)
    told = ages(40, sites=("X",))
    rows = subject_rows(told, "test")
    found = [e for e in evaluate_predictions(told, **RUN)[0] if e.metric == "r2"]
    expected = subject_bootstrap(
        rows.subject_M, outcomes.explained_share(rows.truth_M, rows.score_MK[:, 0]), num_resamples=60, seed=RUN["seed"]
    )
    assert (found[0].value, found[0].low, found[0].high) == pytest.approx(expected)


def test_many_rows_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch):
    told = binary(40)
    whole = evaluate_predictions(told, **RUN)
    monkeypatch.setattr("core.evaluation.predictions.WEIGHTS_AT_ONCE", 100)
    found = evaluate_predictions(told, **RUN)[0]
    numbers = [[(e.value, e.low, e.high) for e in evaluations] for evaluations in (found, whole[0])]
    np.testing.assert_allclose(*numbers, rtol=1e-12)


@pytest.mark.parametrize("made", [binary, classes, findings, ages])
def test_scans_of_a_subject_are_averaged_and_order_does_not_matter(made):
    told = made(60)
    shift = (
        np.random.default_rng(0).choice([-1, 1], size=told.scores_NK.shape)
        * 0.25
        * np.minimum(told.scores_NK, 1 - told.scores_NK)
    )
    parts = [
        Predictions(
            target=told.target,
            values_NL=told.values_NL,
            scores_NK=told.scores_NK + sign * shift,
            subject=told.subject,
            site=told.site,
            sex=told.sex,
            split=told.split,
        )
        for sign in (1, -1)
    ]
    twice = Predictions.concatenate(parts)
    mixed = twice.select(np.random.default_rng(0).permutation(len(twice)))
    expected = evaluate_predictions(told, **RUN)[0]
    for other in (twice, mixed):
        for e, same in zip(expected, evaluate_predictions(other, **RUN)[0], strict=True):
            assert (same.task, same.metric, same.site, same.num_subjects) == (e.task, e.metric, e.site, e.num_subjects)
            assert (same.value, same.low, same.high) == pytest.approx((e.value, e.low, e.high), abs=1e-9)


def test_unseen_sites_are_apart_and_choose_no_operating_point():
    told = binary(120, sites=("X", "Y", "Z"))
    found, notes = evaluate_predictions(told, known_sites={"X", "Y"}, **RUN)
    assert notes == []
    seen = told.select(told.site != "Z")
    same = evaluate_predictions(seen, **RUN)[0]
    assert [e for e in found if not e.metric.endswith("_unseen")] == same
    outside = told.select((told.site == "Z") & (told.split == "test"))
    threshold = operating_points(seen)[0]
    values = by_name(found)
    for site in ("all", "Z"):
        truth, score = outside.values_NL[:, 0], outside.scores_NK[:, 0]
        assert values["diagnosis", "auc_unseen", site] == pytest.approx(roc_auc_score(truth, score))
        assert values["diagnosis", "sensitivity_unseen", site] == pytest.approx(recall_score(truth, score >= threshold))
    assert {e.site for e in found if e.metric.endswith("_unseen")} == {"all", "Z"}
    alone, notes = evaluate_predictions(outside, known_sites={"X"}, **RUN)
    assert {(e.site, e.metric.endswith("_unseen")) for e in alone} == {("all", True), ("Z", True)}
    assert any("Not evaluated: full_finetuning: diagnosis: no test scan at a site that was trained on" in note for note in notes)


# what has no figure


def test_one_class_leaves_what_needs_none_and_says_so():
    told = binary(60)
    told = predictions(BINARY, np.where((told.site == "Y") | (told.split == "val"), 0.0, told.values_NL[:, 0]), told.scores_NK)
    found, notes = evaluate_predictions(told, **RUN)
    assert {e.metric for e in found if e.site == "Y"} == {"accuracy", "specificity", "brier", "ece"}
    assert any("diagnosis: val has not both classes, so the operating point is 0.5" in note for note in notes)
    text = "diagnosis auc, average_precision, balanced_accuracy, sensitivity at site Y have no value: it needs subjects of every"
    assert any(text in note for note in notes)
    assert all(np.isfinite([e.value, e.low, e.high]).all() for e in found)


def test_a_score_that_tells_nothing_on_val_leaves_the_threshold_at_a_half():
    told = predictions(BINARY, np.array([0.0, 1, 0, 1]), np.array([0.9, 0.1, 0.9, 0.1]), split=np.full(4, "val"))
    assert operating_points(told) == (
        [0.5],
        ["diagnosis: no score of val tells its classes apart, so the operating point is 0.5"],
    )


def test_classes_and_labels_that_are_missing_are_left_out_of_the_mean():
    told = classes(80, sites=("X",))
    told = told.select((told.split == "val") | (told.values_NL[:, 0] != 2))
    found, notes = evaluate_predictions(told, **RUN)
    truth, score_NK = of_test(told)
    areas = [roc_auc_score(truth[:, 0] == k, score_NK[:, k]) for k in (0, 1)]
    assert by_name(found)["stage", "auc", "all"] == pytest.approx(np.mean(areas))
    assert any("no subject is severe, which the mean of AUCs leaves out" in note for note in notes)

    told = findings(80, sites=("X",))
    values = told.values_NL.copy()
    values[:, 1] = 1
    values[::7, 2] = np.nan
    values[3] = np.nan
    told = predictions(FINDINGS, values, told.scores_NK, sites=("X",))
    found, notes = evaluate_predictions(told, **RUN)
    truth, score_NK = of_test(told)
    known = ~np.isnan(truth)
    areas = [roc_auc_score(truth[known[:, n], n], score_NK[known[:, n], n]) for n in (0, 2)]
    assert by_name(found)["findings", "auc", "all"] == pytest.approx(np.mean(areas))
    assert {e.task for e in found} == {"findings", "lesion", "bleed"}
    assert next(e.num_subjects for e in found if e.task == "bleed") == known[:, 2].sum()
    assert any("atrophy: subjects are of one class only, which means leave out" in note for note in notes)
    assert any("findings: 1 test scans without a label take no part" in note for note in notes)


def test_too_few_subjects_and_unknown_labels_are_noted():
    told = binary(40, sites=("X",))
    lonely = binary(1, sites=("Z",), split=np.array(["test"]), sex=np.array([""]))
    found, notes = evaluate_predictions(Predictions.concatenate([told, lonely]), **RUN)
    assert "Z" not in {e.site for e in found}
    assert any("at site Z have no value: subjects must be at least 2" in note for note in notes)
    assert any("1 test subjects of unknown sex are in no figure of one sex" in note for note in notes)
    unknown = predictions(BINARY, np.full(6, np.nan), np.full(6, 0.5))
    found, notes = evaluate_predictions(unknown, **RUN)
    assert found == []
    assert any("Not evaluated" in note for note in notes)
    assert (reliability(unknown), confusion(unknown).sum()) == ([], 0)
    nobody = unknown.select(np.zeros(6, dtype=bool))
    assert evaluate_predictions(nobody, **RUN)[0] == []
    still = predictions(AGE, np.full(20, 0.1), np.linspace(0, 1, 20), sites=("X",))
    found, notes = evaluate_predictions(still, **RUN)
    assert {e.metric for e in found if e.site == "all"} >= {"mae", "rmse"}
    assert not any(e.metric.startswith(("r2", "pearson")) for e in found)
    # Sex is not told of one sex alone.
    sexes = predictions(Target(labels=("sex",)), binary(40).values_NL, binary(40).scores_NK, sites=("X",))
    assert not any("male" in e.metric for e in evaluate_predictions(sexes, **RUN)[0])


# reliability


def test_reliability_agrees_with_scikit_learn_and_wilson():
    told = binary(400, sites=("X",))
    truth, score = (column[:, 0] for column in of_test(told))
    frequency, mean = calibration_curve(truth, score, n_bins=10, strategy="quantile")
    found = reliability(told)
    np.testing.assert_allclose([b.frequency for b in found], frequency)
    np.testing.assert_allclose([b.mean_score for b in found], mean)
    assert sum(b.size for b in found) == len(truth)
    for mean_score, frequency, low, high, size in found:
        interval = binomtest(round(frequency * size), size).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-9), mean_score


@pytest.mark.parametrize(("count", "expected"), [(4, 0), (5, 1), (23, 4), (60, 10)])
def test_no_bin_is_of_fewer_than_five_subjects(count, expected):
    told = binary(count, split=np.full(count, "test"), sites=("X",))
    told = predictions(BINARY, told.values_NL, np.linspace(0, 1, count), split=told.split, sites=("X",))
    found = reliability(told)
    assert len(found) <= max(expected, 0)
    assert bool(found) == bool(expected)
    assert all(b.size >= 5 for b in found)
    assert sum(b.size for b in found) == (count if expected else 0)


def test_bins_of_findings_are_counted_in_subjects():
    """Twelve rows of four subjects are too few to show."""
    told = findings(4, split=np.full(4, "test"))
    assert reliability(told) == []
    told = findings(60, split=np.full(60, "test"))
    assert sum(b.size for b in reliability(told)) == 180


# the table


@pytest.mark.parametrize("made", [binary, classes, findings, ages])
def test_the_table_holds_pseudonyms_classes_and_scores(made, tmp_path: Path):
    told = made(30, subject=np.array([f"sub-{n:03}" for n in range(30)]))
    told.write_csv(tmp_path / "predictions.csv", b"secret")
    text = (tmp_path / "predictions.csv").read_text(encoding="utf-8")
    assert "sub-" not in text
    rows = list(csv.DictReader(text.splitlines()))
    target = told.target
    thresholds = operating_points(told)[0]
    assert len(rows) == 30
    for n, row in enumerate(rows):
        message = f"{told.site[n]}/{told.subject[n]}".encode()
        assert row["pseudonym"] == hmac.new(b"secret", message, hashlib.sha256).hexdigest()[:12]
        assert (row["site"], row["split"], row["sex"]) == (told.site[n], told.split[n], told.sex[n])
        scores = [row[name] for name in row if name.startswith("probability of ")]
        if made is ages:
            assert [float(row["true age_years"]), float(row["predicted age_years"])] == pytest.approx(
                [told.values_NL[n, 0], told.scores_NK[n, 0]], rel=1e-5
            )
            continue
        assert [float(score) for score in scores] == pytest.approx(told.scores_NK[n], rel=1e-5, abs=1e-12)
        for column, label in enumerate(target.labels):
            assert row[f"true {label}"] == target.names[int(told.values_NL[n, column])]
            best = told.scores_NK[n].argmax() if made is classes else told.scores_NK[n, column] >= thresholds[column]
            assert row[f"predicted {label}"] == target.names[int(best)]
    if made is classes:
        assert [name for name in rows[0] if name.startswith("probability")] == [
            f"probability of stage={name}" for name in STAGES.classes
        ]


names = st.text(min_size=1).filter(lambda text: not text.endswith("\0"))
risky = st.tuples(st.sampled_from("=+-@\t\r\n"), names).map("".join)


@settings(max_examples=40, deadline=None)
@given(
    classes=st.lists(names | risky, min_size=2, max_size=2, unique=True),
    label=names | risky,
    site=names | risky,
    subject=names | risky,
)
def test_no_cell_is_a_formula(tmp_path_factory, classes, label, site, subject):
    try:
        target = Target(labels=(label,), classes=tuple(classes))
    except ValueError:
        reject()
    told = Predictions(
        target=target,
        values_NL=np.array([[0.0], [1.0], [np.nan]]),
        scores_NK=np.array([[0.25], [1e-9], [1.0]]),
        subject=np.array([subject] * 3),
        site=np.array([site] * 3),
        sex=np.array(["F", "M", ""]),
        split=np.full(3, "test"),
    )
    path = tmp_path_factory.getbasetemp() / "risky.csv"
    told.write_csv(path, b"k")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {7}
    assert len(rows) == 4
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for row in rows for cell in row)
    assert [row[4].removeprefix("'") for row in rows[1:]] == [name.removeprefix("'") for name in classes] + [""]
    assert {row[1].removeprefix("'") for row in rows[1:]} == {site.removeprefix("'")}


def test_numbers_have_six_digits_and_a_key_is_needed(tmp_path: Path):
    told = predictions(AGE, np.array([-1234.56789, np.nan]), np.array([1 / 3, 2e-7]))
    told.write_csv(tmp_path / "a.csv", b"k")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "pseudonym,site,split,sex,true age_years,predicted age_years"
    assert [line.split(",", 4)[4] for line in lines[1:]] == ["-1234.57,0.333333", ",2e-07"]
    with pytest.raises(ValueError, match="key must be some secret bytes"):
        told.write_csv(tmp_path / "b.csv", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


# checks


def test_wrong_columns_are_refused_without_their_values():
    right = vars(binary(4))
    for name, column, message in (
        ("scores_NK", np.array([[np.nan], [0.5], [0.5], [np.inf]]), "scores_NK must be probabilities, got 2 of 4 scans"),
        ("scores_NK", np.array([[-3.0], [2.0], [0.5], [0.5]]), "scores_NK must be probabilities, got 2 of 4 scans"),
        ("scores_NK", np.zeros((4, 2)), r"scores_NK must be float64 of shape \(4, 1\)"),
        ("scores_NK", np.zeros((4, 1), dtype=np.float32), "must be float64"),
        ("values_NL", np.array([[0.0], [0.5], [1.0], [2.0]]), "values_NL must be a class from 0 to 1, or nan, got 2 of 4"),
        ("values_NL", np.zeros((3, 1)), "values_NL must be float64 of shape"),
        ("subject", np.zeros(4), "subject must be one text"),
        ("subject", np.zeros(3, dtype=int), "subject must be one text"),
        ("site", np.array(["X", "", "X", "X"]), "site must be a text that is not empty, got 1 of 4"),
        ("sex", np.array(["F", "M", "woman", ""]), "sex must be F, M or empty, got 1 of 4"),
        ("split", np.array(["test", "train", "val", "val"]), "split must be val or test, got 1 of 4"),
        ("subject", np.zeros(4, dtype=int), "a subject must be in one split, got 1 in both"),
    ):
        columns = {**right, name: column}
        if "in both" in message:
            columns |= {"site": np.full(4, "X"), "split": np.array(["test", "val", "test", "val"])}
        with pytest.raises(ValueError, match=message) as refused:
            Predictions(**columns)
        assert not any(value in str(refused.value) for value in ("woman", "train", "inf,", "-3"))
    with pytest.raises(ValueError, match="values_NL must be finite, or nan"):
        predictions(AGE, np.array([np.inf, 1.0]), np.zeros(2))
    with pytest.raises(ValueError, match="parts must be of one target, got 2 targets"):
        Predictions.concatenate([binary(4), ages(4)])
    with pytest.raises(ValueError, match="got 0 targets"):
        Predictions.concatenate([])


def test_numbers_and_texts_name_the_same_subject():
    """Sites may number their subjects or name them."""
    numbered, named = binary(10), binary(10, subject=np.array([f"s{n}" for n in range(10)]), sites=("Z",))
    both = Predictions.concatenate([numbered, named])
    assert len(np.unique(both.subjects)) == len(both) == 20
    assert isinstance(subject_rows(both, "test", {"Z"}), Rows)
    assert set(subject_rows(both, "test", {"Z"}).site_M) == {"Z"}
