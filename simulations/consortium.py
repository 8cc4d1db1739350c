"""A consortium on one machine: server and sites from kits, as processes of their own that meet over TLS on 127.0.0.1.

The same kits, on a machine each, are a deployment between hospitals.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from client.approval import Approvals
from client.service import Kit as SiteKit
from client.service import open_kit as open_site
from client.service import start_in_background as start_site
from client.state import private_folder
from core.flower_env import environment, free_port, program
from server.consortium import read_consortium
from server.provision import provision
from server.superlink import Kit as ServerKit
from server.superlink import open_kit as open_server
from server.superlink import start_in_background as start_server
from server.superlink import status
from simulations.launch import Outcome, open_log, submit
from simulations.workplace import StartError, Workplace

APP = Path(__file__).parents[1]
Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Consortium:
    """A running consortium; see `local_consortium`.

    Attributes:
        server: its kit.
        sites: the kits by site.
    """

    server: ServerKit
    sites: Mapping[str, SiteKit] = field(default_factory=dict)

    @property
    def folders(self) -> list[Path]:
        """The marks by which `core.flower_env.processes` finds all that runs."""
        return [self.server.state, *(site.state for site in self.sites.values())]

    def run(self, overrides: str, *, log_path: Path, deadline_s: float, on_line: Callable[[str], None]) -> Outcome:
        """Run the app at all sites; the arguments and the answer are those of `simulations.launch.simulate`."""
        with open_log(log_path) as log:
            place = Workplace(self.server.state, self.server.environment())
            return submit(place, APP, overrides=overrides, log=log, deadline_s=deadline_s, on_line=on_line)

    def connected(self) -> set[str]:
        """Names of the sites that the server sees."""
        return {each.site for each in status(self.server) if each.connected}


@contextmanager
def local_consortium(
    folder: Path,
    policies: Mapping[str, Policy],
    *,
    start_s: float = 120.0,
    nodes_at: Callable[[int], int] = lambda port: port,
    starts: Mapping[str, Callable[[SiteKit], object]] = MappingProxyType({}),
    absent: Collection[str] = (),
) -> Iterator[Consortium]:
    """Kits, a server and a site for each policy, connected, with the app approved; all stopped on leaving.

    Args:
        folder: New; receives the kits and all that runs from them.
        policies: For each site's name what its `site.yaml` holds beside the name.
        start_s: Time for all to be connected.
        nodes_at: Given the server's port, the port at which the sites look for it, such as a relay's.
        starts: What starts a site from its kit, for sites that do not start as all do.
        absent: Further sites, which have a kit and never start.

    Raises:
        StartError: A part did not come up.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, mode=0o700)
    port = free_port()
    plan = folder / "consortium.yaml"
    about = {"consortium": "local", "server": f"127.0.0.1:{port}", "control_port": port, "sites": [*policies, *absent]}
    plan.write_text(yaml.safe_dump(about), encoding="utf-8")
    provision(read_consortium(plan), folder, requests=[], renew=[], revoke=[])
    app = bundle()
    with ExitStack() as stack:
        server = open_server(folder / "server")
        stack.callback(server.service.stop)
        try:
            start_server(server, [])
            sites = {}
            for name, policy in policies.items():
                site = sites[name] = open_site(prepared(folder / "sites" / name, name, policy, nodes_at(port)))
                Approvals(private_folder(site.state)).approve(Approvals(site.state).keep_pending(app))
                stack.callback(site.service.stop)
                starts.get(name, start_site)(site)
            consortium = Consortium(server, sites)
            wait_until(lambda: consortium.connected() == set(policies), f"{', '.join(policies)} connected", start_s)
        except ValueError as error:
            raise StartError(str(error)) from None
        yield consortium


def prepared(kit: Path, name: str, policy: Policy, port: int) -> Path:
    """The kit with the site's policy, which looks for the server at a port."""
    (kit / "site.yaml").write_text(yaml.safe_dump({"site": name, **policy}), encoding="utf-8")
    about = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
    (kit / "kit.json").write_text(json.dumps(about | {"server": f"127.0.0.1:{port}"}), encoding="utf-8")
    return kit


def bundle() -> bytes:
    """The app as Flower sends it to the sites."""
    with tempfile.TemporaryDirectory(prefix="iso-") as name:
        folder = Path(name)
        command = [program("flwr"), "build", "--app", str(APP)]
        options = {"cwd": folder, "env": environment(folder, folder), "capture_output": True}
        done = subprocess.run(command, **options, check=False)  # type: ignore[call-overload]
        found = list(folder.glob("*.fab"))
        if len(found) != 1:
            raise StartError(f"`flwr build` must make one bundle, got {len(found)}: {done.stdout + done.stderr}")
        return found[0].read_bytes()


def wait_until(found: Callable[[], bool], what: str, limit_s: float) -> None:
    """Wait until something is so.

    Raises:
        StartError: it is not in time.
    """
    deadline = time.monotonic() + limit_s
    while not found():
        if time.monotonic() > deadline:
            raise StartError(f"{what}: not within {limit_s:.0f} s.")
        time.sleep(1)
