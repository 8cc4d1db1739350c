"""What a run keeps so that one that was killed at any moment goes on after its last finished round, with the same bits.

A round is finished when its line stands in ``rounds.jsonl``. Before the line come the two files that it names by their SHA-256:
the checkpoint, and ``resume/<stage>-<round>.safetensors`` with all else that the next round depends on; files are dropped after
it. So a file without a line is of an unfinished round, whose files are written again.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from core.checkpoint import Checkpoint, keep_last, load_checkpoint, rounds_of, save_checkpoint
from core.config import RunConfig, describe
from core.exchange import State, fingerprint
from core.files import NO_ROOM, append_line, remove_temporaries, write_atomically
from core.moments import GroupMoments, Reference
from core.run_file import LOCK, MAY_CHANGE, RUN_FILE, RunFile, differing_keys, read_run, write_run
from server.sites import Node, RunError

log = logging.getLogger("isocenter")

LOCK_S = 2.0
CHECKPOINTS, STATES, LINES, BEGUN = "checkpoints", "resume", "rounds.jsonl", "resume/begun.json"
TAKES_PART = "takes part from now on"
"""What a round's line tells of a site that was admitted late in it."""
UNTRAINED = "untrained"
Line = dict[str, Any]


@dataclass
class StageState:
    """What the next round of a stage depends on beside the weights, by names of sites.

    Attributes:
        late: who was admitted late.
        refused: who connected late and was not.
        excluded: who takes no part any more, and why.
        failed_rounds: in a row, by site.
        guard: as `UpdateGuard.state` tells it.
        best: smallest validation loss, its round, and the weights where they are not those of the checkpoint beside.
        privacy: what DP-SGD guarantees by now, by site.
        exchange_round: of the last exchange; 0 before any.
        moments: of the last exchange, by space and site, if the next round needs them.
        references: of the last exchange, by space, if the next round needs them.
        seconds: that the last rounds took.
        traffic: bytes of the run so far, by (what, direction).
    """

    late: list[str]
    refused: list[str]
    excluded: dict[str, str]
    failed_rounds: dict[str, int]
    guard: dict[str, Any]
    best: tuple[float, int, State | None] | None
    privacy: dict[str, dict[str, float]]
    exchange_round: int
    moments: dict[str, dict[str, GroupMoments]]
    references: dict[str, Reference]
    seconds: list[float]
    traffic: Counter[tuple[str, str]]

    def to_bytes(self) -> bytes:
        """As safetensors, with everything that is no tensor as JSON beside; the same bytes for the same state."""
        tensors: State = {}
        for space, told in self.moments.items():
            for site, moments in told.items():
                tensors |= {f"moments/{space}/{site}/{name}": value for name, value in vars(moments).items()}
        for space, reference in self.references.items():
            tensors |= {f"reference/{space}/{name}": value for name, value in vars(reference).items()}
        if self.best is not None and self.best[2] is not None:
            tensors |= {f"best/{name}": value for name, value in self.best[2].items()}
        values = {name: value for name, value in vars(self).items() if name not in ("moments", "references")}
        values["best"] = None if self.best is None else self.best[:2]
        values["traffic"] = [[*kind, size] for kind, size in sorted(self.traffic.items())]
        about = json.dumps({"format": 1, **values}, sort_keys=True)
        data: bytes = save({name: value.contiguous() for name, value in tensors.items()}, {"isocenter": about})
        return data

    @classmethod
    def read(cls, path: Path) -> "StageState":
        """What was written."""
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["isocenter"])
            tensors: State = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        moments: dict[str, dict[str, State]] = {}
        references: dict[str, State] = {}
        weights: State = {}
        for name, value in tensors.items():
            match name.split("/", 1)[0], name.split("/"):
                case "moments", [_, space, site, field_name]:
                    moments.setdefault(space, {}).setdefault(site, {})[field_name] = value
                case "reference", [_, space, field_name]:
                    references.setdefault(space, {})[field_name] = value
                case _:
                    weights[name.removeprefix("best/")] = value
        best = values.pop("best")
        del values["format"]
        traffic = Counter({(kind, direction): size for kind, direction, size in values.pop("traffic")})
        return cls(
            **values,
            best=None if best is None else (best[0], best[1], weights or None),
            moments={
                space: {site: GroupMoments(**parts) for site, parts in sorted(told.items())} for space, told in moments.items()
            },
            references={space: Reference(**parts) for space, parts in references.items()},
            traffic=traffic,
        )


