"""Flower's SuperNode, with a gate of the site's own in place of its apps: nothing runs here that the site has not approved.

A SuperNode runs whatever app the server sends, in a new process for every message. Behind the gate, an app's bytes are compared
with what the site's IT has approved (`client.approval`) before anything of it is unpacked; an app that is not approved is kept
for `isocenter site approve`, and the server is told so. A message for an approved one goes straight to the site's worker
(`client.warm`), which keeps torch and the scans, and its answer straight back. While a task is carried out the gate looks whether
the run still runs, and has the worker give it up where it does not; between messages of a run it asks for the next one four times
a second, not every three seconds. And it takes leave for a SuperNode before it that was killed, whose connection the server would
hold for a minute.

Written against Flower 1.41, whose parts are replaced by name; `check_flower` refuses any other.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.run import RunNotRunningException

from client.approval import ApprovalError, Approvals
from client.jobs import Job, Values
from client.state import private_folder
from client.warm import Asker, ask_worker, connect, mark_stopped
from core.faults import SiteError, incident
from core.files import write_atomically
from core.memory import keep_freed_memory

log = logging.getLogger("isocenter")

FLOWER = "1.41"
BUSY_S, IDLE_S = 0.25, 2.0
AGAIN_S = 0.05  # until a part of a message that is still on its way is asked for again, at first
RECENT_S = 300.0  # after a message, the next one is asked for often
LOOK_S = 10.0  # between two looks at whether a run still runs
NOT_APPROVED = SiteError(
    "approval", "this site must approve the app before it runs it: its IT reads it with `isocenter site approve`."
)


class StartError(RuntimeError):
    """This is not a Flower that the gate was built for."""


@dataclass(frozen=True)
class App:
    """What a run runs.

    Attributes:
        code: folder of the approved app, unpacked.
        run_config: the run's.
    """

    code: Path
    run_config: Values


@dataclass(frozen=True)
class Task:
    """A message that was taken in.

    Attributes:
        message: as the server sent it.
        app: to carry it out, or why it is not carried out.
        node_config: the site's own.
        get_run: asks the server about a run.
    """

    message: Message
    app: App | SiteError
    node_config: Values
    get_run: Callable[[int], Any]


class Gate:
    """What stands between Flower's SuperNode and the site.

    Args:
        state: the site's state folder.
        connect: Flower's connection to the server.
    """

    def __init__(self, state: Path, connect: Callable[..., Any]) -> None:
        self.approvals = Approvals(state)
        self.worker_folder = private_folder(state / "worker")
        self.apps: dict[int, App] = {}
        self.task: Task | None = None
        self.stopped: set[int] = set()
        self.moved = self.looked = time.monotonic()
        self._connect = connect

    @contextmanager
    def connection(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        """Flower's connection to the server; it is told when it stands."""
        with self._connect(*args, **kwargs) as parts:
            tell("connected")
            yield parts

    def pull(
        self,
        *,
        node_config: Values,
        receive: Callable[[], tuple[Message, Any] | None],
        get_run: Callable[[int], Any],
        get_fab: Callable[[str, int], Any],
        pull_object: Callable[[int, str], bytes],
        confirm_message_received: Callable[[int, str], None],
        **_: object,
    ) -> int | None:
        """In place of Flower's: take a message in, if there is one; the number of its run.

        One that cannot be had whole is answered with the failure, so that the server does not wait for it.
        """
        try:
            if (received := receive()) is None:
                return None
        except RunNotRunningException:
            return None
        except Exception:
            log.exception("the server could not be asked")
            return None
        message, tree = received
        run_id, message_id = message.metadata.run_id, message.metadata.message_id
        app: App | SiteError
        try:
            app = self.app_of(run_id, get_run, get_fab)
            names = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
            contents = pull_objects(names, lambda name: pull_object(run_id, name), initial_backoff=AGAIN_S)
            confirm_message_received(run_id, message_id)
            whole = inflate_object_from_contents(message_id, contents)
            assert isinstance(whole, Message)
            whole.metadata.__dict__["_message_id"] = message_id
            message = whole
        except RunNotRunningException:
            return None
        except Exception:
            app = incident()
        self.task, self.moved = Task(message, app, node_config, get_run), time.monotonic()
        return int(run_id)

    def app_of(self, run_id: int, get_run: Callable[[int], Any], get_fab: Callable[[str, int], Any]) -> App | SiteError:
        """The app of a run, or why it is not run here."""
        if run_id not in self.apps:
            run = get_run(run_id)
            bundle: bytes = get_fab(run.fab_hash, run_id).content
            if not self.approvals.approves(bundle):
                self.keep_pending(bundle)
                return NOT_APPROVED
            try:
                self.apps = {run_id: App(self.approvals.unpacked(bundle), get_fused_config_from_fab(bundle, run))}
            except Exception:
                return incident()
        return self.apps[run_id]

    def keep_pending(self, bundle: bytes) -> None:
        """Keep an app that is not approved for the site's IT to read."""
        try:
            tell(f"app {self.approvals.keep_pending(bundle)} is not approved here: `isocenter site approve` shows it")
        except (ApprovalError, OSError) as error:
            tell(f"an app was refused: {error}")

    def push(self, *, send: Callable[..., Any], push_object: Callable[..., None], **_: object) -> None:
        """In place of Flower's: carry the task out and send its answer."""
        assert self.task is not None
        task, self.task = self.task, None
        began = time.monotonic()
        reply = self.answered(task)
        try:
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                wanted, session = send(reply, get_object_tree(reply), time.monotonic() - began)
                objects = get_all_nested_objects(reply)
                run_id = reply.metadata.run_id

                def push(name: str, content: bytes) -> None:
                    push_object(run_id, session, name, content)

                push_objects(objects, push, object_ids_to_push=wanted)
        except RunNotRunningException:
            self.give_up(reply.metadata.run_id)
        except Exception:
            log.exception("an answer could not be sent")
            tell("an answer could not be sent; the site's local log tells why")
        self.moved = time.monotonic()

    def answered(self, task: Task) -> Message:
        """The answer to a task, or its failure in words that may leave the site."""
        run_id = task.message.metadata.run_id
        try:
            if isinstance(task.app, SiteError):
                raise task.app
            job = Job(
                message_type=task.message.metadata.message_type,
                received=task.message.content,
                node_config=task.node_config,
                run_config=task.app.run_config,
                run_id=run_id,
                memory=RecordDict(),
            )
            self.looked = time.monotonic()
            asker = Asker(task.app.code, os.getpid(), lambda: self.look(run_id, task.get_run))
            return Message(ask_worker(job, asker), reply_to=task.message)
        except SiteError as error:
            failure = error
        except Exception:
            failure = incident()
        log.warning("%s", failure)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(failure)), reply_to=task.message)

    def look(self, run_id: int, get_run: Callable[[int], Any]) -> None:
        """Have the worker stop what it does for a run that is over; asked every few seconds, it looks less often."""
        if time.monotonic() - self.looked < LOOK_S:
            return
        self.looked = time.monotonic()
        try:
            get_run(run_id)
        except RunNotRunningException:
            self.give_up(run_id)
        except Exception:
            return  # the connection: Flower sees to it

    def give_up(self, run_id: int) -> None:
        """Have the worker take up nothing more of a run that is over."""
        if run_id not in self.stopped:
            tell("the run was stopped")
        # Whatever goes wrong here must not end the SuperNode; it is tried again.
        with suppress(OSError, SiteError):
            if (worker := connect(self.worker_folder)) is not None:
                worker.stop(run_id)
                worker.close()
        with suppress(OSError):
            if run_id not in self.stopped:
                mark_stopped(self.worker_folder, run_id)
        self.stopped.add(run_id)

    def sleep(self, seconds: float) -> None:
        """In place of Flower's pause where there is no message: shorter, above all in the middle of a run."""
        time.sleep(BUSY_S if time.monotonic() - self.moved < RECENT_S else min(seconds, IDLE_S))


