"""The site's warm worker, seen from outside: found or started, asked, replaced when it is lost or hangs.

Flower starts a process for every message: importing torch, building the model, opening the cache and the GPU would cost seconds
each time. The worker (`client.worker`) is one process of the site that keeps all that from message to message. It is reached over
a socket in a folder that only the site's user may enter, runs the code of one app only, and ends with the process that it works
for: the site's SuperNode.
"""

import fcntl
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from client.jobs import PROTOCOL, Job, receive, send
from client.state import private_folder, state_folder
from core.faults import SiteError
from core.service import leave_running

ROOT = Path(__file__).parents[1]
SOCKET, LOCK, ALIVE, STOPPED, LOG = "socket", "lock", "alive", "stopped", "worker.log"
START_S, HELLO_S, END_S = 120.0, 10.0, 10.0
BEAT_S = 2.0
SILENCE_S = 60.0  # without a beat, a worker is taken for frozen
PATIENCE_S = 3600.0  # without progress, a worker is taken for hung
LONGEST_LOG = 20 << 20
OTHER_PROTOCOL = "its isocenter and the app must be of versions that understand each other, they are not; install the app's."

log = logging.getLogger("isocenter")


@dataclass(frozen=True)
class Asker:
    """Whom a worker works for.

    Attributes:
        code: folder of the app's code, which it runs.
        owner: the process that it ends with.
        on_beat: called every few seconds while it works.
    """

    code: Path
    owner: int
    on_beat: Callable[[], None] = lambda: None

    @classmethod
    def this_app(cls) -> "Asker":
        """The app that asks, in a process that Flower started for one message: its parent lasts as long as the SuperNode."""
        return cls(ROOT, os.getppid())


class WorkerLostError(Exception):
    """The worker ended, or stopped responding, in the middle of a task."""


def patience_s(node_config: Mapping[str, object]) -> float:
    """How long a worker may be without progress before it is taken for hung.

    Raises:
        SiteError: it is no positive number.
    """
    told = node_config.get("worker-patience-s", PATIENCE_S)
    if isinstance(told, bool) or not isinstance(told, int | float) or not told > 0:
        raise SiteError("node_config", "worker-patience-s must be a positive number of seconds.")
    return float(told)


def ask_worker(job: Job, asker: Asker) -> RecordDict:
    """Have the worker carry a task out: the one that runs, or a new one; one that is lost on the way is replaced, once.

    Raises:
        SiteError: the task failed, or the worker was lost twice, or there can be none.
    """
    try:
        return _ask_worker(job, asker)
    except OSError:
        log.exception("the site's worker")
        raise SiteError("worker", "its worker could not be started; see the site's local log.") from None


def _ask_worker(job: Job, asker: Asker) -> RecordDict:
    patience_s(job.node_config)
    flower = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))
    state = state_folder(job.node_config) or flower / "isocenter" / str(job.node_config.get("site", "site"))
    folder = private_folder(private_folder(state) / "worker")
    for attempt in (1, 2):
        with _alone(folder):
            worker = connect(folder)
            if worker is not None and (worker.root, worker.owner, worker.protocol) != (str(asker.code), asker.owner, PROTOCOL):
                worker.kill()
                worker.close()
                worker = None
            worker = worker or start(folder, asker)
        try:
            return worker.carry_out(job, asker.on_beat)
        except WorkerLostError as error:
            log.warning("the site's worker %s", error)
            worker.kill()
            if is_stopped(folder, job.run_id):
                raise SiteError("stopped", "the run was stopped.") from None
            if attempt == 2:
                raise SiteError("worker", f"its worker {error} twice on the same task; see the site's local log.") from None
        finally:
            worker.close()
    raise AssertionError("unreachable")


