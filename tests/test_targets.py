"""What fine-tuning learns: labels as numbers, losses against loops, scores, weights and what no scan shows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.data.manifest import Scan
from core.targets import Target, TargetError

FINDINGS = Target(kind="multilabel", labels=("edema", "nodule"))
STAGES = Target(kind="multiclass", labels=("stage",), classes=("CN", "MCI", "AD"))
SCORE = Target(kind="regression", labels=("iq",), offset=100.0, scale=15.0)


def scan(*targets: tuple[str, str], age: float | None = 40.0, sex: str | None = "F", diagnosis: str | None = "control") -> Scan:
    return Scan("sub-1", "", "north", "north", Path("1.nii"), age, sex, diagnosis, None, targets)  # type: ignore[arg-type]


def values(target: Target, *scans: Scan) -> list[list[float | None]]:
    """The values, None for NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in target.values(scans).tolist()]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"labels": ()}, r"labels must be one, got \[\]"),
        ({"labels": ("a", "b")}, "labels must be one, got"),
        ({"kind": "regression", "labels": ("a", "b")}, "labels must be one, got"),
        ({"kind": "multilabel", "labels": ()}, "labels must be different, got"),
        ({"kind": "multilabel", "labels": ("a", "a")}, "labels must be different, got"),
        ({"kind": "regression", "labels": ("iq",), "classes": ("0", "1")}, "classes must be null with regression, got"),
        ({"classes": ("0", "1", "2")}, "classes must be 2 different ones with binary, got"),
        ({"classes": ("1", "1.0")}, "classes must be 2 different ones with binary, got"),
        ({"classes": ("AD", "ad")}, "classes must be 2 different ones with binary, got"),
        ({"classes": ()}, "classes must be 2 different ones with binary, got"),
        ({"kind": "multilabel", "classes": ("0", "1", "2")}, "classes must be 2 different ones with multilabel, got"),
        ({"kind": "multiclass", "classes": ("a",)}, "classes must be two or more different ones with multiclass, got"),
        (
            {"kind": "multiclass", "classes": ("None", "mild")},
            "classes must be told from missing values, .* write 'none' otherwise",
        ),
        ({"labels": ("age_years",)}, "it goes with kind=regression"),
        ({"kind": "multilabel", "labels": ("a", "age_years")}, "it goes with kind=regression"),
        ({"kind": "regression", "labels": ("iq",), "scale": 0.0}, "offset must be finite and scale positive, got"),
        ({"kind": "regression", "labels": ("iq",), "scale": math.inf}, "scale positive, got"),
        ({"kind": "regression", "labels": ("iq",), "offset": math.nan}, "offset must be finite"),
    ],
)
def test_a_target_that_cannot_be_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Target(**keys)


@pytest.mark.parametrize(
    ("target", "names", "outputs", "task"),
    [
        (Target(), ("control", "patient"), 1, "diagnosis"),
        (Target(labels=("sex",)), ("F", "M"), 1, "sex"),
        (Target(labels=("smoker",)), ("0", "1"), 1, "smoker"),
        (STAGES, ("CN", "MCI", "AD"), 3, "stage"),
        (FINDINGS, ("0", "1"), 2, "findings"),
        (Target(kind="multilabel", labels=("diagnosis", "edema")), ("0", "1"), 2, "findings"),
        (SCORE, (), 1, "iq"),
        (Target(kind="regression", labels=("age_years",)), (), 1, "age"),
    ],
)
def test_what_a_target_is_called_and_how_many_outputs_it_has(
    target: Target, names: tuple[str, ...], outputs: int, task: str
) -> None:
    assert (target.names, target.num_outputs, target.task) == (names, outputs, task)
    assert hash(target) == hash(Target(**vars(target)))


def test_what_every_scan_has_is_read_without_a_column() -> None:
    scans = (scan(), scan(diagnosis="patient", sex="M", age=71.5), scan(diagnosis=None, sex=None, age=None))
    assert values(Target(), *scans) == [[0], [1], [None]]
    assert values(Target(classes=("patient", "control")), *scans) == [[1], [0], [None]]
    assert values(Target(labels=("sex",)), *scans) == [[0], [1], [None]]
    assert values(Target(kind="regression", labels=("age_years",)), *scans) == [[40], [71.5], [None]]
    assert Target().values([]).shape == (0, 1)
    assert FINDINGS.values([]).shape == (0, 2)


