"""Tables of embedding rows in a folder: the format, how a version is opened and verified, and where a row lies.

A store is a folder. `CURRENT` names its newest version, and a version is a folder that never changes:

    CURRENT                    "v000002"
    LOCK                       held by the one writer there may be
    v000002/manifest.json      tables, where their rows lie, checksums of every chunk, and a checksum of itself
    v000002/00000.rows         header of 4096 bytes (with its checksum), rows, zeros up to a multiple of 4096
    v000002/00000.remap        where there is one: the same, of integers

Rows lie in units: `rows_per_unit` of them, `stride` bytes apart, from the beginning of a unit of `unit` bytes. A dense
table has units of one row. Checksums are CRC-32, of chunks of 1 MiB after the header. All numbers are little endian.

Whoever reads a version holds a shared lock on its manifest, and a writer removes no version that is held.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

import numpy as np

from jaxeff.sdm.encoding import RowFormat
from jaxeff.sdm.stored_file import DATA_OFFSET, FORMAT, CorruptTable, StoredFile, UnknownFormat, read_header
from jaxeff.sdm.versions import MANIFEST, current_version, hold

MAX_ROWS = 1 << 40
BLOCKS = (512, 4096)

_LONGEST_NAME = 1024


@dataclass(frozen=True)
class TableSpec:
    """One table.

    Attributes:
      name: any text without line breaks, unlike that of every other table of the store.
      rows: rows in the file, up to 2**40.
      format: how they are stored.
    """

    name: str
    rows: int
    format: RowFormat

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 1 <= len(self.name.encode()) <= _LONGEST_NAME or "\n" in self.name:
            raise ValueError(f"name: expected one line of 1 .. {_LONGEST_NAME} bytes, got {self.name!r}")
        if isinstance(self.rows, bool) or not isinstance(self.rows, int | np.integer) or not 0 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows: expected an integer in 0 .. 2**40, got {self.rows!r} for table {self.name!r}")
        object.__setattr__(self, "rows", int(self.rows))


@dataclass(frozen=True)
class RowPlacement:
    """Where the rows of a table lie after its header.

    Attributes:
      stride: bytes from one row of a unit to the next.
      rows_per_unit: rows of a unit.
      unit: bytes of a unit.
    """

    stride: int
    rows_per_unit: int
    unit: int

    @classmethod
    def of(cls, row_bytes: int, block: int, packing: str = "dense", stride: int | None = None) -> RowPlacement:
        """Places rows.

        Args:
          row_bytes: bytes of a row.
          block: smallest read of the device, 512 or 4096 bytes.
          packing: "dense", or "block" where no row may straddle two blocks (a row longer than a block starts on one).
          stride: bytes from one row to the next, at least `row_bytes`; None for `row_bytes`.

        Raises:
          ValueError: for another block or packing, or too small a stride.
        """
        check_packing(block, packing)
        stride = row_bytes if stride is None else int(stride)
        if stride < row_bytes:
            raise ValueError(f"stride: rows of {row_bytes} bytes cannot lie {stride} bytes apart")
        if packing == "dense":
            return cls(stride, 1, stride)
        if stride <= block:
            return cls(stride, block // stride, block)
        return cls(stride, 1, _up(stride, block))

    def size(self, rows: int) -> int:
        """Bytes of a file of that many rows, its header and the zeros at its end included."""
        return DATA_OFFSET + _up(-(-rows // self.rows_per_unit) * self.unit, DATA_OFFSET)

    def offsets(self, rows: np.ndarray) -> np.ndarray:
        """Where rows begin in their file, int64 [n], of int64 [n]."""
        if self.rows_per_unit == 1:
            return DATA_OFFSET + rows * np.int64(self.unit)
        units, places = np.divmod(rows, np.int64(self.rows_per_unit))
        return DATA_OFFSET + units * np.int64(self.unit) + places * np.int64(self.stride)

    def pack(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of rows that begin a unit, uint8 [units * unit], of uint8 [n, row_bytes]; the last unit may be short.

        A view of the rows where nothing lies between them.
        """
        count, row_bytes = rows.shape
        if self.unit == row_bytes:
            return np.ascontiguousarray(rows).reshape(-1)
        whole, rest = divmod(count, self.rows_per_unit)
        packed = np.zeros((whole + (rest > 0), self.unit), np.uint8)
        cells = np.lib.stride_tricks.as_strided(
            packed, (len(packed), self.rows_per_unit, row_bytes), (self.unit, self.stride, 1)
        )
        cells[:whole] = rows[: count - rest].reshape(whole, self.rows_per_unit, row_bytes)
        if rest:
            cells[whole, :rest] = rows[count - rest :]
        return packed.reshape(-1)

    def unpack(self, packed: np.ndarray, row_bytes: int) -> np.ndarray:
        """Rows of whole units, uint8 [units * rows_per_unit, row_bytes], of uint8 [units * unit]."""
        cells = packed.reshape(-1, self.unit)[:, : self.rows_per_unit * self.stride].reshape(-1, self.stride)
        return cells[:, :row_bytes]


