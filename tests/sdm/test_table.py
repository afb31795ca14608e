import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm.encoding import RowFormat, decode, encode
from jaxeff.sdm.stored_file import (
    CHUNK,
    CorruptTable,
    NoStore,
    StoreError,
    TruncatedTable,
    UnknownFormat,
    read_header,
)
from jaxeff.sdm.table import RowPlacement, TableSpec, open_store
from jaxeff.sdm.versions import current_version, versions
from jaxeff.sdm.writer import Writer


def _values(rows, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def _store(folder, rows=300, *, packing="dense", block=512, remap=None, dim=6):
    with Writer(folder, block, packing) as writer:
        writer.add(TableSpec("user", rows, RowFormat("int8", dim)), [_values(rows, dim)], remap)
        writer.add(TableSpec("item", rows + 7, RowFormat("float32", dim)), [_values(rows + 7, dim, 1)])
        return writer.publish()


def _flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("packing", ["dense", "block"])
@pytest.mark.parametrize("block", [512, 4096])
def test_located_bytes_are_the_rows(tmp_path, packing, block):
    _store(tmp_path, packing=packing, block=block)
    with open_store(tmp_path, verify="all") as store:
        assert (store.version, store.block, store.packing) == ("v000001", block, packing)
        assert [table.spec.name for table in store.tables] == ["user", "item"]
        rng = np.random.default_rng(3)
        tables = rng.integers(0, 2, 200)
        rows = rng.integers(0, 300, 200)
        files, offsets = store.locate(tables, rows)
        assert (files.dtype, offsets.dtype) == (np.int32, np.int64)
        contents = [path.read_bytes() for path in store.paths]
        expected = [encode(_values(300, 6), RowFormat("int8", 6)), encode(_values(307, 6, 1), RowFormat("float32", 6))]
        for table, row, file, offset in zip(tables, rows, files, offsets, strict=True):
            found = contents[file][offset : offset + store.tables[table].spec.format.row_bytes]
            assert found == expected[table][row].tobytes()
            if packing == "block":
                assert offset // block == (offset + len(found) - 1) // block
        np.testing.assert_array_equal(store.tables[1].placement.offsets(rows), store.locate(np.ones(200, int), rows)[1])
        for table in store.tables:
            assert table.size == os.path.getsize(table.path)
            assert table.size % 4096 == table.data_offset % 4096 == 0


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 9000),
    st.integers(1, 40),
    st.sampled_from([512, 4096]),
    st.sampled_from(["dense", "block"]),
    st.data(),
)
def test_placement_puts_every_row_where_it_says(row_bytes, rows, block, packing, data):
    stride = data.draw(st.none() | st.integers(row_bytes, row_bytes + 600))
    placement = RowPlacement.of(row_bytes, block, packing, stride)
    content = np.random.default_rng(0).integers(0, 256, (rows, row_bytes), np.uint8)
    packed = placement.pack(content)
    offsets = placement.offsets(np.arange(rows))
    assert placement.size(rows) >= 4096 + len(packed) > placement.size(rows) - 4096
    for row, offset in enumerate(offsets):
        np.testing.assert_array_equal(packed[offset - 4096 : offset - 4096 + row_bytes], content[row])
        blocks = offset // block, (offset + row_bytes - 1) // block
        if packing == "block":
            assert blocks[1] - blocks[0] == (row_bytes - 1) // block
    np.testing.assert_array_equal(placement.unpack(packed, row_bytes)[:rows], content)


def test_rows_beyond_int32_are_located(tmp_path):
    rows = np.array([0, 2**31, 2**40 - 1])
    assert RowPlacement.of(520, 4096).offsets(rows).tolist() == [4096 + 520 * int(row) for row in rows]
    assert RowPlacement.of(500, 4096, "block").offsets(rows).tolist() == [
        4096 + int(row) // 8 * 4096 + int(row) % 8 * 500 for row in rows
    ]
    assert TableSpec("t", 2**40, RowFormat("int8", 512)).rows == 2**40
    with pytest.raises(ValueError, match=r"rows: expected an integer in 0 .. 2\*\*40"):
        TableSpec("t", 2**40 + 1, RowFormat("int8", 512))


def test_a_table_is_streamed_in_order(tmp_path):
    # Rows of 44 bytes straddle the chunks of 1 MiB.
    values = _values(60_000, 11)
    for packing in ("dense", "block"):
        with Writer(tmp_path, 512, packing) as writer:
            writer.add(TableSpec("t", 60_000, RowFormat("float32", 11)), [values], stride=50)
            writer.publish()
        with open_store(tmp_path) as store:
            fmt = store.tables[0].spec.format
            np.testing.assert_array_equal(np.concatenate([decode(r, fmt) for r in store.tables[0].stream()]), values)


