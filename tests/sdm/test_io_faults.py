"""Faults of single reads and of the calls themselves: the same bytes, or an error that names file and place."""

import errno
import os
import pickle
import time

import numpy as np
import pytest

from jaxeff.sdm.io import blocks, progress, queued, uring
from jaxeff.sdm.io.errors import DeadlineExceeded, ReadError, ShortRead
from jaxeff.sdm.io.files import open_files
from jaxeff.sdm.io.pread import PreadReads
from jaxeff.sdm.io.uring import UringReads
from tests.sdm.uring_fake import FakeUring

ROWS, LENGTH = 200, 700


@pytest.fixture
def table(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, ROWS * LENGTH, dtype=np.uint8)
    array.tofile(tmp_path / "table")
    return tmp_path / "table", array.reshape(ROWS, LENGTH)


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def files(table, request):
    """The table, read in blocks of 512; direct reading is only pretended, as faults are what it is about."""
    opened = open_files([table[0]], False, 512)
    opened.direct = request.param
    yield opened
    opened.close()


def every_other_row(files):
    """A plan of many requests, and which rows it reads."""
    rows = np.random.default_rng(1).permutation(ROWS // 4) * 4
    start = blocks.bases(files.sizes, files.block)
    return blocks.plan(np.zeros(len(rows), int), rows * LENGTH, LENGTH, start, files.block, 16 * 512), rows


def read_by_ring(files, calls, depth=8, until=None):
    plan, rows = every_other_row(files)
    reads = UringReads(files, 16 * 512, depth, calls)
    out = np.zeros((len(rows), LENGTH), np.uint8)
    try:
        reads.read(plan, out, until, 0.5)
    finally:
        assert not calls.pending, "memory may go while it is written to"
        reads.close()
        assert calls.closed == calls.made
    return out, rows


def read_by_pool(files, preadv, until=None):
    plan, rows = every_other_row(files)
    reads = PreadReads(files, 16 * 512, 4, preadv)
    out = np.zeros((len(rows), LENGTH), np.uint8)
    try:
        reads.read(plan, out, until, 0.5)
    finally:
        reads.close()
    return out, rows


@pytest.mark.parametrize("depth", [1, 3, 8, 64])
@pytest.mark.parametrize("kernel", [{}, {"features": 0}, {"registers": False}, {"refused": uring.SINGLE_ISSUER}])
def test_answers_in_any_order_of_kernels_of_any_age(files, table, depth, kernel):
    calls = FakeUring(**kernel)
    out, rows = read_by_ring(files, calls, depth)
    np.testing.assert_array_equal(out, table[1][rows])
    assert calls.most <= depth


def test_a_kernel_that_knows_no_flags_is_enough(files, table):
    out, rows = read_by_ring(files, FakeUring(refused=0xFFFFFFFF))
    np.testing.assert_array_equal(out, table[1][rows])


# Results of reads by their number, as the kernel gives them: minus an error number, or fewer bytes than there are.
FAULTS = {
    "short": lambda number, came: min(came, 512) if number % 3 == 1 else came,
    "one byte": lambda number, came: min(came, 1) if 2 < number < 6 else came,
    "again": lambda number, came: -errno.EAGAIN if number % 4 == 1 else came,
    "interrupted": lambda number, came: -errno.EINTR if number % 5 == 1 else came,
    "nothing at all": lambda number, came: 0 if number % 7 == 1 else came,
    "all of it": lambda number, came: (came, min(came, 512), -errno.EAGAIN, 0, -errno.EINTR)[number % 5],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rest_of_a_read_is_asked_for_again(files, table, fault):
    calls = FakeUring()
    calls.answer = FAULTS[fault]
    out, rows = read_by_ring(files, calls)
    np.testing.assert_array_equal(out, table[1][rows])
    out, rows = read_by_pool(files, faulty_preadv(FAULTS[fault]))
    np.testing.assert_array_equal(out, table[1][rows])


def faulty_preadv(answer):
    numbers = iter(range(1_000_000))

    def preadv(descriptor, buffers, offset):
        came = os.preadv(descriptor, buffers, offset)
        result = answer(next(numbers), came)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    return preadv


def test_an_error_of_the_device_names_file_and_place(files, table):
    calls = FakeUring()
    calls.answer = lambda number, came: -errno.EIO if number == 9 else came
    for read in (lambda: read_by_ring(files, calls), lambda: read_by_pool(files, faulty_preadv(calls.answer))):
        with pytest.raises(ReadError, match=r"table cannot be read at byte \d+: Input/output error") as caught:
            read()
        assert (caught.value.errno, caught.value.path) == (errno.EIO, str(table[0]))
        assert caught.value.offset % 512 == 0


def test_a_read_that_gets_nowhere_is_given_up(files, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 5)
    calls = FakeUring()
    calls.answer = lambda number, came: came if number < 1 else -errno.EAGAIN
    with pytest.raises(ReadError, match=r"given up after 5 tries: Resource temporarily unavailable"):
        read_by_ring(files, calls)
    with pytest.raises(ReadError, match=r"given up after 5 tries: Input/output error"):
        read_by_pool(files, faulty_preadv(lambda number, came: 0))


def test_the_end_of_the_file_is_no_reason_to_ask_for_ever(files, table):
    os.truncate(table[0], 3000)
    for read in (lambda: read_by_ring(files, FakeUring()), lambda: read_by_pool(files, os.preadv)):
        with pytest.raises(ShortRead, match="table ends at byte 3000"):
            read()


def test_calls_that_are_interrupted_or_find_no_room_are_made_again(files, table):
    calls = FakeUring()
    calls.enters = [None, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ETIME, None, errno.EINTR] * 3
    out, rows = read_by_ring(files, calls)
    np.testing.assert_array_equal(out, table[1][rows])


def test_a_ring_that_never_takes_anything_is_given_up(files, monkeypatch):
    monkeypatch.setattr(queued, "PATIENCE", 5)
    calls = FakeUring()
    calls.enters = [None] + [errno.EAGAIN] * 6
    with pytest.raises(ReadError, match="Resource temporarily unavailable"):
        read_by_ring(files, calls)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EBADF, "bad")])