@dataclass(frozen=True)
class Table:
    """One table of a version.

    Attributes:
      spec: what it is.
      placement: where its rows lie.
      file: its file.
      remap: int32 or int64 [ids], read-only: the row of every id, -1 for an id that was pruned and is a row of zeros;
        None where ids are rows.
      remap_file: the file of the remap.
    """

    spec: TableSpec
    placement: RowPlacement
    file: StoredFile
    remap: np.ndarray | None = field(default=None, compare=False, repr=False)
    remap_file: StoredFile | None = None

    @property
    def path(self) -> pathlib.Path:
        """The file of the rows."""
        return self.file.path

    @property
    def size(self) -> int:
        """Bytes of that file."""
        return self.file.size

    @property
    def data_offset(self) -> int:
        """Where the first row lies, a multiple of 4096."""
        return DATA_OFFSET

    @property
    def ids(self) -> int:
        """How many ids it has: its rows, or those of its remap."""
        return self.spec.rows if self.remap is None else len(self.remap)

    @property
    def fast_bytes(self) -> int:
        """Bytes of fast memory that it needs whatever is cached: its remap."""
        return 0 if self.remap is None else self.remap.nbytes

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Rows of ids, int64 [n], -1 where pruned; ids in 0 .. `ids` - 1."""
        return np.asarray(ids, np.int64) if self.remap is None else self.remap[ids].astype(np.int64)

    def stream(self) -> Iterator[np.ndarray]:
        """Yields all rows in order, their bytes verified: uint8 [n, row_bytes] arrays of about a chunk.

        Raises:
          TruncatedTable, CorruptTable: as `StoredFile.check`.
        """
        unit, left, row_bytes = self.placement.unit, self.spec.rows, self.spec.format.row_bytes
        carried = np.empty(0, np.uint8)
        for chunk in self.file.chunks(f"table {self.spec.name!r}"):
            packed = np.concatenate([carried, chunk])
            whole = len(packed) // unit * unit
            carried = packed[whole:]
            rows = self.placement.unpack(packed[:whole], row_bytes)[:left]
            left -= len(rows)
            if len(rows):
                yield rows


class Store:
    """An open version: tables, and where their rows lie. Close it, or use it in a `with` statement.

    Attributes:
      folder: the folder of the store.
      version: the name of the version, "v000001".
      tables: its tables; table t of `locate` is `tables[t]`, and so is file t.
      block: smallest read that it was written for, 512 or 4096 bytes.
      packing: "dense" or "block".
    """

    def __init__(self, folder: pathlib.Path, manifest: Manifest, tables: tuple[Table, ...], lock: BinaryIO) -> None:
        self.folder = folder
        self.version = manifest.version
        self.block = manifest.block
        self.packing = manifest.packing
        self.tables = tables
        self._lock = lock
        self._index = {table.spec.name: index for index, table in enumerate(tables)}
        places = [(table.placement.unit, table.placement.rows_per_unit, table.placement.stride) for table in tables]
        self._unit, self._per_unit, self._stride = np.array(places, np.int64).reshape(-1, 3).T.copy()
        self._single = bool((self._per_unit == 1).all())

    @property
    def paths(self) -> tuple[pathlib.Path, ...]:
        """Files of the tables, in the order of `locate`."""
        return tuple(table.path for table in self.tables)

    def index(self, name: str) -> int:
        """Number of a table.

        Raises:
          KeyError: there is none of that name.
        """
        if name not in self._index:
            raise KeyError(f"name: no table {name!r} in {self.folder}; there are {', '.join(self._index)}")
        return self._index[name]

    def locate(self, tables: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows lie.

        Args:
          tables: int [n], numbers of tables.
          rows: int [n], rows of theirs (positions, after any remap), valid.

        Returns:
          `(files, offsets)`: int32 [n], which of `paths`; int64 [n], where the row begins in it.
        """
        tables, rows = np.asarray(tables), np.asarray(rows, np.int64)
        if self._single:
            offsets = rows * self._unit[tables]
        else:
            units, places = np.divmod(rows, self._per_unit[tables])
            offsets = units * self._unit[tables] + places * self._stride[tables]
        offsets += DATA_OFFSET
        return tables.astype(np.int32), offsets

    def newer(self) -> str | None:
        """The version that `CURRENT` names now, or None while that is this one.

        Raises:
          NoStore, CorruptTable: as `current_version`.
        """
        version = current_version(self.folder)
        return None if version == self.version else version

    def close(self) -> None:
        """Lets go of the version, so that a writer may remove it; again is no error."""
        self._lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r}, version={self.version!r}, tables={len(self.tables)})"


