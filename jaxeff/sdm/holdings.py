"""What tiers keep in memory of tables that are in files: pinned rows, and a cache under a budget."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxeff.sdm.encoding import RowFormat
from jaxeff.sdm.io.reader import Reader
from jaxeff.sdm.pinned_rows import PinnedRows
from jaxeff.sdm.remaps import Remaps
from jaxeff.sdm.row_cache import row_keys
from jaxeff.sdm.table import Store, TableSpec
from jaxeff.sdm.unified_cache import UnifiedCache

# Rows of each size; a smaller cache is not worth its metadata.
LEAST_ROWS = 16
# Of a row, at most, beside the row itself, next uses included.
METADATA = 16


def make_cache(specs: Sequence[TableSpec], cached: np.ndarray, budget: int, *, ahead: bool) -> UnifiedCache | None:
    """A cache for all tables that use one; row sizes share the budget by the bytes of the tables behind them.

    Args:
      specs: of all tables.
      cached: bool [T], which of them use it.
      budget: bytes; 0 for no cache.
      ahead: whether next uses can be given.

    Returns:
      The cache, or None where there is no budget or no table that uses it.

    Raises:
      ValueError: for a budget that is too small.
    """
    behind: dict[int, int] = {}
    for table in np.flatnonzero(cached).tolist():
        size = specs[table].format.row_bytes
        behind[size] = behind.get(size, 0) + specs[table].rows * size
    if not budget or not behind:
        return None
    least = {size: LEAST_ROWS * (size + METADATA) for size in behind}
    if (left := budget - sum(least.values())) < 0:
        raise ValueError(
            f"cache_bytes={budget} is too small: {LEAST_ROWS} rows of each size take {sum(least.values())}; give more, "
            "or 0 for no cache"
        )
    return UnifiedCache(
        budget,
        [spec.format.row_bytes for spec in specs],
        bypass=np.flatnonzero(~cached).tolist(),
        shares={size: least[size] + left * bytes_ / max(1, sum(behind.values())) for size, bytes_ in behind.items()},
        rows=[spec.rows for spec in specs],
        ahead=ahead,
    )


def pin(
    store: Store,
    reader: Reader,
    remaps: Remaps,
    pinned: Mapping[str, Any],
    placement: Mapping[str, str],
    formats: Sequence[RowFormat],
) -> list[PinnedRows | None]:
    """Reads the rows that stay in memory, of each format.

    Args:
      store: which has them.
      reader: of its files.
      remaps: of its tables.
      pinned: ids int [n] by table.
      placement: tier by table.
      formats: of the rows of the store.

    Raises:
      TypeError: for ids that are not integers.
      ValueError: for tables that are in memory whole or do not exist, and ids that do not exist.
    """
    tables, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for name, wanted in pinned.items():
        if placement.get(name, "memory") == "memory":
            raise ValueError(f"pinned: {name!r} is no table whose rows are in a file; take it out")
        ids = np.unique(np.asarray(wanted))
        if len(ids) and not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"pinned: ids of {name!r} must be integers, got {ids.dtype}")
        table, ids = store.index(name), ids.astype(np.int64)
        most = store.tables[table].ids - 1
        if len(ids) and not 0 <= ids[0] <= ids[-1] <= most:
            raise ValueError(f"pinned: ids of {name!r} must be 0 .. {most}, got {ids[0]} .. {ids[-1]}")
        of_table = remaps.rows(np.full(len(ids), table), ids)
        rows.append(of_table[of_table >= 0])
        tables.append(np.full(len(rows[-1]), table))
    of, at = np.concatenate(tables), np.concatenate(rows)
    keys, groups = row_keys(of, at), np.array([formats.index(table.spec.format) for table in store.tables])[of]
    found: list[PinnedRows | None] = []
    for group in range(len(formats)):
        mine = groups == group
        found.append(PinnedRows(store, reader, of[mine], at[mine], keys[mine]) if mine.any() else None)
    return found
