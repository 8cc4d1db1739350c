import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from core.flower_env import environment, processes, program
from core.keys import fingerprint, new_site_key
from core.service import Service
from server import superlink
from server.cli import register
from server.consortium import Consortium
from server.provision import provision
from server.superlink import Kit, open_kit, read_sites, status, synchronise

COMMAND = [sys.executable, "-P", "-c", "from server.cli import server; server()"]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def plan_of(port: int, control_port: int, *sites: str) -> Consortium:
    listed: list[Any] = [{"name": site} for site in sites]
    server = f"127.0.0.1:{port}"
    return Consortium.model_validate({"consortium": "hills", "server": server, "control_port": control_port, "sites": listed})


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class FakeFlower:
    """The SuperLink's register of nodes, as the three commands of `flwr supernode` tell of it."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.asked: list[str] = []
        self.broken = False

    def ask(self, arguments: tuple[str, ...], **_: object) -> dict[str, Any]:
        self.asked.append(arguments[1])
        if self.broken:
            return {"success": False, "error-message": "Connection\nrefused"}
        match arguments:
            case ("supernode", "ls", "isocenter"):
                return {"success": True, "nodes": list(self.nodes.values())}
            case ("supernode", "unregister", node_id, "isocenter"):
                if self.nodes[node_id]["status"] == "unregistered":
                    return {"success": False, "error-message": "already deleted"}
                self.nodes[node_id]["status"] = "unregistered"
                return {"success": True, "node-id": node_id}
            case ("supernode", "register", path, "isocenter", "--name", _):
                key = Path(path).read_text()
                if key in self.keys:  # Flower keeps the keys of unregistered nodes
                    return {"success": False, "error-message": "[code: 23] Public key already in use"}
                node_id = str(1000 + len(self.nodes))
                self.keys[key] = node_id
                self.nodes[node_id] = {"node-id": node_id, "status": "registered"}
                return {"success": True, "node-id": int(node_id)}
        raise AssertionError(arguments)


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> FakeFlower:
    fake = FakeFlower()
    monkeypatch.setattr(superlink, "ask_flower", fake.ask)
    return fake


@pytest.fixture
def hills(tmp_path: Path) -> Path:
    provision(plan_of(443, 8443, "south", "north"), tmp_path / "hills")
    (tmp_path / "hills/server/state").mkdir()
    return tmp_path / "hills"


@pytest.fixture
def kit(hills: Path) -> Kit:
    return open_kit(hills / "server")


def test_new_sites_are_registered_once(kit: Kit, flower: FakeFlower):
    lines: list[str] = []
    assert synchronise(kit, kit.sites(), lines.append)
    assert [line.split(",")[0] for line in lines] == ["south: let in", "north: let in"]
    assert {node.site: node.node_id for node in kit.nodes().values()} == {"south": "1000", "north": "1001"}
    assert synchronise(kit, kit.sites(), lines.append)
    assert flower.asked == ["register", "register"]


def test_a_revoked_site_is_unregistered_and_a_renewed_one_comes_back(hills: Path, kit: Kit, flower: FakeFlower):
    lines: list[str] = []
    synchronise(kit, kit.sites(), lines.append)
    provision(plan_of(443, 8443, "south", "north"), hills, renew=["south"], revoke=["north"])
    assert synchronise(kit, kit.sites(), lines.append)
    assert [line.split(",")[0] for line in lines[2:]] == ["south: shut out", "north: shut out", "south: let in"]
    assert [node["status"] for node in flower.nodes.values()] == ["unregistered", "unregistered", "registered"]
    assert [(node.site, node.node_id) for node in kit.nodes().values()] == [("south", "1002")]


def test_what_fails_is_said_and_tried_again(kit: Kit, flower: FakeFlower):
    lines: list[str] = []
    flower.broken = True
    assert not synchronise(kit, kit.sites(), lines.append)
    assert lines == ["south: not let in yet: Connection refused", "north: not let in yet: Connection refused"]
    assert kit.nodes() == {}
    flower.broken = False
    assert synchronise(kit, kit.sites(), lines.append)


def test_a_crash_between_flower_and_our_list_is_made_good(hills: Path, kit: Kit, flower: FakeFlower):
    """Registered, then killed before it was written down; and the same for a revoked one."""
    synchronise(kit, kit.sites(), print)
    south = fingerprint(kit.sites().valid["south"])
    before = kit.nodes()
    kit.write_nodes({key: node for key, node in before.items() if key != south})
    assert synchronise(kit, kit.sites(), print)
    assert kit.nodes() == before
    provision(plan_of(443, 8443, "south", "north"), hills, revoke=["south"])
    flower.nodes[before[south].node_id]["status"] = "unregistered"
    assert synchronise(kit, kit.sites(), print)
    assert {node.site for node in kit.nodes().values()} == {"north"}


@pytest.mark.usefixtures("flower")
def test_a_node_is_not_taken_for_another(kit: Kit):
    """Two nodes that we know nothing of: either could be the site's."""
    synchronise(kit, kit.sites(), print)
    kit.write_nodes({})
    lines: list[str] = []
    assert not synchronise(kit, kit.sites(), lines.append)
    assert lines[0] == "south: not let in yet: [code: 23] Public key already in use"