@dataclass
class Worker:
    """A connection to the worker.

    Attributes:
        connection: the socket.
        pid: its process.
        handle: of that process, which no later one of the same number can be taken for.
        root: folder of the code that it runs.
        owner: the process it ends with.
        protocol: how it speaks.
    """

    connection: socket.socket
    pid: int
    handle: int
    root: str
    owner: int
    protocol: int = PROTOCOL

    def carry_out(self, job: Job, on_beat: Callable[[], None] = lambda: None) -> RecordDict:
        """Send a task and wait for its answer, as long as the worker lives and makes progress.

        Raises:
            SiteError: what the task failed with.
            WorkerLostError: the worker ended or hangs.
        """
        about = {
            "job": job.message_type,
            "run_id": job.run_id,
            "node_config": dict(job.node_config),
            "run_config": dict(job.run_config),
        }
        limit = patience_s(job.node_config)
        self.connection.settimeout(SILENCE_S)
        try:
            send(self.connection, about, received=job.received)
            while (message := receive(self.connection)) is not None:
                told, records = message
                if "answer" in told:
                    return records["answer"]
                if "fault" in told:
                    raise SiteError(*told["fault"])
                if told["quiet_s"] > limit:
                    raise WorkerLostError("made no progress")
                on_beat()
        except TimeoutError:
            raise WorkerLostError("stopped responding") from None
        except (OSError, ValueError, KeyError):
            log.exception("what the site's worker says")
        raise WorkerLostError("ended")

    def stop(self, run_id: int) -> None:
        """Have it give up what it does for a run."""
        with suppress(OSError):
            send(self.connection, {"stop": run_id})
            receive(self.connection)

    def kill(self) -> None:
        """End it at once, and see that it has ended."""
        _end(self.handle)

    def close(self) -> None:
        """Leave it alone from now on."""
        if self.handle >= 0:
            os.close(self.handle)
        self.connection.close()
        self.handle = -1


def _end(handle: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    select.select([handle], [], [], END_S)


def end_other(folder: Path) -> None:
    """End a worker of this folder that lives and does not answer, so that there are never two.

    Raises:
        TimeoutError: it does not end.
    """
    deadline = time.monotonic() + END_S
    with (folder / ALIVE).open("a+", encoding="ascii") as alive:
        while not held(alive.fileno()):
            alive.seek(0)
            with suppress(ValueError, ProcessLookupError):
                handle = os.pidfd_open(int(alive.read()))
                _end(handle)
                os.close(handle)
            if time.monotonic() > deadline:
                raise TimeoutError("an earlier worker does not end")
            time.sleep(0.02)


def held(descriptor: int) -> bool:
    """Take a lock that a process holds for as long as it lives or the file is open; False where another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def connect(folder: Path) -> Worker | None:
    """A connection to the worker of this folder; None where none answers.

    Raises:
        SiteError: who answers is another user's process.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(HELLO_S)
    handle = -1
    try:
        with socket_path(folder) as path:
            connection.connect(path)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        if uid != os.getuid():
            connection.close()
            raise SiteError("state", "the site's worker must be its user's own, another user's process answers; see its log.")
        handle = os.pidfd_open(pid)
        if (hello := receive(connection)) is not None:
            told, _ = hello
            return Worker(connection, pid, handle, told["root"], told["owner"], told.get("protocol", 0))
    except (OSError, ValueError, KeyError):
        pass
    if handle >= 0:
        os.close(handle)
    connection.close()
    return None


@contextmanager
def socket_path(folder: Path) -> Iterator[str]:
    """A path to the socket in a folder that is short enough for a socket (107 bytes), wherever the folder lies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def start(folder: Path, asker: Asker) -> Worker:
    """Start a worker, and connect to it.

    Raises:
        SiteError: it did not come up.
    """
    end_other(folder)
    log_path = folder / LOG
    if log_path.exists() and log_path.stat().st_size > LONGEST_LOG:
        log_path.replace(log_path.with_suffix(".log.1"))
    command = [sys.executable, "-P", "-m", "client.worker", str(folder), "--owner", str(asker.owner)]
    # The worker must run the code of the app, wherever that was put.
    environment = {**os.environ, "PYTHONPATH": str(asker.code), "PYTHONUNBUFFERED": "1"}
    with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as local_log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=local_log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    leave_running(process)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        worker = connect(folder)
        if worker is not None:
            if worker.pid == process.pid and worker.protocol == PROTOCOL:
                return worker
            worker.close()
            if worker.protocol != PROTOCOL:
                process.kill()
                raise SiteError("worker", OTHER_PROTOCOL)
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise SiteError("worker", "its worker did not start; see the site's local log.")


def mark_stopped(folder: Path, run_id: int) -> None:
    """Note that a run is over, so that no worker takes up its tasks again."""
    if is_stopped(folder, run_id):
        return
    with (folder / STOPPED).open("a", encoding="ascii") as file:
        file.write(f"{run_id}\n")


def is_stopped(folder: Path, run_id: int) -> bool:
    """Whether a run was noted to be over."""
    path = folder / STOPPED
    return path.exists() and str(run_id) in path.read_text(encoding="ascii").split()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time looks for a worker and starts one."""
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
