"""Log lines to standard output or standard error, whatever these are when a line is written."""

import logging
import sys
from contextlib import suppress
from typing import Literal


class StandardStream(logging.Handler):
    """Writes each record as a line; unlike Python's own, it does not hold on to a stream that was replaced and closed.

    Args:
        name: of the stream in `sys`.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        super().__init__()
        self._name = name

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, at once; one for which the disk has no room is lost, and nothing else with it."""
        stream = getattr(sys, self._name)
        with suppress(OSError):
            stream.write(f"{self.format(record)}\n")
            stream.flush()
