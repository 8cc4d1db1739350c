"""Our SuperLink: what it changes of Flower's, and that it refuses any other Flower."""

import asyncio
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from server import flower_superlink
from server.flower_superlink import Event, in_one_piece, install, one_at_a_time


def passed_on(*received: Event, kind: str = "http") -> list[Event]:
    """What an application is given of these events, as long as it asks."""
    given: list[Event] = []
    waiting = list(received)

    async def receive() -> Event:
        return waiting.pop(0)

    async def send(_: Event) -> None:
        raise AssertionError("nothing is sent")

    async def app(scope: Event, receive: Any, send: Any) -> None:
        assert (scope, callable(send)) == ({"type": kind}, True)
        while not given or given[-1]["type"] != "http.disconnect":
            given.append(await receive())

    asyncio.run(in_one_piece(app)({"type": kind}, receive, send))
    assert waiting == []
    return given


GONE: Event = {"type": "http.disconnect"}


@pytest.mark.parametrize("parts", [[b""], [b"abc"], [b"a", b"", b"bc"]], ids=["empty", "whole", "parts"])
def test_a_body_is_passed_on_when_all_of_it_is_there(parts: list[bytes]) -> None:
    events: list[Event] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    events[-1]["more_body"] = False
    whole = {"type": "http.request", "body": b"".join(parts), "more_body": False}
    assert passed_on(*events, GONE) == [whole, GONE]


def test_who_leaves_in_the_middle_is_told_of_and_no_half_body() -> None:
    assert passed_on({"type": "http.request", "body": b"a", "more_body": True}, GONE) == [GONE]


def test_what_is_no_request_is_passed_on_as_it_comes() -> None:
    events: list[Event] = [{"type": "lifespan.startup"}, {"type": "http.disconnect"}]
    assert passed_on(*events, kind="lifespan") == events


def test_arrays_are_kept_in_memory_and_the_rest_in_the_database(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
    from flwr.supercore.sql_mixin import SqlMixin
    from flwr.superlink import config_loader, main
    from flwr.superlink.cli.flower_superlink import flower_superlink

    loader: Any = config_loader
    monkeypatch.setattr(loader, "ObjectStoreFactory", ObjectStoreFactory)
    monkeypatch.setattr(main, "create_app", lambda *given: given)
    monkeypatch.setattr(SqlMixin, "session", SqlMixin.session)
    assert install() is flower_superlink
    federations: Any = None
    objects, states = loader.get_objectstore_linkstate_factories(str(tmp_path / "state.db"), federations)
    assert isinstance(objects.store(), InMemoryObjectStore)
    assert states.database == str(tmp_path / "state.db")
    assert callable(main.create_app())
    gc.unfreeze()


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_superlink, "version", lambda _: "1.42.0")
    with pytest.raises(RuntimeError, match=r"flwr must be 1\.41, got 1\.42\.0\. Install isocenter with its constraints\.txt"):
        install()


def test_transactions_wait_in_line_and_one_within_another_does_not() -> None:
    inside: list[str] = []
    most: list[int] = []

    @contextmanager
    def session(database: str) -> Iterator[str]:
        inside.append(database)
        most.append(len(set(inside)))
        yield database
        inside.remove(database)

    opened = one_at_a_time(session)

    def work(name: str) -> None:
        for _ in range(50):
            with opened(name) as outer, opened(name) as inner:
                assert outer == inner == name

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, "abcd"))
    assert len(most) == 4 * 50 * 2
    assert set(most) == {1}
