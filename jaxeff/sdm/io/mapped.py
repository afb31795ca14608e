"""Reading from memory maps: pages are asked for in batches, then rows are copied, without waiting for a fault at each.

Maps are advised to be read at random: a fault would otherwise read megabytes around a row.

A file that is truncated while it is mapped kills the process that touches what is gone, or shows it zeros where the
last page goes on. So rows are copied by the kernel (process_vm_readv of this very process), which gives an error
instead, and the sizes of the files are looked at when all is copied; where such a copy is forbidden, before it, too.
"""

import errno
import mmap
import os
import time

import numpy as np

from jaxeff.sdm.io import kernel
from jaxeff.sdm.io.blocks import MAX_REQUEST, Plan, windows
from jaxeff.sdm.io.errors import DeadlineExceeded, ReadError, ShortRead
from jaxeff.sdm.io.files import Files

_WILLNEED = 3


class MappedReads:
    """Reads from the page cache through maps."""

    name = "mmap"

    def __init__(self, files: Files, half: int, depth: int):
        self.files, self.half = files, half
        # One batch is copied while the next is on its way.
        self._batch = max(1, min(depth // 2, kernel.MAX_VECTORS))
        self._resident = all(map(kernel.in_memory, files.descriptors))
        self._advises = self._copies = True
        self._maps: list[np.ndarray] = []
        self._mapped = np.zeros(len(files.descriptors), np.int64)
        self._own = -1
        self._map()

    def read(self, plan: Plan, out: np.ndarray, until: float | None, seconds: float | None) -> None:
        """See `UringReads.read`."""
        if np.any(self.files.sizes > self._mapped):
            self._map()
        rows, length = len(plan.order), plan.length
        head = np.searchsorted(plan.request_run, plan.row_run)
        file, within = plan.file[head], plan.row_position - plan.position[head]
        offset = plan.offset[head] + within
        behind = head + (within + length - 1) // MAX_REQUEST + 1  # the request after the last one that a row lies in
        asked = 0
        for start in range(0, rows, self._batch):
            for ahead in (start + self._batch, start + 2 * self._batch):
                wanted = int(behind[min(ahead, rows) - 1])
                if wanted > asked:
                    self._ask(plan, asked, wanted)
                    asked = wanted
            part = slice(start, min(start + self._batch, rows))
            self._copy(file[part], offset[part], plan.order[part], length, out)
            if until is not None and part.stop < rows and time.monotonic() >= until:
                raise DeadlineExceeded(part.stop, rows, seconds or 0.0)
        self._look(file, offset, length)

    def close(self) -> None:
        """Forgets the maps."""
        self._maps = []
        if self._own >= 0:
            os.close(self._own)
            self._own = -1

    def _map(self) -> None:
        sizes = self.files.sizes
        maps = []
        for descriptor, size in zip(self.files.descriptors, sizes.tolist(), strict=True):
            if not size:
                maps.append(np.empty(0, np.uint8))
                continue
            made = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                made.madvise(mmap.MADV_RANDOM)
            maps.append(np.frombuffer(made, np.uint8))
        self._maps, self._mapped = maps, sizes.copy()
        self._address = np.array([one.ctypes.data for one in maps], np.int64)

    def _ask(self, plan: Plan, start: int, stop: int) -> None:
        """Has the pages of requests read ahead."""
        if self._resident:
            return
        file, offset, need = plan.file[start:stop], plan.offset[start:stop], plan.need[start:stop]
        if self._advises:
            try:
                if self._own < 0:
                    self._own = os.pidfd_open(os.getpid())
                pieces = kernel.vectors(self._address[file] + offset, need)
                for at in range(0, len(pieces), kernel.MAX_VECTORS):
                    some = pieces[at : at + kernel.MAX_VECTORS]
                    kernel.call("process_madvise", self._own, some.ctypes.data, len(some), _WILLNEED, 0)
                return
            except (OSError, AttributeError):  # an older kernel, one that allows it to nobody, or another system
                self._advises = False
        if hasattr(os, "posix_fadvise"):
            for one, at, size in zip(file.tolist(), offset.tolist(), need.tolist(), strict=True):
                os.posix_fadvise(self.files.descriptors[one], at, size, os.POSIX_FADV_WILLNEED)

    def _copy(self, file: np.ndarray, offset: np.ndarray, order: np.ndarray, length: int, out: np.ndarray) -> None:
        """Copies the rows of one batch to where the caller wants them."""
        if self._copies:
            to = kernel.vectors(out.ctypes.data + order * out.strides[0], length)
            source = kernel.vectors(self._address[file] + offset, length)
            count = len(order)
            pointers = (to.ctypes.data, count, source.ctypes.data, count)
            try:
                copied = kernel.call("process_vm_readv", os.getpid(), *pointers, 0) // length
            except OSError as error:
                self._copies = error.errno == errno.EFAULT
                copied = 0
            if self._copies:
                if copied < count:
                    self._look(file[copied:], offset[copied:], length)
                    path = self.files.paths[int(file[copied])]
                    raise ReadError(errno.EIO, path, int(offset[copied]), " through a map")
                return
        self._look(file, offset, length)
        for one in np.unique(file):
            mine = file == one
            windows(out, length)[order[mine]] = windows(self._maps[one], length)[offset[mine]]

    def _look(self, file: np.ndarray, offset: np.ndarray, length: int) -> None:
        """Raises ShortRead if a file ends before one of its rows does."""
        for one in np.unique(file):
            size = os.fstat(self.files.descriptors[one]).st_size
            mine = offset[file == one]
            gone = mine[mine + length > size]
            if len(gone):
                raise ShortRead(self.files.paths[one], int(gone[0]), size)
