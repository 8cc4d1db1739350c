"""The site's warm worker: one process that keeps torch, the device, the scans and the run's memory from task to task.

Started by `client.warm`, never by hand. Tasks come over a socket in the folder it is given, one at a time, and are carried out in
the main thread; another thread tells each asker every two seconds that it lives and how long ago it last made progress.
"""

import argparse
import json
import logging
import os
import queue
import select
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from client.jobs import LENGTH, PROTOCOL, Job, decode_head, decoded, encode, receive, send
from client.state import STATUS, private_folder
from client.warm import ALIVE, BEAT_S, ROOT, held, is_stopped, mark_stopped, socket_path
from core import progress
from core.faults import SiteError, incident
from core.files import write_atomically

log = logging.getLogger("isocenter")

IDLE_S = 3600.0  # without a task for so long, it ends and gives its memory back


@dataclass
class Order:
    """A task that came in, and what became of it."""

    about: dict[str, Any]
    received: RecordDict
    done: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    answer: RecordDict | None = None
    fault: tuple[str, str] | None = None


class Memory:
    """What the site keeps for a run, in memory and on the site's disk, so that neither a new worker nor a reboot loses it.

    Only one run's is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id: int | None = None
        self.records = RecordDict()
        self._saved: dict[str, object] = {}

    def of(self, run_id: int) -> RecordDict:
        """The run's records; those of another run are dropped."""
        if run_id != self.run_id:
            path = self.folder / str(run_id)
            self.records = self._load(path) if path.exists() else RecordDict()
            self.run_id = run_id
            self._saved = dict(self.records)
            for other in self.folder.iterdir() if self.folder.exists() else ():
                if other != path:
                    other.unlink()
        return self.records

    def save(self) -> None:
        """Keep the records on disk where they have changed."""
        same = self._saved.keys() == self.records.keys() and all(self._saved[name] is self.records[name] for name in self._saved)
        if not same:
            write_atomically(self.folder / str(self.run_id), b"".join(encode({}, memory=self.records)), 0o600)
            self._saved = dict(self.records)

    @staticmethod
    def _load(path: Path) -> RecordDict:
        """What was kept; nothing where that was damaged, and then the server tells it again, as to a site started anew."""
        data = path.read_bytes()
        try:
            size = int.from_bytes(data[:LENGTH], "big")
            _, described, lengths = decode_head(data[LENGTH : LENGTH + size])
            parts, at = [], LENGTH + size
            for length in lengths:
                parts.append(data[at : at + length])
                at += length
            if at != len(data):
                raise ValueError(f"{len(data)} bytes in place of {at}")
            return decoded(described, iter(parts))["memory"]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            log.warning("what was kept for the run cannot be read and is left: %s", error)
            return RecordDict()


