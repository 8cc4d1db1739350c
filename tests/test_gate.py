"""The gate before Flower's SuperNode, with a server made up here and Flower's own loop."""

import io
import logging
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from client import supernode
from client.approval import digest
from client.jobs import Job
from client.supernode import BUSY_S, IDLE_S, LOOK_S, RECENT_S, Clock, Gate, StartError, check_flower, take_leave
from client.warm import Asker, is_stopped
from core.faults import SiteError, error_kind

REFUSED = "this site must approve the app before it runs it: its IT reads it with `isocenter site approve`."


PROJECT = """
[project]
name = "app"
version = "1"
[tool.flwr.app]
publisher = "us"
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
overrides = ""
seed = 1
"""


def bundle(text: str, project: str = PROJECT) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("pyproject.toml", project)
        archive.writestr("client/app.py", text)
    return data.getvalue()


GOOD, BAD, BROKEN = bundle("print('good')"), bundle("print('bad')"), bundle("print('good')", "[project]")


class Server:
    """A server that has sent one message, of run 5, and what a site's SuperNode asks of it."""

    def __init__(self, message: Message, bundle: bytes = GOOD) -> None:
        self.bundle, self.over, self.failing = bundle, False, False
        message.metadata.__dict__["_message_id"] = message.object_id
        self.tree = get_object_tree(message)
        self.objects = {name: value.deflate() for name, value in get_all_nested_objects(message).items()}
        self.waiting = [message]
        self.looked: list[int] = []
        self.pulled: list[str] = []
        self.confirmed: list[str] = []
        self.sent: list[Message] = []
        self.pushed: dict[str, bytes] = {}

    def receive(self) -> tuple[Message, Any] | None:
        if not self.waiting:
            return None
        [message] = self.waiting
        return Message(RecordDict(), metadata=message.metadata), self.tree

    def check(self) -> None:
        if self.over:
            raise RunNotRunningException
        if self.failing:
            raise OSError(101, "Network is unreachable")

    def get_run(self, run_id: int) -> Any:
        self.looked.append(run_id)
        self.check()
        return SimpleNamespace(fab_hash=digest(self.bundle), override_config={"overrides": "seed=3"})

    def get_fab(self, name: str, run_id: int) -> Any:
        assert (name, run_id) == (digest(self.bundle), 5)
        return SimpleNamespace(content=self.bundle, hash_str="claimed")

    def pull_object(self, run_id: int, name: str) -> bytes:
        assert run_id == 5
        self.pulled.append(name)
        if name not in self.objects:
            raise ObjectPullError(name, "gone")
        return self.objects[name]

    def confirm(self, run_id: int, name: str) -> None:
        assert run_id == 5
        self.confirmed.append(name)
        self.waiting.clear()

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        assert seconds >= 0
        self.check()
        self.sent.append(message)
        return {node.object_id for node in iterate_object_tree(tree)}, "session"

    def push_object(self, run_id: int, session: str, name: str, content: bytes) -> None:
        assert (run_id, session) == (5, "session")
        self.pushed[name] = content

    def pull_into(self, gate: Gate) -> int | None:
        return gate.pull(
            node_config={"site-file": "/kit/site.yaml"},
            receive=self.receive,
            get_run=self.get_run,
            get_fab=self.get_fab,
            pull_object=self.pull_object,
            confirm_message_received=self.confirm,
            state="Flower's",
            trusted_entities=None,
        )

    def push_from(self, gate: Gate) -> Message:
        """The reply as the server puts it together from what was pushed."""
        gate.push(send=self.send, push_object=self.push_object, state="Flower's")
        reply = inflate_object_from_contents(self.sent[-1].metadata.message_id, dict(self.pushed))
        assert isinstance(reply, Message)
        return reply


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
def message(monkeypatch: pytest.MonkeyPatch) -> Message:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 5)
    weights = ArrayRecord({name: Array(np.arange(4, dtype=np.float32)) for name in ("one", "alike")})
    return Message(RecordDict({"arrays": weights, "config": ConfigRecord({"round": 2})}), 1, "train.pretrain")


@pytest.fixture
def server(message: Message) -> Server:
    return Server(message)


