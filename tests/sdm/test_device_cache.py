"""The cache on a device does, row for row, what the one on the host does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.sdm import device_cache
from jaxeff.sdm.row_cache import RowCache, row_keys
from jaxeff.sdm.sets import ROW_BITS, Sets

ROW = jax.ShapeDtypeStruct((2,), jnp.float32)


def split_keys(keys, size):
    """Tables and rows, int32 [size], padded by rows of -1."""
    tables, rows = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    tables[: len(keys)], rows[: len(keys)] = keys >> np.uint64(ROW_BITS), keys & np.uint64((1 << ROW_BITS) - 1)
    return tables, rows


@pytest.mark.parametrize(
    "capacity, bounds", [(3000, (3, 300)), (9000, (40, 2000)), (20000, (500, 2**25)), (500, (1, 1))]
)
def test_hits_and_evicts_as_on_the_host(capacity, bounds):
    rng, n = np.random.default_rng(0), 48
    host = RowCache(capacity, 8, bounds=bounds, compiled=False)
    cache = device_cache.init(host.sets, ROW)
    tables_used = np.linspace(0, bounds[0] - 1, 3).astype(np.int64)
    for _ in range(30):
        ids = np.minimum((300 * rng.random(n) ** 3).astype(np.int64) * max(1, bounds[1] // 300), bounds[1] - 1)
        keys = rng.permutation(np.unique(row_keys(rng.choice(tables_used, n), ids)))
        tables, rows = split_keys(keys, n)
        cache, slots = device_cache.probe(cache, host.sets, tables, rows)
        expected = host.lookup(keys)
        np.testing.assert_array_equal(slots[: len(keys)], expected)
        assert (slots[len(keys) :] == -1).all()
        chosen = (expected < 0) | (rng.random(len(keys)) < 0.2)
        values = rng.normal(size=(n, 2)).astype(np.float32)
        before = host.evictions
        kept = host.insert(keys[chosen], values[: len(keys)][chosen].view(np.uint8))
        rows[: len(keys)][~chosen] = -1
        cache, slots, evicted = device_cache.fill(cache, host.sets, tables, rows, values)
        np.testing.assert_array_equal(np.asarray(slots)[: len(keys)][chosen], kept)
        assert evicted == host.evictions - before
        np.testing.assert_array_equal(cache.rows, host.rows.view(np.float32))
        assert not cache.held.any()


def test_sets_and_tags_are_those_of_the_host():
    rng = np.random.default_rng(0)
    for sets in (Sets(1000, 31, 26, 25), Sets(7, 15, 1, 0), Sets(2**20 + 7, 31, 2**15, 31), Sets(500, 31, 8, 29)):
        keys = row_keys(rng.integers(0, sets.tables, 500), rng.integers(0, 2**sets.row_bits, 500))
        tables, rows = split_keys(keys, 500)
        for ours, theirs in zip(device_cache._locate(sets, tables, rows), sets.locate(keys), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_row_may_be_asked_for_twice():
    sets = device_cache.shape(2000, 8, (2, 50))
    cache = device_cache.init(sets, ROW)
    tables, rows = np.array([1, 0, 1, 1], np.int32), np.array([5, 5, 6, 7], np.int32)
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    cache, filled, _ = device_cache.fill(cache, sets, tables, rows, values)
    again = np.array([2, 0, 0, 1, 2, 3])
    cache, slots = device_cache.probe(cache, sets, tables[again], rows[again])
    np.testing.assert_array_equal(slots, np.asarray(filled)[again])
    np.testing.assert_array_equal(cache.rows[slots], values[again])


def test_memory_of_the_state_is_used_again():
    sets = device_cache.shape(20_000, 8, (2, 5000))
    cache = device_cache.init(sets, ROW)
    tables, rows, values = np.zeros(8, np.int32), np.arange(8, dtype=np.int32), np.ones((8, 2), np.float32)
    address = cache.rows.unsafe_buffer_pointer()
    old = cache
    cache, _, _ = device_cache.fill(cache, sets, tables, rows, values)
    cache, _ = device_cache.probe(cache, sets, tables, rows)
    assert old.rows.is_deleted()
    assert cache.rows.unsafe_buffer_pointer() == address


def test_the_budget_holds_it():
    sets = device_cache.shape(100_000, 8, (4, 100_000))
    cache = device_cache.init(sets, ROW)
    assert 90_000 < sum(leaf.nbytes for leaf in cache) <= 100_000


def test_what_does_not_fit_in_32_bits_is_refused():
    with pytest.raises(ValueError, match="row ids below"):
        device_cache.shape(10**6, 8, (1, 2**33))
    with pytest.raises(ValueError, match="needs bounds"):
        device_cache.init(RowCache(10**5, 8).sets, ROW)
    sets = device_cache.shape(2000, 8, (2, 50))
    with pytest.raises(TypeError, match="values must be float32"):
        device_cache.fill(
            device_cache.init(sets, ROW), sets, np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((1, 2), np.int8)
        )
