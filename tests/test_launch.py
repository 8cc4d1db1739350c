import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from core import flower_env
from core.flower_env import processes
from simulations import workplace as workplace_module
from simulations.cli import LOOKS, RESUMES, gone_from, submit_in
from simulations.launch import Outcome, choose_resources, gpu_share, progress_line, simulate, submit
from simulations.workplace import start, workplace

CHECKOUT = Path(__file__).parents[1]

# Programs that behave as Flower's do, in a tenth of a second: FAKE says how the run shall go.
FAKE_SUPERLINK = """
import http.server, os, signal, subprocess, sys
if os.environ["FAKE"] == "no superlink":
    sys.exit("the port is taken")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"], start_new_session=True, cwd="/")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
FAKE_FLWR = r"""
import json, os, sys, time
fake = os.environ["FAKE"]
if sys.argv[1] == "ls":
    if fake == "lost":
        sys.exit("connection refused")
    runs = [{"status": fake, "status-details": "N/A" if fake.endswith("completed") else "the reason"}]
    print(json.dumps({"success": True, "runs": runs}))
    sys.exit()
if sys.argv[1] == "stop":
    print(sys.argv[2], file=open(os.path.join(os.environ["FLWR_HOME"], "stopped"), "a"))
    sys.exit()
if fake == "refused":
    print("\033[93m╭─ Error ───╮\n│ [code: 15] Invalid   run configuration. │\n╰───╯\033[0m")
    sys.exit(1)
print("Successfully started run 42")
print("\033[92mINFO \033[0m:      Starting Flower Simulation")
print("isocenter| home", os.environ["FLWR_HOME"])
print("isocenter| overrides", open(sys.argv[sys.argv.index("--run-config") + 1]).read().strip())
if fake == "silent":
    time.sleep(1000)
"""


@pytest.fixture
def fake_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("flower-superlink", FAKE_SUPERLINK), ("flwr", FAKE_FLWR)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(flower_env, "_bin", lambda: programs)


def run_fake(tmp_path: Path, fake: str, on_line=lambda _line: None, overrides: str = "") -> Outcome:
    return simulate(
        tmp_path,
        overrides=overrides,
        num_sites=2,
        log_path=tmp_path / "logs" / "run.log",
        deadline_s=60,
        clients_at_once=2,
        on_line=on_line,
        env={"FAKE": fake},
    )


@pytest.mark.usefixtures("fake_flower")
@pytest.mark.parametrize(
    ("fake", "ok", "status", "details"),
    [
        ("finished:completed", True, "finished:completed", ""),
        ("finished:failed", False, "finished:failed", "the reason"),
        ("finished:stopped", False, "finished:stopped", "the reason"),
        ("refused", False, "refused", "Error [code: 15] Invalid run configuration."),
        ("no superlink", False, "not started", "the port is taken"),
        ("lost", False, "lost", "connection refused"),
    ],
)
def test_only_a_run_that_flower_calls_completed_is_ok(tmp_path: Path, fake: str, ok: bool, status: str, details: str):
    outcome = run_fake(tmp_path, fake)
    assert (outcome.ok, outcome.status) == (ok, status)
    assert details in outcome.details
    assert bool(outcome.details) is not ok
    assert outcome.run_id == (None if status in {"refused", "not started"} else "42")


@pytest.mark.usefixtures("fake_flower")
def test_lines_for_people_are_passed_on_and_everything_is_logged_without_colours(tmp_path: Path):
    lines: list[str] = []
    run_fake(tmp_path, "finished:completed", lines.append, overrides="data.root='/a b' \"é\" \\ 😀")
    assert [line.split()[0] for line in lines] == ["home", "overrides"]
    assert lines[1] == r'''overrides overrides = "data.root='/a b' \"é\" \\ 😀"'''
    assert (tmp_path / "logs/run.log").read_text().splitlines()[:2] == [
        "Successfully started run 42",
        "INFO :      Starting Flower Simulation",
    ]


@pytest.mark.usefixtures("fake_flower")
def test_a_run_that_says_nothing_is_stopped_at_its_deadline(tmp_path: Path):
    with workplace({"FAKE": "silent"}) as place, (tmp_path / "log").open("w") as log:
        outcome = submit(place, tmp_path, overrides="", log=log, deadline_s=1.0, on_line=print)
    assert outcome.status == "deadline"
    assert "Stopped at the deadline, after 1 s." in outcome.details


@pytest.mark.usefixtures("fake_flower")
def test_a_run_whose_process_is_gone_is_lost_and_over_for_the_sites(tmp_path: Path):
    with workplace({"FAKE": "silent"}) as place, (tmp_path / "log").open("w") as log:
        outcome = submit(place, tmp_path, overrides="", log=log, deadline_s=60, on_line=print, gone=lambda: True)
        assert (place.folder / "stopped").read_text() == "42\n"
    assert (outcome.status, outcome.broke_off) == ("lost", True)
    assert "process at the server ended without a word" in outcome.details


LOST = Outcome("1", "lost", "the SuperLink went away", 1.0)
EXPIRED = Outcome("1", "finished:failed", "No heartbeat received from the task", 1.0)
FAILED = Outcome("1", "finished:failed", "sites: 3 must connect", 1.0)
DONE = Outcome("1", "finished:completed", "", 1.0)


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`isocenter run --at` over runs that end like this; the overrides that each was submitted with."""

    def run(outcomes: list[Outcome], *, state: str = "running", rounds_each: int = 0, began: bool = True) -> list[str]:
        folder, given, left = tmp_path / "run", list[str](), list(outcomes)
        folder.mkdir()
        if began:
            (folder / "run.json").touch()
        (folder / "status.json").write_text(json.dumps({"state": state}))

        def submit(*_: object, overrides: str, **__: object) -> Outcome:
            given.append(overrides)
            with (folder / "rounds.jsonl").open("a") as file:
                file.write('{"stage": "pretrain", "round": 1}\n' * rounds_each)
            (folder / "report.html").touch()
            return left.pop(0)

        service = SimpleNamespace(is_running=lambda: True)
        about = SimpleNamespace(consortium="hills")
        kit = SimpleNamespace(service=service, about=about, state=tmp_path, environment=dict, ask=lambda *_: {"success": True})
        monkeypatch.setattr("server.superlink.open_kit", lambda _: kit)
        monkeypatch.setattr("simulations.launch.submit", submit)
        monkeypatch.setattr("simulations.launch.stop_run", lambda _place, run_id: given.append(f"stop {run_id}"))
        with suppress(typer.Exit):
            submit_in(folder, tmp_path, ["num_rounds=9"], 60)
        return given

    return run


