"""Flower's SuperLink, made for large messages: ``python -m server.flower_superlink``.

With a database, a SuperLink writes every message's arrays into it and reads them back for each site, which takes longer than to
send them. Here they stay in memory. Who is registered, the runs and their logs stay in the database, and outlive it. The arrays
in flight need not: when the SuperLink ends, the run that waits for them ends too, and is gone on with after its last finished
round. What comes in goes through its layers in one piece, not in hundreds; and its threads wait for the database in line.

Written against Flower 1.41, three parts of which are replaced by name; any other is refused.
"""

import gc
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

from core.memory import keep_freed_memory

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


def one_at_a_time(session: Callable[[Any], AbstractContextManager[Any]]) -> Callable[[Any], AbstractContextManager[Any]]:
    """Transactions that wait in line for one another, in place of asking SQLite again at growing intervals."""
    line = threading.RLock()

    @contextmanager
    def in_line(database: Any) -> Iterator[Any]:
        with line, session(database) as opened:
            yield opened

    return in_line


def install() -> Callable[[], None]:
    """Put these in place, and return the SuperLink's main function.

    Raises:
        RuntimeError: this is another Flower.
    """
    from flwr.supercore.sql_mixin import SqlMixin
    from flwr.superlink import config_loader
    from flwr.superlink import main as superlink
    from flwr.superlink.cli.flower_superlink import flower_superlink

    loader: Any = config_loader
    parts: Any = superlink
    database: Any = SqlMixin
    known = hasattr(loader, "ObjectStoreFactory") and hasattr(parts, "create_app") and hasattr(database, "session")
    if not (found := version("flwr")).startswith(f"{FLOWER}.") or not known:
        raise RuntimeError(f"server: flwr must be {FLOWER}, got {found}. Install isocenter with its constraints.txt.")
    in_memory, create_app = loader.ObjectStoreFactory, parts.create_app
    loader.ObjectStoreFactory = lambda _: in_memory()

    def create(*given: Any) -> AsgiApp:
        app = in_one_piece(create_app(*given))
        gc.freeze()  # what is loaded by now stays, and is not looked through again and again
        return app

    parts.create_app = create
    database.session = one_at_a_time(database.session)
    return flower_superlink


def main() -> None:
    """Take what `flower-superlink` takes."""
    sys.argv[0] = "flower-superlink"
    keep_freed_memory()
    install()()


if __name__ == "__main__":
    main()
