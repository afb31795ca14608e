"""A reader of rows: the best way of reading that this machine allows, found when files are opened and said once.

The ladder: io_uring without a compiler; Linux's older asynchronous calls; a pool of threads that call preadv; memory
maps with prefetching. All give the same bytes and errors. Files that lie in memory (tmpfs) are mapped first of all:
nothing is to be waited for.
"""

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from jaxeff.sdm.io import blocks, kernel
from jaxeff.sdm.io.aio import AioReads
from jaxeff.sdm.io.blocks import GatherStats, Plan
from jaxeff.sdm.io.errors import DeadlineExceeded
from jaxeff.sdm.io.files import Direct, Files, open_files
from jaxeff.sdm.io.mapped import MappedReads
from jaxeff.sdm.io.pread import PreadReads
from jaxeff.sdm.io.uring import UringReads

Backend = Literal["auto", "uring", "aio", "pread", "mmap"]
LADDER: tuple[Backend, ...] = ("uring", "aio", "pread", "mmap")

_log = logging.getLogger(__name__)


class Reads(Protocol):
    """A way of reading."""

    @property
    def name(self) -> str:
        """As in LADDER."""

    def read(self, plan: Plan, out: np.ndarray, until: float | None, seconds: float | None) -> None:
        """Reads what a plan says and copies its rows out, until time.monotonic() passes `until`."""

    def close(self) -> None:
        """Gives back what it holds; nothing is being read."""


class Reader:
    """Reads rows from files that were opened together; made by `open_reader`.

    One thread at a time may use a reader, and it is fastest where that is always the same one: open a reader for each
    thread. Other threads run while the system reads. Close it, or use it in a `with` block.

    Attributes:
      name: "uring", "aio", "pread" or "mmap".
      direct: whether reads pass the page cache by.
      block: reads start and end at multiples of it, in bytes.
    """

    def __init__(self, files: Files, make: Callable[[int], Reads], half: int):
        self._files, self._make, self._half = files, make, half
        self._reads = make(half)
        self._busy = threading.Lock()
        self.name, self.direct, self.block = self._reads.name, files.direct, files.block
        self._start, self._sizes = blocks.bases(files.sizes, files.block), files.sizes
        self._release = weakref.finalize(self, _release, [self._reads], files)

    def gather(
        self, files: np.ndarray, offsets: np.ndarray, length: int, out: np.ndarray, deadline: float | None = None
    ) -> GatherStats:
        """Reads rows of one length, in any order, from any of the files; each block that holds any is read once.

        Args:
          files: int [n], index of the file of each row.
          offsets: int [n], first byte of each row in its file; rows may repeat and overlap.
          length: bytes of a row, at least 1.
          out: uint8 [n, >= length], whose rows are contiguous; row i is written to out[i, :length].
          deadline: seconds from now after which nothing is waited for; reads that are with the device then are still
            awaited, as they write to memory.

        Returns:
          Requests, bytes and blocks read; the same for every way of reading with the same block.

        Raises:
          ValueError: for arguments that do not fit together, before anything is read.
          ShortRead: if a file ends before a row of it does, naming the file and the place.
          ReadError: if the system fails to read.
          DeadlineExceeded: with the number of rows that had arrived. After any error `out` may hold anything.
          RuntimeError: if another thread is using this reader, or it is closed.
        """
        begun = time.monotonic()
        files, offsets = np.asarray(files), np.asarray(offsets)
        self._check(files, offsets, length, out, deadline)
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another thread is using this reader; open one for each thread")
        try:
            if not self._release.alive:
                raise RuntimeError("the reader is closed; open another one")
            if not len(files):
                return GatherStats(0, 0, 0)
            if deadline is not None and deadline <= 0:
                raise DeadlineExceeded(0, len(files), deadline)
            offsets = offsets.astype(np.int64, copy=False)
            self._files.check(files, offsets, length)
            if self._files.sizes is not self._sizes:
                self._start, self._sizes = blocks.bases(self._files.sizes, self.block), self._files.sizes
            self._fit(length)
            plan = blocks.plan(files, offsets, length, self._start, self.block, self._half)
            self._reads.read(plan, out, None if deadline is None else begun + deadline, deadline)
            return plan.stats
        finally:
            self._busy.release()

    def close(self) -> None:
        """Closes the files; waits for a call in another thread. More than once is no error."""
        with self._busy:
            self._release()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(
        self, files: np.ndarray, offsets: np.ndarray, length: int, out: np.ndarray, deadline: float | None
    ) -> None:
        for name, array in (("files", files), ("offsets", offsets)):
            if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
                raise ValueError(f"{name} must be integers [n], got {array.dtype} {array.shape}")
        if len(files) != len(offsets):
            raise ValueError(f"files and offsets must be equally many, got {len(files)} and {len(offsets)}")
        if length < 1:
            raise ValueError(f"length must be at least 1 byte, got {length}")
        fits = out.ndim == 2 and out.dtype == np.uint8 and len(out) == len(files) and out.shape[1] >= length
        if not fits:
            raise ValueError(f"out must be uint8 [{len(files)}, >= {length}], got {out.dtype} {out.shape}")
        if len(out) and not (out.flags.writeable and (out.strides[1] == 1 or out.shape[1] == 1)):
            raise ValueError(f"rows of out must be contiguous and writeable, got strides {out.strides}")
        if deadline is not None and math.isnan(deadline):
            raise ValueError("deadline must be a number of seconds or None, got NaN")
        if len(files) and not 0 <= files.min() <= files.max() < len(self._files.paths):
            count = len(self._files.paths)
            raise ValueError(f"files must be 0 to {count - 1} for {count} open, got {files.min()} to {files.max()}")
        if len(offsets) and not 0 <= offsets.min() <= offsets.max() < 2**62:
            raise ValueError(f"offsets must be 0 to 2**62 - 1 bytes, got {offsets.min()} to {offsets.max()}")

    def _fit(self, length: int) -> None:
        """Makes room for rows that are longer than any before."""
        half = blocks.half_size(length, self.block)
        if half > self._half:
            larger = self._make(half)
            self._release.detach()
            self._reads.close()
            self._reads, self._half = larger, half
            self._release = weakref.finalize(self, _release, [larger], self._files)