def test_remap_says_where_ids_are(tmp_path):
    remap = [2, -1, 0, 299, -1]
    _store(tmp_path, remap=remap)
    with open_store(tmp_path) as store:
        table, plain = store.tables
        assert table.remap.dtype == np.int32 and not table.remap.flags.writeable
        assert table.remap.tolist() == remap
        assert table.positions(np.array([3, 1, 0])).tolist() == [299, -1, 2]
        assert (table.ids, table.fast_bytes) == (5, 20)
        assert plain.remap is None and plain.positions(np.array([5])).tolist() == [5]
        assert (plain.ids, plain.fast_bytes) == (307, 0)


def test_tables_have_numbers_by_name(tmp_path):
    _store(tmp_path)
    with open_store(tmp_path) as store:
        assert store.index("item") == 1
        with pytest.raises(KeyError, match="no table 'x'.*user, item"):
            store.index("x")


def test_a_file_says_what_it_is(tmp_path):
    version = _store(tmp_path)
    fields = read_header(tmp_path / version / "00000.rows")
    assert (fields["name"], fields["rows"], fields["kind"], fields["dim"]) == ("user", 300, "int8", 6)
    with pytest.raises(CorruptTable, match="whole header"):
        read_header(tmp_path / version / "manifest.json")


@pytest.mark.parametrize("verify", ["quick", "all"])
@pytest.mark.parametrize("packing", ["dense", "block"])
@pytest.mark.parametrize("remap", [None, np.zeros(0, int), np.array([-1, -1])])
def test_a_table_without_rows_is_opened(tmp_path, packing, verify, remap):
    _store(tmp_path, 0, packing=packing, remap=remap)
    with open_store(tmp_path, verify=verify) as store:
        table = store.tables[0]
        assert (table.spec.rows, table.size, table.ids) == (0, 4096, 0 if remap is None else len(remap))
        np.testing.assert_array_equal(table.remap, remap)
        assert list(table.stream()) == []
        nothing = np.zeros(0, np.int64)
        files, offsets = store.locate(nothing, nothing)
        assert (files.dtype, files.shape, offsets.dtype, offsets.shape) == (np.int32, (0,), np.int64, (0,))
        assert table.positions(nothing).shape == (0,)
        # The other table is as ever.
        rows = np.concatenate(list(store.tables[1].stream()))
        np.testing.assert_array_equal(decode(rows, RowFormat("float32", 6)), _values(7, 6, 1))


@pytest.mark.parametrize("kept", [0, 100, 4096, 8192, -1])
def test_a_truncated_file_is_found_at_open(tmp_path, kept):
    path = tmp_path / _store(tmp_path, 4000) / "00000.rows"
    size = os.path.getsize(path)
    os.truncate(path, kept if kept >= 0 else size - 1)
    with pytest.raises(TruncatedTable, match=r"00000.rows: table 'user' has \d+ bytes, expected 61440"):
        open_store(tmp_path)


def test_a_missing_file_is_found_at_open(tmp_path):
    (tmp_path / _store(tmp_path) / "00001.rows").unlink()
    with pytest.raises(TruncatedTable, match="the file of table 'item' is missing"):
        open_store(tmp_path)


def test_torn_chunks_are_found(tmp_path):
    rows = 3 * CHUNK // 16
    with Writer(tmp_path) as writer:
        writer.add(TableSpec("t", rows, RowFormat("float32", 4)), [np.ones((rows, 4), np.float32)])
        version = writer.publish()
    path = tmp_path / version / "00000.rows"
    for chunk, quick in ((0, True), (1, False), (2, True)):
        offset = 4096 + chunk * CHUNK + 77
        _flip(path, offset)
        with pytest.raises(CorruptTable, match=f"bytes {4096 + chunk * CHUNK} .. .* of table 't'"):
            open_store(tmp_path, verify="all")
        if quick:
            with pytest.raises(CorruptTable):
                open_store(tmp_path)
        else:
            with open_store(tmp_path) as store, pytest.raises(CorruptTable):
                list(store.tables[0].stream())
        _flip(path, offset)
    open_store(tmp_path, verify="all").close()


@pytest.mark.parametrize("offset", [0, 9, 30, 4000, 4095])
def test_a_damaged_header_is_found_at_open(tmp_path, offset):
    _flip(tmp_path / _store(tmp_path) / "00001.rows", offset)
    with pytest.raises(CorruptTable, match="the header of table 'item' is damaged"):
        open_store(tmp_path)


def test_a_damaged_remap_is_found_at_open(tmp_path):
    path = tmp_path / _store(tmp_path, 300, remap=np.arange(300)) / "00000.remap"
    _flip(path, 4100)
    with pytest.raises(CorruptTable, match="remap of table 'user'"):
        open_store(tmp_path)