def test_after_a_start_our_list_is_compared_with_flowers(kit: Kit, flower: FakeFlower):
    synchronise(kit, kit.sites(), print)
    lines: list[str] = []
    del flower.nodes["1000"]
    flower.nodes["1001"]["status"] = "unregistered"
    flower.nodes["7"] = {"node-id": "7", "status": "online"}
    superlink._forget_lost(kit, lines.append)
    assert {node.site for node in kit.nodes().values()} == {"north"}
    assert [line.split(":")[0] for line in lines] == ["north", "node 7"]
    assert "--renew north" in lines[0]
    assert "registered by somebody else" in lines[1]


def test_the_list_of_sites_is_checked(tmp_path: Path, kit: Kit):
    for text in ("", "[]", "{}", '{"sites": {"a": {}}, "revoked": []}', '{"sites": {"a": {"public_key": "x"}}, "revoked": []}'):
        with pytest.raises(ValueError, match=r"^server: sites\.json must be what `isocenter provision` wrote"):
            read_sites(text)
    with pytest.raises(ValueError, match=r"^server: server\.json must be in the kit, got No such file or directory\."):
        open_kit(tmp_path)
    (kit.folder / "server.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^server: server\.json must be what `isocenter provision` wrote"):
        open_kit(kit.folder)


def command() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def test_status_is_in_words(hills: Path, kit: Kit, flower: FakeFlower, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Service, "is_running", lambda _: True)
    synchronise(kit, kit.sites(), print)
    online = {"status": "online", "online-at": "2026-03-01 09:30:00Z", "online-elapsed": 7300.0}
    flower.nodes["1000"] |= online
    flower.nodes["1001"] |= {"status": "offline", "offline-at": "2026-03-01 08:00:00Z"}
    done = CliRunner().invoke(command(), ["server", "status", str(kit.folder)])
    assert done.stdout.splitlines() == [
        "south  connected since 2026-03-01 09:30 UTC (2 h)",
        "north  last seen 2026-03-01 08:00 UTC",
    ]
    assert done.exit_code == 3
    flower.nodes["1001"] |= online
    assert CliRunner().invoke(command(), ["server", "status", str(kit.folder)]).exit_code == 0
    provision(plan_of(443, 8443, "south", "north", "dale"), hills, revoke=["north"])
    done = CliRunner().invoke(command(), ["server", "status", str(kit.folder)])
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()[1:]] == ["not registered yet", "revoked"]
    flower.broken = True
    done = CliRunner().invoke(command(), ["server", "status", str(kit.folder)])
    assert (done.exit_code, done.stderr) == (1, "server: the SuperLink must answer, got: Connection refused\n")


def test_a_server_that_does_not_run_is_said_to(kit: Kit):
    with pytest.raises(ValueError, match=r"^server: it must run, got none on this machine\."):
        status(kit)
    assert not kit.service.stop()