class Server:
    """Takes tasks in and carries them out.

    Args:
        folder: holds the socket; its parent is the site's state folder.
        owner: the process that this one ends with.
    """

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder, self.owner = folder, owner
        self.orders: queue.Queue[Order] = queue.Queue()
        self.memory = Memory(private_folder(folder.parent / "memory"))
        self.current: Order | None = None
        self.moved = time.monotonic()
        self.told = 0.0
        self.status: dict[str, Any] = {}

    def run(self) -> None:
        """Serve until nobody has asked for long."""
        listener = socket.socket(socket.AF_UNIX)
        with socket_path(self.folder) as path:
            Path(path).unlink(missing_ok=True)
            mask = os.umask(0o177)
            listener.bind(path)
            os.umask(mask)
        listener.listen(16)
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
        import client.tasks  # noqa: F401 - torch and MONAI, while the first task is on its way

        while True:
            try:
                order = self.orders.get(timeout=IDLE_S)
            except queue.Empty:
                return
            self.serve(order)

    def accept(self, listener: socket.socket) -> None:
        """A thread for each asker."""
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self.converse, args=(connection,), daemon=True).start()

    def converse(self, connection: socket.socket) -> None:
        """Say who this is, take a task, tell that it goes on, answer."""
        with connection, suppress(OSError):
            send(connection, {"protocol": PROTOCOL, "root": str(ROOT), "owner": self.owner})
            while (message := receive(connection)) is not None:
                about, records = message
                if "stop" in about:
                    self.give_up(about["stop"])
                    send(connection, {})
                    continue
                order = Order(about, records["received"])
                self.moved = time.monotonic()
                self.orders.put(order)
                try:
                    while not order.done.wait(BEAT_S):
                        send(connection, {"quiet_s": time.monotonic() - self.moved})
                except OSError:
                    order.given_up.set()
                    return
                if order.fault is not None:
                    send(connection, {"fault": order.fault})
                else:
                    assert order.answer is not None
                    send(connection, {"answer": True}, answer=order.answer)

    def give_up(self, run_id: int) -> None:
        """End what is done for a run at the next sign of progress, and take up nothing of it any more."""
        current = self.current
        if current is not None and current.about["run_id"] == run_id:
            current.given_up.set()
        mark_stopped(self.folder, run_id)

    def serve(self, order: Order) -> None:
        """Carry a task out in this thread."""
        from client.tasks import carry_out

        about = order.about
        self.current, self.moved = order, time.monotonic()
        try:
            if order.given_up.is_set() or is_stopped(self.folder, about["run_id"]):
                raise SiteError("stopped", "the run was stopped.")
            job = Job(
                message_type=about["job"],
                received=order.received,
                node_config=about["node_config"],
                run_config=about["run_config"],
                run_id=about["run_id"],
                memory=self.memory.of(about["run_id"]),
            )
            self.status = begun(job)
            self.write_status()
            with progress.watched(lambda step: self.step(order, step)):
                order.answer = carry_out(job)
            self.memory.save()
        except SiteError as error:
            order.fault = (error.kind, error.text)
        except OSError:
            log.exception("what the site keeps for the run")
            order.fault = ("disk", "its disk must take what the site keeps for the run, it does not; see the site's local log.")
        except Exception:
            fault = incident()
            order.fault = (fault.kind, fault.text)
        finally:
            self.current = None
            self.status = {**self.status, "task": "", "ended": now()}
            self.write_status()
            order.done.set()

    def step(self, order: Order, step: progress.Step) -> None:
        """Note progress; end the task when the run is over or the asker has gone."""
        self.moved = time.monotonic()
        if order.given_up.is_set():
            raise SiteError("stopped", "the run was stopped.")
        if self.moved - self.told > 1:
            self.status |= {"what": step.what, "done": step.done, "total": step.total}
            self.write_status()

    def write_status(self) -> None:
        """Tell ``isocenter site status`` how far it is; nothing that goes wrong with that matters to a run."""
        self.told = time.monotonic()
        text = json.dumps({**self.status, "pid": os.getpid(), "told": now()})
        with suppress(OSError):
            write_atomically(self.folder.parent / STATUS, text.encode(), 0o600)


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def begun(job: Job) -> dict[str, Any]:
    """What is told about a task when it begins."""
    about = dict(job.received.config_records.get("config", ConfigRecord()))
    known: dict[str, Any] = {name: about[name] for name in ("round", "stage") if name in about}
    return {"run": job.run_id, "task": job.message_type, "began": now(), **known}


def end_with(owner: int) -> None:
    """End this process when its owner ends."""
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(0)

    def wait() -> None:
        select.select([descriptor], [], [])
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Read the arguments, tidy up after an earlier worker, serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--owner", type=int, required=True)
    arguments = parser.parse_args()
    end_with(arguments.owner)
    alive = (arguments.folder / ALIVE).open("a+", encoding="ascii")
    if not held(alive.fileno()):
        sys.exit("another worker of this site lives")
    alive.truncate(0)
    alive.write(str(os.getpid()))
    alive.flush()
    for left in arguments.folder.parent.glob(f".{STATUS}.*"):
        left.unlink(missing_ok=True)
    Server(arguments.folder, arguments.owner).run()


if __name__ == "__main__":
    main()
