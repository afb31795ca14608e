"""Spatial traversal at run time: a cheap look first, and a closer one only at what is still in doubt.

A cascade is a sequence of steps, functions from images to logits of rising cost: the same network at rising
resolutions (`at_resolution`), or with fewer and fewer tiles dropped (`DynamicSpec(columns=..., tile=...)`). An image
leaves at the first step whose highest softmax probability is above a threshold. Those that stay are put together into
buckets of a few fixed sizes, so shapes are static and work is really left out.

Letters: N images, K classes, S steps.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[[jax.Array], jax.Array]
# At most a third of a bucket above four is padding.
BUCKETS: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Traversal(NamedTuple):
    """What a cascade found.

    Attributes:
      logits: float32 [N, K], each of the step at which its image left.
      exits: int [N], that step, from 0.
    """

    logits: np.ndarray
    exits: np.ndarray


@dataclasses.dataclass(frozen=True)
class ExitPoint:
    """A cascade at one threshold, or one of its steps alone, on a set of images.

    Attributes:
      name: "threshold 0.9", or "step 1 alone".
      threshold: None for a step alone.
      accuracy: in [0, 1].
      milliseconds: per image.
      left: share of the images that left at each step.
    """

    name: str
    threshold: float | None
    accuracy: float
    milliseconds: float
    left: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ExitCurve:
    """Accuracy and latency of a cascade by threshold, with each of its steps alone beside it."""

    points: tuple[ExitPoint, ...]

    def __str__(self) -> str:
        from jaxeff.costs.report import aligned

        rows = [
            (p.name, f"{100 * p.accuracy:.2f} %", f"{p.milliseconds:.4f} ms", " ".join(f"{s:.2f}" for s in p.left))
            for p in self.points
        ]
        return "\n".join(aligned([("cascade", "accuracy", "per image", "share that left at each step"), *rows]))


def traverse(steps: Sequence[Step], images: Any, threshold: float, *, buckets: Sequence[int] = BUCKETS) -> Traversal:
    """Sends images through the steps of a cascade until it is sure of them.

    Runs on the host between steps, so it is not for use inside `jax.jit`; the steps themselves should be compiled.

    Args:
      steps: functions (images [B, ...]) -> logits [B, K], from cheap to dear.
      images: [N, ...], N from 1.
      threshold: probability above which an image leaves; at 0 all leave at the first step, at 1 none before the last.
        Logits that are NaN are never sure.
      buckets: batch sizes that the steps are called with, ascending; each is compiled once. What does not fill a bucket
        is padded with copies of its first image, what is more than the largest goes in several.

    Returns:
      Logits and steps of exit.

    Raises:
      ValueError: without steps or images, for a threshold outside [0, 1], or buckets that do not ascend from 1.
    """
    _check(steps, images, threshold, buckets)
    images = np.asarray(images)
    waiting = np.arange(len(images))
    exits, logits = np.zeros(len(images), np.int64), np.zeros((0, 0), np.float32)
    for number, step in enumerate(steps):
        found = _in_buckets(step, images[waiting], buckets)
        if not number:
            logits = np.zeros((len(images), found.shape[1]), np.float32)
        logits[waiting], exits[waiting] = found, number
        waiting = waiting[~(_confidence(found) > threshold)]
        if not len(waiting):
            break
    return Traversal(logits, exits)


def at_resolution(apply: Step, size: tuple[int, int]) -> Step:
    """A compiled step that sees its images at another resolution, linearly resized.

    Args:
      apply: (images [B, *size, C]) -> logits. A network whose last maps are averaged has the same variables at any
        size; `models.Network` is made for one, so of each size another runs them:
        `models.Network(dataclasses.replace(architecture, input_shape=(*size, C)))`.
      size: (H, W).
    """

    @jax.jit
    def step(images):
        return apply(jax.image.resize(images, (len(images), *size, images.shape[-1]), "linear"))

    return step


def exit_curve(
    steps: Sequence[Step],
    images: Any,
    labels: Any,
    thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
    *,
    batch_size: int = 64,
    buckets: Sequence[int] = BUCKETS,
    rounds: int = 3,
) -> ExitCurve:
    """Measures a cascade at several thresholds, and its steps alone, on the clock.

    Args:
      steps: as of `traverse`.
      images: [N, ...].
      labels: int [N].
      thresholds: in [0, 1].
      batch_size: images that arrive together.
      buckets: as of `traverse`.
      rounds: how often everything is timed, in turn, after a first time that compiles.

    Returns:
      The steps alone, then the cascade at each threshold.

    Raises:
      ValueError: as `traverse`, or if images and labels do not fit.
    """
    for threshold in thresholds:
        _check(steps, images, threshold, buckets)
    images, labels = np.asarray(images), np.asarray(labels)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"images and labels must be [N, ...] and [N], got {images.shape} and {labels.shape}")
    if batch_size < 1 or rounds < 1:
        raise ValueError(f"batch_size and rounds must be at least 1, got {batch_size} and {rounds}")
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    contestants: list[tuple[str, Sequence[Step], float | None]] = [
        *((f"step {i + 1} alone", [step], None) for i, step in enumerate(steps)),
        *((f"threshold {t:.12g}", steps, t) for t in thresholds),
    ]
    results: dict[int, Traversal] = {}
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds + 1):
        for number, (_, chosen, t) in enumerate(contestants):
            start = time.perf_counter()
            found = [traverse(chosen, part, t or 0.0, buckets=buckets) for part in parts]
            if turn:
                times[number].append(time.perf_counter() - start)
            results[number] = Traversal(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    points = []
    for number, (name, chosen, t) in enumerate(contestants):
        logits, exits = results[number]
        left = np.bincount(exits, minlength=len(chosen)) / len(images)
        accuracy = float((logits.argmax(-1) == labels).mean())
        milliseconds = 1e3 * statistics.median(times[number]) / len(images)
        points.append(ExitPoint(name, t, accuracy, milliseconds, tuple(map(float, left))))
    return ExitCurve(tuple(points))


def _in_buckets(step, images, buckets) -> np.ndarray:
    found = []
    for start in range(0, len(images), buckets[-1]):
        part = images[start : start + buckets[-1]]
        size = next(bucket for bucket in buckets if bucket >= len(part))
        padded = np.concatenate([part, np.broadcast_to(part[:1], (size - len(part), *part.shape[1:]))])
        found.append(np.asarray(step(jnp.asarray(padded)), np.float32)[: len(part)])
    return np.concatenate(found)


def _confidence(logits: np.ndarray) -> np.ndarray:
    """Highest softmax probability, [N]; NaN where there is NaN."""
    shifted = logits - logits.max(-1, keepdims=True)
    return 1 / np.exp(shifted).sum(-1)


def _check(steps, images, threshold, buckets) -> None:
    if not len(steps) or not len(images):
        raise ValueError(f"a cascade needs steps and images, got {len(steps)} steps and {len(images)} images")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability, in [0, 1], got {threshold}")
    if not len(buckets) or buckets[0] < 1 or any(b <= a for a, b in zip(buckets, buckets[1:], strict=False)):
        raise ValueError(f"buckets are batch sizes that ascend from 1 on, got {tuple(buckets)}")
