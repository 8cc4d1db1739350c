"""Commands of the coordinator: `isocenter provision`, `isocenter server start | stop | status`."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

server = typer.Typer(help="The server of a consortium, from the kit that `isocenter provision` made.", no_args_is_help=True)
Kit = Annotated[Path, typer.Argument(help="Folder of the server's kit.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the console script."""
    app.command()(provision)
    app.command()(status)
    app.command()(watch)
    app.add_typer(server, name="server")


def provision(
    consortium: Annotated[Path, typer.Argument(help="The consortium's file, YAML.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the kits; the consortium's name by default.", show_default=False)
    ] = None,
    request: Annotated[
        list[Path] | None, typer.Option(help="What a site sent after `isocenter site init`; repeat for each.", show_default=False)
    ] = None,
    renew: Annotated[
        list[str] | None, typer.Option(help="`server` for a new certificate, or a site for a new key.", show_default=False)
    ] = None,
    revoke: Annotated[list[str] | None, typer.Option(help="A site whose key shall be shut out.", show_default=False)] = None,
) -> None:
    """Make the kits of a consortium: keys, certificates and instructions for the server and for each site.

    The file names the consortium, the address that sites dial, and the sites:

    consortium: hills

    server: fl.example.org:443

    sites: [south, {name: hill, key: site}]

    A private key is made here and travels in the site's kit, or, with `key: site`, at the site, which sends a request. Run it
    again after a change of the file: it adds what is new and leaves what was issued as it is, so another site changes nothing
    for the others. Kits lie in OUTPUT/sites and OUTPUT/server; OUTPUT/authority leaves this machine as a backup only.
    """
    from server.consortium import read_consortium
    from server.provision import provision as make_kits

    try:
        plan = read_consortium(consortium)
        folder = output or Path(plan.consortium)
        lines = make_kits(plan, folder, requests=request or [], renew=renew or [], revoke=revoke or [])
    except (ValueError, OSError) as error:
        fail(str(error))
    for line in lines:
        typer.echo(line)


Run = Annotated[Path | None, typer.Argument(help="The run's folder, or its name at the server.", show_default="the newest")]
At = Annotated[Path | None, typer.Option(help="The server's kit; without it, RUN is a folder.", show_default=False)]


def run_folder(run: Path | None, at: Path | None) -> Path:
    """The folder that is meant; exit 1 with the reason where there is none."""
    from server.board import newest_run

    try:
        runs = Path("runs")
        if at is not None:
            from server.superlink import open_kit

            runs = open_kit(at).state / "runs"
        if run is not None:
            return run if (run / "run.json").exists() or at is None else runs / run
        return newest_run(list(runs.iterdir()) if runs.is_dir() else [])
    except (ValueError, OSError) as error:
        fail(str(error))


def lines_of(folder: Path) -> tuple[str, list[str]]:
    """The state of a run and what a person reads of it; exit 1 with the reason where it has told nothing."""
    import json
    from datetime import UTC, datetime

    from core.run_file import is_worked_in
    from server.board import STATUS, describe

    try:
        about = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fail(f"status: {folder} must be the folder of a run that has begun, it holds no {STATUS}. Look at its flower.log.")
    return about["state"], [
        f"{folder.name}: {line}" if not i else line
        for i, line in enumerate(describe(about, datetime.now(UTC), is_worked_in(folder)))
    ]


def status(run: Run = None, at: At = None) -> None:
    """Say how a run and each of its sites stand: connected, training which round and step, behind, excluded.

    Steps are told by the pace of the site's last round. Exit code 0: it runs or has finished; 1: it was stopped.
    """
    state, lines = lines_of(run_folder(run, at))
    for line in lines:
        typer.echo(line)
    if state == "stopped":
        raise typer.Exit(1)


def watch(run: Run = None, at: At = None) -> None:
    """Show how a run and each of its sites stand until it ends. Ctrl-C ends the watching, not the run."""
    import time

    from rich.live import Live
    from rich.text import Text

    folder = run_folder(run, at)
    with Live(auto_refresh=False) as live:
        while True:
            state, lines = lines_of(folder)
            live.update(Text("\n".join(lines)), refresh=True)
            if state != "running":
                break
            time.sleep(1)
    if state == "stopped":
        raise typer.Exit(1)


@server.command()
def start(
    kit: Kit,
    background: Annotated[
        bool, typer.Option("--background", help="Come back as soon as it answers; log in state/server.log.")
    ] = False,
    without_proxy: Annotated[
        bool, typer.Option("--without-proxy", help="No nginx: the SuperLink itself on the public port. Opens its control too.")
    ] = False,
) -> None:
    """Run the server until it is stopped: SuperLink, proxy, and the keys that may take part.

    sites.json is read again whenever it changes: a new site is let in and a revoked one shut out within seconds. What dies is
    started again. Run it under systemd with the unit in the kit.
    """
    from server.superlink import open_kit, serve, start_in_background

    try:
        opened = open_kit(kit)
        if without_proxy:
            typer.echo(
                f"without proxy: whoever reaches port {opened.about.port} and has ca.crt can register keys and send code to all "
                "sites. Let only the sites and yourself reach it.",
                err=True,
            )
        if background:
            start_in_background(opened, ["--without-proxy"] if without_proxy else [])
            typer.echo(f"{opened.about.consortium}: runs, log in {opened.state / 'server.log'}")
        else:
            serve(opened, proxy=not without_proxy, say=typer.echo)
    except (ValueError, OSError) as error:
        fail(str(error))


@server.command()
def stop(kit: Kit) -> None:
    """Stop the server; sites come back by themselves when it is started again."""
    from server.superlink import open_kit

    try:
        typer.echo("stopped" if open_kit(kit).service.stop() else "did not run")
    except (ValueError, OSError) as error:
        fail(str(error))


@server.command("status")
def sites_status(kit: Kit) -> None:
    """Say of each site whether it is connected. Exit code 0: all are; 3: some are not; 1: the server does not run."""
    from server.superlink import open_kit
    from server.superlink import status as status_of

    try:
        states = status_of(open_kit(kit))
    except (ValueError, OSError) as error:
        fail(str(error))
    width = max((len(state.site) for state in states), default=0)
    for state in states:
        typer.echo(f"{state.site:{width}}  {state.words}")
    if not all(state.connected or state.revoked for state in states):
        raise typer.Exit(3)


def fail(text: str, code: int = 1) -> NoReturn:
    """Say why on standard error and exit."""
    typer.echo(text, err=True)
    raise typer.Exit(code)
