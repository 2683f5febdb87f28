"""SIGINT and SIGTERM that wait for the end of a training step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """A signal ended the run. Not an Exception, so that no library takes it for a failure of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Interrupts:
    """While ``caught``, signals raise Interrupted: at once, or while ``deferred`` not before the next ``check``."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or self.pending is not None:  # the second signal does not wait
            raise Interrupted(number)
        self.pending = number

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self, defer: bool = True) -> Iterator[None]:
        """``deferred(False)`` inside ``deferred()`` is a stretch in which signals act at once again."""
        outer, self._deferred = self._deferred, defer
        try:
            if not defer:
                self.check()
            yield
        finally:
            self._deferred = outer
        self.check()

    def check(self) -> None:
        if self.pending is not None:
            raise Interrupted(self.pending)
