"""A federation of separate sites on one machine: TLS, registered keys, one SuperNode a site, all on 127.0.0.1.

The same commands, on a machine each, are a deployment between hospitals: the README has them as a shell script.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from core.files import write_atomically
from core.flower_env import CONNECTION, NO_INSTALL
from core.keys import new_authority, new_server_certificate, new_site_key
from simulations.launch import Outcome, open_log, submit
from simulations.workplace import (
    Program,
    StartError,
    Workplace,
    ask,
    connect,
    free_ports,
    start,
    wait_until_healthy,
    workplace,
)

NodeValue = str | int | float | bool


@dataclass(frozen=True)
class Loopback:
    """A running federation on 127.0.0.1, whose SuperNodes look for the SuperLink at `port`; see `loopback_federation`."""

    place: Workplace
    folder: Path
    port: int

    def run(
        self,
        app: Path,
        overrides: str,
        *,
        log_path: Path,
        deadline_s: float,
        on_line: Callable[[str], None],
    ) -> Outcome:
        """Run the app at all sites; the arguments and the answer are those of `simulations.launch.simulate`."""
        with open_log(log_path) as log:
            outcome = submit(self.place, app, overrides=overrides, log=log, deadline_s=deadline_s, on_line=on_line)
            if not outcome.ok:
                for program in self.place.programs:
                    log.write(f"\n{program.name} wrote:\n{program.log()}\n")
        return outcome

    def join(self, site: str, key: Path, node_config: Mapping[str, NodeValue]) -> Program:
        """Start a SuperNode for a site, with a private key that is hopefully registered; does not wait for it."""
        [port] = free_ports(1)
        home = self.folder / "homes" / site
        home.mkdir(parents=True, exist_ok=True)
        address = ["--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.folder / "certificates/ca.crt")]
        arguments = [*address, "--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--node-config", node_config_text({"site": site, **node_config})]
        return start(self.place, "flower-supernode", arguments, name=site, env={"FLWR_HOME": str(home)})

    def online(self) -> int:
        """How many SuperNodes are connected now."""
        answer = ask(self.place, "supernode", "ls", CONNECTION)
        if not answer["success"]:
            raise StartError(f"`flwr supernode ls` failed: {answer}")
        return sum(node["status"] == "online" for node in answer["nodes"])


@contextmanager
def loopback_federation(
    folder: Path,
    sites: Mapping[str, Mapping[str, NodeValue]],
    *,
    env: Mapping[str, str] = MappingProxyType({}),
    start_s: float = 120.0,
    nodes_at: Callable[[int], int] = lambda port: port,
) -> Iterator[Loopback]:
    """Certificates, a SuperLink and a SuperNode for each site, ready to run; all stopped on leaving.

    Args:
        folder: Receives certificates, keys and the SuperLink's database, and keeps them.
        sites: For each site's name what its SuperNode alone knows (its `--node-config`), next to `site`, its name.
        env: Environment variables on top of this process's.
        start_s: Time for all to be connected.
        nodes_at: Given the SuperLink's port, the port at which the SuperNodes look for it, such as a relay's.

    Raises:
        StartError: A part did not come up, with what it wrote.
    """
    folder = folder.resolve()
    deadline = time.monotonic() + start_s
    certificates = make_certificates(folder / "certificates")
    with workplace(env, grace_s=5.0) as place:
        [port] = free_ports(1)
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth", NO_INSTALL]
        arguments += ["--ssl-ca-certfile", str(certificates / "ca.crt")]
        arguments += ["--ssl-certfile", str(certificates / "server.pem"), "--ssl-keyfile", str(certificates / "server.key")]
        superlink = start(place, "flower-superlink", [*arguments, "--database", str(folder / "state.db")])
        wait_until_healthy(superlink, port, deadline, certificates / "ca.crt")
        connect(place, f'address = "127.0.0.1:{port}"\nroot-certificates = {json.dumps(str(certificates / "ca.crt"))}')
        federation = Loopback(place, folder, nodes_at(port))
        nodes = []
        for site, node_config in sites.items():
            key = make_key(folder / "keys" / site)
            answer = ask(place, "supernode", "register", f"{key}.pub", CONNECTION, "--name", site)
            if not answer["success"]:
                raise StartError(f"The key of site {site} was not registered: {answer}")
            nodes.append(federation.join(site, key, node_config))
        while federation.online() < len(sites):
            for node in nodes:
                node.check_alive()
            if time.monotonic() > deadline:
                raise StartError(f"Not all of {', '.join(sites)} were connected after {start_s:.0f} s.")
            time.sleep(0.5)
        yield federation


def make_certificates(folder: Path) -> Path:
    """A new certificate authority and a server certificate for 127.0.0.1: `ca.crt`, `server.pem`, `server.key`."""
    server = new_server_certificate(new_authority(folder, "loopback"), ["localhost", "127.0.0.1"])
    write_atomically(folder / "server.pem", server.certificate, 0o644)
    write_atomically(folder / "server.key", server.key, 0o600)
    return folder


def make_key(path: Path) -> Path:
    """A new key of a site at `path`, and its public half at `path`.pub."""
    new_site_key(path)
    return path


def node_config_text(node_config: Mapping[str, NodeValue]) -> str:
    """The values as `--node-config` takes them.

    >>> print(node_config_text({"site": "north", "data-root": "/data/a b", "gpu": False, "share": 0.5}))
    site="north" data-root="/data/a b" gpu=false share=0.5
    """
    for name, value in node_config.items():
        if isinstance(value, str) and any(character in value for character in '"\\\n'):
            raise ValueError(
                f"node_config: {name} must be without quotation mark, backslash and line break, got {value!r}. Rename it."
            )
    return " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in node_config.items())
