"""Look-ahead: what it knows of the future, and how near to Belady's bound that brings the cache."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm import reuse
from jaxeff.sdm.lookahead import LookAhead
from jaxeff.sdm.row_cache import NEVER, RowCache, row_keys
from jaxeff.sdm.unified_cache import UnifiedCache

batches_of_keys = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), min_size=1, max_size=25)


def cache_of(rows, **settings):
    """About so many rows of 8 bytes."""
    return RowCache(rows * (8 + 4 + 8) + 26 * (rows // 31 + 1), 8, ahead=True, **settings)


def replay(cache, batches, window):
    ahead = LookAhead(cache)
    for keys in batches[:window]:
        ahead.expect(keys)
    for number, keys in enumerate(batches):
        if number + window < len(batches):
            ahead.expect(batches[number + window])
        missed = ahead.lookup(keys) < 0
        ahead.insert(keys[missed], np.zeros((int(missed.sum()), 8), np.uint8))
    return cache.hits


def skewed(seed, accesses=40_000, distinct=4000):
    rng = np.random.default_rng(seed)
    ids = (distinct * rng.random(accesses) ** 3).astype(np.uint64).reshape(-1, 100)
    return [rng.permutation(np.unique(keys)) for keys in ids]


class Recorder(RowCache):
    """Keeps the next uses that it is given."""

    def lookup(self, keys, next_use=None, *, hold=False):
        self.told = next_use
        return super().lookup(keys, next_use, hold=hold)


@given(batches_of_keys, st.integers(0, 6), st.randoms())
@settings(deadline=None)
def test_next_uses_are_those_of_the_announced_batches(batches, window, random):
    cache = Recorder(2000, 8, ahead=True, compiled=False)
    ahead, announced = LookAhead(cache), 0
    batches = [np.array(keys, np.uint64) for keys in batches]
    for number, keys in enumerate(batches):
        # Windows of any length, and batches that nobody announced.
        until = min(len(batches), number + random.randint(0, window))
        for batch in batches[announced:until]:
            assert ahead.expect(batch) == announced
            announced += 1
        known = number < announced
        ahead.lookup(keys)
        announced = max(announced, number + 1)
        future = batches[number + 1 : announced]
        expected = [next((number + 1 + i for i, b in enumerate(future) if key in b), NEVER) for key in keys]
        assert cache.told.tolist() == (expected if known else [NEVER] * len(keys))
        ahead.insert(keys, np.zeros((len(keys), 8), np.uint8))


def test_a_row_that_is_announced_outlives_all_that_are_not():
    cache = cache_of(62)
    ahead = LookAhead(cache)
    wanted = np.arange(10, dtype=np.uint64)
    others = [np.arange(start, start + 20, dtype=np.uint64) for start in range(100, 2000, 20)]
    for keys in (wanted, *others, wanted):
        ahead.expect(keys)
    for keys in (wanted, *others):
        ahead.lookup(keys)
        ahead.insert(keys, np.zeros((len(keys), 8), np.uint8))
    assert (ahead.lookup(wanted) >= 0).all()


def test_a_row_that_is_here_learns_of_a_later_announcement():
    cache = cache_of(62)
    ahead = LookAhead(cache)
    wanted = np.arange(10, dtype=np.uint64)
    ahead.lookup(wanted)
    ahead.insert(wanted, np.zeros((10, 8), np.uint8))
    others = [np.arange(start, start + 20, dtype=np.uint64) for start in range(100, 2000, 20)]
    for keys in (*others, wanted):
        ahead.expect(keys)
    for keys in others:
        ahead.lookup(keys)
        ahead.insert(keys, np.zeros((len(keys), 8), np.uint8))
    assert (ahead.lookup(wanted) >= 0).all()


def test_closes_most_of_the_gap_between_lru_and_belady():
    batches = skewed(0)
    flat = np.concatenate(batches)
    for rows in (200, 1000):
        cache = cache_of(rows)
        lru, best = reuse.lru_hits(flat, cache.capacity), reuse.belady_hits(flat, cache.capacity)
        window = 4 * cache.capacity // 80
        assert lru + 0.6 * (best - lru) < replay(cache, batches, window) <= best
        # With all announced, what is missing is due to sets.
        assert replay(cache_of(rows), batches, len(batches)) > lru + 0.85 * (best - lru)


def test_looks_ahead_for_rows_of_several_sizes():
    rng = np.random.default_rng(3)
    batches = [
        np.unique(row_keys(rng.integers(0, 3, 100), (3000 * rng.random(100) ** 3).astype(int))) for _ in range(200)
    ]
    found = []
    for window in (0, 60):
        cache = UnifiedCache(30_000, (8, 32, 8), ahead=True)
        ahead = LookAhead(cache)
        for number, keys in enumerate(batches):
            for batch in batches[ahead.announced : number + window]:
                ahead.expect(batch)
            missed = ahead.lookup(keys) < 0
            ahead.insert(keys[missed], np.zeros((int(missed.sum()), 32), np.uint8))
        found.append(cache.hits.sum())
    assert found[1] > 1.15 * found[0]


def test_with_nothing_announced_it_is_clock():
    batches = skewed(1)
    plain = RowCache(cache_of(500).bytes + 40, 8, ahead=True)
    for keys in batches:
        missed = plain.lookup(keys) < 0
        plain.insert(keys[missed], np.zeros((int(missed.sum()), 8), np.uint8))
    same = RowCache(cache_of(500).bytes + 40, 8, ahead=True)
    assert replay(same, batches, 0) == plain.hits


def test_memory_is_that_of_the_window():
    ahead = LookAhead(cache_of(100))
    for number in range(300):
        ahead.expect(np.arange(number * 50, number * 50 + 100, dtype=np.uint64))
        if number >= 4:
            ahead.lookup(np.arange((number - 4) * 50, (number - 4) * 50 + 100, dtype=np.uint64))
    assert len(ahead._known) < 2 * 400 and len(ahead._keys) < 4096 and len(ahead._starts) < 10


def test_a_cache_without_next_uses_is_refused():
    with pytest.raises(ValueError, match="ahead=True"):
        LookAhead(RowCache(1000, 8))
