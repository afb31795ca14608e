"""Faults of the older asynchronous calls: the same bytes, or an error that names file and place."""

import errno
import os

import numpy as np
import pytest

from jaxeff.sdm.io import aio, kernel
from jaxeff.sdm.io.errors import DeadlineExceeded, ReadError, ShortRead
from jaxeff.sdm.io.reader import open_reader

ROWS, LENGTH = 300, 700


@pytest.fixture
def table(tmp_path):
    """A reader by the older calls, the path and the rows."""
    rows = np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH), dtype=np.uint8)
    rows.tofile(tmp_path / "table")
    try:
        reader = open_reader([tmp_path / "table"], backend="aio", queue_depth=8)
    except OSError as error:
        pytest.skip(f"no aio here: {error}")
    with reader:
        yield reader, tmp_path / "table", rows


def gather(reader, **settings):
    wanted = np.arange(0, ROWS, 4)
    out = np.zeros((len(wanted), LENGTH), np.uint8)
    reader.gather(np.zeros(len(wanted), int), wanted * LENGTH, LENGTH, out, **settings)
    return out


def failing(monkeypatch, name, faults):
    """Calls of this name fail with these error numbers, or not where there is None."""
    allowed = kernel.call

    def call(called, *args):
        if called == name and faults and (code := faults.pop(0)):
            raise code if isinstance(code, BaseException) else OSError(code, os.strerror(code))
        return allowed(called, *args)

    monkeypatch.setattr(kernel, "call", call)


def changed(monkeypatch, change):
    """Results of reads are changed: function (their number so far, results) -> results."""
    take = aio.Context.take
    seen = [0]

    def taken(self):
        user, result = take(self)
        seen[0] += len(user)
        return user, change(seen[0], result)

    monkeypatch.setattr(aio.Context, "take", taken)


@pytest.mark.parametrize("name", ["io_submit", "io_getevents"])
def test_calls_that_are_interrupted_or_find_no_room_are_made_again(table, monkeypatch, name):
    codes = [errno.EINTR, None, errno.EINTR, None] + ([errno.EAGAIN] * 3 if name == "io_submit" else [])
    failing(monkeypatch, name, codes)
    np.testing.assert_array_equal(gather(table[0]), table[2][::4])


def test_a_request_that_is_refused_ends_like_one_that_failed(table, monkeypatch):
    failing(monkeypatch, "io_submit", [None, errno.EIO])
    with pytest.raises(ReadError, match=r"table cannot be read at byte \d+: Input/output error"):
        gather(table[0])
    np.testing.assert_array_equal(gather(table[0]), table[2][::4])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), errno.EINVAL])
def test_after_an_interruption_nothing_is_in_flight(table, monkeypatch, error):
    failing(monkeypatch, "io_getevents", [None, None, error])
    with pytest.raises((KeyboardInterrupt, OSError)):
        gather(table[0])
    np.testing.assert_array_equal(gather(table[0]), table[2][::4])


def test_the_rest_of_a_short_read_is_asked_for_again(table, monkeypatch):
    changed(monkeypatch, lambda number, result: np.minimum(result, 512) if number % 3 else result)
    np.testing.assert_array_equal(gather(table[0]), table[2][::4])


def test_a_truncated_file_and_a_deadline_are_named(table):
    reader, path, _ = table
    with pytest.raises(DeadlineExceeded, match="of 75 rows had arrived"):
        gather(reader, deadline=1e-9)
    os.truncate(path, 10_000)
    with pytest.raises(ShortRead, match="table ends at byte 10000"):
        gather(reader)
