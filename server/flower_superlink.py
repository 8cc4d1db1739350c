"""Flower's SuperLink, made for large messages: ``python -m server.flower_superlink``.

With a database, a SuperLink writes every message's arrays into it and reads them back for each site, which takes longer than to
send them. Here they stay in memory. Who is registered, the runs and their logs stay in the database, and outlive it. The arrays
in flight need not: when the SuperLink ends, the run that waits for them ends too, and is gone on with after its last finished
round. And what comes in goes through its layers in one piece, not in hundreds.

Written against Flower 1.41, two parts of which are replaced by name; any other is refused.
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import version
from typing import Any

FLOWER = "1.41"
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
AsgiApp = Callable[[Event, Receive, Send], Awaitable[None]]


def in_one_piece(app: AsgiApp) -> AsgiApp:
    """An ASGI application that is given a request's body when all of it is there."""

    async def whole(scope: Event, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        body, event = bytearray(), await receive()
        while event["type"] == "http.request":
            body += event.get("body", b"")
            if not event.get("more_body", False):
                break
            event = await receive()
        given: list[Event] = [{**event, "body": bytes(body)} if event["type"] == "http.request" else event]
        await app(scope, lambda: _first(given, receive), send)

    return whole


async def _first(given: list[Event], receive: Receive) -> Event:
    return given.pop() if given else await receive()


def install() -> Callable[[], None]:
    """Put the two in place, and return the SuperLink's main function.

    Raises:
        RuntimeError: this is another Flower.
    """
    from flwr.superlink import config_loader
    from flwr.superlink import main as superlink
    from flwr.superlink.cli.flower_superlink import flower_superlink

    loader: Any = config_loader
    parts: Any = superlink
    known = hasattr(loader, "ObjectStoreFactory") and hasattr(parts, "create_app")
    if not (found := version("flwr")).startswith(f"{FLOWER}.") or not known:
        raise RuntimeError(f"server: flwr must be {FLOWER}, got {found}. Install isocenter with its constraints.txt.")
    in_memory, create_app = loader.ObjectStoreFactory, parts.create_app
    loader.ObjectStoreFactory = lambda _: in_memory()
    parts.create_app = lambda *given: in_one_piece(create_app(*given))
    return flower_superlink


def main() -> None:
    """Take what `flower-superlink` takes."""
    sys.argv[0] = "flower-superlink"
    install()()


if __name__ == "__main__":
    main()
