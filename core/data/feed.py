"""Training's feed: the next batch is read while the model is busy with this one, and what waiting is left is measured."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
Read = TypeVar("Read")


@dataclass
class Waited:
    """Seconds that a loop stood still for its data."""

    seconds: float = 0.0


AHEAD = 1
"""Batches read in advance; more take memory, and reading is far faster than a step."""


class Ring:
    """Tensors that are used in turn, because fresh memory costs more than what is read into it.

    Args:
        size: tensors in use at one time.
    """

    def __init__(self, size: int = AHEAD + 1) -> None:
        self.memory: list[Tensor] = [torch.empty(0)] * size

    def turn(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> Tensor:
        """A tensor of this shape in the memory whose turn it is: it holds anything, and is overwritten ``size`` turns later."""
        memory_N, size = self.memory.pop(0), math.prod(shape)
        if len(memory_N) < size or memory_N.dtype != dtype:
            memory_N = torch.empty(size, dtype=dtype, pin_memory=pinned)
        self.memory.append(memory_N)
        return memory_N[:size].view(shape)


def read_ahead(
    batches: Iterable[Batch], read: Callable[[Batch], Read], waited: Waited, *, ahead: int = AHEAD
) -> Iterator[tuple[Batch, Read]]:
    """Each batch with what ``read`` gives for it, in their order; a thread reads up to ``ahead`` of them in advance.

    ``batches`` is walked here and not in the thread, so what it draws does not depend on time.

    Args:
        batches: what to read.
        read: called once a batch; what it raises is raised where that batch would have come.
        waited: gets the seconds for which a batch was asked for and not there.
        ahead: batches in memory beside the one in use; a `Ring` for ``read`` needs one tensor more.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        waiting: deque[tuple[Batch, Future[Read]]] = deque()

        def next_one() -> tuple[Batch, Read]:
            batch, future = waiting.popleft()
            started = time.perf_counter()
            result = future.result()
            waited.seconds += time.perf_counter() - started
            return batch, result

        try:
            for batch in batches:
                waiting.append((batch, pool.submit(read, batch)))
                if len(waiting) > ahead:
                    yield next_one()
            while waiting:
                yield next_one()
        finally:
            for _, future in waiting:
                future.cancel()
