"""Every way of reading gives the bytes of the files, or an error that names what is wrong."""

import gc
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm.io import kernel, reader
from jaxeff.sdm.io.errors import DeadlineExceeded, ShortRead
from jaxeff.sdm.io.reader import open_reader
from tests.sdm.files import rows_of
from tests.sdm.uring_fake import FakeUring


def uring_works():
    try:
        os.close(kernel.call("io_uring_setup", 2, np.zeros(120, np.uint8).ctypes.data))
    except OSError:
        return False
    return True


def aio_works():
    """Whether temporary files can be read directly, and by the older calls."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(4096))
            file.flush()
            open_reader([file.name], backend="aio").close()
    except OSError:
        return False
    return True


# The ring in memory stands in where this machine forbids the real one.
WAYS = [("uring", "auto"), ("uring", False), ("pread", "auto"), ("pread", False), ("mmap", False)]
WAYS += [("aio", True)] if aio_works() else []


@pytest.fixture(autouse=True, scope="module")
def some_ring():
    with pytest.MonkeyPatch.context() as patch:
        if not uring_works():
            patch.setattr(kernel, "SystemUring", FakeUring)
        yield


@pytest.mark.parametrize(("backend", "direct"), WAYS)
def test_rows_repeat_straddle_and_end_at_the_end_of_the_file(contents, backend, direct):
    paths, arrays = contents
    files = np.array([0, 0, 1, 0, 2, 1, 0], np.int32)
    offsets = np.array([100_003 - 90, 0, 610, 500, 8102, 610, 500], np.int64)
    out = np.zeros((7, 100), np.uint8)
    with open_reader(paths, backend=backend, direct=direct, queue_depth=2) as rows:
        stats = rows.gather(files, offsets, 90, out)
        assert rows.name == backend and rows.block >= 512
        touched = {
            (f, b)
            for f, o in zip(files, offsets, strict=True)
            for b in range(o // rows.block, (o + 89) // rows.block + 1)
        }
    np.testing.assert_array_equal(out[:, :90], rows_of(arrays, files, offsets, 90))
    assert not out[:, 90:].any()
    assert stats.blocks == len(touched) and stats.bytes == stats.blocks * rows.block


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=3),
    st.integers(1, 5000),
    st.integers(1, 80),
    st.sampled_from([512, 4096, None]),
    st.integers(1, 16),
    st.integers(0, 2**32 - 1),
)
def test_every_way_of_reading_gives_the_same_bytes(sizes, length, count, block, depth, seed):
    rng = np.random.default_rng(seed)
    length = min(length, *sizes)
    arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    files = rng.integers(0, len(sizes), count)
    offsets = rng.integers(0, np.array(sizes)[files] - length + 1)
    expected = rows_of(arrays, files, offsets, length)
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder, str(number)) for number in range(len(sizes))]
        for path, array in zip(paths, arrays, strict=True):
            array.tofile(path)
        found = {}
        for backend, direct in WAYS:
            with open_reader(paths, backend=backend, direct=direct, queue_depth=depth, threads=3, block=block) as rows:
                out = np.zeros((count, length), np.uint8)
                found.setdefault(rows.block, set()).add(rows.gather(files, offsets, length, out))
                np.testing.assert_array_equal(out, expected, err_msg=f"{backend}, direct={rows.direct}")
    assert all(len(stats) == 1 for stats in found.values())


@pytest.mark.parametrize(("backend", "direct"), WAYS)
def test_many_fillings_of_the_staging_buffer(tmp_path, monkeypatch, backend, direct):
    monkeypatch.setattr(reader.blocks, "HALF", 16 * 4096)
    monkeypatch.setattr(reader.blocks.half_size, "__defaults__", (16 * 4096,))
    array = np.random.default_rng(0).integers(0, 256, (5000, 128), dtype=np.uint8)
    array.tofile(tmp_path / "table")
    order = np.random.default_rng(1).permutation(5000)
    out = np.zeros((5000, 128), np.uint8)
    with open_reader([tmp_path / "table"], backend=backend, direct=direct, queue_depth=8, threads=4) as rows:
        rows.gather(np.zeros(5000, int), order * 128, 128, out)
        np.testing.assert_array_equal(out, array[order])
        # A row that is longer than the buffer makes it grow.
        long = np.zeros((2, 200_000), np.uint8)
        rows.gather(np.zeros(2, int), np.array([3, 400_001]), 200_000, long)
    np.testing.assert_array_equal(long[1], array.ravel()[400_001:600_001])


@pytest.mark.parametrize(("backend", "direct"), WAYS)
def test_no_rows_are_read_from_no_bytes(tmp_path, backend, direct):
    (tmp_path / "empty").write_bytes(b"")
    with open_reader([tmp_path / "empty"], backend=backend, direct=direct) as rows:
        assert rows.gather(np.zeros(0, np.int32), np.zeros(0, np.int64), 8, np.zeros((0, 8), np.uint8)) == (0, 0, 0)
        with pytest.raises(ShortRead, match=r"empty ends at byte 0, but rows at byte 16 were asked for"):
            rows.gather([0], [16], 8, np.zeros((1, 8), np.uint8))


@pytest.mark.parametrize(("backend", "direct"), WAYS)
@pytest.mark.parametrize("size", [0, 700, 8192, 9000])
def test_a_file_truncated_while_it_is_open_is_an_error_with_the_place(tmp_path, backend, direct, size):
    path = tmp_path / "table"
    np.random.default_rng(0).integers(1, 256, 20_000, dtype=np.uint8).tofile(path)
    with open_reader([path], backend=backend, direct=direct) as rows:
        os.truncate(path, size)
        with pytest.raises(ShortRead, match=f"table ends at byte {size}, .* was truncated") as caught:
            rows.gather([0, 0], [0, 12_000], 600, np.zeros((2, 600), np.uint8))
        assert caught.value.path == caught.value.filename == str(path)
        assert caught.value.offset <= 12_000
        if size >= 700:
            rows.gather([0], [50], 600, np.zeros((1, 600), np.uint8))


@pytest.mark.parametrize(("backend", "direct"), WAYS)
def test_a_file_that_grew_is_read_to_its_new_end(tmp_path, backend, direct):
    path = tmp_path / "table"
    array = np.random.default_rng(0).integers(0, 256, 30_000, dtype=np.uint8)
    path.write_bytes(array[:1000].tobytes())
    (tmp_path / "next").write_bytes(array.tobytes())
    with open_reader([path, tmp_path / "next"], backend=backend, direct=direct) as rows:
        path.write_bytes(array.tobytes())
        out = np.zeros((3, 100), np.uint8)
        rows.gather([0, 1, 0], [29_900, 0, 0], 100, out)
    np.testing.assert_array_equal(out, [array[29_900:], array[:100], array[:100]])


@pytest.mark.parametrize(("backend", "direct"), WAYS)
def test_a_deadline_says_how_many_rows_had_arrived(tmp_path, backend, direct):
    np.zeros(400_000, np.uint8).tofile(tmp_path / "table")
    offsets = np.arange(0, 400_000, 8000)
    out = np.ones((50, 8), np.uint8)
    with open_reader([tmp_path / "table"], backend=backend, direct=direct, queue_depth=2, threads=1) as rows:
        with pytest.raises(DeadlineExceeded, match=r"of 50 rows had arrived at the deadline of 1e-09 s") as caught:
            rows.gather(np.zeros(50, int), offsets, 8, out, deadline=1e-9)
        assert 0 <= caught.value.arrived < caught.value.rows == 50
        with pytest.raises(DeadlineExceeded, match="0 of 50 rows"):
            rows.gather(np.zeros(50, int), offsets, 8, out, deadline=0)
        # The reader is as good as new.
        rows.gather(np.zeros(50, int), offsets, 8, out, deadline=1000)
    assert not out.any()


@pytest.mark.parametrize(("backend", "direct"), WAYS)
def test_nothing_stays_open(contents, backend, direct):
    paths, _ = contents
    count = lambda: len(os.listdir("/proc/self/fd"))
    gc.collect()
    before = count()
    rows = open_reader(paths, backend=backend, direct=direct)
    rows.gather([0], [0], 8, np.zeros((1, 8), np.uint8))
    rows.close()
    rows.close()
    with pytest.raises(RuntimeError, match="the reader is closed"):
        rows.gather([0], [0], 8, np.zeros((1, 8), np.uint8))
    # One that is only forgotten closes itself.
    open_reader(paths, backend=backend, direct=direct).gather([0], [0], 8, np.zeros((1, 8), np.uint8))
    del rows
    gc.collect()
    assert count() == before


@pytest.mark.parametrize(("backend", "direct"), WAYS)
def test_a_reader_goes_from_thread_to_thread(contents, backend, direct):
    paths, arrays = contents
    found = []
    with open_reader(paths, backend=backend, direct=direct) as rows:

        def read():
            out = np.zeros((1, 50), np.uint8)
            rows.gather([0], [333], 50, out)
            found.append(out[0])

        for _ in range(2):
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
            read()
    np.testing.assert_array_equal(found, [arrays[0][333:383]] * 4)


def test_two_threads_at_once_are_refused(contents, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    preadv = os.preadv

    def slow(descriptor, buffers, offset):
        entered.set()
        go_on.wait(10)
        return preadv(descriptor, buffers, offset)

    with open_reader(contents[0], backend="pread", direct=False) as rows:
        monkeypatch.setattr(rows._reads, "_preadv", slow)
        arguments = ([0], [0], 8, np.zeros((1, 8), np.uint8))
        thread = threading.Thread(target=rows.gather, args=arguments)
        thread.start()
        entered.wait(10)
        with pytest.raises(RuntimeError, match="another thread is using this reader"):
            rows.gather(*arguments)
        go_on.set()
        thread.join()


FORK = """
import os, sys
import numpy as np
from jaxeff.sdm.io.reader import open_reader