def open_reader(
    paths: Sequence[str | os.PathLike[str]],
    *,
    backend: Backend = "auto",
    direct: Direct = "auto",
    queue_depth: int = 128,
    threads: int = 16,
    block: int | None = None,
) -> Reader:
    """Opens files to read rows from, in the best way that works here, and logs one line that says which, and why.

    Args:
      paths: of regular files, which keep their place as long as the reader is open.
      backend: "uring", "aio", "pread", "mmap", or "auto" for the first of them that works; files in memory are mapped.
      direct: whether reads pass the page cache by; "auto" where the files allow it. Maps cannot.
      queue_depth: reads in flight at most; more than the device takes in parallel only makes each slower.
      threads: of the pool of "pread", and so its reads in flight; no more than `queue_depth` are used.
      block: reads start and end at multiples of it, a power of two from 512 to 65536 bytes; raised to what the way of
        reading needs. None for just that: the device's logical block for direct reads, else a page of memory.

    Raises:
      ValueError: for a setting out of its range, or direct=True with "mmap".
      OSError: if a file cannot be opened, or no allowed way of reading works.
    """
    _check_settings(paths, backend, direct, queue_depth, threads, block)
    reasons: list[str] = []
    wanted: tuple[Backend, ...] = LADDER if backend == "auto" else (backend,)
    if backend == "auto" and direct is not True and _in_memory(paths):
        reasons.append("the files lie in memory")
        wanted = ("mmap", *LADDER[:-1])
    if direct is True:
        wanted = tuple(one for one in wanted if one != "mmap")
    failure: OSError | None = None
    for name in wanted:
        files = open_files(paths, False if name == "mmap" else direct, block)
        try:
            reader = _make_reader(files, name, queue_depth, threads)
        except OSError as error:
            files.close()
            failure = error
            reasons.append(f"no {name}: {error}")
            continue
        except BaseException:
            files.close()
            raise
        reasons += [files.reason] if files.reason else []
        what = f"{len(files.paths)} file(s) by {name}, {'directly' if files.direct else 'through the page cache'}"
        why = f" ({'; '.join(reasons)})" if reasons else ""
        _log.log(
            logging.WARNING if failure else logging.INFO, "reads %s, in blocks of %d bytes%s", what, files.block, why
        )
        return reader
    assert failure is not None
    tried = "; ".join(reasons)
    raise OSError(failure.errno, f"no way of reading works: {tried}; try backend='auto' or direct=False")


def _make_reader(files: Files, name: Backend, depth: int, threads: int) -> Reader:
    if name == "mmap":
        files.block = max(files.block, kernel.PAGE)

    def make(half: int) -> Reads:
        if name == "uring":
            return UringReads(files, half, depth)
        if name == "aio":
            return AioReads(files, half, depth)
        return PreadReads(files, half, min(threads, depth)) if name == "pread" else MappedReads(files, half, depth)

    return Reader(files, make, blocks.half_size(1, files.block))


def _in_memory(paths: Sequence[str | os.PathLike[str]]) -> bool:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if not kernel.in_memory(descriptor):
                return False
        finally:
            os.close(descriptor)
    return True


def _check_settings(
    paths: Sequence[str | os.PathLike[str]],
    backend: Backend,
    direct: Direct,
    queue_depth: int,
    threads: int,
    block: int | None,
) -> None:
    if isinstance(paths, (str, os.PathLike)) or not len(paths):
        raise ValueError(f"paths must be a list of at least one file, got {paths!r}")
    if backend not in ("auto", *LADDER):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(LADDER)}, got {backend!r}")
    if direct not in ("auto", True, False):
        raise ValueError(f"direct must be 'auto', True or False, got {direct!r}")
    if direct is True and backend == "mmap":
        raise ValueError("direct=True cannot be had with backend='mmap': maps show the page cache; use another backend")
    if not 1 <= queue_depth <= 4096:
        raise ValueError(f"queue_depth must be 1 to 4096 reads, got {queue_depth}")
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads must be 1 to 1024, got {threads}")
    if block is not None and (not 512 <= block <= 65536 or block & (block - 1)):
        raise ValueError(f"block must be a power of two from 512 to 65536 bytes, got {block}")


def _release(reads: list[Reads], files: Files) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(files.close)
        for one in reads:
            stack.callback(one.close)
