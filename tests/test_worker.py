"""The site's warm worker as a real process: equal answers, and what becomes of it when it is killed, frozen, hung or stopped."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from client import warm
from client.jobs import LENGTH, Job, decode_head, decoded, encode, receive, send
from client.tasks import carry_out
from client.warm import ALIVE, ROOT, SOCKET, Asker, Worker, connect, is_stopped, mark_stopped
from client.warm import ask_worker as ask_worker_for
from client.worker import Memory, Order, Server
from core import service
from core.config import load_config
from core.exchange import content, fingerprint, pack
from core.faults import SiteError
from core.models import CONSTANTS, Standardise, build_pretrainer, split_constants

IMAGES = "experiment=tiny data=folder data.root=null finetune=none debias=none name=warm local_steps=3"
TABLE = (
    "experiment=roi data.table=null debias=none finetune=none batch_size=8 encoder.width=8 embedding_size=4 warmup_rounds=0 "
    "num_rounds=3 name=warm"
)
FEATURES = 3
LONG = "local_steps=40000"  # more than any test waits for


def ask_worker(job: Job) -> RecordDict:
    """Ask as an app does in a process of its own."""
    return ask_worker_for(job, Asker.this_app())


# Records as bytes.

INTEGERS = st.integers(-(2**63), 2**63 - 1)
KINDS = (INTEGERS, st.floats(allow_nan=True), st.booleans(), st.text(), st.binary())
SCALARS = st.one_of(*KINDS)
LISTS = st.one_of(*(st.lists(kind, max_size=4) for kind in KINDS))
NUMBERS = st.one_of(INTEGERS, st.floats(), st.lists(st.integers(0, 9), max_size=3), st.lists(st.floats(), max_size=3))
NAMES = st.text(max_size=8)
DTYPES = [f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64) if (kind, bits) != ("float", 8)]
DTYPES += ["bool", "complex64"]


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    values = np.array(draw(st.integers(0, 9))) + np.arange(int(np.prod(shape))).reshape(shape)
    return Array(np.asarray(values).astype(draw(st.sampled_from(DTYPES))))


RECORDS = st.dictionaries(
    NAMES,
    st.one_of(
        st.dictionaries(NAMES, arrays(), max_size=3).map(ArrayRecord),
        st.dictionaries(NAMES, NUMBERS, max_size=3).map(MetricRecord),
        st.dictionaries(NAMES, st.one_of(SCALARS, LISTS), max_size=3).map(ConfigRecord),
    ),
    max_size=4,
).map(RecordDict)


def plain(records: RecordDict) -> list[Any]:
    """All that there is in records, in order, where a NaN equals another."""
    return [
        (
            name,
            type(record).__name__,
            [(key, repr(vars(value)) if isinstance(value, Array) else repr(value)) for key, value in record.items()],
        )
        for name, record in records.items()
    ]


@given(first=RECORDS, second=RECORDS, about=st.dictionaries(NAMES, st.one_of(st.integers(), st.text(), st.booleans())))
def test_records_come_back_as_they_were(first: RecordDict, second: RecordDict, about: dict[str, Any]) -> None:
    data = b"".join(encode(about, first=first, second=second))
    size = int.from_bytes(data[:LENGTH], "big")
    told, described, lengths = decode_head(data[LENGTH : LENGTH + size])
    parts, at = [], LENGTH + size
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    assert at == len(data)
    assert told == about
    back = decoded(described, iter(parts))
    assert list(back) == ["first", "second"]
    assert [plain(records) for records in back.values()] == [plain(first), plain(second)]


def test_a_message_crosses_a_socket_and_one_that_is_cut_off_is_none() -> None:
    records = RecordDict({"arrays": ArrayRecord({"w": Array(np.arange(5.0))})})
    here, there = socket.socketpair()
    with here, there:
        send(here, {"job": "x"}, received=records)
        message = receive(there)
        assert message is not None
        assert message[0] == {"job": "x"}
        assert plain(message[1]["received"]) == plain(records)
        here.sendall(b"".join(encode({}, received=records))[:-3])
        here.close()
        assert receive(there) is None


def test_a_head_that_is_too_long_is_refused() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall((1 << 40).to_bytes(LENGTH, "big"))
        with pytest.raises(ValueError, match="its head must be at most"):
            receive(there)


# What is kept for a run.


def test_what_is_kept_outlives_the_worker_for_the_last_run_only(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.of(7)["constants"] = ArrayRecord({"w": Array(np.arange(3.0))})
    memory.save()
    file = tmp_path / "7"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert plain(Memory(tmp_path).of(7)) == plain(memory.records)
    before = file.stat().st_mtime_ns
    memory.save()
    assert file.stat().st_mtime_ns == before
    memory.records["constants"] = ArrayRecord({"w": Array(np.arange(4.0))})
    memory.save()
    assert plain(Memory(tmp_path).of(7)) == plain(memory.records)
    del memory.records["constants"]
    memory.save()
    assert len(Memory(tmp_path).of(7)) == 0
    assert len(memory.of(8)) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", [lambda data: data[:-2], lambda _: b"", lambda data: data[:9], lambda data: data + b"x"])
def test_what_is_kept_and_was_damaged_is_left(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    memory = Memory(tmp_path)
    memory.of(7)["constants"] = ArrayRecord({"w": Array(np.arange(3.0))})
    memory.save()
    (tmp_path / "7").write_bytes(spoil((tmp_path / "7").read_bytes()))
    assert len(Memory(tmp_path).of(7)) == 0


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """A worker's server in this process, without its socket."""
    folder = warm.private_folder(tmp_path / "state" / "worker")
    return Server(folder, os.getpid())


