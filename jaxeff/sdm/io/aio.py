"""Reading through Linux's older asynchronous calls (io_submit), for sandboxes that forbid io_uring as many do.

They wait for each read that goes through the page cache, and so are for direct reading alone. Layouts and numbers are
those of linux/aio_abi.h.
"""

import contextlib
import errno
import weakref

import numpy as np

from jaxeff.sdm.io import kernel
from jaxeff.sdm.io.files import Files
from jaxeff.sdm.io.queued import QueueReads

REQUEST = np.dtype(
    {
        "names": ["user_data", "opcode", "fd", "addr", "len", "off"],
        "formats": ["<u8", "<u2", "<u4", "<u8", "<u8", "<i8"],
        "offsets": [0, 16, 20, 24, 32, 40],
        "itemsize": 64,
    }
)
EVENT = np.dtype([("user_data", "<u8"), ("obj", "<u8"), ("res", "<i8"), ("res2", "<i8")])


class Context:
    """One queue of requests; any thread of the process that made it may use it."""

    def __init__(self, depth: int):
        self._depth = depth
        self._room = np.zeros(depth, EVENT)
        self._time = np.zeros(2, np.int64)
        self._put, self._refused, self._came = np.empty(0, "V64"), np.zeros(0, EVENT), 0
        self._set_up()

    def put(self, requests: np.ndarray) -> None:
        """See `Queue`."""
        self._put = np.concatenate([self._put, requests])

    def enter(self, wait: int, seconds: float | None = None) -> None:
        """See `Queue`."""
        while len(self._put):
            pointers = self._put.ctypes.data + 64 * np.arange(len(self._put))
            try:
                accepted = kernel.call("io_submit", self._context, len(pointers), pointers.ctypes.data)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR):
                    break
                # The first of them is what is wrong, and ends like one that failed on its way.
                one = np.zeros(1, EVENT)
                one["user_data"], one["res"] = self._put[:1].view(REQUEST)["user_data"], -(error.errno or errno.EIO)
                self._refused = np.concatenate([self._refused, one])
                accepted = 1
            self._put = self._put[accepted:]
        if seconds is not None:
            self._time[:] = divmod(int(max(seconds, 0) * 1e9), 1_000_000_000)
        until = 0 if seconds is None else self._time.ctypes.data
        # Of what was not accepted there will be no completion.
        wait = 0 if len(self._put) or len(self._refused) else wait
        room = self._room
        try:
            self._came = kernel.call("io_getevents", self._context, wait, len(room), room.ctypes.data, until)
        except OSError as error:
            self._came = 0
            if error.errno != errno.EINTR:
                raise

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Queue`."""
        events = self._room[: self._came]
        if len(self._refused):
            events = np.concatenate([events, self._refused])
            self._refused = self._refused[:0]
        self._came = 0
        return events["user_data"].copy(), events["res"].copy()

    def drain(self) -> None:
        """See `Queue`."""
        # Giving a context back waits for its reads.
        self.close()
        self._put, self._refused, self._came = self._put[:0], self._refused[:0], 0
        self._set_up()

    def close(self) -> None:
        """See `Queue`."""
        self._release()

    def _set_up(self) -> None:
        made = np.zeros(1, np.int64)
        kernel.call("io_setup", self._depth, made.ctypes.data)
        self._context = int(made[0])
        self._release = weakref.finalize(self, _release, self._context)


def _release(context: int) -> None:
    # The child of a fork does not have it.
    with contextlib.suppress(OSError):
        kernel.call("io_destroy", context)


class AioReads(QueueReads):
    """Reads by io_submit, directly."""

    name = "aio"
    layout = REQUEST

    def __init__(self, files: Files, half: int, depth: int):
        if not files.direct:
            raise OSError(errno.EOPNOTSUPP, "aio reads directly or not at all")
        super().__init__(files, half, depth)

    def _open(self) -> Context:
        return Context(self.depth)

    def _address(self, made: np.ndarray, file: np.ndarray) -> None:
        made["fd"] = self._descriptors[file]
