"""The comparison of speeds: what is compared agrees, and what does not agree is found. No timing is asserted."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from simulations import speed

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
