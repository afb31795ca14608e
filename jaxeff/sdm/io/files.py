"""The files that rows are read from: opened past the page cache where that is possible, with the block they allow."""

import dataclasses
import errno
import mmap
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxeff.sdm.io import kernel
from jaxeff.sdm.io.errors import ShortRead

Direct = Literal["auto", True, False]
# Blocks that are tried where the kernel does not say which one a device has.
_TRIED = (512, 4096)


@dataclasses.dataclass
class Files:
    """Open files.

    Attributes:
      paths: names of the files.
      descriptors: of each.
      sizes: int64 [files], bytes of each when it was last looked at.
      direct: whether reads pass the page cache by.
      block: reads start and end at multiples of it.
      reason: why reads do not pass the page cache by, where they might have; else empty.
    """

    paths: tuple[str, ...]
    descriptors: list[int]
    sizes: np.ndarray
    direct: bool
    block: int
    reason: str

    def check(self, files: np.ndarray, offsets: np.ndarray, length: int) -> None:
        """Looks whether all rows lie in their files as these were when they were opened, or are now.

        Raises:
          ShortRead: naming the file and the first byte of a row that does not.
        """
        if np.all(offsets + length <= self.sizes[files]):
            return
        self.look()
        outside = np.flatnonzero(offsets + length > self.sizes[files])
        if len(outside):
            file = int(files[outside[0]])
            raise ShortRead(self.paths[file], int(offsets[outside[0]]), int(self.sizes[file]))

    def look(self) -> None:
        """Asks the system for the sizes again."""
        self.sizes = np.array([os.fstat(descriptor).st_size for descriptor in self.descriptors], np.int64)

    def close(self) -> None:
        """Closes the descriptors."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def open_files(paths: Sequence[str | os.PathLike[str]], direct: Direct, block: int | None) -> Files:
    """Opens files for reading.

    Args:
      paths: of regular files.
      direct: past the page cache: True, False or "auto", which means wherever every file allows it and none lies in
        memory.
      block: reads start and end at multiples of it, or of what direct reading needs if that is more; None for what
        direct reading needs, or a page of memory.

    Raises:
      OSError: if a file cannot be opened, or not directly with direct=True.
    """
    names = tuple(os.fspath(path) for path in paths)
    reason, needed = "", 0
    if direct is not False:
        try:
            descriptors, needed = _open_direct(names, even_in_memory=direct is True)
        except OSError as error:
            if direct is True or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            reason = f"{error.filename} cannot be read directly: {error.strerror}"
    if not needed:
        descriptors = _open_all(names, 0)
    files = Files(names, descriptors, np.zeros(len(names), np.int64), bool(needed), 0, reason)
    files.look()
    files.block = max(block or 0, needed) if block or needed else mmap.PAGESIZE
    if not needed and hasattr(os, "posix_fadvise"):
        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return files


def _open_direct(names: Sequence[str], even_in_memory: bool) -> tuple[list[int], int]:
    """Descriptors, and the block that all of them allow."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        raise OSError(errno.EOPNOTSUPP, "this system has no O_DIRECT; use direct=False", names[0])
    descriptors = _open_all(names, flag)
    try:
        block = max(
            _block(descriptor, name, even_in_memory) for descriptor, name in zip(descriptors, names, strict=True)
        )
    except BaseException:
        _close_all(descriptors)
        raise
    return descriptors, block


def _open_all(names: Sequence[str], flag: int) -> list[int]:
    descriptors: list[int] = []
    try:
        for name in names:
            descriptors.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC | flag))
    except BaseException:
        _close_all(descriptors)
        raise
    return descriptors


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _block(descriptor: int, name: str, even_in_memory: bool) -> int:
    if kernel.in_memory(descriptor) and not even_in_memory:
        raise OSError(errno.EOPNOTSUPP, "its file system is memory", name)
    stated = kernel.direct_alignment(descriptor)
    if stated:
        return stated
    with mmap.mmap(-1, max(_TRIED)) as buffer:
        for block in _TRIED:
            try:
                os.preadv(descriptor, [memoryview(buffer)[:block]], 0)
                return block
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise OSError(error.errno, error.strerror, name) from error
    raise OSError(errno.EINVAL, f"no direct read in blocks of {_TRIED} bytes; use direct=False", name)