@dataclass(frozen=True)
class Resumed:
    """A stage after its last finished round.

    Attributes:
        round_number: of that round.
        weights: after it; or, of a stage that is over, those of its best round.
        state: what else the next round depends on; None where no round follows and the file is lost.
        best: loss and round of the best by validation so far; None where none was told.
        over: whether no round follows.
    """

    round_number: int
    weights: State
    state: StageState | None
    best: tuple[float, int] | None
    over: bool


@contextmanager
def full_disk_told(where: str) -> Iterator[None]:
    """A full disk as one sentence.

    Raises:
        RunError: something could not be written for want of room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RunError(
            f"{where}: the server's disk must have room for what a run keeps, it is full. Finished rounds are whole: free space, "
            "then `isocenter resume`."
        ) from error


@contextmanager
def run_folder(config: RunConfig, overrides: str) -> Iterator[Path]:
    """The run's folder, for this process alone: a new one, or with ``resume`` that of the run, rid of what was not finished.

    Raises:
        RunError: it holds an earlier run, or with ``resume`` none or that of another configuration or code; it is in use; the
            disk is full.
    """
    folder = (config.output or Path.home() / "isocenter-runs") / config.name
    if config.resume:
        check_same(folder, config)
    elif (folder / LINES).exists():
        raise RunError(
            f"run {config.name}: its folder must not hold an earlier run. Choose another name=..., remove it, or go on with it: "
            "`isocenter resume`."
        )
    with full_disk_told(f"run {config.name}"):
        (folder / STATES).mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if config.resume:
                run = read_run(folder)
                write_run(folder, replace(run, resumed=run.resumed + 1))
                log.info("going on with the run in %s", folder)
            else:
                write_run(folder, RunFile(overrides, describe(config), fingerprint()))
                (folder / BEGUN).unlink(missing_ok=True)
                log.info("results go to %s", folder)
            sweep(folder)
            yield folder


def _locked(folder: Path) -> AbstractContextManager[object]:
    """Hold a run's folder until the end of the block; the system lets go of it for a process that is killed."""
    try:
        # Not at once: who asks whether a server works here holds it for an instant.
        return FileLock(folder / LOCK).acquire(timeout=LOCK_S)
    except Timeout:
        raise RunError(
            f"run {folder.name}: its folder must be used by one server at a time, another works in it. Stop that run first."
        ) from None


def check_same(folder: Path, config: RunConfig) -> None:
    """Refuse to go on with a run that was started with another configuration or by other code.

    Raises:
        RunError: the keys that differ, or what is missing.
    """
    try:
        run = read_run(folder)
    except ValueError as error:
        raise RunError(str(error)) from None
    if keys := [key for key in differing_keys(run.config, describe(config)) if key not in MAY_CHANGE]:
        raise RunError(
            f"run {folder.name}: its configuration must be the one it was started with, {', '.join(keys)} differ. Leave them as "
            f"{RUN_FILE} has them, or start another run."
        )
    if run.code != fingerprint():
        raise RunError(
            f"run {folder.name}: the code must be that it was started with, Isocenter {run.versions.get('isocenter', '')} with "
            f"fingerprint {run.code[:12]}, got {fingerprint()[:12]}. Install that, or start another run."
        )
    changed = RunFile("", {}, "").versions
    if other := [name for name, number in changed.items() if run.versions.get(name) != number]:
        told = ", ".join(f"{name} {run.versions.get(name)} before, now {changed[name]}" for name in other)
        log.warning("going on with other versions, so that the last bits of the weights may differ: %s", told)


def sweep(folder: Path) -> None:
    """Remove what is of no finished round: a torn last line, files without a line, files half written."""
    for part in (folder, folder / CHECKPOINTS, folder / STATES):
        remove_temporaries(part)
    path = folder / LINES
    data = path.read_bytes() if path.exists() else b""
    lines = read_lines(folder)
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if data != whole:
        log.info("the round after %s was not finished, and is done again", _named(lines))
        write_atomically(path, whole)
    finished = {(line["stage"], line["round"]) for line in lines}
    for part in (folder / CHECKPOINTS, folder / STATES):
        for (stage, number), file in rounds_of(part).items():
            if (stage, number) not in finished and stage not in (UNTRAINED, "eraser"):
                file.unlink()


def _named(lines: list[Line]) -> str:
    return f"{lines[-1]['stage']} round {lines[-1]['round']}" if lines else "the beginning"


