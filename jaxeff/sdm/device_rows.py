"""Rows of one format in the memory of a device, and the host's notes of which they are.

The notes are a directory, a `RowCache` that keeps no rows: it says where each row is and which one goes for another, so
that nothing ever waits for an answer of the device. Behind the last slot lie a row of zeros, and the spill: rows that
find no room, or must not stay, there for one query alone.

Letters: D dimension, M new rows, S slots, U distinct rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.sdm.encoding import RowFormat, zero_row
from jaxeff.sdm.loaded import typed
from jaxeff.sdm.lookahead import LookAhead
from jaxeff.sdm.row_cache import WAYS, RowCache
from jaxeff.sdm.staging import aligned

# What is sent has at least so many rows, and one of two to four sizes in an octave: less than half is sent in vain, and
# the programs that write it are few and small.
_LEAST_SENT = 64
# Beyond the end of all arrays; places of padding count down from here.
_NOWHERE = 2**31 - 1


class New(NamedTuple):
    """Rows on their way into the memory of the device.

    Attributes:
      values: float32 [M, D], or uint8 [M, row bytes] in another format.
      where: int32 [M], positions, no two alike; beyond the end for padding.
      spilled: how many of them lie behind the last slot.
    """

    values: Any
    where: Any
    spilled: int


class DeviceRows:
    """Rows of one format on the default device.

    `find` to `forget` change the notes alone, and belong to one thread; `write` and `rows` belong to another one, which
    writes what was noted in the order in which it was.

    Attributes:
      form: the format.
      capacity: S, slots; position S has zeros.
      rows: float32 [S + 1 + spill, D], or uint8 [S + 1 + spill, row bytes] in another format.
    """

    def __init__(self, form: RowFormat, slots: int, spill: int, bounds: tuple[int, int], *, ahead: bool = False):
        """Makes room for at most so many rows.

        Args:
          form: of the rows.
          slots: of rows that may stay; 0 for none.
          spill: S is followed by room for so many rows that do not.
          bounds: number of tables, and most rows of one of them.
          ahead: whether next uses can be given by `expect`.
        """
        self.form, self._directory = form, _directory(slots, bounds, ahead) if slots else None
        self._told = LookAhead(self._directory) if self._directory is not None and ahead else self._directory
        self.capacity = 0 if self._directory is None else self._directory.capacity
        zero = typed(zero_row(form)[None], form)
        shape = self.capacity + 1 + spill, zero.shape[1]
        self.rows: jax.Array = jnp.zeros(shape, zero.dtype).at[self.capacity].set(zero[0])

    def __len__(self) -> int:
        return 0 if self._directory is None else len(self._directory)

    def expect(self, keys: np.ndarray) -> None:
        """As `LookAhead.expect`."""
        if isinstance(self._told, LookAhead):
            self._told.expect(keys)

    def forget_expected(self) -> None:
        """As `LookAhead.forget`."""
        if isinstance(self._told, LookAhead):
            self._told.forget()

    def find(self, keys: np.ndarray, mine: np.ndarray, number: int | None = None) -> np.ndarray:
        """Finds rows, and holds them until `release`.

        Args:
          keys: uint64 [U], no two alike.
          mine: bool [U], which of them may stay here.
          number: under which they were announced, from 0 on; None if they were not.

        Returns:
          int64 [U], slots, or -1.
        """
        slots = np.full(len(keys), -1, np.int64)
        if isinstance(told := self._told, LookAhead):
            at = told.beside(keys[mine], hold=True) if number is None else told.lookup(keys[mine], number, hold=True)
            slots[mine] = at
        elif told is not None:
            slots[mine] = told.lookup(keys[mine], hold=True)
        return slots

    def place(self, keys: np.ndarray, mine: np.ndarray, slots: np.ndarray) -> int:
        """Gives places to rows that come, in slots if there is room beside what is held, and else in the spill.

        Args:
          keys: uint64 [U].
          mine: bool [U], which of them may stay.
          slots: int64 [U], of `find`; each -1 is changed into a position.

        Returns:
          How many rows are in the spill.
        """
        coming = np.flatnonzero((slots < 0) & mine)
        if self._told is not None and len(coming):
            slots[coming] = self._told.insert(keys[coming], _nothing(len(coming)))
        lost = np.flatnonzero(slots < 0)
        slots[lost] = self.capacity + 1 + np.arange(len(lost))
        return len(lost)

    def warm(self, keys: np.ndarray) -> np.ndarray:
        """Gives slots to rows, int64 [U], or -1, without counting anything."""
        assert self._directory is not None, "only rows that may stay are warmed"
        return self._directory.warm(keys, _nothing(len(keys)))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which rows are here, bool [U], without counting anything."""
        return np.zeros(len(keys), bool) if self._directory is None else self._directory.find(keys) >= 0

    def release(self) -> None:
        """Holds nothing any more."""
        if self._directory is not None:
            self._directory.release()

    def forget(self) -> None:
        """Forgets which rows are here."""
        if self._directory is not None:
            self._directory.clear()

    def buffer(self, count: int) -> np.ndarray:
        """Memory of the host for so many rows that come, uint8 [M, row bytes], with M at least that number."""
        step = max(_LEAST_SENT, 1 << max(0, (count - 1).bit_length() - 2))
        return aligned((-(-count // step) * step, self.form.row_bytes))

    def new(self, values: np.ndarray, at: np.ndarray, positions: np.ndarray, spilled: int) -> New:
        """What `write` takes.

        Args:
          values: of `buffer`.
          at: int64 [n], rows of `values` to be written.
          positions: int64 [n], where; negative ones are left out.
          spilled: of `place`.
        """
        # Padding goes nowhere, each to a place of its own.
        where = (_NOWHERE - np.arange(len(values))).astype(np.int32)
        where[at[positions >= 0]] = positions[positions >= 0]
        return New(typed(values, self.form), where, spilled)

    def write(self, new: New) -> None:
        """Writes rows; the spill is doubled first where that is too small, for which all rows are copied once."""
        if len(self.rows) < self.capacity + 1 + new.spilled:
            size = self.capacity + 1 + (1 << (new.spilled - 1).bit_length())
            more = jnp.zeros((size - len(self.rows), self.rows.shape[1]), self.rows.dtype)
            self.rows = jnp.concatenate([self.rows, more])
        self.rows = write_rows(self.rows, new.values, new.where)


@partial(jax.jit, donate_argnums=0)
def write_rows(rows: jax.Array, values: jax.Array, where: jax.Array) -> jax.Array:
    """Writes rows into memory that is donated, and touches no others.

    Args:
      rows: [R, ...]; gone after the call.
      values: [M, ...], of the same dtype.
      where: int32 [M], no two alike; what is beyond the end is dropped.

    Returns:
      [R, ...], in the same memory.
    """
    return rows.at[where].set(values, mode="drop", unique_indices=True, wrap_negative_indices=False)


def _directory(slots: int, bounds: tuple[int, int], ahead: bool) -> RowCache:
    """A row cache of at most so many slots, with a byte for each of its rows."""
    ways = WAYS["compact"]
    # What a set of all ways takes with tags of 4 bytes; a slot of any other set takes more.
    set_bytes = ways * (1 + 4 * ahead) + (ways + 1) * 4 + 5
    return RowCache(slots * set_bytes // ways, 1, "compact", bounds=bounds, ahead=ahead)


def _nothing(count: int) -> np.ndarray:
    """Rows of one byte, for a cache that keeps none."""
    return np.broadcast_to(np.zeros((1, 1), np.uint8), (count, 1))
