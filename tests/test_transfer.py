"""The transfer study: what it measures, that it goes on where it stopped, what it says of labels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from core.config import load_config, quoted
from simulations.transfer import (
    Cell,
    Part,
    Point,
    Study,
    app,
    between,
    carry_out,
    default_starts,
    draw,
    labels_for,
    read_study,
    rows_of,
    seconds_of,
    verdicts,
)

TINY = [
    "experiment=breastmnist",
    "num_rounds=1",
    "warmup_rounds=0",
    "local_steps=2",
    "batch_size=16",
    "encoder.width=4",
    "embedding_size=4",
    "finetune.num_rounds=2",
    "finetune.local_steps=3",
    "finetune.batch_size=8",
]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small images whose bright side tells their class."""
    monkeypatch.setenv("ISOCENTER_CACHE", str(tmp_path / "cache"))
    random, arrays = np.random.default_rng(0), {}
    for split, size in (("train", 40), ("val", 16), ("test", 24)):
        label_N = np.arange(size) % 2
        image_N = random.integers(0, 80, (size, 16, 16))
        image_N[label_N == 1, :8] += 120
        arrays |= {f"{split}_images": image_N.astype(np.uint8), f"{split}_labels": label_N[:, None].astype(np.uint8)}
    np.savez(tmp_path / "shapes.npz", **arrays)
    return tmp_path / "shapes.npz"


@pytest.fixture
def overrides(images: Path) -> tuple[str, ...]:
    """Of a study of seconds; class 1 is the finding."""
    return (*TINY, f"data.root={quoted(str(images))}", "data.controls=[0]")


def test_a_study_measures_every_cell_and_goes_on(overrides: tuple[str, ...], tmp_path: Path) -> None:
    points = (Point(0.5), Point(1.0), Point(epsilon=math.inf))
    folder = tmp_path / "study"
    parts = [Part(overrides, start, 0, "", points, ("linear_probe",), folder) for start in ("scratch", "pca", "simclr")]
    for part in parts:
        carry_out(part)
    config = load_config(overrides)
    study = read_study(parts, config)
    assert set(study) == {
        *(("scratch", "from_scratch", point) for point in points),
        *(("pca", "linear", point) for point in points[:2]),
        *(("simclr", "linear_probe", point) for point in points),
    }
    assert [study["pca", "linear", point].labels for point in points[:2]] == [20, 40]
    assert study["pca", "linear", points[1]].mean > 0.9
    whole = study["scratch", "from_scratch", points[1]]
    for (start, _, point), cell in study.items():
        assert cell.interval[0] <= cell.mean <= cell.interval[1]
        assert (cell.lead is None) == (start == "scratch")
        if cell.lead is not None and point == points[1]:
            assert cell.lead[0] == pytest.approx(cell.mean - whole.mean)
    headings, rows = rows_of(study, config)
    assert len(rows) == 8
    assert all(len(row) == len(headings) for row in rows)
    assert ["40, epsilon inf" in row for row in rows].count(True) == 2
    draw(study, config, folder / "figure.png")
    assert (folder / "figure.png").stat().st_size > 10_000
    told = json.loads(parts[2].result(points[2]).read_text())
    assert any("nothing is guaranteed" in note for note in told["notes"])
    assert seconds_of(parts) > 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for part in parts:
        carry_out(part)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changed = Part((*overrides, "finetune.num_rounds=1"), "simclr", 0, "", points, ("linear_probe",), folder)
    assert not changed.finished(points[0])
    pretraining = (folder / "pretraining" / "simclr-seed0" / "pretrained.json").stat().st_mtime_ns
    carry_out(changed)
    assert changed.finished(points[0])
    assert not parts[2].finished(points[0])
    # What fine-tuning is set to does not change the pretraining, which is kept.
    assert (folder / "pretraining" / "simclr-seed0" / "pretrained.json").stat().st_mtime_ns == pretraining


def test_each_site_is_left_out_of_everything_and_scored_unseen(overrides: tuple[str, ...], tmp_path: Path) -> None:
    folder, options = tmp_path / "study", "--leave-each-out --start scratch --start simclr --stage linear_probe"
    shorter = f"--fraction 1 --seeds 1 --workers 1 --output {folder}"
    result = CliRunner().invoke(app, [*overrides, "data.num_sites=2", *options.split(), *shorter.split()])
    assert result.exit_code == 0, result.output
    assert "auc, left-out sites" in (folder / "table.md").read_text()
    cells = {cell["start"]: cell["unseen"] for cell in json.loads((folder / "study.json").read_text())["cells"]}
    assert cells.keys() == {"scratch", "simclr"}
    assert all(0 <= low <= mean <= high <= 1 for mean, low, high in cells.values())
    together = json.loads((folder / "results" / "simclr-seed0-1.json").read_text())["targets"]
    assert len(together) == 2
    for site in together:
        [other] = set(together) - {site}
        name = f"simclr-seed0-without-{site}"
        assert json.loads((folder / "results" / f"{name}-1.json").read_text())["targets"] == [other]
        rounds = (folder / "pretraining" / name / "rounds.jsonl").read_text().splitlines()
        assert {tuple(json.loads(line)["sites"]) for line in rounds} == {(other,)}


def cell(labels: float, mean: float) -> Cell:
    return Cell(labels, mean, (mean - 0.1, mean + 0.1), None, None, None)


def test_how_many_labels_reach_what_scratch_does_with_all() -> None:
    config = load_config()
    study: Study = {
        ("scratch", "from_scratch", Point(0.1)): cell(10, 0.6),
        ("scratch", "from_scratch", Point(1.0)): cell(100, 0.8),
        ("simclr", "linear_probe", Point(0.1)): cell(10, 0.7),
        ("simclr", "linear_probe", Point(1.0)): cell(100, 0.9),
        ("yaware", "linear_probe", Point(0.1)): cell(10, 0.85),
        ("micle", "linear_probe", Point(1.0)): cell(100, 0.75),
        ("micle", "linear_probe", Point(epsilon=8.0)): cell(100, 0.99),
    }
    assert verdicts(study, config) == [
        "SimCLR, linear_probe: the auc of scratch with all 100 labels (0.800) is reached with about 32 labels, 68% fewer.",
        "y-aware, linear_probe: the auc of scratch with all 100 labels (0.800) is reached with at most 10 labels, 90% fewer.",
        "MICLe (SimCLR on two scans of a subject), linear_probe: the auc of scratch with all 100 labels (0.800) is not reached.",
    ]
    assert labels_for(0.9, [(10, 0.95), (100, 0.8)], more_is_better=True) == 10
    assert between(np.array([5.0, *range(101), math.nan])) == (2.5, 97.5)


def test_starts_that_the_data_allow_and_options_that_do_not_fit(overrides: tuple[str, ...]) -> None:
    assert default_starts(load_config(overrides)) == ("scratch", "pca", "simclr", "barlow_twins")
    assert default_starts(load_config()) == ("scratch", "pca", "simclr", "barlow_twins", "yaware", "yaware_fairkl")
    for options, text in (
        (["--start", "dino"], "--start must be of"),
        (["--fraction", "1.5"], "--fraction must be more than 0"),
        (["finetune.stages=[from_scratch]"], "must name one beside from_scratch"),
        (["data.root=null"], "data.root must name the data"),
        (["--epsilon", "0.001"], "target_epsilon must be from"),
    ):
        done = CliRunner().invoke(app, [*overrides, *options])
        assert done.exit_code == 2, done.output
        assert text in done.output