def read_lines(folder: Path) -> list[Line]:
    """The finished rounds; a last line that is torn is of none.

    Raises:
        RunError: another line is damaged.
    """
    path = folder / LINES
    texts = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines: list[Line] = []
    for number, text in enumerate(texts, 1):
        line = _read_line(text)
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            raise RunError(
                f"run {folder.name}, {LINES}: line {number} must be of a finished round, it is damaged. Put back a copy of the "
                "run's folder, or start another run."
            )
    return lines


def _read_line(text: bytes) -> Line | None:
    """A finished round; None for what is no whole line of one."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = text.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("stage"), str)
    return line if whole and type(line.get("round")) is int else None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights with their names, shapes and dtypes, in hexadecimal."""
    return hashlib.sha256(save({name: value.contiguous() for name, value in state.items()})).hexdigest()


def keep_round(folder: Path, checkpoint: Checkpoint, state: StageState, line: Mapping[str, Any], keep: int) -> None:
    """Finish a round: its checkpoint, its state, its line; then all but the last ``keep`` of each file are dropped.

    Raises:
        RunError: the disk is full; the rounds before are whole.
    """
    stage, number = checkpoint.stage, checkpoint.round_number
    with full_disk_told(f"{stage}, round {number}"):
        weights = save_checkpoint(folder / CHECKPOINTS, checkpoint, keep=None)
        data = state.to_bytes()
        write_atomically(_state_path(folder, stage, number), data)
        sums = {"checkpoint": digest(weights), "state": hashlib.sha256(data).hexdigest()}
        append_line(folder / LINES, json.dumps({**line, "sha256": sums}))
    _keep_last(folder, stage, keep)


def _keep_last(folder: Path, stage: str, keep: int) -> None:
    for part in (CHECKPOINTS, STATES):
        keep_last(folder / part, stage, keep)


def _checkpoint_path(folder: Path, stage: str, number: int) -> Path:
    return folder / CHECKPOINTS / f"{stage}-{number:04d}.safetensors"


def _state_path(folder: Path, stage: str, number: int) -> Path:
    return folder / STATES / f"{stage}-{number:04d}.safetensors"


def _whole(path: Path, line: Line, name: str) -> bool:
    """Whether a file is there as the round's line tells it."""
    return path.is_file() and digest(path) == line.get("sha256", {}).get(name)


def best_round(lines: list[Line]) -> tuple[float, int] | None:
    """The smallest validation loss of a stage's rounds, the first of equals, and its round; None where none was told."""
    told = [(line["validation_loss"], line["round"]) for line in lines if "validation_loss" in line]
    return min(told, default=None)


def last_round(folder: Path, stage: str, num_rounds: int, patience: int | None, keep: int) -> Resumed | None:
    """A stage after the newest round whose files are as its line tells; None where it has no finished round.

    Rounds after that one are to be done again: their lines, and those of what came of them, are cut off.

    Args:
        folder: the run's.
        stage: as its files are called.
        num_rounds: that it is of.
        patience: rounds without a smaller validation loss after which it is over; None: it is not watched.
        keep: so many of its last files stay.

    Raises:
        RunError: no round's files are whole.
    """
    lines = [line for line in read_lines(folder) if line["stage"] == stage]
    if not lines:
        return None
    last, best = int(lines[-1]["round"]), best_round(lines) if patience is not None else None
    over = last >= num_rounds or (best is not None and patience is not None and last - best[1] >= patience)
    if over and best is not None and (taken := _best_weights(folder, lines, best[1])) is not None:
        path = _state_path(folder, stage, last)
        state = StageState.read(path) if _whole(path, lines[-1], "state") else None
        return Resumed(last, taken, state, best, over=True)
    for line in reversed(lines):
        number = int(line["round"])
        weights, path = _checkpoint_path(folder, stage, number), _state_path(folder, stage, number)
        if not (_whole(weights, line, "checkpoint") and _whole(path, line, "state")):
            continue
        if number < last:
            again = f"round {last} is" if number == last - 1 else f"rounds {number + 1} to {last} are"
            log.warning("%s: what was kept of round %d is damaged or missing, so %s done again", stage, last, again)
            cut_back(folder, stage, number)
        state = StageState.read(path)
        told = None if state.best is None else state.best[:2]
        _keep_last(folder, stage, keep)
        return Resumed(number, load_checkpoint(weights).state, state, told, over=over and number == last)
    raise RunError(
        f"{stage}: what was kept of a finished round must be whole, that of rounds 1 to {last} is damaged or missing. Put back a "
        "copy of the run's folder, or start another run."
    )


