"""Ctrl-C and SIGTERM as a request that the training loop can honour between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(SystemExit):
    """Training stopped on a signal, after its state was saved.

    Left uncaught it ends the process with the usual exit status of that signal.

    Attributes:
        step: number of finished steps.
        signal: the signal's number.
        code: exit status, 128 + signal.
    """

    def __init__(self, step: int, signum: int, message: str):
        super().__init__(128 + signum)
        self.step = step
        self.signal = signum
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Context in which the first SIGTERM or Ctrl-C only asks to stop and the second one stops at once.

    Handlers are installed in the main thread only (Python allows no other) and put back on leaving.

    Attributes:
        signal: number of the signal that arrived, None before.
    """

    def __init__(self, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)):
        self.signal: int | None = None
        self._signals = signals
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in self._signals:
                self._previous[signum] = signal.signal(signum, self._arrived)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _arrived(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signum
            return
        self._restore()
        os.kill(os.getpid(), signum)

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
