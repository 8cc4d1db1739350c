"""Tiny hospitals on disk, and the real apps run over them inside this process."""

import base64
import gzip
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when the numerical libraries load: on shared cores their threads wait for each other, forty times as long as they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import pytest
import torch

NodeConfig = dict[str, str | int | bool | float]
torch.set_num_threads(1)
# Without per-scan results there is nothing to probe and draw, which would take most of the time.
TINY = "experiment=tiny finetune=none evaluation=per_scan policy.share_per_scan=false"

# A picture of one pixel.
BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg==")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: they mostly wait for servers, while another worker computes."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def write_tiny_site(root: Path, *, seed: int, healthy: int = 12, patients: int = 0, scanners: int = 1, gain: float = 1.0) -> None:
    """A BIDS data set of small volumes: a bright ball that shrinks with age, a dark spot in patients, the scanner's gain."""
    random = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (11, 13, 11)), indexing="ij")
    rows = ["participant_id\tage\tsex\tdiagnosis\tscanner"]
    for number in range(healthy + patients):
        subject, patient = f"sub-{number:03d}", number >= healthy
        age = 20 + 60 * random.random()
        volume = 100 * gain / (1 + np.exp(12 * (x**2 + y**2 + z**2 - (1 - age / 160) ** 2)))
        volume[:6] += 20 * (number % scanners)
        if patient:
            volume[6:8, 6:9, 5:8] *= 0.4
        volume += random.normal(0, 1, volume.shape)
        folder = root / subject / "ses-01" / "anat"
        folder.mkdir(parents=True)
        image = nib.Nifti1Image(volume.astype(np.int16), np.diag([8.0, 8, 8, 1]))
        data = gzip.compress(image.to_bytes(), 1, mtime=0)
        (folder / f"{subject}_ses-01_T1w.nii.gz").write_bytes(data)
        sex, diagnosis = "FM"[number % 2], "patient" if patient else "control"
        rows.append(f"{subject}\t{age:.1f}\t{sex}\t{diagnosis}\tscanner{number % scanners}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    (root / "dataset_description.json").write_text(json.dumps({"Name": root.name, "BIDSVersion": "1.9.0"}))


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of two strengths and of few trees, where it matters what is told of them and not how sharply they see."""
    from core.evaluation import probes

    monkeypatch.setattr(probes, "LOGISTIC_C", (1e-2, 1.0))
    monkeypatch.setitem(probes.BOOSTING, "max_iter", 10)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A test begins with a log that goes nowhere, and what it makes of it, such as by running the server here, ends with it."""
    log = logging.getLogger("isocenter")
    before = list(log.handlers), log.level, log.propagate
    log.handlers = []
    yield
    log.handlers, level, log.propagate = before
    log.setLevel(level)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals and tests of 100 draws instead of a thousand and more, where nobody says how many."""
    from core.evaluation import command, outcomes, probes

    for function in (command.evaluate_and_print, outcomes.compare_outcomes, probes.evaluate, probes.chance_and_floor):
        monkeypatch.setitem(inspect.unwrap(function).__kwdefaults__, "num_resamples", 100)
    monkeypatch.setitem(outcomes.paired_difference.__kwdefaults__, "num_permutations", 100)


def paint_nothing(patch: pytest.MonkeyPatch) -> None:
    """Figures of reports are made and not painted, which takes a third of a short run."""
    patch.setattr("core.report_figures._png", lambda _: BLANK)


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose figures nobody looks at."""
    paint_nothing(monkeypatch)


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that share scans collect them and leave it at that."""
    monkeypatch.setattr("server.evaluation.evaluate", lambda *_, **__: ([], []))
    monkeypatch.setattr("server.evaluation.chance_and_floor", lambda *_, **__: ([], []))
    monkeypatch.setattr("server.app.write_report", lambda *_: None)


@pytest.fixture(scope="session")
def write_site() -> Callable[..., None]:
    """The function that writes a tiny hospital."""
    return write_tiny_site


@pytest.fixture
def consortium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small hospitals in one folder: `a` and `b` healthy (`b` with two scanners), `c` with patients."""
    monkeypatch.setenv("ISOCENTER_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "consortium"
    write_tiny_site(root / "a", seed=1)
    write_tiny_site(root / "b", seed=2, healthy=14, scanners=2, gain=1.6)
    write_tiny_site(root / "c", seed=3, healthy=10, patients=10)
    return root


@pytest.fixture
def federate(tmp_path: Path) -> Callable[..., Path]:
    """Run the real apps over the sites of a folder, in this process, without painting figures unless told; the run's folder."""
    from client.app import app as client_app
    from core.data.bids import list_sites
    from server.app import app as server_app
    from simulations.in_process import run_in_process

    def run(
        root: Path,
        *overrides: str,
        name: str = "run",
        node_configs: dict[int, NodeConfig] | None = None,
        painted: bool = False,
        **grid: object,
    ) -> Path:
        sites = list_sites(root)
        virtual: dict[int, NodeConfig] = {
            number + 1: {"partition-id": number, "num-partitions": len(sites)} for number in range(len(sites))
        }
        sites_of_run = [] if "data=" in " ".join(overrides) else ["data=folder"]
        text = " ".join([TINY, *sites_of_run, f"data.root={root}", f"output={tmp_path / 'runs'}", f"name={name}", *overrides])
        with pytest.MonkeyPatch.context() as patch:
            if not painted:
                paint_nothing(patch)
            run_in_process(server_app, client_app, text, node_configs or virtual, **grid)
        return tmp_path / "runs" / name

    return run
