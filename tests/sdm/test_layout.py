"""The co-access layout: counted by hand, planted blocks found again, and left alone where nothing is to be gained."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.ops.bags import Bags
from jaxeff.sdm import layout, queries
from jaxeff.sdm.encoding import RowFormat
from jaxeff.sdm.table import TableSpec, open_store
from jaxeff.sdm.tiers import Tiers
from jaxeff.sdm.transforms import reorder, rewrite
from jaxeff.sdm.writer import Writer


def csr(queries):
    """Indices and offsets of lists of rows."""
    lengths = [len(rows) for rows in queries]
    indices = np.array([row for rows in queries for row in rows], np.int64)
    return indices, np.append(0, np.cumsum(lengths)).astype(np.int64)


def slow_blocks_per_row(queries, k, position):
    blocks = sum(len({int(position[row]) // k for row in rows}) for rows in queries)
    return blocks / max(sum(len(set(rows)) for rows in queries), 1)


def planted(rng, groups=64, k=8, queries=400, each=3):
    """Queries that read whole groups of k rows whose ids are scattered."""
    members = rng.permutation(groups * k).reshape(groups, k)
    chosen = rng.integers(0, groups, (queries, each))
    return members, csr([rng.permutation(members[some].ravel()).tolist() for some in chosen])


lists_of_rows = st.lists(st.lists(st.integers(0, 19), max_size=8), max_size=12)


@settings(max_examples=80, deadline=None)
@given(queries=lists_of_rows, k=st.integers(1, 6), seed=st.integers(0, 99))
def test_blocks_are_counted_as_by_hand(queries, k, seed):
    position = np.random.default_rng(seed).permutation(20)
    found = layout.blocks_per_row(*csr(queries), k, position)
    assert found == pytest.approx(slow_blocks_per_row(queries, k, position))
    assert layout.blocks_per_row(*csr(queries), k) == pytest.approx(slow_blocks_per_row(queries, k, np.arange(20)))


@pytest.mark.parametrize("method", ["minhash", "bisection", "minhash+bisection"])
@pytest.mark.parametrize("k", [8, 6])
def test_planted_groups_come_to_lie_in_blocks_of_their_own(method, k):
    rng = np.random.default_rng(0)
    members, (indices, offsets) = planted(rng, k=k)
    found = layout.optimise(indices, offsets, members.size, k, methods=(method,))
    assert found.method == method and found.before > 0.8
    assert found.after < 1.5 / k
    blocks = found.position[members] // k
    whole = (blocks == blocks[:, :1]).all(1).mean()
    assert whole > 0.7


def test_the_better_candidate_is_chosen_on_queries_that_neither_fit_nor_decide():
    rng = np.random.default_rng(1)
    members, (indices, offsets) = planted(rng)
    found = {
        methods: layout.optimise(indices, offsets, members.size, 8, methods=methods)
        for methods in (("popularity",), ("minhash+bisection",), layout.METHODS)
    }
    assert found[layout.METHODS].after <= found[("popularity",)].after
    assert found[layout.METHODS].after == pytest.approx(found[("minhash+bisection",)].after, abs=0.02)


def test_before_and_after_are_those_of_the_last_queries():
    members, (indices, offsets) = planted(np.random.default_rng(2))
    found = layout.optimise(indices, offsets, members.size, 8, held_out=0.5)
    last = [indices[offsets[q] : offsets[q + 1]].tolist() for q in range(300, 400)]
    assert found.before == pytest.approx(slow_blocks_per_row(last, 8, np.arange(members.size)))
    assert found.after == pytest.approx(slow_blocks_per_row(last, 8, found.position))


def test_hashed_ids_of_equal_popularity_keep_their_order():
    rng = np.random.default_rng(0)
    indices, offsets = rng.integers(0, 4000, 500 * 20), np.arange(501) * 20
    found = layout.optimise(indices, offsets, 4000, 8)
    assert found.position is None
    assert (found.method, found.rows_moved, found.remap_bytes) == ("none", 0, 0)
    assert found.after > 0.95 * found.before


def test_a_layout_that_only_fits_the_past_is_not_used():
    members, (indices, offsets) = planted(np.random.default_rng(0))
    late = offsets[320]
    indices[late:] = np.random.default_rng(1).permutation(members.size)[indices[late:]]  # everything moved
    assert layout.optimise(indices, offsets, members.size, 8).position is None


def test_a_good_order_is_left_alone():
    members, (indices, offsets) = planted(np.random.default_rng(0))
    ideal = np.empty(members.size, np.int64)
    ideal[members.ravel()] = np.arange(members.size)
    found = layout.optimise(ideal[indices], offsets, members.size, 8)
    assert found.position is None and found.before == pytest.approx(1 / 8)


@settings(max_examples=40, deadline=None)
@given(queries=st.lists(st.lists(st.integers(0, 29), max_size=9), min_size=1, max_size=30), k=st.integers(1, 7))
def test_positions_are_a_permutation_and_unread_rows_keep_their_order_behind(queries, k):
    indices, offsets = csr(queries)
    for method in layout.METHODS:
        found = layout.optimise(indices, offsets, 40, k, methods=(method,), margin=0.0)
        if found.position is None:
            continue
        assert sorted(found.position.tolist()) == list(range(40))
        fitted = len(queries) - round(len(queries) * 0.2)
        read = {row for rows in queries[:fitted] for row in rows}
        unread = [row for row in range(40) if row not in read]
        assert found.position[unread].tolist() == list(range(len(read), 40))
        assert found.rows_moved == len(read)


def test_only_the_hottest_rows_move_when_asked():
    members, (indices, offsets) = planted(np.random.default_rng(3))
    found = layout.optimise(indices, offsets, members.size, 8, hottest=100, margin=0.0)
    reads = np.bincount(indices[: offsets[320]], minlength=members.size)
    front = np.argsort(found.position)[: found.rows_moved]
    assert found.rows_moved == 100
    assert reads[front].min() >= np.delete(reads, front).max()


def test_the_same_seed_gives_the_same_order():
    members, (indices, offsets) = planted(np.random.default_rng(4))
    first, again = (layout.optimise(indices, offsets, members.size, 8, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.position, again.position)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_order_lists_the_rows_by_their_places(rows, share, seed):
    rng = np.random.default_rng(seed)
    in_front = rng.permutation(np.flatnonzero(rng.random(rows) < share))
    found = layout.Layout(layout._positions(in_front, rows), "minhash", 1.0, 0.5, len(in_front), 4 * rows)
    by_place = {place: row for row, place in enumerate(found.position.tolist())}
    assert found.order.tolist() == [by_place[place] for place in range(rows)]
    assert layout.Layout(None, "none", 1.0, 1.0, 0, 0).order is None


@pytest.mark.parametrize("remapped", [False, True])
def test_a_store_in_the_order_that_was_found_reads_as_many_blocks_as_foretold(tmp_path, remapped):
    rng = np.random.default_rng(5)
    members, (rows, offsets) = planted(rng)
    values = rng.normal(size=(members.size, 128)).astype(np.float32)  # eight rows in 4096 bytes
    # Ids are rows, or have a remap with pruned ids between.
    remap = rng.permutation(np.append(np.arange(members.size), np.full(100, -1))) if remapped else None
    ids = np.arange(members.size) if remap is None else np.argsort(np.where(remap < 0, members.size, remap))
    asked = [
        queries.query([Bags(ids[rows[start:stop]], np.array([0, stop - start]), None)])
        for start, stop in itertools.pairwise(offsets)
    ]
    with Writer(tmp_path, packing="block") as writer:
        writer.add(TableSpec("t", members.size, RowFormat("float32", 128)), [values], remap)
        writer.publish()
    with open_store(tmp_path) as store:
        found = layout.optimise(store.tables[0].positions(ids[rows]), offsets, members.size, 8)
        change = rewrite(store, tmp_path, reorder(found), packing="block").changes[0]
    assert change.after.fast_bytes == (store.tables[0].fast_bytes if remapped else found.remap_bytes)
    assert change.after.fast_bytes == 4 * len(ids if remap is None else remap)
    looked_up, blocks = [], []
    for version in ("v000001", "v000002"):
        # Through the page cache, so that a block has 4096 bytes wherever the test runs.
        with open_store(tmp_path, version) as store, Tiers(store, "direct", reader="pread", direct=False) as opened:
            assert opened.reader.block == 4096
            looked_up.append([opened.lookup(one) for one in asked[:360]])
            before = dataclasses.replace(opened.counters)
            looked_up[-1] += [opened.lookup(one) for one in asked[360:]]  # those that decided
            counted = opened.counters.since(before)
            blocks.append(counted.blocks / counted.unique)
    np.testing.assert_array_equal(looked_up[0], looked_up[1])
    expected = np.zeros(128, np.float32)
    for row in rows[offsets[-2] :]:
        expected += values[row]
    np.testing.assert_array_equal(looked_up[0][-1][0], expected)
    assert blocks == pytest.approx([found.before, found.after])
    assert blocks[1] < 0.3 * blocks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(indices=np.array([0, 9])), r"indices must be in 0\.\.4"),
        (dict(indices=np.array([0, -1])), r"indices must be in 0\.\.4"),
        (dict(indices=np.array([0.5, 1])), "indices must be integers"),
        (dict(offsets=np.array([0, 1])), "offsets must rise from 0 to the number of indices, 2"),
        (dict(offsets=np.array([0, 3, 2])), "offsets must rise"),
        (dict(rows_per_block=0), "rows_per_block must be at least 1"),
        (dict(methods=("random",)), r"methods must be some of popularity, .*got \['random'\]"),
        (dict(methods=()), "got none"),
        (dict(held_out=1.0), "held_out must be between 0 and 1"),
        (dict(margin=1.0), r"margin must be in 0\.\.1"),
        (dict(hottest=0), "hottest must be at least 1"),
    ],
)
def test_what_cannot_be_laid_out_is_said(change, message):
    arguments = {"indices": np.array([0, 1]), "offsets": np.array([0, 2]), "rows": 5, "rows_per_block": 4, **change}
    with pytest.raises(ValueError, match=message):
        layout.optimise(**arguments)


def test_no_queries_leave_the_order():
    assert layout.optimise(np.zeros(0, int), np.zeros(1, int), 5, 4).position is None