def open_store(
    folder: str | os.PathLike[str], version: str | None = None, verify: Literal["quick", "all"] = "quick"
) -> Store:
    """Opens a version of a store, after verifying it.

    Args:
      folder: the folder of the store.
      version: its name; None for the one that `CURRENT` names.
      verify: "quick" for the manifest, and of every file its size, its header and its first and last chunk; "all" for
        every chunk. Remaps are read, and so verified, in full.

    Raises:
      NoStore: no store or no such version, or `CURRENT` names one that is not there.
      TruncatedTable, CorruptTable: a file is not what was written.
      UnknownFormat: the format is a newer one.
      ValueError: for another `verify`.
    """
    if verify not in ("quick", "all"):
        raise ValueError(f'verify: expected "quick" or "all", got {verify!r}')
    folder = pathlib.Path(folder).absolute()
    lock, name = hold(folder, version)
    try:
        manifest = Manifest.parse(lock.read(), folder / name)
        if manifest.version != name:
            raise CorruptTable(f"{folder / name}: its manifest is that of {manifest.version}; was a folder renamed?")
        tables = tuple(_opened(table, verify == "all") for table in manifest.tables)
        return Store(folder, manifest, tables, lock)
    except BaseException:
        lock.close()
        raise


@dataclass(frozen=True)
class Manifest:
    """What a version says about itself.

    Attributes:
      version: its name.
      block: smallest read that it was written for, in bytes.
      packing: "dense" or "block".
      tables: its tables, remaps not loaded.
    """

    version: str
    block: int
    packing: str
    tables: tuple[Table, ...]

    def dump(self) -> bytes:
        """The manifest as JSON, with a checksum of itself."""
        content = {
            "format": FORMAT,
            "version": self.version,
            "block": self.block,
            "packing": self.packing,
            "tables": [
                {
                    **describe(table.spec, table.placement),
                    "file": table.file.fields(),
                    "remap": None if table.remap_file is None else table.remap_file.fields(),
                }
                for table in self.tables
            ],
        }
        return json.dumps({"crc32": zlib.crc32(_canonical(content)), "manifest": content}, indent=1).encode()

    @classmethod
    def parse(cls, text: bytes, folder: pathlib.Path) -> Manifest:
        """Reads the manifest of a version.

        Args:
          text: what is in the file.
          folder: the folder of the version.

        Raises:
          CorruptTable: it is not what was written.
          UnknownFormat: the format is a newer one.
        """
        path = folder / MANIFEST
        try:
            document = json.loads(text)
            content = document["manifest"]
            whole = zlib.crc32(_canonical(content)) == document["crc32"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptTable(f"{path} is damaged ({error!r}); open another version") from error
        if not whole:
            raise CorruptTable(f"{path} is damaged: its checksum is another; open another version")
        if content["format"] != FORMAT:
            raise UnknownFormat(
                f"{path} has format {content['format']}, this jaxeff reads {FORMAT}; install a newer one"
            )
        tables = tuple(
            Table(
                TableSpec(entry["name"], entry["rows"], RowFormat(entry["kind"], entry["dim"])),
                RowPlacement(entry["stride"], entry["rows_per_unit"], entry["unit"]),
                StoredFile.of(folder, entry["file"]),
                remap_file=None if entry["remap"] is None else StoredFile.of(folder, entry["remap"]),
            )
            for entry in content["tables"]
        )
        return cls(content["version"], content["block"], content["packing"], tables)


def describe(spec: TableSpec, placement: RowPlacement) -> dict[str, Any]:
    """A table as JSON values, for headers and manifests."""
    return {
        "name": spec.name,
        "rows": spec.rows,
        "kind": spec.format.kind,
        "dim": spec.format.dim,
        "stride": placement.stride,
        "rows_per_unit": placement.rows_per_unit,
        "unit": placement.unit,
    }


def remap_dtype(rows: int) -> np.dtype[Any]:
    """Integers that a remap to that many rows is stored in."""
    return np.dtype("<i4" if rows < 1 << 31 else "<i8")


def check_packing(block: int, packing: str) -> None:
    """Refuses a block or packing that there is not.

    Raises:
      ValueError: for it.
    """
    if block not in BLOCKS:
        raise ValueError(f"block: expected 512 or 4096, got {block!r}")
    if packing not in ("dense", "block"):
        raise ValueError(f'packing: expected "dense" or "block", got {packing!r}')


def _opened(table: Table, everything: bool) -> Table:
    table.file.check(f"table {table.spec.name!r}", everything)
    if table.remap_file is None:
        return table
    what = f"the remap of table {table.spec.name!r}"
    table.remap_file.check(what, everything=False)
    fields = read_header(table.remap_file.path)
    remap = np.empty(fields["ids"] * np.dtype(fields["dtype"]).itemsize, np.uint8)
    begin = 0
    for chunk in table.remap_file.chunks(what):
        part = remap[begin : begin + len(chunk)]
        part[:] = chunk[: len(part)]
        begin += len(chunk)
    values = remap.view(fields["dtype"])
    values.flags.writeable = False
    return Table(table.spec, table.placement, table.file, values, table.remap_file)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
