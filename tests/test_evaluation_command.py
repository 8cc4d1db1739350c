"""`isocenter evaluate` end to end: what it reads, what it prints and writes, and how it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from core.cli import app
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import read_metrics
from core.evaluation.reading import read_representations

RUNNER = CliRunner()
COLUMNS = ("subject", "site", "age", "sex", "diagnosis")


def rows_of(num_sites: int = 2, subjects: int = 24) -> list[list[str]]:
    random = np.random.default_rng(0)
    return [
        [f"p{number}", "xyz"[site], f"{random.uniform(20, 60):.1f}", "FM"[number % 2], "control"]
        for site in range(num_sites)
        for number in range(subjects)
    ]


def write_folder(folder: Path, rows: list[list[str]], columns: tuple[str, ...] = COLUMNS, separator: str = ",") -> None:
    """Somebody else's folder: two representations, the second with the site in it, and the table."""
    folder.mkdir(exist_ok=True)
    lines = [separator.join(line) for line in (columns, *rows)]
    (folder / ("table.csv" if separator == "," else "table.tsv")).write_text("\n".join(lines) + "\n", encoding="utf-8")
    h_NF = np.random.default_rng(1).normal(size=(len(rows), 4))
    np.save(folder / "blind.npy", h_NF)
    np.save(folder / "seeing.npy", h_NF + [[4.0 * (row[1] == "x"), 0, 0, 0] for row in rows])


def run_folder(folder: Path, **offsets: float) -> None:
    """A run of ours with these stages, each with this much of the site in h."""
    folder.mkdir()
    random = np.random.default_rng(0)
    site = np.repeat(["a", "b"], 20)
    common = {
        "subject": np.tile(np.arange(20), 2),
        "site": site,
        "scanner": site,
        "sex": np.tile(["F", "M"], 20),
        "diagnosis": np.full(40, "control"),
        "split": np.tile(np.where(np.arange(20) % 2, "train", "test"), 2),
        "age_years": random.uniform(20, 60, 40),
    }
    h_NF = random.normal(size=(40, 3))
    for stage, offset in offsets.items():
        shifted = h_NF + offset * (site == "a")[:, None]
        Embeddings(h_NF=shifted.astype(np.float32), **common).save(folder / f"embeddings-{stage}.npz")


@pytest.mark.usefixtures("quick_probes", "few_resamples")
def test_somebody_elses_arrays_are_evaluated_compared_and_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", rows_of(subjects=40))
    arguments = ["evaluate", str(tmp_path / "mine"), "--output", str(tmp_path / "out"), "--official", "--seed", "3"]
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for text in (
        "blind: held-out subjects",
        "seeing (second) minus blind (first)",
        "balanced_accuracy_knn_heldout",
        "openbhb_bacc",
        "Site can be read from the seeing representation with balanced accuracy",
        "note: table.csv has no column split: 60% of the subjects are train",
        "note: table.csv has no column scanner",
    ):
        assert text in done.output
    written = read_metrics(tmp_path / "out" / "metrics.json")
    assert {e.stage for e in written} == {"blind", "seeing", "chance", "age_sex_floor"}
    assert {(e.regime, e.seed) for e in written} == {("mine", 3)}
    found = {(e.stage, e.metric): e.value for e in written if (e.task, e.site) == ("site", "all")}
    assert found["seeing", "balanced_accuracy_heldout"] > 0.9 > found["blind", "balanced_accuracy_heldout"]
    differences = json.loads((tmp_path / "out" / "differences.json").read_text())
    linear = next(d for d in differences if (d["task"], d["metric"]) == ("site", "balanced_accuracy"))
    assert linear["low"] > 0
    assert linear["p_value"] < 0.05
    page = (tmp_path / "out" / "report.html").read_text()
    assert "balanced accuracy, boosting" in page
    assert (tmp_path / "out" / "figures" / "site_predictability.png").is_file()
    again = RUNNER.invoke(app, [*arguments[:3], str(tmp_path / "again"), *arguments[4:]])
    assert again.exit_code == 0
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (tmp_path / "out" / "metrics.json").read_bytes()


