"""Rows of large tables that stay in memory for ever: the most used ones, where a table is split by rows.

Letters: n keys, P rows that are pinned.
"""

import numpy as np

from jaxeff.sdm.io.reader import Reader
from jaxeff.sdm.table import Store


class PinnedRows:
    """Rows of one format by key.

    Attributes:
      keys: uint64 [P], of `row_keys`, ascending.
      rows: uint8 [P, row bytes].
    """

    def __init__(self, store: Store, reader: Reader, tables: np.ndarray, rows: np.ndarray, keys: np.ndarray):
        """Reads them.

        Args:
          store: which has them.
          reader: of its files.
          tables: int [P], all of one format.
          rows: int64 [P], positions in the files.
          keys: uint64 [P], by which they are found; no two alike.
        """
        order = np.argsort(keys)
        self.keys = keys[order]
        form = store.tables[int(tables[0])].spec.format
        self.rows = np.empty((len(keys), form.row_bytes), np.uint8)
        reader.gather(*store.locate(tables[order], rows[order]), form.row_bytes, self.rows)

    @property
    def bytes(self) -> int:
        """Memory of the rows and what finds them."""
        return self.rows.nbytes + self.keys.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where rows are in `rows`, int64 [n] for keys uint64 [n]; -1 for those that are not pinned."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)
