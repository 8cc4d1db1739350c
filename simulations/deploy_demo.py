"""A consortium on one machine, from its file to a report: `make deploy-demo`, or ``python -m simulations.deploy_demo FOLDER``.

Provisions kits, starts the server and three sites as processes of their own (own home, data, policy and key) that meet over TLS
on the loopback, runs, and shows on the way what is refused: an app that no site has approved, a key that nobody registered, a
server that another authority vouches for, and a site that was revoked. Whatever does not happen as it should ends it with exit
code 1. The commands are those of a deployment; only the addresses are this machine's.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from core.flower_env import free_port
from simulations.consortium import wait_until
from simulations.workplace import StartError

SITES = ("harbor", "hill", "south")
SCALE = "0.3"
LIMIT_S = 120.0
RUN = ("experiment=tiny", "data=sites", "name=demo", "num_rounds=3", "policy.min_group=2")
POLICY = """site: {site}
data: {{root: {data}}}
cache_root: {home}/cache
threads: 1
share_per_scan: true
groups: {{min_group: 2, diagonal_subjects: 10}}
"""


class DemoError(RuntimeError):
    """Something did not happen as it should; the text says what."""


def command(*arguments: str, home: Path, ok: bool = True, show: bool = True) -> str:
    """Run an `isocenter` command as on a machine of its own, and return what it printed.

    Raises:
        DemoError: it succeeded where it should not, or failed where it should.
    """
    shown = " ".join(arguments)
    if show:
        typer.secho(f"$ isocenter {shown}", dim=True)
    environment = {**os.environ, "HOME": str(home), "COLUMNS": "200"}
    script = str(Path(sys.executable).with_name("isocenter"))
    done = subprocess.run(
        [script, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if (done.returncode == 0) is not ok:
        raise DemoError(f"isocenter {shown}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def first(pattern: str, text: str, what: str) -> str:
    """The line of a text that holds a pattern.

    Raises:
        DemoError: none does.
    """
    for line in text.splitlines():
        if re.search(pattern, line):
            return line.strip()
    raise DemoError(f"{what}: no line with {pattern!r} in\n{text}")


def main(
    folder: Annotated[Path, typer.Argument(help="New folder that receives everything.")] = Path("runs/deploy-demo"),
    overrides: Annotated[list[str] | None, typer.Argument(help="Of the run; a tiny one by default.", show_default=False)] = None,
) -> None:
    """Provision a consortium of three sites, run it on this machine as if each were far away, and show what is refused."""
    began = time.monotonic()
    folder = folder.resolve()
    if folder.exists():
        shutil.rmtree(folder)
    try:
        report = demonstrate(folder, overrides or list(RUN))
    except (DemoError, StartError) as error:
        typer.echo(f"deploy-demo: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"\nall of it in {time.monotonic() - began:.0f} s; open {report}")


def demonstrate(folder: Path, overrides: Sequence[str]) -> Path:
    """The whole of it; the report's path.

    Raises:
        DemoError: something did not happen as it should.
    """
    coordinator, server = folder / "coordinator", folder / "server"
    homes = {site: folder / site for site in SITES}
    for home in (coordinator, server, *homes.values()):
        home.mkdir(parents=True, mode=0o700)
    heading("The hospitals, each with scans of its own")
    command("phantom", str(folder / "hospitals"), "--scale", SCALE, home=folder)

    heading("The coordinator makes a kit for the server and one for each site; south makes its own key")
    port = free_port()
    proxy = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is not None
    typer.echo(
        "nginx stands before the server" if proxy else "without nginx: it is not installed, the server is reached directly"
    )
    plan = coordinator / "hills.yaml"
    plan.write_text(
        f"consortium: hills\nserver: 127.0.0.1:{port}\ncontrol_port: {free_port() if proxy else port}\n"
        "sites: [harbor, hill, {name: south, key: site}]\n",
        encoding="utf-8",
    )
    kits = coordinator / "hills"
    provision = ("provision", str(plan), "--output", str(kits))
    say(command(*provision, home=coordinator))
    for site, home in homes.items():
        shutil.copytree(kits / "sites" / site, home / "kit")
        policy = POLICY.format(site=site, data=folder / "hospitals" / site, home=home)
        (home / "kit" / "site.yaml").write_text(policy, encoding="utf-8")
    say(command("site", "init", str(homes["south"] / "kit"), home=homes["south"]))
    say(command(*provision, "--request", str(homes["south"] / "kit" / "south.csr"), home=coordinator))
    shutil.copytree(kits / "server", server / "kit")

    running = [("server", server)]
    try:
        heading("The server and the sites, each a process of its own")
        say(command("server", "start", str(server / "kit"), "--background", home=server))
        for home in homes.values():
            running.append(("site", home))
            say(command("site", "start", str(home / "kit"), "--background", home=home))
        wait_until(lambda: all_connected(server), "all sites connected", LIMIT_S)
        say(command("server", "status", str(server / "kit"), home=server))

        heading("A key that nobody registered, and a kit of another authority")
        for reason, home in uninvited(folder, kits, port).items():
            running.append(("site", home))
            say(command("site", "start", str(home / "kit"), "--background", home=home))
            wait_until(partial(refused_for, home, reason), f"{home.name} refused", LIMIT_S)
            say(f"{home.name}: {first(reason, standing(home), home.name)}")
            say(command("site", "stop", str(home / "kit"), home=home))
            running.pop()

        heading("An app that no site has approved")
        refused = command("run", "--at", str(server / "kit"), *overrides, home=server, ok=False)
        say(first("must approve the app", refused, "unapproved app"))
        for site, home in homes.items():
            shown = command("site", "approve", str(home / "kit"), "--yes", home=home)
            typer.echo(f"{site}: {shown.strip().splitlines()[-1]}")

        heading("The run")
        told = command("run", "--at", str(server / "kit"), *overrides, home=server)
        say(told)
        report = Path(first("^open ", told, "the run's report").removeprefix("open "))

        heading("A site that was revoked")
        say(command(*provision, "--revoke", "hill", home=coordinator))
        shutil.copy(kits / "server" / "sites.json", server / "kit" / "sites.json")
        wait_until(partial(refused_for, homes["hill"], "does not know this site's key"), "hill shut out", LIMIT_S)
        say(f"hill: {first('does not know', standing(homes['hill']), 'hill')}")

        heading("What left each site, by its own log")
        for site, home in homes.items():
            shown = command("site", "audit", str(home / "kit"), "--last", "3", home=home)
            typer.echo(f"{site}: {first('is whole', shown, site)}")
    finally:
        for kind, home in reversed(running):
            command(kind, "stop", str(home / "kit"), home=home)
    return report


def uninvited(folder: Path, kits: Path, port: int) -> dict[str, Path]:
    """Homes of two who want to take part and may not, by what they will be told."""
    from core.keys import new_site_key

    homes = {name: folder / name for name in ("stranger", "elsewhere")}
    shutil.copytree(kits / "sites" / "harbor", homes["stranger"] / "kit")
    for name in ("site.key", "site.pub"):
        (homes["stranger"] / "kit" / name).unlink()
    new_site_key(homes["stranger"] / "kit" / "site.key")
    plan = homes["elsewhere"] / "other.yaml"
    plan.parent.mkdir()
    plan.write_text(f"consortium: valleys\nserver: 127.0.0.1:{port}\ncontrol_port: {port}\nsites: [harbor]\n", encoding="utf-8")
    command("provision", str(plan), "--output", str(homes["elsewhere"] / "valleys"), home=homes["elsewhere"])
    shutil.copytree(homes["elsewhere"] / "valleys" / "sites" / "harbor", homes["elsewhere"] / "kit")
    for home in homes.values():
        home.chmod(0o700)
    return {"does not know this site's key": homes["stranger"], "consortium's certificate": homes["elsewhere"]}


def all_connected(server: Path) -> bool:
    """Whether the server sees every site."""
    try:
        command("server", "status", str(server / "kit"), home=server, show=False)
    except DemoError:
        return False
    return True


def standing(home: Path) -> str:
    """What a site says of its connection."""
    return command("site", "status", str(home / "kit"), home=home, show=False)


def refused_for(home: Path, reason: str) -> bool:
    """Whether a site says that it is not let in for this reason."""
    return reason in standing(home)


def heading(text: str) -> None:
    """Begin a part."""
    typer.secho(f"\n{text}", bold=True)


def say(text: str) -> None:
    """Show what a command printed."""
    typer.echo("\n".join(f"  {line}" for line in text.strip().splitlines()))


if __name__ == "__main__":
    typer.run(main)
