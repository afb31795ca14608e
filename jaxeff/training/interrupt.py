"""Ctrl-C and SIGTERM as a request that the training loop can honour between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax

from jaxeff import parallel

# How often hosts ask each other. Clouds give 30 seconds and more to stop; to ask takes milliseconds, in which the
# devices run out of work.
_SECONDS = 1.0


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

    Handlers are installed in the main thread only (Python allows no other) and put back on leaving. A request that was
    left without an exception is handed on to them.

    Attributes:
      signal: number of the signal that arrived at this process, None before.
    """

    def __init__(self, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)):
        self.signal: int | None = None
        self._signals = signals
        self._previous: dict[int, Any] = {}
        self._alone = jax.process_count() == 1
        self._agreed: int | None = None
        self._calls, self._left, self._since = 1, 1, time.perf_counter()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in self._signals:
                self._previous[signum] = signal.signal(signum, self._arrived)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        unheard = self.signal if kind is None and self._previous else None
        self._restore()
        if unheard is not None:  # it came after the last look
            signal.raise_signal(unheard)

    def agreed(self, *, now: bool = False) -> int | None:
        """Returns the signal for which every host stops, None for going on.

        On a single host it is the one that arrived. Several hosts must all call this alike: a signal that arrived at
        any of them becomes known at one and the same call to all, about a second later, because that often they ask.

        Args:
          now: ask at this call, and start anew to find out how many calls take a second.
        """
        if self._alone:
            return self.signal
        if now or self._left <= 1:
            self._ask(now)
        else:
            self._left -= 1
        return self._agreed

    def _ask(self, anew: bool) -> None:
        seconds = time.perf_counter() - self._since
        # At most twice as many as the last time: a step that is compiled or an evaluation that begins changes the pace.
        calls = 1 if anew else max(1, min(2 * self._calls, int(self._calls * _SECONDS / max(seconds, 1e-6))))
        said = parallel.gather([self.signal, calls])
        if self._agreed is None:
            self._agreed = next((signum for signum, _ in said if signum is not None), None)
        self._calls = self._left = said[0][1]  # by the clock of the first host, for all
        self._since = time.perf_counter()

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