def test_a_column_of_diagnoses_is_read_as_it_stands_where_the_classes_are_others() -> None:
    scans = (scan(("diagnosis", "MCI")), scan(("diagnosis", "CN"), diagnosis="patient"), scan(("diagnosis", "")))
    assert values(Target(kind="multiclass", labels=("diagnosis",), classes=("CN", "MCI", "AD")), *scans) == [[1], [0], [None]]
    assert values(Target(), *scans) == [[0], [1], [0]]


def test_classes_and_findings_are_read_from_their_columns() -> None:
    cells = ("CN", "AD", "", "mci")
    assert values(STAGES, *(scan(("iq", "7"), ("stage", cell)) for cell in cells)) == [[0], [2], [None], [1]]
    rows = (("0", "1"), ("1.0", ""), ("", "0.0"))
    assert values(FINDINGS, *(scan(("nodule", second), ("edema", first)) for first, second in rows)) == [
        [0, 1], [1, None], [None, 0]
    ]  # fmt: skip
    grades = Target(kind="multiclass", labels=("grade",), classes=("10", "2", "1000"))
    assert values(grades, *(scan(("grade", cell)) for cell in ("2.0", "10", "1e3", "+2"))) == [[1], [0], [2], [1]]


def test_numbers_are_read_in_their_unit() -> None:
    cells = ("115", "1e3", "-2.5", "", " 7 ")
    assert values(SCORE, *(scan(("iq", cell)) for cell in cells)) == [[115], [1000], [-2.5], [None], [7]]


@pytest.mark.parametrize("cell", ["secret", "inf", "-inf", "1e400", "1e39", "12;5", "12,5", "0x10"])
def test_a_number_that_is_none_is_refused_without_telling_it(cell: str) -> None:
    with pytest.raises(TargetError, match="target 'iq': each cell must be a finite number or missing, got another") as error:
        SCORE.values([scan(("iq", "100")), scan(("iq", cell))])
    assert cell not in str(error.value)


@pytest.mark.parametrize(("target", "name"), [(STAGES, "stage"), (Target(labels=("smoker",)), "smoker")])
@pytest.mark.parametrize("cell", ["secret", "7", "-1", "inf"])
def test_a_class_that_is_none_is_refused_without_telling_it(target: Target, name: str, cell: str) -> None:
    with pytest.raises(TargetError, match=rf"target '{name}': each cell must be one of \[.*\] or missing, got another") as error:
        target.values([scan((name, cell))])
    assert cell not in str(error.value)


def test_a_column_that_was_not_asked_for_is_named() -> None:
    with pytest.raises(TargetError, match=r"target 'stage': it must be .* the table has \['iq', 'mmse'\]. Name the column in"):
        STAGES.values([scan(("mmse", "20"), ("iq", "90"))])
    with pytest.raises(TargetError, match="the table has none of these"):
        SCORE.values([scan()])


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), before=st.sampled_from(["", " ", "\t"]))
def test_every_number_is_read_back(value: float, before: str) -> None:
    assert SCORE.values([scan(("iq", f"{before}{value!r}"))]).item() == value


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_the_loss_of_two_classes_against_a_loop() -> None:
    target, logits = Target(), [0.3, -1.2, 2.0, 0.0]
    labels, weights = [1.0, 0.0, math.nan, 0.0], [0.5, 3.0]
    for weight in (None, torch.tensor(weights)):
        expected = []
        for logit, label in zip(logits, labels, strict=True):
            right = sigmoid(logit) if label == 1 else 1 - sigmoid(logit)
            scale = 1.0 if weight is None else weights[int(label == 1)]
            expected.append(0.0 if math.isnan(label) else -math.log(right) * scale)
        found = target.loss(torch.tensor(logits, dtype=torch.float64)[:, None], torch.tensor(labels)[:, None], weight)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_loss_of_several_classes_against_a_loop() -> None:
    logits = [[0.3, -1.0, 2.0], [1.0, 1.0, 1.0], [5.0, -5.0, 0.0], [0.1, 0.2, 0.3]]
    labels, weights = [2.0, 0.0, math.nan, 1.0], [0.5, 2.0, 4.0]
    for weight in (None, torch.tensor(weights)):
        expected = []
        for row, label in zip(logits, labels, strict=True):
            if math.isnan(label):
                expected.append(0.0)
                continue
            share = math.exp(row[int(label)]) / sum(map(math.exp, row))
            expected.append(-math.log(share) * (1.0 if weight is None else weights[int(label)]))
        found = STAGES.loss(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)[:, None], weight)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_loss_of_findings_against_a_loop() -> None:
    logits = [[0.3, -1.0], [2.0, 0.5], [-0.7, 0.0]]
    labels = [[1.0, 0.0], [math.nan, 1.0], [math.nan, math.nan]]
    weights = [[0.5, 2.0], [1.5, 0.25]]
    for weight in (None, torch.tensor(weights)):
        expected = []
        for row, told in zip(logits, labels, strict=True):
            parts = []
            for column, (logit, label) in enumerate(zip(row, told, strict=True)):
                if not math.isnan(label):
                    right = sigmoid(logit) if label == 1 else 1 - sigmoid(logit)
                    parts.append(-math.log(right) * (1.0 if weight is None else weights[column][int(label)]))
            expected.append(sum(parts) / len(parts) if parts else 0.0)
        found = FINDINGS.loss(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels), weight)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_loss_of_a_number_is_its_squared_error_in_units_of_the_scale() -> None:
    # (1 - (115 - 100) / 15)^2 = 0 and (0.5 - (70 - 100) / 15)^2 = 2.5^2
    found = SCORE.loss(torch.tensor([[1.0], [0.5], [3.0]]), torch.tensor([[115.0], [70.0], [math.nan]]))
    assert found.tolist() == pytest.approx([0.0, 6.25, 0.0])
    assert SCORE.scores(torch.tensor([[1.0], [-2.0]])).tolist() == [[115.0], [70.0]]


