"""Look-ups with hot rows on a device have the bits of look-ups without them, whatever stays, goes, fails or comes."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.ops.bags import Bags
from jaxeff.sdm import device_cache, device_rows, pooling, queries
from jaxeff.sdm.encoding import KINDS, RowFormat
from jaxeff.sdm.io.errors import ReadError
from jaxeff.sdm.resident import Resident
from jaxeff.sdm.row_cache import row_keys
from jaxeff.sdm.sets import ROW_BITS
from jaxeff.sdm.table import open_store
from jaxeff.sdm.tiers import Tiers
from tests.sdm.tables import DIM, FORMS, expected, random_query, stored, values, write

MIXED = {"table0": "memory", "table1": "cached", "table2": "direct"}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folders = {}

    def get(*kinds):
        if kinds not in folders:
            folders[kinds] = write(tmp_path_factory.mktemp("store") / "s", kinds)
        return open_store(folders[kinds])

    return get


def distinct_rows(asked, *tables):
    of = np.repeat(asked.tables, asked.lengths)
    return len({(t, i) for t, i in zip(of, asked.indices, strict=True) if t in tables})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_form_and_tier_gives_the_bits_of_a_loop(stores, kind, form):
    kinds = (kind,) * 3
    row_bytes = RowFormat(kind, DIM).row_bytes
    with stores(*kinds) as store:
        for placement in ("cached", MIXED):
            with Tiers(store, placement, cache_bytes=2000, form=form) as tiers:
                resident = Resident(tiers, 30 * row_bytes, spill=2)
                for seed in range(4):
                    asked = random_query(seed, weighted=seed == 2)
                    np.testing.assert_array_equal(resident.lookup(asked), expected(asked, stored(kinds)))
                    np.testing.assert_array_equal(resident.tiers.lookup(asked), expected(asked, stored(kinds)))
                assert 0 < resident.traffic.device_hits < resident.traffic.unique


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_formats_that_differ_share_the_device(stores, mode, update):
    kinds = ("float32", "int8", "int4")
    with stores(*kinds) as store, Tiers(store, cache_bytes=3000, mode=mode) as tiers:
        resident = Resident(tiers, 3000, update=update)
        assert resident.capacity * 8 < 3000 < resident.bytes
        for seed in range(4):
            asked = random_query(seed)
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, stored(kinds), mode))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 6), st.sampled_from([16, 40, 200]), st.booleans())
def test_a_device_of_any_size_changes_nothing(stores, seed, longest, bags, slots, update):
    kinds = ("int8",) * 3
    with stores(*kinds) as store, Tiers(store, cache_bytes=2000, form="padded") as tiers:
        resident = Resident(tiers, slots * RowFormat("int8", DIM).row_bytes, update=update, spill=1)
        for turn in range(3):
            asked = random_query(seed + turn, bags, longest + 1)
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, stored(kinds)))
        counted = resident.traffic
        assert counted.device_hits + counted.host_hits + counted.reads == counted.unique
        assert len(resident) <= resident.capacity <= slots


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("depth", "lookahead"), [(1, 0), (3, 0), (3, 5)])
def test_queries_fetched_ahead_take_no_rows_from_those_before(stores, form, depth, lookahead):
    """With room for less than one query, nearly every query overwrites what the one before it reads."""
    kinds = ("float32",) * 3
    asked = [random_query(seed) for seed in range(25)]
    with stores(*kinds) as store, Tiers(store, cache_bytes=2000, lookahead=lookahead > 0, form=form) as tiers:
        resident = Resident(tiers, 18 * 24, spill=4)
        results = [resident.pool(staged) for staged in resident.stream(asked, depth=depth, lookahead=lookahead)]
        assert resident.formats[0]._directory.evictions > (0 if lookahead else 100)
    assert len(results) == len(asked)
    for one, pooled in zip(asked, results, strict=True):
        np.testing.assert_array_equal(pooled, expected(one, stored(kinds)))


def test_rows_that_were_pruned_are_zeros(tmp_path):
    full = values()
    rng = np.random.default_rng(1)
    kept, remaps = [], []
    for table in full:
        keep = rng.random(len(table)) < 0.6
        table[~keep] = 0
        remaps.append(np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32))
        kept.append(table[keep])
    with open_store(write(tmp_path / "s", ("float32",) * 3, kept, remaps)) as store, Tiers(store, MIXED) as tiers:
        resident = Resident(tiers, 2000)
        rng = np.random.default_rng(0)
        assert resident.warm(np.ones(200, int), rng.integers(0, 90, 200)) <= len(kept[1])
        for seed in (5, 6):
            asked = random_query(seed)
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, full))


def test_a_row_crosses_the_bus_once_while_it_stays(stores):
    with stores(*("float32",) * 3) as store, Tiers(store, cache_bytes=100_000) as tiers:
        resident = Resident(tiers, 40_000)
        asked = random_query(0)
        first = resident.fetch(resident.plan(asked)).traffic
        again = resident.fetch(resident.plan(asked))
        unique = distinct_rows(asked, 0, 1, 2)
        assert (first.unique, first.device_hits, first.reads) == (unique, 0, unique)
        assert (again.traffic.device_hits, again.traffic.host_hits, again.traffic.reads) == (unique, 0, 0)
        assert not again.new and len(resident) == unique
        # Rows of 24 bytes and their places, in 64 or more.
        assert first.moved - again.traffic.moved == -(-unique // 64) * 64 * (24 + 4)
        assert resident.traffic.queries == 2 and resident.traffic.hit_rate == 0.5
        assert resident.traffic.moved_per_query == (first.moved + again.traffic.moved) / 2
        assert tiers.counters.unique == unique and tiers.counters.queries == 2


def test_what_the_host_keeps_is_not_read_again(stores):
    with stores(*("float32",) * 3) as store, Tiers(store, cache_bytes=100_000) as tiers:
        asked = random_query(0)
        tiers.lookup(asked)
        staged = Resident(tiers, 40_000)
        traffic = staged.fetch(staged.plan(asked)).traffic
        assert traffic.reads == 0 and traffic.host_hits == traffic.unique


def test_direct_tables_never_stay(stores):
    placement = {"table0": "cached", "table1": "direct", "table2": "direct"}
    with stores(*("float32",) * 3) as store, Tiers(store, placement) as tiers:
        resident = Resident(tiers, 40_000, spill=1)
        asked = random_query(0)
        for _ in range(2):
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, values()))
        assert resident.traffic.device_hits == len(resident) == distinct_rows(asked, 0)


def test_rows_for_ever_are_those_that_were_warmed(stores):
    with stores(*("int8",) * 3) as store, Tiers(store) as tiers:
        resident = Resident(tiers, 40_000, update=False)
        hot = random_query(3)
        kept = resident.warm(np.repeat(hot.tables, hot.lengths), hot.indices, batch=7)
        assert kept == len(resident) == distinct_rows(hot, 0, 1, 2)
        assert resident.traffic.unique == 0
        for seed in range(3):
            asked = random_query(seed)
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, stored(("int8",) * 3)))
        assert len(resident) == kept
        before = dataclasses.replace(resident.traffic)
        resident.lookup(hot)
        assert resident.traffic.device_hits - before.device_hits == kept


def test_warming_keeps_the_first_rows_that_have_room(stores):
    with stores(*("float32",) * 3) as store, Tiers(store, MIXED) as tiers:
        resident = Resident(tiers, 40 * 24)
        for table, odd, message in ((1, 95, "ids of table 1 must be 0 .. 89, got 95"), (1, -1, "got -1")):
            with pytest.raises(ValueError, match=message):
                resident.warm([table], [odd])
        with pytest.raises(ValueError, match="batch=0 must be at least 1"):
            resident.warm([1], [0], batch=0)
        kept = resident.warm(np.ones(90, int), np.arange(90)[::-1], batch=7)
        assert resident.formats[0].has(row_keys(np.ones(7, int), np.arange(83, 90))).all()
        assert 20 < kept == len(resident) <= resident.capacity <= 40
        asked = queries.query([Bags(np.arange(90), np.array([0, 90]))], tables=[1])
        np.testing.assert_array_equal(resident.lookup(asked), expected(asked, values()))
        assert resident.traffic.device_hits == kept


def test_the_memory_of_rows_is_used_again(stores):
    with stores(*("float32",) * 3) as store, Tiers(store, cache_bytes=2000) as tiers:
        resident = Resident(tiers, 2000)
        resident.lookup(random_query(0))
        old = resident.formats[0].rows
        address = old.unsafe_buffer_pointer()
        resident.lookup(random_query(1))
        assert old.is_deleted() and resident.formats[0].rows.unsafe_buffer_pointer() == address


def test_writing_rows_needs_no_copy_of_the_others():
    kinds = jax.ShapeDtypeStruct((10_000, 8), np.float32), jax.ShapeDtypeStruct((64, 8), np.float32)
    compiled = device_rows.write_rows.lower(*kinds, jax.ShapeDtypeStruct((64,), np.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 10_000 * 8 * 4 and memory.temp_size_in_bytes < 10_000


def test_one_may_leave_out_queries_but_not_go_back(stores):
    with stores(*("float32",) * 3) as store, Tiers(store, cache_bytes=2000) as tiers:
        resident = Resident(tiers, 30 * 24)
        asked = [random_query(seed) for seed in range(4)]
        staged = [resident.fetch(resident.plan(one)) for one in asked]
        for _ in range(2):  # the last one that was written can be had again
            np.testing.assert_array_equal(resident.pool(staged[2]), expected(asked[2], values()))
        with pytest.raises(ValueError, match=r"query 1 comes after query 2.*in the order in which they were fetched"):
            resident.pool(staged[1])
        np.testing.assert_array_equal(resident.pool(staged[3]), expected(asked[3], values()))
        resident.warm(np.ones(5, int), np.arange(5))
        with pytest.raises(ValueError, match="before more rows are warmed"):
            resident.pool(staged[3])
        np.testing.assert_array_equal(resident.lookup(asked[0]), expected(asked[0], values()))


def test_a_stream_that_is_left_does_no_harm(stores):
    asked = [random_query(seed) for seed in range(8)]
    with stores(*("float32",) * 3) as store, Tiers(store, cache_bytes=2000) as tiers:
        resident = Resident(tiers, 18 * 24)
        running = resident.stream(asked, depth=3)
        resident.pool(next(running))
        running.close()
        for one in asked:
            np.testing.assert_array_equal(resident.lookup(one), expected(one, values()))


def test_a_read_that_fails_leaves_what_is_resident(stores, monkeypatch):
    with stores(*("float32",) * 3) as store, Tiers(store) as tiers:
        resident = Resident(tiers, 30 * 24)
        resident.lookup(random_query(0))
        there = len(resident)
        with pytest.raises(TimeoutError):
            resident.lookup(random_query(1), deadline=0.0)

        def refuse(*_, **__):
            raise ReadError(5, "table0", 0)

        with monkeypatch.context() as broken:
            broken.setattr(tiers.reader, "gather", refuse)
            with pytest.raises(ReadError):
                resident.lookup(random_query(2))
        assert len(resident) == there
        for seed in range(5):
            asked = random_query(seed)
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, values()))


def test_rows_that_could_not_be_sent_are_forgotten(stores, monkeypatch):
    with stores(*("float32",) * 3) as store, Tiers(store) as tiers:
        resident = Resident(tiers, 4000)

        def full(*_, **__):
            raise MemoryError("the device is full")

        with monkeypatch.context() as broken:
            broken.setattr("jaxeff.sdm.resident.jax.device_put", full)
            with pytest.raises(MemoryError):
                resident.lookup(random_query(0))
        assert len(resident) == 0
        for seed in range(2):
            asked = random_query(seed)
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, values()))


def test_whole_bags_that_come_again_need_no_rows(stores):
    with stores(*("int8",) * 3) as store, Tiers(store, pooled_bytes=50_000, pooled_threshold=2) as tiers:
        resident = Resident(tiers, 4000)
        asked = queries.sorted_bags(random_query(0))
        for _ in range(2):
            np.testing.assert_array_equal(resident.lookup(asked), expected(asked, stored(("int8",) * 3)))
        assert tiers.counters.pooled_hits == (asked.lengths >= 2).sum()


def test_it_finds_and_evicts_as_the_cache_whose_notes_are_on_the_device(stores):
    with stores(*("float32",) * 3) as store, Tiers(store, cache_bytes=2000) as tiers:
        resident = Resident(tiers, 40 * 24)
        sets = resident.formats[0]._directory.sets
        cache = device_cache.init(sets, jax.ShapeDtypeStruct((DIM,), np.float32))
        for seed in range(12):
            staged = resident.fetch(resident.plan(random_query(seed)))
            resident.pool(staged)
            keys = staged.plan.keys
            size = 1 << len(keys).bit_length()
            of, at = np.zeros(size, np.int32), np.full(size, -1, np.int32)
            of[: len(keys)], at[: len(keys)] = keys >> np.uint64(ROW_BITS), keys & np.uint64(2**ROW_BITS - 1)
            cache, slots = device_cache.probe(cache, sets, of, at)
            assert (np.asarray(slots) >= 0).sum() == staged.traffic.device_hits
            rows = np.zeros((size, DIM), np.float32)
            rows[: len(keys)] = [values()[t][i] for t, i in zip(of[: len(keys)], at[: len(keys)], strict=True)]
            cache, _, _ = device_cache.fill(cache, sets, of, at, rows)
            np.testing.assert_array_equal(cache.rows, resident.formats[0].rows[: resident.capacity])


def test_programs_are_few(stores):
    with stores(*("float32",) * 3) as store, Tiers(store, cache_bytes=3000) as tiers:
        resident = Resident(tiers, 40 * 24, spill=256)
        before = device_rows.write_rows._cache_size()
        for seed in range(25):
            resident.lookup(random_query(seed, longest=9))
        assert device_rows.write_rows._cache_size() - before <= 3


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_both_programs_lower_for_a_gpu(stores, kind):
    with stores(*(kind,) * 3) as store, Tiers(store, MIXED, form="padded") as tiers:
        resident = Resident(tiers, 4000)
        staged = resident.fetch(resident.plan(random_query(0, weighted=True)))
        new = staged.new[0]
        writing = device_rows.write_rows.trace(resident.formats[0].rows, new.values, new.where)
        text = writing.lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo.scatter" in text and "unique_indices = true" in text
        assert "tf.aliasing_output" in text or "jax.buffer_donor" in text
        pooling_program = jax.jit(pooling.pool, static_argnums=1).trace(resident.arrays(staged), staged.layout)
        assert "custom_call" not in pooling_program.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("placement", "arguments", "message"),
    [
        ("direct", {"capacity_bytes": 10**4}, "no table of the tiers is cached"),
        ("cached", {"capacity_bytes": 100}, "capacity_bytes=100 has room for 4 rows of float32, expected at least 16"),
        ("cached", {"capacity_bytes": -5}, "capacity_bytes=-5"),
        ("cached", {"capacity_bytes": 10**4, "spill": 0}, "spill=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(stores, placement, arguments, message):
    with stores(*("float32",) * 3) as store, Tiers(store, placement) as tiers:
        with pytest.raises(ValueError, match=message):
            Resident(tiers, **arguments)