@pytest.mark.parametrize("broken", [LOST, EXPIRED], ids=["lost", "expired"])
def test_a_run_whose_servers_side_broke_off_is_gone_on_with(submitted: Callable[..., list[str]], broken: Outcome):
    again = "num_rounds=9 resume=true"
    assert submitted([broken, broken, DONE]) == ["num_rounds=9", "stop 1", again, "stop 1", again]


def test_without_a_finished_round_between_it_is_given_up(submitted: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]):
    given = submitted([LOST] * 9)
    assert len([text for text in given if "resume" in text]) == RESUMES
    assert "the run did not finish: lost" in capsys.readouterr().err


def test_with_finished_rounds_between_it_is_not_given_up(submitted: Callable[..., list[str]]):
    given = submitted([*[LOST] * 7, DONE], rounds_each=1)
    assert len([text for text in given if "resume" in text]) == 7


@pytest.mark.parametrize(
    ("outcome", "state", "began"),
    [(FAILED, "running", True), (LOST, "stopped", True), (LOST, "", False), (DONE, "finished", True)],
    ids=["it failed", "it told why it stopped", "it never began", "it is done"],
)
def test_what_ended_by_itself_or_never_began_is_not_gone_on_with(
    submitted: Callable[..., list[str]], outcome: Outcome, state: str, began: bool
):
    assert submitted([outcome, DONE], state=state, began=began) == ["num_rounds=9"]


def test_a_server_is_gone_when_nobody_works_in_the_folder_it_worked_in(tmp_path: Path):
    (tmp_path / "resume").mkdir()
    gone = gone_from(tmp_path)
    assert not any(gone() for _ in range(2 * LOOKS))
    lock = FileLock(tmp_path / "resume" / "lock")
    with lock:
        assert not any(gone() for _ in range(2 * LOOKS))
    assert [gone() for _ in range(LOOKS)] == [False] * (LOOKS - 1) + [True]
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished"}))
    gone = gone_from(tmp_path)
    with lock:
        assert not gone()
    assert not any(gone() for _ in range(2 * LOOKS))


