"""The comparison study: what it measures, that it resumes, what it calls dominated."""

import json
import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from core.evaluation.embeddings import Embeddings
from simulations import study as studies
from simulations.site_removal import AGE, FLOOR, HELD_OUT, KNN, LABELS, SITE, Study, Summary, app, dominated, verdicts

TINY = [
    "experiment=roi",
    "debias=erasure",
    "num_rounds=2",
    "local_steps=2",
    "batch_size=8",
    "warmup_rounds=0",
    "encoder.width=8",
    "embedding_size=4",
    "policy.min_group=4",
    "policy.diagonal_subjects=10",
    "data.unseen_sites=[d]",
    "data.fractions=[0.6,0,0.4]",
]


def write_table(path: Path) -> Path:
    """Four sites, each with its own offset of features that follow age."""
    random = np.random.default_rng(0)
    lines = ["participant_id,age,sex,site,diagnosis," + ",".join(f"f{i}" for i in range(6))]
    for site in "abcd":
        offset = random.normal(0, 2, 6)
        for number in range(30):
            age = 20 + 60 * random.random()
            x = age / 20 * np.arange(1, 7) % 3 + offset + random.normal(0, 0.3, 6)
            lines.append(f"{site}{number},{age:.1f},{'FM'[number % 2]},{site},control," + ",".join(f"{v:.3f}" for v in x))
    path.write_text("\n".join(lines) + "\n")
    return path


def study(tmp_path: Path, *options: str) -> str:
    table = write_table(tmp_path / "t.csv")
    overrides = [*TINY, f"data.table={table}"]
    chosen = ["--seeds", "1", "--workers", "1", "--output", str(tmp_path / "study"), *options]
    done = CliRunner().invoke(app, [*overrides, *chosen])
    assert done.exit_code == 0, done.output
    return done.output


class InThisProcess(Executor):
    """Stands for a pool of processes, each of which would load everything anew."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., None], *arguments: object) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(work(*arguments))
        return future


@pytest.mark.slow
@pytest.mark.usefixtures("quick_probes", "few_resamples")
def test_a_study_measures_writes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = study(tmp_path, "--method", "erasure", "--method", "combat_h")
    folder = tmp_path / "study"
    about = json.loads((folder / "study.json").read_text())
    assert list(about["figures"]) == [FLOOR, "fedavg", "combat_h", "erasure"]
    assert (
        about["figures"]["erasure"]["site balanced_accuracy"]["mean"]
        < about["figures"]["fedavg"]["site balanced_accuracy"]["mean"]
    )
    assert (folder / "figure.png").stat().st_size > 10_000
    assert LABELS["erasure"] in (folder / "table.md").read_text()
    assert any(LABELS["erasure"] in line for line in about["verdicts"])
    assert LABELS["combat_h"] in output
    result = json.loads((folder / "results" / "erasure-seed0.json").read_text())
    assert {d["metric"] for d in result["differences"]} >= {"balanced_accuracy", "mae", "mae_unseen"}
    weights = sum(result["traffic"]["weights"].values())
    assert about["traffic"] == {"erasure": {kind: sum(both.values()) for kind, both in result["traffic"].items()}}
    assert f"crossed {sum(about['traffic']['erasure'].values()) / weights - 1:.2%} of their bytes" in output.replace("\n", " ")
    tables = [Embeddings.load(path) for path in sorted((folder / "embeddings").glob("*.npz"))]
    assert len(tables) == 3
    for table in tables:  # the same subjects in the same order
        assert all(np.array_equal(getattr(table, name), getattr(tables[0], name)) for name in ("subject", "site", "split"))
    # The pool of processes has been seen to work.
    monkeypatch.setattr(studies, "ProcessPoolExecutor", InThisProcess)
    for name in ("flwr", "isocenter"):
        monkeypatch.setattr(logging.getLogger(name), "setLevel", lambda _: None)
    stamp = (folder / "results" / "fedavg-seed0.json").stat().st_mtime_ns
    study(tmp_path, "--method", "erasure", "--method", "raw")
    assert (folder / "results" / "fedavg-seed0.json").stat().st_mtime_ns == stamp
    again = json.loads((folder / "results" / "raw-seed0.json").read_text())
    assert again["differences"]  # compared with a reference that was measured before
    study(tmp_path, "encoder.width=9", "--method", "raw")
    assert (folder / "results" / "fedavg-seed0.json").stat().st_mtime_ns > stamp  # other settings, other figures


def test_mistakes_are_told_before_anything_runs(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv")
    for arguments, says in (
        (["experiment=roi", f"data.table={table}", "--method", "magic"], "method must be one of"),
        (["data=phantom"], "data.root must name the data"),
        (["experiment=roi", f"data.table={table}", "nonsense=1"], "must name a known key"),
        (["experiment=roi", f"data.table={table}", "debias.weight=1"], "debias.weight is no setting of debias=erasure"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert says in done.output


def summary(value: float) -> Summary:
    return Summary((value, value))


def test_dominated_counts_what_is_below_the_floor_as_the_floor() -> None:
    points = {"fedavg": (0.6, 3.0), "erasure": (0.18, 3.0), "combat_h": (0.10, 3.1), "feddapl": (0.5, 2.9), FLOOR: (0.2, None)}
    found: Study = {
        method: {SITE: summary(site), KNN: summary(site), HELD_OUT: summary(site)} | ({} if age is None else {AGE: summary(age)})
        for method, (site, age) in points.items()
    }
    assert dominated(found, SITE) == {"fedavg": ["erasure", "feddapl"], "erasure": [], "combat_h": ["erasure"], "feddapl": []}
    [line] = verdicts(found)
    assert "site, linear 0.90 x the linear floor" in line
    assert "age error +0.0 % against FedAvg" in line
    assert "dominated by none, dominates FedAvg, no debiasing, ComBat on h (distributed)" in line


def test_intervals_of_a_mean_over_seeds() -> None:
    assert Summary((1.0,)).interval is None
    low, high = Summary((1.0, 2.0, 3.0)).interval or (0, 0)
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)
