"""Reading ahead: order, bounded memory, errors in their place, and the time waited."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from core.data.feed import Ring, Waited, read_ahead


def test_batches_come_in_order_with_what_was_read() -> None:
    found = list(read_ahead(range(7), lambda batch: batch * batch, Waited()))

    assert found == [(i, i * i) for i in range(7)]
    assert list(read_ahead([], lambda batch: batch, Waited())) == []


def test_no_more_batches_are_read_than_told() -> None:
    read: list[int] = []
    feed = read_ahead(range(20), lambda batch: read.append(batch), Waited(), ahead=2)

    for number, _ in enumerate(feed):
        # One in use, two ahead.
        assert len(read) <= number + 3


def test_batches_are_drawn_by_the_caller_and_read_by_another_thread() -> None:
    drawn_by: set[int] = set()
    read_by: set[int] = set()

    def batches() -> Iterator[int]:
        for number in range(3):
            drawn_by.add(threading.get_ident())
            yield number

    list(read_ahead(batches(), lambda _: read_by.add(threading.get_ident()), Waited()))

    assert drawn_by == {threading.get_ident()}
    assert not read_by & drawn_by


def test_an_error_comes_where_its_batch_would_have_come() -> None:
    def read(batch: int) -> int:
        if batch == 2:
            raise OSError("gone")
        return batch

    feed = read_ahead(range(5), read, Waited())

    assert next(feed) == (0, 0)
    assert next(feed) == (1, 1)
    with pytest.raises(OSError, match="gone"):
        next(feed)


def test_only_what_is_not_there_yet_is_waited_for() -> None:
    gate = threading.Event()
    waited = Waited()
    threading.Timer(0.2, gate.set).start()

    list(read_ahead(range(3), lambda _: gate.wait(), waited))
    assert waited.seconds > 0.1

    ready = Waited()
    for _ in read_ahead(range(3), lambda batch: batch, ready):
        time.sleep(0.05)  # the step, in which the next batch is read
    assert ready.seconds < waited.seconds


def test_a_loop_that_stops_early_leaves_no_thread() -> None:
    feed = read_ahead(range(100), lambda batch: batch, Waited())
    next(feed)
    feed.close()  # type: ignore[attr-defined]

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_a_ring_overwrites_no_batch_that_is_in_use() -> None:
    ring = Ring()

    def read(batch: int) -> torch.Tensor:
        return ring.turn((2, 3), torch.float32, pinned=False).fill_(batch)

    places = set()
    for batch, tensor in read_ahead(range(9), read, Waited()):
        time.sleep(0.01)  # in which the next ones are read
        assert (tensor == batch).all()
        places.add(tensor.data_ptr())

    assert len(places) == len(ring.memory) == 2
    smaller = ring.turn((1, 3), torch.float32, pinned=False)
    assert smaller.shape == (1, 3)
    assert smaller.data_ptr() in places
    assert ring.turn((4, 3), torch.float32, pinned=False).shape == (4, 3)
    assert ring.turn((2, 3), torch.uint8, pinned=False).dtype == torch.uint8
