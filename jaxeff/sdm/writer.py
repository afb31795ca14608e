"""Writing a version of a store by streaming, and publishing it at one instant while others read.

The files are written in a hidden folder, with their checksums, and made durable; the folder gets its name; last the
file `CURRENT` is replaced by one that names it. Whatever happens before that instant, the version of before is served:
an error removes what was written, and what a killed writer left is removed by the next.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import warnings
import zlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from jaxeff.sdm import encoding
from jaxeff.sdm.disk import Disk, writing
from jaxeff.sdm.stored_file import (
    CHUNK,
    DATA_OFFSET,
    DiskFull,
    NoStore,
    StoreBusy,
    StoredFile,
    StoreError,
    header_bytes,
)
from jaxeff.sdm.table import Manifest, RowPlacement, Table, TableSpec, check_packing, describe, open_store, remap_dtype
from jaxeff.sdm.versions import CURRENT, LOCK, MANIFEST, current_version, version_name, version_number, versions

_WRITING, _PRUNED, _NEXT = ".writing-", ".pruned-", ".CURRENT"
# Rows are encoded in pieces that stay in a cache of the processor.
_PIECE = 1 << 20


class Writer:
    """Writes one version; use it in a `with` statement, `add` every table, then `publish`.

    A block that is left without `publish`, by an error or not, leaves nothing behind.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        block: int = 4096,
        packing: str = "dense",
        *,
        keep: int = 2,
        disk: Disk | None = None,
    ) -> None:
        """Describes the version; nothing is written before the `with` statement.

        Args:
          folder: the folder of the store; made when there is none.
          block: smallest read of the device, 512 or 4096 bytes. Matters to "block" packing, and readers are told it.
          packing: "dense", or "block" where no row may straddle two blocks.
          keep: how many of the newest versions stay, this one included; older ones go once nobody reads them.
          disk: the steps it takes, those of this computer by default.

        Raises:
          ValueError: for another block or packing, or a `keep` below 1.
        """
        check_packing(block, packing)
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, the version that is written, got {keep}")
        self.folder = pathlib.Path(folder).absolute()
        self.block, self.packing, self.keep = block, packing, keep
        self._disk = disk or Disk()
        self._lock: BinaryIO | None = None
        self._tables: list[Table] = []
        self._state = "closed"

    def __enter__(self) -> Writer:
        """Locks the store, removes what a killed writer left, and begins the next version.

        Raises:
          StoreBusy: another writer is at work.
          CorruptTable: `CURRENT` names no version.
          WriteError, DiskFull: the folder cannot be written.
        """
        with writing(self.folder):
            new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in new:
                self._disk.sync_folder(path.parent)
            self._lock = _lock(self.folder)
            try:
                self._sweep()
                self.version = version_name(1 + max(map(version_number, versions(self.folder)), default=0))
                self._place = self.folder / (_WRITING + self.version)
                self._disk.make_folder(self._place)
            except BaseException:
                self._lock.close()
                raise
        self._tables, self._state = [], "open"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        try:
            if self._state != "published":
                self._abandon()
        finally:
            self._state = "closed"
            self._lock.close()

    def add(
        self,
        spec: TableSpec,
        chunks: Iterable[Any],
        remap: Any = None,
        *,
        stride: int | None = None,
    ) -> Table:
        """Writes a table, in memory for one of the chunks and no more.

        Args:
          spec: what it is.
          chunks: its rows in order, in arrays of any length: float [n, D] that are float32 without loss, to be encoded,
            or uint8 [n, row_bytes], encoded already.
          remap: int [ids], the row of every id, -1 for a pruned one; None where ids are rows.
          stride: bytes from one row to the next, `row_bytes` by default.

        Returns:
          The table as it will be read.

        Raises:
          TypeError, ValueError: rows that are not what `spec` says, named by their number; a second table of a name; a
            remap that is none. Nothing can be published then.
          DiskFull, WriteError: the disk takes no more.
        """
        self._check_open()
        self._state = "failed"
        if any(table.spec.name == spec.name for table in self._tables):
            raise ValueError(f"spec: there is a table {spec.name!r} already; names are unique in a store")
        rows = None if remap is None else _remap(remap, spec)
        placement = RowPlacement.of(spec.format.row_bytes, self.block, self.packing, stride)
        size = placement.size(spec.rows) + (0 if rows is None else DATA_OFFSET + rows.nbytes)
        with writing(self._place):
            if (free := self._disk.free(self._place)) < size:
                raise DiskFull(f"{self.folder}: table {spec.name!r} needs {size} bytes, {free} are free; make room")
        number = f"{len(self._tables):05d}"
        file = self._write(f"{number}.rows", describe(spec, placement), _packed(spec, placement, chunks))
        remap_file = None
        if rows is not None:
            fields = {"name": spec.name, "ids": len(rows), "dtype": rows.dtype.str}
            remap_file = self._write(f"{number}.remap", fields, [rows.view(np.uint8)])
        table = Table(spec, placement, file, rows, remap_file)
        self._tables.append(table)
        self._state = "open"
        return table

    def publish(self) -> str:
        """Makes the version the one that is served, and removes those that are too old.

        Returns:
          Its name.

        Raises:
          ValueError: nothing was added.
          DiskFull, WriteError: the disk takes no more; the version of before is served.
        """
        self._check_open()
        if not self._tables:
            raise ValueError("publish: the version has no table; add one first")
        self._state = "failed"
        manifest = Manifest(self.version, self.block, self.packing, tuple(self._tables))
        disk, final = self._disk, self.folder / self.version
        with writing(self.folder):
            self._create(self._place / MANIFEST, manifest.dump())
            disk.sync_folder(self._place)
            disk.rename(self._place, final)
            disk.sync_folder(self.folder)
            self._point(self.version)
        self._state = "published"
        self._prune()
        return self.version

    def _check_open(self) -> None:
        if self._state != "open":
            why = {"closed": "use it in a with statement", "failed": "an error came before; write the version again"}
            raise ValueError(f"writer: {why.get(self._state, 'its version is published; begin another Writer')}")

    def _write(self, name: str, fields: dict[str, Any], data: Iterable[np.ndarray]) -> StoredFile:
        """Writes a file of the version: the header last, so that no half of a file has one."""
        path, disk = self._place / name, self._disk
        head = header_bytes({"version": self.version, "file": name, **fields})
        checksums, crc, size = array("I"), 0, 0
        with writing(path), disk.create(path) as file:
            disk.write(file, bytes(DATA_OFFSET))
            for piece in _padded(data):
                left = piece.data
                size += len(left)
                disk.write(file, left)
                while len(left):
                    part = left[: CHUNK - (size - len(left)) % CHUNK]
                    left = left[len(part) :]
                    crc = zlib.crc32(part, crc)
                    if (size - len(left)) % CHUNK == 0:
                        checksums.append(crc)
                        crc = 0
            if size % CHUNK:
                checksums.append(crc)
            disk.write(file, head, 0)
            disk.sync(file)
        return StoredFile(path, DATA_OFFSET + size, zlib.crc32(head), np.frombuffer(checksums, np.uint32))

    def _create(self, path: pathlib.Path, content: bytes) -> None:
        with self._disk.create(path) as file:
            self._disk.write(file, content)
            self._disk.sync(file)

    def _point(self, version: str) -> None:
        self._create(self.folder / _NEXT, f"{version}\n".encode())
        self._disk.rename(self.folder / _NEXT, self.folder / CURRENT)
        self._disk.sync_folder(self.folder)

    def _sweep(self) -> None:
        """Removes what writers left that were killed: hidden folders, and versions that were never served."""
        for path in self.folder.iterdir():
            if path.name.startswith((_WRITING, _PRUNED)) or path.name == _NEXT:
                self._disk.remove(path)
        try:
            current = version_number(current_version(self.folder))
        except NoStore:
            return
        for version in versions(self.folder):
            if version_number(version) > current:
                self._remove(version)

    def _prune(self) -> None:
        for version in versions(self.folder)[: -self.keep]:
            try:
                self._remove(version)
            except OSError as error:
                warnings.warn(
                    f"{self.version} is published, but {version} could not be removed ({error}); remove the folder, "
                    f"or let the next writer try, in {self.folder}",
                    stacklevel=3,
                )

    def _remove(self, version: str) -> None:
        """Removes a version, unless somebody reads it."""
        path, hidden = self.folder / version, self.folder / (_PRUNED + version)
        lock = None
        try:
            try:
                lock = open(path / MANIFEST, "rb")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                pass  # nobody can open it
            except OSError:
                return
            self._disk.rename(path, hidden)
            # Else a loss of power could bring the name back over what is left of the folder.
            self._disk.sync_folder(self.folder)
            self._disk.remove(hidden)
        finally:
            if lock:
                lock.close()

    def _abandon(self) -> None:
        try:
            served = current_version(self.folder) == self.version
        except StoreError:
            served = False
        self._disk.remove(self._place)
        self._disk.remove(self.folder / _NEXT)
        # An error while CURRENT was replaced may have come before or after it was.
        if not served:
            self._disk.remove(self.folder / self.version)