@pytest.mark.usefixtures("quick_probes", "few_resamples")
def test_stages_of_a_run_stand_in_the_order_in_which_they_are_made(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", erased=0.0, untrained=3.0, pretrained=2.0)
    done = RUNNER.invoke(app, ["evaluate", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    places = [done.output.index(f"{stage}: held-out subjects") for stage in ("untrained", "pretrained", "erased")]
    assert places == sorted(places)
    assert "erased (second) minus untrained (first)" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.usefixtures("quick_probes", "few_resamples")
def test_runs_are_compared_by_what_they_deliver(tmp_path: Path) -> None:
    run_folder(tmp_path / "one", pretrained=2.0, erased=0.0)
    run_folder(tmp_path / "two", untrained=4.0, pretrained=3.0)
    done = RUNNER.invoke(app, ["evaluate", str(tmp_path / "one"), str(tmp_path / "two"), "--unseen", "b"])
    assert done.exit_code == 0, done.output
    assert "two (second) minus one (first)" in done.output
    assert "Site predictability of erased was not evaluated" in done.output
    assert "Site predictability of pretrained was not evaluated" in done.output
    assert "mae_unseen" in done.output
    single = RUNNER.invoke(app, ["evaluate", str(tmp_path / "one" / "embeddings-erased.npz")])
    assert single.exit_code == 0
    assert "erased: held-out subjects" in single.output


def refusal(*arguments: object) -> str:
    done = RUNNER.invoke(app, ["evaluate", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    line = done.output.strip().splitlines()
    assert len(line) == 1
    return line[0]


@pytest.mark.usefixtures("quick_probes", "few_resamples")
def test_what_cannot_be_evaluated_is_refused_in_one_line(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", pretrained=0.0)
    write_folder(tmp_path / "mine", rows_of())
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_text("not an archive")
    (tmp_path / "letter.txt").write_text("dear")
    assert "it must be a folder or an .npz file, got nothing" in refusal(tmp_path / "absent")
    assert "it must be a folder or an .npz file, got another file" in refusal(tmp_path / "letter.txt")
    assert "got 0 arrays and 0 tables" in refusal(tmp_path / "empty")
    assert "broken.npz: it must be an .npz file that" in refusal(tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", h=np.zeros(3))
    assert "other.npz: Embeddings.load: other.npz must hold the arrays" in refusal(tmp_path / "other.npz")
    assert "it must be a site of run (a, b), got 'c'" in refusal(tmp_path / "run", "--unseen", "c")
    assert "must have been seen, got all of them" in refusal(tmp_path / "run", "--unseen", "a", "--unseen", "b")
    assert "must be of the same scans in the same order, got another subject" in refusal(tmp_path / "run", tmp_path / "mine")
    assert "must have different names" in refusal(tmp_path / "run", tmp_path / "run")


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (3, 3, "x", "sex of row 5 must be one of f, female, m, male, got 'x'"),
        (0, 2, "old", "age of row 2 must be a number of years or empty, got 'old'"),
        (0, 2, "-3", "age_years must be at least 0 or nan"),
        (1, 4, "healthy", "diagnosis of row 3 must be one of control, patient, got 'healthy'"),
        (2, 0, "", "row 4 must have a subject, got none"),
        (2, 0, "p1,more", "row 4 must have as many fields as there are columns, got more"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, row: int, column: int, value: str, message: str) -> None:
    rows = rows_of()
    rows[row][column] = value
    write_folder(tmp_path / "mine", rows)
    assert message in refusal(tmp_path / "mine")


def test_bad_arrays_and_tables_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_folder(folder, rows_of())
    np.save(folder / "blind.npy", np.zeros((5, 2)))
    assert "it must be a matrix of numbers with the 48 rows of table.csv, got ('float64', (5, 2))" in refusal(folder)
    np.save(folder / "blind.npy", np.full((48, 2), 1e300))
    assert "blind.npy: Embeddings: h_NF must be finite, got 48 scans" in refusal(folder)
    np.save(folder / "blind.npy", np.array([{}], dtype=object))
    assert "it must be a .npy file of numbers" in refusal(folder)
    (folder / "table.csv").write_text("subject,age\n1,2\n")
    assert "must have rows and the columns subject, site, got ['subject', 'age']" in refusal(folder)
    (folder / "table.csv").write_bytes(b"\xff\xfe\x00")
    assert "the table must be UTF-8 text in columns" in refusal(folder)
    (folder / "other.tsv").write_text("subject\tsite\n")
    assert "got 2 arrays and 2 tables" in refusal(folder)


def test_a_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    """Tabs, capitals, missing cells, a split: two sites may use one subject name; a subject keeps its split."""
    columns = ("Subject", "SITE", "age", "sex", "scanner", "split", "remark")
    rows = [
        ["p1", "x", "30", "Female", "Trio", "train", "-"],
        ["p1", "x", "31.5", "female", "Trio", "train", "-"],
        ["p2", "x", "n/a", "", "", "test", "-"],
        ["p1", "y", "", "M", "Skyra", "test", "-"],
    ]
    write_folder(tmp_path / "mine", rows, columns, separator="\t")
    read = read_representations(tmp_path / "mine")
    assert list(read.by_stage) == ["blind", "seeing"]
    assert read.notes == ["table.tsv has no column diagnosis: it is unknown of every scan."]
    embeddings = read.by_stage["blind"]
    assert embeddings.h_NF.dtype == np.float32
    assert embeddings.subject.tolist() == [0, 0, 1, 0]
    assert len(np.unique(embeddings.subjects)) == 3
    assert embeddings.sex.tolist() == ["F", "F", "", "M"]
    assert embeddings.split.tolist() == ["train", "train", "test", "test"]
    np.testing.assert_array_equal(embeddings.age_years, [30, 31.5, np.nan, np.nan])

    write_folder(tmp_path / "hashed", rows_of(3, 100))
    whole = read_representations(tmp_path / "hashed").by_stage["blind"]
    assert 0.5 < (whole.split == "train").mean() < 0.7
    write_folder(tmp_path / "half", rows_of(3, 100)[100:])
    np.testing.assert_array_equal(read_representations(tmp_path / "half").by_stage["blind"].split, whole.split[100:])
