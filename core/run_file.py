"""``run.json``: what a run was started with, from its beginning, so that it can be gone on with as the same run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from filelock import FileLock, Timeout

from core import __version__
from core.files import write_atomically

RUN_FILE = "run.json"
LOCK = "resume/lock"
"""What the server that works in a run's folder holds."""
MAY_CHANGE = frozenset(
    {
        "strategy.round_timeout_s",
        "strategy.wait_for_sites_s",
        "strategy.deadline_factor",
        "strategy.deadline_floor_s",
        "strategy.keep_checkpoints",
        "strategy.max_message_mb",
    }
)
"""Keys that may differ when a run is gone on with: how long to wait, what to keep, no weight. A limit may be why it stopped."""


def versions() -> dict[str, str]:
    """Of what the bits of the weights depend on."""
    return {
        "isocenter": __version__,
        "python": python_version(),
        "torch": version("torch"),
        "flwr": version("flwr"),
    }


@dataclass(frozen=True)
class RunFile:
    """What a run was started with.

    Attributes:
        overrides: as given, in one text that a shell would split.
        config: the configuration as `core.config.describe` tells it.
        code: fingerprint of the code.
        versions: of `versions`.
        resumed: how often it was gone on with.
    """

    overrides: str
    config: dict[str, Any]
    code: str
    versions: dict[str, str] = field(default_factory=versions)
    resumed: int = 0


def write_run(folder: Path, run: RunFile) -> None:
    """Write ``run.json`` into a run's folder, which is made."""
    write_atomically(folder / RUN_FILE, (json.dumps({"format": 1, **asdict(run)}, indent=1) + "\n").encode())


def read_run(folder: Path) -> RunFile:
    """What the run in a folder was started with.

    Raises:
        ValueError: the folder holds no run's file, or one that cannot be read.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(f"run {folder.name}: its folder must hold {RUN_FILE} to be gone on with, it does not. Start it anew.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        config, numbers = dict(told["config"]), {str(name): str(number) for name, number in told["versions"].items()}
        return RunFile(str(told["overrides"]), config, str(told["code"]), numbers, int(told["resumed"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"run {folder.name}: {RUN_FILE} must be as a run writes it, it was changed. Start the run anew under another name."
        ) from None


def is_worked_in(folder: Path) -> bool:
    """Whether a server on this machine works in a run's folder."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """The dotted keys in which two configurations, ready for JSON, are different.

    >>> differing_keys({"seed": 0, "data": {"name": "a", "mask": None}}, {"seed": 1, "data": {"name": "a"}})
    ['data.mask', 'seed']
    """
    keys: list[str] = []
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            keys += differing_keys(one, other, f"{within}{key}.")
        elif (key in before) != (key in now) or _plain(one) != _plain(other):
            keys.append(f"{within}{key}")
    return keys


def _plain(value: object) -> object:
    """A value as JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
