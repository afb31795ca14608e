"""Every step by which a store changes on disk, one small function each, and the errors of a disk in our words."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from jaxeff.sdm.stored_file import DiskFull, StoreError, WriteError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Disk:
    """The steps. Whoever wants to see what is left when the power goes between two of them gives a writer another."""

    def make_folder(self, path: pathlib.Path) -> None:
        """Makes a folder that must not exist."""
        path.mkdir()

    def create(self, path: pathlib.Path) -> BinaryIO:
        """Creates a file that must not exist, for writing without a buffer."""
        return open(path, "xb", buffering=0)

    def write(self, file: BinaryIO, data: memoryview | bytes, offset: int | None = None) -> None:
        """Writes all the bytes, after those written last or at an offset."""
        if offset is not None:
            file.seek(offset)
        left = memoryview(data)
        while len(left):
            left = left[file.write(left) :]

    def sync(self, file: BinaryIO) -> None:
        """Returns when what was written to the file outlives a loss of power."""
        os.fsync(file.fileno())

    def rename(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Gives a file or folder another name, at one instant; a file of that name goes."""
        os.rename(source, target)

    def sync_folder(self, path: pathlib.Path) -> None:
        """Returns when the names in the folder outlive a loss of power."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: pathlib.Path) -> None:
        """Removes a file, or a folder with all that is in it; it may be gone already."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free(self, path: pathlib.Path) -> int:
        """Bytes that can be written below a folder. Changes nothing."""
        return shutil.disk_usage(path).free


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns errors of the system, inside the `with` block, into those of a store.

    Raises:
      DiskFull: there is no room, or no quota left.
      WriteError: anything else that the system refuses.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"{path}: no room left on the disk; nothing was published. Make room and write again"
            ) from error
        raise WriteError(f"{path}: {error}; nothing was published") from error