def order(run_id: int = 1, job: str = "query.describe", about: dict[str, Any] | None = None) -> Order:
    return Order(
        {"job": job, "run_id": run_id, "node_config": about or {}, "run_config": {"overrides": TABLE}},
        content(config=ConfigRecord({"fingerprint": fingerprint()})),
    )


def test_a_full_disk_is_told_in_a_sentence_and_the_next_task_works(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(job: Job) -> RecordDict:
        job.memory["kept"] = ConfigRecord({"n": len(job.memory)})
        return RecordDict()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/data/site/7")

    monkeypatch.setattr("client.tasks.carry_out", keep)
    with monkeypatch.context() as disk:
        disk.setattr("client.worker.write_atomically", full)
        first = order()
        server.serve(first)
    assert first.fault is not None
    assert first.fault[0] == "disk"
    assert "/" not in first.fault[1]
    second = order()
    server.serve(second)
    assert second.fault is None
    assert second.done.is_set()
    assert (server.memory.folder / "1").exists()


def test_whatever_a_task_raises_the_worker_goes_on_and_tells_a_number(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(_: Job) -> RecordDict:
        raise LookupError("sub-0042 in /data/site")

    monkeypatch.setattr("client.tasks.carry_out", explode)
    asked = order()
    server.serve(asked)
    assert asked.fault is not None
    assert asked.fault[0] == "incident"
    assert "sub-" not in asked.fault[1]
    assert asked.done.is_set()


def test_nothing_of_a_stopped_run_or_for_an_asker_that_has_gone_is_taken_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[int] = []
    monkeypatch.setattr("client.tasks.carry_out", lambda job: carried.append(job.run_id) or RecordDict())
    server.give_up(1)
    server.give_up(1)
    assert (server.folder / "stopped").read_text() == "1\n"
    gone = order(run_id=2)
    gone.given_up.set()
    for asked in (order(run_id=1), gone):
        server.serve(asked)
        assert asked.fault == ("stopped", "the run was stopped.")
    server.serve(order(run_id=11))
    assert carried == [11]


# A real process.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, write_site: Callable[..., None]) -> Iterator[Path]:
    """A folder with a site of images, `a`, and one of a table, `t.csv`; workers of its state folders are ended afterwards."""
    root = tmp_path_factory.mktemp("site")
    write_site(root / "a", seed=1)
    rows = ["participant_id,age,sex,f,g,h"]
    rows += [f"p{i:02d},{20 + i},{'FM'[i % 2]},{i % 7 + 0.5},{i % 5 + 0.25 * i},{(i * i) % 11}" for i in range(60)]
    (root / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOCENTER_CACHE", str(root / "cache"))
        yield root
        for folder in root.glob("**/worker"):
            if (worker := connect(folder)) is not None:
                end(worker)
        for process in service._background:
            process.wait(10)


def end(worker: Worker) -> None:
    worker.kill()
    worker.close()


def node(site: Path, kind: str = "table", **more: Any) -> dict[str, Any]:
    """A node config."""
    data = site / ("t.csv" if kind == "table" else "a")
    return {"site": "a", "data-root": str(data), "min-group": 2, "state-root": str(site / "state"), "warm": True, **more}


def task(message_type: str, received: RecordDict, config: dict[str, Any], overrides: str = TABLE, run_id: int = 1) -> Job:
    return Job(message_type, received, config, {"overrides": overrides}, run_id, RecordDict())


def describing(config: dict[str, Any], run_id: int = 1) -> Job:
    return task("query.describe", content(config=ConfigRecord({"fingerprint": fingerprint()})), config, run_id=run_id)


def constants_for(run_id: int, config: dict[str, Any]) -> Job:
    told = {f"{CONSTANTS}{name}": value for name, value in Standardise(FEATURES, 0).state_dict().items()}
    packed, layout = pack({name: value + 1 if name.endswith("mean") else value for name, value in told.items()})
    about = ConfigRecord({"fingerprint": fingerprint(), "layout": layout})
    return task("query.constants", content(constants=packed, config=about), config, run_id=run_id)


def training(config: dict[str, Any], overrides: str = TABLE, run_id: int = 1) -> Job:
    """A round of pretraining, of the images or the table."""
    run = load_config(overrides)
    images = run.data.inputs == "images"
    model = build_pretrainer(
        run.encoder,
        run.embedding_size,
        run.seed,
        num_inputs=1 if images else FEATURES,
        spatial_dims=run.data.spatial_dims,
    )
    state, _ = split_constants(dict(model.state_dict()))
    packed, layout = pack(state)
    about = ConfigRecord({"round": 1, "stage": "pretrain", "layout": layout, "fingerprint": fingerprint(), "exchange": 0})
    return task("train.pretrain", content(arrays=packed, config=about), config, overrides, run_id)


def here(job: Job) -> RecordDict:
    """What the task answers in this process."""
    config = {name: value for name, value in job.node_config.items() if name not in ("state-root", "warm")}
    return carry_out(replace(job, node_config=config))


def without_times(records: RecordDict) -> list[Any]:
    for record in records.metric_records.values():
        for name in ("seconds", "waited-seconds"):
            record.pop(name, None)
    return plain(records)


def pid_of(config: dict[str, Any]) -> int:
    """The worker that answers now."""
    worker = connect(Path(config["state-root"]) / "worker")
    assert worker is not None
    worker.close()
    return worker.pid


def wait_for(true: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_steps(config: dict[str, Any], but: int = 0) -> int | None:
    """The worker that is in the midst of its steps by what it tells in its status; None where none is."""
    try:
        told = json.loads((Path(config["state-root"]) / "status.json").read_text())
    except FileNotFoundError:
        return None
    return told["pid"] if told.get("what") == "step" and told["task"] and told["pid"] != but else None


@pytest.fixture
def asking() -> Iterator[ThreadPoolExecutor]:
    """To ask while the test does something else."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.slow
def test_its_answers_are_those_of_a_process_of_its_own_bit_for_bit_and_it_stays(site: Path) -> None:
    config = node(site, "images")
    jobs = [training(config, IMAGES), task("query.describe", describing(config).received, config, IMAGES)]
    for job in jobs:
        assert without_times(ask_worker(job)) == without_times(here(job))
    first = pid_of(config)
    assert without_times(ask_worker(jobs[0])) == without_times(here(jobs[0]))
    assert pid_of(config) == first
    state = site / "state"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (state, state / "worker", state / "memory")] == [0o700] * 3
    assert stat.S_IMODE((state / "worker" / SOCKET).stat().st_mode) == 0o600
    assert stat.S_IMODE((state / "worker" / "worker.log").stat().st_mode) == 0o600


@pytest.mark.slow
def test_what_it_was_told_survives_it(site: Path) -> None:
    config = node(site)
    question = replace(describing(config, run_id=5), message_type="query.inputs")
    question.received.config_records["config"]["space"] = "input"
    plain_sums = without_times(ask_worker(question))
    ask_worker(constants_for(5, config))
    moved = without_times(ask_worker(question))
    assert moved != plain_sums
    before = pid_of(config)
    os.kill(before, signal.SIGKILL)
    assert without_times(ask_worker(question)) == moved
    assert pid_of(config) != before
    # Another run knows nothing of it, and of the first nothing is left.
    assert without_times(ask_worker(replace(question, run_id=6))) == plain_sums
    assert without_times(ask_worker(question)) == plain_sums


def long_training(config: dict[str, Any], run_id: int, steps: str = LONG) -> Job:
    ask_worker(constants_for(run_id, config))
    return training(config, f"{TABLE} {steps}", run_id)


@pytest.mark.slow
def test_killed_in_the_middle_it_is_replaced_and_the_answer_is_the_same(site: Path, asking: ThreadPoolExecutor) -> None:
    config = node(site)
    job = long_training(config, 20, "local_steps=1500")
    answer = asking.submit(ask_worker, job)
    wait_for(lambda: in_steps(config) is not None or answer.done())
    first = in_steps(config)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    told = RecordDict()
    carry_out(replace(constants_for(20, node(site)), node_config={**config, "state-root": str(site / "own")}, memory=told))
    expected = here(replace(job, memory=told))
    assert without_times(answer.result(120)) == without_times(expected)
    assert pid_of(config) != first
    assert not lives(first)


@pytest.mark.slow
def test_killed_twice_it_is_given_up(site: Path, asking: ThreadPoolExecutor) -> None:
    config = node(site)
    answer = asking.submit(ask_worker, long_training(config, 21))
    last = 0
    for _ in range(2):
        wait_for(lambda: in_steps(config, but=last) is not None)  # noqa: B023 - called at once
        last = in_steps(config, but=last) or 0
        os.kill(last, signal.SIGKILL)
    with pytest.raises(SiteError, match=r"\[isocenter:worker\] its worker ended twice on the same task; see") as error:
        answer.result(60)
    assert str(site) not in str(error.value)


@pytest.mark.slow
def test_frozen_it_is_replaced(site: Path, asking: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a task and before one."""
    config = node(site)
    job = long_training(config, 22, "local_steps=1500")
    monkeypatch.setattr(warm, "SILENCE_S", 6.0)
    answer = asking.submit(ask_worker, job)
    wait_for(lambda: in_steps(config) is not None or answer.done())
    first = in_steps(config)
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    assert answer.result(120).metric_records["metrics"]["steps"] == 1500
    assert not lives(first)
    second = pid_of(config)
    os.kill(second, signal.SIGSTOP)
    monkeypatch.setattr(warm, "HELLO_S", 0.5)
    warm.start(site / "state" / "worker", Asker.this_app()).close()
    assert not lives(second)


@pytest.mark.slow
def test_without_progress_it_is_replaced_and_then_given_up(site: Path) -> None:
    """A policy that no one ever writes hangs whoever reads it."""
    (site / "hung").mkdir()
    os.mkfifo(site / "hung" / "site.yaml")
    state = site / "hung" / "state"
    ask_worker(describing(node(site, **{"state-root": str(state)}), run_id=23))
    first = pid_of({"state-root": str(state)})
    config = {"site-file": str(site / "hung" / "site.yaml"), "warm": True, "worker-patience-s": 1.0}
    with pytest.raises(SiteError, match="its worker made no progress twice on the same task"):
        ask_worker(describing(config, run_id=23))
    assert not lives(first)
    assert connect(state / "worker") is None
    assert ask_worker(describing(node(site, **{"state-root": str(state)}), run_id=23))


@pytest.mark.slow
def test_a_stopped_run_ends_its_task_at_the_next_step(site: Path, asking: ThreadPoolExecutor) -> None:
    config = node(site)
    job = long_training(config, 24)
    answer = asking.submit(ask_worker, job)
    wait_for(lambda: in_steps(config) is not None)
    worker = connect(site / "state" / "worker")
    assert worker is not None
    worker.stop(24)
    worker.close()
    with pytest.raises(SiteError, match=r"\[isocenter:stopped\] the run was stopped\."):
        answer.result(30)
    pid = pid_of(config)
    with pytest.raises(SiteError, match="the run was stopped"):
        ask_worker(job)
    assert ask_worker(describing(config, run_id=25))
    assert pid_of(config) == pid


@pytest.mark.slow
def test_two_askers_at_once_are_served_by_one(site: Path, asking: ThreadPoolExecutor) -> None:
    config = node(site, **{"state-root": str(site / "both")})
    jobs = [describing(config, run_id=26), training(config, run_id=26)]
    ask_worker(constants_for(26, config))
    end_worker(config)
    answers = [asking.submit(ask_worker, job) for job in jobs * 2]
    told = [without_times(answer.result(120)) for answer in answers]
    assert told[:2] == told[2:]
    assert (site / "both" / "worker" / ALIVE).read_text() == str(pid_of(config))


def end_worker(config: dict[str, Any]) -> None:
    worker = connect(Path(config["state-root"]) / "worker")
    assert worker is not None
    end(worker)


# Without a task it comes up before torch does.


@pytest.fixture
def start_for(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a worker that ends with a process."""
    begun: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, owner: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "client.worker", str(folder), "--owner", str(owner)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        log = (tmp_path / "log").open("ab")
        with log:
            begun.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return warm.private_folder(warm.private_folder(tmp_path / "state") / "worker")


def test_it_ends_with_its_owner(
    folder: Path, start_for: Callable[..., subprocess.Popen[bytes]], sleeper: subprocess.Popen[bytes]
) -> None:
    process = start_for(folder, sleeper.pid)
    wait_for(lambda: responds(folder))
    sleeper.kill()
    assert process.wait(30) == 0
    assert connect(folder) is None


def responds(folder: Path) -> bool:
    if (worker := connect(folder)) is None:
        return False
    worker.close()
    return True


def test_it_does_not_start_for_an_owner_that_has_ended(
    folder: Path, start_for: Callable[..., subprocess.Popen[bytes]], sleeper: subprocess.Popen[bytes]
) -> None:
    sleeper.kill()
    sleeper.wait()
    assert start_for(folder, sleeper.pid).wait(30) == 0
    assert not (folder / SOCKET).exists()


def test_there_are_never_two(folder: Path, start_for: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start_for(folder, os.getpid())
    wait_for(lambda: responds(folder))
    assert start_for(folder, os.getpid()).wait(30) == 1
    assert process.poll() is None
    worker = connect(folder)
    assert worker is not None
    assert worker.pid == process.pid
    worker.close()


@pytest.mark.parametrize("what", ["owner", "root"])
def test_of_another_owner_or_other_code_it_is_replaced(
    tmp_path: Path,
    what: str,
    start_for: Callable[..., subprocess.Popen[bytes]],
    sleeper: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it would be asked is left out: `carry_out` only tells who would have been asked."""
    config = {"site": "a", "state-root": str(tmp_path / "state")}
    folder = warm.private_folder(warm.private_folder(tmp_path / "state") / "worker")
    process = start_for(folder, sleeper.pid if what == "owner" else os.getppid())
    wait_for(lambda: responds(folder))
    if what == "root":
        (tmp_path / "code").symlink_to(ROOT)
        monkeypatch.setattr(warm, "ROOT", tmp_path / "code")
    asked: list[Worker] = []

    def note(worker: Worker, *_: object) -> RecordDict:
        asked.append(replace(worker))
        worker.kill()
        return RecordDict()

    monkeypatch.setattr(Worker, "carry_out", note)
    ask_worker(describing(config))
    assert process.wait(10) == -signal.SIGKILL
    assert asked[0].pid != process.pid
    assert asked[0].root == str(tmp_path / "code" if what == "root" else ROOT)
    assert asked[0].owner == os.getppid()
    assert service._background[-1].wait(10) == -signal.SIGKILL


@pytest.mark.slow
def test_a_worker_that_speaks_another_way_is_replaced_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_for: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """As where the site's isocenter and the app are of versions too far apart."""
    folder = warm.private_folder(warm.private_folder(tmp_path / "state") / "worker")
    process = start_for(folder, os.getppid())
    wait_for(lambda: responds(folder))
    monkeypatch.setattr(warm, "PROTOCOL", 2)
    with pytest.raises(SiteError, match=r"\[isocenter:worker\] its isocenter and the app must be of versions that understand"):
        ask_worker(describing({"site": "a", "state-root": str(tmp_path / "state")}))
    assert process.wait(10) == -signal.SIGKILL
    assert service._background[-1].wait(10) == -signal.SIGKILL


def test_a_folder_with_a_long_name_has_a_socket_too(tmp_path: Path, start_for: Callable[..., subprocess.Popen[bytes]]) -> None:
    folder = tmp_path / ("long" * 30) / "state" / "worker"
    warm.private_folder(folder.parent)
    warm.private_folder(folder)
    start_for(folder, os.getpid())
    wait_for(lambda: responds(folder))


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    with pytest.raises(SiteError, match=r"must be its user's alone \(mode 700\)") as error:
        ask_worker(describing({"site": "a", "state-root": str(state)}))
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("patience", ["soon", "60", 0, -1.0, True, float("nan")])
def test_a_patience_that_is_none_is_refused(tmp_path: Path, patience: object) -> None:
    with pytest.raises(SiteError, match="worker-patience-s must be a positive number of seconds"):
        ask_worker(describing({"site": "a", "state-root": str(tmp_path / "state"), "worker-patience-s": patience}))


def test_a_state_folder_that_cannot_be_made_is_told_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SiteError, match=r"\[isocenter:worker\] its worker could not be started") as error:
        ask_worker(describing({"site": "a", "state-root": str(tmp_path / "file" / "state")}))
    assert str(tmp_path) not in str(error.value)


def test_the_thin_app_lets_nothing_but_a_sentence_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.app import Context, Message
    from flwr.supercore.task_identity import TaskIdentity

    from client.app import handle

    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def explode(_: Job) -> RecordDict:
        raise PermissionError(13, "Permission denied", "/data/sub-0042")

    message = Message(RecordDict(), dst_node_id=1, message_type="query.describe")
    for config, target in (({"warm": True}, "client.warm.ask_worker"), ({}, "client.tasks.carry_out")):
        monkeypatch.setattr(target, explode)
        with pytest.raises(SiteError, match=r"^\[isocenter:incident\] incident [0-9a-f]{8}: see the site's local log\.$"):
            handle(message, Context(1, 1, dict(config), RecordDict(), {}))


def test_a_run_that_is_over_is_remembered(folder: Path) -> None:
    assert not is_stopped(folder, 12)
    mark_stopped(folder, 12)
    mark_stopped(folder, 123)
    mark_stopped(folder, 12)
    assert [is_stopped(folder, run_id) for run_id in (1, 2, 12, 23, 123)] == [False, False, True, False, True]
    assert (folder / "stopped").read_text() == "12\n123\n"
