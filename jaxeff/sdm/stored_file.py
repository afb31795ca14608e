"""A file of a store: a header that says what it is, bytes with a checksum for every chunk, and what can be wrong."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

FORMAT = 1
DATA_OFFSET = 4096
CHUNK = 1 << 20

_MAGIC = b"jaxefsdm"
_HEAD = struct.Struct("<8sII")


class StoreError(Exception):
    """Something is wrong with a store of tables."""


class NoStore(StoreError, FileNotFoundError):
    """The folder is no store, or has no such version."""


class TruncatedTable(StoreError, OSError):
    """A file of a version is missing, or has another size than it was written with."""


class CorruptTable(StoreError, OSError):
    """Bytes of a file are not those that were written."""


class WriteError(StoreError, OSError):
    """A version could not be written; nothing of it was published."""


class DiskFull(WriteError):
    """There is no room for it."""


class StoreBusy(StoreError, OSError):
    """Another writer is at work in the folder."""


class UnknownFormat(StoreError, ValueError):
    """The store was written by another version of this library."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a version, as its manifest has it.

    Attributes:
      path: the file.
      size: its bytes.
      header: CRC-32 of its header.
      checksums: uint32 [chunks], CRC-32 of every chunk after the header.
    """

    path: pathlib.Path
    size: int
    header: int
    checksums: np.ndarray = field(compare=False, repr=False)

    @classmethod
    def of(cls, folder: pathlib.Path, fields: dict[str, Any]) -> StoredFile:
        """The file of a version's folder that those JSON values describe."""
        checksums = np.frombuffer(base64.b64decode(fields["checksums"]), "<u4")
        return cls(folder / fields["path"], fields["size"], fields["header"], checksums)

    def fields(self) -> dict[str, Any]:
        """The file as JSON values."""
        checksums = base64.b64encode(self.checksums.astype("<u4").tobytes()).decode()
        return {"path": self.path.name, "size": self.size, "header": self.header, "checksums": checksums}

    def check(self, what: str, everything: bool) -> None:
        """Verifies size, header and the first and last chunk, or every chunk.

        Raises:
          TruncatedTable: it is missing or has another size.
          CorruptTable: its header or a chunk is not what was written.
        """
        with self._opened(what) as file:
            header = file.read(DATA_OFFSET)
            if zlib.crc32(header) != self.header:
                raise CorruptTable(
                    f"{self.path}: the header of {what} is damaged; restore the file, or open another version"
                )
            every = range(len(self.checksums))
            wanted = every if everything else sorted({*every[:1], *every[-1:]})
            for _ in self._chunks(file, what, wanted):
                pass

    def chunks(self, what: str) -> Iterator[np.ndarray]:
        """Yields all after the header in order, verified: uint8 arrays of a chunk, each valid until the next.

        Raises:
          TruncatedTable, CorruptTable: as `check`.
        """
        with self._opened(what) as file:
            yield from self._chunks(file, what, range(len(self.checksums)))

    def _opened(self, what: str) -> BinaryIO:
        try:
            file = open(self.path, "rb", buffering=0)
        except FileNotFoundError as error:
            raise TruncatedTable(
                f"{self.path}: the file of {what} is missing; restore it, or open another version"
            ) from error
        if (size := os.fstat(file.fileno()).st_size) != self.size:
            file.close()
            raise TruncatedTable(
                f"{self.path}: {what} has {size} bytes, expected {self.size}; restore the file, or open another version"
            )
        return file

    def _chunks(self, file: BinaryIO, what: str, wanted: Iterable[int]) -> Iterator[np.ndarray]:
        buffer = np.empty(CHUNK, np.uint8)
        for index in wanted:
            begin = DATA_OFFSET + index * CHUNK
            chunk = buffer[: min(CHUNK, self.size - begin)]
            file.seek(begin)
            filled = 0
            while filled < len(chunk):
                if not (got := file.readinto(chunk[filled:])):  # type: ignore[attr-defined]
                    raise TruncatedTable(
                        f"{self.path}: {what} ended at byte {begin + filled} of {self.size}; was it cut?"
                    )
                filled += got
            if zlib.crc32(chunk.data) != self.checksums[index]:
                raise CorruptTable(
                    f"{self.path}: bytes {begin} .. {begin + len(chunk)} of {what} are not those that were written; "
                    "restore the file, or open another version"
                )
            yield chunk


def header_bytes(content: dict[str, Any]) -> bytes:
    """The first 4096 bytes of a file: magic, format, what is in it as JSON, and a checksum of these bytes."""
    text = json.dumps(content).encode()
    front = (_HEAD.pack(_MAGIC, FORMAT, len(text)) + text).ljust(DATA_OFFSET - 4, b"\0")
    if len(front) > DATA_OFFSET - 4:
        raise ValueError(f"name: {content['name']!r} is too long for the header of a file; shorten it")
    return front + struct.pack("<I", zlib.crc32(front))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of a store says about itself, for a person who has the file and no manifest.

    Raises:
      CorruptTable: it has no header, or a damaged one.
      UnknownFormat: the format is a newer one.
    """
    with open(path, "rb") as file:
        front = file.read(DATA_OFFSET)
    if len(front) < DATA_OFFSET or struct.unpack("<I", front[-4:])[0] != zlib.crc32(front[:-4]):
        raise CorruptTable(f"{path} does not begin with a whole header")
    magic, version, length = _HEAD.unpack_from(front)
    if magic != _MAGIC:
        raise CorruptTable(f"{path} is no file of a store: it begins with {magic!r}")
    if version != FORMAT:
        raise UnknownFormat(f"{path} has format {version}, this jaxeff reads {FORMAT}; install a newer one")
    return json.loads(front[_HEAD.size : _HEAD.size + length])
