"""A short-lived folder to start Flower's programs from, which leaves nothing behind: no process, no file, no setting."""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from core.flower_env import ask_flower, end_processes, environment, healthy, plain, program, write_connection

_LONGEST_FOLDER = 36  # Ray's sockets lie about 68 characters deeper, and the path of a Unix socket ends at 107.
_QUICK = {
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    # Workers started ahead of the actors, and metrics, are never used and cost a quarter of a short run's CPU time.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "OMP_NUM_THREADS": "1",
}
"""What makes many short runs on few cores quick."""


LOOK_S = 1.0
"""Between two looks at whether a command that is followed is over."""


class StartError(RuntimeError):
    """A Flower program did not come up; the text ends with what it wrote last."""


@dataclass(frozen=True)
class Program:
    """A Flower program that runs in the background."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def log(self) -> str:
        """What it has written so far, without colours."""
        return plain(self.log_path.read_text(encoding="utf-8", errors="replace"))

    def check_alive(self) -> None:
        """Raise StartError when it has ended."""
        if (code := self.process.poll()) is not None:
            raise StartError(f"{self.name} ended with exit code {code}. It wrote:\n{self.log()}")


@dataclass(frozen=True)
class Workplace:
    """A temporary folder from which Flower's programs are started, the environment they start in, and what started."""

    folder: Path
    environment: Mapping[str, str]
    programs: list[Program] = field(default_factory=list)


@contextmanager
def workplace(env: Mapping[str, str] = MappingProxyType({}), grace_s: float = 0.5) -> Iterator[Workplace]:
    """A workplace; on leaving it, all that was started from it is stopped and it is removed.

    Holds also when leaving by Ctrl-C, SIGTERM or SIGHUP (both raised as SystemExit) or any exception.

    Args:
        env: Environment variables on top of this process's and those that keep Flower and Ray quiet and local.
        grace_s: Time between asking the processes to end and killing them.

    Raises:
        ValueError: This system or its temporary folder cannot be used.
    """
    if not Path("/proc/self/environ").exists():
        raise ValueError(
            f"workplace: the system must be Linux (what a run leaves behind is found through /proc), got {sys.platform!r}. "
            "Use a Linux machine or container."
        )
    folder = Path(tempfile.mkdtemp(prefix="iso-")).resolve()
    try:
        if len(str(folder)) > _LONGEST_FOLDER:
            raise ValueError(
                f"workplace: the temporary folder must be at most {_LONGEST_FOLDER} characters long (Ray's sockets lie in "
                f"it), got {str(folder)!r}. Set TMPDIR to a short folder at the root of a disk."
            )
        (folder / "cwd").mkdir()
        place = Workplace(folder, _environment(folder, env))
        with _handled(_leave, [number for number in (signal.SIGTERM, signal.SIGHUP) if _is_default(number)]):
            try:
                yield place
            finally:
                # An impatient second Ctrl-C does not interrupt the tidying up.
                with _handled(signal.SIG_IGN, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]):
                    stop(place, grace_s)
    finally:
        shutil.rmtree(folder)


def start(
    place: Workplace,
    command: str,
    arguments: Sequence[str],
    name: str | None = None,
    env: Mapping[str, str] = MappingProxyType({}),
) -> Program:
    """Start one of Flower's programs in the background, in an empty folder and in a session of its own.

    Args:
        place: Where it belongs; it is stopped when the workplace is left.
        command: `flower-superlink` or `flower-supernode`.
        arguments: Its arguments.
        name: Tells two of a kind apart; the command by default.
        env: Environment variables on top of the workplace's.
    """
    name = name or command
    log_path = place.folder / f"{name}.log"
    options = _quietly(place, env)
    with log_path.open("wb") as log:
        process = subprocess.Popen([program(command), *arguments], **options, stdout=log, stderr=subprocess.STDOUT)
    place.programs.append(Program(name, process, log_path))
    return place.programs[-1]


def wait_until_healthy(program: Program, port: int, deadline: float, ca_certificate: Path | None = None) -> None:
    """Wait until the program answers at 127.0.0.1:`port`.

    Args:
        program: What was started.
        port: Where it was told to listen.
        deadline: On `time.monotonic()`.
        ca_certificate: For TLS, who must have signed its certificate.

    Raises:
        StartError: It ended, or did not answer in time.
    """
    while not healthy(port, ca_certificate):
        program.check_alive()
        if time.monotonic() > deadline:
            raise StartError(f"{program.name} did not answer before the deadline. It wrote:\n{program.log()}")
        time.sleep(0.05)
    program.check_alive()  # else the answer came from a stranger who took the port first


def connect(place: Workplace, superlink: str) -> None:
    """Let the workplace's `flwr` commands know one SuperLink, given as the TOML lines of its connection."""
    write_connection(place.folder, superlink)


def follow(
    place: Workplace, arguments: Sequence[str], deadline_s: float, over: Callable[[], bool] = lambda: False
) -> Generator[str]:
    """The lines that a `flwr` command prints, without colours, until it ends or is killed: at the deadline, or when it is over.

    Args:
        place: where it is started.
        arguments: the command's.
        deadline_s: seconds after which it is killed.
        over: asked about once a second, in another thread, whether there is nothing to wait for any more.
    """
    command = [program("flwr"), *arguments]
    with subprocess.Popen(command, **_quietly(place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        deadline, left = time.monotonic() + deadline_s, threading.Event()

        def guard() -> None:
            while not left.wait(max(0.0, min(LOOK_S, deadline - time.monotonic()))):
                if time.monotonic() >= deadline or over():
                    process.kill()
                    return

        guardian = threading.Thread(target=guard, daemon=True)
        guardian.start()
        try:
            for line in process.stdout:
                yield plain(line.decode(errors="replace")).rstrip()
        finally:
            left.set()
            guardian.join()
            process.kill()


def ask(place: Workplace, *arguments: str) -> dict[str, Any]:
    """The JSON answer of a short `flwr` command; `{"success": False, ...}` with its text when it gave none."""
    return ask_flower(arguments, cwd=place.folder / "cwd", env=place.environment)


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on at 127.0.0.1."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def stop(place: Workplace, grace_s: float) -> None:
    """Stop every process started from this workplace, directly or not: ask, wait, then kill."""
    end_processes(place.folder, grace_s)
    for each in place.programs:
        each.process.wait()


def _environment(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    return {**environment(folder, flower_home=folder), **_QUICK, "RAY_TMPDIR": str(folder), **env}


def _quietly(place: Workplace, env: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    return {
        "cwd": place.folder / "cwd",  # empty: Ray's workers would import our modules from there before the app's
        "env": {**place.environment, **env},
        "stdin": subprocess.DEVNULL,
        "start_new_session": True,  # Ctrl-C in the terminal is for us alone.
    }


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any] | signal.Handlers, numbers: list[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread only.
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _is_default(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_DFL  # not ignored (nohup) and not handled by our caller


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