def tell(words: str) -> None:
    """Say something to `isocenter site start`, which reads what the SuperNode prints."""
    print(f"isocenter| {words}", flush=True)  # noqa: T201


class Clock:
    """Python's time, but for how long Flower pauses."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self.sleep = sleep

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def take_leave(connection: Any, left: Path) -> None:
    """Let Flower's client end, before it connects, a connection that a SuperNode of this site before it did not end.

    Args:
        connection: Flower's module of the connection.
        left: keeps the node's number for as long as there is one to take leave of.
    """
    client: Any = connection.FleetHttpClient
    activate, deactivate = client.ActivateNode, client.DeactivateNode

    def activated(self: Any, request: Any) -> Any:
        if left.exists():
            with suppress(Exception):  # a server that cannot be reached is asked again, one that knows of none lets us in
                deactivate(self, connection.DeactivateNodeRequest(node_id=int(left.read_text())))
        response = activate(self, request)
        with suppress(OSError):
            write_atomically(left, str(response.node_id).encode(), 0o600)
        return response

    def deactivated(self: Any, request: Any) -> Any:
        response = deactivate(self, request)
        left.unlink(missing_ok=True)
        return response

    client.ActivateNode, client.DeactivateNode = activated, deactivated


def check_flower(internal: Any) -> None:
    """Refuse a Flower whose parts are not those that are replaced.

    Raises:
        StartError: it is another.
    """
    found = version("flwr")
    parts = ("http_request_response", "_pull_and_store_message", "_push_messages", "time")
    if not found.startswith(f"{FLOWER}.") or not all(hasattr(internal, part) for part in parts):
        raise StartError(f"site: flwr must be {FLOWER}, got {found}. Install isocenter with its constraints.txt.")


def install(state: Path) -> Callable[[], None]:
    """Put the gate in place of Flower's apps, and return the SuperNode's main function."""
    from flwr.supernode import fleet_http_connection, start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    internal: Any = start_client_internal
    check_flower(internal)
    gate = Gate(state, internal.http_request_response)
    take_leave(fleet_http_connection, state / "node")
    replacements: dict[str, Any] = {
        "http_request_response": gate.connection,
        "_pull_and_store_message": gate.pull,
        "_push_messages": gate.push,
        "time": Clock(gate.sleep),
    }
    for name, value in replacements.items():
        setattr(internal, name, value)
    return flower_supernode


def main() -> None:
    """``python -m client.supernode STATE`` and then what `flower-supernode` takes."""
    keep_freed_memory()
    state = Path(sys.argv[1])
    sys.argv = ["flower-supernode", *sys.argv[2:], "--isolation", "process"]
    install(state)()


if __name__ == "__main__":
    main()
