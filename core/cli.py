"""The console script `isocenter`: commands of this package, and those that others register under ``isocenter.commands``."""

import json
from importlib.metadata import entry_points
from typing import Annotated

import typer

app = typer.Typer(
    help="Contrastive pretraining of brain-image encoders across hospitals, blind to which hospital a scan came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="What differs from the defaults, as key=value or group=choice, e.g. objective=ntxent debias=none num_rounds=50. "
        "`isocenter config` prints every key.",
        show_default=False,
    ),
]


@app.command()
def config(overrides: Overrides = None) -> None:
    """Print the configuration that a run with these overrides would have, or say what is wrong with it."""
    from core.config import describe

    typer.echo(json.dumps(describe(checked(overrides or [])), indent=2))


def checked(overrides: list[str]) -> "RunConfig":  # type: ignore[name-defined] # noqa: F821
    """The configuration, or its one-line fault on standard error and exit code 2."""
    from core.config import ConfigError, load_config

    try:
        return load_config(overrides)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def main() -> None:
    """Collect the commands and run the one that was asked for."""
    for entry in entry_points(group="isocenter.commands"):
        entry.load()(app)
    app()
