import os

import numpy as np
import pytest

from jaxeff.data.cache import cache_folder, cached_array, file_key


def _numbers(out):
    out[:] = np.arange(6).reshape(2, 3)


def _never(out):
    raise AssertionError("the array was computed again")


def test_array_is_computed_once_and_read_back():
    first = cached_array("a", "k", (2, 3), np.int32, _numbers)
    second = cached_array("a", "k", (2, 3), np.int32, _never)
    np.testing.assert_array_equal(first, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(second, first)
    assert not second.flags.writeable


def test_other_key_is_computed_again():
    cached_array("a", "k", (2, 3), np.int32, _numbers)
    with pytest.raises(AssertionError, match="again"):
        cached_array("a", "other", (2, 3), np.int32, _never)


def test_failure_in_the_middle_leaves_no_file():
    with pytest.raises(AssertionError, match="again"):
        cached_array("a", "k", (2, 3), np.int32, _never)
    assert list(cache_folder().iterdir()) == []


def test_damaged_file_is_made_again():
    cached_array("a", "k", (2, 3), np.int32, _numbers)
    (path,) = cache_folder().iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    np.testing.assert_array_equal(cached_array("a", "k", (2, 3), np.int32, _numbers), [[0, 1, 2], [3, 4, 5]])


def test_file_of_another_shape_is_made_again():
    cached_array("a", "k", (6,), np.int32, lambda out: out.fill(7))
    assert cached_array("a", "k", (2, 3), np.int32, _numbers).shape == (2, 3)


def test_folder_that_cannot_be_written_warns_and_computes_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXEFF_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="Set JAXEFF_CACHE"):
        array = cached_array("a", "k", (2, 3), np.int32, _numbers)
    np.testing.assert_array_equal(array, [[0, 1, 2], [3, 4, 5]])
    assert not array.flags.writeable


def test_key_follows_the_content_and_not_the_time_stamp(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    os.utime(two, (1, 1))
    assert file_key(one) == file_key(two)
    assert file_key(one).startswith("3-ba7816bf")  # SHA-256 of "abc", FIPS 180-2 appendix B.1
    two.write_bytes(b"abd")
    assert file_key(one) != file_key(two)
