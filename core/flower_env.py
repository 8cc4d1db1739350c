"""How Flower's programs are found, started, asked and ended on any machine: without telemetry, without strays.

Flower detaches what it starts, and Ray's workers change their parent and their title. What all of them keep is the
environment they began with: a mark in it, read through /proc, finds them wherever they hang in the process tree.
"""

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

CONNECTION = "isocenter"
"""Name of the one SuperLink that a Flower home of ours knows."""

NO_INSTALL = "--disable-runtime-dependency-installation"

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray listens on every network interface and asks nobody for a password; where it expects no cluster, on loopback only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "COLUMNS": "1000",  # keeps Flower's sentences on one line
    # `flwr run` does not flush what it prints: through a pipe it would come in blocks of 8 kB.
    "PYTHONUNBUFFERED": "1",
    # Every piece of an array is a request of its own, which costs as much as to send 10 MB.
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(16 << 20),
}
"""What keeps Flower and Ray quiet, local and readable."""

_FOREIGN = {"RAY_ADDRESS", "RAY_NAMESPACE", "RAY_RUNTIME_ENV", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
"""Variables that would tie the run to a Ray cluster that is not ours."""

_MARK = "ISOCENTER_WORKPLACE"
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|[─│╭╮╰╯]+")
_ANSWER_S = 60.0  # for one short command: on a crowded machine Flower's imports alone take 10 s


def environment(folder: Path, flower_home: Path) -> dict[str, str]:
    """This process's environment for programs of Flower's, with `folder` as the mark that `processes` finds them by."""
    inherited = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1", "localhost"]))
    return {
        **inherited,
        **QUIET,
        "PATH": os.pathsep.join([str(_bin()), os.environ.get("PATH", os.defpath)]),  # Flower starts its parts by name.
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "FLWR_HOME": str(flower_home),
        _MARK: str(folder),
    }


def program(command: str) -> str:
    """The path of one of the programs that are installed next to this Python."""
    path = _bin() / command
    if not path.exists():
        raise ValueError(
            f"workplace: {command} must be installed next to Python, got nothing at {str(path)!r}. "
            "Install isocenter into this Python's environment."
        )
    return str(path)


def write_connection(flower_home: Path, superlink: str) -> None:
    """Let the `flwr` commands of a home know one SuperLink, given as the TOML lines of its connection."""
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{superlink}\n'
    (flower_home / "config.toml").write_text(text, encoding="utf-8")


def ask_flower(arguments: tuple[str, ...], *, cwd: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """The JSON answer of a short `flwr` command; `{"success": False, ...}` with its text when it gave none."""
    command = [program("flwr"), *arguments, "--format", "json"]
    quietly: dict[str, Any] = {"cwd": cwd, "env": env, "stdin": subprocess.DEVNULL, "start_new_session": True}
    try:
        done = subprocess.run(command, **quietly, capture_output=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired as error:
        return {"success": False, "error-message": str(error)}
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"success": False, "error-message": plain((done.stdout + done.stderr).decode(errors="replace")).strip()}
    return answer


def plain(text: str) -> str:
    """The text without terminal colours and frames."""
    return _DECORATION.sub("", text)


def healthy(port: int, ca_certificate: Path | None) -> bool:
    """Whether a program of Flower's answers at 127.0.0.1:`port`, over TLS where it is told who signed its certificate."""
    if ca_certificate is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    else:
        context = ssl.create_default_context(cafile=ca_certificate)
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    with closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False


def free_port() -> int:
    """A port that nothing listens on at 127.0.0.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def processes(folder: Path) -> list[int]:
    """The living processes that were started, directly or not, with this folder as their mark."""
    mark = f"{_MARK}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # Those of other people cannot be read and those that end meanwhile are gone: neither is ours.
        with suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def end_processes(folder: Path, grace_s: float) -> None:
    """Stop every process that `processes` finds: ask, wait, then kill."""
    asked = time.monotonic()
    for pid in processes(folder):
        _send(pid, signal.SIGTERM)
    while remaining := processes(folder):
        waited = time.monotonic() - asked
        if waited > grace_s + 60:
            raise RuntimeError(f"stop: processes {remaining} outlive SIGKILL. End them by hand.")
        if waited > grace_s:
            for pid in remaining:
                _send(pid, signal.SIGKILL)
        time.sleep(0.05)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _bin() -> Path:
    return Path(sys.executable).parent
