"""The gate before Flower's SuperNode, with a module in place of Flower's and with Flower's own."""

import io
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import supernode
from client.approval import digest
from client.supernode import BUSY_S, IDLE_S, LOOK_S, RECENT_S, REFUSED, Clock, Gate, StartError, check_flower
from client.warm import is_stopped


class OverError(Exception):
    """In place of Flower's exception for a run that is over."""


@dataclass(frozen=True)
class Fab:
    """A bundle as Flower hands it on."""

    hash_str: str
    content: bytes
    verifications: dict[str, str] = field(default_factory=dict)


def bundle(text: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("client/app.py", text)
    return data.getvalue()


GOOD, BAD = bundle("print('good')"), bundle("print('bad')")


class Flower:
    """What of Flower's module the gate takes the place of."""

    def __init__(self) -> None:
        self.fab = Fab(digest(GOOD), GOOD)
        self.over = False
        self.pulled: list[dict[str, Any]] = []
        self.looked: list[int] = []
        self.next: int | None = 5

    @contextmanager
    def http_request_response(self, *_: object, **__: object) -> Iterator[tuple[Any, ...]]:
        yield (1, None, None, self.get_run, self.get_fab, "pull", "push", "confirm")

    def get_run(self, run_id: int) -> object:
        self.looked.append(run_id)
        if self.over:
            raise OverError
        return object()

    def get_fab(self, *_: object) -> Fab:
        return self.fab

    def _pull_and_store_message(self, **parts: Any) -> int | None:
        self.pulled.append(parts)
        return self.next

    def _push_messages(self, *_: object, **__: object) -> None:
        return


class FakeTime:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """The gate's time."""
    fake = FakeTime()
    monkeypatch.setattr(supernode, "time", fake)
    return fake


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def flower() -> Flower:
    return Flower()


@pytest.fixture
def gate(state: Path, flower: Flower, clock: FakeTime) -> Gate:
    assert clock.now == 1000
    return Gate(state, flower, OverError)


def test_an_app_that_is_not_approved_is_kept_and_does_not_run(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert not gate.verify(Fab(digest(BAD), BAD), {})
    assert gate.approvals.pending() == [digest(BAD)]
    assert "is not approved here: `isocenter site approve` shows it" in capsys.readouterr().out
    gate.approvals.approve(digest(BAD))
    assert gate.verify(Fab(digest(BAD), BAD), {})


def test_the_hash_that_a_server_claims_counts_for_nothing(gate: Gate) -> None:
    gate.verify(Fab("", GOOD), {})
    gate.approvals.approve(digest(GOOD))
    assert gate.verify(Fab("whatever", GOOD), {})
    assert not gate.verify(Fab(digest(GOOD), BAD), {"site": "approved"})
    assert gate.approvals.pending() == [digest(BAD)]


def test_what_is_no_bundle_is_refused_and_the_supernode_goes_on(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert not gate.verify(Fab("", b"no zip"), {})
    assert gate.approvals.pending() == []
    assert "an app was refused" in capsys.readouterr().out


def test_a_full_disk_refuses_too(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: bytes) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gate.approvals, "keep_pending", full)
    assert not gate.verify(Fab("", BAD), {})


def test_every_app_is_marked_to_be_verified_and_every_message_told_to(gate: Gate, flower: Flower) -> None:
    flower.fab = Fab("claimed", BAD, {"valid_license": "", "someone": "trusted"})
    with gate.connection() as (node_id, _, _, get_run, get_fab, *rest):
        assert node_id == 1
        assert rest == ["pull", "push", "confirm"]
        assert get_run == flower.get_run
        assert get_fab("claimed", 5).verifications == {"valid_license": "site"}
        assert get_fab("claimed", 5).content == BAD
    assert gate.pull(trusted_entities=None, state="kept") == 5
    assert flower.pulled == [{"trusted_entities": {"site": "approved"}, "state": "kept"}]


def test_pauses_are_short_while_a_run_goes_on_and_longer_later(gate: Gate, flower: Flower, clock: FakeTime) -> None:
    gate.sleep(3)
    clock.now += RECENT_S
    gate.sleep(3)
    gate.pull()
    gate.sleep(0.5)
    clock.now += 10
    gate.sleep(0.5)
    assert clock.slept == [BUSY_S, IDLE_S, 0.05, BUSY_S]
    gate.push()
    gate.sleep(3)
    assert clock.slept[-1] == BUSY_S
    flower.next = None
    assert gate.pull() is None
    assert gate.run_id is None


class FakeWorker:
    """Notes what it is told to stop."""

    def __init__(self) -> None:
        self.stopped: list[int] = []
        self.closed = 0

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def close(self) -> None:
        self.closed += 1


def test_it_looks_at_the_run_and_has_the_worker_give_up_what_is_over(
    gate: Gate, flower: Flower, clock: FakeTime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = FakeWorker()
    monkeypatch.setattr(supernode, "connect", lambda _: worker)
    with gate.connection():
        gate.pull()
    while clock.now < 1000 + 3 * LOOK_S + 1:
        gate.sleep(0.5)
    assert flower.looked == [5, 5, 5]
    assert worker.stopped == []
    flower.over = True
    while clock.now < 1000 + 5 * LOOK_S + 2:
        gate.sleep(0.5)
    # A worker that has not noticed is told again; nobody reads twice of it.
    assert worker.stopped == [5, 5]
    assert worker.closed == 2
    assert is_stopped(gate.worker_folder, 5)
    assert (gate.worker_folder / "stopped").read_text() == "5\n"
    assert capsys.readouterr().out.count("the run was stopped") == 1


@pytest.mark.parametrize("trouble", ["connection", "worker", "disk", "none"])
def test_no_trouble_with_that_ends_the_supernode(
    gate: Gate, flower: Flower, clock: FakeTime, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def fail(*_: object) -> Any:
        raise supernode.SiteError("state", "no") if trouble == "worker" else OSError(28, "No space left on device")

    flower.over = trouble != "connection"
    if trouble == "connection":
        monkeypatch.setattr(flower, "get_run", fail)
    monkeypatch.setattr(supernode, "connect", fail if trouble == "worker" else lambda _: None)
    if trouble == "disk":
        monkeypatch.setattr(supernode, "mark_stopped", fail)
    with gate.connection():
        gate.pull()
    while clock.now < 1000 + 2 * LOOK_S + 1:
        gate.sleep(0.5)
    assert is_stopped(gate.worker_folder, 5) == (trouble in ("worker", "none"))


def test_the_clock_is_time_but_for_its_pauses() -> None:
    slept: list[float] = []
    clock = Clock(slept.append)
    clock.sleep(3)
    assert slept == [3]
    assert clock.time() == pytest.approx(time.time(), abs=60)


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import start_client_internal as internal

    check_flower(internal)
    for version in ("1.40.0", "1.410.0", "1.42.0", "2.0"):
        monkeypatch.setattr(supernode, "version", lambda _, found=version: found)
        with pytest.raises(StartError, match=rf"flwr must be 1\.41, got {version}\. Install isocenter with its constraints\.txt"):
            check_flower(internal)
    monkeypatch.setattr(supernode, "version", lambda _: "1.41.9")
    check_flower(internal)
    lacking = SimpleNamespace(**{name: value for name, value in vars(internal).items() if name != "_verify_fab"})
    with pytest.raises(StartError, match=r"got 1\.41\.9"):
        check_flower(lacking)


@pytest.fixture
def installed(state: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flower's own module with the gate in it; put back afterwards."""
    from flwr.supernode import start_client_internal as internal

    for name in (
        "http_request_response",
        "_pull_and_store_message",
        "_push_messages",
        "_verify_fab",
        "FAB_VERIFICATION_ERROR",
        "time",
    ):
        monkeypatch.setattr(internal, name, getattr(internal, name))
    assert callable(supernode.install(state))
    return internal


@pytest.mark.parametrize("approved", [False, True], ids=["unapproved", "approved"])
@pytest.mark.parametrize("trusted", [None, {}], ids=["none", "empty"])
def test_flowers_own_loop_runs_nothing_else_than_what_is_approved(
    installed: Any, state: Path, monkeypatch: pytest.MonkeyPatch, approved: bool, trusted: dict[str, str] | None
) -> None:
    """Flower's function that takes a message in, behind the gate: an error reply with our sentence, or a task of the app."""
    from flwr.app import Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    gate: Gate = installed._verify_fab.__self__
    assert gate.approvals.folder == state
    if approved:
        gate.approvals.keep_pending(GOOD)
        gate.approvals.approve(digest(GOOD))
    message = Message(RecordDict(), dst_node_id=1, message_type="query.describe")
    message.metadata.__dict__["_message_id"] = "asked"
    kept: dict[str, Any] = {}
    monkeypatch.setattr(installed, "_insert_message", lambda reply, *_: kept.setdefault("reply", reply))
    monkeypatch.setattr(installed, "get_fused_config_from_fab", lambda *_: kept.setdefault("unpacked", {}))
    node_state = SimpleNamespace(
        get_run=lambda _: None,
        get_node_id=lambda: 1,
        get_run_series_context=lambda _: None,
        set_run_series_context=lambda *_: None,
        store_run=lambda _: None,
        store_fab=lambda fab: kept.setdefault("fab", fab),
        create_task=lambda **task: kept.setdefault("task", task) and None,
    )
    fab = Fab(digest(GOOD), GOOD)
    monkeypatch.setattr(gate, "_connect", Flower().http_request_response)
    monkeypatch.setattr(Flower, "get_fab", lambda *_: fab)
    run = SimpleNamespace(fab_hash=digest(GOOD), series_id=1, primary_task_type="")
    with installed.http_request_response() as (_, _, _, _, get_fab, *_):
        installed._pull_and_store_message(
            state=node_state,
            object_store=None,
            node_config={},
            receive=lambda: (message, None),
            get_run=lambda _: run,
            get_fab=get_fab,
            pull_object=None,
            confirm_message_received=None,
            trusted_entities=trusted,
        )
    if approved:
        assert set(kept) == {"unpacked", "fab", "task"}
        assert kept["fab"].content == GOOD
    else:
        assert set(kept) == {"reply"}
        assert kept["reply"].error.reason == REFUSED
        assert kept["reply"].metadata.reply_to_message_id == "asked"
        assert gate.approvals.pending() == [digest(GOOD)]


def test_the_worker_folder_is_the_sites_alone(gate: Gate) -> None:
    assert gate.worker_folder.stat().st_mode & 0o777 == 0o700
    assert gate.worker_folder.stat().st_uid == os.getuid()
