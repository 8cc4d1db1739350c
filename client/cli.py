"""Commands of a site's IT: `isocenter site`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from client.approval import Approvals
    from client.audit import AuditLog, Entry

site = typer.Typer(
    help="What a site's IT does with its kit, the folder that holds site.yaml and state.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Kit = Annotated[
    Path,
    typer.Argument(
        help="The kit's folder, which holds site.yaml and state.",
        show_default=False,
        exists=True,
        file_okay=False,
        resolve_path=True,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the console script."""
    app.add_typer(site, name="site")


def fail(text: str, code: int = 1) -> NoReturn:
    """Say what is wrong and stop."""
    typer.echo(text, err=True)
    raise typer.Exit(code)


def audit_log(kit: Path) -> "AuditLog":
    """The audit log of a kit."""
    from client.audit import AuditLog

    return AuditLog(kit / "state" / "audit.jsonl")


def approvals(kit: Path) -> "Approvals":
    """The bundles that a kit's site has seen."""
    from client.approval import Approvals

    return Approvals(kit / "state")


@site.command()
def audit(
    kit: Kit,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON, a line each.")] = False,
    last: Annotated[int, typer.Option(min=1, help="How many of the last entries to print.", show_default="all")] = 10**9,
) -> None:
    """Say what has left this site, and whether the log of it was changed.

    Exit codes: 0, the log is whole. 1, it was changed, with the line and the reason, or it cannot be read.
    """
    from client.audit import AuditError

    log = audit_log(kit)
    try:
        chain = log.examine()
    except AuditError as error:
        fail(str(error))
    entries = chain.entries[-last:]
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(entry, sort_keys=True))
    elif entries:
        print_entries(entries)
    if chain.torn:
        typer.echo(
            f"the last line is torn after {len(chain.torn)} bytes, as by a power cut; the next answer takes it out", err=True
        )
    if chain.problem:
        fail(f"{log.path}: the log must be as it was written, got a change at {chain.problem}")
    told = (
        f"the log is whole: {len(chain.entries)} entries, head {chain.entries[-1]['hash']}"
        if chain.entries
        else "there is no log"
    )
    typer.echo(told, err=as_json)


def print_entries(entries: "tuple[Entry, ...]") -> None:
    """A table of entries, one a line."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("n", "time (UTC)", "run", "round", "message", "arrays", "bytes", "epsilon", "error", box=None)
    for entry in entries:
        values = [entry["n"], entry["time"][:19], entry["run"], entry["round"], entry["message"], len(entry["arrays"])]
        values += [entry["bytes"], entry["epsilon"], entry["error"]]
        table.add_row(*(escape("" if value is None else str(value)) for value in values))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@site.command()
def approve(
    kit: Kit,
    digest: Annotated[
        str | None, typer.Argument(help="Hash of the bundle, or how it begins, where several wait.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show the code that the coordinator wants to run here, and let it run from now on.

    What is shown is what differs from the last approved bundle, or, before the first, from what is installed on this machine.
    """
    from client.approval import ApprovalError
    from client.audit import AuditError

    kept = approvals(kit)
    waiting = kept.pending()
    if not waiting:
        typer.echo("no code waits to be approved")
        return
    chosen = [name for name in waiting if name.startswith(digest or "")]
    if len(chosen) != 1:
        fail(
            f"approve: DIGEST must be how one of the waiting bundles begins, got {len(chosen)} of {len(waiting)} for "
            f"{digest or 'none'!r}; they are\n" + "\n".join(waiting),
            2,
        )
    [name] = chosen
    try:
        text = kept.difference(kept.content(name))
        if sys.stdout.isatty():
            typer.echo_via_pager(text)
            typer.echo(text.splitlines()[0])
        else:
            typer.echo(text)
        if not yes and not typer.confirm(f"Let {name[:12]} run at this site?"):
            typer.echo("not approved, it still waits")
            raise typer.Exit(1)
        # Told before it is done, as all else that this log tells.
        audit_log(kit).append(message="site.approve", app=name)
        kept.approve(name)
    except (ApprovalError, AuditError) as error:
        fail(str(error))
    typer.echo(f"approved {name}")


@site.command()
def policy(kit: Kit) -> None:
    """Print what this site lets happen, every default included, in words."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from client.policy import PolicyError, describe_policy, read_policy

    try:
        found = read_policy(kit / "site.yaml")
    except PolicyError as error:
        fail(str(error), 2)
    table = Table("key", "value", "", "meaning", box=None)
    for line in describe_policy(found):
        table.add_row(*map(escape, (line.key, line.value, "default" if line.is_default else "", line.words)))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print("A run may ask for more caution, never for less: the stricter of both holds in every field.", highlight=False)


@site.command()
def init(kit: Kit) -> None:
    """Make this site's private key, which never leaves it, and a request for the coordinator to let it in."""
    from client.service import open_kit
    from core.keys import fingerprint, new_request, new_site_key, read_site_key

    try:
        opened = open_kit(kit)
        path = kit / "site.key"
        made = not path.exists()
        key = new_site_key(path) if made else read_site_key(path)
        request = kit / f"{opened.about.site}.csr"
        request.write_bytes(new_request(key, opened.about.site))
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"{opened.about.site}: {'new key' if made else 'the key that was there'}, {fingerprint(key.public_key())}")
    typer.echo(f"send {request} to the coordinator, and read the fingerprint to them on the phone")


@site.command()
def start(
    kit: Kit,
    background: Annotated[bool, typer.Option("--background", help="Come back at once; log in state/logs/site.log.")] = False,
) -> None:
    """Keep this site connected until it is stopped: it takes part in runs whose app was approved here.

    Opens no port to the outside. What ends is started again. Run it under systemd with the unit in the kit.
    """
    from client.service import open_kit, serve, start_in_background

    try:
        opened = open_kit(kit)
        if background:
            typer.echo(start_in_background(opened))
        else:
            serve(opened, say=typer.echo)
    except (ValueError, OSError) as error:
        fail(str(error))


@site.command()
def stop(kit: Kit) -> None:
    """Stop this site; a task that is going on is given up."""
    from client.service import open_kit

    try:
        typer.echo("stopped" if open_kit(kit).service.stop() else "did not run")
    except (ValueError, OSError) as error:
        fail(str(error))


@site.command()
def status(kit: Kit) -> None:
    """Say whether this site is connected, what it works at, and what left it. Exit code 0: it runs; 3: it does not."""
    from datetime import UTC, datetime

    from client.service import open_kit
    from client.service import status as status_of

    try:
        opened = open_kit(kit)
        lines = status_of(opened, datetime.now(UTC))
        log = audit_log(kit).examine()
        waiting = approvals(kit).pending()
    except (ValueError, OSError) as error:
        fail(str(error))
    left = sum(int(entry["bytes"] or 0) for entry in log.entries)
    whole = f"CHANGED: {log.problem}" if log.problem else "whole"
    lines.append(("left", f"{left / 1e6:.1f} MB in {len(log.entries)} answers; audit log {whole}"))
    if waiting:
        lines.append(("approval", f"{len(waiting)} app waits: `isocenter site approve {kit}`"))
    for word, words in lines:
        typer.echo(f"{word:<11}{words}")
    if not opened.service.is_running():
        raise typer.Exit(3)
