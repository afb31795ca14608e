"""System calls of Linux that Python's os module lacks, by ctypes: no compiler, and the interpreter runs on meanwhile.

Addresses and sizes are in bytes. Every function raises OSError as those of os do, with ENOSYS on any other system.
"""

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from typing import Protocol

import numpy as np

# Numbers of the calls; those from 424 on are the same on all machines.
_BY_MACHINE = {
    "x86_64": {
        **{"statx": 332, "process_vm_readv": 310},
        **{"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209},
    },
    "aarch64": {
        **{"statx": 291, "process_vm_readv": 270},
        **{"io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_getevents": 4},
    },
}
_CALLS = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "process_madvise": 440}
_CALLS.update(_BY_MACHINE.get(platform.machine(), {}))

_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000
_TMPFS, _RAMFS = 0x01021994, 0x858458F6
# What one call of process_madvise or process_vm_readv takes at most (UIO_MAXIOV).
MAX_VECTORS = 1024
PAGE = mmap.PAGESIZE

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
if _LIBC is not None:
    _LIBC.syscall.restype = ctypes.c_long
    _LIBC.syscall.argtypes = [ctypes.c_long] * 7


def call(name: str, *args: int) -> int:
    """Makes a system call whose arguments are numbers and addresses.

    Raises:
      OSError: with the error number of the call; ENOSYS where the system has no such call.
    """
    number = _CALLS.get(name)
    if _LIBC is None or number is None:
        raise OSError(errno.ENOSYS, f"{name} is not a system call of {sys.platform} on {platform.machine()}")
    result = _LIBC.syscall(number, *args, *(0,) * (6 - len(args)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def vectors(starts: np.ndarray, sizes: np.ndarray | int) -> np.ndarray:
    """The array of (address, size) that calls on several pieces of memory take: uint64 [n, 2]."""
    made = np.empty((len(starts), 2), np.uint64)
    made[:, 0], made[:, 1] = starts, sizes
    return made


def pages(size: int) -> np.ndarray:
    """Fresh memory that starts on a page, as direct reading needs: uint8 [size]."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def direct_alignment(descriptor: int) -> int | None:
    """The block in which a file can be read past the page cache; 0 where it cannot, None if the kernel does not say."""
    record = ctypes.create_string_buffer(256)
    empty = ctypes.create_string_buffer(1)
    try:
        call("statx", descriptor, ctypes.addressof(empty), _AT_EMPTY_PATH, _STATX_DIOALIGN, ctypes.addressof(record))
    except OSError:
        return None
    if not struct.unpack_from("I", record, 0)[0] & _STATX_DIOALIGN:
        return None
    return max(struct.unpack_from("II", record, 0x98))


def in_memory(descriptor: int) -> bool:
    """Whether a file lies in a file system that is memory itself (tmpfs, ramfs)."""
    if _LIBC is None:
        return False
    record = (ctypes.c_long * 32)()
    if _LIBC.fstatfs(descriptor, record):
        return False
    return record[0] & 0xFFFFFFFF in (_TMPFS, _RAMFS)


class Uring(Protocol):
    """The calls that io_uring is made of; tests put a layer with faults in their place."""

    def setup(self, entries: int, params: np.ndarray) -> int:
        """Makes a ring, fills in its parameters (uint8 [120]) and returns its descriptor."""

    def map(self, descriptor: int, offset: int, size: int) -> mmap.mmap:
        """The memory that the ring shares with the kernel."""

    def register(self, descriptor: int, operation: int, argument: np.ndarray, count: int) -> None:
        """Tells a ring of files or buffers beforehand."""

    def enter(self, descriptor: int, submit: int, wait: int, flags: int, argument: int, size: int) -> int:
        """Hands over new requests and waits for finished ones; returns how many were handed over."""

    def close(self, descriptor: int) -> None:
        """Gives a ring back."""


class SystemUring:
    """The kernel's own."""

    def setup(self, entries: int, params: np.ndarray) -> int:
        """See `Uring`."""
        return call("io_uring_setup", entries, params.ctypes.data)

    def map(self, descriptor: int, offset: int, size: int) -> mmap.mmap:
        """See `Uring`."""
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        return mmap.mmap(descriptor, size, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def register(self, descriptor: int, operation: int, argument: np.ndarray, count: int) -> None:
        """See `Uring`."""
        call("io_uring_register", descriptor, operation, argument.ctypes.data, count)

    def enter(self, descriptor: int, submit: int, wait: int, flags: int, argument: int, size: int) -> int:
        """See `Uring`."""
        return call("io_uring_enter", descriptor, submit, wait, flags, argument, size)

    def close(self, descriptor: int) -> None:
        """See `Uring`."""
        os.close(descriptor)
