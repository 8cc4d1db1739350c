"""What a round costs beside its training, deployed, Isocenter and NVFlare in turn: `python -m simulations.speed deployment`.

Both train two sites on one machine, each site and the server in processes of their own that speak over TLS on 127.0.0.1. A site
takes one step of DenseNet121 on volumes of 32^3 voxels in a round, which exchanges all weights. Ours is the app as hospitals run
it, over phantom scans. NVFlare's is its proof-of-concept environment with its own recipe of federated averaging; see
`simulations.peers`. It lives in an environment of its own that is made on demand.

The overhead of a round is its time at the server less the training of the site that trained longest: from when the server begins
a round until its average is saved, less the time between a site's first step and its last. Loading, packing, travel, waiting and
averaging are overhead. The first round of a run is left out: sites read their scans in it.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from flwr.app import ConfigRecord

from core.config import load_config
from core.exchange import content, fingerprint, pack
from core.flower_env import processes
from core.models import build_pretrainer
from simulations.consortium import local_consortium
from simulations.relay import Relay
from simulations.workplace import StartError, free_ports, workplace

if TYPE_CHECKING:
    from rich.table import Table

PEER_SCRIPT = Path(__file__).with_name("peers") / "nvflare_round.py"
NVFLARE = "2.9.0"
SITES = ("north", "south")  # of the phantom consortium
COHORT_SCALE = 0.1  # a dozen scans a site
OVERRIDES = (
    "encoder=densenet121",
    "debias=none",
    "finetune=none",
    "evaluation=none",
    "local_steps=1",
    "batch_size=2",
    "warmup_rounds=0",
    "data.voxel_size_mm=6.0",
    "data.shape=[32,32,32]",
    f"data.pretrain_sites=[{','.join(SITES)}]",
    "data.target_sites=[]",
    f"strategy.min_sites={len(SITES)}",
    "strategy.wait_for_sites_s=60",
)
DEADLINE_S = 600.0  # for a turn
WATCHED_EVERY_S = 2.0
System = Literal["ours", "NVFlare"]
SYSTEMS: tuple[System, System] = ("ours", "NVFlare")


class PeerError(RuntimeError):
    """A system could not be installed, or its run did not come to its end."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round as its server saw it.

    Attributes:
        seconds: from its beginning until the average was saved.
        trained_seconds: by site, how long its local steps took.
    """

    seconds: float
    trained_seconds: Mapping[str, float]

    @property
    def overhead_s(self) -> float:
        """What it took beside the training of the site that trained longest.

        >>> Round(seconds=5.0, trained_seconds={"north": 1.0, "south": 1.5}).overhead_s
        3.5
        """
        return self.seconds - max(self.trained_seconds.values())


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A run of one system.

    Attributes:
        system: whose.
        start_s: from the first program's start until the first round began, certificates included.
        rounds: all but the first, which is left out.
        peak_mb: the most memory of all its processes together, pages that they share counted once.
        others_cpus: how many processors everything else on the machine kept busy meanwhile.
        bytes_to_sites: of arrays, in all rounds; None where it was not counted.
        bytes_from_sites: the same, back.
    """

    system: System
    start_s: float
    rounds: tuple[Round, ...]
    peak_mb: float
    others_cpus: float
    bytes_to_sites: int | None = None
    bytes_from_sites: int | None = None


class Watch(threading.Thread):
    """Looks every two seconds at the memory and processor time of the processes that bear some folders' marks."""

    def __init__(self, *folders: Path) -> None:
        super().__init__(daemon=True)
        self.folders = folders
        self.ended = threading.Event()
        self.peak_mb = 0.0
        self.others_cpus = 0.0

    def run(self) -> None:
        """Look until the `with` block ends."""
        began, others_before = time.monotonic(), busy_s() - self._used_s(self._pids())
        while not self.ended.wait(WATCHED_EVERY_S):
            pids = self._pids()
            self.peak_mb = max(self.peak_mb, sum(map(memory_mb, pids)))
            others_s = busy_s() - self._used_s(pids) - others_before
            self.others_cpus = max(0.0, others_s / (time.monotonic() - began))

    def _pids(self) -> list[int]:
        return [pid for folder in self.folders for pid in processes(folder)]

    def _used_s(self, pids: Sequence[int]) -> float:
        return sum(map(used_s, pids)) + sum(os.times()[:2])

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def memory_mb(pid: int) -> float:
    """A process's share of memory (PSS); 0 when it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def used_s(pid: int) -> float:
    """Processor time of a process and of its children that have ended; 0 when it has ended itself."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def busy_s() -> float:
    """Processor time of the whole machine since it started, all but idle and waiting for disks."""
    user, nice, system, _idle, _wait, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def read_ours(rounds_file: Path) -> list[Round]:
    """Every round of pretraining in a run's ``rounds.jsonl``."""
    told = [json.loads(line) for line in rounds_file.read_text(encoding="utf-8").splitlines()]
    return [
        Round(seconds=line["seconds"], trained_seconds=line["trained_seconds"]) for line in told if line["stage"] == "pretrain"
    ]