def test_whatever_interrupts_waits_for_the_reads_in_flight(files, error):
    calls = FakeUring()
    calls.enters = [None, None, None, error, KeyboardInterrupt(), None]
    with pytest.raises(type(error)):
        read_by_ring(files, calls)


def test_a_ring_of_another_thread_is_made_anew(files, table):
    calls = FakeUring()
    calls.enters = [None, OSError(errno.EEXIST, "exists")]
    out, rows = read_by_ring(files, calls)
    np.testing.assert_array_equal(out, table[1][rows])
    assert calls.made == 2


def test_an_interruption_of_the_new_ring_waits_for_its_reads_too(files):
    calls = FakeUring()
    calls.enters = [None, OSError(errno.EEXIST, "exists"), None, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        read_by_ring(files, calls)


def test_a_ring_whose_reads_fail_is_no_way_of_reading(files):
    calls = FakeUring()
    calls.answer = lambda number, came: -errno.EINVAL
    with pytest.raises(ReadError, match="Invalid argument"):
        UringReads(files, 16 * 512, 8, calls)
    assert calls.closed == calls.made == 1


def test_a_deadline_stops_and_waits_for_what_is_in_flight(files):
    calls = FakeUring()

    def hold_after_ten(number, came):
        calls.hold = number >= 10
        return came

    calls.answer = hold_after_ten
    with pytest.raises(DeadlineExceeded, match=r"\d+ of 50 rows had arrived at the deadline of 0.5 s") as caught:
        read_by_ring(files, calls, until=time.monotonic() + 0.02)
    assert 0 < caught.value.arrived <= 10 + 8
    with pytest.raises(DeadlineExceeded, match=r"0 of 50 rows"):
        read_by_pool(files, os.preadv, until=0.0)


@pytest.mark.parametrize("error", [ReadError(5, "t", 7, " x"), ShortRead("t", 7, 3), DeadlineExceeded(1, 2, 0.5)])
def test_errors_travel_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert isinstance(again, OSError)
