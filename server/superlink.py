"""The server of a consortium, kept running from its kit: SuperLink on the loopback, proxy in front, keys registered.

Flower tells no names of the sites that it knows, so who is which node is written down here (`state/nodes.json`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, ValidationError

from core.files import write_atomically
from core.flower_env import (
    CONNECTION,
    NO_INSTALL,
    ask_flower,
    end_processes,
    environment,
    healthy,
    plain,
    write_connection,
)
from core.keys import fingerprint, public_line, read_public_line
from core.service import Service, leave_running, stopped_by_signals
from server.consortium import Address

READY_S = 120.0
"""Time for a SuperLink to answer after its start."""

_GRACE_S = 10.0
_RETRY_S = 30.0  # between two tries to register or unregister what failed
_LONGEST_PAUSE_S = 60.0  # between two starts of a program that keeps dying
_READY = "sites may come to"
Say = Callable[[str], None]


class About(BaseModel):
    """What a server kit says of itself, `server.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1]
    consortium: str
    server: str
    host: str
    port: int
    control_port: int


class Node(BaseModel):
    """A key that was registered: the site's name and Flower's number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    node_id: str


@dataclass(frozen=True)
class Kit:
    """A server kit on this machine; all that running adds to it lies in `state`."""

    folder: Path
    about: About

    @property
    def state(self) -> Path:
        """Database, Flower's home, logs."""
        return self.folder / "state"

    @property
    def service(self) -> Service:
        """The process that runs from it."""
        return Service("server", self.state)

    def environment(self) -> dict[str, str]:
        """What Flower's programs are started in."""
        return environment(self.state, flower_home=self.state / "flower")

    def ask(self, *arguments: str) -> dict[str, Any]:
        """The answer of a short `flwr` command."""
        return ask_flower(arguments, cwd=self.state / "cwd", env=self.environment())

    def sites(self) -> "Sites":
        """Who may take part now."""
        return read_sites((self.folder / "sites.json").read_text(encoding="utf-8"))

    def nodes(self) -> dict[str, Node]:
        """Who was registered, by fingerprint."""
        path = self.state / "nodes.json"
        plain = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {key: Node.model_validate(node) for key, node in plain.items()}

    def write_nodes(self, nodes: dict[str, Node]) -> None:
        """Keep who was registered."""
        text = json.dumps({key: node.model_dump() for key, node in nodes.items()}, indent=1)
        write_atomically(self.state / "nodes.json", text.encode(), 0o600)


@dataclass(frozen=True)
class Sites:
    """The keys in `sites.json`: of those that may take part, by site, and those shut out with the site they were of."""

    valid: dict[str, ec.EllipticCurvePublicKey]
    revoked: list[tuple[str, ec.EllipticCurvePublicKey]]


@dataclass(frozen=True)
class SiteState:
    """How a site stands with the server, in words."""

    site: str
    connected: bool
    revoked: bool
    words: str


def open_kit(folder: Path) -> Kit:
    """The server kit in a folder.

    Raises:
        ValueError: It is none.
    """
    folder = folder.resolve()
    try:
        about = About.model_validate_json((folder / "server.json").read_bytes())
        read_sites((folder / "sites.json").read_text(encoding="utf-8"))
    except OSError as error:
        name = Path(error.filename).name
        raise ValueError(f"server: {name} must be in the kit, got {error.strerror}. Name the kit's folder.") from None
    except ValidationError:
        raise ValueError("server: server.json must be what `isocenter provision` wrote, got something else.") from None
    return Kit(folder, about)


def read_sites(text: str) -> Sites:
    """What `sites.json` says.

    Raises:
        ValueError: It is not what `isocenter provision` wrote.
    """
    try:
        plain = json.loads(text)
        valid = {site: read_public_line(entry["public_key"]) for site, entry in plain["sites"].items()}
        revoked = [(entry["site"], read_public_line(entry["public_key"])) for entry in plain["revoked"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("server: sites.json must be what `isocenter provision` wrote, got something else.") from None
    return Sites(valid, revoked)


def serve(kit: Kit, *, proxy: bool, say: Say) -> None:
    """Keep the server running until SIGTERM or Ctrl-C, and stop all of it then.

    Args:
        kit: The server's.
        proxy: Whether nginx stands in front; without it the SuperLink itself listens on the public port, all of it.
        say: Called with each line for people.

    Raises:
        ValueError: It runs already, nginx is not there, or the SuperLink does not come up.
    """
    with kit.service.running(), stopped_by_signals() as stopping:
        _end_strays(kit)
        _prepare(kit)
        programs = _programs(kit, proxy=proxy)
        try:
            done_with = b""
            for each in programs:
                each.start()
                if not each.wait_until_ready(stopping):
                    return
                # Before anybody is let through: a site that comes before its key was let in gives up.
                done_with = done_with or _catch_up(kit, say, fresh=True)
            say(f"{kit.about.consortium}: {_READY} {kit.about.server}")
            _keep(kit, programs, stopping, say, done_with)
        finally:
            for each in reversed(programs):  # nobody comes in any more, then the rest
                each.end()
            end_processes(kit.state, _GRACE_S)
            say(f"{kit.about.consortium}: stopped")


def start_in_background(kit: Kit, options: list[str]) -> None:
    """Start `isocenter server start` in a session of its own, and come back when it answers.

    Raises:
        ValueError: One runs already, or it ended instead of answering, with what it wrote last.
    """
    if kit.service.is_running():
        raise ValueError(kit.service.runs_already)
    kit.state.mkdir(mode=0o700, exist_ok=True)
    log_path = kit.state / "server.log"
    with log_path.open("ab") as log:
        before = log.tell()
        # -P: a folder called server, such as a kit, must not be taken for the package.
        command = [sys.executable, "-P", "-c", "from server.cli import server; server()", "start", str(kit.folder), *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    leave_running(process)
    while _READY.encode() not in (written := log_path.read_bytes()[before:]):
        if process.poll() is not None:
            lines = [line.strip() for line in plain(written.decode(errors="replace")).splitlines() if line.strip()]
            raise ValueError(f"server: it must come up, got: {lines[-1] if lines else 'no word'}")
        time.sleep(0.1)


def status(kit: Kit) -> list[SiteState]:
    """How each site stands, those that may take part first.

    Raises:
        ValueError: The server does not run, or does not answer.
    """
    if not kit.service.is_running():
        raise ValueError("server: it must run, got none on this machine. Start it with `isocenter server start`.")
    flower, nodes, sites = _flower_nodes(kit), kit.nodes(), kit.sites()
    states = []
    for site, key in sites.valid.items():
        node = nodes.get(fingerprint(key))
        states.append(_state(site, flower.get(node.node_id) if node else None))
    left_out = dict.fromkeys(site for site, _ in sites.revoked if site not in sites.valid)
    return states + [SiteState(site, False, True, "revoked") for site in left_out]


def synchronise(kit: Kit, sites: Sites, say: Say) -> bool:
    """Unregister revoked keys and register new ones; False where something failed and is to be tried again.

    Raises:
        ValueError: The SuperLink does not answer.
    """
    nodes, done = kit.nodes(), True
    for site, key in sites.revoked:
        node = nodes.get(fingerprint(key))
        if node is None:
            continue
        answer = kit.ask("supernode", "unregister", node.node_id, CONNECTION)
        if answer.get("success") or _flower_nodes(kit).get(node.node_id, {}).get("status") in (None, "unregistered"):
            del nodes[fingerprint(key)]
            kit.write_nodes(nodes)
            say(f"{site}: shut out, {fingerprint(key)}")
        else:
            say(f"{site}: not shut out yet: {_reason(answer)}")
            done = False
    for site, key in sites.valid.items():
        if fingerprint(key) in nodes:
            continue
        path = kit.state / "registering.pub"
        path.write_text(f"{public_line(key)}\n", encoding="ascii")
        answer = kit.ask("supernode", "register", str(path), CONNECTION, "--name", site)
        node_id = str(answer["node-id"]) if answer.get("success") else _adopted(kit, nodes, answer)
        if node_id:
            nodes[fingerprint(key)] = Node(site=site, node_id=node_id)
            kit.write_nodes(nodes)
            say(f"{site}: let in, {fingerprint(key)}")
        else:
            say(f"{site}: not let in yet: {_reason(answer)}")
            done = False
    return done


def _adopted(kit: Kit, nodes: dict[str, Node], answer: dict[str, Any]) -> str | None:
    """The number of a node that was registered just before a crash, and could not be written down."""
    if "already in use" not in _reason(answer):
        return None
    known = {node.node_id for node in nodes.values()}
    strays = [i for i, node in _flower_nodes(kit).items() if i not in known and node["status"] != "unregistered"]
    return strays[0] if len(strays) == 1 else None


def _forget_lost(kit: Kit, say: Say) -> None:
    """Strike out nodes that the SuperLink's database does not hold (any more), and name those that are not ours."""
    flower, nodes = _flower_nodes(kit), kit.nodes()
    kept = {key: node for key, node in nodes.items() if node.node_id in flower}
    if kept != nodes:
        kit.write_nodes(kept)
    ours = {node.node_id for node in kept.values()}
    for node_id, node in flower.items():
        if node_id not in ours and node["status"] != "unregistered":
            say(f"node {node_id}: registered by somebody else, not in sites.json; `flwr supernode unregister` shuts it out")
        if node_id in ours and node["status"] == "unregistered":
            [site] = [each.site for each in kept.values() if each.node_id == node_id]
            say(f"{site}: unregistered by hand, and Flower takes no key twice; give it another one with --renew {site}")


def _flower_nodes(kit: Kit) -> dict[str, dict[str, Any]]:
    answer = kit.ask("supernode", "ls", CONNECTION)
    if not answer.get("success"):
        raise ValueError(f"server: the SuperLink must answer, got: {_reason(answer)}")
    return {node["node-id"]: node for node in answer["nodes"]}


def _reason(answer: dict[str, Any]) -> str:
    return " ".join(str(answer.get("error-message", answer)).split())


def _state(site: str, node: dict[str, Any] | None) -> SiteState:
    """What Flower says about a node, in words.

    >>> _state("south", {"status": "online", "online-at": "2026-03-01 09:30:00Z", "online-elapsed": 7260.0}).words
    'connected since 2026-03-01 09:30 UTC (2 h)'
    >>> _state("south", {"status": "offline", "offline-at": "2026-03-01 09:30:00Z"}).words
    'last seen 2026-03-01 09:30 UTC'
    >>> _state("south", {"status": "registered"}).words, _state("south", None).words
    ('never seen', 'not registered yet')
    """
    if node is None:
        return SiteState(site, False, False, "not registered yet")
    match node["status"]:
        case "online":
            since = f"connected since {_minute(node['online-at'])} ({_duration(node['online-elapsed'])})"
            return SiteState(site, True, False, since)
        case "offline":
            return SiteState(site, False, False, f"last seen {_minute(node['offline-at'])}")
        case "unregistered":
            return SiteState(site, False, False, "unregistered by hand")
        case _:
            return SiteState(site, False, False, "never seen")


def _minute(text: str) -> str:
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float) -> str:
    """A length of time, roughly.

    >>> _duration(59), _duration(61), _duration(7200), _duration(200_000)
    ('59 s', '1 min', '2 h', '2 d')
    """
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


class _Kept:
    """A program that is started again whenever it ends, at growing intervals while it keeps doing so."""

    def __init__(self, name: str, command: list[str], kit: Kit, ready: Callable[[], bool]) -> None:
        self.name, self._command, self._kit, self._ready = name, command, kit, ready
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s, self._started, self._again = 1.0, 0.0, 0.0

    def start(self) -> None:
        """Start it; what it prints goes where ours goes."""
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            cwd=self._kit.state / "cwd",  # empty: Flower would import our modules from there before the app's
            env=self._kit.environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for us alone.
        )

    def wait_until_ready(self, stopping: threading.Event) -> bool:
        """Wait until it answers; False where we were told to stop meanwhile.

        Raises:
            ValueError: It ended or took too long.
        """
        assert self._process is not None
        while not (self._ready() and self._process.poll() is None):
            if (code := self._process.poll()) is not None:
                raise ValueError(f"server: {self.name} must come up, got exit code {code}. Its last words stand above.")
            if time.monotonic() > self._started + READY_S:
                raise ValueError(f"server: {self.name} must answer within {READY_S:.0f} s, got no answer.")
            if stopping.wait(0.1):
                return False
        return True

    def revive(self, say: Say) -> bool:
        """Start it again where it has ended, and the pause is over; True while it runs."""
        assert self._process is not None
        if (code := self._process.poll()) is None:
            return True
        now = time.monotonic()
        if not self._again:
            self._pause_s = 1.0 if now - self._started > _LONGEST_PAUSE_S else min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._again = now + self._pause_s
            say(f"{self.name}: ended with exit code {code}, starts again in {self._pause_s:.0f} s")
        elif now >= self._again:
            self._again = 0.0
            self.start()
        return False

    def is_ready(self) -> bool:
        """Whether it answers."""
        return self._ready()

    def end(self) -> None:
        """Stop it, and wait until it has."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _keep(kit: Kit, programs: list[_Kept], stopping: threading.Event, say: Say, done_with: bytes) -> None:
    """Look once a second whether all run and who may take part, until we are told to stop."""
    superlink, fresh, again = programs[0], False, 0.0
    while not stopping.wait(1.0):
        [alive, *_] = [each.revive(say) for each in programs]
        fresh |= not alive
        if not alive or time.monotonic() < again or (fresh and not superlink.is_ready()):
            continue
        if fresh or done_with != _sites_file(kit):
            done_with = _catch_up(kit, say, fresh=fresh)
            fresh &= not done_with
            again = 0.0 if done_with else time.monotonic() + _RETRY_S


def _sites_file(kit: Kit) -> bytes:
    """The file as it is now; empty while it is being replaced."""
    try:
        return (kit.folder / "sites.json").read_bytes()
    except OSError:
        return b""


def _catch_up(kit: Kit, say: Say, *, fresh: bool) -> bytes:
    """Let Flower know who may take part; the file that this was read from, or nothing where it is to be tried again."""
    text = _sites_file(kit)
    try:
        if fresh:
            _forget_lost(kit, say)
        return text if synchronise(kit, read_sites(text.decode()), say) else b""
    except ValueError as error:  # the file is half copied, the SuperLink is busy: next time
        say(str(error))
        return b""


def _programs(kit: Kit, *, proxy: bool) -> list[_Kept]:
    """The SuperLink, and nginx where the public port is not the SuperLink's own."""
    about, folder = kit.about, kit.folder
    in_front = proxy and about.port != about.control_port
    port = about.control_port if proxy else about.port
    host = "127.0.0.1" if proxy or Address(host=about.host, port=about.port).is_loopback else "0.0.0.0"
    arguments = ["--host", host, "--port", str(port), "--enable-supernode-auth", NO_INSTALL]
    arguments += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.pem")]
    arguments += ["--ssl-keyfile", str(folder / "server.key"), "--database", str(kit.state / "state.db")]

    def answers(at: int) -> Callable[[], bool]:
        return lambda: healthy(at, folder / "ca.crt")

    superlink = [sys.executable, "-P", "-m", "server.flower_superlink", *arguments]
    kept = [_Kept("SuperLink", superlink, kit, answers(port))]
    write_connection(
        kit.state / "flower",
        f'address = "127.0.0.1:{port}"\nroot-certificates = {json.dumps(str(folder / "ca.crt"), ensure_ascii=False)}',
    )
    if in_front:
        nginx = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"]))
        if nginx is None:
            raise ValueError(
                "server: nginx must be installed (it lets sites through to the SuperLink, and nothing else), got none. "
                "Install it, or give --without-proxy and read what that opens."
            )
        kept.append(_Kept("nginx", [nginx, "-p", f"{folder}/", "-c", str(folder / "nginx.conf")], kit, answers(about.port)))
    return kept


def _end_strays(kit: Kit) -> None:
    """End what a server of this kit left behind when it was killed."""
    end_processes(kit.state, _GRACE_S)
    # nginx overwrites the environment that it would be found by, but it writes down who it is.
    path = kit.state / "nginx" / "nginx.pid"
    with suppress(OSError, ValueError):
        pid = int(path.read_text())
        command = Path(f"/proc/{pid}/cmdline")
        began = time.monotonic()
        while os.fsencode(kit.folder / "nginx.conf") in command.read_bytes():
            os.kill(pid, signal.SIGTERM if time.monotonic() < began + _GRACE_S else signal.SIGKILL)
            time.sleep(0.1)


def _prepare(kit: Kit) -> None:
    for name in ("flower", "cwd", "nginx"):
        (kit.state / name).mkdir(parents=True, exist_ok=True)
