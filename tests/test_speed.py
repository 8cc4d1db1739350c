"""The comparison of speeds: what is compared agrees, and what does not agree is found. No timing is asserted."""

import io
import json
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from simulations import speed, speed_data

NUM_SCANS = 16


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither package is installed."""
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)


@pytest.fixture
def stocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages, which must be asked for the loss that ours is."""

    def of_two_views(loss: speed.Loss, **expected: float) -> object:
        def build(**given: float) -> object:
            assert given == expected
            return lambda z1, z2: loss(z1, z2, {})

        return build

    def of_labelled_rows(loss: speed.Loss) -> object:
        def build(temperature: float) -> object:
            assert temperature == speed.TEMPERATURE

            def call(rows_RD: Tensor, class_R: Tensor) -> Tensor:
                return loss(*rows_RD.chunk(2), {"diagnosis": class_R[: len(class_R) // 2]})

            return call

        return build

    temperature = {"temperature": speed.TEMPERATURE}
    lightly = {
        "NTXentLoss": of_two_views(speed.ntxent, **temperature),
        "DCLLoss": of_two_views(speed.dcl, **temperature),
        "BarlowTwinsLoss": of_two_views(speed.barlow_twins, lambda_param=speed.REDUNDANCY_WEIGHT),
    }
    metric_learning = {"SupConLoss": of_labelled_rows(speed.supcon), "NTXentLoss": of_labelled_rows(speed.supcon)}
    monkeypatch.setitem(sys.modules, "lightly.loss", SimpleNamespace(**lightly))
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", SimpleNamespace(**metric_learning))


@pytest.mark.usefixtures("stocked")
def test_every_pair_agrees_and_is_timed() -> None:
    told = []
    timings, notes = speed.compare_losses(
        [NUM_SCANS], repeats=1, seconds=0, on_pair=lambda text, done, total: told.append((text, done, total))
    )
    measured = [(timing.loss, timing.against) for timing in timings]
    assert len(set(measured)) == len(measured) == len(speed.OURS) + 5
    assert {loss for loss, against in measured if against == "paper"} == set(speed.OURS)
    assert all(timing.repeats == 1 and timing.num_scans == NUM_SCANS for timing in timings)
    assert all(0 < timing.ratio_p10 <= timing.ratio <= timing.ratio_p90 < float("inf") for timing in timings)
    assert all(timing.ours_ms > 0 and timing.theirs_ms > 0 for timing in timings)
    assert told[0] == ("ntxent against paper, 16 scans", 0, len(timings))
    assert notes == []


def altered(loss: speed.Loss, by: float) -> speed.Loss:
    """The same value, with a gradient that is off by a factor."""

    def changed(z1: Tensor, z2: Tensor, metadata: speed.Metadata) -> Tensor:
        value = loss(z1, z2, metadata)
        return value + by * (value - value.detach())

    return changed


@pytest.mark.parametrize("name", speed.OURS)
def test_an_altered_transcription_is_found(name: str) -> None:
    ours, theirs, batch = speed.OURS[name], speed.PAPER[name], speed.Batch.random(NUM_SCANS)
    for what, other in (
        ("loss", lambda *given: theirs(*given) * 1.001),
        ("gradient", altered(theirs, 1e-3)),
        ("loss", lambda *given: theirs(*given) * torch.nan),
    ):
        pair = speed.Pair(name=name, against="paper", ours=ours, theirs=other)
        with pytest.raises(speed.DisagreementError, match=f"the {what} of"):
            speed.measure(pair, batch, repeats=1, seconds=0)


def test_a_pair_without_a_gradient_compares_nothing() -> None:
    def zero(z1: Tensor, z2: Tensor, _: speed.Metadata) -> Tensor:
        return 1.0 + 0.0 * (z1 + z2).sum()

    pair = speed.Pair(name="none", against="paper", ours=zero, theirs=zero)
    with pytest.raises(speed.DisagreementError, match="the gradient of none"):
        speed.check_agreement(pair, speed.Batch.random(NUM_SCANS))


@pytest.mark.usefixtures("bare")
def test_what_is_not_measured_is_said() -> None:
    pairs, notes = speed.all_pairs()
    assert {pair.against for pair in pairs} == {"paper"}
    assert notes == [
        "lightly: not installed (pip install lightly)",
        "pytorch-metric-learning: not installed (pip install pytorch-metric-learning)",
    ]
    assert [pair.name for pair in pairs if pair.most_scans] == ["threshold"]


@pytest.mark.usefixtures("bare")
def test_a_size_that_theirs_cannot_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        speed,
        "all_pairs",
        lambda: (
            [speed.Pair(name="yaware", against="paper", ours=speed.OURS["yaware"], theirs=speed.yaware, most_scans=8)],
            ["a note"],
        ),
    )
    timings, notes = speed.compare_losses([8, 16], repeats=1, seconds=0)
    assert [timing.num_scans for timing in timings] == [8]
    assert notes == ["a note", "yaware against paper: only up to 8 scans, beyond which theirs takes gigabytes"]


@pytest.mark.usefixtures("bare")
def test_the_command_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    options = ["--sizes", "8", "--repeats", "2", "--seconds", "0", "--only", "yaware", "--only", "ntxent", "--output", str(path)]
    outcome = CliRunner().invoke(speed.app, ["losses", *options])
    assert outcome.exit_code == 0, outcome.output
    assert "yaware" in outcome.stdout
    assert "pip install lightly" in outcome.stdout
    figures = json.loads(path.read_text())
    assert figures["machine"]["threads"] == 1
    assert [(row["loss"], row["against"], row["num_scans"], row["repeats"]) for row in figures["timings"]] == [
        ("ntxent", "paper", 8, 2),
        ("yaware", "paper", 8, 2),
    ]


@pytest.mark.usefixtures("bare")
def test_the_command_fails_where_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.PAPER, "exp", speed.yaware)
    outcome = CliRunner().invoke(speed.app, ["losses", "--sizes", "8", "--repeats", "1", "--seconds", "0", "--only", "exp"])
    assert outcome.exit_code == 1
    assert "the loss of exp must be that of paper" in outcome.stderr


def test_an_unknown_loss_is_refused() -> None:
    outcome = CliRunner().invoke(speed.app, ["losses", "--only", "simclr"])
    assert outcome.exit_code == 2
    assert "simclr" in outcome.stderr


def test_operators_of_torchvision_are_declared_where_its_build_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []

    def import_module(name: str) -> SimpleNamespace:
        imported.append(name)
        if len(imported) == 1:
            raise RuntimeError("operator torchvision::nms does not exist")
        losses = ("NTXentLoss", "DCLLoss", "BarlowTwinsLoss")
        return SimpleNamespace(**dict.fromkeys(losses, lambda **_: None))

    declared = []
    monkeypatch.setattr(speed.importlib, "import_module", import_module)
    monkeypatch.setattr(speed, "declare_torchvision_operators", lambda: declared.append(True))
    assert [pair.against for pair in speed.lightly_pairs()] == ["lightly"] * 3
    assert imported == ["lightly.loss"] * 2
    assert declared == [True]


@pytest.fixture
def few_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Five small heads, and the small grid that both sides bring them to."""
    monkeypatch.setattr(speed_data, "SETTINGS", replace(speed_data.SETTINGS, voxel_size_mm=4.0, shape=(20, 24, 20)))
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in (20, 24, 20)], indexing="ij")
    for number in range(5):
        random = np.random.default_rng(number)
        values = 100 * (x**2 + y**2 + z**2 < 0.8) * (2 + x + 0.3 * y) + random.normal(0, 3, (20, 24, 20))
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([4.0, 4, 4, 1])), tmp_path / f"sub-{number}_T1w.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    return speed_data.find_scans(tmp_path)


@pytest.mark.filterwarnings("ignore")  # MONAI's and torch's own
def test_every_side_feeds_every_scan_in_two_views(few_scans: list[Path]) -> None:
    assert len(few_scans) == 5
    told: list[str] = []

    feeds = speed_data.compare_feeds("few", few_scans, first_turns=1, turns=2, on_turn=told.append)

    assert feeds[0].side == "ours"
    assert [feed.side for feed in feeds[1:]] == ["PersistentDataset", "CacheDataset"]
    assert all(len(feed.first) == 1 and len(feed.cached) == 2 and min(feed.first + feed.cached) > 0 for feed in feeds)
    assert feeds[0].cached_ratio == (1.0, 1.0, 1.0)
    assert feeds[1].correlation > 0.95
    assert any("cached epoch, PersistentDataset, turn 2 of 2" in text for text in told)
    assert "PersistentDataset" in printed(speed_data.as_table(feeds))


@pytest.mark.filterwarnings("ignore")
def test_views_of_both_sides_are_two_different_ones_of_each_scan(few_scans: list[Path], tmp_path: Path) -> None:
    sides = (
        speed_data.Ours(few_scans, tmp_path / "a"),
        speed_data.Theirs("persistent", 0, few_scans, tmp_path / "b"),
    )

    for side in sides:
        batch = torch.cat([views.clone() for views in side.epoch()])
        assert batch.shape == (5, 2, 1, 20, 24, 20)
        assert (batch[:, 0] != batch[:, 1]).flatten(1).any(1).all()
        # A box of .3 of each axis is blanked in each.
        assert np.mean([float(torch.corrcoef(torch.stack([v.flatten() for v in pair]))[0, 1]) > 0.3 for pair in batch]) > 0.9


@pytest.mark.filterwarnings("ignore")
def test_sides_that_do_not_do_the_same_are_not_timed(
    few_scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = speed_data.Ours(few_scans, tmp_path / "a"), speed_data.Theirs("cache", 0, few_scans, tmp_path / "b")
    list(ours.epoch())
    assert speed_data.check_alike(ours, theirs) > 0.95
    monkeypatch.setattr(theirs, "volume", lambda index: ours.volume(index).flip(1))

    with pytest.raises(speed_data.DifferentVolumesError, match="must make alike volumes"):
        speed_data.check_alike(ours, theirs)


def test_memory_is_that_of_the_process_itself(few_scans: list[Path], tmp_path: Path) -> None:
    assert 50 < speed_data.memory_of_epochs(few_scans, "ours", tmp_path / "a") < 10_000
    table = printed(speed_data.as_memory_table("few", {"ours": [(3, 100.0), (5, 101.0)], "cache": [(3, 100.0), (5, 200.0)]}))
    assert "5 scans" in table
    assert "CacheDataset" in table


def printed(table: object) -> str:
    from rich.console import Console

    console = Console(width=150, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_steps_use_the_memory_again_that_steps_before_them_freed() -> None:
    result = CliRunner().invoke(speed.app, ["steps", "--turns", "1", "--num-steps", "6"])
    assert result.exit_code == 0
    kept, given_back = (int(text) for text in re.findall(r"(\d+) page faults", result.output))
    assert 5 * kept < given_back
    assert re.search(r"given back / kept: \d+\.\d\d \(", result.output)