def roll_back(folder: str | os.PathLike[str], version: str, *, disk: Disk | None = None) -> None:
    """Serves an older version again; versions after it are removed by the next writer.

    Args:
      folder: the folder of the store.
      version: the version, whose every byte is verified first.
      disk: the steps, those of this computer by default.

    Raises:
      NoStore, CorruptTable, TruncatedTable: there is no such version, or it is damaged.
      StoreBusy: a writer is at work.
      DiskFull, WriteError: `CURRENT` cannot be replaced.
    """
    writer = Writer(folder, disk=disk)
    with open_store(folder, version, verify="all"), writing(writer.folder), _lock(writer.folder):
        writer._disk.remove(writer.folder / _NEXT)
        writer._point(version)


def _lock(folder: pathlib.Path) -> BinaryIO:
    lock = open(folder / LOCK, "a+b")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().decode("utf-8", "replace").strip() or "unknown"
        lock.close()
        raise StoreBusy(f"{folder}: another writer (process {holder}) is at work; wait until it is done") from error
    except OSError:
        lock.close()
        raise
    # For the message of the next one only; the lock itself goes with the process.
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n".encode())
    lock.flush()
    return lock


def _remap(remap: Any, spec: TableSpec) -> np.ndarray:
    values = np.asarray(remap)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise TypeError(
            f"remap: expected integers [ids] for table {spec.name!r}, got {values.dtype} of shape {list(values.shape)}"
        )
    if len(values) and not (-1 <= values.min() and values.max() < spec.rows):
        raise ValueError(
            f"remap: values {values.min()} .. {values.max()} of table {spec.name!r}, expected its rows, "
            f"0 .. {spec.rows - 1}, or -1 for a pruned id"
        )
    return np.ascontiguousarray(values, remap_dtype(spec.rows))