def read_nvflare(server_log: Path, times: Mapping[str, Path]) -> tuple[float, list[Round]]:
    """When the first round began, in seconds since 1970, and every round.

    Args:
        server_log: what the job's server logged as JSON, a line each; a round ends where the next begins, for NVFlare saves the
            average before it.
        times: by site, what `simulations.peers.nvflare_client` wrote.

    Raises:
        PeerError: the job did not finish, or a site is missing in a round.
    """
    began: list[float] = []
    finished = False
    for line in server_log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        text = str(entry["message"]).strip("\n-= ")
        finished = text == "Finished FedAvg."
        if finished or (text.startswith("Round ") and text.endswith(" started.")):
            # Its clock is that of this machine, in local time.
            began.append(datetime.strptime(entry["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp())
        if finished:
            break
    if not finished:
        raise PeerError(f"NVFlare: the job must finish, it ended in round {len(began)}.")
    trained: list[dict[str, float]] = [{} for _ in began[1:]]
    for site, path in times.items():
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            step = json.loads(line)
            trained[step["round"]][site] = step["ended"] - step["began"]
    for number, sites in enumerate(trained):
        if sites.keys() != times.keys():
            raise PeerError(f"NVFlare: all of {', '.join(times)} must train in round {number}, got {', '.join(sites) or 'none'}.")
    pairs = zip(began, began[1:], trained, strict=False)
    return began[0], [Round(seconds=end - begin, trained_seconds=sites) for begin, end, sites in pairs]


def peer_python(folder: Path, tell: Callable[[str], None]) -> Path:
    """The Python of an environment that has NVFlare, below `folder`; made where it is missing.

    Torch and all else that this environment has are seen from there, not installed again.

    Raises:
        PeerError: it cannot be made.
    """
    home = folder / f"nvflare-{NVFLARE}"
    python, done = home / "bin" / "python", home / "installed"
    if done.exists():
        return python
    tell(f"installing NVFlare {NVFLARE} into an environment of its own, {home} (30 MB; it sees this environment's torch)")
    shutil.rmtree(home, ignore_errors=True)
    try:
        venv.create(home, with_pip=True)
        packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        seen = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (packages / "seen.pth").write_text("".join(f"{path}\n" for path in seen), encoding="utf-8")
        for command in (["-m", "pip", "install", "--quiet", f"nvflare=={NVFLARE}"], ["-c", "import nvflare, torch, monai"]):
            environment = {**os.environ, "PYTHONPATH": ""}
            subprocess.run([python, *command], env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", None) or getattr(error, "stdout", None) or error).strip()
        raise PeerError(
            f"speed: NVFlare {NVFLARE} must be installable by pip into {home}, got: {said.splitlines()[-1]} "
            "Connect to a package index, or name a folder that holds it with --peers."
        ) from None
    done.touch()
    return python


@dataclass(frozen=True, kw_only=True)
class OurRun:
    """What all our runs have in common.

    Attributes:
        cohort: folder of a phantom consortium.
        num_rounds: of pretraining.
        overrides: of the run, beside `OVERRIDES`.
        tell: called with what it says of itself.
    """

    cohort: Path
    num_rounds: int
    overrides: Sequence[str]
    tell: Callable[[str], None]


def our_turn(folder: Path, run: OurRun, nodes_at: Callable[[int], int] = lambda port: port) -> Turn:
    """A run of our apps: a server and two sites from kits, as `isocenter provision` makes them.

    Args:
        folder: receives all that it writes.
        run: what to run.
        nodes_at: see `local_consortium`.

    Raises:
        PeerError: it did not finish.
    """
    folder.mkdir(parents=True)
    own = {"device": "cpu", "threads": 1}
    policies = {
        site: {"data": {"root": str(run.cohort / site)}, "cache_root": str(folder / "cache" / site), **own} for site in SITES
    }
    began = time.monotonic()
    log = folder / "flower.log"
    arrived: list[float] = []

    def on_line(line: str) -> None:
        run.tell(f"ours: {line}")
        if line.startswith("pretrain  round 1/"):
            arrived.append(time.monotonic())

    asked = shlex.join([*OVERRIDES, *run.overrides, f"num_rounds={run.num_rounds}", f"output={folder}", "name=run"])
    try:
        consortium = local_consortium(folder / "consortium", policies, nodes_at=nodes_at)
        with consortium as running, Watch(*running.folders) as watch:
            outcome = running.run(asked, log_path=log, deadline_s=DEADLINE_S, on_line=on_line)
    except StartError as error:
        raise PeerError(f"ours: {error}") from None
    if not outcome.ok:
        raise PeerError(f"ours: the run must finish, got {outcome.status}: {outcome.details}\n{_end_of(log)}")
    first, *rounds = read_ours(folder / "run" / "rounds.jsonl")
    weights = json.loads((folder / "run" / "traffic.json").read_text(encoding="utf-8"))["weights"]
    return Turn(
        system="ours",
        start_s=arrived[0] - first.seconds - began,
        rounds=tuple(rounds),
        peak_mb=watch.peak_mb,
        others_cpus=watch.others_cpus,
        bytes_to_sites=weights["to sites"],
        bytes_from_sites=weights["from sites"],
    )


def nvflare_turn(folder: Path, python: Path, num_rounds: int) -> Turn:
    """A run of NVFlare: provisioned, a server and a client a site, and at each a process for the job.

    Raises:
        PeerError: it did not finish.
    """
    folder.mkdir(parents=True)
    output = folder / "output.log"
    own = {
        "HOME": str(folder),
        "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)]),  # it starts `python3`
        "PYTHONPATH": "",
    }
    with workplace(own) as place, output.open("wb") as log:
        began = time.time()
        [port] = free_ports(1)
        command = [str(python), str(PEER_SCRIPT), str(folder), str(port), str(num_rounds), *SITES]
        try:
            with Watch(place.folder) as watch:
                done = subprocess.run(
                    command,
                    cwd=folder,
                    env=place.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    timeout=DEADLINE_S,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            raise PeerError(f"NVFlare: the job must finish within {DEADLINE_S:g} s, it did not.\n{_end_of(output)}") from None
        result = folder / "result"
        if done.returncode or not result.exists():
            raise PeerError(f"NVFlare: the job must finish, it did not.\n{_end_of(output)}")
        server_log = Path(result.read_text(encoding="utf-8")) / "workspace" / "log.json"
        first_began, rounds = read_nvflare(server_log, {site: folder / f"{site}.jsonl" for site in SITES})
    return Turn(
        system="NVFlare",
        start_s=first_began - began,
        rounds=tuple(rounds[1:]),
        peak_mb=watch.peak_mb,
        others_cpus=watch.others_cpus,
    )


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


def take_turns(turns: int, folder: Path, run: OurRun, python: Path) -> list[Turn]:
    """Both systems in turn, ours first; what they write goes below `folder`.

    Raises:
        PeerError: a run did not finish.
    """
    taken = []
    for number in range(1, turns + 1):
        run.tell(f"turn {number} of {turns}: ours")
        taken.append(our_turn(folder / f"{number}-ours", run))
        run.tell(f"turn {number} of {turns}: NVFlare")
        taken.append(nvflare_turn(folder / f"{number}-nvflare", python, run.num_rounds))
    return taken


def count_on_the_wire(folder: Path, run: OurRun) -> tuple[float, float]:
    """Bytes to and from sites in a run of ours, a round and site: weights and all else that crosses, TLS and the app's code too.

    Raises:
        PeerError: it did not finish.
    """
    relays: list[Relay] = []
    with ExitStack() as stack:

        def relayed(port: int) -> int:
            relays.append(stack.enter_context(Relay(port)))
            return relays[-1].port

        run.tell("counting bytes on the wire")
        our_turn(folder / "wire", run, relayed)
    [relay] = relays
    messages = run.num_rounds * len(SITES)
    return relay.from_server / messages, relay.to_server / messages


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What crosses in a round to or from one site, in bytes.

    Attributes:
        weights: encoder and projector in float32.
        message: all that a site is sent or answers, as Flower serialises it: weights, their names and shapes, the task.
        to_sites: arrays, as the server counted them.
        from_sites: the same, back.
        wire: all that crossed to and from sites, TLS and the app's code too; None where it was not counted.
    """

    weights: int
    message: int
    to_sites: float
    from_sites: float
    wire: tuple[float, float] | None = None


def serialised_bytes(record: Any) -> int:
    """Bytes of a record of Flower with all that it holds, as they are sent."""
    return len(record.deflate()) + sum(map(serialised_bytes, (record.children or {}).values()))


def payload(turns: Sequence[Turn], overrides: Sequence[str], wire: tuple[float, float] | None = None) -> Payload:
    """Of our turns: arrays by the run's own count (``traffic.json``), and the size of a message with all around them."""
    config = load_config(shlex.join([*OVERRIDES, *overrides, "data.root=none"]))
    state = build_pretrainer(config.encoder, config.embedding_size, config.seed).state_dict()
    arrays, layout = pack(state)
    about = ConfigRecord({"round": 1, "stage": "pretrain", "layout": layout, "fingerprint": fingerprint(), "exchange": 0})
    ours = [turn for turn in turns if turn.system == "ours"]
    messages = sum(len(turn.rounds) + 1 for turn in ours) * len(SITES)
    return Payload(
        weights=sum(value.numel() * value.element_size() for value in state.values()),
        message=serialised_bytes(content(arrays=arrays, config=about)),
        to_sites=sum(cast(int, turn.bytes_to_sites) for turn in ours) / messages,
        from_sites=sum(cast(int, turn.bytes_from_sites) for turn in ours) / messages,
        wire=wire,
    )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A figure of both systems.

    Attributes:
        name: what, with its unit.
        ours: median, least and greatest.
        theirs: the same.
        ratio: of ours to theirs in the same turn: median, least and greatest over the turns; below 1, ours is less.
    """

    name: str
    ours: tuple[float, float, float]
    theirs: tuple[float, float, float]
    ratio: tuple[float, float, float]


def compare(turns: Sequence[Turn]) -> list[Compared]:
    """The figures of the turns: over all rounds for what a round has, over turns otherwise; a turn's own is its median."""
    figures: dict[str, Callable[[Turn], list[float]]] = {
        "start-up, s": lambda turn: [turn.start_s],
        "round, s": lambda turn: [each.seconds for each in turn.rounds],
        "of it longest training, s": lambda turn: [max(each.trained_seconds.values()) for each in turn.rounds],
        "overhead of a round, s": lambda turn: [each.overhead_s for each in turn.rounds],
        "most memory, MB": lambda turn: [turn.peak_mb],
    }
    ours, theirs = ([turn for turn in turns if turn.system == system] for system in SYSTEMS)
    return [
        Compared(
            name=name,
            ours=_spread([value for turn in ours for value in values(turn)]),
            theirs=_spread([value for turn in theirs for value in values(turn)]),
            ratio=_spread([median(values(mine)) / median(values(yours)) for mine, yours in zip(ours, theirs, strict=True)]),
        )
        for name, values in figures.items()
    ]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def as_table(turns: Sequence[Turn], crossed: Payload) -> "Table":
    """The figures side by side."""
    from rich.table import Table

    ours, theirs = ([turn for turn in turns if turn.system == system] for system in SYSTEMS)
    wire = "Bytes on the wire were not counted (--wire)."
    if crossed.wire:
        to_sites, from_sites = (size / crossed.weights for size in crossed.wire)
        wire = f"On the wire x{to_sites:.4f} to sites, x{from_sites:.4f} from sites: a whole run, TLS and the app's code too."
    count = sum(len(turn.rounds) for turn in ours)
    table = Table(
        title=f"Deployed on one machine: 2 sites, turns: {len(ours)}, rounds of each: {count}; median (least to greatest)",
        caption="\n".join(
            [
                f"Ours, a message: {crossed.weights / 1e6:.2f} MB of weights (encoder and projector); "
                f"x{crossed.to_sites / crossed.weights:.4f} to sites, x{crossed.from_sites / crossed.weights:.4f} from sites, "
                f"x{crossed.message / crossed.weights:.4f} with all that is in the message.",
                wire,
                "Processors that others kept busy: "
                + ", ".join(f"{one.others_cpus:.1f} and {two.others_cpus:.1f}" for one, two in zip(ours, theirs, strict=True))
                + f" (ours and NVFlare's turn), of {len(os.sched_getaffinity(0))}.",
            ]
        ),
    )
    table.add_column("")
    for heading in ("ours", f"NVFlare {NVFLARE}", "ours / NVFlare"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in compare(turns):
        digits = 0 if row.name.endswith("MB") else 2
        table.add_row(
            row.name,
            *(f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})" for mid, low, high in (row.ours, row.theirs)),
            "{:.2f} ({:.2f} to {:.2f})".format(*row.ratio),
        )
    return table


def facts() -> dict[str, str | int]:
    """What the figures depend on, without saying which machine it is."""
    return {
        "torch": torch.__version__,
        "flwr": version("flwr"),
        "nvflare": NVFLARE,
        "python": ".".join(map(str, sys.version_info[:3])),
        "processors": len(os.sched_getaffinity(0)),
    }
