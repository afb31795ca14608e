"""Reading through io_uring from NumPy alone: requests and completions are arrays in memory shared with the kernel.

Layouts and numbers are those of linux/io_uring.h. Files and memory are registered where limits allow it.
"""

import contextlib
import errno
import mmap
import threading
import weakref

import numpy as np

from jaxeff.sdm.io import kernel
from jaxeff.sdm.io.files import Files
from jaxeff.sdm.io.queued import QueueReads

REQUEST = np.dtype(
    {
        "names": ["opcode", "flags", "fd", "off", "addr", "len", "user_data", "buf_index"],
        "formats": ["u1", "u1", "<i4", "<u8", "<u8", "<u4", "<u8", "<u2"],
        "offsets": [0, 1, 4, 8, 16, 24, 32, 40],
        "itemsize": 64,
    }
)
COMPLETION = np.dtype([("user_data", "<u8"), ("res", "<i4"), ("flags", "<u4")])

READ_FIXED, READ = 4, 22  # opcodes; READ needs Linux 5.6
FIXED_FILE = 1  # flag of a request: fd is an index of the registered files
GETEVENTS, EXT_ARG = 1, 8  # flags of enter
HAS_EXT_ARG = 1 << 8  # feature of a ring: enter takes a time to wait at most (Linux 5.11)
REGISTER_BUFFERS, REGISTER_FILES = 0, 2
# One thread hands over; completions are worked off when it waits, not by interrupting it (Linux 6.1, 5.19).
SINGLE_ISSUER, DEFER_TASKRUN, COOP_TASKRUN = 1 << 12, 1 << 13, 1 << 8
SETUPS = (SINGLE_ISSUER | DEFER_TASKRUN, COOP_TASKRUN, 0)

_SQ_RING, _REQUESTS = 0, 0x10000000
_WORD = 1 << 32


