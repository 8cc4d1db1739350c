"""How a run and its sites stand, as the server keeps it and as the commands show it."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from server import cli
from server.board import STALE_S, STATUS, describe, tell_stopped
from server.sites import RunError

Federate = Callable[..., Path]
NOW = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
SITE = {
    "does": "trains",
    "task": "pretrain round 2",
    "for_s": 10.0,
    "usual_s": 20.0,
    "steps": 6,
    "behind": True,
    "connected": False,
}
RUN = {"state": "running", "words": "", "stage": "pretrain", "round": 3, "rounds": 9, "told": NOW.isoformat()}


def isocenter(*arguments: str) -> tuple[int, str]:
    """Exit code and words of a command."""
    app = typer.Typer()
    cli.register(app)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_a_run_tells_how_it_stands_to_its_end(
    consortium: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr("server.board.OFTEN_S", 0.0)
    monkeypatch.setattr(
        "server.board.write_atomically", lambda path, data: (seen.append(json.loads(data)), path.write_bytes(data))
    )
    folder = federate(consortium, "finetune=none evaluation=none debias=none", name="board")
    capsys.readouterr()
    assert {(told["stage"], told["round"]) for told in seen} >= {("pretrain", 1), ("pretrain", 2)}
    working = [site["task"] for told in seen for site in told["sites"].values() if site["does"] == "trains"]  # type: ignore[attr-defined]
    assert "pretrain round 2" in working
    assert (seen[0]["state"], seen[-1]["state"]) == ("running", "finished")
    assert set(seen[-1]["sites"]) == {"a", "b", "c"}  # type: ignore[call-overload]
    code, told = isocenter("status", str(folder))
    assert code == 0
    assert told.splitlines() == ["board: finished", "a  waits; cpu", "b  waits; cpu", "c  waits; cpu"]
    assert isocenter("watch", str(folder))[0] == 0


def test_a_run_that_was_stopped_says_why(consortium: Path, federate: Federate) -> None:
    with pytest.raises(RunError):
        federate(
            consortium,
            "strategy.round_timeout_s=0.5",
            name="stopped",
            tamper=lambda reply, kind: None if "train" in kind else reply,
        )
    code, told = isocenter("status", str(consortium.parent / "runs" / "stopped"))
    assert code == 1
    assert "stopped: stopped: pretrain, round 1: at least 3 of 3 sites must answer" in told


def test_what_is_not_as_it_should_be_stands_out() -> None:
    told = describe(RUN | {"sites": {"hill": SITE, "dale": {"does": "excluded", "words": "failed"}}}, NOW + timedelta(seconds=5))
    assert told == [
        "pretrain, round 3 of 9",
        "hill  NOT CONNECTED; BEHIND: trains pretrain round 2 for 15 s, about step 4 of 6",
        "dale  excluded: it failed",
    ]
    [ended] = describe(RUN | {"sites": {}}, NOW, alive=False)
    assert ended.startswith("pretrain, round 3 of 9; BROKEN OFF: its process at the server ended without a word")
    [silent] = describe(RUN | {"sites": {}}, NOW + timedelta(seconds=STALE_S + 10))
    assert "the server has told nothing for 100 s" in silent


def test_a_run_that_has_told_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isocenter("status")[1].startswith("status: a run must have begun, got none here")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert f"it holds no {STATUS}" in isocenter("status", "runs/mine")[1]
    tell_stopped(tmp_path / "runs" / "mine", "nothing to tell it in")
    assert not (tmp_path / "runs" / "mine" / STATUS).exists()
