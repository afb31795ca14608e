"""Tiers, resident rows, their notes on the device, and pinned memory of the host, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.ops.bags import Bags
from jaxeff.ops.embedding_bag import pooled_lookup
from jaxeff.sdm import device_cache, device_rows, host_memory, queries
from jaxeff.sdm.encoding import KINDS, RowFormat, decode, encode
from jaxeff.sdm.pipeline import stream
from jaxeff.sdm.resident import Resident
from jaxeff.sdm.row_cache import RowCache, row_keys
from jaxeff.sdm.table import TableSpec, open_store
from jaxeff.sdm.tiers import Tiers
from jaxeff.sdm.writer import Writer

pytestmark = pytest.mark.gpu

DIM, ROWS = 64, (400, 900, 250)
PLACEMENT = {"table0": "memory", "table1": "cached", "table2": "direct"}


def make(folder, kind):
    """A store, and what its tables decode to."""
    rng = np.random.default_rng(0)
    form, tables = RowFormat(kind, DIM), []
    with Writer(folder) as writer:
        for index, rows in enumerate(ROWS):
            values = rng.normal(size=(rows, DIM)).astype(np.float32)
            writer.add(TableSpec(f"table{index}", rows, form), [values])
            tables.append(decode(encode(values, form), form))
        writer.publish()
    return open_store(folder), tables


def random_query(seed, bags=40):
    rng = np.random.default_rng(seed)
    asked = []
    for count in ROWS:
        lengths = rng.integers(0, 12, bags)
        ids = np.minimum(rng.zipf(1.3, lengths.sum()) - 1, count - 1)
        asked.append(Bags(ids, np.concatenate([[0], np.cumsum(lengths)]), rng.normal(size=len(ids)).astype(np.float32)))
    return queries.query(asked)


def expected(asked, tables):
    of = np.repeat(asked.tables, asked.lengths)
    rows = np.stack([tables[t][i] for t, i in zip(of, asked.indices, strict=True)]).astype(np.float64)
    pooled = np.zeros((len(asked.tables), DIM))
    np.add.at(pooled, queries.bag_of_lookup(asked), rows * asked.weights[:, None])
    return pooled


@pytest.mark.parametrize("kind", KINDS)
def test_tiers_and_resident_rows_have_the_bits_of_tables_in_memory(tmp_path, kind):
    asked = [random_query(seed) for seed in range(12)]
    store, tables = make(tmp_path / "s", kind)
    row_bytes = RowFormat(kind, DIM).row_bytes
    with store, Tiers(store, "memory") as memory, Tiers(store, PLACEMENT, cache_bytes=300 * row_bytes) as tiers:
        reference = [np.asarray(memory.lookup(one)) for one in asked]
        for one, pooled in zip(asked, reference, strict=True):
            np.testing.assert_allclose(pooled, expected(one, tables), rtol=1e-4, atol=1e-4)
        below = [np.asarray(tiers.pool(staged)) for staged in stream(tiers, asked, depth=3)]
        np.testing.assert_array_equal(below, reference)
        resident = Resident(tiers, 100 * row_bytes, spill=4)
        hot = [resident.pool(staged) for staged in resident.stream(asked, depth=3)]
        np.testing.assert_array_equal(hot, reference)
        assert 0 < resident.traffic.device_hits < resident.traffic.unique


def test_rows_are_written_where_they_are():
    rows = jnp.zeros((100_000, 64))
    values, where = jnp.ones((256, 64)), jnp.arange(256, dtype=jnp.int32) * 7
    memory = device_rows.write_rows.lower(rows, values, where).compile().memory_analysis()
    assert memory.alias_size_in_bytes == rows.nbytes and memory.temp_size_in_bytes < rows.nbytes // 10
    address = rows.unsafe_buffer_pointer()
    written = device_rows.write_rows(rows, values, where)
    assert rows.is_deleted() and written.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(written).any(1)), np.asarray(where))


def test_pooled_rows_are_those_of_a_sum():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5000, 64)).astype(np.float32)
    ids, lengths = rng.integers(0, 5000, (300, 32)), rng.integers(0, 33, 300)
    inside = np.arange(32) < lengths[:, None]
    pooled = jax.jit(pooled_lookup)(table, ids.astype(np.int32), lengths.astype(np.int32))
    np.testing.assert_allclose(pooled, (table.astype(np.float64)[ids] * inside[..., None]).sum(1), atol=1e-4)


def test_notes_on_the_device_are_those_on_the_host():
    rng, n = np.random.default_rng(0), 64
    host = RowCache(9000, 8, bounds=(3, 2000), compiled=False)
    cache = device_cache.init(host.sets, jax.ShapeDtypeStruct((2,), np.float32))
    for _ in range(20):
        keys = np.unique(row_keys(rng.integers(0, 3, n), (2000 * rng.random(n) ** 3).astype(np.int64)))
        of, at = np.zeros(n, np.int32), np.full(n, -1, np.int32)
        of[: len(keys)], at[: len(keys)] = keys >> np.uint64(40), keys & np.uint64(2**40 - 1)
        values = rng.normal(size=(n, 2)).astype(np.float32)
        cache, slots = device_cache.probe(cache, host.sets, of, at)
        np.testing.assert_array_equal(np.asarray(slots)[: len(keys)], host.lookup(keys))
        cache, slots, _ = device_cache.fill(cache, host.sets, of, at, values)
        np.testing.assert_array_equal(
            np.asarray(slots)[: len(keys)], host.insert(keys, values[: len(keys)].view(np.uint8))
        )
        np.testing.assert_array_equal(cache.rows, host.rows.view(np.float32))


@pytest.mark.parametrize("form", host_memory.FORMS)
def test_pinned_rows_are_taken_where_that_works(form):
    if form not in host_memory.forms():
        pytest.skip(
            f"rows cannot be gathered by the {form} here; {host_memory.unavailable() or 'the compiler refuses'}"
        )
    values = np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 5000, 700).astype(np.int32)
    table = host_memory.pinned(values)
    assert table.sharding.memory_kind == host_memory.PINNED
    rows = jax.jit(lambda table, ids: host_memory.take_rows(table, ids, form) * 2)(table, ids)
    np.testing.assert_array_equal(rows, 2 * values[ids])
    assert rows.sharding.memory_kind == "device"


def test_some_form_of_taking_rows_of_the_host_works():
    values, ids = np.arange(60, dtype=np.float32).reshape(15, 4), np.array([3, 14, 3])
    table = host_memory.pinned(values) if host_memory.forms() else values
    np.testing.assert_array_equal(host_memory.take_rows(table, ids), values[ids])
