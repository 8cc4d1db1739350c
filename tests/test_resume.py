"""A run that dies anywhere goes on after its last finished round and ends with the bits of one that never stopped."""

import errno
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file
from typer.testing import CliRunner

from core.cli import app as console
from core.files import append_line, write_atomically
from core.run_file import RunFile, read_run, write_run
from server.resume import best_round, cut_back, read_lines, sweep
from server.sites import RunError
from simulations.cli import register
from simulations.in_process import InProcessGrid

pytestmark = pytest.mark.usefixtures("unpainted")
NodeConfig = dict[str, str | int | bool | float]
Run = Callable[..., Path]
# Where a run dies: a function, in which of its calls, and what of its work is done by then.
Place = tuple[str, int, Callable[..., None] | None]
ROOT = Path(__file__).parents[1]
register(console)
RUNNER = CliRunner()

BASE = "experiment=tiny data=folder evaluation=none policy.share_per_scan=false name=x"
LONG = (
    "num_rounds=5 debias.exchange_every=3 finetune.num_rounds=3 finetune.stages=[linear_probe,full_finetuning] "
    "finetune.patience=1 data.target_sites=[c] evaluation=sums"
)


class Stop(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory, write_site: Callable[..., None]) -> Iterator[Path]:
    """As `consortium`, once for all tests here."""
    folder = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOCENTER_CACHE", str(folder / "cache"))
        write_site(folder / "sites" / "a", seed=1)
        write_site(folder / "sites" / "b", seed=2, healthy=14, patients=8, scanners=2, gain=1.6)
        write_site(folder / "sites" / "c", seed=3, healthy=10, patients=10)
        yield folder / "sites"


def run_in(output: Path, text: str, nodes: dict[int, NodeConfig], grid_type: type[InProcessGrid] = InProcessGrid) -> Path:
    """Run the apps over nodes in this process; the run's folder."""
    from client.app import app as client_app
    from server.app import app as server_app

    run_config = {"overrides": f"{text} output={output}"}
    grid = grid_type(client_app, nodes, run_config)
    server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)))
    return output / "x"


def virtual(number: int) -> dict[int, NodeConfig]:
    return {node + 1: {"partition-id": node, "num-partitions": number} for node in range(number)}


@dataclass(frozen=True)
class Whole:
    """A run that nothing stopped, and beside it what it would have left had it died at a place."""

    folder: Path
    album: Path

    def died(self, place: str, runs: Path) -> Path:
        """Put what is left of a run that died at a place into a folder of runs; the run's folder."""
        return Path(shutil.copytree(self.album / place, runs / "x"))


@pytest.fixture(scope="module")
def long(hospitals: Path) -> Whole:
    """The run `LONG`, and what is left of it at all `PLACES` and after its first rounds."""
    output = hospitals.parent / "long"
    with photographed(output / "x", {**PLACES, **AFTER}, output / "album"):
        run_in(output, f"{BASE} data.root={hospitals} {LONG}", virtual(3))
    return Whole(output / "x", output / "album")


@pytest.fixture(scope="module")
def unbroken(hospitals: Path, long: Whole) -> Callable[[str], Path]:
    """The folder of a run with these options that nothing stopped, made once."""
    done = {LONG: long.folder}

    def folder(options: str) -> Path:
        if options not in done:
            output = hospitals.parent / f"unbroken-{len(done)}"
            done[options] = run_in(output, f"{BASE} data.root={hospitals} {options}", virtual(3))
        return done[options]

    return folder