@pytest.fixture
def gate(tmp_path: Path, clock: FakeTime) -> Gate:
    assert clock.now == 1000
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    made = Gate(state, lambda: None)
    made.approvals.approve(made.approvals.keep_pending(GOOD))
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, Asker]]:
    """Jobs that reached the worker, which answers with what it got."""
    jobs: list[tuple[Job, Asker]] = []

    def ask(job: Job, asker: Asker) -> RecordDict:
        jobs.append((job, asker))
        return RecordDict({"arrays": job.received.array_records["arrays"]})

    monkeypatch.setattr(supernode, "ask_worker", ask)
    return jobs


def test_a_message_for_an_approved_app_goes_to_the_worker_and_its_answer_back(
    gate: Gate, server: Server, message: Message, asked: list[tuple[Job, Asker]]
) -> None:
    assert server.pull_into(gate) == 5
    # Two arrays that are alike cross once.
    assert sorted(server.pulled) == sorted(server.objects)
    assert server.confirmed == [message.metadata.message_id]
    reply = server.push_from(gate)
    assert reply.content.array_records["arrays"].keys() == {"one", "alike"}
    np.testing.assert_array_equal(reply.content.array_records["arrays"]["one"].numpy(), np.arange(4, dtype=np.float32))
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    [(job, asker)] = asked
    assert (job.message_type, job.run_id, job.received) == ("train.pretrain", 5, message.content)
    assert job.node_config == {"site-file": "/kit/site.yaml"}
    assert job.run_config == {"overrides": "seed=3", "seed": 1}
    assert asker.owner == os.getpid()
    assert asker.code == gate.approvals.folder / "apps" / digest(GOOD)
    assert (asker.code / "client" / "app.py").read_text() == "print('good')"
    assert server.pull_into(gate) is None
    assert server.looked == [5]  # the app of a run is fetched once


