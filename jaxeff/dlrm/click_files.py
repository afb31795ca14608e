"""Click logs in files of your own, of Criteo's or Avazu's layout, read in bounded memory.

Files are read in blocks of whole lines, and a block is parsed at once: where its separators are says where its fields
are, and a field of digits is a sum of columns of bytes. Files may be compressed by gzip.

Letters: N lines of a block, F fields of a line, T tables.
"""

import dataclasses
import gzip
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from jaxeff.dlrm.features import log_counts

# Bytes read at a time; the arrays made of them take some ten times as much.
BLOCK = 1 << 22
_INTEGER_DIGITS, _HEX_DIGITS = 18, 8
# What a byte is worth as a digit; 255 where it is none.
_DIGITS = np.full(256, 255, np.uint8)
for _characters, _start in ((b"0123456789", 0), (b"abcdef", 10), (b"ABCDEF", 10)):
    _DIGITS[list(_characters)] = np.arange(_start, _start + len(_characters))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the fields of a line are.

    Attributes:
      name: of the layout.
      separator: one character.
      header: whether the first line names the columns.
      fields: of all columns.
      label: the column of the label, 0 or 1.
      dense: columns of integers that are counts.
      tables: columns of categories.
      hexadecimal: those of the tables that are hexadecimal; the others are integers.
    """

    name: str
    separator: str
    header: bool
    fields: tuple[str, ...]
    label: str
    dense: tuple[str, ...]
    tables: tuple[str, ...]
    hexadecimal: frozenset[str]


_CRITEO_DENSE = tuple(f"I{number}" for number in range(1, 14))
_CRITEO_TABLES = tuple(f"C{number}" for number in range(1, 27))
_AVAZU_HASHED = (
    *("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model"),
)
_AVAZU_COUNTED = ("device_type", "device_conn_type", "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21")

LAYOUTS: dict[str, Layout] = {
    "criteo": Layout(
        *("criteo", "\t", False, ("label", *_CRITEO_DENSE, *_CRITEO_TABLES), "label"),
        *(_CRITEO_DENSE, _CRITEO_TABLES, frozenset(_CRITEO_TABLES)),
    ),
    "avazu": Layout(
        *("avazu", ",", True, ("id", "click", "hour", "C1", "banner_pos", *_AVAZU_HASHED, *_AVAZU_COUNTED), "click"),
        *((), ("hour", "C1", "banner_pos", *_AVAZU_HASHED, *_AVAZU_COUNTED), frozenset(_AVAZU_HASHED)),
    ),
}


def read_clicks(
    path: str | os.PathLike[str],
    layout: str,
    rows: int | Sequence[int],
    batch_size: int,
    *,
    start: int = 0,
    signed: bool = False,
    block: int = BLOCK,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads a click log from beginning to end, once, in batches of one size.

    Args:
      path: the file; a name that ends in .gz is decompressed.
      layout: "criteo", a tab-separated line of a label, 13 counts and 26 hexadecimal categories, any of which may be
        empty; "avazu", comma-separated with a header, its `id` not read.
      rows: of every table, or of each. A category is row 1 + value modulo (rows - 1); row 0 is one that is missing.
      batch_size: lines of a batch; those at the end that do not fill one are left out.
      start: batches to pass over, for who resumes; they are not parsed.
      signed: as in `jaxeff.dlrm.features.log_counts`.
      block: bytes that are read at a time.

    Returns:
      Iterator over {"dense" float32 [B, n_d], "ids" int32 [B, T, 1], "lengths" int32 [B, T], "label" float32 [B]}.

    Raises:
      ValueError: at once for an unknown layout or numbers out of range; while it reads for a line that is not of the
        layout, by its number and that of the field.
      FileNotFoundError: at once, if there is no such file.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    of = LAYOUTS[layout]
    each = np.full(len(of.tables), rows) if isinstance(rows, int) else np.asarray(rows)
    if each.shape != (len(of.tables),) or each.min() < 2 or each.max() >= 2**31:
        raise ValueError(f"rows: expected one number or {len(of.tables)}, each from 2 to 2^31 - 1, got {rows}")
    for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("block", block, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    return _batches(path, of, each.astype(np.int64), batch_size, start, signed, block)


def _batches(path, layout, rows, batch_size, start, signed, block):
    kept: list[dict[str, np.ndarray]] = []
    waiting, skip = 0, start * batch_size
    with _opened(path) as file:
        line = 1
        if layout.header:
            _check_header(file.readline(), layout, path)
            line = 2
        for text in _blocks(file, block):
            count = int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("\n")))
            if skip >= count:
                skip, line = skip - count, line + count
                continue
            if skip:
                ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
                text, line, count, skip = text[ends[skip - 1] + 1 :], line + skip, count - skip, 0
            kept.append(_examples(text, layout, rows, signed, path, line))
            line, waiting = line + count, waiting + count
            if waiting < batch_size:
                continue
            whole = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
            full = waiting - waiting % batch_size
            for begin in range(0, full, batch_size):
                yield {name: array[begin : begin + batch_size] for name, array in whole.items()}
            kept, waiting = [{name: array[full:] for name, array in whole.items()}], waiting - full


def _opened(path: pathlib.Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The rest of a file in whole lines, each with its end."""
    rest = b""
    while read := file.read(size):
        head, found, tail = read.rpartition(b"\n")
        if found:
            yield (rest + head + found).replace(b"\r\n", b"\n")
            rest = tail
        else:
            rest += read
    if rest:
        yield rest.removesuffix(b"\r") + b"\n"


