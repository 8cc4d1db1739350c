"""Flower's SuperLink, with the weights that pass through it in memory: ``python -m server.flower_superlink``.

With a database, a SuperLink writes every message's arrays into it and reads them back for each site, which takes longer than to
send them. Who is registered, the runs and their logs stay in the database, and outlive it. The arrays in flight need not: when
the SuperLink ends, the run that waits for them ends too, and is gone on with after its last finished round.

Written against Flower 1.41, one part of which is replaced by name; any other is refused.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

FLOWER = "1.41"


def install() -> Callable[[], None]:
    """Keep arrays in memory, and return the SuperLink's main function.

    Raises:
        RuntimeError: this is another Flower.
    """
    from flwr.superlink import config_loader
    from flwr.superlink.cli.flower_superlink import flower_superlink

    loader: Any = config_loader
    if not (found := version("flwr")).startswith(f"{FLOWER}.") or not hasattr(loader, "ObjectStoreFactory"):
        raise RuntimeError(f"server: flwr must be {FLOWER}, got {found}. Install isocenter with its constraints.txt.")
    in_memory = loader.ObjectStoreFactory
    loader.ObjectStoreFactory = lambda _: in_memory()
    return flower_superlink


def main() -> None:
    """Take what `flower-superlink` takes."""
    sys.argv[0] = "flower-superlink"
    install()()


if __name__ == "__main__":
    main()