def _best_weights(folder: Path, lines: list[Line], number: int) -> State | None:
    """The weights of the best round, from its checkpoint or from the last round's state."""
    stage = lines[-1]["stage"]
    path = _checkpoint_path(folder, stage, number)
    if _whole(path, next(line for line in lines if line["round"] == number), "checkpoint"):
        return load_checkpoint(path).state
    path = _state_path(folder, stage, lines[-1]["round"])
    best = StageState.read(path).best if _whole(path, lines[-1], "state") else None
    return None if best is None else best[2]


def cut_back(folder: Path, stage: str, number: int) -> None:
    """Take back all rounds of a stage after one, and with those of pretraining every later stage, which began with them."""

    def stays(line: Line) -> bool:
        return bool(line["stage"] != stage and stage != "pretrain") or (line["stage"] == stage and line["round"] <= number)

    lines = [line for line in read_lines(folder) if stays(line)]
    write_atomically(folder / LINES, "".join(json.dumps(line) + "\n" for line in lines).encode())
    sweep(folder)


def traffic_before(folder: Path) -> Counter[tuple[str, str]]:
    """Bytes that had crossed when the last finished round was kept; none where that is not known."""
    for line in read_lines(folder)[-1:]:
        path = _state_path(folder, line["stage"], line["round"])
        if _whole(path, line, "state"):
            return StageState.read(path).traffic
    return Counter()


@dataclass(frozen=True)
class Begun:
    """Who took part when a run began, and the model that it began with.

    Attributes:
        sites: what each site told about itself, by name.
        untrained: SHA-256 of the weights before training and of the constants that sites were told.
        notes: what agreeing on the constants gave to note.
    """

    sites: dict[str, dict[str, Any]]
    untrained: str
    notes: list[str] = field(default_factory=list)


def keep_begun(folder: Path, nodes: list[Node], untrained: State, notes: list[str], before: Begun | None) -> None:
    """Write down how the run began, once, before its first round.

    Raises:
        RunError: it is gone on with, and what training began with is not what it was.
    """
    begun = Begun({node.site: dict(node.about) for node in nodes}, digest_of(untrained), notes)
    if before is None:
        write_atomically(folder / BEGUN, (json.dumps(vars(begun), indent=1) + "\n").encode())
    elif begun.untrained != before.untrained:
        raise RunError(
            f"run {folder.name}: weights and constants before training must be what they were before the stop, those made again "
            "are others. Put back checkpoints/untrained-0000.safetensors from a copy, or start another run."
        )


def read_begun(folder: Path) -> Begun | None:
    """How the run began; None where it was stopped before that.

    Raises:
        RunError: rounds are finished and the file is missing.
    """
    path = folder / BEGUN
    if not path.is_file():
        if read_lines(folder):
            raise RunError(f"run {folder.name}: its folder must hold {BEGUN}, it does not. Put it back, or start another run.")
        return None
    return Begun(**json.loads(path.read_text(encoding="utf-8")))


def sites_before(folder: Path, begun: Begun) -> set[str]:
    """Names of the sites that had taken part by the last finished round: those of the beginning, and those admitted late."""
    late = {name for line in read_lines(folder) for name, text in line.get("late", {}).items() if text == TAKES_PART}
    return {*begun.sites, *late}


def untrained_state(folder: Path, begun: Begun) -> dict[str, Tensor] | None:
    """Weights and constants that the run began with; None where the file is damaged or missing, and they are found again."""
    path = _checkpoint_path(folder, UNTRAINED, 0)
    with suppress(SafetensorError, OSError, ValueError):
        if digest_of(state := load_checkpoint(path).state) == begun.untrained:
            return state
    log.warning("the checkpoint before training is damaged or missing, and is made again")
    return None


def check_begun(folder: Path, begun: Begun, nodes: list[Node]) -> None:
    """Refuse sites with other inputs than before the stop; other counts are told, for then the weights will be others.

    Raises:
        RunError: the sites whose inputs differ.
    """
    known = [node for node in nodes if node.site in begun.sites]
    if other := [node.site for node in known if node.about["inputs"] != begun.sites[node.site]["inputs"]]:
        raise RunError(
            f"run {folder.name}: sites must have the inputs they had before the stop, {', '.join(other)} has others. Mend its "
            "data, or start another run."
        )
    for node in known:
        before = begun.sites[node.site]
        if changed := [name for name in ("scans", "subjects", "scanners") if node.about[name] != before[name]]:
            told = ", ".join(f"{name} {before[name]}, now {node.about[name]}" for name in changed)
            log.warning("%s holds other scans than before the stop, so the weights will be others: %s", node.site, told)
