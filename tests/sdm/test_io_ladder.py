"""What a reader does where the system forbids or lacks something: the next best way, and one line that says so."""

import errno
import logging
import os
import pathlib
import tempfile

import numpy as np
import pytest

from jaxeff.sdm.io import kernel, mapped
from jaxeff.sdm.io.errors import ReadError, ShortRead
from jaxeff.sdm.io.reader import open_reader
from tests.sdm.files import rows_of

SHM = pathlib.Path("/dev/shm")


def forbid(monkeypatch, *names, code=errno.EPERM):
    """Makes system calls fail as a sandbox does."""
    allowed = kernel.call

    def call(name, *args):
        if name in names:
            raise OSError(code, f"{name}: {os.strerror(code)}")
        return allowed(name, *args)

    monkeypatch.setattr(kernel, "call", call)


SETTINGS = {
    "paths must be a list of at least one file": {"paths": []},
    "paths must be a list of at least one file, got 'x'": {"paths": "x"},
    "backend must be 'auto' or one of uring, aio, pread, mmap, got 'posix'": {"backend": "posix"},
    "direct must be 'auto', True or False, got 'yes'": {"direct": "yes"},
    "direct=True cannot be had with backend='mmap'": {"direct": True, "backend": "mmap"},
    "queue_depth must be 1 to 4096 reads, got 0": {"queue_depth": 0},
    "threads must be 1 to 1024, got 2000": {"threads": 2000},
    "block must be a power of two from 512 to 65536 bytes, got 1000": {"block": 1000},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_out_of_range_are_refused(contents, message):
    with pytest.raises(ValueError, match=message):
        open_reader(**{"paths": contents[0], **SETTINGS[message]})


def test_files_that_cannot_be_opened_are_named(contents, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        open_reader([*contents[0], tmp_path / "missing"])


def test_a_missing_permission_is_named(contents, monkeypatch):
    opened = os.open

    def refuse(path, flags, *args):
        if os.fspath(path).endswith("table1"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionError, match="table1"):
        open_reader(contents[0])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_without_io_uring_one_line_says_what_is_used_instead(contents, monkeypatch, caplog, code):
    forbid(monkeypatch, "io_uring_setup", "io_setup", code=code)
    caplog.set_level(logging.INFO)
    with open_reader(contents[0]) as rows:
        assert rows.name == "pread"
    assert len(caplog.records) == 1
    assert f"3 file(s) by pread, {'directly' if rows.direct else 'through the page cache'}" in caplog.text
    assert f"no uring: [Errno {code}] io_uring_setup: {os.strerror(code)}" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(OSError, match="no way of reading works: no uring: .*try backend='auto'") as caught:
        open_reader(contents[0], backend="uring")
    assert caught.value.errno == code


@pytest.mark.parametrize("direct", ["auto", False])
def test_without_io_uring_direct_reads_go_by_the_older_calls(contents, monkeypatch, caplog, direct):
    forbid(monkeypatch, "io_uring_setup")
    with open_reader(contents[0], direct=direct) as rows:
        assert rows.name == ("aio" if rows.direct else "pread")
    assert len(caplog.records) == 1
    if direct is False:
        assert "no aio: [Errno 95] aio reads directly or not at all" in caplog.text


def test_the_last_resort_is_a_map(contents, monkeypatch, caplog):
    forbid(monkeypatch, "io_uring_setup", "io_setup", "process_madvise", "process_vm_readv")
    monkeypatch.delattr(os, "preadv")
    with open_reader(contents[0], direct=False) as rows:
        assert rows.name == "mmap"
        out = np.zeros((2, 90), np.uint8)
        rows.gather([0, 2], [99_913, 5], 90, out)
    np.testing.assert_array_equal(out, rows_of(contents[1], [0, 2], [99_913, 5], 90))
    assert "no uring" in caplog.text and "no pread: [Errno 38] this system has no preadv" in caplog.text


@pytest.mark.parametrize("size", [0, 700, 8192, 9000])
def test_a_map_of_a_truncated_file_is_not_touched_where_the_kernel_may_not_copy(tmp_path, monkeypatch, size):
    forbid(monkeypatch, "process_vm_readv", code=errno.ENOSYS)
    path = tmp_path / "table"
    path.write_bytes(b"x" * 20_000)
    with open_reader([path], backend="mmap") as rows:
        os.truncate(path, size)
        with pytest.raises(ShortRead, match=f"ends at byte {size}"):
            rows.gather([0, 0], [0, 12_000], 600, np.zeros((2, 600), np.uint8))


def test_a_bad_page_of_a_map_is_a_read_error(contents, monkeypatch):
    forbid(monkeypatch, "process_vm_readv", code=errno.EFAULT)
    with open_reader(contents[0], backend="mmap") as rows, pytest.raises(ReadError, match="byte 40 through a map") as e:
        rows.gather([0], [40], 8, np.zeros((1, 8), np.uint8))
    assert (e.value.errno, e.value.path, e.value.offset) == (errno.EIO, str(contents[0][0]), 40)


def test_maps_are_advised_whatever_the_kernel_knows(contents, monkeypatch):
    asked = []
    monkeypatch.setattr(mapped.os, "posix_fadvise", lambda *args: asked.append(args[1:]))
    forbid(monkeypatch, "process_madvise")
    with open_reader(contents[0], backend="mmap") as rows:
        asked.clear()
        rows.gather([0, 0, 2], [4090, 90_000, 5], 8, np.zeros((3, 8), np.uint8))
        page = rows.block
    first = (0, 4098, os.POSIX_FADV_WILLNEED)
    assert asked[0] == first if page == 4096 else asked
    assert len(asked) == 3


@pytest.mark.skipif(not SHM.is_dir(), reason="there is no /dev/shm")
def test_files_in_memory_are_mapped_and_the_line_says_so(caplog):
    caplog.set_level(logging.INFO)
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        path = pathlib.Path(folder, "table")
        path.write_bytes(bytes(range(256)) * 40)
        with open_reader([path]) as rows:
            assert (rows.name, rows.direct) == ("mmap", False)
        for backend in ("uring", "pread"):
            with open_reader([path], backend=backend) as rows:
                assert not rows.direct
                out = np.zeros((1, 4), np.uint8)
                rows.gather([0], [258], 4, out)
                assert out.tolist() == [[2, 3, 4, 5]]
    assert "by mmap, through the page cache, in blocks of" in caplog.records[0].message
    assert "(the files lie in memory)" in caplog.records[0].message
    assert "cannot be read directly: its file system is memory" in caplog.records[1].message


def test_a_file_system_without_direct_reading_is_read_through_the_cache(contents, monkeypatch, caplog):
    opened = os.open

    def refuse(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", os.fspath(path))
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    caplog.set_level(logging.INFO)
    with open_reader(contents[0]) as rows:
        assert not rows.direct
    assert "table0 cannot be read directly: Invalid argument" in caplog.text
    with pytest.raises(OSError, match="Invalid argument"):
        open_reader(contents[0], direct=True)


def test_the_block_of_direct_reading_is_tried_where_the_kernel_does_not_say(contents, monkeypatch):
    monkeypatch.setattr(kernel, "direct_alignment", lambda descriptor: None)
    preadv = os.preadv

    def only_pages(descriptor, buffers, offset):
        if offset % 4096 or len(buffers[0]) % 4096:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", only_pages)
    with open_reader(contents[0], backend="pread") as rows:
        if rows.direct:
            assert rows.block == 4096