@pytest.mark.usefixtures("fake_flower")
@pytest.mark.parametrize("leave_by", [None, KeyboardInterrupt, ValueError, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_however_a_run_is_left(tmp_path: Path, leave_by: object):
    seen: list[Path] = []
    before = signal.getsignal(signal.SIGTERM)

    def on_line(line: str) -> None:
        if line.startswith("home"):
            seen.append(Path(line.split()[1]))
            # SuperLink, its detached child, and flwr run, unless that one had only to complete and is gone already.
            assert len(processes(seen[0])) in ((2, 3) if leave_by is None else (3,))
            if isinstance(leave_by, signal.Signals):
                os.kill(os.getpid(), leave_by)
            elif isinstance(leave_by, type):
                raise leave_by

    if leave_by is None:
        run_fake(tmp_path, "finished:completed", on_line)
    else:
        expected = SystemExit if isinstance(leave_by, signal.Signals) else leave_by
        with pytest.raises(expected) as error:
            run_fake(tmp_path, "silent", on_line)
        if isinstance(leave_by, signal.Signals):
            assert error.value.code == 128 + leave_by
    [home] = seen
    assert processes(home) == []
    assert not home.exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_is_kept_from_foreign_clusters_proxies_and_the_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("NO_PROXY", "intra.example")
    with workplace({"OMP_NUM_THREADS": "3"}) as place:
        environment = place.environment
        assert list((place.folder / "cwd").iterdir()) == []
    assert "RAY_ADDRESS" not in environment
    assert environment["NO_PROXY"] == environment["no_proxy"] == "intra.example,127.0.0.1,localhost"
    assert environment["FLWR_TELEMETRY_ENABLED"] == environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["FLWR_HOME"] == environment["RAY_TMPDIR"] == str(place.folder)


def test_a_temporary_folder_too_deep_for_unix_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deep = tmp_path / ("d" * 40)
    deep.mkdir()
    monkeypatch.setattr(workplace_module.tempfile, "tempdir", str(deep))
    with pytest.raises(ValueError, match=r"at most 36 characters long .* Set TMPDIR"), workplace():
        pass
    assert list(deep.iterdir()) == []


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flower_env, "_bin", lambda: tmp_path)
    with workplace() as place, pytest.raises(ValueError, match=r"flower-superlink must be installed next to Python"):
        start(place, "flower-superlink", [])


@pytest.mark.parametrize("name", ["num_sites", "clients_at_once"])
def test_impossible_numbers_are_refused(tmp_path: Path, name: str):
    numbers = {"num_sites": 2, "clients_at_once": 2, name: 0}
    with pytest.raises(ValueError, match=rf"simulate: {name} must be at least 1, got 0\."):
        simulate(tmp_path, overrides="", log_path=tmp_path / "log", deadline_s=1, on_line=print, **numbers)
    with pytest.raises(ValueError, match=r"num_sites must be at least 1, got 0\."):
        choose_resources(0)


def test_progress_lines_are_those_of_the_server_alone():
    assert progress_line("isocenter| round 1 of 3: loss 0.5\n") == "round 1 of 3: loss 0.5"
    assert progress_line("\x1b[92misocenter| done\x1b[0m") == "done"
    assert progress_line("\x1b[36m(ClientAppActor pid=7)\x1b[0m isocenter| north: scan 3") is None
    assert progress_line("INFO :      Starting Flower Simulation") is None


@given(st.integers(1, 100), st.integers(1, 16))
def test_all_clients_find_a_place_on_the_gpus_and_every_gpu_is_used(clients: int, gpus: int):
    share = gpu_share(clients, gpus)
    per_gpu = 10_000 // round(share * 10_000)  # Ray counts in steps of 0.0001 and never splits a client over GPUs.
    assert share == pytest.approx(round(share * 10_000) / 10_000, abs=1e-12)
    assert per_gpu * gpus >= clients
    assert (per_gpu - 1) * gpus < clients


def test_resources_are_one_site_a_core():
    cores = len(os.sched_getaffinity(0))
    assert choose_resources(1)[0] == 1
    assert choose_resources(cores + 5)[0] == cores


# A real Flower app in the packages that ours uses too, so that its code and not the installed one must be found.
TOY = {
    "pyproject.toml": """
        [project]
        name = "toy"
        version = "0.1.0"
        license = "Apache-2.0"
        dependencies = ["a-package-that-does-not-exist"]
        [tool.flwr.app]
        publisher = "toy"
        fab-include = ["server/**/*.py", "client/**/*.py"]
        [tool.flwr.app.components]
        serverapp = "server.app:app"
        clientapp = "client.app:app"
        [tool.flwr.app.config]
        overrides = ""
    """,
    "server/__init__.py": "",
    "server/app.py": """
        import logging, os, sys, time
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.serverapp import ServerApp

        app = ServerApp()
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("isocenter| %(message)s"))
        log = logging.getLogger("toy")
        log.addHandler(handler)
        log.setLevel(logging.INFO)

        @app.main()
        def main(grid, context):
            overrides = context.run_config["overrides"]
            log.info("home %s", os.environ["FLWR_HOME"])
            log.info("overrides %s", overrides)
            while len(nodes := list(grid.get_node_ids())) < 2:
                time.sleep(0.1)
            question = RecordDict({"asked": ConfigRecord({"overrides": overrides})})
            for reply in grid.send_and_receive([Message(question, node, "train") for node in nodes], timeout=600):
                log.info("answer %s", reply.error.reason.splitlines()[-1] if reply.has_error() else dict(reply.content["told"]))
            if "fail" in overrides:
                raise RuntimeError("1 of 2 sites answered")
            if overrides == "hang":
                log.info("waiting for ever")
                time.sleep(10_000)
    """,
    "client/__init__.py": "",
    "client/app.py": """
        import os
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.clientapp import ClientApp

        app = ClientApp()

        @app.train()
        def train(message, context):
            told = {**context.node_config, "cwd": os.listdir(), "asked": message.content["asked"]["overrides"]}
            if "fail" in told["asked"] and told["partition-id"] == 1:
                raise ValueError("no scans here")
            told["cwd"] = len(told["cwd"])
            return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)
    """,
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    app = tmp_path / "toy app"
    for name, text in TOY.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(textwrap.dedent(text))
    return app


# What a separate process does with the toy: the launcher itself is what runs without network or is ended by a signal.
LAUNCH_TOY = """
import sys
from pathlib import Path
from simulations.launch import simulate
toy = Path(sys.argv[1])
outcome = simulate(toy, overrides=sys.argv[2], num_sites=2, log_path=toy.parent / "run.log", deadline_s=600,
    clients_at_once=2, on_line=lambda line: print(line, flush=True))
print(outcome.status, outcome.details)
sys.exit(not outcome.ok)
"""


def without_network() -> list[str]:
    """A command prefix that leaves only the loopback device; empty where namespaces may not be made."""
    prefix = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0 else []
    except FileNotFoundError:
        return []


@pytest.mark.slow
def test_a_simulation_needs_no_network_tells_why_it_failed_and_leaves_nothing(toy: Path):
    command = [*without_network(), sys.executable, "-c", LAUNCH_TOY, str(toy), "train.lr=1 'note=\"a b\"' fail"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    home, overrides, *answers, end = done.stdout.splitlines()
    assert overrides == "overrides train.lr=1 'note=\"a b\"' fail"
    [answer] = [line for line in answers if "partition-id" in line]
    assert "'partition-id': 0" in answer
    assert "'cwd': 0" in answer
    assert "note" in answer
    assert any("no scans here" in line for line in answers)
    assert end.startswith("finished:failed")
    assert "1 of 2 sites answered" in end
    log = (toy.parent / "run.log").read_text()
    assert "Starting Flower Simulation" in log
    assert "The SuperLink wrote:" in log
    assert processes(Path(home.split()[1])) == []
    assert not Path(home.split()[1]).exists()


def listening_addresses(pids: list[int]) -> set[str]:
    """Where these processes listen for connections, as /proc/net/tcp and tcp6 write it: hexadecimal, without port."""
    inodes = {str(fd.readlink()) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


@pytest.mark.slow
def test_ending_the_launcher_ends_flower_and_ray(toy: Path):
    command = [sys.executable, "-c", LAUNCH_TOY, str(toy), "hang"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        home = Path(next(launcher.stdout).split()[1])
        assert any("waiting for ever" in line for line in launcher.stdout)
        assert len(processes(home)) > 5, "SuperLink, SuperExec, simulation, Ray and its actors"
        loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
        assert listening_addresses(processes(home)) == loopback, "Ray would let anyone on the network run code here"
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait() == 128 + signal.SIGTERM
    assert processes(home) == []
    assert not home.exists()