class Ring:
    """One queue of requests and completions.

    Only the thread that made it may use it. Requests in flight are counted by the kernel's own numbers, so that an
    exception at any place leaves the count right.
    """

    def __init__(self, calls: kernel.Uring, depth: int):
        self._calls = calls
        self.descriptor, params = _set_up(calls, depth)
        maps: list[mmap.mmap] = []
        self._release = weakref.finalize(self, _release_ring, calls, self.descriptor, maps)
        try:
            words = params.view(np.uint32)
            entries, self._finished = int(words[0]), int(words[1])
            self.features = int(words[5])
            sq, cq = words[10:20], words[20:30]  # the offsets of head, tail, ring mask, ...: sq[6] array, cq[5] cqes
            size = max(int(sq[6]) + 4 * entries, int(cq[5]) + COMPLETION.itemsize * self._finished)
            maps.append(calls.map(self.descriptor, _SQ_RING, size))
            maps.append(calls.map(self.descriptor, _REQUESTS, REQUEST.itemsize * entries))
        except BaseException:
            self._release()
            raise
        ring = np.frombuffer(maps[0], np.uint8)
        word = lambda offset: ring[int(offset) : int(offset) + 4].view(np.uint32)
        self._sq_head, self._sq_tail = word(sq[0]), word(sq[1])
        self._cq_head, self._cq_tail = word(cq[0]), word(cq[1])
        ring[int(sq[6]) : int(sq[6]) + 4 * entries].view(np.uint32)[:] = np.arange(entries)
        self._completions = np.ndarray((self._finished,), COMPLETION, ring, int(cq[5]))
        self._requests = np.ndarray((entries,), "V64", maps[1])
        self.entries = entries
        self._timeout = np.zeros(2, np.int64)
        # {sigmask u64, sigmask size u32, min_wait u32, address of the time u64}
        self._argument = np.array([0, 0, self._timeout.ctypes.data], np.uint64)

    def in_flight(self) -> int:
        """Requests that the kernel has taken and whose completions have not been taken from it."""
        return (int(self._sq_head[0]) - int(self._cq_head[0])) % _WORD

    def put(self, requests: np.ndarray) -> None:
        """See `Queue`; at most as many as `entries` less those in the ring."""
        tail = int(self._sq_tail[0])
        at = tail % self.entries
        fit = min(len(requests), self.entries - at)
        self._requests[at : at + fit] = requests[:fit]
        if fit < len(requests):
            self._requests[: len(requests) - fit] = requests[fit:]
        self._sq_tail[0] = (tail + len(requests)) % _WORD

    def enter(self, wait: int, seconds: float | None = None) -> None:
        """See `Queue`."""
        waiting = (int(self._sq_tail[0]) - int(self._sq_head[0])) % _WORD
        flags, argument, size = GETEVENTS, 0, 0
        # An older kernel waits for a read to finish, however late that is.
        if seconds is not None and self.features & HAS_EXT_ARG:
            self._timeout[:] = divmod(int(max(seconds, 0) * 1e9), 1_000_000_000)
            flags, argument, size = GETEVENTS | EXT_ARG, self._argument.ctypes.data, 24
        try:
            self._calls.enter(self.descriptor, waiting, wait, flags, argument, size)
        except OSError as error:
            # A signal, the end of the time, or a queue that is full for the moment: what finished can be taken.
            if error.errno not in (errno.EINTR, errno.ETIME, errno.EAGAIN, errno.EBUSY):
                raise

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Queue`."""
        head = int(self._cq_head[0])
        with _FENCE:
            count = (int(self._cq_tail[0]) - head) % _WORD
        with _FENCE:
            at = head % self._finished
            taken = self._completions[at : at + count]
        if len(taken) < count:
            taken = np.concatenate([taken, self._completions[: count - len(taken)]])
        user, result = taken["user_data"].copy(), taken["res"].copy()
        self._cq_head[0] = (head + count) % _WORD
        return user, result

    def drain(self) -> None:
        """See `Queue`."""
        self._sq_tail[0] = self._sq_head[0]
        while self.in_flight():
            # What interrupts here comes on top of an exception that is on its way already.
            with contextlib.suppress(KeyboardInterrupt):
                self.enter(1)
                self.take()

    def register(self, operation: int, argument: np.ndarray, count: int) -> bool:
        """Makes files or buffers known beforehand; False where a limit forbids it."""
        try:
            self._calls.register(self.descriptor, operation, argument, count)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """See `Queue`."""
        for name in ("_sq_head", "_sq_tail", "_cq_head", "_cq_tail", "_completions", "_requests"):
            self.__dict__.pop(name, None)
        self._release()


# Two critical sections one after the other order the loads in them on every processor: the tail before what it counts.
_FENCE = threading.Lock()


def _set_up(calls: kernel.Uring, depth: int) -> tuple[int, np.ndarray]:
    for flags in SETUPS:
        params = np.zeros(120, np.uint8)
        params.view(np.uint32)[2] = flags
        try:
            return calls.setup(depth, params), params
        except OSError as error:
            if error.errno != errno.EINVAL or not flags:
                raise
    raise AssertionError("the last setup has no flags")


def _release_ring(calls: kernel.Uring, descriptor: int, maps: list[mmap.mmap]) -> None:
    # The maps go when the last view of them goes; closing them under a view is an error.
    maps.clear()
    calls.close(descriptor)


class UringReads(QueueReads):
    """Reads by io_uring.

    The ring belongs to the thread that reads first; when another one (or another process, after a fork) goes on, it
    makes a ring of its own.
    """

    name = "uring"
    layout = REQUEST

    def __init__(self, files: Files, half: int, depth: int, calls: kernel.Uring | None = None):
        self._calls = calls or kernel.SystemUring()
        super().__init__(files, half, depth)

    def _open(self) -> Ring:
        ring = Ring(self._calls, self.depth)
        piece = kernel.vectors(np.array([self._memory.ctypes.data]), len(self._memory))
        self._fixed_memory = ring.register(REGISTER_BUFFERS, piece, 1)
        self._fixed_files = ring.register(REGISTER_FILES, self._descriptors, len(self._descriptors))
        return ring

    def _address(self, made: np.ndarray, file: np.ndarray) -> None:
        made["opcode"] = READ_FIXED if self._fixed_memory else READ
        made["flags"] = FIXED_FILE if self._fixed_files else 0
        made["fd"] = file if self._fixed_files else self._descriptors[file]
