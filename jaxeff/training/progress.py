"""What a person sees of a run while it goes on: a bar on a terminal, a line per log interval elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

_REFRESH_SECONDS = 0.1


class Progress:
    """Shows the finished steps, the throughput, the time left and the newest loss.

    On a terminal it draws a bar (with rich; plain lines without it). Where the output is not a terminal it writes one
    line per report. Disabled, it writes nothing.

    Args:
      steps: number of steps of the whole run.
      start: steps that an earlier run has finished already.
      enabled: False shows neither bar nor lines; `note` still writes.
      stream: where to write; standard error by default.
    """

    def __init__(self, steps: int, *, start: int = 0, enabled: bool = True, stream: TextIO | None = None):
        self._steps = steps
        self._step = start
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        self._task: Any = None
        self._next_refresh = 0.0
        self._pace = _Pace()
        self._text = ""

    def __enter__(self) -> Progress:
        if self._enabled and self._stream.isatty():
            self._bar = _rich_bar(self._stream)
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("train", total=self._steps, completed=self._step, text="compiling")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, text=self._text)
            self._bar.stop()
            self._bar = None

    def tick(self, step: int) -> None:
        """Takes note that a step was started; redraws at most ten times a second.

        Args:
          step: number of steps started so far.
        """
        self._step = step
        if self._bar is None:
            return
        now = time.perf_counter()
        if now >= self._next_refresh:
            self._next_refresh = now + _REFRESH_SECONDS
            self._bar.update(self._task, completed=step, text=self._text or "compiling")

    def report(self, step: int, values: Mapping[str, float], *, unit: str = "steps/s", rate: float = 0.0) -> None:
        """Shows the metrics of a log interval.

        Args:
          step: number of finished steps.
          values: numbers to show by name.
          unit: what `rate` counts.
          rate: throughput of the interval; 0 where it is not known yet.
        """
        left = self._pace.seconds_left(step, self._steps)
        parts = [f"{name} {value:.4g}" for name, value in values.items()]
        parts += [f"{rate:,.0f} {unit}"] if rate else []
        parts += [f"{_clock(left)} left"] if left is not None else []
        self._text = "  ".join(parts)
        if not self._enabled:
            return
        if self._bar is None:
            print(f"step {step}/{self._steps}  {self._text}", file=self._stream, flush=True)
        else:
            self._bar.update(self._task, completed=step, text=self._text)

    def note(self, text: str) -> None:
        """Writes a line that must be seen, above the bar where there is one, also when progress is disabled.

        Args:
          text: the line.
        """
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)


class _Pace:
    """Estimates the time left from the steps since the second report; the first interval includes compiling."""

    def __init__(self) -> None:
        self._origin: tuple[int, float] | None = None

    def seconds_left(self, step: int, steps: int) -> float | None:
        now = time.perf_counter()
        if self._origin is None:
            self._origin = (step, now)
        first_step, first_time = self._origin
        if step == first_step:
            return None
        return (now - first_time) / (step - first_step) * (steps - step)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _rich_bar(stream: TextIO) -> Any:
    try:
        from rich import console, progress
    except ImportError:
        return None  # the plain lines say the same
    return progress.Progress(
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        console=console.Console(file=stream),
    )
