"""Buffers that JAX reads where they lie: rows are written on the host, and on CPU no copy is made for the device.

A buffer must not change while a program reads it. A ring has several, and hands one out again when what was computed
from it is done.
"""

import contextlib
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

PAGE = 4096
# From here on large pages pay: rows at random in gigabytes of a table are found a fifth faster.
LARGE = 2**22


def aligned(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """An array of zeros that starts on a page, as direct reads and arrays shared with JAX need it."""
    count = int(np.prod(shape))
    memory = mmap.mmap(-1, max(PAGE, count * np.dtype(dtype).itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if len(memory) >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count=count).reshape(shape)


def shared(array: np.ndarray) -> jax.Array:
    """The array on the default device; on CPU the same memory, if it starts at a multiple of 64 bytes."""
    return jax.device_put(array, may_alias=True)


def is_shared(array: jax.Array, host: np.ndarray) -> bool:
    """Whether an array on a device is the memory of an array of the host."""
    if len(array.devices()) != 1 or next(iter(array.devices())).platform != "cpu":
        return False
    return array.unsafe_buffer_pointer() == host.ctypes.data


class Place(NamedTuple):
    """A buffer that was handed out.

    Attributes:
      number: of the place in the ring.
      turn: how often it was handed out.
    """

    number: int
    turn: int


class Ring:
    """Buffers in turn, each an object of `make`, made anew where what is asked for does not fit."""

    def __init__(self, size: int, make: Callable[..., Any]):
        """A ring of at least three buffers: one is filled, one is read, and one is between."""
        if size < 3:
            raise ValueError(f"a ring needs 3 buffers or more, got {size}: one is filled while others are read")
        self._make = make
        self._buffers: list[tuple[Any, Any]] = [(None, None)] * size
        self._readers: list[list[Any]] = [[] for _ in range(size)]
        self._turns = [0] * size
        self._next = 0

    def take(self, shape: Any) -> tuple[Place, Any]:
        """The next buffer, which nobody reads any more.

        Args:
          shape: what `make` makes a buffer of.

        Returns:
          Which buffer it is, and the buffer.

        Raises:
          RuntimeError: if what was computed from it was donated, so that nobody can know when that was done.
        """
        number = self._next
        self._next = (number + 1) % len(self._buffers)
        # The turn first, so that whoever reads this buffer from now on learns that it has passed.
        self._turns[number] += 1
        readers, self._readers[number] = self._readers[number], []
        for leaf in jax.tree.leaves(readers):
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise RuntimeError(
                    "what was computed from a staged query was donated to another program; give read_by a result that "
                    "is not"
                )
        jax.block_until_ready(readers)
        if self._buffers[number][0] != shape:
            self._buffers[number] = (shape, self._make(shape))
        return Place(number, self._turns[number]), self._buffers[number][1]

    def read_by(self, place: Place, results: Any) -> None:
        """Says what was computed from a buffer, which is not handed out again before that is done.

        Raises:
          RuntimeError: if it was handed out again already.
        """
        self._readers[place.number].append(results)
        if self._turns[place.number] != place.turn:
            raise RuntimeError(
                f"a staged query is read after {len(self._buffers)} others were fetched, which took its buffer; pool "
                "each query before asking for the next, or open the tiers with more buffers"
            )
