"""The log of what left a site: whole as it was written, and every change to it found."""

import errno
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.audit import (
    NO_HASH,
    REPAIR,
    AuditError,
    AuditLog,
    bytes_since,
    canonical,
    epsilon_added,
    epsilon_spent,
    hash_of,
)
from client.cli import register
from core.cli import app
from core.config import RunConfig, compose_plain, load_config
from core.exchange import content, describe_answer

register(app)
RUNNER = CliRunner()


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    """Five entries."""
    kept = AuditLog(tmp_path / "state" / "audit.jsonl")
    for number in range(5):
        kept.append(run=7, round=number, message="train.pretrain", bytes=100)
    return kept


def lines_of(log: AuditLog) -> list[str]:
    return log.path.read_text().splitlines()


def test_a_log_reads_as_it_was_written(log: AuditLog) -> None:
    entries = log.read()
    assert [(entry["n"], entry["round"]) for entry in entries] == [(n, n - 1) for n in range(1, 6)]
    assert entries[0]["previous"] == NO_HASH
    assert [entry["previous"] for entry in entries[1:]] == [entry["hash"] for entry in entries[:-1]]
    assert all(entry["hash"] == hash_of(entry) for entry in entries)
    assert json.loads(log.head_path.read_text()) == {"n": 5, "hash": entries[-1]["hash"]}
    for path in (log.path, log.head_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700
    assert AuditLog(log.path.with_name("none.jsonl")).read() == ()


def edit(line: str, **changes: object) -> str:
    return canonical({**json.loads(line), **changes})


def rehashed(line: str, **changes: object) -> str:
    changed = {**json.loads(line), **changes}
    return canonical({**changed, "hash": hash_of(changed)})


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a value edited": (lambda old: [*old[:2], edit(old[2], bytes=1), *old[3:]], "line 3: its hash must be that of its content"),
    "an entry rewritten": (
        lambda old: [*old[:2], rehashed(old[2], bytes=1), *old[3:]],
        "line 4: it must follow the entry before",
    ),
    "a line removed": (lambda old: [*old[:2], *old[3:]], "line 3: it must follow the entry before, got entry 4"),
    "the first removed": (lambda old: old[1:], "line 1: it must follow the entry before, got entry 2"),
    "two swapped": (lambda old: [old[0], old[2], old[1], *old[3:]], "line 2: it must follow"),
    "one doubled": (lambda old: [*old[:3], *old[2:]], "line 4: it must follow"),
    "a space added": (lambda old: [*old[:2], old[2].replace(":", ": ", 1), *old[3:]], "line 3: it must be an entry as it was"),
    "no JSON": (lambda old: [*old[:2], "{", *old[3:]], "line 3: it must be JSON"),
    "a field added": (lambda old: [*old[:2], rehashed(old[2], note="x"), *old[3:]], "line 3: it must be an entry as it was"),
    "the end cut off": (lambda old: old[:3], "line 4: 5 entries were written, 3 are left: the end was cut off"),
    "the last rewritten": (lambda old: [*old[:4], rehashed(old[4], bytes=1)], "line 5: audit.head must belong to the last entry"),
    "two added": (
        lambda old: [
            *old,
            six := rehashed(old[4], n=6, previous=json.loads(old[4])["hash"]),
            rehashed(six, n=7, previous=json.loads(six)["hash"]),
        ],
        "line 7: audit.head must belong to the last entry",
    ),
    "all removed": (lambda _: [], "line 1: 5 entries were written, 0 are left"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_with_its_line_and_nothing_is_added_to_such_a_log(log: AuditLog, change: str) -> None:
    how, problem = CHANGES[change]
    log.path.write_text("".join(f"{line}\n" for line in how(lines_of(log))))
    changed = log.path.read_bytes()
    assert log.examine().problem.startswith(problem)
    with pytest.raises(AuditError, match="got a change at line"):
        log.read()
    with pytest.raises(AuditError, match="got a change at line"):
        log.append(message="query.describe")
    assert log.path.read_bytes() == changed
    shown = RUNNER.invoke(app, ["site", "audit", str(log.path.parents[1])])
    assert shown.exit_code == 1
    assert problem in " ".join(shown.output.split())


def test_a_missing_or_changed_head_is_found(log: AuditLog) -> None:
    log.head_path.write_text("{}")
    assert "audit.head must hold the last entry's number and hash" in log.examine().problem
    log.head_path.unlink()
    assert "audit.head must be beside the log" in log.examine().problem


@given(cut=st.integers(1, 10_000), tail=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_torn_last_line_is_no_change_and_the_next_entry_tells_of_it(
    tmp_path_factory: pytest.TempPathFactory, cut: int, tail: bool
) -> None:
    """A power cut while entry 3 is written: it is there in part, the head is still that of entry 2."""
    log = AuditLog(tmp_path_factory.mktemp("torn") / "audit.jsonl")
    log.append(message="a")
    log.append(message="b")
    whole, head = log.path.read_bytes(), log.head_path.read_bytes()
    log.append(message="c")
    line = log.path.read_bytes()[len(whole) :]
    log.head_path.write_bytes(head)
    torn = line[: cut % (len(line) - 1) + (not tail)][: len(line) - 1]
    log.path.write_bytes(whole + torn)
    chain = log.examine()
    assert (chain.problem, chain.torn, len(log.read())) == ("", torn, 2)
    log.append(message="d")
    assert [entry["message"] for entry in log.read()] == ["a", "b", *[REPAIR] * bool(torn), "d"]
    if torn:
        assert f"{len(torn)} bytes" in log.read()[2]["error"]
    assert log.path.read_bytes().startswith(whole)


def test_a_line_that_was_whole_once_is_not_taken_for_a_torn_one(log: AuditLog) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-20])
    assert log.examine().problem.startswith("line 5: 5 entries were written, 4 are left")


def test_a_power_cut_before_the_head_is_made_up_for(log: AuditLog) -> None:
    head = log.head_path.read_bytes()
    log.append(message="query.describe")
    log.head_path.write_bytes(head)
    assert log.examine().behind
    assert log.examine().problem == ""
    log.append(message="query.sums")
    assert (len(log.read()), log.examine().behind) == (7, False)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_leaves_the_log_as_it_was(log: AuditLog, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before, write = log.path.read_bytes(), os.pwrite
    tried: list[int] = []

    def full(descriptor: int, *data: object) -> int:
        """Half of what is asked for, then no space left; taking things back needs none."""
        tried.append(descriptor)
        if call == "pwrite" and len(tried) == 1:
            chunk, offset = data
            assert isinstance(chunk, bytes)
            assert isinstance(offset, int)
            return write(descriptor, chunk[: len(chunk) // 2], offset)
        if len(tried) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, *data) if call == "pwrite" else 0  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(AuditError, match="must be writable, got No space left on device"):
            log.append(message="train.pretrain")
    assert tried
    assert log.path.read_bytes() == before
    log.append(message="train.pretrain")
    assert len(log.read()) == 6


def test_a_folder_that_cannot_be_made_and_fields_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(AuditError, match="must be open to this process"):
        AuditLog(tmp_path / "state" / "audit.jsonl").append(message="a")
    with pytest.raises(TypeError, match="fields must be of"):
        AuditLog(tmp_path / "audit.jsonl").append(hash="0")


def test_writers_take_turns(tmp_path: Path) -> None:
    """Each with a log of its own, as processes have; the lock is the operating system's."""
    path = tmp_path / "audit.jsonl"
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda _: AuditLog(path).append(message="a"), range(40)))
    assert sorted(entry["n"] for entry in entries) == list(range(1, 41))
    assert len(AuditLog(path).read()) == 40


def test_an_answer_is_told_by_its_arrays_and_by_the_names_of_all_else() -> None:
    answer = content(
        arrays=ArrayRecord({"float32": Array(np.zeros(6, np.float32))}),
        metrics=MetricRecord({"loss": 1.25, "terms": [1.0, 2.0]}),
        config=ConfigRecord({"layout": "[é]", "problems": ["a", "bc"], "raw": b"123"}),
    )
    size = len(answer.array_records["arrays"]["float32"].data)
    told = describe_answer(answer)
    assert told["arrays"] == [{"name": "arrays/float32", "shape": [6], "dtype": "float32", "bytes": size}]
    assert told["statistics"] == ["config/layout", "config/problems", "config/raw", "metrics/loss", "metrics/terms"]
    assert told["bytes"] == size + 8 + 16 + 4 + 3 + 3
    assert "1.25" not in json.dumps(told)
    assert describe_answer(content()) == {"arrays": [], "statistics": [], "bytes": 0}


def private_run(target: object = 3.0, rounds: int = 2) -> RunConfig:
    """A run that fine-tunes with DP-SGD in two stages."""
    plain = compose_plain(["experiment=tiny", "data=folder", "data.root=/x", "privacy=dp_sgd", "debias=none", "start=/x"])
    plain["num_rounds"], plain["privacy"]["target_epsilon"] = 0, target
    plain["finetune"] |= {"class_weights": "none", "num_rounds": rounds, "stages": ["linear_probe", "full_finetuning"]}
    return RunConfig.model_validate(plain)


def test_epsilon_is_the_sum_over_runs_however_rounds_are_asked_for(tmp_path: Path) -> None:
    """All rounds of a run spend its target together; one round more than those, or another configuration, begins anew."""
    log, config = AuditLog(tmp_path / "audit.jsonl"), private_run()

    def spend(run: tuple[int, str], config: RunConfig = config) -> float:
        added = epsilon_added(config, log.read(), run)
        log.append(run=run[0], config=run[1], message="train.finetune", epsilon=added)
        return epsilon_spent(log.read())

    log.append(run=1, config="a", message="query.describe")
    assert [spend((1, "a")) for _ in range(4)] == [3.0] * 4
    assert spend((1, "a")) == 6.0
    assert spend((1, "b")) == 9.0
    assert spend((2, "a"), private_run(0.5)) == 9.5
    assert epsilon_added(private_run(float("inf")), log.read(), (3, "a")) is None
    assert epsilon_added(load_config("experiment=tiny"), log.read(), (3, "a")) is None


def test_bytes_are_counted_since_a_time(log: AuditLog) -> None:
    now = datetime.now(UTC)
    assert bytes_since(log.read(), now - timedelta(days=1)) == 500
    assert bytes_since(log.read(), now + timedelta(hours=1)) == 0


def test_the_command_prints_what_left(log: AuditLog) -> None:
    kit = log.path.parents[1]
    log.append(run=7, message="query.sums", error="[isocenter:policy] this site tells no sums.")
    shown = RUNNER.invoke(app, ["site", "audit", str(kit)])
    assert shown.exit_code == 0
    assert "[isocenter:policy] this site tells no sums." in shown.stdout
    assert f"the log is whole: 6 entries, head {log.read()[-1]['hash']}" in shown.stdout
    lines = RUNNER.invoke(app, ["site", "audit", str(kit), "--json", "--last", "2"]).stdout.splitlines()
    assert [json.loads(line) for line in lines] == [dict(entry) for entry in log.read()[-2:]]
    log.path.write_bytes(log.path.read_bytes() + b'{"app"')
    torn = RUNNER.invoke(app, ["site", "audit", str(kit)])
    assert torn.exit_code == 0
    assert "the last line is torn after 6 bytes" in torn.output
    assert RUNNER.invoke(app, ["site", "audit", str(kit / "none")]).exit_code == 2
    (kit / "new").mkdir()
    new = RUNNER.invoke(app, ["site", "audit", str(kit / "new")])
    assert (new.exit_code, new.output.strip()) == (0, "there is no log")
