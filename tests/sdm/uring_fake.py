"""An io_uring in memory: it reads real files, answers in any order, and fails where it is told to."""

import ctypes
import errno
import mmap
import os

import numpy as np

from jaxeff.sdm.io import uring


class FakeUring:
    """`kernel.Uring` with faults.

    Attributes:
      answer: function (number of the request since the ring was made, bytes that came) -> its result.
      enters: error numbers, exceptions or None for the next calls of enter.
      refused: flags of a setup that this kernel does not know.
      registers: whether files and buffers can be registered.
      pending: requests taken and not answered.
    """

    def __init__(self, *, features=uring.HAS_EXT_ARG, refused=0, registers=True, seed=0):
        self.answer = lambda number, came: came
        self.enters = []
        self.pending = []
        self.features, self.refused, self.registers = features, refused, registers
        self.made = self.closed = self.taken = 0
        self.hold = False
        self.most = 0
        self._rng = np.random.default_rng(seed)
        self._registered = {}

    def setup(self, entries, params):
        words = params.view(np.uint32)
        if int(words[2]) & self.refused:
            raise OSError(errno.EINVAL, "flags")
        self._entries = 1 << (entries - 1).bit_length()
        words[0], words[1], words[5] = self._entries, 2 * self._entries, self.features
        words[10], words[11], words[16] = 0, 4, 64  # head, tail, array
        words[20], words[21], words[25] = 8, 12, 64 + 4 * self._entries  # head, tail, completions
        self.made += 1
        self.maps = {}
        return os.open(os.devnull, os.O_RDONLY)

    def map(self, descriptor, offset, size):
        self.maps[offset] = mmap.mmap(-1, size)
        return self.maps[offset]

    def register(self, descriptor, operation, argument, count):
        if not self.registers:
            raise OSError(errno.ENOMEM, "limit")
        self._registered[operation] = argument.copy()

    def enter(self, descriptor, submit, wait, flags, argument, size):
        fault = self.enters.pop(0) if self.enters else None
        if isinstance(fault, BaseException):
            raise fault
        if fault:
            raise OSError(fault, os.strerror(fault))
        ring = np.frombuffer(self.maps[0], np.uint8)
        word = ring[:16].view(np.uint32)
        requests = np.frombuffer(self.maps[0x10000000], uring.REQUEST)
        names = ring[64 : 64 + 4 * self._entries].view(np.uint32)
        for _ in range(submit):
            self.pending.append(requests[names[word[0] % self._entries]].copy())
            word[0] += 1
        self.most = max(self.most, len(self.pending))
        if self.hold and flags & uring.EXT_ARG:
            raise OSError(errno.ETIME, "time")
        answers = np.ndarray((2 * self._entries,), uring.COMPLETION, ring, 64 + 4 * self._entries)
        count = int(self._rng.integers(min(wait, len(self.pending)), len(self.pending) + 1))
        for number in sorted(self._rng.choice(len(self.pending), count, replace=False), reverse=True):
            request = self.pending.pop(number)
            answers[word[3] % len(answers)] = (request["user_data"], self._read(request), 0)
            word[3] += 1
        return submit

    def close(self, descriptor):
        self.closed += 1
        os.close(descriptor)

    def _read(self, request):
        number, self.taken = self.taken, self.taken + 1
        descriptor = int(request["fd"])
        if request["flags"] & uring.FIXED_FILE:
            descriptor = int(self._registered[uring.REGISTER_FILES][descriptor])
        size = int(request["len"])
        there = os.pread(descriptor, size + 4096, int(request["off"]) // 4096 * 4096)
        there = there[int(request["off"]) % 4096 :][:size]
        result = self.answer(number, len(there))
        if result > 0:
            ctypes.memmove(int(request["addr"]), there, min(result, len(there)))
        return result
