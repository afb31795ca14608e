"""Reading by preadv from a pool of threads: the fallback where io_uring is forbidden."""

import concurrent.futures
import errno
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np

from jaxeff.sdm.io import kernel
from jaxeff.sdm.io.blocks import Plan
from jaxeff.sdm.io.errors import DeadlineExceeded
from jaxeff.sdm.io.files import Files
from jaxeff.sdm.io.progress import progress

Preadv = Callable[[int, list[memoryview], int], int]


class PreadReads:
    """Reads by a thread for each request in flight.

    The interpreter works per request here, one call for each, and runs other threads while the system reads.
    """

    name = "pread"

    def __init__(self, files: Files, half: int, threads: int, preadv: Preadv | None = None):
        self.files, self.half, self._threads = files, half, threads
        if preadv is None and not hasattr(os, "preadv"):
            raise OSError(errno.ENOSYS, "this system has no preadv")
        self._preadv = preadv or os.preadv
        self._memory = kernel.pages(2 * half)
        self._make()

    def read(self, plan: Plan, out: np.ndarray, until: float | None, seconds: float | None) -> None:
        """See `UringReads.read`."""
        if self._process != os.getpid():
            self._make()
        finished = bytearray(len(plan.size))
        for filling, (start, stop) in enumerate(itertools.pairwise(plan.request_border.tolist())):
            strip = _Strip(self.files, plan, start, stop, self._memory.data, self._preadv, until, finished)
            strides = min(self._threads, stop - start)
            work = [self._pool.submit(strip.read, first, strides) for first in range(strides)]
            try:
                for future in work:
                    future.result()
            finally:
                # Memory must outlive what is read into it, whatever interrupts.
                strip.stop.set()
                concurrent.futures.wait(work)
            if not all(finished[start:stop]):
                arrived = plan.arrived(np.frombuffer(finished, bool))
                raise DeadlineExceeded(arrived, len(plan.order), seconds or 0.0)
            plan.scatter(filling, self._memory, out)

    def close(self) -> None:
        """Ends the threads."""
        self._shutdown()

    def _make(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="jaxeff-pread")
        self._shutdown = weakref.finalize(self, self._pool.shutdown)
        # Threads do not live on in the child of a fork.
        self._process = os.getpid()


class _Strip:
    """The requests of one filling, of which each thread takes every so many."""

    def __init__(
        self,
        files: Files,
        plan: Plan,
        start: int,
        stop: int,
        memory: memoryview,
        preadv: Preadv,
        until: float | None,
        finished: bytearray,
    ):
        part = slice(start, stop)
        self._files, self._memory, self._preadv, self._until = files, memory, preadv, until
        self._file, self._offset = plan.file[part].tolist(), plan.offset[part].tolist()
        self._size, self._need = plan.size[part].tolist(), plan.need[part].tolist()
        self._position = plan.position[part].tolist()
        self._start, self._finished = start, finished
        self.stop = threading.Event()

    def read(self, first: int, stride: int) -> None:
        """Reads requests first, first + stride, ... until all are read, the time is over, or another thread failed."""
        try:
            for number in range(first, len(self._size), stride):
                if not self._read(number):
                    return
                self._finished[self._start + number] = 1
        except BaseException:
            self.stop.set()
            raise

    def _read(self, number: int) -> bool:
        file, offset, need = self._file[number], self._offset[number], self._need[number]
        position, end = self._position[number], self._position[number] + self._size[number]
        descriptor, tries = self._files.descriptors[file], 0
        while True:
            if self.stop.is_set() or (self._until is not None and time.monotonic() >= self._until):
                return False
            try:
                came = self._preadv(descriptor, [self._memory[position:end]], offset)
            except OSError as error:
                came = -(error.errno or errno.EIO)
            if came >= need:
                return True
            step = progress(self._files, file, offset, need, came, tries)
            tries = 0 if step else tries + 1
            offset, need, position = offset + step, need - step, position + step
