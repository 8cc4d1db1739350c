"""Start `flwr run` and tell the truth about how it ended.

`flwr run` exits 0 for a run that failed, leaves a SuperLink behind, reuses whichever one is already there (with its
working folder and environment), installs dependencies while it runs and can wait for ever. `simulate` therefore gives
every run its own SuperLink, home and port in a temporary folder, asks Flower how the run ended, and leaves nothing behind.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO

from core.flower_env import CONNECTION, NO_INSTALL, plain
from simulations.workplace import (
    StartError,
    Workplace,
    ask,
    connect,
    follow,
    free_ports,
    start,
    wait_until_healthy,
    workplace,
)

PROGRESS_MARKER = "isocenter| "
"""What the server's log lines for people begin with, in the stream of everything a run prints."""

_STARTED = re.compile(r"Successfully started run (\d+)")
_NO_HEARTBEAT = "No heartbeat received"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: Flower's number of the run; None when it was never accepted.
        status: Flower's words (`finished:completed`, `finished:failed`, ...), or ours: `not started` (no SuperLink),
            `refused` (Flower did not take the run), `deadline` (stopped by us), `lost` (the SuperLink or the run's process at
            the server went away).
        details: The reason; empty for a run that completed.
        seconds: From the call to the end of the run.
    """

    run_id: str | None
    status: str
    details: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the run completed; nothing else counts as success."""
        return self.status == "finished:completed"

    @property
    def broke_off(self) -> bool:
        """Whether the server's side of the run ended without a word, as by a crash or a reboot: the run itself did not fail."""
        return self.status == "lost" or _NO_HEARTBEAT in self.details


def progress_line(line: str) -> str | None:
    """The message of a line that the server logged for people, None for every other line.

    >>> progress_line("isocenter| round 3 of 20")
    'round 3 of 20'
    >>> progress_line("INFO :      Starting Flower Simulation") is None
    True
    """
    line = plain(line).rstrip()
    return line.removeprefix(PROGRESS_MARKER) if line.startswith(PROGRESS_MARKER) else None


def choose_resources(num_sites: int) -> tuple[int, float]:
    """How many virtual sites work at once on this machine, and the share of a GPU that each one needs.

    One site a core. With GPUs the sites are spread evenly over them.

    Returns:
        `clients_at_once` (at least 1) and `gpus_per_client` (0.0 without a GPU, 1.0 when each has its own).
    """
    if num_sites < 1:
        raise ValueError(f"choose_resources: num_sites must be at least 1, got {num_sites}. Name the sites of the run.")
    import torch  # not before it is asked for: it costs seconds and hundreds of megabytes

    at_once = min(num_sites, len(os.sched_getaffinity(0)))
    return at_once, gpu_share(at_once, torch.cuda.device_count())


def gpu_share(clients: int, gpus: int) -> float:
    """The largest fraction of one GPU with which `clients` fit on `gpus`, rounded down to Ray's steps of 0.0001.

    >>> gpu_share(6, 1), gpu_share(3, 2), gpu_share(2, 8), gpu_share(4, 0)
    (0.1666, 0.5, 1.0, 0.0)
    """
    return math.floor(10_000 / math.ceil(clients / gpus)) / 10_000 if gpus else 0.0


