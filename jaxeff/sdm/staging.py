"""Buffers that JAX reads where they lie: rows are written on the host, and on CPU no copy is made for the device.

A buffer must not change while a program reads it. A ring has several, and hands one out again when what was computed
from it is done.
"""

import mmap
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PAGE = 4096


def aligned(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """An array of zeros that starts on a page, as direct reads and arrays shared with JAX need it."""
    count = int(np.prod(shape))
    size = max(PAGE, count * np.dtype(dtype).itemsize)
    return np.frombuffer(mmap.mmap(-1, size), dtype, count=count).reshape(shape)


def shared(array: np.ndarray) -> jax.Array:
    """The array on the default device; on CPU the same memory, if it starts at a multiple of 64 bytes."""
    return jax.device_put(array, may_alias=True)


class Ring:
    """Buffers in turn, each an object of `make`, made anew where what is asked for does not fit."""

    def __init__(self, size: int, make: Callable[..., Any]):
        """A ring of at least three buffers: one is filled, one is read, and one is between."""
        if size < 3:
            raise ValueError(f"a ring needs 3 buffers or more, got {size}: one is filled while others are read")
        self._make = make
        self._buffers: list[tuple[Any, Any]] = [(None, None)] * size
        self._readers: list[Any] = [None] * size
        self._next = 0

    def take(self, shape: Any) -> tuple[int, Any]:
        """The next buffer, which nobody reads any more.

        Args:
          shape: what `make` makes a buffer of.

        Returns:
          Number of the place in the ring, and the buffer.
        """
        place = self._next
        self._next = (place + 1) % len(self._buffers)
        if self._readers[place] is not None:
            jax.block_until_ready(self._readers[place])
            self._readers[place] = None
        if self._buffers[place][0] != shape:
            self._buffers[place] = (shape, self._make(shape))
        return place, self._buffers[place][1]

    def read_by(self, place: int, results: Any) -> None:
        """Says what was computed from the buffer at a place; the buffer is not handed out before that is done."""
        self._readers[place] = results
