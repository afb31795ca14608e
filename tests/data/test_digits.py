import hashlib
import sys

import numpy as np
import pytest

from jaxeff.data import digits, load
from jaxeff.data.dataset import NotHere


@pytest.fixture(scope="module")
def bunch():
    from sklearn.datasets import load_digits

    return load_digits()


def test_schema():
    train, test = load("digits"), load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.arrays["image"].shape == (1437, 8, 8, 1)
    assert (train.arrays["image"].dtype, train.arrays["label"].dtype) == (np.uint8, np.int32)
    assert train.info.source == "embedded"
    assert train.info.num_classes == 10


def test_train_and_test_together_are_the_whole_set_once(bunch):
    parts = [load("digits", split).arrays for split in ("train", "test")]
    ours = np.concatenate([np.c_[p["label"], p["image"].reshape(len(p["label"]), 64)] for p in parts])
    theirs = np.c_[bunch.target, np.floor(bunch.data * 255 / 16 + 0.5)]
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_split_is_stratified(bunch):
    share = np.bincount(bunch.target) * 360 / 1797
    counts = np.bincount(load("digits", "test").arrays["label"])
    assert np.all(np.abs(counts - share) < 1)


def test_split_never_changes():
    # Frozen when the data set was defined: results of different versions of jaxeff stay comparable.
    label = load("digits", "test").arrays["label"]
    assert hashlib.sha256(label.astype("u1").tobytes()).hexdigest()[:16] == "d8e666a623c0f9f1"


def test_a_prefix_holds_every_class():
    assert np.bincount(load("digits", "train[:200]").arrays["label"]).min() >= 10


def test_largest_remainders_share_out_the_test_rows():
    train, test = digits.split_rows(np.array([0] * 5 + [1] * 3 + [2] * 2), 4)
    # Quotas 2.0, 1.2, 0.8: whole parts 2, 1, 0, and the one left goes to the largest remainder.
    assert [int(np.sum(test < 5)), int(np.sum((test >= 5) & (test < 8))), int(np.sum(test >= 8))] == [2, 1, 1]
    assert sorted([*train, *test]) == list(range(10))


def test_without_scikit_learn_the_reason_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    digits._digits.cache_clear()
    with pytest.raises(NotHere, match=r"jaxeff\[data\]"):
        digits.read_digits("train")


def test_where_the_file_lies_elsewhere_scikit_learn_reads_it(monkeypatch):
    expected = digits.read_digits("train").arrays
    monkeypatch.setattr(digits.pathlib.Path, "exists", lambda path: False)
    digits._digits.cache_clear()
    for name, array in digits.read_digits("train").arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])
