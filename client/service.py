"""A site, kept connected from its kit: Flower's SuperNode behind the site's gate, started again whenever it ends."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from client.policy import SitePolicy, read_policy
from client.state import STATUS, private_folder
from core.faults import SiteError
from core.files import write_atomically
from core.flower_env import end_processes, environment, free_port, plain
from core.keys import fingerprint, read_site_key
from core.service import Service, leave_running, stopped_by_signals

CONNECTION = "connection.json"
LONGEST_LOG = 20 << 20
PAUSE_S = 10.0  # between two starts of a SuperNode that ended
FORGET_S = 75.0  # for so long after a kill a server takes the node for connected and refuses it
GRACE_S = 10.0
ATTEMPTS = 3  # to reach the server before it is told that it does not answer
READY = "runs, and is"
Say = Callable[[str], None]


class About(BaseModel):
    """What a site's kit says of itself, `kit.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    site: str
    consortium: str
    server: str
    ca_sha256: str
    flwr: str


@dataclass(frozen=True)
class Kit:
    """A site's kit on its machine; all that running adds to it lies in `state`."""

    folder: Path
    about: About

    @property
    def state(self) -> Path:
        """What the site keeps between tasks."""
        return self.folder / "state"

    @property
    def service(self) -> Service:
        """The process that runs from it."""
        return Service("site", self.state)

    def policy(self) -> SitePolicy:
        """The site's policy.

        Raises:
            ValueError: it cannot be read, or is another site's.
        """
        policy = read_policy(self.folder / "site.yaml")
        if policy.site != self.about.site:
            raise ValueError(f"site: site.yaml must be of {self.about.site}, got {policy.site}. Keep `site:` as the kit had it.")
        return policy

    def status(self, name: str) -> dict[str, Any]:
        """What a process of the site last told of itself; nothing where it has told nothing."""
        try:
            told: dict[str, Any] = json.loads((self.state / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return told


def open_kit(folder: Path) -> Kit:
    """The site's kit in a folder, checked to be whole.

    Raises:
        ValueError: it is none, or something in it was exchanged.
    """
    folder = folder.resolve()
    try:
        about = About.model_validate_json((folder / "kit.json").read_bytes())
        digest = hashlib.sha256((folder / "ca.crt").read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(
            f"site: {Path(error.filename).name} must be in the kit, got {error.strerror}. Name the kit's folder."
        ) from None
    except ValidationError:
        raise ValueError("site: kit.json must be what `isocenter provision` wrote, got something else.") from None
    if odd := sorted(set('"\\\n') & set(str(folder))):
        raise ValueError(f"site: the kit's folder must have no quotation mark, backslash or line break, got {odd}. Rename it.")
    if digest != about.ca_sha256:
        raise ValueError("site: ca.crt must be the one that kit.json names, got another. Ask the coordinator for the kit again.")
    return Kit(folder, about)


@dataclass
class Watch:
    """What a SuperNode writes, in words for people.

    Attributes:
        kit: the site's.
        key: fingerprint of its key.
        say: called with each line.
    """

    kit: Kit
    key: str
    say: Say
    connected: bool = False
    last_connected: float = -FORGET_S
    refused_since: float | None = None
    reason: str = ""
    attempts: int = 0
    told: str = field(default="")

    @property
    def shut_out(self) -> str:
        """Why a server lets nobody in who has this key."""
        server = self.kit.about.server
        return f"{server} does not know this site's key, or it was revoked: {self.key}; the coordinator can tell which"

    def line(self, text: str) -> None:
        """Take in a line that the SuperNode wrote."""
        server = self.kit.about.server
        if text == "isocenter| connected":
            self.connected, self.last_connected, self.refused_since, self.reason = True, time.monotonic(), None, ""
            self.tell("connected", f"{READY} connected to {server}")
        elif text.startswith("isocenter| "):
            self.say(f"{self.kit.about.site}: {text.removeprefix('isocenter| ')}")
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            self.reason = f"{server} does not have this consortium's certificate (ca.crt): the wrong server, or the wrong kit"
        elif "Failed to activate SuperNode" in text:
            self.refused_since = self.refused_since or time.monotonic()
            if time.monotonic() - self.last_connected < FORGET_S:
                self.reason = "the server still holds the connection that was cut; it lets this site in again within a minute"
            else:
                self.reason = self.shut_out
        elif "Connection attempt failed" in text and not self.connected:
            self.attempts += 1
            if self.attempts >= ATTEMPTS:
                self.tell("connecting", f"{READY} looking for {server}, which does not answer; it goes on trying")

    def ended(self, code: int) -> None:
        """Take in that the SuperNode ended."""
        if self.connected and code == 0:  # how Flower's ends unasked: the server no longer takes its key
            self.last_connected, self.reason = -FORGET_S, self.shut_out
        elif self.connected:
            self.last_connected = time.monotonic()
        self.connected, self.attempts = False, 0
        reason, self.reason = self.reason or f"its SuperNode ended with exit code {code}", ""
        self.tell("refused", f"is not connected: {reason}; it tries again in {PAUSE_S:.0f} s")

    def tell(self, state: str, words: str) -> None:
        """Say where the connection stands, once for every change, and keep it for `isocenter site status`."""
        if words != self.told:
            self.told = words
            self.say(f"{self.kit.about.site}: {words}")
        about = {"state": state, "words": words, "since": datetime.now(UTC).isoformat(timespec="seconds")}
        with suppress(OSError):  # a full disk must not end the site
            write_atomically(self.kit.state / CONNECTION, json.dumps(about).encode(), 0o600)


def serve(kit: Kit, *, say: Say) -> None:
    """Keep the site connected until SIGTERM or Ctrl-C, and stop all of it then.

    Raises:
        ValueError: the kit cannot be used, or a site runs from it already.
    """
    try:
        private_folder(kit.state)
    except SiteError as error:
        raise ValueError(f"site: {error.text}") from None
    with kit.service.running(), stopped_by_signals() as stopping:
        end_processes(kit.state, GRACE_S)
        kit.policy()
        watch = Watch(kit, fingerprint(read_site_key(kit.folder / "site.key").public_key()), say)
        try:
            while not stopping.is_set():
                process = start_supernode(kit)
                reader = threading.Thread(target=follow, args=(process, kit, watch), daemon=True)
                reader.start()
                while process.poll() is None and not stopping.wait(0.2):
                    pass
                if stopping.is_set():
                    break
                reader.join(GRACE_S)
                end_processes(kit.state, 0.0)  # the worker
                watch.ended(process.returncode)
                stopping.wait(PAUSE_S)
        finally:
            end_processes(kit.state, GRACE_S)
            watch.tell("stopped", "stopped")


def start_supernode(kit: Kit) -> subprocess.Popen[bytes]:
    """Start the SuperNode behind the gate, with nothing in its environment or arguments that names a scan."""
    for name in ("flower", "cwd", "logs"):
        private_folder(kit.state / name)
    site_file = json.dumps(str(kit.folder / "site.yaml"), ensure_ascii=False)
    arguments = ["--superlink", kit.about.server, "--root-certificates", str(kit.folder / "ca.crt")]
    arguments += ["--auth-supernode-private-key", str(kit.folder / "site.key")]
    arguments += ["--host", "127.0.0.1", "--port", str(free_port())]
    arguments += ["--node-config", f"site-file={site_file}"]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "client.supernode", str(kit.state), *arguments],
        cwd=kit.state / "cwd",
        env=environment(kit.state, flower_home=kit.state / "flower"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def follow(process: subprocess.Popen[bytes], kit: Kit, watch: Watch) -> None:
    """Keep what the SuperNode and the tasks under it write, in the site's own log, and watch it."""
    path = kit.state / "logs" / "supernode.log"
    if path.exists() and path.stat().st_size > LONGEST_LOG:
        path.replace(path.with_suffix(".log.1"))
    assert process.stdout is not None
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as log:
        for line in process.stdout:
            text = plain(line.decode(errors="replace")).rstrip()
            watch.line(text)
            with suppress(OSError):  # on a full disk the line is lost; unread, the SuperNode would wait for ever
                log.write(text.encode() + b"\n")


def start_in_background(kit: Kit, wait_s: float = 60.0) -> str:
    """Start `isocenter site start` in a session of its own; what it says first.

    Raises:
        ValueError: one runs already, or it ended.
    """
    if kit.service.is_running():
        raise ValueError(kit.service.runs_already)
    private_folder(private_folder(kit.state) / "logs")
    log_path = kit.state / "logs" / "site.log"
    with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        before = log.tell()
        command = [sys.executable, "-P", "-c", "from client.cli import site; site()", "start", str(kit.folder)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    leave_running(process)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        lines = [line for line in log_path.read_bytes()[before:].decode(errors="replace").splitlines() if line.strip()]
        if process.poll() is not None:
            raise ValueError(f"site: it must come up, got: {lines[-1] if lines else 'no word'}")
        if lines:
            return lines[-1]
        time.sleep(0.1)
    return f"{kit.about.site}: started, log in {log_path}"


def status(kit: Kit, now: datetime) -> list[tuple[str, str]]:
    """How the site stands, as pairs of a word and a sentence."""
    running = kit.service.is_running()
    connection, work = kit.status(CONNECTION), kit.status(STATUS)
    lines = [("site", f"{kit.about.site} of {kit.about.consortium}")]
    lines.append(("connection", connection.get("words", "never started") if running else "does not run"))
    if connection and running:
        lines.append(("since", connection["since"]))
    lines.append(("work", describe_work(work, now) if running and work else "none yet" if running else "none"))
    if device := work.get("device"):
        lines.append(("device", device))
    return lines


def describe_work(work: dict[str, Any], now: datetime) -> str:
    """What the worker last told of itself, in words.

    >>> at = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
    >>> work = {"task": "train.pretrain", "stage": "pretrain", "round": 3, "what": "step", "done": 4, "total": 6}
    >>> describe_work(work | {"told": "2026-03-01T09:29:58+00:00"}, at)
    'training pretrain round 3, step 4 of 6 (2 s ago)'
    >>> describe_work({"task": "", "ended": "2026-03-01T09:00:00+00:00", "told": "2026-03-01T09:00:00+00:00"}, at)
    'waits for the next task since 2026-03-01T09:00:00+00:00'
    """
    if not work["task"]:
        return f"waits for the next task since {work['ended']}"
    ago = (now - datetime.fromisoformat(work["told"])).total_seconds()
    what = re.sub(r"^train\..*", "training", work["task"]).removeprefix("query.")
    where = f" {work['stage']} round {work['round']}" if "round" in work and "stage" in work else ""
    step = f", {work['what']} {work['done']} of {work['total']}" if "what" in work else ""
    return f"{what}{where}{step} ({ago:.0f} s ago)"
