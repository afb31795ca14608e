"""Eviction by what is known of the future: the row goes that the announced batches use last, or not at all.

A server that queues queries, and every training job, knows its next batches. Announced to the cache, they let it come
close to Belady's bound, which knows all of them; the idea of looking ahead for embedding rows is Bagpipe's
(arXiv 2202.12429), the form is ours.

Batches are numbered 0, 1, ... in the order in which they are announced and, but for those that do not come, looked up.
Every key of an announced batch points to its next use in the window; one sorted array tells where each key stands last,
so that a batch is read once, when it is announced.

A window that names at least as many rows as the cache holds is enough to refuse what it does not name; then, and with
four look-ups announced for each row of the cache, most of what separates LRU from Belady's bound is gained
(`python -m launch.bench.caches --case cache_lookahead`). Of a shorter window only the order of what it names is used,
and CLOCK does the rest. What is announced takes about 30 bytes a key, beside the cache's own budget.

Letters: n keys of a batch, U distinct keys in the window.
"""

from typing import Protocol

import numpy as np

from jaxeff.sdm.clock import NEVER

_EMPTY = 1024


class Foresighted(Protocol):
    """What `LookAhead` asks of a cache; `RowCache` and `UnifiedCache` have it."""

    @property
    def ahead(self) -> bool:
        """Whether next uses can be given."""

    @property
    def capacity(self) -> int:
        """Rows of a full cache."""

    def lookup(self, keys: np.ndarray, next_use: np.ndarray | None = None, *, hold: bool = False) -> np.ndarray:
        """As `RowCache.lookup`."""

    def insert(self, keys: np.ndarray, rows: np.ndarray, next_use: np.ndarray | None = None) -> np.ndarray:
        """As `RowCache.insert`."""

    def postpone(self, keys: np.ndarray, batch: int) -> None:
        """As `RowCache.postpone`."""

    def known_uses(self, keys: np.ndarray) -> np.ndarray:
        """As `RowCache.known_uses`."""

    def advance(self, batch: int, *, choosy: bool = False) -> None:
        """As `RowCache.advance`."""


class LookAhead:
    """A row cache that is told what comes.

    Attributes:
      cache: made with `ahead=True`; look-ups and insertions must go through this object.
      announced: number of the next batch to be announced.
      begun: the number after that of the last batch that was looked up.
    """

    def __init__(self, cache: Foresighted):
        """Begins with nothing announced.

        Raises:
          ValueError: for a cache that keeps no next uses.
        """
        if not cache.ahead:
            raise ValueError("LookAhead needs a cache that is made with ahead=True")
        self.cache = cache
        self.announced = self.begun = 0
        # The announced batches end to end, each sorted: keys, and the batch of their next use. `_starts` has where each
        # batch from `_first` on begins; places are counted from the first batch of all, which the arrays have lost.
        self._keys, self._uses = np.empty(_EMPTY, np.uint64), np.empty(_EMPTY, np.int32)
        self._starts, self._first, self._lost = [0], 0, 0
        # Every key of the window, sorted, and the place where it stands last.
        self._known, self._last = np.empty(0, np.uint64), np.empty(0, np.int64)

    def expect(self, keys: np.ndarray) -> int:
        """Announces the next batch.

        Args:
          keys: uint64 [n], what it will look up, no two alike.

        Returns:
          The number of that batch.
        """
        batch, keys = self.announced, np.sort(keys)
        self.cache.postpone(keys, batch)
        end = self._starts[-1]
        self._append(keys)
        places = np.arange(end, end + len(keys))
        at = np.searchsorted(self._known, keys)
        seen = np.zeros(len(keys), bool)
        inside = at < len(self._known)
        seen[inside] = self._known[at[inside]] == keys[inside]
        before = self._last[at[seen]]
        before = before[before >= self._starts[0]]
        self._uses[before - self._lost] = batch
        self._last[at[seen]] = places[seen]
        self._known = np.insert(self._known, at[~seen], keys[~seen])
        self._last = np.insert(self._last, at[~seen], places[~seen])
        self.announced += 1
        return batch

    def lookup(self, keys: np.ndarray, batch: int | None = None, *, hold: bool = False) -> np.ndarray:
        """Begins a batch and finds its rows, as `RowCache.lookup`.

        Args:
          keys: uint64 [n], no two alike.
          batch: the number under which they were announced; those before it that did not come are passed over, and one
            that has begun before is a look-up `beside`. None for the next batch, announced or not.
          hold: as of `RowCache.lookup`.

        Raises:
          ValueError: for a number that was not announced, and as `RowCache.lookup`.
        """
        if batch is None:
            batch = self.begun
            if batch == self.announced:
                self._append(np.empty(0, np.uint64))
                self.announced += 1
        if batch >= self.announced:
            raise ValueError(f"batch={batch} was not announced; {self.announced} were, from 0 on")
        if batch >= self.begun:
            self.begun = batch + 1
            self._forget(batch)
            self.cache.advance(batch, choosy=len(self._known) >= self.cache.capacity)
        else:
            return self.beside(keys, hold=hold)
        return self.cache.lookup(keys, self._next_uses(keys), hold=hold)

    def beside(self, keys: np.ndarray, *, hold: bool = False) -> np.ndarray:
        """Finds rows between the announced batches, as `RowCache.lookup`.

        What is announced of them stays known. What is inserted then is not refused for not being announced, as this may
        be the end of all announcements.
        """
        self.cache.advance(max(0, self.begun - 1), choosy=False)
        return self.cache.lookup(keys, self.cache.known_uses(keys), hold=hold)

    def forget(self) -> None:
        """Ends all announcements: what was announced and did not come is not expected any more."""
        self.begun = self.announced
        self._forget(self.announced)
        self.cache.advance(self.announced, choosy=False)

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Keeps rows of the batch that has begun, as `RowCache.insert`, if they are used before what they replace."""
        return self.cache.insert(keys, rows, self._next_uses(keys))

    def _next_uses(self, keys: np.ndarray) -> np.ndarray:
        """The batch, int32 [n], in which keys of the batch that has begun are used next; `NEVER` of all others."""
        uses = np.full(len(keys), NEVER, np.int32)
        if self._first >= self.begun:  # the first of the window has not begun
            return uses
        start, end = (place - self._lost for place in self._starts[:2])
        mine = self._keys[start:end]
        at = np.searchsorted(mine, keys)
        inside = np.flatnonzero(at < len(mine))
        inside = inside[mine[at[inside]] == keys[inside]]
        uses[inside] = self._uses[start:end][at[inside]]
        return uses

    def _append(self, keys: np.ndarray) -> None:
        start = self._starts[-1] - self._lost
        end = start + len(keys)
        if end > len(self._keys):
            # What has passed makes room first.
            passed = self._starts[0] - self._lost
            size = max(_EMPTY, 2 * (end - passed))
            for name, array in (("_keys", self._keys), ("_uses", self._uses)):
                larger = np.empty(size, array.dtype)
                larger[: start - passed] = array[passed:start]
                setattr(self, name, larger)
            self._lost += passed
            start, end = start - passed, end - passed
        self._keys[start:end], self._uses[start:end] = keys, NEVER
        self._starts.append(self._starts[-1] + len(keys))

    def _forget(self, batch: int) -> None:
        """Drops the batches before this one."""
        del self._starts[: batch - self._first]
        self._first = batch
        passed = self._last < self._starts[0]
        if 2 * np.count_nonzero(passed) > len(passed):
            self._known, self._last = self._known[~passed], self._last[~passed]
