"""Going over to a new version of a store while queries are served, with a cache that is warm from the start."""

import numpy as np

from jaxeff.sdm.table import open_store
from jaxeff.sdm.tiers import Tiers


def renewed(tiers: Tiers) -> Tiers | None:
    """Opens the newest version of a store as the tiers of an older one were opened, and reads what their cache has.

    Queries that were planned or staged by the old tiers go on with the old version, whose files stay as long as its
    store is open; later ones go to the new tiers. Close the old ones and their store after the last query.

    Args:
      tiers: of a version that may have been replaced.

    Returns:
      Tiers of the newest version, whose `store` is open, too; None while there is no newer one.

    Raises:
      ValueError: if the new version has other tables than the placement names.
      jaxeff.sdm.StoreError: if it cannot be opened; the old version can still be read.
    """
    if tiers.store.newer() is None:
        return None
    store = open_store(tiers.store.folder)
    try:
        fresh = Tiers(store, **tiers.settings)
    except BaseException:
        store.close()
        raise
    fresh.warm(*_cached(tiers))
    return fresh


def _cached(tiers: Tiers) -> tuple[np.ndarray, np.ndarray]:
    """Tables and ids of the rows in a cache, those in use first."""
    tables, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for cache in tiers.cache.caches.values() if tiers.cache is not None else ():
        keys, slots = cache.contents()
        keys = keys[np.argsort(~cache.in_use(slots), kind="stable")]
        of, rows = (keys >> np.uint64(40)).astype(np.int64), (keys & np.uint64(2**40 - 1)).astype(np.int64)
        for number, table in enumerate(tiers.store.tables):
            if table.remap is not None:
                mine = of == number
                rows[mine] = _ids(table.remap, table.spec.rows)[rows[mine]]
        tables.append(of[rows >= 0])
        ids.append(rows[rows >= 0])
    return np.concatenate(tables), np.concatenate(ids)


def _ids(remap: np.ndarray, rows: int) -> np.ndarray:
    """The id of every row, int64 [rows], -1 for one that no id has."""
    found = np.full(rows, -1, np.int64)
    kept = np.flatnonzero(remap >= 0)
    found[remap[kept]] = kept
    return found
