"""What the studies share: jobs in processes side by side, with progress, whose results are files that are made once."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import typer

from core.config import describe, load_config

Job = TypeVar("Job")


@lru_cache(maxsize=4096)
def settings_of(overrides: tuple[str, ...]) -> dict[str, Any]:
    """What overrides set, as JSON brings it back; where the data are is part of it."""
    config = load_config(overrides)
    places = {place: str(path) for place, path in config.data.places.items()}
    settings: dict[str, Any] = json.loads(json.dumps({**describe(config), "places": places}))
    return settings


@dataclass(frozen=True)
class Step:
    """A result that a job makes.

    Attributes:
        finished: whether it is there.
        told: what is printed when it is.
    """

    finished: Callable[[], bool]
    told: Callable[[], str]


def end_with_parent() -> None:
    """Let this process end when the one that started it has, even by SIGKILL: nobody would wait for what it makes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def side_by_side(
    study: str, what: str, work: Callable[[Job], None], jobs: Sequence[Job], steps: Sequence[Step], workers: int
) -> None:
    """Carry out the jobs in processes, telling of every step; stop at the first that fails, with its reason and exit code 1.

    Args:
        study: its name, for the error.
        what: of the steps, beside the bar.
        work: carries out a job, but for what is finished; importable by its name.
        jobs: what there is to do.
        steps: what all jobs together make.
        workers: processes at once.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, transient=True) as bar, ProcessPoolExecutor(workers, context, end_with_parent) as pool:
        task = bar.add_task(what, total=len(steps))
        futures: list[Future[None]] = [pool.submit(work, job) for job in jobs]
        waiting = list(steps)
        while True:
            done = all(future.done() for future in futures)
            for step in [step for step in waiting if step.finished()]:
                waiting.remove(step)
                bar.console.print(step.told())
            bar.update(task, completed=len(steps) - len(waiting))
            failed = [future for future in futures if future.done() and future.exception() is not None]
            if failed:
                pool.shutdown(wait=False, cancel_futures=True)
                reason = failed[0].exception()
                if isinstance(reason, BrokenProcessPool):
                    reason = RuntimeError("a worker was killed, perhaps for want of memory; fewer --workers need less")
                typer.echo(f"{study}: {reason}\nFinished figures are kept; the same command goes on from them.", err=True)
                raise typer.Exit(1)
            if done:
                return
            time.sleep(0.5)
