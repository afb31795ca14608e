"""Reading through a queue of requests in the kernel: it is kept full, and what has finished is checked as arrays.

The requests of a whole filling of the staging buffer are made at once, as rows of 64 bytes, and put into the queue by
the slice; one call hands them over and waits for a quarter of the queue. So the interpreter works per batch of
completions, never per row. The queues are those of `uring` and `aio`.
"""

import abc
import errno
import os
import time
from typing import ClassVar, Protocol

import numpy as np

from jaxeff.sdm.io import blocks, kernel
from jaxeff.sdm.io.blocks import Plan
from jaxeff.sdm.io.errors import DeadlineExceeded, ReadError
from jaxeff.sdm.io.files import Files
from jaxeff.sdm.io.progress import PATIENCE, progress


class Queue(Protocol):
    """Requests on their way through the kernel."""

    def put(self, requests: np.ndarray) -> None:
        """Places requests, V64 [k], to be handed over."""

    def enter(self, wait: int, seconds: float | None = None) -> None:
        """Hands over what was put, and waits until `wait` completions are there or the time is over."""

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Takes all completions that are there: user_data uint64 [k] and result int [k]."""

    def drain(self) -> None:
        """Withdraws what was not handed over and waits for the rest, through signals: memory must outlive its reads."""

    def close(self) -> None:
        """Gives the queue back; nothing may be in flight."""


class QueueReads(abc.ABC):
    """Reads by a queue, which a fork or another thread makes anew where it must."""

    name: ClassVar[str]
    layout: ClassVar[np.dtype]

    def __init__(self, files: Files, half: int, depth: int):
        self.files, self.half, self.depth, self._quarter = files, half, depth, max(1, depth // 4)
        self._descriptors = np.array(files.descriptors, np.int32)
        self._memory = kernel.pages(2 * half)
        self._queue: Queue | None = None
        self._make()
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _open(self) -> Queue:
        """A queue of this thread."""

    @abc.abstractmethod
    def _address(self, made: np.ndarray, file: np.ndarray) -> None:
        """Fills in what only this kind of request has: the operation, and which file it is of."""

    def read(self, plan: Plan, out: np.ndarray, until: float | None, seconds: float | None) -> None:
        """Reads what a plan says and copies its rows out.

        Args:
          plan: of the call.
          out: uint8 [n, >= length].
          until: time.monotonic() after which nothing is waited for.
          seconds: the deadline as it was given, for the message.
        """
        queue = self._queue if self._queue is not None and self._process == os.getpid() else self._make()
        try:
            return self._drained(queue, plan, out, until, seconds)
        except OSError as error:
            if error.errno != errno.EEXIST or isinstance(error, ReadError):
                raise
        # The queue is another thread's.
        return self._drained(self._make(), plan, out, until, seconds)

    def close(self) -> None:
        """Gives the queue back."""
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _drained(self, queue: Queue, plan: Plan, out: np.ndarray, until: float | None, seconds: float | None) -> None:
        try:
            self._read(queue, plan, out, until, seconds)
        except BaseException:
            queue.drain()
            raise

    def _read(self, queue: Queue, plan: Plan, out: np.ndarray, until: float | None, seconds: float | None) -> None:
        need = plan.need.copy()
        finished = np.zeros(len(need), bool)
        again = _Again(self, plan, need)
        border = plan.request_border
        fillings = len(border) - 1
        made = copied = at = flying = idle = 0
        left = np.diff(border)
        requests = np.empty(0, "V64")
        while copied < fillings:
            while flying < self.depth:
                if at == len(requests):
                    # Both halves of the staging buffer may be in use.
                    if made == min(fillings, copied + 2):
                        break
                    requests, at, made = self.requests(plan, int(border[made]), int(border[made + 1])), 0, made + 1
                count = min(self.depth - flying, len(requests) - at)
                queue.put(requests[at : at + count])
                at, flying = at + count, flying + count
            # With nothing left to submit, being woken early would only cost time.
            wanted = min(self._quarter, flying) if at < len(requests) or made < fillings else flying
            queue.enter(wanted, None if until is None else until - time.monotonic())
            user, result = queue.take()
            idle = 0 if len(user) else idle + 1
            if idle:
                time.sleep(min(idle, 10) * 1e-4)
            if idle > PATIENCE:
                raise ReadError(errno.EAGAIN, self.files.paths[int(plan.file[0])], int(plan.offset[0]))
            good = result >= need[user]
            if not good.all():
                queue.put(again(user[~good], result[~good]))
                user = user[good]
            finished[user] = True
            flying -= len(user)
            older = int(np.count_nonzero(user < border[copied + 1]))
            left[copied] -= older
            if older < len(user):
                left[copied + 1] -= len(user) - older
            while copied < made and not left[copied]:
                plan.scatter(copied, self._memory, out)
                copied += 1
            if until is not None and copied < fillings and time.monotonic() >= until:
                raise DeadlineExceeded(plan.arrived(finished), len(plan.order), seconds or 0.0)

    def requests(self, plan: Plan, start: int, stop: int) -> np.ndarray:
        """The requests of a plan from one to another as the queue takes them: V64 [k]."""
        made = np.zeros(stop - start, self.layout)
        self._address(made, plan.file[start:stop])
        made["off"] = plan.offset[start:stop]
        made["addr"] = plan.position[start:stop] + self._memory.ctypes.data
        made["len"] = plan.size[start:stop]
        made["user_data"] = np.arange(start, stop)
        return made.view("V64")

    def _make(self) -> Queue:
        if self._queue is not None:
            self._queue.close()
            self._queue = None
        self._queue = queue = self._open()
        self._process = os.getpid()
        return queue

    def _probe(self) -> None:
        """Reads one byte, as a kernel may have the queue, but not all of its operations."""
        files = self.files
        for file in np.flatnonzero(files.sizes)[:1]:
            start = blocks.bases(files.sizes, files.block)
            one = blocks.plan(np.array([file]), np.array([0]), 1, start, files.block, self.half)
            self.read(one, np.empty((1, 1), np.uint8), None, None)


class _Again:
    """What becomes of requests that did not bring what was needed: the rest is asked for again, or an error raised."""

    def __init__(self, reads: QueueReads, plan: Plan, need: np.ndarray):
        self._reads, self._plan, self._need = reads, plan, need
        self._got: dict[int, int] = {}
        self._tries: dict[int, int] = {}

    def __call__(self, user: np.ndarray, result: np.ndarray) -> np.ndarray:
        """Args: the requests, uint64 [k], and their results, int32 [k]; returns V64 [k], what to ask for now."""
        made = []
        for request, came in zip(user.tolist(), result.tolist(), strict=True):
            got, tries = self._got.get(request, 0), self._tries.get(request, 0)
            offset, need = int(self._plan.offset[request]) + got, int(self._need[request])
            step = progress(self._reads.files, int(self._plan.file[request]), offset, need, came, tries)
            self._got[request] = got = got + step
            self._tries[request] = 0 if step else tries + 1
            self._need[request] -= step
            one = self._reads.requests(self._plan, request, request + 1)
            rest = one.view(self._reads.layout)
            rest["off"] += got
            rest["addr"] += got
            rest["len"] -= got
            made.append(one)
        return np.concatenate(made)