def simulate(
    app: Path,
    *,
    overrides: str,
    num_sites: int,
    log_path: Path,
    deadline_s: float,
    clients_at_once: int,
    gpus_per_client: float = 0.0,
    on_line: Callable[[str], None],
    env: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Run the app with virtual sites on this machine, in a SuperLink of its own that is gone afterwards.

    Args:
        app: The folder with the pyproject.toml of the app.
        overrides: The app's one run-config value, Hydra overrides separated by spaces.
        num_sites: Number of virtual sites.
        log_path: Receives everything the run prints; overwritten.
        deadline_s: The run is stopped after so many seconds, whatever it waits for.
        clients_at_once: Sites that work at the same time, one core each.
        gpus_per_client: Share of a GPU that each of them reserves.
        on_line: Called with each line the server logs for people, without its marker, about a second later.
        env: Environment variables on top of this process's.

    Returns:
        How the run ended. Ctrl-C and SIGTERM are raised, after everything was stopped.

    Raises:
        ValueError: An argument that no run can have.
    """
    for name, value in (("num_sites", num_sites), ("clients_at_once", clients_at_once)):
        if value < 1:
            raise ValueError(f"simulate: {name} must be at least 1, got {value}. `choose_resources` knows good values.")
    began = time.monotonic()
    federation = (
        f"num-supernodes={num_sites} client-resources-num-cpus=1 client-resources-num-gpus={float(gpus_per_client)} "
        f"init-args-num-cpus={clients_at_once}"
    )
    with workplace(env) as place, open_log(log_path) as log:
        [port] = free_ports(1)
        arguments = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port), NO_INSTALL]
        superlink = start(place, "flower-superlink", arguments)
        try:
            wait_until_healthy(superlink, port, began + deadline_s)
        except StartError as error:
            return Outcome(None, "not started", str(error), time.monotonic() - began)
        connect(place, f'address = "127.0.0.1:{port}"\ninsecure = true')
        outcome = submit(
            place,
            app,
            overrides=overrides,
            log=log,
            deadline_s=began + deadline_s - time.monotonic(),
            on_line=on_line,
            options=["--federation-config", federation],
        )
        if not outcome.ok:
            log.write(f"\nThe SuperLink wrote:\n{superlink.log()}\n")
    return replace(outcome, seconds=time.monotonic() - began)


def submit(
    place: Workplace,
    app: Path,
    *,
    overrides: str,
    log: IO[str],
    deadline_s: float,
    on_line: Callable[[str], None],
    options: Sequence[str] = (),
    gone: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Send the app to the SuperLink that the workplace is connected to, follow it to its end, and ask how it ended.

    Args:
        place: A workplace after `connect`.
        app: The folder with the pyproject.toml of the app.
        overrides: The app's one run-config value.
        log: Receives everything the run prints.
        deadline_s: Nothing is waited for any longer than this.
        on_line: Called with each line the server logs for people.
        options: Further options of `flwr run`.
        gone: Whether the run's process at the server ended without a word, which Flower itself takes a minute to notice; asked
            about once a second, in another thread.
    """
    began = time.monotonic()
    config = place.folder / "run.toml"
    config.write_text(f"overrides = {json.dumps(overrides, ensure_ascii=False)}\n", encoding="utf-8")
    run_id, before_run, last = None, [], "none"
    command = ["run", str(app.resolve()), CONNECTION, "--stream", "--run-config", str(config), *options]
    with closing(follow(place, command, deadline_s, gone)) as lines:
        for line in lines:
            log.write(line + "\n")
            if message := progress_line(line):
                on_line(message)
            last = message or line or last
            if run_id is None:
                before_run.append(line)
                run_id = found[1] if (found := _STARTED.search(line)) else None

    def ended(status: str, details: str) -> Outcome:
        return Outcome(run_id, status, details, time.monotonic() - began)

    while time.monotonic() - began < deadline_s:
        if run_id is None:
            return ended("refused", " ".join(" ".join(before_run).split()) or "`flwr run` ended without a word.")
        answer = ask(place, "ls", CONNECTION, "--run-id", run_id)
        if not answer.get("success"):
            return ended("lost", f"`flwr ls` cannot tell how run {run_id} ended: {answer}")
        [run] = answer["runs"]
        if run["status"].startswith("finished"):
            return ended(run["status"], "" if run["status-details"] == "N/A" else run["status-details"])
        if gone():
            stop_run(place, run_id)
            return ended("lost", "The run's process at the server ended without a word.")
        time.sleep(1)
    return ended("deadline", f"Stopped at the deadline, after {deadline_s:.0f} s. The last line of the run: {last}")


def stop_run(place: Workplace, run_id: str) -> None:
    """Have Flower take a run for over, so that the sites give up what they do for it; nothing happens where it is."""
    ask(place, "stop", run_id, CONNECTION)


@contextmanager
def open_log(path: Path) -> Iterator[IO[str]]:
    """A new log file that can be followed line by line; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", buffering=1) as log:
        yield log
