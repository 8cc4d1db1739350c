"""What a fault shows and what it costs, with real processes: the rows of the README's table, each made to happen."""

import ast
import functools
import inspect
import json
import logging
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.audit import AuditLog
from client.service import Kit as SiteKit
from client.service import start_in_background
from core.cli import app as console
from core.flower_env import processes
from core.log_lines import StandardStream
from server import cli as server_cli
from server.resume import read_lines
from server.sites import RunError
from simulations.consortium import Consortium, local_consortium
from simulations.in_process import run_in_process

ROOT = Path(__file__).parents[1]
LIMIT_S = 600.0
TINY = "experiment=tiny data=sites debias=none finetune=none evaluation=none policy.min_group=2"
HEADING = "| fault | what the operator sees | what is lost |"
PLACEHOLDERS = {"SITE": r"[a-z]+ *", "R": r"\d+", "N": r"[\d.e+-]+", "S": r"[\d.]+ s", "RUN": r"\S+", "KIT": r"\S+"}


def table() -> dict[str, tuple[list[str], str]]:
    """The README's rows: what is seen, as sentences with placeholders, and what is lost, by fault."""
    lines = iter((ROOT / "README.md").read_text().splitlines())
    assert HEADING in lines
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        fault, seen, lost = (cell.strip() for cell in line.strip("|").split("|"))
        rows[fault] = ([text for text in re.findall(r"`([^`]+)`", seen) if not text.startswith("isocenter ")], lost)
    return rows


def pattern(sentence: str) -> str:
    """A regular expression for a sentence with placeholders."""
    return "".join(PLACEHOLDERS.get(word, re.escape(word)) for word in re.split(r"\b([A-Z]+)\b", sentence))


def shows(fault: str, *texts: str, lost: str) -> None:
    """Each sentence of the fault's row stands in one of the texts, and the row says that this is lost."""
    sentences, said = table()[fault]
    assert said == lost
    assert sentences
    for sentence in sentences:
        assert any(re.search(pattern(sentence), text) for text in texts), (fault, sentence, texts)


def test_the_table_has_the_rows_that_are_made_to_happen() -> None:
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Call)]
    made = {call.args[0].value for call in calls if isinstance(call.func, ast.Name) and call.func.id == "shows"}  # type: ignore[attr-defined]
    assert set(table()) == made
    assert pattern("round R: SITE failed") == r"round\ \d+:\ [a-z]+ *\ failed"


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """What is found, as soon as it is; a process that must live meanwhile does."""
    deadline = time.monotonic() + LIMIT_S
    while not (value := found()):
        assert process is None or process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return value


def pid_of(folder: Path, word: str) -> int | None:
    """The process that was started under a folder's mark and has a word in its command."""
    for pid in processes(folder):
        try:
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    return None


def work_of(site: SiteKit) -> dict[str, Any]:
    """What the site's worker last told of itself."""
    return site.status("status.json")


def in_round(site: SiteKit, number: int) -> Callable[[], bool]:
    """Whether a site trains in a round."""
    return lambda: work_of(site).get("task") == "train.pretrain" and work_of(site).get("round") == number


def policies_of(folder: Path, write_site: Callable[..., None], *sites: str) -> dict[str, Mapping[str, Any]]:
    """Tiny hospitals and what each allows."""
    policies = {}
    for seed, site in enumerate(sites):
        write_site(folder / "data" / site, seed=seed)
        root, cache = str(folder / "data" / site), str(folder / "cache")
        policies[site] = {"data": {"root": root}, "cache_root": cache, "groups": {"min_group": 2}, "threads": 1}
    return policies


def status_of(*arguments: str) -> str:
    """What `isocenter status` or a command like it prints."""
    server_cli.register(console)
    return CliRunner().invoke(console, list(arguments)).output


