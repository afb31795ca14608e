import errno
import os

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm import transforms
from jaxeff.sdm.encoding import RowFormat, decode, decode_jax, encode, zero_row
from jaxeff.sdm.layout import Layout
from jaxeff.sdm.stored_file import CHUNK, CorruptTable, DiskFull
from jaxeff.sdm.table import TableSpec, open_store
from jaxeff.sdm.transforms import deprune, dequantise, pad_rows, preview, reencode, reorder, rewrite
from jaxeff.sdm.versions import versions
from jaxeff.sdm.writer import Writer


def _values(rows, dim=4, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def _write(folder, values, kind="float32", remap=None, **writer):
    fmt = RowFormat(kind, values.shape[1])
    with Writer(folder, **writer) as writing:
        writing.add(TableSpec("t", len(values), fmt), [values], remap)
        writing.add(TableSpec("other", 5, RowFormat("float16", 3)), [_values(5, 3)])
        writing.publish()


def _stored(store, name="t"):
    table = store.tables[store.index(name)]
    return np.concatenate([np.empty((0, table.spec.format.row_bytes), np.uint8), *table.stream()])


def _of_ids(store):
    """Stored rows of all ids, zeros for pruned ones: the reference, one id at a time."""
    table, stored = store.tables[0], _stored(store)
    rows = range(len(stored)) if table.remap is None else table.remap
    return np.array([stored[row] if row >= 0 else zero_row(table.spec.format) for row in rows])


def _remaps(kept):
    """Remaps of 400 ids to 150 rows: in order, in any order, and one with rows that several ids share."""
    rng = np.random.default_rng(kept)
    in_order = np.full(400, -1)
    in_order[np.sort(rng.choice(400, 150, replace=False))] = np.arange(150)
    mixed = np.full(400, -1)
    mixed[rng.choice(400, 150, replace=False)] = rng.permutation(150)
    return {"in order": in_order, "mixed": mixed, "shared": rng.integers(-1, 150, 400), "none": np.full(400, -1)}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("remap", ["in order", "mixed", "shared", "none"])
@pytest.mark.parametrize("memory", [1 << 20, 500])
def test_a_depruned_table_has_the_rows_of_all_ids(tmp_path, monkeypatch, kind, remap, memory):
    monkeypatch.setattr(transforms, "_PIECE", 300)
    _write(tmp_path, _values(150, 5), kind, _remaps(3)[remap])
    with open_store(tmp_path) as before:
        expected = _of_ids(before)
        done = rewrite(before, tmp_path, {"t": deprune}, memory=memory)
        with open_store(tmp_path) as after:
            assert (done.version, after.version) == ("v000002", "v000002")
            assert after.tables[0].remap is None and after.tables[0].spec.rows == 400
            np.testing.assert_array_equal(_stored(after), expected)
            np.testing.assert_array_equal(_stored(after, "other"), _stored(before, "other"))
    (change, other) = done.changes
    assert change.name == "t" and other.before == other.after
    assert (change.before.fast_bytes, change.after.fast_bytes) == (1600, 0)
    assert change.after.file_bytes == 4096 + -(-400 * expected.shape[1] // 4096) * 4096


def test_pooled_results_keep_their_bits_when_depruned(tmp_path):
    fmt, remap = RowFormat("int8", 8), _remaps(1)["mixed"]
    _write(tmp_path, _values(150, 8), "int8", remap)
    ids = np.random.default_rng(5).integers(0, 400, (30, 7))
    pooled = jax.jit(lambda rows: decode_jax(rows, fmt).sum(1))
    with open_store(tmp_path) as before:
        stored = np.concatenate([_stored(before), zero_row(fmt)[None]])
        expected = pooled(stored[before.tables[0].positions(ids)])
        rewrite(before, tmp_path, deprune)
    with open_store(tmp_path) as after:
        np.testing.assert_array_equal(pooled(_stored(after)[ids]), expected)


def test_many_pruned_ids_come_in_pieces(tmp_path):
    remap = np.full(200_000, -1)
    remap[[7, 150_000]] = [0, 1]
    _write(tmp_path, _values(2, 8), remap=remap)
    with open_store(tmp_path) as before:
        sizes = [rows.nbytes for rows in transforms._in_order(_source(before), before.tables[0].remap)]
        assert max(sizes) <= CHUNK and sum(sizes) == 200_000 * 32
        rewrite(before, tmp_path, deprune)
    with open_store(tmp_path) as after:
        stored = _stored(after)
        assert np.flatnonzero(stored.any(1)).tolist() == [7, 150_000]


def _source(store, memory=0):
    table = store.tables[0]
    return transforms.Rows(table.spec, table.stream, table.remap, None, memory, store.folder)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_dequantised_rows_are_the_values_of_the_integers(tmp_path, kind):
    values = _values(70, 6)
    _write(tmp_path, values, kind)
    with open_store(tmp_path) as before:
        (change, other) = rewrite(before, tmp_path, dequantise).changes
    fmt = RowFormat(kind, 6)
    with open_store(tmp_path) as after:
        np.testing.assert_array_equal(decode(_stored(after), RowFormat("float32", 6)), decode(encode(values, fmt), fmt))
        assert [table.spec.format.kind for table in after.tables] == ["float32", "float16"]
    assert (change.before.row_bytes, change.after.row_bytes) == (fmt.row_bytes, 24)
    assert other.before == other.after


def test_rows_are_stored_in_another_format(tmp_path):
    values = _values(70, 6)
    _write(tmp_path, values)
    with open_store(tmp_path) as before:
        rewrite(before, tmp_path, {"t": reencode("int4")})
    with open_store(tmp_path) as after:
        np.testing.assert_array_equal(_stored(after), encode(values, RowFormat("int4", 6)))
    with pytest.raises(ValueError, match="kind: 'int2'"):
        reencode("int2")


def test_a_format_that_cannot_hold_a_row_leaves_the_store_as_it_is(tmp_path):
    values = _values(70, 6)
    values[33] *= 1e6
    _write(tmp_path, values)
    with open_store(tmp_path) as before, pytest.raises(ValueError, match="row 33 spans"):
        rewrite(before, tmp_path, reencode("float16"))
    assert versions(tmp_path) == ["v000001"]


def test_padded_rows_straddle_no_block(tmp_path):
    _write(tmp_path, _values(500, 100), "int8")
    with open_store(tmp_path) as before:
        change = rewrite(before, tmp_path, {"t": pad_rows()}).changes[0]
        with open_store(tmp_path) as after:
            _, offsets = after.locate(np.zeros(500, int), np.arange(500))
            assert (np.diff(offsets) == 128).all() and (offsets // 512 == (offsets + 107) // 512).all()
            np.testing.assert_array_equal(_stored(after), _stored(before))
            # The stride stays through steps that do not change the bytes of a row.
            assert preview(after, deprune)[0].after == change.after
            assert preview(after, reencode("int4"))[0].after.file_bytes == 4096 + 28672
        with pytest.raises(ValueError, match="stride: 100, but rows of table 't' have 108 bytes"):
            rewrite(before, tmp_path, pad_rows(100))
    assert (change.before.file_bytes, change.after.file_bytes) == (4096 + 57344, 4096 + 65536)


def test_rows_are_packed_into_blocks(tmp_path):
    _write(tmp_path, _values(500, 100), "int8")
    with open_store(tmp_path) as before:
        changes = rewrite(before, tmp_path / "packed", [], block=512, packing="block").changes
        assert changes == preview(before, [], block=512, packing="block")
        with open_store(tmp_path / "packed") as after:
            np.testing.assert_array_equal(_stored(after), _stored(before))
            assert (after.block, after.packing) == (512, "block")
            assert after.tables[0].size == 4096 + 65536  # 4 rows of 108 bytes in 512


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.booleans(), st.booleans(), st.sampled_from([1 << 20, 2000, 100]))
def test_reordered_ids_keep_their_rows(tmp_path_factory, seed, remapped, prune, memory):
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(seed)
    remap = rng.integers(-1, 120, 200) if remapped else None
    _write(folder, _values(120), remap=remap)
    order = rng.permutation(120)[: 80 if prune else 120]
    with open_store(folder) as before:
        expected = _of_ids(before)
        gone = np.isin(np.arange(120) if remap is None else remap, order, invert=True)
        expected[gone] = 0
        rewrite(before, folder, {"t": reorder(order)}, memory=memory)
        with open_store(folder) as after:
            np.testing.assert_array_equal(_of_ids(after), expected)
            np.testing.assert_array_equal(_stored(after), _stored(before)[order])


def test_an_order_without_a_remap_gives_new_ids_and_takes_no_fast_memory(tmp_path):
    values, order = _values(60), np.random.default_rng(0).permutation(60)
    _write(tmp_path, values)
    with open_store(tmp_path) as before:
        change = rewrite(before, tmp_path, {"t": reorder(order, remap=False)}).changes[0]
    assert change.before == change.after
    with open_store(tmp_path) as after:
        assert after.tables[0].remap is None
        np.testing.assert_array_equal(decode(_stored(after), RowFormat("float32", 4)), values[order])


def test_a_layout_puts_every_row_at_its_position(tmp_path):
    position = np.array([3, 0, 4, 1, 2], np.int32)
    found = Layout(position, "bisection", 1.0, 0.5, 5, position.nbytes)
    values = _values(5)
    _write(tmp_path, values)
    with open_store(tmp_path) as before:
        change = rewrite(before, tmp_path, {"t": reorder(found)}).changes[0]
        assert preview(before, {"t": reorder(found.order)})[0] == change
        rewrite(before, tmp_path / "new", {"t": reorder(found, remap=False)})
    for folder, remap in ((tmp_path, position.tolist()), (tmp_path / "new", None)):
        with open_store(folder) as after:
            assert (after.tables[0].remap if remap is None else after.tables[0].remap.tolist()) == remap
            np.testing.assert_array_equal(decode(_stored(after), RowFormat("float32", 4))[position], values)
    assert change.after.fast_bytes == found.remap_bytes == 20


def test_a_layout_that_leaves_the_order_changes_nothing(tmp_path):
    _write(tmp_path, _values(60), remap=_remaps(1)["none"])
    stays = Layout(None, "none", 1.0, 1.0, 0, 0)
    with open_store(tmp_path) as before:
        for remap in (True, False):
            for change in rewrite(before, tmp_path / "new", reorder(stays, remap=remap)).changes:
                assert change.before == change.after
        with open_store(tmp_path / "new") as after:
            np.testing.assert_array_equal(_stored(after), _stored(before))


def test_a_layout_of_another_table_prunes_no_rows(tmp_path):
    found = Layout(np.arange(4, dtype=np.int32)[::-1], "bisection", 1.0, 0.5, 4, 16)
    _write(tmp_path, _values(10))
    with open_store(tmp_path) as store, pytest.raises(ValueError, match="one of 4 rows, but table 't' has 10"):
        preview(store, {"t": reorder(found)})


@pytest.mark.parametrize("none", [[], np.zeros(0, np.int32)])
@pytest.mark.parametrize("packing", ["dense", "block"])
def test_all_rows_may_go(tmp_path, none, packing):
    _write(tmp_path, _values(60), packing=packing)
    with open_store(tmp_path) as before:
        foreseen = preview(before, {"t": reorder(none)})
        assert rewrite(before, tmp_path, {"t": reorder(none)}).changes == foreseen
    for verify in ("quick", "all"):
        with open_store(tmp_path, verify=verify) as after:
            assert (after.tables[0].spec.rows, after.tables[0].ids) == (0, 60)
            assert not _of_ids(after).any() and not len(_stored(after))
            again = rewrite(after, tmp_path / "back", {"t": deprune}).changes
    with open_store(tmp_path / "back") as back:
        assert back.tables[0].spec.rows == 60 and not _stored(back).any()
        assert again[0].after.fast_bytes == 0


def test_an_empty_table_goes_through_all_steps(tmp_path):
    _write(tmp_path, _values(0))
    steps = [reorder([]), deprune, reorder([]), reencode("int8"), dequantise, pad_rows(64)]
    with open_store(tmp_path) as before:
        for some in (steps, steps[:1]):
            foreseen = preview(before, {"t": some})
            assert rewrite(before, tmp_path / "new", {"t": some}).changes == foreseen
            with open_store(tmp_path / "new", verify="all") as after:
                assert (after.tables[0].ids, len(_stored(after))) == (0, 0)


def test_steps_compose_in_order(tmp_path):
    values = _values(60)
    remap = np.full(90, -1)
    remap[20:80] = np.random.default_rng(1).permutation(60)
    order = np.random.default_rng(2).permutation(90)
    _write(tmp_path, values, "int8", remap)
    steps = [deprune, reorder(order), dequantise, pad_rows(64)]
    with open_store(tmp_path) as before:
        expected = decode(_of_ids(before), RowFormat("int8", 4))
        foreseen = preview(before, {"t": steps})
        assert rewrite(before, tmp_path, {"t": steps}, memory=300).changes == foreseen
    with open_store(tmp_path, verify="all") as after:
        table = after.tables[0]
        assert (table.spec.rows, table.placement.stride, table.fast_bytes) == (90, 64, 360)
        np.testing.assert_array_equal(decode(_of_ids(after), table.spec.format), expected)


def test_a_large_table_is_reordered_through_buckets(tmp_path):
    rows = 300_000
    _write(tmp_path, np.arange(rows * 4, dtype=np.float32).reshape(rows, 4))
    order = np.random.default_rng(0).permutation(rows)
    with open_store(tmp_path) as before:
        pieces = list(transforms._gathered(_source(before, memory=1 << 20), order))
        assert max(piece.nbytes for piece in pieces) <= 1 << 19
        np.testing.assert_array_equal(np.concatenate(pieces), _stored(before)[order])
    assert {path.name for path in tmp_path.iterdir()} == {"CURRENT", "LOCK", "v000001"}


def test_orders_that_are_none_are_refused_before_anything_is_written(tmp_path):
    _write(tmp_path, _values(10))
    with open_store(tmp_path) as store:
        for order, remap, message in (
            ([0, 1, 1, *range(3, 10)], True, "order: 1 rows of table 't' are in it twice"),
            (range(5), False, "order: 5 rows of table 't' are not in it, which needs remap=True"),
            ([0, 10], True, "order: 0 .. 10, but table 't' has rows 0 .. 9"),
            ([-1], True, "order: -1 .. -1"),
        ):
            with pytest.raises(ValueError, match=message):
                rewrite(store, tmp_path, {"t": reorder(np.array(order), remap=remap)})
        with pytest.raises(KeyError, match="no table 'x'"):
            rewrite(store, tmp_path, {"x": deprune})
    for bad in ([0.5], [[1]]):
        with pytest.raises(TypeError, match="order: expected integers"):
            reorder(bad)
    _write(tmp_path, _values(10), remap=np.arange(10))
    with open_store(tmp_path) as store, pytest.raises(ValueError, match="table 't' has one, so ids stay"):
        preview(store, {"t": reorder(np.arange(10), remap=False)})
    assert versions(tmp_path) == ["v000001", "v000002"]


def test_damage_is_not_given_a_new_checksum(tmp_path):
    rows = 3 * CHUNK // 16
    _write(tmp_path, np.ones((rows, 4), np.float32))
    path = tmp_path / "v000001" / "00000.rows"
    with open_store(tmp_path) as store:
        with open(path, "r+b") as file:
            file.seek(4096 + CHUNK + 5)
            file.write(b"\7")
        with pytest.raises(CorruptTable, match="of table 't' are not those that were written"):
            rewrite(store, tmp_path / "new", reencode("int8"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["LOCK"]


def test_a_disk_without_room_for_buckets_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transforms, "_write", full)
    _write(tmp_path, _values(50))
    with open_store(tmp_path) as store, pytest.raises(DiskFull):
        rewrite(store, tmp_path, {"t": reorder(np.arange(50)[::-1])}, memory=100)
    assert versions(tmp_path) == ["v000001"]
