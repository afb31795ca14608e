"""Tables of a store that are in memory whole, and buffers of the same form for rows that are staged.

Letters: D dimension, R rows, T tables.
"""

import dataclasses

import jax
import numpy as np

from jaxeff.sdm.encoding import RowFormat, zero_row
from jaxeff.sdm.io.reader import Reader
from jaxeff.sdm.staging import aligned, shared
from jaxeff.sdm.table import Store

# Read at once.
CHUNK_BYTES = 2**24


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


def load(store: Store, reader: Reader, tables: np.ndarray, form: RowFormat) -> Loaded:
    """Reads tables whole.

    Args:
      store: which has them.
      reader: of its files.
      tables: int [t], which; all of one format.
      form: that format.

    Raises:
      ValueError: for more rows than int32 can number.
      OSError: for what cannot be read.
    """
    counts = np.array([store.tables[table].spec.rows for table in tables], np.int64)
    if counts.sum() >= 2**31 - 1:
        raise ValueError(f"{counts.sum():,} rows of one format in memory are more than int32 can number")
    first = np.zeros(len(store.tables), np.int64)
    first[tables] = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rows = aligned((int(counts.sum()) + 1, form.row_bytes))
    step = max(1, CHUNK_BYTES // form.row_bytes)
    for table, count in zip(tables, counts, strict=True):
        for start in range(0, count, step):
            wanted = np.arange(start, min(start + step, count))
            files, offsets = store.locate(np.full(len(wanted), table, np.int32), wanted)
            reader.gather(files, offsets, form.row_bytes, rows[first[table] + start :][: len(wanted)])
    rows[-1] = zero_row(form)
    return Loaded(first, rows, shared(_typed(rows, form)))


class Buffer:
    """Rows that are staged: `bytes` uint8 [size, row bytes] for the host, and `rows`, the same memory for JAX."""

    def __init__(self, shape: tuple[int, RowFormat]):
        size, form = shape
        self.bytes = aligned((size, form.row_bytes))
        self.bytes[:] = zero_row(form)
        self.rows = shared(_typed(self.bytes, form))


def _typed(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """Rows of float32 as such, others as bytes."""
    return rows.view(np.float32) if form.kind == "float32" else rows
