"""A consortium on one machine, from its file to a report: `make deploy-demo`, or ``python -m simulations.deploy_demo FOLDER``.

Provisions kits, starts the server and three sites as processes of their own (own home, data, policy and key) that meet over TLS
on the loopback, runs, and shows on the way what is refused: an app that no site has approved, a key that nobody registered, a
server that another authority vouches for, and a site that was revoked. Whatever does not happen as it should ends it with exit
code 1. The commands are those of a deployment; only the addresses are this machine's.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from client.service import CONNECTION, open_kit
from core.flower_env import free_port
from core.keys import new_site_key
from simulations.consortium import wait_until
from simulations.workplace import StartError

SITES = ("harbor", "hill", "south")
SCALE = "0.3"
LIMIT_S = 120.0
RUN = ("experiment=tiny", "data=sites", "name=demo", "policy.min_group=2")
UNKNOWN = "does not know this site's key"
POLICY = """site: {site}
data: {{root: {data}}}
cache_root: {home}/cache
threads: 1
share_per_scan: true
groups: {{min_group: 2, diagonal_subjects: 10}}
"""


class DemoError(RuntimeError):
    """Something did not happen as it should; the text says what."""


def command(*arguments: str, home: Path, ok: bool = True, on_line: Callable[[str], None] = lambda _: None) -> str:
    """Run an `isocenter` command as on a machine of its own, and return what it printed.

    Args:
        arguments: of the command.
        home: of its user.
        ok: whether it must succeed; otherwise it must fail.
        on_line: called with each line as it comes.

    Raises:
        DemoError: it succeeded where it should not, or failed where it should.
    """
    shown = " ".join(arguments)
    typer.secho(f"$ isocenter {shown}", dim=True)
    environment = {**os.environ, "HOME": str(home), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    script = str(Path(sys.executable).with_name("isocenter"))
    quietly: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines = []
    with subprocess.Popen([script, *arguments], env=environment, text=True, **quietly) as process:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line)
            lines.append(line)
    if (process.returncode == 0) is not ok:
        raise DemoError(f"isocenter {shown}: exit code {process.returncode}\n{''.join(lines)}")
    return "".join(lines)


def at_each(*arguments: str, homes: Sequence[Path]) -> list[str]:
    """Run an `isocenter` command on the kits in several homes at the same time; what each printed."""
    verbs, options = arguments[:2], arguments[2:]
    with ThreadPoolExecutor(len(homes)) as pool:
        return list(pool.map(lambda home: command(*verbs, str(home / "kit"), *options, home=home), homes))


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
    strangers = uninvited(folder, kits, port)

    services = [*homes.values(), *strangers]
    try:
        heading("The server, the sites, a key that nobody registered, and a kit of another authority, each a process of its own")
        say(command("server", "start", str(server / "kit"), "--background", home=server))
        at_each("site", "start", "--background", homes=services)
        for home in services:
            say(told(home, strangers.get(home, "is connected")))
        say(command("server", "status", str(server / "kit"), home=server))
        at_each("site", "stop", homes=list(strangers))
        services = list(homes.values())

        heading("An app that no site has approved")
        refused = command("run", "--at", str(server / "kit"), *overrides, home=server, ok=False)
        say(first("must approve the app", refused, "unapproved app"))
        again = first("goes on with it", refused, "how to go on").partition("`isocenter ")[2].partition("`")[0]
        for site, shown in zip(homes, at_each("site", "approve", "--yes", homes=services), strict=True):
            typer.echo(f"{site}: {first('^approved', shown, site)}")

        heading("The run")
        ran = command(*shlex.split(again), home=server, on_line=say)
        report = Path(first("^open ", ran, "the run's report").removeprefix("open "))

        heading("A site that was revoked, and what left each, by its own log")
        say(command(*provision, "--revoke", "hill", home=coordinator))
        shutil.copy(kits / "server" / "sites.json", server / "kit" / "sites.json")
        for site, shown in zip(homes, at_each("site", "audit", "--last", "3", homes=services), strict=True):
            typer.echo(f"{site}: {first('is whole', shown, site)}")
        say(told(homes["hill"], UNKNOWN))
    finally:
        at_each("site", "stop", homes=services)
        at_each("server", "stop", homes=[server])
    return report


def uninvited(folder: Path, kits: Path, port: int) -> dict[Path, str]:
    """Homes of two who want to take part and may not, and what each will be told."""
    stranger, elsewhere = folder / "stranger", folder / "elsewhere"
    shutil.copytree(kits / "sites" / "harbor", stranger / "kit")
    for name in ("site.key", "site.pub"):
        (stranger / "kit" / name).unlink()
    new_site_key(stranger / "kit" / "site.key")
    plan = elsewhere / "other.yaml"
    plan.parent.mkdir()
    plan.write_text(f"consortium: valleys\nserver: 127.0.0.1:{port}\ncontrol_port: {port}\nsites: [harbor]\n", encoding="utf-8")
    command("provision", str(plan), "--output", str(elsewhere / "valleys"), home=elsewhere)
    shutil.copytree(elsewhere / "valleys" / "sites" / "harbor", elsewhere / "kit")
    for home in (stranger, elsewhere):
        home.chmod(0o700)
    return {stranger: UNKNOWN, elsewhere: "consortium's certificate"}


def told(home: Path, words: str) -> str:
    """What a site says of its connection, as `isocenter site status` does, once it says these words.

    Raises:
        StartError: it does not in time.
    """
    kit = open_kit(home / "kit")
    wait_until(lambda: words in kit.status(CONNECTION).get("words", ""), f"{home.name}: {words}", LIMIT_S)
    return f"{home.name}: {kit.status(CONNECTION)['words']}"


def heading(text: str) -> None:
    """Begin a part."""
    typer.secho(f"\n{text}", bold=True)


def say(text: str) -> None:
    """Show what a command printed."""
    typer.echo("\n".join(f"  {line}" for line in text.strip().splitlines()))


if __name__ == "__main__":
    typer.run(main)
