"""Pooled look-ups have the same bits wherever their rows are: in memory, in a cache or in a file."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.ops.bags import Bags
from jaxeff.sdm import callback, pipeline, queries, renewal, tiers
from jaxeff.sdm.convert import write_tables
from jaxeff.sdm.encoding import KINDS, RowFormat
from jaxeff.sdm.io.errors import DeadlineExceeded
from jaxeff.sdm.lookups import Failed
from jaxeff.sdm.row_cache import row_keys
from jaxeff.sdm.stored_file import StoreError
from jaxeff.sdm.table import TableSpec, open_store
from jaxeff.sdm.writer import Writer
from tests.sdm.tables import DIM, FORMS, expected, random_query, stored, values, write


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folders = {}

    def get(*kinds):
        if kinds not in folders:
            folders[kinds] = write(tmp_path_factory.mktemp("store") / "s", kinds)
        return folders[kinds]

    return get


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_form_and_tier_gives_the_bits_of_a_loop(stores, kind, form):
    kinds = (kind,) * 3
    reference = stored(kinds)
    with open_store(stores(*kinds)) as store:
        mixed = {"table0": "memory", "table1": "cached", "table2": "direct"}
        for placement in ("memory", "cached", "direct", mixed):
            with tiers.Tiers(store, placement, cache_bytes=4000, form=form) as opened:
                for seed in range(3):
                    asked = random_query(seed, weighted=seed == 2)
                    np.testing.assert_array_equal(opened.lookup(asked), expected(asked, reference))


@pytest.mark.parametrize("backend", ["auto", "uring", "aio", "pread", "mmap"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_every_way_of_reading_gives_the_same(stores, backend, mode):
    kinds = ("float32", "int8", "int4")
    with open_store(stores(*kinds)) as store:
        try:
            opened = tiers.Tiers(store, "cached", cache_bytes=3000, reader=backend, mode=mode)
        except OSError as error:
            pytest.skip(f"not here: {error}")
        with opened:
            for seed in range(4):
                asked = random_query(seed)
                np.testing.assert_array_equal(opened.lookup(asked), expected(asked, stored(kinds), mode))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 6), st.sampled_from([0, 2000, 20000]))
def test_a_cache_of_any_size_changes_nothing(stores, seed, longest, bags, cache):
    kinds = ("int8", "int8", "float32")
    with open_store(stores(*kinds)) as store, tiers.Tiers(store, cache_bytes=cache, form="padded") as opened:
        for turn in range(3):
            asked = random_query(seed + turn, bags, longest + 1)
            np.testing.assert_array_equal(opened.lookup_on_host(asked), expected(asked, stored(kinds)))
        counted = opened.counters
        assert counted.hits + counted.reads == counted.unique
        assert counted.queries == 3 and counted.requests <= counted.reads


@pytest.mark.parametrize("packing", ["dense", "block"])
def test_rows_that_were_pruned_are_zeros(tmp_path, packing):
    full = values()
    rng = np.random.default_rng(1)
    kept, remaps = [], []
    for table in full:
        keep = rng.random(len(table)) < 0.6
        table[~keep] = 0
        remaps.append(np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32))
        kept.append(table[keep])
    write(tmp_path / "s", ("float32",) * 3, kept, remaps, packing)
    with open_store(tmp_path / "s") as store:
        for placement in ("memory", "cached", "direct"):
            with tiers.Tiers(store, placement, cache_bytes=5000) as opened:
                asked = random_query(5)
                np.testing.assert_array_equal(opened.lookup(asked), expected(asked, full))
                assert opened.fast_bytes >= sum(remap.nbytes for remap in remaps)


# Formats of different numbers whose rows take the same bytes, and so share a cache.
@pytest.mark.parametrize(
    ("kinds", "dim"), [(("float16", "bfloat16"), 16), (("int8", "float16"), 8), (("float16", "int4"), 3)]
)
def test_formats_of_one_row_size_do_not_take_each_others_rows(tmp_path, kinds, dim):
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(200, dim)).astype(np.float32) for _ in kinds]
    with Writer(tmp_path / "s") as writer:
        for kind, table in zip(kinds, tables, strict=True):
            writer.add(TableSpec(kind, 200, RowFormat(kind, dim)), [table])
        writer.publish()
    with open_store(tmp_path / "s") as store, tiers.Tiers(store, cache_bytes=2500) as opened:
        with tiers.Tiers(store, "memory") as memory:
            for _ in range(10):
                bags = [Bags(rng.integers(0, 200, 60), np.array([0, 60]), None) for _ in kinds]
                asked = queries.query(bags)
                reference = np.asarray(memory.lookup(asked))
                np.testing.assert_array_equal(opened.lookup(asked), reference)
                np.testing.assert_array_equal(opened.lookup_on_host(asked), reference)
        assert opened.counters.hits > 0


def test_rows_are_sent_to_a_device_whose_memory_is_not_the_hosts(stores, monkeypatch):
    monkeypatch.setattr("jaxeff.sdm.loaded.shared", lambda rows: jax.device_put(rows.copy()))
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=3000) as opened:
            asked = [random_query(seed) for seed in range(6)]
            pooled = [opened.pool(staged) for staged in pipeline.stream(opened, asked, depth=3)]
    for one, found in zip(asked, pooled, strict=True):
        np.testing.assert_array_equal(found, expected(one, values()))


def test_look_ups_of_several_threads_wait_for_each_other(stores):
    kinds = ("float32", "int8", "float32")
    asked = [random_query(seed) for seed in range(40)]
    with open_store(stores(*kinds)) as store, tiers.Tiers(store, cache_bytes=3000, form="padded") as opened:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(opened.lookup_on_host, asked))
        for one, pooled in zip(asked, found, strict=True):
            np.testing.assert_array_equal(pooled, expected(one, stored(kinds)))
        assert opened.counters.queries == 40


def test_more_threads_than_buffers_look_up(stores):
    asked = [random_query(seed) for seed in range(40)]
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=3000, buffers=3) as opened, ThreadPoolExecutor(8) as threads:
            found = list(threads.map(opened.lookup, asked))
    for one, pooled in zip(asked, found, strict=True):
        np.testing.assert_array_equal(pooled, expected(one, values()))


def test_a_staged_query_that_is_pooled_too_late_is_an_error(stores):
    with open_store(stores("float32", "float32", "float32")) as store, tiers.Tiers(store, buffers=3) as opened:
        staged = [opened.fetch(opened.plan(random_query(seed))) for seed in range(4)]
        with pytest.raises(RuntimeError, match="read after 3 others were fetched"):
            opened.pool(staged[0])
        np.testing.assert_array_equal(opened.pool(staged[3]), expected(random_query(3), values()))


def test_pooled_vectors_may_be_donated(stores):
    consume = jax.jit(lambda pooled: pooled * 2, donate_argnums=0)
    with open_store(stores("float32", "float32", "float32")) as store, tiers.Tiers(store, buffers=3) as opened:
        for seed in range(8):
            doubled = consume(opened.pool(opened.fetch(opened.plan(random_query(seed)))))
            np.testing.assert_array_equal(doubled, 2 * expected(random_query(seed), values()))


def test_tiers_that_are_closed_answer_nothing_more(stores):
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=50_000) as opened:
            opened.lookup(random_query(0))
        with pytest.raises(RuntimeError, match="the tiers are closed"):
            opened.lookup(random_query(0))


def test_an_error_while_opening_closes_the_files(stores):
    before = len(os.listdir("/proc/self/fd"))
    with open_store(stores("float32", "float32", "float32")) as store:
        opened = len(os.listdir("/proc/self/fd"))
        errors = []
        for _ in range(3):
            with pytest.raises(ValueError) as caught:
                tiers.Tiers(store, pinned={"table2": [25]})
            errors.append(caught)
        assert len(os.listdir("/proc/self/fd")) == opened
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_rows_than_int32_numbers_are_refused_in_memory(stores, monkeypatch):
    monkeypatch.setattr("jaxeff.sdm.loaded.MOST_ROWS", 100)
    with open_store(stores("float32", "float32", "float32")) as store:
        with pytest.raises(ValueError, match="155 rows of one format in memory are more than int32 can number"):
            tiers.Tiers(store, "memory")


def test_damage_is_found_when_a_table_is_loaded(tmp_path):
    big = np.random.default_rng(0).normal(size=(120_000, 8)).astype(np.float32)
    with Writer(tmp_path / "s") as writer:
        writer.add(TableSpec("t", len(big), RowFormat("float32", 8)), [big])
        writer.publish()
    with open_store(tmp_path / "s") as store:
        with open(store.paths[0], "r+b") as file:
            file.seek(4096 + 2**20 + 77)
            file.write(b"damaged")
        with pytest.raises(StoreError, match="t"):
            tiers.Tiers(store, "memory")


def test_a_file_that_is_cut_while_open_is_an_error(stores, tmp_path):
    shutil.copytree(stores("float32", "float32", "float32"), tmp_path / "s")
    with open_store(tmp_path / "s") as store, tiers.Tiers(store) as opened:
        os.truncate(store.paths[1], 4096)
        with pytest.raises(OSError, match="00001"):
            opened.lookup(queries.query([Bags(np.array([89]), np.array([0, 1]), None)], tables=[1]))


def test_a_small_table_of_another_format_gets_its_share(tmp_path):
    with Writer(tmp_path / "s") as writer:
        writer.add(TableSpec("large", 20_000, RowFormat("int8", 4)), [np.ones((20_000, 4), np.float32)])
        writer.add(TableSpec("small", 3, RowFormat("float32", 4)), [np.ones((3, 4), np.float32)])
        writer.add(TableSpec("empty", 0, RowFormat("float32", 4)), [])
        writer.publish()
    with open_store(tmp_path / "s") as store, tiers.Tiers(store, cache_bytes=10_000) as opened:
        asked = queries.query(
            [
                Bags(np.array([7]), np.array([0, 1])),
                Bags(np.array([2]), np.array([0, 1])),
                Bags(np.array([], int), [0, 0]),
            ]
        )
        for _ in range(2):
            np.testing.assert_array_equal(opened.lookup(asked), [[1] * 4, [1] * 4, [0] * 4])
        assert opened.counters.hits == 2


def test_rows_are_found_in_the_cache_when_they_come_again(stores):
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=100_000) as opened:
            asked = random_query(0)
            opened.lookup(asked)
            first = opened.counters
            assert first.hits == 0 and first.reads == first.unique > 0 and first.bytes >= 512
            opened.lookup(asked)
            assert first.hits == first.reads == first.unique // 2 and first.hit_rate == 0.5
            assert 0 < opened.fast_bytes <= 100_000


def test_direct_tables_never_enter_the_cache(stores):
    placement = {"table0": "cached", "table1": "direct", "table2": "direct"}
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, placement, cache_bytes=100_000) as opened:
            asked = random_query(0)
            opened.lookup(asked)
            opened.lookup(asked)
            of_first = np.repeat(asked.tables, asked.lengths) == 0
            assert opened.counters.hits == len(np.unique(asked.indices[of_first]))


@pytest.mark.parametrize("cache", [0, 3000])
def test_pinned_rows_are_never_read_again(stores, cache):
    kinds = ("float32", "int8", "float32")
    pinned = {"table0": np.arange(40), "table1": [0, 1, 2, 2], "table2": []}
    with open_store(stores(*kinds)) as store, tiers.Tiers(store, cache_bytes=cache, pinned=pinned) as opened:
        assert opened.fast_bytes >= 40 * 24 + 3 * 14
        for seed in range(4):
            asked = random_query(seed)
            for look_up in (opened.lookup, opened.lookup_on_host):
                np.testing.assert_array_equal(look_up(asked), expected(asked, stored(kinds)))
        counted = opened.counters
        assert counted.pinned > 0 and counted.pinned + counted.hits + counted.reads == counted.unique
        of_table = np.array([0], np.int32)
        only = queries.query([Bags(np.arange(40), np.array([0, 40]), None)], of_table)
        before = counted.reads
        np.testing.assert_array_equal(opened.lookup(only), expected(only, stored(kinds)))
        assert counted.reads == before


def test_rows_to_pin_that_do_not_exist_are_named(stores):
    with open_store(stores("float32", "float32", "float32")) as store:
        with pytest.raises(ValueError, match=r"ids of 'table2' must be 0 .. 24, got 3 .. 25"):
            tiers.Tiers(store, pinned={"table2": [3, 25]})
        with pytest.raises(ValueError, match="'table1' is no table whose rows are in a file"):
            tiers.Tiers(store, "memory", pinned={"table1": [3]})


def test_warm_rows_are_hits_and_not_counted(stores):
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=100_000) as opened:
            asked = random_query(3)
            of = np.repeat(asked.tables, asked.lengths)
            kept = opened.warm(of, asked.indices, batch=7)
            assert kept == len(np.unique(of.astype(np.int64) * 1000 + asked.indices))
            assert opened.counters.unique == 0
            opened.lookup(asked)
            assert opened.counters.reads == 0 and opened.counters.hits == kept


def test_warming_keeps_the_most_important_rows_and_names_wrong_ones(stores):
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=1200) as opened:
            ids = np.random.default_rng(0).permutation(90)
            kept = opened.warm(np.ones(90, int), ids, batch=9)
            (cache,) = opened.cache.caches.values()
            here = cache.find(row_keys(np.ones(90, int), ids)) >= 0
            assert kept == here[: cache.capacity].sum() and here[:9].all()
            for table, odd, message in ((1, 90, "ids of table 1 must be 0 .. 89, got 90"), (2, -1, "0 .. 24, got -1")):
                with pytest.raises(ValueError, match=message):
                    opened.warm(np.array([0, table]), np.array([0, odd]))
            assert opened.warm([], []) == 0
            with pytest.raises(ValueError, match="batch=0 must be at least 1"):
                opened.warm([0], [0], batch=0)
            with pytest.raises(TypeError, match="ids must be integers, got float64"):
                opened.warm([0], [1.7])
            with pytest.raises(ValueError, match="tables must be 0 .. 2, got 0 .. 3"):
                opened.warm(np.array([0, 3]), np.array([0, 0]))


def test_bags_with_weights_are_kept_whole_in_any_order(stores):
    with open_store(stores("int8", "int8", "int8")) as store:
        with tiers.Tiers(store, canonical=True) as plain:
            with tiers.Tiers(store, pooled_bytes=50_000, pooled_threshold=2) as opened:
                rng = np.random.default_rng(0)
                ids, weights = np.array([1, 5, 5, 5, 7, 7]), rng.normal(size=6).astype(np.float32)
                for _ in range(10):
                    order = rng.permutation(6)
                    asked = queries.query([Bags(ids[order], np.array([0, 6]), weights[order])])
                    np.testing.assert_array_equal(opened.lookup(asked), plain.lookup(asked))
                assert opened.counters.pooled_hits == 9


def test_whole_bags_that_come_again_need_no_rows_and_have_the_same_bits(stores):
    with open_store(stores("int8", "int8", "int8")) as store:
        with tiers.Tiers(store) as plain, tiers.Tiers(store, pooled_bytes=50_000, pooled_threshold=2) as opened:
            asked = random_query(0)
            reference = plain.lookup(queries.sorted_bags(asked))
            mixed = asked._replace(indices=_shuffled_within_bags(asked))
            for one in (asked, mixed):
                np.testing.assert_array_equal(opened.lookup(one), reference)
            long = asked.lengths >= 2
            assert opened.counters.pooled_hits == long.sum()
            assert opened.counters.avoided == asked.lengths[long].sum()
            assert opened.counters.bags == 2 * len(long)


def _shuffled_within_bags(asked):
    rng = np.random.default_rng(0)
    parts = np.split(asked.indices, asked.offsets[1:-1])
    return np.concatenate([rng.permutation(part) for part in parts])


@pytest.mark.parametrize(("depth", "lookahead"), [(1, 0), (2, 0), (3, 4)])
def test_queries_fetched_ahead_give_the_same_bits(stores, depth, lookahead):
    kinds = ("float32", "int8", "float32")
    asked = [random_query(seed) for seed in range(12)]
    with open_store(stores(*kinds)) as store:
        with tiers.Tiers(store, cache_bytes=4000, lookahead=lookahead > 0) as opened:
            results = [
                (staged.plan.asked, opened.pool(staged))
                for staged in pipeline.stream(opened, asked, depth=depth, lookahead=lookahead)
            ]
    assert len(results) == len(asked)
    for one, (planned, pooled) in zip(asked, results, strict=True):
        np.testing.assert_array_equal(planned.indices, one.indices)
        np.testing.assert_array_equal(pooled, expected(one, stored(kinds)))


def test_looking_ahead_reads_less(stores):
    rng = np.random.default_rng(0)
    asked = [queries.query([Bags(rng.integers(0, 90, 12), np.array([0, 12]), None)], tables=[1]) for _ in range(60)]
    reads = {}
    with open_store(stores("float32", "float32", "float32")) as store:
        for lookahead in (0, 20):
            with tiers.Tiers(store, cache_bytes=1800, lookahead=lookahead > 0) as opened:
                for staged in pipeline.stream(opened, asked, lookahead=lookahead):
                    opened.pool(staged)
                reads[lookahead] = opened.counters.reads
    assert reads[20] < 0.8 * reads[0]


def test_a_stream_that_is_closed_early_does_not_spoil_the_next(stores):
    rng = np.random.default_rng(0)
    asked = [queries.query([Bags(rng.integers(0, 90, 12), np.array([0, 12]))], tables=[1]) for _ in range(80)]
    reads = []
    for closed_early in (False, True):
        with open_store(stores("float32", "float32", "float32")) as store:
            with tiers.Tiers(store, cache_bytes=1500, lookahead=True) as opened:
                if closed_early:
                    first = pipeline.stream(opened, asked, lookahead=30)
                    opened.pool(next(first))
                    first.close()
                before = opened.counters.reads
                for staged in pipeline.stream(opened, asked, lookahead=30):
                    opened.pool(staged)
                reads.append(opened.counters.reads - before)
    assert reads[1] <= reads[0] * 1.05


def test_after_a_stream_with_look_ahead_the_cache_takes_new_rows(stores):
    rng = np.random.default_rng(0)
    asked = [queries.query([Bags(rng.integers(0, 90, 40), np.array([0, 40]))], tables=[1]) for _ in range(40)]
    few = queries.query([Bags(np.arange(20), np.array([0, 20]))], tables=[1])
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=1800, lookahead=True) as opened:
            first = pipeline.stream(opened, asked, lookahead=20)
            for _ in range(10):
                opened.pool(next(first))
            first.close()
            for _ in range(6):
                before = opened.counters.hits
                opened.lookup(few)
            assert opened.counters.hits - before >= 18


def test_an_error_of_the_source_comes_after_the_queries_before_it(stores):
    def source():
        yield from (random_query(seed) for seed in range(10))
        raise KeyError("the queue broke")

    for lookahead in (0, 8):
        with open_store(stores("float32", "float32", "float32")) as store:
            with tiers.Tiers(store, cache_bytes=3000, lookahead=True) as opened:
                seen = 0
                with pytest.raises(KeyError, match="the queue broke"):
                    for staged in pipeline.stream(opened, source(), lookahead=lookahead):
                        opened.pool(staged)
                        seen += 1
                assert seen == 10


def test_with_look_ahead_queries_before_a_bad_one_come_first(stores):
    good = random_query(0)
    bad = good._replace(indices=good.indices + 10**6)
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=3000, lookahead=True) as opened:
            seen = 0
            with pytest.raises(ValueError, match="outside"):
                for staged in pipeline.stream(opened, [good] * 5 + [bad] + [good], lookahead=4):
                    opened.pool(staged)
                    seen += 1
            assert seen == 5


def test_a_stream_that_keeps_going_says_which_query_failed(stores, monkeypatch):
    asked = [random_query(seed) for seed in range(6)]
    with open_store(stores("float32", "float32", "float32")) as store, tiers.Tiers(store) as opened:
        gather, calls = opened.reader.gather, []

        def late(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise DeadlineExceeded(0, 1, 0.1)
            return gather(*arguments)

        monkeypatch.setattr(opened.reader, "gather", late)
        found = []
        for one in pipeline.stream(opened, asked, keep_going=True):
            found.append(one.error if isinstance(one, Failed) else np.asarray(opened.pool(one)))
    assert len(found) == 6 and isinstance(found[2], DeadlineExceeded)
    for seed in (0, 1, 3, 4, 5):
        np.testing.assert_array_equal(found[seed], expected(asked[seed], values()))


def test_a_query_that_fails_is_raised_in_its_turn_and_the_thread_ends(stores):
    good = random_query(0)
    bad = good._replace(indices=good.indices + 10**6)
    with open_store(stores("float32", "float32", "float32")) as store, tiers.Tiers(store) as opened:
        running = pipeline.stream(opened, [good, bad, good])
        opened.pool(next(running))
        with pytest.raises(ValueError, match="outside"):
            next(running)
        with pytest.raises(StopIteration):
            next(running)
        np.testing.assert_array_equal(opened.lookup(good), expected(good, values()))


def test_sizes_of_programs_seldom_change(stores):
    with open_store(stores("float32", "float32", "float32")) as store:
        with tiers.Tiers(store, cache_bytes=3000) as opened:
            before = tiers.compilations()
            for seed in range(25):
                opened.lookup(random_query(seed, longest=9))
            assert tiers.compilations() - before <= 6


def test_a_look_up_inside_any_program(stores):
    with open_store(stores("float32", "float32", "float32")) as store, tiers.Tiers(store) as opened:
        look_up = callback.callback_lookup(opened)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 25, (4, 3, 5)).astype(np.int32)
        lengths = rng.integers(0, 6, (4, 3)).astype(np.int32)
        pooled = jax.jit(lambda ids, lengths: look_up(ids, lengths) * 2)(ids, lengths)
        inside = np.arange(5) < lengths[..., None]
        rows = np.stack([table[ids[:, t]] for t, table in enumerate(values())], 1)
        np.testing.assert_allclose(pooled, 2 * (rows * inside[..., None]).sum(2), rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match=r"ids must be \[B, 3, L\]"):
            look_up(ids[:, :2], lengths[:, :2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"placement": {"table0": "memory"}}, "a tier to every table and no other.*table1"),
        ({"placement": "disk"}, "tier='disk' is unknown; there are memory"),
        ({"cache_bytes": -1}, "cache_bytes=-1 must not be negative"),
        ({"mode": "max"}, "mode='max' is unknown"),
        ({"form": "fast"}, "form='fast' is unknown"),
        ({"buffers": 2}, "a ring needs 3 buffers or more"),
        ({"policy": "clip"}, "policy='clip' is unknown"),
        ({"cache_bytes": 100}, "cache_bytes=100 is too small: 16 rows of each size take"),
    ],
)
def test_settings_that_make_no_sense_are_named(stores, arguments, message):
    with open_store(stores("float32", "float32", "float32")) as store:
        with pytest.raises(ValueError, match=message):
            with tiers.Tiers(store, **arguments) as opened:
                opened.lookup(random_query(0))


def test_a_deadline_that_has_passed_is_an_error_and_leaves_the_cache_as_it_was(stores):
    with open_store(stores("float32", "float32", "float32")) as store, tiers.Tiers(store, cache_bytes=9000) as opened:
        asked = random_query(0)
        with pytest.raises(TimeoutError):
            opened.lookup(asked, deadline=0.0)
        np.testing.assert_array_equal(opened.lookup(asked), expected(asked, values()))


def test_a_new_version_is_served_with_a_warm_cache_while_the_old_one_goes_on(tmp_path):
    old, new = values(0), values(1)
    write(tmp_path / "s", ("float32",) * 3, old, remaps=(None, np.arange(90)[::-1].astype(np.int32), None))
    asked = random_query(0)
    with open_store(tmp_path / "s") as store, tiers.Tiers(store, cache_bytes=50_000) as opened:
        opened.lookup(asked)
        assert renewal.renewed(opened) is None
        staged = opened.fetch(opened.plan(asked))
        write(tmp_path / "s", ("float32",) * 3, new)
        fresh = renewal.renewed(opened)
        with fresh.store, fresh:
            np.testing.assert_array_equal(fresh.lookup(asked), expected(asked, new))
            assert fresh.counters.reads == 0 and fresh.counters.hits == fresh.counters.unique
        np.testing.assert_array_equal(opened.pool(staged), expected(asked, [old[0], old[1][::-1], old[2]]))


def test_a_new_version_is_warmed_by_names_and_within_its_rows(tmp_path):
    rng = np.random.default_rng(0)
    folder, tables = tmp_path / "s", {"a": rng.normal(size=(60, DIM)), "b": rng.normal(size=(60, DIM))}
    tables = {name: table.astype(np.float32) for name, table in tables.items()}
    write_tables(folder, tables)
    with open_store(folder) as store, tiers.Tiers(store, cache_bytes=20_000) as opened:
        opened.lookup(queries.query([Bags(np.arange(60), np.array([0, 60]))], tables=[0]))  # of table a alone
        write_tables(folder, {"b": tables["b"], "a": tables["a"][:25]})
        with renewal.renewed(opened) as fresh, fresh.store:
            pooled = fresh.lookup(queries.query([Bags(np.arange(25), np.arange(26))], tables=[1]))
            np.testing.assert_array_equal(pooled, tables["a"][:25])
            assert fresh.counters.reads == 0 and len(fresh.cache.caches[24]) == 25


def test_a_new_version_with_other_tables_is_an_error_and_the_old_one_goes_on(tmp_path):
    write(tmp_path / "s", ("float32",) * 3)
    placement = dict.fromkeys(("table0", "table1", "table2"), "cached")
    with open_store(tmp_path / "s") as store, tiers.Tiers(store, placement, cache_bytes=50_000) as opened:
        with Writer(tmp_path / "s") as writer:
            writer.add(TableSpec("other", 3, RowFormat("float32", DIM)), [np.zeros((3, DIM), np.float32)])
            writer.publish()
        with pytest.raises(ValueError, match="a tier to every table and no other"):
            renewal.renewed(opened)
        asked = random_query(0)
        np.testing.assert_array_equal(opened.lookup(asked), expected(asked, values()))


def test_tables_of_other_dimensions_are_refused(tmp_path):
    with Writer(tmp_path / "s") as writer:
        for dim in (4, 8):
            writer.add(TableSpec(f"d{dim}", 3, RowFormat("float32", dim)), [np.zeros((3, dim), np.float32)])
        writer.publish()
    with open_store(tmp_path / "s") as store, pytest.raises(ValueError, match=r"one dimension, these have \[4, 8\]"):
        tiers.Tiers(store)
