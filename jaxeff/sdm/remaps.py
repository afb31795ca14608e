"""Where the rows of ids are, for all tables of a store at once: pruning and reordering move them.

Letters: n look-ups, R rows of a table.
"""

import numpy as np

from jaxeff.sdm.table import Store


class Remaps:
    """The maps of all tables, end to end.

    Attributes:
      nbytes: memory that they take.
    """

    def __init__(self, store: Store):
        """Joins the maps of the tables that have one."""
        maps = {number: table.remap for number, table in enumerate(store.tables) if table.remap is not None}
        starts = dict(zip(maps, np.cumsum([0, *map(len, maps.values())]), strict=False))
        self._start = np.array([starts.get(number, -1) for number in range(len(store.tables))], np.int64)
        self._map = np.concatenate(list(maps.values())) if maps else np.zeros(0, np.int32)
        self._rows = [table.spec.rows for table in store.tables]
        self.nbytes = self._map.nbytes

    def rows(self, tables: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Positions of rows in the files of their tables, int64 [n]; -1 for ids that were pruned.

        Args:
          tables: int [n].
          ids: int64 [n], within range.
        """
        if not len(self._map):
            return ids
        start = self._start[tables]
        return np.where(start < 0, ids, self._map[np.where(start < 0, 0, start + ids)])

    def ids(self, table: int, rows: np.ndarray) -> np.ndarray:
        """The id of each row of a table, int64 [n] for int64 [n]; -1 for a row that no id has."""
        if self._start[table] < 0:
            return rows
        stop = self._start[table + 1 :]
        stop = stop[stop >= 0]
        of_table = self._map[self._start[table] : stop[0] if len(stop) else None]
        found = np.full(self._rows[table], -1, np.int64)
        kept = np.flatnonzero(of_table >= 0)
        found[of_table[kept]] = kept
        return found[rows]
