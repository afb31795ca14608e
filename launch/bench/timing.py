"""Interleaved timing: contestants take turns, so that a machine whose speed drifts treats them alike.

A comparison is the median of the ratios of neighbouring runs, never a ratio of two averages.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How long one contestant takes beside another: median, quartiles and number of the pairwise ratios."""

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of every run of every contestant: `wall` and process CPU time, in the order in which they ran."""

    wall: Mapping[str, list[float]]
    cpu: Mapping[str, list[float]]

    def seconds(self, name: str) -> float:
        """Median wall time of a contestant."""
        return statistics.median(self.wall[name])

    def cpu_seconds(self, name: str) -> float:
        """Median process CPU time of a contestant."""
        return statistics.median(self.cpu[name])

    def fastest(self, *names: str) -> str:
        """The contestant with the lowest median among those named."""
        return min(names, key=self.seconds)

    def ratio(self, ours: str, theirs: str) -> Ratio:
        """Median of the pairwise ratios ours / theirs of the wall time."""
        return pairwise(self.wall[ours], self.wall[theirs])

    def cpu_ratio(self, ours: str, theirs: str) -> Ratio:
        """The same of the process CPU time, all threads together: what the wall time bought with more cores costs."""
        return pairwise(self.cpu[ours], self.cpu[theirs])


def contest(
    contestants: Mapping[str, Callable[[], Any]], *, pairs: int = 9, warmup: int = 1, seconds: float = 0.0
) -> Times:
    """Runs the contestants in turn, A B C A B C ..., waiting for each result.

    Args:
      contestants: functions without arguments; a result that holds JAX arrays is waited for.
      pairs: rounds that count.
      warmup: rounds before them that do not.
      seconds: each turn repeats its contestant until it has taken about this long, so that the clock is fine enough
        for short functions; 0 runs it once.

    Returns:
      The time of one run of every contestant in every round.

    Raises:
      ValueError: without contestants, or for fewer than one pair.
    """
    if not contestants or pairs < 1:
        raise ValueError(f"contest needs contestants and pairs >= 1, got {list(contestants)} and pairs={pairs}")
    repeats = {}
    for name, run in contestants.items():
        for _ in range(max(1, warmup)):
            start = time.perf_counter()
            jax.block_until_ready(run())
            took = time.perf_counter() - start
        repeats[name] = max(1, round(seconds / max(took, 1e-7)))
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(pairs):
        for name, run in contestants.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                jax.block_until_ready(run())
            wall[name].append((time.perf_counter() - wall_start) / repeats[name])
            cpu[name].append((time.process_time() - cpu_start) / repeats[name])
    return Times(wall, cpu)


def compile_seconds(function: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Compiles for these arguments without the persistent cache.

    Returns:
      The executable, and the wall and process CPU seconds that it took.
    """
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        # A fresh function object, because jit remembers what it compiled for the old one.
        executable = jax.jit(lambda *a: function(*a)).lower(*args).compile()
        return executable, time.perf_counter() - wall_start, time.process_time() - cpu_start
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def pairwise(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Median and quartiles of the ratios ours / theirs of measurements that were taken in turn."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0], 1)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, low, high, len(ratios))