@pytest.fixture
def run(hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run with these options over the three hospitals, under other node numbers each time; results go to `tmp_path`/runs."""
    calls: list[int] = []
    monkeypatch.chdir(tmp_path)

    def start(options: str, *more: str) -> Path:
        calls.append(1)
        nodes = {node + 100 * len(calls): config for node, config in virtual(3).items()}
        # A relative folder: overrides that are the same in all tests are read once.
        return run_in(Path("runs"), " ".join([BASE, f"data.root={hospitals}", options, *more]), nodes)

    return start


def told(folder: Path) -> list[dict[str, object]]:
    """The rounds, without what the clock and the run's bytes decide."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["trained_seconds"], line["waited_share"]
        line["sha256"] = line["sha256"]["checkpoint"]
    return lines


def sites_in(folder: Path) -> list[str]:
    """Who took part in each round."""
    return ["".join(sorted(line["sites"])) for line in read_lines(folder)]


def assert_same(resumed: Path, whole: Path) -> None:
    """The same checkpoints to the byte, the same rounds, the same figures, and nothing left over."""
    files = {path.name: path.read_bytes() for path in (whole / "checkpoints").iterdir()}
    assert {path.name: path.read_bytes() for path in (resumed / "checkpoints").iterdir()} == files
    assert told(resumed) == told(whole)
    assert (resumed / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    names = sorted(path.name for path in whole.rglob("*"))
    assert sorted(path.name for path in resumed.rglob("*")) == names


def replace_by(patch: pytest.MonkeyPatch, where: str, instead: Callable[..., object]) -> None:
    """Put a function, which gets the original first, in the place of one, as dotted by its module."""
    module, _, name = where.rpartition(".")
    patch.setattr(where, partial(instead, getattr(importlib.import_module(module), name)))


@contextmanager
def photographed(folder: Path, places: Mapping[str, Place], album: Path) -> Iterator[None]:
    """Copy a run's folder at each place, with what is done there in place of the work: a dead process leaves the same."""
    counts = {where: count(1) for where, _, _ in places.values()}

    def copying(where: str, original: Callable[..., object], *args: Any, **kwargs: object) -> object:
        number = next(counts[where])
        for name, (at, calls, before) in places.items():
            if (at, calls) == (where, number):
                shutil.copytree(folder, album / name)
                if before:
                    before(album / name / args[0].relative_to(folder), *args[1:], **kwargs)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for where in counts:
            replace_by(patch, where, partial(copying, where))
        yield
    assert {path.name for path in album.iterdir()} == set(places)


def stop_in(monkeypatch: pytest.MonkeyPatch, where: str, calls: int) -> None:
    """Let a function die in its so many-th call, in place of its work."""
    seen = count(1)

    def dying(original: Callable[..., object], *args: object, **kwargs: object) -> object:
        if next(seen) == calls:
            raise Stop
        return original(*args, **kwargs)

    replace_by(monkeypatch, where, dying)


def killed(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], where: str, calls: int) -> None:
    """A run that dies in a function's so many-th call."""
    with monkeypatch.context() as patch:
        stop_in(patch, where, calls)
        with pytest.raises(Stop):
            run()


def half_a_line(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text[: len(text) // 2])


def whole_line_without_end(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def half_a_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.with_name(f".{path.name}.123").write_bytes(data[: len(data) // 2])


def line_and_no_more(folder: Path, *_: object) -> None:
    assert (folder.parent / "rounds.jsonl").exists()


# Rounds in order: 5 of pretraining, linear_probe 2 (its patience ends), full_finetuning 3.
PLACES: dict[str, Place] = {
    "while the run begins": ("server.app.keep_begun", 1, None),
    "in the checkpoint of the first round": ("core.checkpoint.write_atomically", 2, half_a_file),
    "before the first state": ("server.resume.write_atomically", 2, None),
    "between checkpoint and state": ("server.resume.write_atomically", 4, half_a_file),
    "between state and line": ("server.resume.append_line", 3, None),
    "in the middle of a line": ("server.resume.append_line", 2, half_a_line),
    "before the end of a line": ("server.resume.append_line", 4, whole_line_without_end),
    "after a line": ("server.resume.keep_last", 7, line_and_no_more),
    "between the drops": ("server.resume.keep_last", 6, line_and_no_more),
    "after the last round of pretraining": ("server.resume.keep_last", 9, line_and_no_more),
    "in the eraser": ("server.app.erase", 1, None),
    "in the evaluation": ("server.app.evaluate_sums", 1, None),
    "in fine-tuning": ("server.resume.append_line", 7, half_a_line),
    "before the best round is taken": ("server.strategy.save_checkpoint", 1, None),
    "while the others are dropped": ("core.checkpoint.drop_rounds", 17, None),
    "in the second stage": ("server.resume.append_line", 9, None),
    "when all rounds are done": ("server.strategy.save_checkpoint", 2, None),
    "in the figures": ("server.app.write_metrics", 1, None),
    "in the report": ("server.app.write_report", 1, None),
}
AFTER: dict[str, Place] = {f"after {rounds}": ("server.resume.append_line", rounds + 1, None) for rounds in range(10)}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_dies_anywhere_ends_as_one_that_never_stopped(run: Run, long: Whole, tmp_path: Path, place: str) -> None:
    long.died(place, tmp_path / "runs")
    assert_same(run(LONG, "resume=true"), long.folder)


def resume_after_each_round(run: Run, options: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is stopped in every round but the first, now before anything of it is kept, now before its line."""
    for number in range(1, rounds):
        killed(
            monkeypatch,
            partial(run, options, *(["resume=true"] if number > 1 else [])),
            "server.strategy.keep_round" if number % 2 else "server.resume.append_line",
            2,
        )
    return run(options, "resume=true")


OPTIONS = {
    "exchange every third round, patience": (LONG, 10),
    "each site its own model": (
        "num_rounds=1 debias=none finetune.where=local data.target_sites=[b,c] finetune.stages=[full_finetuning] "
        "finetune.num_rounds=3 finetune.patience=2",
        7,
    ),
    "clipped updates": ("num_rounds=4 debias.space=both debias.exchange_every=2 finetune=none strategy.clip_norm=1", 4),
    "robust average, one checkpoint": (
        "num_rounds=4 debias=none finetune=none strategy=median strategy.keep_checkpoints=1",
        4,
    ),
    "fine-tuning alone, federated": (
        "num_rounds=1 debias=none finetune.stages=[frozen_then_unfrozen] finetune.frozen_rounds=2 finetune.num_rounds=4 "
        "data.target_sites=[b,c]",
        5,
    ),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_a_run_that_dies_in_every_round_ends_as_one_that_never_stopped(
    run: Run, unbroken: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    options, rounds = OPTIONS[what]
    assert len(told(unbroken(options))) == rounds
    assert_same(resume_after_each_round(run, options, rounds, monkeypatch), unbroken(options))
    if what == "clipped updates":
        assert any("clipped" in line for line in told(unbroken(options)))


def test_the_best_round_is_kept_when_its_checkpoint_is_long_gone(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first of four rounds is the best, one checkpoint is kept, and the run dies in each round."""
    from client.tasks import TASKS, Work, round_number

    def loss_of_round(work: Work) -> RecordDict:
        return RecordDict({"metrics": MetricRecord({"subjects": 5, "loss": (0.5, 0.75, 0.625, 0.875)[round_number(work) - 1]})})

    monkeypatch.setitem(TASKS, "query.validation", loss_of_round)
    options = (
        "num_rounds=1 debias=none finetune.stages=[full_finetuning] finetune.num_rounds=4 finetune.patience=3 "
        "data.target_sites=[c] strategy.keep_checkpoints=1"
    )
    whole = run(options)
    assert [path.name for path in (whole / "checkpoints").glob("full*")] == ["full_finetuning-0001.safetensors"]
    whole.rename(whole.with_name("whole"))
    resumed = resume_after_each_round(run, options, 5, monkeypatch)
    assert_same(resumed, whole.with_name("whole"))
    # Over, and the best round's own file lost: its weights are in the last state.
    (tmp_path / "runs" / "x" / "checkpoints" / "full_finetuning-0001.safetensors").unlink()
    assert_same(run(options, "resume=true"), whole.with_name("whole"))


@pytest.fixture
def tables(tmp_path: Path) -> dict[int, NodeConfig]:
    """Three sites with tables of two features."""
    for name in "abc":
        rows = [["participant_id", "age", "sex", "f", "g"]]
        rows += [[f"{name}{i}", str(20 + 2 * i), "FM"[i % 2], str(i % 7 + 0.5), str(i % 5 + 0.25 * i)] for i in range(30)]
        (tmp_path / f"{name}.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    policy: NodeConfig = {"min-group": 4, "diagonal-subjects": 8}
    return {n: {"site": site, "data-root": str(tmp_path / f"{site}.csv"), **policy} for n, site in enumerate("abc", 1)}


TABLE = (
    "experiment=roi debias=fairkl num_rounds=4 local_steps=1 batch_size=8 warmup_rounds=0 encoder.width=8 embedding_size=4 "
    "debias.warmup_rounds=0 debias.exchange_every=3 data.table=null policy.diagonal_subjects=8 evaluation=none name=x"
)


@pytest.mark.parametrize("damage", [False, True], ids=["constants_kept", "constants_lost"])
def test_tables_go_on_with_the_constants_that_sites_were_told(
    tables: dict[int, NodeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bool
) -> None:
    whole = run_in(tmp_path / "whole", TABLE, tables)
    for number in (1, 2, 3):
        killed(
            monkeypatch,
            partial(run_in, tmp_path / "runs", TABLE + (" resume=true" if number > 1 else ""), tables),
            "server.resume.append_line",
            2,
        )
    if damage:
        (tmp_path / "runs" / "x" / "checkpoints" / "untrained-0000.safetensors").write_bytes(b"damaged")
    else:
        # The constants are not asked for again.
        monkeypatch.setattr("server.app.prepare_inputs", None)
    assert_same(run_in(tmp_path / "runs", f"{TABLE} resume=true", tables), whole)
    assert any(name.startswith("encoder.standardise") for name in load_file(whole / "checkpoints" / "pretrain-0004.safetensors"))


def test_other_constants_than_before_the_stop_are_refused(
    tables: dict[int, NodeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, lambda: run_in(tmp_path / "runs", TABLE, tables), "server.resume.append_line", 3)
    (tmp_path / "runs" / "x" / "checkpoints" / "untrained-0000.safetensors").unlink()
    table = tmp_path / "a.csv"
    table.write_text(table.read_text().replace("0.5,", "9.5,"))
    read_anew()
    with pytest.raises(RunError, match="weights and constants before training must be what they were before the stop"):
        run_in(tmp_path / "runs", f"{TABLE} resume=true", tables)


def test_sites_with_other_inputs_than_before_are_refused_and_other_counts_told(
    tables: dict[int, NodeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(monkeypatch, lambda: run_in(tmp_path / "runs", TABLE, tables), "server.resume.append_line", 3)
    table = tmp_path / "a.csv"
    before = table.read_text()
    table.write_text(before.rpartition("a29")[0])
    read_anew()
    run_in(tmp_path / "runs", f"{TABLE} resume=true", tables)
    assert "a holds other scans than before the stop, so the weights will be others: scans 30, now 29" in capsys.readouterr().out
    for name in "abc":
        table = tmp_path / f"{name}.csv"
        table.write_text(table.read_text().replace("sex,f,g", "sex,f,x"))
    read_anew()
    with pytest.raises(RunError, match="sites must have the inputs they had before the stop, a, b, c has others"):
        run_in(tmp_path / "runs", f"{TABLE} resume=true", tables)


def read_anew() -> None:
    """Let sites read their scans again, as processes that start do."""
    from core.data.holdings import open_holdings

    open_holdings.cache_clear()


class GrowingGrid(InProcessGrid):
    """Site c connects when so many tasks of training have been given, under the number that it has then."""

    late, rounds = 1, 0

    def get_node_ids(self) -> Iterable[int]:
        """The nodes connected by now."""
        return [node for node in self.order if node % 100 < 3 or self.rounds >= self.late]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As ever; rounds are counted."""
        messages = list(messages)
        self.rounds += any(message.metadata.message_type == "train.pretrain" for message in messages)
        return super().push_messages(messages)


class Grown(GrowingGrid):
    """Site c is there from the beginning."""

    late = 0


def named(root: Path, *names: str, first: int = 1) -> dict[int, NodeConfig]:
    """A node for each folder."""
    own: NodeConfig = {"min-group": 2, "share-per-scan": True}
    return {number: {"site": name, "data-root": str(root / name), **own} for number, name in enumerate(names, first)}


LATE = f"{BASE} data.root=null finetune=both finetune.stages=[linear_probe] num_rounds=4 debias.exchange_every=3 evaluation=sums"


@pytest.fixture(scope="module")
def growing(hospitals: Path) -> Whole:
    """The run `LATE`, to which c comes late, and what is left of it after its first rounds."""
    output = hospitals.parent / "growing"
    with photographed(output / "x", dict(list(AFTER.items())[:5]), output / "album"):
        run_in(output, LATE, named(hospitals, "a", "b", "c"), GrowingGrid)
    return Whole(output / "x", output / "album")


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_a_site_that_was_admitted_late_takes_part_again(hospitals: Path, growing: Whole, tmp_path: Path, rounds: int) -> None:
    """It is there when the run goes on, and takes part from the round in which it did, no other."""
    assert sites_in(growing.folder) == ["ab", "abc", "abc", "abc", "bc"]
    growing.died(f"after {rounds}", tmp_path / "runs")
    resumed = run_in(tmp_path / "runs", f"{LATE} resume=true", named(hospitals, "a", "b", "c", first=101), Grown)
    assert_same(resumed, growing.folder)


def test_a_site_that_took_part_is_waited_for_and_without_a_quorum_needed(
    hospitals: Path, growing: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = "strategy.wait_for_sites_s=1"
    growing.died("after 2", tmp_path / "runs")
    with pytest.raises(RunError, match=r"3 must connect within 1 s, 2 did"):
        run_in(tmp_path / "runs", f"{LATE} resume=true {short}", named(hospitals, "a", "b"))
    shutil.copytree(hospitals / "a", hospitals / "d", dirs_exist_ok=True)
    with pytest.raises(RunError, match=r"\['c'\] must be connected, got \['a', 'b', 'd'\]"):
        run_in(tmp_path / "runs", f"{LATE} resume=true {short}", named(hospitals, "a", "b", "d"))
    shutil.rmtree(hospitals / "d")
    (tmp_path / "runs" / "x").rename(tmp_path / "runs" / "old")
    killed(
        monkeypatch,
        lambda: run_in(tmp_path / "runs", f"{LATE} strategy.min_sites=2", named(hospitals, "a", "b", "c"), GrowingGrid),
        "server.resume.append_line",
        3,
    )
    folder = run_in(tmp_path / "runs", f"{LATE} strategy.min_sites=2 resume=true {short}", named(hospitals, "a", "b"))
    assert "going on without sites that took part before: c" in capsys.readouterr().out
    assert sites_in(folder)[1:3] == ["abc", "ab"]


def test_the_encoder_to_begin_with_may_be_gone(run: Run, long: Whole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = long.folder / "checkpoints" / "pretrain-0005.safetensors"
    start = tmp_path / "start.safetensors"
    shutil.copy(first, start)
    options = f"start={start} num_rounds=2 debias=none finetune=both finetune.stages=[linear_probe,from_scratch]"
    whole = run(options)
    whole.rename(whole.with_name("whole"))
    killed(monkeypatch, lambda: run(options), "server.resume.append_line", 2)
    start.unlink()
    assert_same(run(options, "resume=true"), whole.with_name("whole"))


def test_a_private_run_tells_that_it_was_gone_on_with(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = (
        "start=random num_rounds=0 debias=none finetune.stages=[linear_probe] finetune.num_rounds=3 privacy=dp_sgd "
        "privacy.target_epsilon=20 privacy.delta=0.01 finetune.class_weights=none data.target_sites=[c]"
    )
    killed(monkeypatch, lambda: run(options), "server.resume.append_line", 2)
    report = (run(options, "resume=true") / "report.html").read_text()
    assert "gone on with after a stop (times: 1), and the round that the stop cut short was trained again" in report
    assert read_lines(tmp_path / "runs" / "x")[-1]["privacy"]["c"]["steps"] == 6


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {"flipped": flip, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("folder", ["checkpoints", "resume"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_round_is_done_again_from_the_one_before(
    run: Run, long: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, folder: str
) -> None:
    kept = long.died("after 3", tmp_path / "runs")
    DAMAGES[damage](kept / folder / "pretrain-0003.safetensors")
    assert_same(run(LONG, "resume=true"), long.folder)
    said = capsys.readouterr().out
    assert "pretrain: what was kept of round 3 is damaged or missing, so round 3 is done again" in said
    assert "pretrain: 2 of 5 rounds were finished before" in said


def test_a_damaged_end_of_pretraining_takes_back_what_came_of_it(
    run: Run, long: Whole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = long.died("after 9", tmp_path / "runs")
    flip(kept / "checkpoints" / "pretrain-0005.safetensors")
    killed(monkeypatch, lambda: run(LONG, "resume=true"), "server.strategy.keep_round", 1)
    assert [line["round"] for line in told(kept)] == [1, 2, 3, 4]
    assert_same(run(LONG, "resume=true"), long.folder)


@pytest.mark.parametrize("folder", ["checkpoints", "resume"])
def test_a_stage_that_is_over_is_not_trained_again_where_one_of_its_files_is_damaged(
    run: Run, long: Whole, tmp_path: Path, folder: str
) -> None:
    """The linear probe ended after round 2 by the patience of 1: the best round is in its checkpoint and in the last state."""
    kept = long.died("after 8", tmp_path / "runs")
    assert [path.name for path in sorted((kept / "checkpoints").glob("linear*"))] == ["linear_probe-0001.safetensors"]
    flip(kept / folder / ("linear_probe-0001.safetensors" if folder == "checkpoints" else "linear_probe-0002.safetensors"))
    before = (kept / "rounds.jsonl").read_text().splitlines()
    assert_same(run(LONG, "resume=true"), long.folder)
    assert (kept / "rounds.jsonl").read_text().splitlines()[:8] == before


def test_rounds_of_which_nothing_is_whole_are_one_sentence(run: Run, long: Whole, tmp_path: Path) -> None:
    kept = long.died("after 3", tmp_path / "runs")
    flip(kept / "checkpoints" / "pretrain-0003.safetensors")
    truncate(kept / "resume" / "pretrain-0002.safetensors")
    with pytest.raises(
        RunError, match=r"^pretrain: what was kept of a finished round must be whole, that of rounds 1 to 3 is dam"
    ):
        run(LONG, "resume=true")
    assert len(told(kept)) == 3
    (kept / "resume" / "begun.json").unlink()
    with pytest.raises(RunError, match=r"must hold resume/begun\.json, it does not"):
        run(LONG, "resume=true")


def test_another_configuration_or_code_is_refused(run: Run, long: Whole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = long.died("after 3", tmp_path / "runs")
    with pytest.raises(
        RunError, match=r"must be the one it was started with, debias\.weight, seed differ\. Leave them as run\.js"
    ):
        run(LONG, "resume=true seed=3 debias.weight=1")
    with pytest.raises(RunError, match=r"must not hold an earlier run\. .* go on with it: `isocenter resume`"):
        run(LONG)
    with monkeypatch.context() as patch:
        patch.setattr("server.resume.fingerprint", lambda: "0" * 64)
        with pytest.raises(RunError, match="the code must be that it was started with, Isocenter "):
            run(LONG, "resume=true")
    told_by = json.loads((kept / "run.json").read_text())
    (kept / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"run\.json must be as a run writes it, it was changed"):
        run(LONG, "resume=true")
    (kept / "run.json").unlink()
    with pytest.raises(RunError, match=r"its folder must hold run\.json to be gone on with, it does not"):
        run(LONG, "resume=true")
    assert told_by["resumed"] == 0
    assert len(told(kept)) == 3


def test_waiting_and_keeping_may_be_changed_and_other_versions_are_told(
    run: Run, long: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = long.died("after 3", tmp_path / "runs")
    about = json.loads((kept / "run.json").read_text())
    about["versions"]["torch"] = "1.0"
    (kept / "run.json").write_text(json.dumps(about))
    folder = run(LONG, "resume=true strategy.round_timeout_s=7 strategy.keep_checkpoints=3 strategy.wait_for_sites_s=5")
    assert "the last bits of the weights may differ: torch 1.0 before, now" in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "checkpoints").glob("pretrain-*")) == [
        f"pretrain-000{number}.safetensors" for number in (3, 4, 5)
    ]
    name = "pretrain-0005.safetensors"
    one, other = (load_file(path / "checkpoints" / name) for path in (folder, long.folder))
    assert all(value.equal(other[key]) for key, value in one.items())
    assert read_run(folder).resumed == 1


# After how many rounds the run has begun, at first or again, that finds the disk full, and how many it has finished then.
FULL = {
    "run.json": (None, 0),
    "untrained-0000.safetensors": (None, 0),
    "begun.json": (None, 0),
    "checkpoints/pretrain-0003.safetensors": (None, 2),
    "resume/pretrain-0003.safetensors": (1, 2),
    "rounds.jsonl": (None, 2),
    "checkpoints/linear_probe-0001.safetensors": (4, 5),
    "metrics.json": (9, 10),
    "report.html": (9, 10),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    run: Run, long: Whole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    begun, finished = FULL[name]
    if begun is not None:
        long.died(f"after {begun}", tmp_path / "runs")

    def full(path: Path, *_: object) -> None:
        if path.as_posix().endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")

    def write(path: Path, data: bytes, mode: int = 0o666) -> None:
        full(path)
        write_atomically(path, data, mode)

    def append(path: Path, text: str) -> None:
        if name in path.name and len(path.read_text().splitlines() if path.exists() else ()) == 2:
            half_a_line(path, text)
            full(path)
        append_line(path, text)

    with monkeypatch.context() as patch:
        for module in ("core.checkpoint", "server.resume", "core.run_file", "core.report", "core.evaluation.intervals"):
            patch.setattr(f"{module}.write_atomically", write)
        patch.setattr("server.resume.append_line", append)
        with pytest.raises(RunError, match=r"^.*: the server's disk must have room for what a run keeps, it is full\. .*$"):
            run(LONG, *([] if begun is None else ["resume=true"]))
    assert len(read_lines(tmp_path / "runs" / "x")) == finished
    assert_same(run(LONG, *([] if name == "run.json" else ["resume=true"])), long.folder)


def test_a_file_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_two_servers_do_not_work_in_one_folder(run: Run, long: Whole, tmp_path: Path) -> None:
    from filelock import FileLock

    kept = long.died("after 1", tmp_path / "runs")
    with (
        FileLock(kept / "resume" / "lock"),
        pytest.raises(RunError, match="must be used by one server at a time, another works in it"),
    ):
        run(LONG, "resume=true")


def test_a_run_that_died_before_its_first_round_may_be_started_again(run: Run, long: Whole, tmp_path: Path) -> None:
    kept = long.died("after 0", tmp_path / "runs")
    assert (kept / "checkpoints" / "pretrain-0001.safetensors").is_file()
    assert_same(run(LONG), long.folder)


def test_the_best_round_is_the_first_of_the_smallest_losses() -> None:
    lines = [{"round": n, "validation_loss": loss} for n, loss in enumerate((0.5, 0.25, 0.25, 0.75), 1)]
    assert best_round(lines) == (0.25, 2)
    assert best_round([{"round": 1}]) is None
    assert best_round([]) is None


def test_rounds_are_cut_back_with_what_came_of_them(tmp_path: Path) -> None:
    def write() -> None:
        stages = [("pretrain", 1), ("pretrain", 2), ("probe-a", 1), ("probe-b", 1), ("probe-b", 2)]
        lines = [json.dumps({"stage": stage, "round": number}) for stage, number in stages]
        (tmp_path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        for stage, number in [*stages, ("untrained", 0), ("eraser", 2)]:
            (tmp_path / "checkpoints" / f"{stage}-{number:04d}.safetensors").touch()

    def left() -> list[tuple[str, int]]:
        return [(line["stage"], line["round"]) for line in read_lines(tmp_path)]

    write()
    cut_back(tmp_path, "probe-b", 1)
    assert left() == [("pretrain", 1), ("pretrain", 2), ("probe-a", 1), ("probe-b", 1)]
    assert not (tmp_path / "checkpoints" / "probe-b-0002.safetensors").exists()
    cut_back(tmp_path, "pretrain", 1)
    assert left() == [("pretrain", 1)]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["eraser-0002.safetensors", "pretrain-0001.safetensors", "untrained-0000.safetensors"]


@pytest.mark.parametrize(
    "tail",
    ["", '{"stage": "pretrain", "rou', '{"stage": "pretrain", "round": 2}', "[1]\n", "\0\0\0\n", "\xff\n"],
    ids=["none", "torn", "no_end", "list", "zeros", "no_text"],
)
def test_a_torn_last_line_is_no_round(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "rounds.jsonl"
    first = '{"stage": "pretrain", "round": 1}\n'
    path.write_bytes((first + tail).encode("latin-1"))
    sweep(tmp_path)
    assert path.read_text() == first


@pytest.mark.parametrize("middle", ["{", '{"stage": "pretrain"}', "[]"], ids=["torn", "no_round", "list"])
def test_a_damaged_line_before_the_last_takes_no_round_away(tmp_path: Path, middle: str) -> None:
    good = [json.dumps({"stage": "pretrain", "round": number}) for number in (1, 3)]
    text = "\n".join([good[0], middle, good[1]]) + "\n"
    (tmp_path / "rounds.jsonl").write_text(text)
    with pytest.raises(RunError, match=r"rounds\.jsonl: line 2 must be of a finished round, it is damaged\. Put back a copy"):
        sweep(tmp_path)
    assert (tmp_path / "rounds.jsonl").read_text() == text


def test_what_a_run_was_started_with_is_read_back(tmp_path: Path) -> None:
    told = RunFile("name=x 'data.root=\"/my scans\"'", {"seed": 1}, "f" * 64, resumed=2)
    write_run(tmp_path / "x", told)
    assert read_run(tmp_path / "x") == told
    assert shlex.split(read_run(tmp_path / "x").overrides) == ["name=x", 'data.root="/my scans"']


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [(None, "its folder must hold run.json to be gone on with"), ("experiment=tiny name=x", "it must be a simulation")],
    ids=["no_run", "no_simulation"],
)
def test_the_command_refuses_what_it_cannot_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str | None, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if overrides is not None:
        write_run(tmp_path / "runs" / "x", RunFile(overrides, {}, "f" * 64))
    done = RUNNER.invoke(console, ["resume", "x"])
    assert done.exit_code == 1
    assert reason in done.output
    assert len(done.output.strip().splitlines()) == 1


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], limit_s: float = 240) -> object:
    """What is true in the end, unless the process ends or time is up."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        if found := what():
            return found
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("nothing happened")


def server_of(folder: Path) -> int | None:
    """The process that holds the run's folder, which is Flower's ServerApp."""
    inode = (folder / "resume" / "lock").stat().st_ino if (folder / "resume" / "lock").exists() else None
    for line in Path("/proc/locks").read_text().splitlines():
        parts = line.split()
        if inode is not None and "->" not in parts and parts[5].endswith(f":{inode}"):
            return int(parts[4])
    return None


@pytest.mark.slow
def test_a_server_that_is_killed_in_a_round_is_gone_on_with_by_the_command(hospitals: Path, tmp_path: Path) -> None:
    """The real thing: `isocenter run`, kill -9 of the ServerApp while sites train, `isocenter resume`.

    It ends with the bits of a run that was never stopped and had no process but this one.
    """
    options = f"{BASE} data.root={hospitals} num_rounds=6 debias.exchange_every=4 local_steps=8 finetune=none"
    whole = run_in(tmp_path / "whole", options, virtual(3))
    console_script = [sys.executable, "-c", "from core.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*console_script, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    folder = tmp_path / "runs" / "x"
    stopped = start("run", *options.split(), f"output={tmp_path / 'runs'}")
    try:
        wait_for(lambda: len(read_lines(folder)) >= 2, stopped)
        server = wait_for(lambda: server_of(folder), stopped)
        assert isinstance(server, int)
        os.kill(server, signal.SIGKILL)
        said, _ = stopped.communicate(timeout=120)
    finally:
        if stopped.poll() is None:
            stopped.send_signal(signal.SIGTERM)
            stopped.communicate(timeout=60)
    assert stopped.returncode == 1
    assert f"`isocenter resume {folder}` goes on with it" in said
    finished = len(read_lines(folder))
    assert 2 <= finished < 6
    resumed = start("resume", str(folder))
    said, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert f"pretrain: {finished} of 6 rounds were finished before" in said
    one, other = (path / "checkpoints" / "pretrain-0006.safetensors" for path in (folder, whole))
    assert one.read_bytes() == other.read_bytes()
    assert [line["sha256"] for line in told(folder)] == [line["sha256"] for line in told(whole)]