@pytest.mark.parametrize("kept", ["kept", "no bundle", "full disk"])
def test_an_app_that_is_not_approved_does_not_run_and_the_server_is_told(
    gate: Gate,
    message: Message,
    asked: list[tuple[Job, Asker]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept: str,
) -> None:
    """Whatever hash the server claims for it, and whether or not it can be kept to be looked at."""
    server = Server(message, b"no zip" if kept == "no bundle" else BAD)
    if kept == "full disk":

        def full(_: bytes) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(gate.approvals, "keep_pending", full)
    assert server.pull_into(gate) == 5
    reply = server.push_from(gate)
    assert error_kind(reply.error.reason) == ("approval", REFUSED)
    assert asked == []
    said = capsys.readouterr().out
    if kept != "kept":
        assert said.startswith("isocenter| an app was refused: ")
        return
    assert said == f"isocenter| app {digest(BAD)} is not approved here: `isocenter site approve` shows it\n"
    assert gate.approvals.pending() == [digest(BAD)]
    gate.approvals.approve(digest(BAD))
    server.waiting.append(message)
    server.pull_into(gate)
    assert server.push_from(gate).has_content()
    assert len(asked) == 1


def test_an_approved_app_that_cannot_be_read_is_told_of(gate: Gate, message: Message, asked: list[tuple[Job, Asker]]) -> None:
    gate.approvals.approve(gate.approvals.keep_pending(BROKEN))
    server = Server(message, BROKEN)
    assert server.pull_into(gate) == 5
    assert error_kind(server.push_from(gate).error.reason)[0] == "incident"
    assert asked == []


@pytest.mark.parametrize("failure", ["told", "unforeseen"])
def test_a_failure_leaves_in_words_that_may(gate: Gate, server: Server, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    def fail(*_: object) -> RecordDict:
        raise SiteError("disk", "its disk is full.") if failure == "told" else ValueError("/data/sub-007/anat.nii")

    monkeypatch.setattr(supernode, "ask_worker", fail)
    server.pull_into(gate)
    kind, text = error_kind(server.push_from(gate).error.reason)
    if failure == "told":
        assert (kind, text) == ("disk", "its disk is full.")
    else:
        assert kind == "incident"
        assert text.endswith(": see the site's local log.")
        assert "sub-007" not in text


def test_a_message_of_a_run_that_is_over_is_left(gate: Gate, server: Server) -> None:
    server.over = True
    assert server.pull_into(gate) is None
    assert (server.confirmed, gate.task) == ([], None)


def test_a_message_that_cannot_be_had_whole_is_answered_with_the_failure(
    gate: Gate, server: Server, message: Message, asked: list[tuple[Job, Asker]], caplog: pytest.LogCaptureFixture
) -> None:
    server.objects.clear()
    with caplog.at_level(logging.ERROR, "isocenter"):
        assert server.pull_into(gate) == 5
    assert len(caplog.records) == 1
    reply = server.push_from(gate)
    assert error_kind(reply.error.reason)[0] == "incident"
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert (server.confirmed, asked) == ([], [])


def test_a_server_that_cannot_be_asked_ends_nothing(gate: Gate, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(101, "Network is unreachable")

    server.receive = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR, "isocenter"):
        assert server.pull_into(gate) is None
    assert (len(caplog.records), gate.task) == (1, None)


class FakeWorker:
    """Notes what it is told to stop."""

    def __init__(self) -> None:
        self.stopped: list[int] = []
        self.closed = 0

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("trouble", ["over", "failing"])
def test_an_answer_that_cannot_be_sent_ends_nothing(
    gate: Gate, server: Server, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    server.pull_into(gate)
    setattr(server, trouble, True)
    gate.push(send=server.send, push_object=server.push_object)
    assert (server.sent, server.pushed, gate.task) == ([], {}, None)
    words = "the run was stopped" if trouble == "over" else "an answer could not be sent; the site's local log tells why"
    assert capsys.readouterr().out == f"isocenter| {words}\n"
    assert is_stopped(gate.worker_folder, 5) == (trouble == "over")


def test_pauses_are_short_while_a_run_goes_on_and_longer_later(gate: Gate, server: Server, clock: FakeTime) -> None:
    gate.sleep(3)
    clock.now += RECENT_S
    gate.sleep(3)
    server.pull_into(gate)
    gate.sleep(3)
    assert clock.slept == [BUSY_S, IDLE_S, BUSY_S]


def test_it_looks_at_the_run_and_has_the_worker_give_up_what_is_over(
    gate: Gate, server: Server, clock: FakeTime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = FakeWorker()
    monkeypatch.setattr(supernode, "connect", lambda _: worker)

    def ask(_: Job, asker: Asker) -> RecordDict:
        for _ in range(15):
            clock.now += 0.4 * LOOK_S
            server.over = clock.now > 1000 + 4 * LOOK_S
            asker.on_beat()
        raise SiteError("stopped", "the run was stopped.")

    monkeypatch.setattr(supernode, "ask_worker", ask)
    server.pull_into(gate)
    gate.push(send=server.send, push_object=server.push_object)
    # For the app, then every LOOK_S; a worker that has not noticed is told again; nobody reads twice of it.
    assert server.looked == [5] * 6
    assert worker.stopped == [5, 5, 5]  # the last time where the answer is not wanted any more
    assert worker.closed == 3
    assert (gate.worker_folder / "stopped").read_text() == "5\n"
    assert capsys.readouterr().out.count("the run was stopped") == 1


@pytest.mark.parametrize("trouble", ["connection", "worker", "disk", "none"])
def test_no_trouble_with_that_ends_the_supernode(
    gate: Gate, server: Server, clock: FakeTime, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def fail(*_: object) -> Any:
        raise SiteError("state", "no") if trouble == "worker" else OSError(28, "No space left on device")

    server.over, server.failing = trouble != "connection", trouble == "connection"
    monkeypatch.setattr(supernode, "connect", fail if trouble == "worker" else lambda _: None)
    if trouble == "disk":
        monkeypatch.setattr(supernode, "mark_stopped", fail)
    clock.now += LOOK_S
    gate.look(5, server.get_run)
    assert server.looked == [5]
    assert is_stopped(gate.worker_folder, 5) == (trouble in ("worker", "none"))


def test_the_clock_is_time_but_for_its_pauses() -> None:
    slept: list[float] = []
    clock = Clock(slept.append)
    clock.sleep(3)
    assert slept == [3]
    assert clock.time() == pytest.approx(time.time(), abs=60)


class FakeFleet:
    """The server's side of a connection, which lets a node in that is not connected."""

    online: ClassVar[set[int]] = set()
    reachable = True

    def ActivateNode(self, _: object) -> SimpleNamespace:  # noqa: N802 - Flower's name
        if 7 in self.online:
            raise RuntimeError("Failed to activate SuperNode")
        self.online.add(7)
        return SimpleNamespace(node_id=7)

    def DeactivateNode(self, request: SimpleNamespace) -> None:  # noqa: N802 - Flower's name
        if not self.reachable:
            raise ConnectionError
        self.online.remove(request.node_id)


def test_a_connection_that_a_killed_supernode_left_is_ended_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = SimpleNamespace(FleetHttpClient=FakeFleet, DeactivateNodeRequest=SimpleNamespace)
    for name in ("ActivateNode", "DeactivateNode"):
        monkeypatch.setattr(FakeFleet, name, getattr(FakeFleet, name))
    take_leave(connection, tmp_path / "node")
    fleet = FakeFleet()
    fleet.ActivateNode(None)
    fleet.DeactivateNode(SimpleNamespace(node_id=7))
    assert list(tmp_path.iterdir()) == []
    fleet.ActivateNode(None)
    monkeypatch.setattr(FakeFleet, "reachable", False)
    with pytest.raises(RuntimeError, match="Failed to activate"):
        fleet.ActivateNode(None)
    monkeypatch.setattr(FakeFleet, "reachable", True)
    assert fleet.ActivateNode(None).node_id == 7
    (tmp_path / "node").write_text("damaged")
    fleet.online.clear()
    assert fleet.ActivateNode(None).node_id == 7
    assert (tmp_path / "node").read_text() == "7"


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import start_client_internal as internal

    check_flower(internal)
    for version in ("1.40.0", "1.410.0", "1.42.0", "2.0"):
        monkeypatch.setattr(supernode, "version", lambda _, found=version: found)
        with pytest.raises(StartError, match=rf"flwr must be 1\.41, got {version}\. Install isocenter with its constraints\.txt"):
            check_flower(internal)
    monkeypatch.setattr(supernode, "version", lambda _: "1.41.9")
    check_flower(internal)
    lacking = SimpleNamespace(**{name: value for name, value in vars(internal).items() if name != "_push_messages"})
    with pytest.raises(StartError, match=r"got 1\.41\.9"):
        check_flower(lacking)


@pytest.mark.parametrize("approved", [False, True], ids=["unapproved", "approved"])
def test_flowers_own_loop_runs_nothing_else_than_what_is_approved(
    tmp_path: Path, server: Server, asked: list[tuple[Job, Asker]], monkeypatch: pytest.MonkeyPatch, approved: bool
) -> None:
    """Flower's function that serves a SuperNode, behind the gate, until its one message is answered."""
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode import fleet_http_connection, start_client_internal
    from flwr.supernode.nodestate import NodeStateFactory

    internal: Any = start_client_internal

    class AnsweredError(Exception):
        pass

    @contextmanager
    def connect(*_: object) -> Iterator[tuple[Any, ...]]:
        yield (1, server.receive, server.send, server.get_run, server.get_fab, *(server.pull_object, push, server.confirm))

    def push(*parts: Any) -> None:
        server.push_object(*parts)
        if len(server.pushed) == len(get_all_nested_objects(server.sent[-1])):
            server.over = True

    def pause(_: float) -> None:
        assert server.over
        raise AnsweredError

    monkeypatch.setattr(internal, "http_request_response", connect)
    for name in ("_pull_and_store_message", "_push_messages", "time"):
        monkeypatch.setattr(internal, name, getattr(internal, name))
    client: Any = fleet_http_connection.FleetHttpClient
    for name in ("ActivateNode", "DeactivateNode"):
        monkeypatch.setattr(client, name, getattr(client, name))
    monkeypatch.setattr(internal, "register_signal_handlers", lambda **_: None)
    monkeypatch.setattr(internal, "log", lambda *_: None)
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    assert callable(supernode.install(state))
    gate: Gate = internal._push_messages.__self__
    monkeypatch.setattr(gate, "sleep", pause)
    internal.time = Clock(pause)
    if approved:
        gate.approvals.approve(gate.approvals.keep_pending(GOOD))
    with pytest.raises(AnsweredError):
        internal.start_client_internal(
            state_factory=NodeStateFactory(objectstore_factory=ObjectStoreFactory()),
            server_address="127.0.0.1:9",
            node_config={},
            insecure=True,
            isolation="process",
        )
    [reply] = server.sent
    assert len(asked) == approved
    assert reply.has_content() == approved
    assert approved or (reply.error.code, error_kind(reply.error.reason)) == (2, ("approval", REFUSED))


def test_the_worker_folder_is_the_sites_alone(gate: Gate) -> None:
    assert gate.worker_folder.stat().st_mode & 0o777 == 0o700
    assert gate.worker_folder.stat().st_uid == os.getuid()
