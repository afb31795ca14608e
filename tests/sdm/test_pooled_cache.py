"""The cache of pooled vectors: what a key depends on, and what is found."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm import pooled_cache
from jaxeff.sdm.pooled_cache import PooledCache


def bags(*lists, weights=None):
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64)
    indices = np.array([index for one in lists for index in one], np.int64)
    return SimpleNamespace(indices=indices, offsets=offsets, weights=weights)


def new(**settings):
    return PooledCache(**{"capacity_bytes": 20_000, "dim": 3, "threshold": 2} | settings)


@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 3), max_size=4)), max_size=20), st.randoms())
@settings(deadline=None)
def test_keys_are_equal_where_multisets_are(asked, random):
    cache = new(threshold=1)
    lists = [random.sample(ids, len(ids)) for _, ids in asked]
    keys = cache.key(np.array([table for table, _ in asked], np.int64), bags(*lists))
    assert keys.shape == (len(asked), 2)
    names = [(table, tuple(sorted(ids))) for table, ids in asked]
    for a, name in enumerate(names):
        for b in range(a):
            same = name == names[b] or (not name[1] and not names[b][1])
            assert (keys[a] == keys[b]).all() == same
            assert (keys[a, 0] == keys[b, 0]) == same


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.5, 1.0])), min_size=1, max_size=4), st.randoms())
@settings(deadline=None)
def test_weights_belong_to_their_rows(pairs, random):
    cache = new(threshold=1)
    shuffled = random.sample(pairs, len(pairs))
    swapped = [(index, 1.5 - weight) for index, weight in pairs]
    lists = [[index for index, _ in one] for one in (pairs, shuffled, swapped)]
    weights = np.array([weight for one in (pairs, shuffled, swapped) for _, weight in one], np.float32)
    keys = cache.key(np.zeros(3, int), bags(*lists, weights=weights))
    assert (keys[0] == keys[1]).all()
    assert (keys[0] == keys[2]).all() == (Counter(pairs) == Counter(swapped))


def test_weights_of_one_are_none():
    cache, one = new(), bags([4, 5, 6])
    ones = bags([4, 5, 6], weights=np.ones(3, np.float32))
    np.testing.assert_array_equal(cache.key(np.array([1]), one), cache.key(np.array([1]), ones))


def test_many_keys_and_their_halves_differ():
    rng = np.random.default_rng(0)
    lists = rng.integers(0, 100, (20_000, 3))
    keys = new().key(np.zeros(len(lists), int), bags(*lists.tolist()))
    distinct = len(np.unique(np.sort(lists, 1), axis=0))
    assert len(np.unique(keys[:, 0])) == len(np.unique(keys[:, 1])) == distinct
    # Every bit is set half the time, but for those of the length.
    bits = np.unpackbits(keys.view(np.uint8), axis=1, bitorder="little").mean(0)
    hashed = np.r_[0:64, 64 + pooled_cache.LENGTH_BITS : 128]
    assert (np.abs(bits[hashed] - 0.5) < 0.03).all()


def test_short_and_empty_bags_are_not_kept():
    cache = new(threshold=3)
    some = bags([1, 2], [], [1, 2, 3], [])
    keys = cache.key(np.zeros(4, int), some)
    assert keys.any(1).tolist() == [False, False, True, False]
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert (cache.insert(keys, vectors) >= 0).tolist() == [False, False, True, False]
    slots = cache.lookup(keys)
    assert (slots >= 0).tolist() == [False, False, True, False]
    np.testing.assert_array_equal(cache.vectors[slots[2]], vectors[2])
    assert (cache.hits, cache.misses, cache.avoided) == (1, 0, 3)


def test_finds_what_was_kept_and_counts_what_that_avoids():
    rng = np.random.default_rng(0)
    cache, known, avoided, hits, asked = new(capacity_bytes=6000, threshold=3), {}, 0, 0, 0
    for _ in range(60):
        lists = [rng.integers(0, 6, rng.integers(0, 6)).tolist() for _ in range(20)]
        tables = rng.integers(0, 2, 20)
        some = bags(*lists)
        keys = cache.key(tables, some)
        slots = cache.lookup(keys)
        for table, ids, slot in zip(tables, lists, slots, strict=True):
            asked += len(ids) >= 3
            if slot >= 0:
                np.testing.assert_array_equal(cache.vectors[slot], known[table, tuple(sorted(ids))])
                hits, avoided = hits + 1, avoided + len(ids)
        vectors = np.array([[table, sum(ids), rng.random()] for table, ids in zip(tables, lists, strict=True)])
        missed, vectors = slots < 0, vectors.astype(np.float32)
        cache.insert(keys[missed], vectors[missed])
        for i in np.flatnonzero(missed)[::-1]:  # of those that repeat, the first is kept
            known[tables[i], tuple(sorted(lists[i]))] = vectors[i]
    assert (cache.hits, cache.misses, cache.avoided) == (hits, asked - hits, avoided)
    assert hits > 100
    assert cache.bytes <= 6000


def test_verification_refuses_another_bag_of_the_same_key(monkeypatch):
    cache = new(verify=True, longest=4)
    first, second = bags([3, 1, 2]), bags([4, 5, 6])
    keys = cache.key(np.zeros(1, int), first)
    cache.insert(keys, np.ones((1, 3), np.float32), first)
    assert cache.lookup(keys, bags([2, 3, 1]))[0] >= 0
    assert cache.lookup(keys, second)[0] == -1
    weighted = bags([3, 1, 2], weights=np.array([1, 1, 2], np.float32))
    assert cache.lookup(keys, weighted)[0] == -1
    assert (cache.hits, cache.misses, cache.refused) == (1, 2, 2)
    # Without it, half a key is not enough.
    plain = new()
    plain.insert(keys, np.ones((1, 3), np.float32))
    assert plain.lookup(keys ^ np.array([[0, 1 << 40]], np.uint64))[0] == -1
    assert plain.lookup(keys)[0] >= 0


def test_verification_leaves_out_bags_longer_than_it_keeps():
    cache = new(verify=True, longest=3)
    keys = cache.key(np.zeros(2, int), bags([1, 2, 3, 4], [1, 2, 3]))
    assert keys.any(1).tolist() == [False, True]


def test_cleared_it_knows_nothing():
    cache, some = new(), bags([1, 2])
    keys = cache.key(np.zeros(1, int), some)
    cache.insert(keys, np.ones((1, 3), np.float32))
    cache.clear()
    assert cache.lookup(keys)[0] == -1
    assert (cache.hits, cache.misses) == (0, 1)


def test_mistakes_are_named():
    cache = new()
    with pytest.raises(ValueError, match=r"offsets must be \[3\]"):
        cache.key(np.zeros(2, int), bags([1, 2]))
    with pytest.raises(ValueError, match=r"keys must be uint64 \[b, 2\]"):
        cache.lookup(np.zeros(3, np.uint64))
    with pytest.raises(ValueError, match=r"vectors must be float32 \[1, 3\]"):
        cache.insert(np.ones((1, 2), np.uint64), np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="bags must be those"):
        new(verify=True).lookup(np.ones((1, 2), np.uint64))
    with pytest.raises(ValueError, match="threshold must be at least 1"):
        new(threshold=0)
    with pytest.raises(ValueError, match="longest must be at least threshold"):
        new(verify=True, longest=1)
