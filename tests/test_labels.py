"""Tables of labels: how they are written, which column is what, and what a cell means."""

import json
import logging
from pathlib import Path

import pytest

from core.data.labels import (
    Age,
    AgeColumn,
    Columns,
    LabelError,
    LabelTable,
    ages_agree,
    joined,
    loose_key,
    read_labels,
    read_text,
)


def table(folder: Path, text: str, sidecar: object = None, name: str = "participants.tsv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    if sidecar is not None:
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path


def kinds(found: LabelTable) -> list[list[str]]:
    return [[flaw.kind for flaw in row.flaws] for row in found.rows]


@pytest.mark.parametrize(
    "text",
    [
        "participant_id\tage\tsex\ns1\t30\tF\ns2\t40\tm\n",
        "\ufeffParticipant ID\tAge\tSEX\r\ns1\t30\tF\r\n\r\ns2\t40\tm\r\n",
        "participant_id,age,sex,\ns1,30,F,\ns2,40,m,\n",
        'participant_id;"age";sex\n"s1";30;F\ns2;40;m;;\n\n',
        '"subject, as told"\tparticipant_id\tage\tsex\nx\ts1\t30\tF\nx\ts2\t40\tm\n',
    ],
)
def test_how_a_table_is_written_does_not_matter(tmp_path: Path, text: str) -> None:
    rows = read_labels(table(tmp_path, text)).rows
    assert [(row.subject, row.age and row.age.years, row.sex) for row in rows] == [("s1", 30.0, "F"), ("s2", 40.0, "M")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("age\n30\n", "one column must be the subject's name, such as participant_id, .*data.columns.subject"),
        ("", "one column must be the subject's name"),
        ("subject\tage\na\n", "every row must have 2 cells, got 1 in row 2. Mend it"),
        ("subject\tage\na\t30\tx\n", "every row must have 2 cells, got 3 in row 2"),
        ("subject\tage\tAge\na\t30\t30\n", "each column must be named once .* got 'age' twice"),
        (
            "subject\tage_at_scan\tage_at_visit\na\t30\t31\n",
            "one column must be the age, and 2 fit, got age_at_scan, age_at_visit",
        ),
        ('subject\tage\na\t"30\n', "must be UTF-8 text, separated by comma, semicolon or tab"),
    ],
)
def test_a_table_that_cannot_be_understood_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(LabelError, match=says):
        read_labels(table(tmp_path, text))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_one_sentence(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes("subject,name\na,José\n".encode(encoding))
    with pytest.raises(LabelError, match=r"must be UTF-8 text, .* Save it as such\.$"):
        read_text(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "unit", "first"),
    [
        ("age", "years", False),
        ("Age (years)", "years", False),
        ("AGE_AT_SCAN", "years", False),
        ("age_at_first_scan_years", "years", True),
        ("patient_age_at_first_study", "years", True),
        ("PatientAge", "years", False),
        ("ageYears", "years", False),
        ("age_months", "months", False),
    ],
)
def test_a_column_of_ages_is_known_by_its_name(tmp_path: Path, name: str, unit: str, first: bool) -> None:
    found = read_labels(table(tmp_path, f"MRID\t{name}\nx\t24\n"))
    assert found.rows[0].age == Age(24.0 if unit == "years" else 2.0, unit == "years")
    assert found.first_visit is first


@pytest.mark.parametrize("name", ["age_at_onset", "age_group", "age_w1", "agency", "parental_age", "stage"])
def test_another_age_is_not_the_age(tmp_path: Path, name: str) -> None:
    assert read_labels(table(tmp_path, f"subject\t{name}\nx\t24\n")).rows[0].age is None


@pytest.mark.parametrize(
    ("header", "role", "column"),
    [
        ("subject gender", "sex", "gender"),
        ("subject Institution_ID", "site", "institution_id"),
        ("subject centre", "site", "centre"),
        ("patient_id study_site", "site", "study_site"),
        ("subject dx_group", "diagnosis", "dx_group"),
        ("subject dx group", "diagnosis", "dx"),
        ("id subject", "subject", "subject"),
        ("subject session_id visit", "session", "session_id"),
    ],
)
def test_usual_names_of_the_other_columns(tmp_path: Path, header: str, role: str, column: str) -> None:
    names = header.split()
    found = read_labels(table(tmp_path, "\t".join(names) + "\n" + "\t".join("x" for _ in names) + "\n"))
    assert found.roles[role] == column