def test_without_nginx_nothing_is_opened(kit: Kit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(superlink.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"^server: nginx must be installed .* --without-proxy and read what that opens\.$"):
        superlink.serve(kit, proxy=True, say=print)
    assert not (kit.state / "state.db").exists()


def answer_of(kit: Kit, path: str, method: str = "GET", port: int | None = None) -> int:
    context = ssl.create_default_context(cafile=kit.folder / "ca.crt")
    connection = HTTPSConnection("127.0.0.1", port or kit.about.port, timeout=30, context=context)
    connection.request(method, path)
    code = connection.getresponse().status
    connection.close()
    return code


def wait_for(true: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.2)


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[tuple[Path, Kit]]:
    """A provisioned consortium on this machine; whatever was started from it is gone afterwards."""
    port, control_port = free_ports(2)
    provision(plan_of(port, control_port, "south", "north"), tmp_path / "hills")
    kit = open_kit(tmp_path / "hills/server")
    try:
        yield tmp_path / "hills", kit
    finally:
        kit.service.stop()
        superlink._end_strays(kit)
        superlink.end_processes(tmp_path / "sites", 5.0)


def join(hills: Path, kit: Kit, site: str, key: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A SuperNode with this key, as a site starts it; its process and its log."""
    home = hills.parent / "sites" / site
    home.mkdir(parents=True)
    [port] = free_ports(1)
    arguments = ["--superlink", kit.about.server, "--root-certificates", str(hills / "sites/south/ca.crt")]
    arguments += ["--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [program("flower-supernode"), *arguments],
            env=environment(hills.parent / "sites", flower_home=home),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process, home / "log"


def words(kit: Kit) -> dict[str, str]:
    return {state.site: state.words.split(" since")[0] for state in status(kit)}


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_sites_come_in_through_the_proxy_and_revoked_ones_go(trial: tuple[Path, Kit]):
    hills, kit = trial
    started = subprocess.run([*COMMAND, "start", "--background", str(kit.folder)], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    again = subprocess.run([*COMMAND, "start", str(kit.folder)], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (1, f"{kit.service.runs_already}\n")
    assert words(kit) == {"south": "never seen", "north": "never seen"}, "who may come is known before the door opens"

    # The proxy: what sites need and nothing else, however it is spelt.
    assert answer_of(kit, "/health") == 200
    assert answer_of(kit, "/v1/fleet/pull-messages", "POST") == 415, "reaches the SuperLink, which wants another format"
    assert answer_of(kit, "/v1/control/list-nodes", "POST", port=kit.about.control_port) == 415, "behind the proxy it answers"
    for path in ("/v1/control/list-nodes", "/v1/runtime/get-nodes", "/", "//v1/fleet/x", "/v1/fleet/../control/list-nodes"):
        assert answer_of(kit, path, "POST") == 403
    for path in ("/v1/control/../fleet/x", "/v1/fleet/%2e%2e/control/list-nodes", "/v1/%66leet/x", "/V1/fleet/x"):
        assert answer_of(kit, path) == 403

    south, _ = join(hills, kit, "south", hills / "sites/south/site.key")
    new_site_key(hills.parent / "stranger.key")
    stranger, stranger_log = join(hills, kit, "stranger", hills.parent / "stranger.key")
    wait_for(lambda: words(kit)["south"] == "connected", "south to be connected")
    assert stranger.wait(120) != 0
    assert "Failed to activate SuperNode" in stranger_log.read_text()

    # Another site while it runs: nobody is disturbed. Then one is shut out.
    plan = plan_of(kit.about.port, kit.about.control_port, "south", "north", "dale")
    provision(plan, hills)
    wait_for(lambda: words(kit).get("dale") == "never seen", "dale to be registered")
    assert words(kit)["south"] == "connected"
    provision(plan, hills, revoke=["south"])
    assert south.wait(120) is not None
    wait_for(lambda: words(kit)["south"] == "revoked", "south to be shut out")
    back, back_log = join(hills, kit, "south-again", hills / "sites/south/site.key")
    assert back.wait(120) != 0
    assert "Failed to activate SuperNode" in back_log.read_text()

    # What dies is started again, and who was registered still is.
    before = kit.nodes()
    for killed in superlink_processes(kit):
        os.kill(killed, signal.SIGKILL)
    wait_for(lambda: answer_of(kit, "/health") != 200, "the SuperLink to be gone")
    wait_for(lambda: answer_of(kit, "/health") == 200, "the SuperLink to be back")
    wait_for(lambda: "starts again" in (kit.state / "server.log").read_text(), "the server to say so")
    assert words(kit) == {"north": "never seen", "dale": "never seen", "south": "revoked"}
    assert kit.nodes() == before

    # Killed itself, the server's next start ends what is left and goes on.
    os.kill(int((kit.state / "server.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: not kit.service.is_running(), "the server to be gone")
    restarted = subprocess.run([*COMMAND, "start", "--background", str(kit.folder)], capture_output=True, text=True, check=False)
    assert restarted.returncode == 0, restarted.stderr
    assert words(kit) == {"north": "never seen", "dale": "never seen", "south": "revoked"}
    stopped = subprocess.run([*COMMAND, "stop", str(kit.folder)], capture_output=True, text=True, check=False)
    assert stopped.stdout == "stopped\n"
    assert processes(kit.state) == []
    with pytest.raises(ConnectionRefusedError):
        answer_of(kit, "/health")


def superlink_processes(kit: Kit) -> list[int]:
    """The SuperLink itself, without what it has started."""
    return [pid for pid in processes(kit.state) if b"server.flower_superlink" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_server_in_the_foreground_stops_when_told_to(tmp_path: Path):
    [port] = free_ports(1)
    provision(plan_of(port, port, "south"), tmp_path / "hills")
    kit = open_kit(tmp_path / "hills/server")
    with subprocess.Popen([*COMMAND, "start", str(kit.folder)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        lines = [next(line for line in server.stdout if line.startswith(start)) for start in ("south: let in", "hills: sites")]
        assert lines[1] == f"hills: sites may come to 127.0.0.1:{port}\n"
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        assert {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}
        config = (kit.state / "flower/config.toml").read_text()
        assert json.dumps(str(kit.folder / "ca.crt")) in config
        server.send_signal(signal.SIGTERM)
        rest = server.stdout.read()
        assert server.wait() == 0
    assert "hills: stopped" in rest
    assert processes(kit.state) == []
