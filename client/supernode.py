"""Flower's SuperNode, with a gate of the site's own before it: no app runs here that the site has not approved.

A SuperNode runs whatever app the server sends. Here its bytes are compared with what the site's IT has approved
(`client.approval`) before anything of it is unpacked; an app that is not approved is kept for `isocenter site approve`, and the
server is told so. Two more things a plain SuperNode does not do: it notices within seconds that a run was stopped, and has the
worker give it up; and between messages of a run it asks for the next one four times a second, not every three seconds.

Written against Flower 1.41, whose parts are replaced by name; `check_flower` refuses any other.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client.approval import ApprovalError, Approvals
from client.state import private_folder
from client.warm import connect, mark_stopped
from core.faults import SiteError

FLOWER = "1.41"
BUSY_S, IDLE_S = 0.25, 2.0
RECENT_S = 300.0  # after a message, the next one is asked for often
LOOK_S = 10.0  # between two looks at whether a run still runs
REFUSED = "[isocenter:approval] this site must approve the app before it runs it: its IT reads it with `isocenter site approve`."


class StartError(RuntimeError):
    """This is not a Flower that the gate was built for."""


class Gate:
    """What stands between Flower's SuperNode and the site.

    Args:
        state: the site's state folder.
        internal: Flower's module of the SuperNode's loop.
        not_running: Flower's exception for a run that is over.
    """

    def __init__(self, state: Path, internal: Any, not_running: type[BaseException]) -> None:
        self.approvals = Approvals(state)
        self.worker_folder = private_folder(state / "worker")
        self.not_running = not_running
        self.get_run: Callable[[int], Any] | None = None
        self.run_id: int | None = None
        self.stopped: set[int] = set()
        self.moved = self.looked = time.monotonic()
        self._connect = internal.http_request_response
        self._pull = internal._pull_and_store_message
        self._push = internal._push_messages

    @contextmanager
    def connection(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        """Flower's connection to the server; an app that comes through it is marked for `verify`."""
        with self._connect(*args, **kwargs) as parts:
            node_id, receive, send, get_run, get_fab, *rest = parts
            self.get_run = get_run

            def marked(fab_hash: str, run_id: int) -> Any:
                return dataclasses.replace(get_fab(fab_hash, run_id), verifications={"valid_license": "site"})

            print("isocenter| connected", flush=True)  # noqa: T201 - read by `isocenter site start`
            yield (node_id, receive, send, get_run, marked, *rest)

    def pull(self, **kwargs: Any) -> int | None:
        """Take a message in, if there is one; its app is always to be verified."""
        run_id: int | None = self._pull(**{**kwargs, "trusted_entities": {"site": "approved"}})
        if run_id is not None:
            self.run_id, self.moved = run_id, time.monotonic()
        return run_id

    def push(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the answer and send it."""
        try:
            self._push(*args, **kwargs)
        finally:
            self.run_id, self.moved = None, time.monotonic()

    def verify(self, fab: Any, trusted_entities: object) -> bool:
        """Whether the site has approved exactly these bytes; if not, they are kept for its IT to read."""
        del trusted_entities
        if self.approvals.approves(fab.content):
            return True
        try:
            name = self.approvals.keep_pending(fab.content)
            print(f"isocenter| app {name} is not approved here: `isocenter site approve` shows it", flush=True)  # noqa: T201
        except (ApprovalError, OSError) as error:
            print(f"isocenter| an app was refused: {error}", flush=True)  # noqa: T201
        return False

    def sleep(self, seconds: float) -> None:
        """In place of Flower's pauses: shorter, and with a look at whether the run still runs."""
        now = time.monotonic()
        if self.run_id is None:
            time.sleep(BUSY_S if now - self.moved < RECENT_S else min(seconds, IDLE_S))
            return
        time.sleep(min(seconds, 0.05 if now - self.moved < 10 else BUSY_S))
        if now - self.looked > LOOK_S and self.get_run is not None:
            self.looked = now
            try:
                self.get_run(self.run_id)
            except self.not_running:
                self.give_up(self.run_id)
            except Exception:
                return  # the connection: Flower sees to it

    def give_up(self, run_id: int) -> None:
        """Have the worker stop what it does for a run that is over."""
        if run_id not in self.stopped:
            print("isocenter| the run was stopped", flush=True)  # noqa: T201
        # Whatever goes wrong here must not end the SuperNode; it is tried again.
        with suppress(OSError, SiteError):
            if (worker := connect(self.worker_folder)) is not None:
                worker.stop(run_id)
                worker.close()
        with suppress(OSError):
            if run_id not in self.stopped:
                mark_stopped(self.worker_folder, run_id)
        self.stopped.add(run_id)


class Clock:
    """Python's time, but for how long Flower pauses."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self.sleep = sleep

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def check_flower(internal: Any) -> None:
    """Refuse a Flower whose parts are not those that are replaced.

    Raises:
        StartError: it is another.
    """
    found = version("flwr")
    parts = (
        "http_request_response",
        "_pull_and_store_message",
        "_push_messages",
        "_verify_fab",
        "FAB_VERIFICATION_ERROR",
        "time",
    )
    if not found.startswith(f"{FLOWER}.") or not all(hasattr(internal, part) for part in parts):
        raise StartError(f"site: flwr must be {FLOWER}, got {found}. Install isocenter with its constraints.txt.")


def install(state: Path) -> Callable[[], None]:
    """Put the gate before Flower's SuperNode, and return the SuperNode's main function."""
    from flwr.app import Error
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal as internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    check_flower(internal)
    gate = Gate(state, internal, RunNotRunningException)
    replacements: dict[str, Any] = {
        "http_request_response": gate.connection,
        "_pull_and_store_message": gate.pull,
        "_push_messages": gate.push,
        "_verify_fab": gate.verify,
        "FAB_VERIFICATION_ERROR": Error(internal.FAB_VERIFICATION_ERROR.code, REFUSED),
        "time": Clock(gate.sleep),
    }
    for name, value in replacements.items():
        setattr(internal, name, value)
    return flower_supernode


def main() -> None:
    """``python -m client.supernode STATE`` and then what `flower-supernode` takes."""
    state = Path(sys.argv[1])
    sys.argv = ["flower-supernode", *sys.argv[2:]]
    install(state)()


if __name__ == "__main__":
    main()