def _packed(spec: TableSpec, placement: RowPlacement, chunks: Iterable[Any]) -> Iterator[np.ndarray]:
    """Bytes of a table from its rows, in whole units but for the last piece."""
    per_unit, written = placement.rows_per_unit, 0
    carried = np.empty((0, spec.format.row_bytes), np.uint8)
    for rows in _encoded(spec, chunks):
        written += len(rows)
        if len(carried):
            rows = np.concatenate([carried, rows])
        whole = len(rows) // per_unit * per_unit
        # A copy, as whoever gives the chunks may use their memory again.
        carried = rows[whole:].copy()
        yield placement.pack(rows[:whole])
    if written != spec.rows:
        raise ValueError(f"chunks: table {spec.name!r} has {spec.rows} rows, {written} came")
    yield placement.pack(carried)


def _encoded(spec: TableSpec, chunks: Iterable[Any]) -> Iterator[np.ndarray]:
    """Stored rows in pieces of bounded size, uint8 [n, row_bytes]; every row is checked."""
    fmt, first = spec.format, 0
    pieces = max(1, _PIECE // (4 * fmt.dim))
    for chunk in chunks:
        if getattr(chunk, "ndim", None) != 2:
            raise ValueError(
                f"chunks: table {spec.name!r}: expected arrays of rows [n, {fmt.dim}], got "
                f"{type(chunk).__name__} of shape {list(getattr(chunk, 'shape', ()))}"
            )
        if first + len(chunk) > spec.rows:
            raise ValueError(
                f"chunks: table {spec.name!r} has {spec.rows} rows, more came: at least {first + len(chunk)}"
            )
        for begin in range(0, len(chunk), pieces):
            values = np.asarray(chunk[begin : begin + pieces])
            try:
                if values.dtype == np.uint8:
                    encoding.check_rows(values, fmt, first_row=first)
                    rows = values
                else:
                    rows = encoding.encode(_float32(values), fmt, first_row=first)
            except (TypeError, ValueError) as error:
                raise type(error)(f"chunks: table {spec.name!r}: {error}") from error
            first += len(rows)
            yield rows


def _float32(values: np.ndarray) -> np.ndarray:
    # Half precision, NumPy's or JAX's, is float32 without loss.
    return values.astype(np.float32) if values.dtype.itemsize == 2 and values.dtype.kind in "fV" else values


def _padded(data: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The pieces, and zeros to a multiple of 4096, so that a direct read at the end is whole."""
    size = 0
    for piece in data:
        size += len(piece)
        if len(piece):
            yield piece
    if size % DATA_OFFSET:
        yield np.zeros(-size % DATA_OFFSET, np.uint8)