def test_the_exact_name_is_taken_before_others_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "isocenter"):
        found = read_labels(table(tmp_path, "subject\tage_months\tage\nx\t24\t30\n"))
    assert found.rows[0].age == Age(30.0, True)
    assert "column 'age' is the age; 'age_months' not read" in caplog.text


@pytest.mark.parametrize(
    ("text", "years", "kind"),
    [
        ("34", 34.0, None),
        ("34.5", 34.5, None),
        ("0", 0.0, None),
        ("34Y", 34.0, None),
        ("034Y", 34.0, None),
        ("018M", 1.5, None),
        ("6 months", 0.5, None),
        ("6 month(s)", 0.5, None),
        ("6 years", 6.0, None),
        ("52 weeks", 364 / 365.25, None),
        ("10 d", 10 / 365.25, None),
        ("89+", 89.0, "capped_age"),
        (">89", 89.0, "capped_age"),
        (">= 90", 90.0, "capped_age"),
        ("18 m", None, "bad_age"),
        ("18M", None, "bad_age"),
        ("30 gestational_weeks", None, "bad_age"),
        ("30 weeks PMA", None, "bad_age"),
        ("-1", None, "bad_age"),
        ("-9999", None, "bad_age"),
        ("999", None, "bad_age"),
        ("121", None, "bad_age"),
        ("1_0", None, "bad_age"),
        ("nan years", None, "bad_age"),
        ("30-40", None, "bad_age"),
        ("thirty", None, "bad_age"),
        ("34,5", None, "bad_age"),
    ],
)
def test_an_age_is_read_where_it_means_one_thing(text: str, years: float | None, kind: str | None) -> None:
    age, flaws = AgeColumn().read(text)
    assert (age and age.years) == (years if years is None else pytest.approx(years))
    assert [flaw.kind for flaw in flaws] == ([kind] if kind else [])


@pytest.mark.parametrize("text", ["n/a", "N/A", "-", "", "NaN", "unknown"])
def test_a_missing_age_is_missing(tmp_path: Path, text: str) -> None:
    found = read_labels(table(tmp_path, f"subject\tage\tsex\nx\t{text}\tF\n"))
    assert (found.rows[0].age, kinds(found)) == (None, [["no_age"]])


@pytest.mark.parametrize(
    ("entry", "years", "kind"),
    [
        ({"Units": "months"}, 2.0, []),
        ({"Units": "month(s)"}, 2.0, []),
        ({"Units": "mo"}, 2.0, []),
        ({"Units": "years"}, 24.0, []),
        ({"Units": "a"}, 24.0, []),
        ({"Units": "n/a"}, 24.0, []),
        ({"Units": "d"}, 24 / 365.25, []),
        ({"Units": "w"}, 168 / 365.25, []),
        ({"Description": "age in months"}, 2.0, []),
        ({"Units": "months", "Description": "Age (in years) of the candidate"}, 2.0, ["doubtful_age"]),
        ({"Units": "years", "LongName": "Age (months)"}, 24.0, ["doubtful_age"]),
        ({"Units": "arbitrary"}, 24.0, ["doubtful_age"]),
        ({"Units": "gestational_weeks"}, None, ["bad_age"]),
        ({"Units": "weeks post-menstrual"}, None, ["bad_age"]),
    ],
)
def test_the_units_of_the_data_dictionary_count(
    tmp_path: Path, entry: dict[str, str], years: float | None, kind: list[str]
) -> None:
    found = read_labels(table(tmp_path, "subject\tAge\nx\t24\n", {"Age": entry}))
    age = found.rows[0].age
    assert (age and age.years) == (years if years is None else pytest.approx(years))
    assert kinds(found) == [kind]


def test_a_code_of_no_age_is_none_in_months_either(tmp_path: Path) -> None:
    found = read_labels(table(tmp_path, "subject\tage\nx\t999\ny\t-999\n", {"age": {"Units": "months"}}))
    assert kinds(found) == [["bad_age"], ["bad_age"]]
    assert "row 2" not in found.rows[0].flaws[0].what
    days = read_labels(table(tmp_path, "subject\tage\nx\t999\n", {"age": {"Units": "days"}}))
    assert days.rows[0].age == Age(999 / 365.25)


