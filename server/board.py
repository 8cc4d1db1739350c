"""How each site of a run stands, in words: the server keeps it in the run's folder, `isocenter status` and `watch` show it."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import write_atomically

if TYPE_CHECKING:
    from server.grid import PatientGrid

STATUS = "status.json"
OFTEN_S = 1.0
STALE_S = 90.0  # a run that has told nothing for so long has ended without a word


class Board:
    """What the sites of a run do, written as often as something moves.

    Args:
        folder: of the run.
        grid: of its server.
        rounds: how many each stage has, by stage.
        local_steps: how many a round has, by stage.
    """

    def __init__(self, folder: Path, grid: "PatientGrid", rounds: Mapping[str, int], local_steps: Mapping[str, int]) -> None:
        self.folder, self.grid, self.rounds, self.local_steps = folder, grid, rounds, local_steps
        self.about: dict[str, dict[str, object]] = {}
        self.usual_s: dict[str, float] = {}
        self.excluded: dict[str, str] = {}
        self._written = 0.0
        grid.on_move = self.move

    def move(self) -> None:
        """Write how things stand, unless that was just done; that it cannot be written stops no run."""
        for node, seconds in self.grid.answered.items():
            if self.grid.training:
                self.usual_s[self.grid.name(node)] = seconds
        if time.monotonic() - self._written >= OFTEN_S:
            self.write("running")

    def write(self, state: str, words: str = "") -> None:
        """Write how things stand.

        Args:
            state: ``running``, ``finished`` or ``stopped``.
            words: why it stopped.
        """
        self._written = time.monotonic()
        rule = self.grid.rule
        about = {
            "state": state,
            "words": words,
            "stage": rule.stage,
            "round": rule.round_number,
            "rounds": self.rounds.get(rule.stage.partition("-")[0]),
            "deadline_s": rule.deadline_s,
            "told": datetime.now(UTC).isoformat(timespec="seconds"),
            "sites": {self.grid.name(node): self.of(node) for node in sorted(self.grid.names, key=self.grid.name)},
        }
        with suppress(OSError):
            write_atomically(self.folder / STATUS, json.dumps(about, indent=1).encode())

    def of(self, node: int) -> dict[str, object]:
        """What a site does."""
        name, now = self.grid.name(node), self.grid.clock()
        entry: dict[str, object] = dict(self.about.get(name, {}))
        if name in self.excluded:
            return entry | {"does": "excluded", "words": self.excluded[name]}
        debt = self.grid.waiting.get(node) or self.grid.debts.get(node)
        entry["connected"] = node in self.grid.seen
        if debt is None:
            return entry | {"does": "waits"}
        training = debt.message_type.startswith("train.")
        entry |= {"does": "trains" if training else "answers", "task": debt.words, "for_s": round(now - debt.asked, 1)}
        entry["behind"] = node in self.grid.debts
        if training and name in self.usual_s:
            entry["usual_s"] = round(self.usual_s[name], 1)
            entry["steps"] = self.local_steps.get(debt.stage.partition("-")[0])
        return entry


def state_of(folder: Path) -> str:
    """What a run last told of its state: ``running``, ``finished`` or ``stopped``; "" where it has told nothing."""
    try:
        return str(json.loads((folder / STATUS).read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def tell_stopped(folder: Path, words: str) -> None:
    """Keep that a run was stopped, and why, where it has begun to tell how it stands."""
    with suppress(OSError, ValueError):
        about = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        write_atomically(folder / STATUS, json.dumps(about | {"state": "stopped", "words": words}, indent=1).encode())


def describe(about: Mapping[str, Any], now: datetime, alive: bool = True) -> list[str]:
    """The lines that a person reads.

    Args:
        about: what the run last told.
        now: the time.
        alive: whether a server works in the run's folder.

    >>> at = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
    >>> site = {"does": "trains", "task": "pretrain round 3", "for_s": 30.0, "usual_s": 60.0, "steps": 6, "behind": False}
    >>> site |= {"connected": True, "device": "cuda"}
    >>> run = {"state": "running", "words": "", "stage": "pretrain", "round": 3, "rounds": 20, "told": at.isoformat()}
    >>> for line in describe(run | {"sites": {"hill": site, "lake": {"does": "waits", "connected": False}}}, at): print(line)
    pretrain, round 3 of 20
    hill  trains pretrain round 3 for 30 s, about step 3 of 6; cuda
    lake  NOT CONNECTED; waits
    """
    ago = (now - datetime.fromisoformat(about["told"])).total_seconds()
    stage = f"{about['stage']}, round {about['round']} of {about['rounds']}" if about["round"] else "outside of rounds"
    if about["state"] != "running":
        lines = [f"{about['state']}{': ' + about['words'] if about['words'] else ''}"]
    elif not alive:
        lines = [f"{stage}; BROKEN OFF: its process at the server ended without a word, `isocenter resume` goes on with it"]
    elif ago > STALE_S:
        lines = [f"{stage}; the server has told nothing for {ago:.0f} s: it was killed, or the machine sleeps"]
    else:
        lines = [stage]
    sites = about["sites"]
    width = max(map(len, sites), default=0)
    for name, site in sites.items():
        parts = [] if site.get("connected", True) or site["does"] == "excluded" else ["NOT CONNECTED"]
        if site["does"] in ("waits", "excluded"):
            parts.append(f"excluded: it {site['words']}" if site["does"] == "excluded" else "waits")
        else:
            for_s = site["for_s"] + max(0.0, ago if about["state"] == "running" else 0.0)
            words = f"{'BEHIND: ' if site['behind'] else ''}{site['does']} {site['task']} for {for_s:.0f} s"
            if site.get("steps") and site["usual_s"] > 0:
                step = min(site["steps"], int(site["steps"] * for_s / site["usual_s"]))
                words += f", about step {step} of {site['steps']}"
            parts.append(words)
        if device := site.get("device"):
            parts.append(str(device))
        lines.append(f"{name:{width}}  {'; '.join(parts)}")
    return lines


def newest_run(runs: Sequence[Path]) -> Path:
    """Of some run folders the one that told of itself last.

    Raises:
        ValueError: none has.
    """
    told = [run for run in runs if (run / STATUS).is_file()]
    if not told:
        raise ValueError("status: a run must have begun, got none here. Begin one with `isocenter run --at KIT`.")
    return max(told, key=lambda run: (run / STATUS).stat().st_mtime)