def broken_off_in(folder: Path) -> str:
    """What `isocenter status` says of a run whose process at the server has ended; "" while it has not."""
    said = status_of("status", str(folder))
    return said if "BROKEN OFF" in said else ""


def nothing_runs(consortium: Consortium) -> bool:
    return not any(processes(folder) for folder in consortium.folders)


# What a full disk must not do.


def test_a_log_on_a_full_disk_loses_its_lines_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 - its end raises
    monkeypatch.setattr(sys, "stdout", full)
    log = logging.Logger("full")
    log.addHandler(StandardStream("stdout"))
    log.error("a line")
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_full_disk_while_scans_are_prepared_is_told_in_a_sentence(
    consortium: Path, federate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: object) -> None:
        Path("/dev/full").write_text("a volume")

    monkeypatch.setattr("client.tasks.holdings", prepare)
    with pytest.raises(RunError, match=r"node 3: its disk must have room for what the site keeps, it is full; free some\."):
        federate(consortium)


# Killed processes and a full disk, one after the other in one run, which ends as one that nothing happened to.

NUM_ROUNDS = 6
RUN = f"{TINY} num_rounds={NUM_ROUNDS} local_steps=24 name=run"


@contextmanager
def isocenter(log_path: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, which writes to a file and is ended with the block."""
    command = [sys.executable, "-c", "from core.cli import main; main()", *arguments]
    with (
        log_path.open("wb") as log,
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def unbroken(folder: Path, policies: Mapping[str, Mapping[str, Any]]) -> Path:
    """The run's folder where nothing happens, in this process."""
    from client.app import app as client_app
    from server.app import app as server_app

    nodes = {
        number: {"site": site, "data-root": policy["data"]["root"], "cache-root": policy["cache_root"], "min-group": 2}
        for number, (site, policy) in enumerate(policies.items(), 1)
    }
    run_in_process(server_app, client_app, f"{RUN} output={folder}", nodes)
    return folder / "run"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_outlives_whatever_is_killed_and_ends_with_the_bits_of_one_that_was_left_alone(
    tmp_path: Path, write_site: Callable[..., None]
) -> None:
    policies = policies_of(tmp_path, write_site, "hill", "south")
    whole = unbroken(tmp_path / "whole", policies)
    folder, said = tmp_path / "runs" / "run", tmp_path / "said"
    with local_consortium(tmp_path / "consortium", policies, start_s=LIMIT_S) as consortium:
        server, hill, south = consortium.server, consortium.sites["hill"], consortium.sites["south"]
        kit = str(server.folder)
        with isocenter(said, "run", "--at", kit, *shlex.split(RUN), f"output={folder.parent}") as run:
            wait_for(in_round(hill, 2), run)
            worker = work_of(hill)["pid"]
            os.kill(worker, signal.SIGKILL)

            wait_for(in_round(south, 3), run)
            shows("the site's worker killed", *logs_of(hill), lost="nothing")
            assert work_of(hill)["pid"] != worker
            os.kill(pid_of(south.state, "client.supernode"), signal.SIGKILL)  # type: ignore[arg-type]

            wait_for(in_round(hill, 4), run)
            shows("the SuperNode killed", said.read_text(), *logs_of(south), lost="the site's work of that round, done again")
            os.kill(pid_of(server.state, "flwr-serverapp"), signal.SIGKILL)  # type: ignore[arg-type]
            broken_off = wait_for(lambda: broken_off_in(folder), run)
            wait_for(lambda: said.read_text().count("3 of 6 rounds were finished before"), run)
            shows("the ServerApp killed", said.read_text(), broken_off, lost="the round that was going on, done again")

            wait_for(in_round(hill, 5), run)
            os.kill(pid_of(server.state, "flower_superlink"), signal.SIGKILL)  # type: ignore[arg-type]
            wait_for(lambda: said.read_text().count("4 of 6 rounds were finished before"), run)
            shows(
                "the SuperLink killed",
                said.read_text(),
                (server.state / "server.log").read_text(),
                lost="the round that was going on, done again",
            )

            # The very file that the last round writes first lies on a device that is full.
            serving = wait_for(lambda: pid_of(server.state, "flwr-serverapp"), run)
            full = folder / "checkpoints" / f".pretrain-{NUM_ROUNDS:04d}.safetensors.{serving}"
            full.symlink_to("/dev/full")
            assert run.wait(LIMIT_S) == 1
        assert [line["round"] for line in read_lines(folder)] == list(range(1, NUM_ROUNDS))
        shows(
            "the server's disk full",
            said.read_text(),
            status_of("status", str(folder)),
            lost="the round that was going on, done again",
        )

        flip(folder / "checkpoints" / f"pretrain-{NUM_ROUNDS - 1:04d}.safetensors")
        with isocenter(tmp_path / "resumed", "resume", str(folder), "--at", kit) as run:
            assert run.wait(LIMIT_S) == 0, (tmp_path / "resumed").read_text()
        shows("the newest checkpoint damaged", (tmp_path / "resumed").read_text(), lost="that round, done again")
    assert nothing_runs(consortium)
    checkpoints = {path.name: path.read_bytes() for path in (whole / "checkpoints").iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == checkpoints
    rounds = [(line["round"], line["sites"]) for line in read_lines(folder)]
    assert rounds == [(line["round"], line["sites"]) for line in read_lines(whole)]


def logs_of(site: SiteKit) -> list[str]:
    """The site's own logs, and what it says of itself."""
    return [path.read_text(errors="replace") for path in sorted((site.state / "logs").iterdir())]


# Hostile, slow, full and absent sites, a round for each.

TURNED, NAN, HUGE, SHAPE, WEIGHT, SLOW = 1, 2, 3, 4, 5, 6
"""Rounds in which the hostile site sends what it should not, and in which another is slow."""
LAST = 11

BETWEEN = """
import importlib.abc, importlib.machinery, sys

class Altered(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "client.warm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            honest = module.ask_worker
            module.ask_worker = lambda job, asker: alter(job, honest(job, asker))

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Altered())
"""


def alter(job: Any, answer: Any) -> Any:
    """What a hostile site makes of the honest answer to a training task, round by round."""
    import json

    import numpy as np
    from flwr.app import Array

    if job.message_type != "train.pretrain":
        return answer
    number = job.received.config_records["config"]["round"]
    about, arrays = answer.config_records["config"], answer.array_records["arrays"]
    sent, trained = job.received.array_records["arrays"]["float32"].numpy(), arrays["float32"].numpy().copy()
    if number == 2:
        trained[5] = np.nan
    if number == 3:
        trained = sent + np.float32(1e6) * (trained - sent)
    if number == 4:
        [name, dtype, shape], *others = json.loads(about["layout"])
        about["layout"] = json.dumps([[name, dtype, [int(np.prod(shape))]], *others])
    if number == 5:
        answer.metric_records["metrics"]["num-examples"] = -399
    if number == 1:
        trained = sent - (trained - sent)
    arrays["float32"] = Array(trained)
    return answer


def start_hostile(folder: Path, site: SiteKit) -> None:
    """Start a site whose Python, through a `sitecustomize`, comes between its SuperNode and its worker."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(inspect.getsource(alter).replace(": Any", "").replace(" -> Any", "") + BETWEEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        start_in_background(site)


def no_file_may_grow(process: int, past: int) -> None:
    """Let a process write no file past so many bytes: to it the disk is full, and nobody needs one that is."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (past, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.long
def test_a_run_goes_on_past_hostile_slow_and_full_sites(tmp_path: Path, write_site: Callable[..., None]) -> None:
    policies = policies_of(tmp_path, write_site, "hill", "lake", "south")
    hostile = {"lake": functools.partial(start_hostile, tmp_path / "hostile")}
    folder, log = tmp_path / "runs" / "run", tmp_path / "log"
    overrides = (
        f"{TINY} num_rounds={LAST} local_steps=24 strategy.min_sites=1 strategy.deadline_floor_s=10 strategy.exclude_after=99 "
        f"name=run output={tmp_path / 'runs'}"
    )

    def line_of(number: int) -> dict[str, Any]:
        lines = read_lines(folder)
        return lines[number - 1] if len(lines) >= number else {}

    with (
        local_consortium(tmp_path / "consortium", policies, start_s=LIMIT_S, starts=hostile, absent=["fen"]) as consortium,
        ThreadPoolExecutor(1) as pool,
    ):
        hill = consortium.sites["hill"]
        run = pool.submit(consortium.run, overrides, log_path=log, deadline_s=LIMIT_S, on_line=lambda _: None)
        wait_for(lambda: in_round(hill, SLOW)() or run.done())
        worker = work_of(hill)["pid"]
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: line_of(SLOW) or run.done())
        os.kill(worker, signal.SIGCONT)
        wait_for(lambda: any("late_updates" in line for line in read_lines(folder)) or run.done())
        wait_for(lambda: any(in_round(hill, number)() for number in range(SLOW + 2, LAST)) or run.done())
        worker = work_of(hill)["pid"]
        no_file_may_grow(worker, 1)
        wait_for(lambda: "hill" in read_lines(folder)[-1].get("failures", {}) or run.done())
        no_file_may_grow(worker, resource.RLIM_INFINITY)
        full = len(read_lines(folder))
        outcome = run.result()
        assert outcome.ok, (outcome, log.read_text()[-3000:])
        named = "data.pretrain_sites=[fen,hill,lake,south] strategy.wait_for_sites_s=3"
        waited = consortium.run(
            f"{TINY} {named} name=waited output={tmp_path / 'runs'}",
            log_path=tmp_path / "waited",
            deadline_s=LIMIT_S,
            on_line=print,
        )
        assert not waited.ok
        seen = status_of("server", "status", str(consortium.server.folder))
        shows("a site that never starts", (tmp_path / "waited").read_text(), seen, lost="nothing: no round was begun")
    assert nothing_runs(consortium)

    def told(number: int) -> str:
        return "\n".join([*re.findall(rf"isocenter\| (round {number}\b.*)", log.read_text()), json.dumps(line_of(number))])

    lost = "its update of that round"
    shows("an update with NaN", told(NAN), lost=lost)
    shows("a huge update", told(HUGE), lost=lost)
    shows("an update of a wrong shape", told(SHAPE), lost=lost)
    shows("a negative weight in the average", told(WEIGHT), lost=lost)
    shows("an update turned round", told(TURNED), lost="a part of that round's step")
    shows("a site slower than the deadline", told(SLOW), log.read_text(), lost="nothing: its update counts in a later round")
    shows("the disk full at a site", told(full), lost=lost)
    refused = {number for number in range(1, LAST + 1) if "lake" not in line_of(number)["sites"]}
    assert refused == {NAN, HUGE, SHAPE, WEIGHT}
    assert {number for number in range(1, LAST + 1) if "hill" not in line_of(number)["sites"]} == {SLOW, full}
    assert all("south" in line_of(number)["sites"] for number in range(1, LAST + 1))
    assert line_of(TURNED)["against"].keys() == {"lake"}
    # Every answer is on record at its site, in a log that is whole; what could not be written down did not leave, and nothing was
    # asked of a site in the round that its late answer counts in.
    [late] = [number for number in range(1, LAST + 1) if "late_updates" in line_of(number)]
    for site, missed in ((hill, {full, late}), (consortium.sites["south"], set())):
        left = [(entry["message"], entry["round"]) for entry in AuditLog(site.state / "audit.jsonl").read()]
        trained = [("train.pretrain", number) for number in range(1, LAST + 1) if number not in missed]
        assert left == [("query.describe", None), *trained]