def _check_header(text: bytes, layout: Layout, path: pathlib.Path) -> None:
    names = text.decode(errors="replace").strip().split(layout.separator)
    if tuple(names) != layout.fields:
        raise ValueError(f"{path}, line 1: expected the header of {layout.name}, {','.join(layout.fields)}, got "
                         f"{','.join(names)[:200]}")  # fmt: skip


def _examples(
    text: bytes, layout: Layout, rows: np.ndarray, signed: bool, path: pathlib.Path, line: int
) -> dict[str, np.ndarray]:
    fields = _Fields(text, layout, path, line)
    label, no_label = fields.numbers([layout.label], 10)
    bad = no_label | (label < 0) | (label > 1)
    if bad.any():
        fields.refuse(bad, [layout.label], "a label is 0 or 1")
    dense, missing = fields.numbers(layout.dense, 10)
    ids = np.zeros((fields.lines, len(layout.tables)), np.int32)
    for base in (10, 16):
        columns = [name for name in layout.tables if (name in layout.hexadecimal) == (base == 16)]
        at = [layout.tables.index(name) for name in columns]
        values, absent = fields.numbers(columns, base)
        ids[:, at] = np.where(absent, 0, 1 + values % (rows[at] - 1))
    return {
        "dense": log_counts(dense, missing, signed=signed),
        "ids": ids[..., None],
        "lengths": np.ones(ids.shape, np.int32),
        "label": label[:, 0].astype(np.float32),
    }


class _Fields:
    """The fields of whole lines: where each begins and ends."""

    def __init__(self, text: bytes, layout: Layout, path: pathlib.Path, line: int):
        self._layout, self._path, self._line = layout, path, line
        # Room behind the end for who reads a field at its full width.
        self._bytes = np.frombuffer(text + bytes(_INTEGER_DIGITS + 1), np.uint8)
        body = self._bytes[: len(text)]
        ends = np.flatnonzero((body == ord("\n")) | (body == ord(layout.separator)))
        breaks = np.flatnonzero(body[ends] == ord("\n"))
        counts = np.diff(breaks, prepend=-1)
        if (counts != len(layout.fields)).any():
            at = int((counts != len(layout.fields)).argmax())
            raise ValueError(
                f"{path}, line {line + at}: expected {len(layout.fields)} fields of {layout.name}, got {counts[at]}; "
                "the line is cut off, or the file of another layout"
            )
        self.lines = len(breaks)
        self._ends = ends.reshape(self.lines, len(layout.fields))
        self._begins = np.concatenate([[0], ends[:-1] + 1]).reshape(self._ends.shape)

    def numbers(self, names: Sequence[str], base: int) -> tuple[np.ndarray, np.ndarray]:
        """Values int64 [N, len(names)] of columns, and which of them are missing."""
        columns = [self._layout.fields.index(name) for name in names]
        begins, ends = self._begins[:, columns], self._ends[:, columns]
        missing = begins == ends
        negative = ~missing & (self._bytes[begins] == ord("-")) if base == 10 else np.zeros(begins.shape, bool)
        begins = begins + negative
        widths = ends - begins
        most = _INTEGER_DIGITS if base == 10 else _HEX_DIGITS
        wrong = (widths > most) | (negative & (widths == 0))
        values = np.zeros(begins.shape, np.int64)
        for place in range(min(int(widths.max(initial=0)), most)):
            inside = place < widths
            digits = _DIGITS[self._bytes[np.where(inside, begins + place, 0)]]
            wrong |= inside & (digits >= base)
            values = np.where(inside, values * base + digits, values)
        if wrong.any():
            what = "an integer" if base == 10 else "a hexadecimal number"
            self.refuse(wrong, names, f"expected {what} of at most {most} digits")
        return np.where(negative, -values, values), missing

    def refuse(self, wrong: np.ndarray, names: Sequence[str], why: str) -> None:
        row, column = np.argwhere(wrong)[0]
        at = self._layout.fields.index(names[column])
        field = self._bytes[self._begins[row, at] : self._ends[row, at]].tobytes().decode(errors="replace")
        raise ValueError(
            f"{self._path}, line {self._line + row}, field {at + 1} ({names[column]}): {why}, got {field[:40]!r}"
        )
