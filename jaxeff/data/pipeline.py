"""Batches: drawn deterministically, resumable at any step, padded for evaluation, prefetched onto devices."""

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np


class Batches:
    """Endless shuffled batches without state: `batch(step)` is a pure function of `(seed, step)`.

    Training that stops at any step, also in the middle of an epoch, resumes with `starting_at(step)` and sees exactly
    the batches it would have seen. Every epoch visits the rows in a new order, each row at most once; the
    `N % batch_size` rows that do not fill a batch are left out of that epoch (other ones each time).

    >>> batches = Batches({"x": np.arange(6)}, 2, seed=0)
    >>> sorted(np.concatenate([batches.batch(step)["x"] for step in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]

    Attributes:
      steps_per_epoch: number of batches in an epoch, `N // batch_size`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], batch_size: int, *, seed: int, shuffle: bool = True):
        """Prepares batches of `arrays`.

        Args:
          arrays: arrays that share axis 0, of length N.
          batch_size: rows per batch, 1 .. N.
          seed: non-negative integer that chooses the order of the rows.
          shuffle: False keeps the rows in their order in every epoch.

        Raises:
          TypeError: `arrays` is not a mapping, or `batch_size` or `seed` is not an integer.
          ValueError: the arrays differ in length, or a number is out of range.
        """
        self._arrays = dict(_checked(arrays))
        self._length = len(next(iter(self._arrays.values())))
        self._batch_size = _whole("batch_size", batch_size, 1)
        self._seed = _whole("seed", seed, 0)
        self._shuffle = bool(shuffle)
        if self._batch_size > self._length:
            raise ValueError(
                f"batch_size={batch_size} is larger than the data, which has {self._length} rows; "
                f"use at most {self._length}"
            )
        self.steps_per_epoch = self._length // self._batch_size
        # The order of the last epoch asked for; remembering it changes no result.
        self._memory: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of one step.

        Args:
          step: step number since the beginning of training, from 0.

        Returns:
          New arrays of `batch_size` rows under the names of the input.
        """
        epoch, position = divmod(_whole("step", step, 0), self.steps_per_epoch)
        rows = self._order(epoch)[position * self._batch_size : (position + 1) * self._batch_size]
        return {name: array[rows] for name, array in self._arrays.items()}

    def starting_at(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless iterator over the batches of steps `step`, `step + 1`, and so on."""
        step = _whole("step", step, 0)
        return (self.batch(number) for number in itertools.count(step))

    def _order(self, epoch: int) -> np.ndarray:
        memory = self._memory
        if memory is None or memory[0] != epoch:
            if self._shuffle:
                # NumPy promises to keep this raw stream; what Generator.permutation makes of it may change.
                stream = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
                order = np.argsort(stream.random_raw(self._length), kind="stable")
            else:
                order = np.arange(self._length)
            self._memory = memory = (epoch, order)
        return memory[1]


def padded_batches(arrays: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches for evaluation: every row once, in order, all batches of one shape.

    Args:
      arrays: arrays that share axis 0; none may be called "mask".
      batch_size: rows per batch, at least 1.

    Returns:
      Iterator over batches with the arrays, the last one padded with zeros (False for bool), and `mask` float32
      [batch_size]: 1 for real rows, 0 for padding.

    Raises:
      TypeError: `arrays` is not a mapping, or `batch_size` is not an integer.
      ValueError: the arrays differ in length, one is called "mask", or `batch_size` is out of range.
    """
    arrays = _checked(arrays)
    batch_size = _whole("batch_size", batch_size, 1)
    if "mask" in arrays:
        raise ValueError("arrays has an entry 'mask', the name under which padded_batches returns its own; rename it")
    return _padded(arrays, batch_size)


def prefetch(
    batches: Iterable[Mapping[str, Any]], *, size: int = 2, sharding: jax.sharding.Sharding | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Reads batches in a background thread and puts them on the device(s) ahead of their use.

    An exception raised while reading or placing a batch is raised again in the consumer, after the batches that came
    before it. When the consumer stops early (it leaves the loop, closes the iterator or drops it) the thread stops.

    Args:
      batches: finite or endless iterable of dictionaries of arrays.
      size: how many batches may wait ready on the device, at least 1.
      sharding: placement of every array of a batch, usually `NamedSharding(mesh, PartitionSpec("data"))`; None means
        the default device. With several hosts every host reads the same batch and keeps its own part.

    Returns:
      Iterator over dictionaries of `jax.Array`, in order.

    Raises:
      TypeError: `batches` cannot be iterated, or `sharding` is not a `jax.sharding.Sharding`.
      ValueError: `size` < 1; or, at the batch concerned, an axis is not divisible by the devices it is split over.
    """
    size = _whole("size", size, 1)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(
            f"sharding must be a jax.sharding.Sharding or None, got {type(sharding).__name__}; "
            "for a mesh write NamedSharding(mesh, PartitionSpec('data'))"
        )
    return _prefetched(iter(batches), size, sharding)


def _padded(arrays: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    length = len(next(iter(arrays.values())))
    for first in range(0, length, batch_size):
        real = min(batch_size, length - first)
        batch = {}
        for name, array in arrays.items():
            padded = np.zeros((batch_size, *array.shape[1:]), array.dtype)
            padded[:real] = array[first : first + real]
            batch[name] = padded
        batch["mask"] = (np.arange(batch_size) < real).astype(np.float32)
        yield batch


def _prefetched(batches: Iterator, size: int, sharding: jax.sharding.Sharding | None) -> Iterator[dict[str, jax.Array]]:
    ready: queue.Queue = queue.Queue(maxsize=size)
    stop = threading.Event()
    thread = threading.Thread(
        target=_produce, args=(batches, sharding, ready, stop), name="jaxeff-prefetch", daemon=True
    )
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stop.set()
        thread.join()


def _produce(batches: Iterator, sharding: jax.sharding.Sharding | None, ready: queue.Queue, stop: threading.Event):
    """Body of the thread: puts `(batch, None)`, and at the end `(None, None)` or `(None, error)`."""
    try:
        for batch in batches:
            if stop.is_set() or not _put(ready, (_placed(batch, sharding), None), stop):
                return
        _put(ready, (None, None), stop)
    except BaseException as error:  # Whatever it is, the consumer must see it; a silent thread would hang it.
        _put(ready, (None, error), stop)


def _put(ready: queue.Queue, item: tuple, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


def _placed(batch: Mapping[str, Any], sharding: jax.sharding.Sharding | None) -> dict[str, jax.Array]:
    if sharding is None:
        return {name: jax.device_put(array) for name, array in batch.items()}
    for name, array in batch.items():
        try:
            sharding.shard_shape(np.shape(array))
        except ValueError as error:
            raise ValueError(
                f"batch array {name!r} of shape {list(np.shape(array))} cannot be split over the "
                f"{len(sharding.device_set)} devices of sharding={sharding}: each split axis must be divisible by the "
                "devices it is split over; choose another batch_size (padded_batches fills up the last batch)"
            ) from error
    if sharding.is_fully_addressable:
        return {name: jax.device_put(array, sharding) for name, array in batch.items()}
    # Several hosts: each one copies only the rows that its own devices hold.
    return {
        name: jax.make_array_from_callback(np.shape(array), sharding, np.asarray(array).__getitem__)
        for name, array in batch.items()
    }


def _checked(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    if not isinstance(arrays, Mapping):
        hint = "; pass dataset.arrays" if hasattr(arrays, "arrays") else ""
        raise TypeError(f"arrays must be a dictionary of arrays, got {type(arrays).__name__}{hint}")
    if any(np.ndim(array) == 0 for array in arrays.values()):
        raise ValueError("arrays holds a scalar; every array needs an axis 0 of rows")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"arrays must be non-empty and share axis 0, but their lengths are {lengths}")
    return arrays


def _whole(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value} is out of range; expected at least {least}")
    return int(value)
