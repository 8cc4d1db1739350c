"""A long-running process that other commands find, look at and stop: one at a time from a folder, until it is told to end."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from core.files import write_atomically


@dataclass(frozen=True)
class Service:
    """A process by the folder of its state.

    Attributes:
        name: what it is called to people, ``server`` or ``site``.
        state: the folder, for its owner's eyes alone.
    """

    name: str
    state: Path

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be that process.

        Raises:
            ValueError: another is.
        """
        try:
            with self._lock().acquire(timeout=0):
                write_atomically(self.state / f"{self.name}.pid", str(os.getpid()).encode(), 0o600)
                yield
        except Timeout:
            raise ValueError(self.runs_already) from None

    @property
    def runs_already(self) -> str:
        """The sentence that says so."""
        return f"{self.name}: one process must run from a kit, got one that runs already. Stop it first."

    def is_running(self) -> bool:
        """Whether it runs on this machine."""
        if not self.state.is_dir():
            return False
        try:
            with self._lock().acquire(timeout=0):
                return False
        except Timeout:
            return True

    def stop(self, wait_s: float = 60.0) -> bool:
        """Ask it to end, and wait until it has; False where none runs.

        Raises:
            ValueError: it does not end.
        """
        lock = self._lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            os.kill(int((self.state / f"{self.name}.pid").read_text()), signal.SIGTERM)
            try:
                lock.acquire(timeout=wait_s)
            except Timeout:
                raise ValueError(f"{self.name}: it must stop within {wait_s:.0f} s, got one that still runs. Kill it.") from None
            lock.release()
            return True
        lock.release()
        return False

    def _lock(self) -> FileLock:
        self.state.mkdir(mode=0o700, exist_ok=True)
        return FileLock(self.state / f"{self.name}.lock", mode=0o600)


_background: list[subprocess.Popen[bytes]] = []


def leave_running(process: subprocess.Popen[bytes]) -> None:
    """Let a process outlive this one; those that have ended meanwhile are forgotten."""
    # Forgotten while it runs, Python would warn.
    _background[:] = [other for other in _background if other.poll() is None] + [process]


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, instead of what they do."""
    stopping = threading.Event()

    def told(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
