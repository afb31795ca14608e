"""Click logs in files against a parser that splits line by line."""

import gzip
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.dlrm.click_files import LAYOUTS, read_clicks

CRITEO, AVAZU = LAYOUTS["criteo"], LAYOUTS["avazu"]


def criteo_lines(count, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        dense = [str(rng.integers(-3, 10**6)) if rng.random() < 0.8 else "" for _ in range(13)]
        tables = [f"{rng.integers(0, 2**32):08x}" if rng.random() < 0.8 else "" for _ in range(26)]
        lines.append("\t".join([str(rng.integers(0, 2)), *dense, *tables]))
    return lines


def avazu_lines(count):
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        hashed = [f"{rng.integers(0, 2**32):08x}" for _ in range(9)]
        rows.append([f"1000{number}0000371904215119486", str(number % 2), "14102100", "1005", "0", *hashed,
                     "1", "0", "15706", "320", "50", "1722", "0", "35", "-1", "79"])  # fmt: skip
    return [",".join(AVAZU.fields), *(",".join(row) for row in rows)]


def expected(lines, layout, rows):
    """Line by line."""
    found = {"dense": [], "ids": [], "label": []}
    for line in lines:
        fields = dict(zip(layout.fields, line.split(layout.separator), strict=True))
        found["label"].append(float(fields[layout.label]))
        found["dense"].append([math.log1p(max(int(fields[name] or 0), 0)) for name in layout.dense])
        values = [(fields[name], 16 if name in layout.hexadecimal else 10) for name in layout.tables]
        found["ids"].append([1 + int(text, base) % (rows - 1) if text else 0 for text, base in values])
    return found


def check(batches, lines, layout, rows, size):
    whole = expected(lines, layout, rows)
    assert len(batches) == len(lines) // size
    for number, batch in enumerate(batches):
        part = slice(number * size, (number + 1) * size)
        np.testing.assert_allclose(batch["dense"].reshape(size, -1), np.reshape(whole["dense"][part], (size, -1)),
                                   rtol=1e-6)  # fmt: skip
        np.testing.assert_array_equal(batch["ids"][..., 0], whole["ids"][part])
        np.testing.assert_array_equal(batch["label"], whole["label"][part])
        assert (batch["lengths"] == 1).all() and batch["lengths"].shape == (size, len(layout.tables))


@pytest.mark.parametrize("block", [1, 100, 1000, 10**6])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_are_read_whatever_the_blocks(tmp_path, block, ending):
    lines = criteo_lines(11)
    path = tmp_path / "train.txt"
    path.write_bytes(ending.join(lines).encode())  # the last line has no end
    check(list(read_clicks(path, "criteo", 1000, 2, block=block)), lines, CRITEO, 1000, 2)


def test_compressed_files_of_the_other_layout(tmp_path):
    lines = avazu_lines(7)
    path = tmp_path / "train.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    check(list(read_clicks(path, "avazu", 50, 3, block=300)), lines[1:], AVAZU, 50, 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 2000))
def test_reading_begins_at_any_batch(tmp_path_factory, start, size, block):
    path = tmp_path_factory.mktemp("clicks") / "train.txt"
    path.write_text("\n".join(criteo_lines(13)) + "\n")
    whole = list(read_clicks(path, "criteo", 100, size))
    rest = list(read_clicks(path, "criteo", 100, size, start=start, block=block))
    assert len(rest) == max(len(whole) - start, 0)
    for ours, theirs in zip(rest, whole[start:], strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_each_table_may_have_its_own_rows(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(criteo_lines(50)))
    rows = np.arange(2, 28)
    (batch,) = read_clicks(path, "criteo", rows, 50)
    assert (batch["ids"][..., 0].max(0) < rows).all() and (batch["ids"] == 0).any()


@pytest.mark.parametrize(
    ("line", "change", "match"),
    [
        (3, lambda f: f[:-1], r"line 3: expected 40 fields of criteo, got 39; the line is cut off"),
        (1, lambda f: [*f, "x"], "line 1: expected 40 fields of criteo, got 41"),
        (5, lambda f: ["2", *f[1:]], r"line 5, field 1 \(label\): a label is 0 or 1, got '2'"),
        (5, lambda f: ["", *f[1:]], r"line 5, field 1 \(label\): a label is 0 or 1, got ''"),
        (2, lambda f: [f[0], "1.5", *f[2:]], r"line 2, field 2 \(I1\): expected an integer .*, got '1.5'"),
        (2, lambda f: [f[0], "-", *f[2:]], r"line 2, field 2 \(I1\): expected an integer .*, got '-'"),
        (4, lambda f: [*f[:-1], "12345678g"], r"line 4, field 40 \(C26\): expected a hexadecimal number of at most 8"),
        (4, lambda f: [*f[:-1], "-1"], r"line 4, field 40 \(C26\): expected a hexadecimal"),
        (6, lambda f: [""], "line 6: expected 40 fields of criteo, got 1"),
    ],
)
@pytest.mark.parametrize("start", [0, 1])
def test_a_wrong_line_is_named(tmp_path, line, change, match, start):
    lines = criteo_lines(8)
    lines[line - 1] = "\t".join(change(lines[line - 1].split("\t")))
    path = tmp_path / "train.txt"
    path.write_text("\n".join(lines))
    if start and line == 1:
        return  # passed over
    with pytest.raises(ValueError, match=match):
        list(read_clicks(path, "criteo", 100, 1, start=start, block=400))


def test_another_header_is_refused(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("id,hour\n1,2\n")
    with pytest.raises(ValueError, match="line 1: expected the header of avazu, id,click,hour.*got id,hour"):
        list(read_clicks(path, "avazu", 100, 1))


def test_arguments_are_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "train.txt"
    with pytest.raises(FileNotFoundError, match="path: there is no file"):
        read_clicks(path, "criteo", 100, 1)
    path.write_text("")
    for arguments, match in (
        (("csv", 100, 1), "layout: expected one of criteo, avazu, got 'csv'"),
        (("criteo", 1, 1), "rows: expected one number or 26"),
        (("criteo", [5, 5], 1), "rows: expected one number or 26"),
        (("criteo", 100, 0), "batch_size: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            read_clicks(path, *arguments)
    with pytest.raises(ValueError, match="start: expected at least 0"):
        read_clicks(path, "criteo", 100, 1, start=-1)
    assert list(read_clicks(path, "criteo", 100, 1)) == []