def test_a_damaged_byte_of_a_manifest_is_found_or_means_nothing(tmp_path):
    path = tmp_path / _store(tmp_path) / "manifest.json"
    content = path.read_bytes()
    expected = json.loads(content)
    for offset in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[offset] ^= 1
        path.write_bytes(damaged)
        try:
            open_store(tmp_path).close()
        except CorruptTable:
            continue
        assert json.loads(damaged)["manifest"] == expected["manifest"]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptTable, match="manifest.json is damaged"):
        open_store(tmp_path)


def test_files_of_another_table_are_not_taken(tmp_path):
    folder = tmp_path / _store(tmp_path)
    os.rename(folder / "00000.rows", folder / "x")
    os.rename(folder / "00001.rows", folder / "00000.rows")
    os.rename(folder / "x", folder / "00001.rows")
    with pytest.raises(StoreError):
        open_store(tmp_path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr("jaxeff.sdm.table.FORMAT", 2)
        newer.setattr("jaxeff.sdm.stored_file.FORMAT", 2)
        version = _store(tmp_path)
    with pytest.raises(UnknownFormat, match="has format 2, this jaxeff reads 1; install a newer one"):
        open_store(tmp_path)
    with pytest.raises(UnknownFormat, match="has format 2"):
        read_header(tmp_path / version / "00000.rows")


def test_what_is_no_store_is_said(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NoStore, match="nothing was published in it"):
            open_store(folder)
    assert isinstance(NoStore(), FileNotFoundError)
    _store(tmp_path)
    with pytest.raises(NoStore, match="has no version 'v000007'; there are v000001"):
        open_store(tmp_path, "v000007")
    (tmp_path / "CURRENT").write_text("v000003\n")
    with pytest.raises(NoStore, match="no version 'v000003', which CURRENT names; there are v000001"):
        open_store(tmp_path)
    for damaged in ("", "v1", "v000001v", "../v000001", "\xff"):
        (tmp_path / "CURRENT").write_text(damaged)
        with pytest.raises(CorruptTable, match="expected the name of a version; write one of .*v000001"):
            current_version(tmp_path)
    open_store(tmp_path, "v000001").close()
    with pytest.raises(ValueError, match='verify: expected "quick" or "all"'):
        open_store(tmp_path, verify="none")


def test_a_renamed_version_is_refused(tmp_path):
    _store(tmp_path)
    os.rename(tmp_path / "v000001", tmp_path / "v000002")
    with pytest.raises(CorruptTable, match="manifest is that of v000001"):
        open_store(tmp_path, "v000002")


def test_a_reader_learns_of_a_newer_version_and_keeps_its_own(tmp_path):
    _store(tmp_path)
    with open_store(tmp_path) as old:
        assert old.newer() is None
        with Writer(tmp_path, keep=1) as writer:
            writer.add(TableSpec("user", 2, RowFormat("float32", 3)), [_values(2, 3)])
            writer.publish()
        assert old.newer() == "v000002"
        # Held, so not removed, though only one version is to stay.
        assert versions(tmp_path) == ["v000001", "v000002"]
        old.tables[0].file.check("table", everything=True)
        with open_store(tmp_path) as new:
            assert (new.version, new.newer()) == ("v000002", None)
    with Writer(tmp_path, keep=1) as writer:
        writer.add(TableSpec("user", 2, RowFormat("float32", 3)), [_values(2, 3)])
        writer.publish()
    assert versions(tmp_path) == ["v000003"]


def test_a_version_that_goes_while_it_is_opened_gives_way_to_the_newest(tmp_path, monkeypatch):
    from jaxeff.sdm import versions as module

    _store(tmp_path)
    real, calls = module.current_version, []

    def slow(folder):
        name = real(folder)
        if not calls:
            calls.append(name)
            with Writer(tmp_path, keep=1) as writer:
                writer.add(TableSpec("user", 2, RowFormat("float32", 3)), [_values(2, 3)])
                writer.publish()
        return name

    monkeypatch.setattr(module, "current_version", slow)
    with open_store(tmp_path) as store:
        assert store.version == "v000002"
    assert calls == ["v000001"] and versions(tmp_path) == ["v000002"]


def test_names_are_one_line(tmp_path):
    for name in ("", "a\nb", "x" * 2000, 3):
        with pytest.raises(ValueError, match="name: expected one line"):
            TableSpec(name, 1, RowFormat("int8", 4))
    for bad in ({"block": 1024}, {"packing": "loose"}):
        with pytest.raises(ValueError, match="block: expected 512 or 4096|packing: expected"):
            RowPlacement.of(8, **({"block": 512} | bad))
    with pytest.raises(ValueError, match="stride: rows of 8 bytes cannot lie 7 bytes apart"):
        RowPlacement.of(8, 512, stride=7)