for backend in sys.argv[2:]:
    with open_reader([sys.argv[1]], backend=backend) as rows:
        out = np.zeros((1, 20), np.uint8)
        rows.gather([0], [900], 20, out)
        mine = out.tobytes()
        if os.fork() == 0:
            out[:] = 0
            rows.gather([0], [900], 20, out)
            os._exit(0 if out.tobytes() == mine else 1)
        assert os.wait()[1] == 0, backend
        out[:] = 0
        rows.gather([0], [900], 20, out)
        assert out.tobytes() == mine
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_child_of_a_fork_reads_with_its_own_means(contents):
    backends = [backend for backend in dict(WAYS) if backend != "uring" or kernel.SystemUring is not FakeUring]
    subprocess.run([sys.executable, "-c", FORK, str(contents[0][0]), *backends], capture_output=True, check=True)


BAD = {
    "files must be integers": lambda: ([0.5], [0], 8, (1, 8)),
    "offsets must be integers": lambda: ([0], [[0]], 8, (1, 8)),
    "files and offsets must be equally many, got 2 and 1": lambda: ([0, 0], [0], 8, (2, 8)),
    "length must be at least 1": lambda: ([0], [0], 0, (1, 8)),
    r"out must be uint8 \[1, >= 8\], got uint8 \(1, 7\)": lambda: ([0], [0], 8, (1, 7)),
    "files must be 0 to 2 for 3 open, got 0 to 3": lambda: ([0, 3], [0, 0], 8, (2, 8)),
    "files must be 0 to 2 for 3 open, got -1 to -1": lambda: ([-1], [0], 8, (1, 8)),
    r"offsets must be 0 to 2\*\*62 - 1 bytes, got -5 to -5": lambda: ([0], [-5], 8, (1, 8)),
    r"offsets must be .*, got 18446744073709551615": lambda: ([0], np.array([2**64 - 1], np.uint64), 8, (1, 8)),
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit_are_refused(contents, message):
    files, offsets, length, shape = BAD[message]()
    with open_reader(contents[0]) as rows, pytest.raises(ValueError, match=message):
        rows.gather(np.array(files), np.array(offsets), length, np.zeros(shape, np.uint8))


def test_out_must_have_contiguous_rows_and_a_deadline_must_be_a_number(contents):
    with open_reader(contents[0]) as rows:
        with pytest.raises(ValueError, match="rows of out must be contiguous and writeable"):
            rows.gather([0, 0], [0, 8], 8, np.zeros((8, 2), np.uint8).T)
        with pytest.raises(ValueError, match="deadline must be a number of seconds or None, got NaN"):
            rows.gather([0], [0], 8, np.zeros((1, 8), np.uint8), deadline=float("nan"))
