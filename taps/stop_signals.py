"""Ctrl-C and SIGTERM: finish the current step, save, and exit with 128 + the signal's number."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager


class Interrupted(BaseException):
    """The run was asked to stop; it has saved its state. ``status`` is the exit status for a command."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopSignals(AbstractContextManager):
    """Inside the ``with`` block Ctrl-C and SIGTERM are noted in ``received`` instead of ending the program at once.

    A second Ctrl-C does end it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
