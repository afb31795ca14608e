"""One budget for rows of several sizes: shares, policies, counts, and the split by what room is worth."""

import itertools

import numpy as np
import pytest

from jaxeff.sdm import reuse
from jaxeff.sdm.row_cache import row_keys
from jaxeff.sdm.unified_cache import UnifiedCache, split

SIZES = (16, 300, 16, 40)


def rows_of(keys, width=300):
    """What a row holds tells its key."""
    return (keys.astype(np.int64)[:, None] % 251 + np.arange(width)).astype(np.uint8)


def trace(seed, table, distinct, accesses, skew):
    rng = np.random.default_rng(seed)
    return row_keys(table, (distinct * rng.random(accesses) ** skew).astype(np.int64))


def test_rows_of_all_sizes_come_back_whole():
    rng = np.random.default_rng(0)
    cache = UnifiedCache(40_000, SIZES, bypass=[2], rows=[500] * 4)
    assert {size: one.organisation for size, one in cache.caches.items()} == {
        16: "compact",
        40: "compact",
        300: "fast",
    }
    hits, misses = np.zeros(4, int), np.zeros(4, int)
    for _ in range(40):
        tables = rng.integers(0, 4, 60)
        keys = rng.permutation(np.unique(row_keys(tables, (500 * rng.random(60) ** 3).astype(int))))
        slots = cache.lookup(keys)
        out = cache.take(keys, slots, np.zeros((len(keys), cache.width), np.uint8))
        mine = (keys >> np.uint64(40)).astype(int)
        for table in range(4):
            found = (mine == table) & (slots >= 0)
            np.testing.assert_array_equal(out[found, : SIZES[table]], rows_of(keys[found])[:, : SIZES[table]])
            hits[table] += found.sum()
            misses[table] += (mine == table).sum() - found.sum()
        cache.insert(keys[slots < 0], rows_of(keys[slots < 0]))
    np.testing.assert_array_equal(cache.hits, hits)
    np.testing.assert_array_equal(cache.misses, misses)
    assert hits[2] == 0 and (hits[[0, 1, 3]] > 0).all()
    assert cache.bytes <= 40_000


def test_resized_it_keeps_the_rows_in_use():
    cache = UnifiedCache(20_000, (8, 100), shares={8: 0.2, 100: 0.8})
    keys = np.concatenate([row_keys(0, np.arange(60)), row_keys(1, np.arange(60))])
    cache.warm(keys, rows_of(keys))
    used = keys[30:90]
    cache.lookup(used)
    counts = cache.hits.copy()
    cache.resize({8: 0.8, 100: 0.2})
    slots = cache.lookup(keys)
    assert (slots[:60] >= 0).all()
    # Of the large rows there is room for half.
    assert (slots[60:90] >= 0).mean() > 0.8 > 0.3 > (slots[90:] >= 0).mean()
    found = slots >= 0
    out = cache.take(keys, slots, np.zeros((len(keys), 100), np.uint8))
    np.testing.assert_array_equal(out[found, :8], rows_of(keys[found])[:, :8])
    assert (cache.hits >= counts).all()
    assert cache.bytes <= 20_000


def test_room_goes_where_it_saves_most():
    small, large = trace(0, 0, 400, 6000, 2), trace(1, 1, 200, 3000, 3)
    keys = np.random.default_rng(2).permutation(np.concatenate([small, large]))
    sizes, budget = np.array([10, 40]), 8000
    shares = split(keys, sizes, budget)
    assert sum(shares.values()) == pytest.approx(1)
    of_table = [keys[keys >> np.uint64(40) == np.uint64(table)] for table in (0, 1)]

    def hits(first):
        return reuse.lru_hits(of_table[0], int(first * budget) // (10 + 9)) + reuse.lru_hits(
            of_table[1], int((1 - first) * budget) // (40 + 9)
        )

    assert hits(shares[10]) >= 0.995 * max(hits(first) for first in np.linspace(0, 1, 101))


def test_costly_misses_draw_room():
    keys = np.random.default_rng(2).permutation(np.concatenate([trace(0, 0, 400, 6000, 2), trace(1, 1, 200, 3000, 3)]))
    shares = [split(keys, np.array([10, 40]), 8000, miss_cost={10: 1, 40: cost})[40] for cost in (0.1, 1, 10)]
    assert all(a < b for a, b in itertools.pairwise(shares))


def test_a_size_that_a_trace_never_hits_gets_the_least():
    keys = np.concatenate([row_keys(0, np.arange(500)), np.tile(row_keys(1, np.arange(50)), 20)])
    shares = split(keys, np.array([16, 64]), 4000)
    assert shares[16] < 0.02 and shares[64] > 0.98


def test_rebalancing_raises_the_hit_rate():
    hot, cold = trace(1, 1, 300, 3000, 1.5).reshape(-1, 50), trace(0, 0, 10**6, 3000, 1).reshape(-1, 50)
    cache = UnifiedCache(30_000, (16, 64), shares={16: 0.5, 64: 0.5})

    def replay():
        cache.hits[:] = 0
        for keys in itertools.chain.from_iterable(zip(hot, cold, strict=True)):
            keys = np.unique(keys)
            missed = cache.lookup(keys) < 0
            cache.insert(keys[missed], rows_of(keys[missed], 64))
        return cache.hits.sum()

    before = replay()
    shares = cache.rebalance(np.concatenate([hot, cold], 1).reshape(-1))
    assert shares[64] > 0.6
    assert replay() > 1.15 * before


def test_mistakes_are_named():
    for settings, text in (
        ({"bypass": [4]}, "bypass must name tables 0 .. 3"), ({"rows": [1, 2]}, "rows must have one number"),
        ({"shares": {16: 1.0}}, "shares must be given for row sizes"),
        ({"shares": {16: 1.0, 40: 0.0, 300: 1.0}}, "above 0"), ({"capacity_bytes": 500}, "capacity_bytes must hold"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            UnifiedCache(**{"capacity_bytes": 20_000, "row_bytes": SIZES} | settings)
    with pytest.raises(ValueError, match="tables 0 .. 3, got table 9"):
        UnifiedCache(20_000, SIZES).lookup(row_keys(9, [1]))