@pytest.mark.parametrize(
    ("cells", "years"),
    [
        (["34,5", "40", "7,25"], [34.5, 40.0, 7.25]),
        (["34,5", "40.5", "7,25"], [None, 40.5, None]),
        (["34,5", "1,234"], [None, None]),
    ],
)
def test_decimal_commas_count_where_the_whole_column_has_them(
    tmp_path: Path, cells: list[str], years: list[float | None]
) -> None:
    text = "subject;age\n" + "".join(f"s{i};{cell}\n" for i, cell in enumerate(cells))
    assert [row.age and row.age.years for row in read_labels(table(tmp_path, text, name="t.csv")).rows] == years


@pytest.mark.parametrize(
    ("text", "sex"),
    [
        ("f", "F"),
        ("Female", "F"),
        ("W", "F"),
        ("woman", "F"),
        ("M", "M"),
        ("male", "M"),
        ("o", None),
        ("other", None),
        ("1", None),
    ],
)
def test_a_sex_is_a_word_for_it(tmp_path: Path, text: str, sex: str | None) -> None:
    found = read_labels(table(tmp_path, f"subject\tage\tsex\nx\t30\t{text}\n"))
    assert (found.rows[0].sex, kinds(found)) == (sex, [[] if sex else ["bad_sex"]])


def test_codes_mean_what_levels_or_columns_tell(tmp_path: Path) -> None:
    text = "subject\tage\tsex\tgroup\na\t1\t1\t0\nb\t2\t2.0\t1\nc\t3\t9\t7\n"
    levels = {
        "sex": {"Levels": {"1": "Male", "2": {"Description": "female"}}},
        "group": {"Levels": {"0": "healthy adults", "1": "MS"}},
    }
    by_levels = read_labels(table(tmp_path, text, levels))
    told = Columns(males=("1",), females=("2",), controls=("0",), patients=("1",))
    by_columns = read_labels(table(tmp_path, text, {}), told)
    for found in (by_levels, by_columns):
        assert [(row.sex, row.diagnosis) for row in found.rows] == [("M", "control"), ("F", "patient"), (None, None)]
        assert kinds(found) == [[], [], ["bad_diagnosis", "bad_sex"]]


@pytest.mark.parametrize(
    ("text", "diagnosis"),
    [
        ("Control", "control"),
        ("HC", "control"),
        ("healthy control", "control"),
        ("Healthy_Controls", "control"),
        ("CN", "control"),
        ("depr", "patient"),
        ("Patient", "patient"),
        ("MCI", "patient"),
        ("1", None),
        ("n/a", None),
    ],
)
def test_a_diagnosis_is_control_patient_or_missing(tmp_path: Path, text: str, diagnosis: str | None) -> None:
    assert read_labels(table(tmp_path, f"subject\tdx\nx\t{text}\n")).rows[0].diagnosis == diagnosis


def test_levels_name_the_healthy_and_nobody_else(tmp_path: Path) -> None:
    levels = {"A": "healthy volunteers", "B": "patients of the control arm", "C": "not healthy", "D": "typically developing"}
    text = "subject\tgroup\n" + "".join(f"{key}\t{key}\n" for key in levels)
    rows = read_labels(table(tmp_path, text, {"group": {"Levels": levels}})).rows
    assert [row.diagnosis for row in rows] == ["control", "patient", "patient", "control"]


def test_the_log_keeps_the_words_of_a_diagnosis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "isocenter"):
        read_labels(table(tmp_path, "subject\tdx\na\tdepr\nb\tdepr\nc\thc\n"))
    assert "depr is patient (2)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "isocenter"):
        read_labels(table(tmp_path, "subject\tdx\na\tdepr\n"))
    assert "no row is a control: name their code with data.columns.controls" in caplog.text


