"""Going over to a new version of a store while queries are served, with a cache that is warm from the start."""

import numpy as np

from jaxeff.sdm.row_cache import split_keys
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
      ValueError: if the new version has other tables than the placement names, or not all rows that are pinned.
      jaxeff.sdm.StoreError: if it cannot be opened; the old version can still be read.
    """
    if tiers.store.newer() is None:
        return None
    store = open_store(tiers.store.folder)
    fresh = None
    try:
        fresh = Tiers(store, **tiers.settings)
        fresh.warm(*_cached(tiers, fresh))
    except BaseException:
        if fresh is not None:
            fresh.close()
        store.close()
        raise
    return fresh


def _cached(old: Tiers, new: Tiers) -> tuple[np.ndarray, np.ndarray]:
    """Tables and ids of the rows in a cache that a new version has, too, those in use first."""
    tables, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    numbers = {table.spec.name: number for number, table in enumerate(new.store.tables)}
    for cache in old.cache.caches.values() if old.cache is not None else ():
        with old.exclusively():
            keys, slots = cache.contents()
            of, rows = split_keys(keys[np.argsort(~cache.in_use(slots), kind="stable")])
        now = np.full(len(of), -1, np.int64)
        for number, table in enumerate(old.store.tables):
            mine = of == number
            rows[mine] = old.remaps.ids(number, rows[mine])
            now[mine] = numbers.get(table.spec.name, -1)
        kept = (rows >= 0) & (now >= 0)
        kept &= rows < new.rows[np.where(now >= 0, now, 0)]
        tables.append(now[kept])
        ids.append(rows[kept])
    return np.concatenate(tables), np.concatenate(ids)