@pytest.mark.parametrize("target", [Target(), STAGES, FINDINGS, SCORE])
def test_a_scan_whose_label_is_unknown_has_no_gradient_and_the_others_have(target: Target) -> None:
    logits_NK = torch.zeros(2, target.num_outputs, requires_grad=True)
    values_NL = torch.tensor([[1.0], [math.nan]]).expand(2, len(target.labels))
    target.loss(logits_NK, values_NL).sum().backward()  # type: ignore[no-untyped-call]
    assert logits_NK.grad is not None
    assert logits_NK.grad[0].abs().min() > 0
    assert logits_NK.grad[1].tolist() == [0.0] * target.num_outputs


def test_scores_are_probabilities() -> None:
    assert Target().scores(torch.tensor([[0.0], [math.log(3)]])).tolist() == [[0.5], [pytest.approx(0.75)]]
    assert STAGES.scores(torch.tensor([[0.0, 0.0, math.log(2)]]))[0].tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert FINDINGS.scores(torch.tensor([[0.0, math.log(3)]]))[0].tolist() == pytest.approx([0.5, 0.75])


def test_balanced_weights_make_the_classes_count_alike() -> None:
    two = torch.tensor([[0.0], [0.0], [0.0], [1.0], [math.nan]])
    weights_C = Target().balanced_weights(two)
    assert weights_C is not None
    assert weights_C.tolist() == pytest.approx([4 / 6, 2.0])  # of four known scans: 4 / (2 * 3) and 4 / (2 * 1)
    weights_C = STAGES.balanced_weights(two)
    assert weights_C is not None
    assert weights_C[:2].tolist() == pytest.approx([4 / 6, 2.0])  # of the classes that are there
    weights_L2 = FINDINGS.balanced_weights(torch.tensor([[0.0, 1.0], [0.0, math.nan], [1.0, 1.0]]))
    assert weights_L2 is not None
    assert weights_L2[0].tolist() == pytest.approx([3 / 4, 3 / 2])
    assert weights_L2[1, 1].item() == 1.0
    assert SCORE.balanced_weights(torch.tensor([[100.0]])) is None


def test_classes_that_no_scan_shows_are_named() -> None:
    assert STAGES.missing_classes(torch.tensor([[0.0], [math.nan], [2.0]])) == ["MCI"]
    assert Target().missing_classes(torch.tensor([[0.0], [1.0]])) == []
    assert FINDINGS.missing_classes(torch.tensor([[0.0, 1.0], [1.0, math.nan]])) == ["nodule=0"]
    assert SCORE.missing_classes(torch.tensor([[math.nan]])) == ["any number"]
    assert SCORE.missing_classes(torch.tensor([[math.nan], [90.0]])) == []
