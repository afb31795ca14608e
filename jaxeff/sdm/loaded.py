"""Tables of a store that are in memory whole, and buffers of the same form for rows that are staged.

Letters: D dimension, R rows, T tables.
"""

import dataclasses

import jax
import numpy as np

from jaxeff.sdm.encoding import RowFormat, zero_row
from jaxeff.sdm.staging import aligned, is_shared, shared
from jaxeff.sdm.table import Store

# What int32 can number, with one row of zeros.
MOST_ROWS = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """Tables in memory, end to end.

    Attributes:
      first: int64 [T], where each table starts.
      rows: uint8 [R, row bytes], the last of zeros.
      array: the same memory for JAX, float32 [R, D] of that format and else uint8.
    """

    first: np.ndarray
    rows: np.ndarray
    array: jax.Array

    def positions(self, tables: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Where rows of tables are; -1, of a pruned row, is that of zeros."""
        return np.where(rows < 0, len(self.rows) - 1, self.first[tables] + rows)


def load(store: Store, tables: np.ndarray, form: RowFormat) -> Loaded:
    """Reads tables whole, verifying them.

    Args:
      store: which has them.
      tables: int [t], which; all of one format.
      form: that format.

    Raises:
      ValueError: for more rows than int32 can number.
      jaxeff.sdm.StoreError: for files that are not what was written.
    """
    counts = np.array([store.tables[table].spec.rows for table in tables], np.int64)
    if counts.sum() >= MOST_ROWS:
        raise ValueError(f"{counts.sum():,} rows of one format in memory are more than int32 can number")
    first = np.zeros(len(store.tables), np.int64)
    first[tables] = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rows = aligned((int(counts.sum()) + 1, form.row_bytes))
    for table in tables:
        at = first[table]
        for chunk in store.tables[table].stream():
            rows[at : at + len(chunk)] = chunk
            at += len(chunk)
    rows[-1] = zero_row(form)
    return Loaded(first, rows, shared(typed(rows, form)))


class Buffer:
    """Rows that are staged: `bytes` uint8 [size, row bytes] for the host, and `array()` of them for JAX."""

    def __init__(self, shape: tuple[int, RowFormat]):
        """Room for `size` rows of a format."""
        size, form = shape
        self.bytes = aligned((size, form.row_bytes))
        self.bytes[:] = zero_row(form)
        self._typed = typed(self.bytes, form)
        array = shared(self._typed)
        # A device with memory of its own has a copy, and another JAX may not share: then rows are sent each time.
        self._shared = array if is_shared(array, self._typed) else None

    def array(self) -> jax.Array:
        """The rows as they are now, on the default device."""
        return jax.device_put(self._typed, may_alias=False) if self._shared is None else self._shared


def typed(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """Rows of float32 as such, others as bytes."""
    return rows.view(np.float32) if form.kind == "float32" else rows