def test_the_schema_names_rows(tmp_path: Path) -> None:
    text = "subject\tage\tsex\tsplit\na\t30\tF\ttrain\n\n\t31\tF\ttrain\nb\t32\tx\tlater\na\t30\tF\ttrain\n"
    found = read_labels(table(tmp_path, text))
    assert [row.row for row in found.rows] == [2, 5, 6]
    assert [problem.kind for problem in found.problems] == ["no_subject"]
    assert "row 4" in found.problems[0].where
    assert kinds(found) == [[], ["bad_sex", "bad_split"], ["double_row"]]
    assert all("row 5: " in flaw.what for flaw in found.rows[1].flaws)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_data_dictionary_that_cannot_be_read_is_a_problem(tmp_path: Path, text: str) -> None:
    path = table(tmp_path, "subject\tage\na\t30\n")
    path.with_suffix(".json").write_bytes(text.encode("latin-1"))
    found = read_labels(path)
    assert [problem.kind for problem in found.problems] == ["bad_sidecar"]
    assert found.rows[0].age == Age(30.0, True)


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        (Age(30.0), Age(31.0), True),
        (Age(30.0), Age(31.1), False),
        (Age(1.0), Age(1.2), True),
        (Age(1.0), Age(1.3), False),
        (Age(2.0, whole=True), Age(2.9), True),
        (Age(23.0, whole=True), Age(23 / 12), False),
        (Age(89.0, capped=True), Age(95.0), True),
    ],
)
def test_when_two_ages_agree(first: Age, second: Age, agree: bool) -> None:
    assert ages_agree(first, second) is agree
    assert ages_agree(second, first) is agree


def test_rows_of_one_subject_are_joined(tmp_path: Path) -> None:
    text = "subject\tsession\tage\tsex\tdx\na\t1\t30\tF\thc\na\t2\t33\t\tMS\n"
    rows = read_labels(table(tmp_path, text)).rows
    assert kinds(read_labels(table(tmp_path, text)))[1] == []
    assert [joined(rows, session).age for session in ("ses-01", "2")] == [Age(30.0, True), Age(33.0, True)]
    both = joined(rows, "ses-2")
    assert (both.sex, both.diagnosis) == ("F", None)
    assert [flaw.kind for flaw in both.flaws] == ["contradictory_diagnosis"]
    without = joined(rows, "")
    assert without.age is None
    assert "contradictory_age" in [flaw.kind for flaw in without.flaws]


def test_targets_are_read_as_text_by_the_name_that_is_asked_for(tmp_path: Path) -> None:
    text = "subject\tsex\tGroup\t MMSE \nx\tF\tMCI\t 1e3 \ny\tM\thc\tN/A\nz\tM\tMCI\t-99.0\nw\tM\tMCI\tinf\n"
    columns = Columns(targets=(" mmse", "Group"), missing=("-99",))
    found = read_labels(table(tmp_path, text), columns)
    assert [row.targets for row in found.rows] == [
        ((" mmse", cell), ("Group", group)) for cell, group in (("1e3", "MCI"), ("", "hc"), ("", "MCI"), ("inf", "MCI"))
    ]
    assert [row.diagnosis for row in found.rows] == ["patient", "control", "patient", "patient"]
    assert hash(columns) == hash(Columns(targets=(" mmse", "Group"), missing=("-99",)))
    assert columns != Columns(missing=("-99",))


@pytest.mark.parametrize("targets", [("mmse", "MMSE"), ("mmse", "mmse"), ("",), (" ",)])
def test_targets_are_different_columns(targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="targets must be different columns, each with a name, got"):
        Columns(targets=targets)


def test_a_target_that_the_table_lacks_is_named_with_the_nearest_columns(tmp_path: Path) -> None:
    path = table(tmp_path, "subject\tmmse_total\tsex\nx\t28\tF\n")
    with pytest.raises(
        LabelError, match=r"data.columns.targets must be a column of the table, got 'MMSE_Toal'. Nearest: mmse_total"
    ):
        read_labels(path, Columns(targets=("sex", "MMSE_Toal")))


def test_the_target_of_a_session_is_that_of_its_row_and_none_where_rows_contradict_each_other(tmp_path: Path) -> None:
    text = "subject\tsession\tiq\tgrade\na\t1\t90\t2\na\t2\t95\t2.0\na\t3\t\t\n"
    rows = read_labels(table(tmp_path, text), Columns(targets=("iq", "grade"))).rows
    assert [dict(joined(rows, session).targets)["iq"] for session in ("ses-01", "ses-2", "3")] == ["90", "95", ""]
    without = joined(rows, "")
    assert without.targets == (("iq", ""), ("grade", "2"))
    assert [flaw for flaw in without.flaws if flaw.kind == "contradictory_target"] == [
        ("contradictory_target", "column 'iq' tells 90 and 95")
    ]


def test_loose_names() -> None:
    assert loose_key("sub-01") == loose_key("SUB_001") == loose_key("sub1")
    assert loose_key("sub-10") != loose_key("sub-1")
    assert loose_key("a1b2") != loose_key("a12b")
