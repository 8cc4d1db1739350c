"""How far long work is: the loops that take long say so here, and whoever runs them decides what becomes of it.

>>> with watched(lambda step: print(f"{step.what} {step.done} of {step.total}")):
...     go_on = tell("step", 2, 6)
step 2 of 6
>>> go_on
True
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """So much of something is done: ``what`` ("step", "scan"), ``done`` of ``total``."""

    what: str
    done: int
    total: int


Watcher = Callable[[Step], None]
_watchers: list[Watcher] = []
_deadlines: list[float] = []


def tell(what: str, done: int, total: int) -> bool:
    """Say how far the work is; whether there is time for more of it, which is always so without a deadline.

    Whatever a watcher raises ends the work.
    """
    for watcher in _watchers:
        watcher(Step(what, done, total))
    return not _deadlines or time.monotonic() < _deadlines[-1]


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call the watcher with every step that is told inside."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Let work that may end early do so from this time of `time.monotonic` on; None: never."""
    if deadline is None:
        yield
        return
    _deadlines.append(deadline)
    try:
        yield
    finally:
        _deadlines.pop()
