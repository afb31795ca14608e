import subprocess
import sys

import numpy as np
import pytest

from jaxeff import data
from jaxeff.data import archives, registry


def _tiny(split, source="local"):
    arrays = {"image": np.zeros((10, 2, 2, 1), np.uint8), "label": np.arange(10, dtype=np.int32)}
    return data.Dataset("tiny", split, arrays, data.DatasetInfo("classification", 10, source=source))


@pytest.fixture
def entries(monkeypatch):
    """A copy of the registry that a test may change."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="'mnits' is not a known data set; known: .*fashion_mnist.*mnist.*usps"):
        data.load("mnits")


def test_a_pattern_is_not_a_name():
    with pytest.raises(ValueError, match="not a known data set"):
        data.load("*")


def test_name_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="name must be a string"):
        data.load(None)


def test_names_are_sorted_and_hold_the_embedded_set():
    assert list(data.names()) == sorted(data.names())
    assert "digits" in data.names()


def test_unknown_split_lists_the_splits():
    with pytest.raises(ValueError, match="no split 'tset'; its splits: train, test"):
        data.load("digits", "tset")


def test_absent_validation_split_says_what_to_slice():
    with pytest.raises(ValueError, match=r"slice 'train', for example 'train\[90%:\]'"):
        data.load("digits", "validation")


def test_slice_selects_rows():
    whole, part = data.load("digits", "test"), data.load("digits", "test[10:20]")
    np.testing.assert_array_equal(part.arrays["label"], whole.arrays["label"][10:20])
    assert part.split == "test[10:20]"


def test_missing_data_names_every_place_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_DATA", str(tmp_path))
    (tmp_path / "tfds").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist")
    message = str(error.value)
    assert f"1. files in $JAXEFF_DATA: {tmp_path} has no file mnist_20k.npz" in message
    assert f"2. prepared TFDS data sets in $TFDS_DATA_DIR: {tmp_path / 'tfds'} has no prepared mnist" in message
    assert "3. TFDS download: no network: storage.googleapis.com did not answer" in message
    assert "t10k-labels-idx1-ubyte.gz" in message
    assert 'jaxeff.data.prepare("mnist", "DIR")' in message
    assert "set JAXEFF_DATA to that folder" in message


@pytest.mark.parametrize("name", sorted(set(data.names()) - {"digits"}))
def test_every_missing_set_says_that_the_variable_is_not_set(name):
    with pytest.raises(FileNotFoundError, match=f"(?s)'{name}' was not found.*(JAXEFF_DATA is not set|TFDS_DATA_DIR)"):
        data.load(name)


def test_silent_network_is_asked_once_and_for_less_than_a_second(monkeypatch):
    asked = []

    def silent(url, seconds):
        asked.append(seconds)
        raise ConnectionError("no network")

    monkeypatch.setattr(archives, "opened", silent)
    with pytest.raises(FileNotFoundError):
        data.load("mnist")
    assert len(asked) == 1
    assert sum(asked) < 1


def test_places_are_searched_in_order_until_one_has_the_data(entries):
    asked = []

    def empty(split):
        asked.append("first")
        raise data.NotHere("first place: empty")

    def full(split):
        asked.append("second")
        return _tiny(split, "second")

    def never(split):
        raise AssertionError("searched although the data was found before")

    registry._ENTRIES["tiny"] = registry._Entry(("train",), (empty, full, never), ())
    assert data.load("tiny").info.source == "second"
    assert asked == ["first", "second"]


def test_built_in_order_is_files_then_prepared_then_download():
    kinds = [getattr(read, "func", read).__name__ for read in registry._ENTRIES["fashion_mnist"].readers]
    assert kinds == ["read_fashion_mnist", "_read_prepared", "_read_downloaded"]


def test_registered_set_is_loaded_and_sliced_like_any_other(entries):
    data.register("tiny", _tiny, splits=("train", "validation"))
    assert "tiny" in data.names()
    assert data.load("tiny", "validation[50%:]").arrays["label"].tolist() == [5, 6, 7, 8, 9]


def test_registered_set_that_is_not_there_shows_its_place_and_remedy(entries):
    def absent(split):
        raise data.NotHere("the tape archive: tape 7 is not mounted")

    data.register("tape", absent, how_to_get="mount tape 7")
    with pytest.raises(FileNotFoundError, match="(?s)tape 7 is not mounted.*- mount tape 7"):
        data.load("tape")


def test_taken_name_is_refused_unless_overwritten(entries):
    with pytest.raises(ValueError, match="overwrite=True"):
        data.register("mnist", _tiny)
    data.register("mnist", _tiny, overwrite=True)
    assert len(data.load("mnist")) == 10


def test_registering_without_splits_or_function_is_refused(entries):
    with pytest.raises(ValueError, match="at least one split"):
        data.register("tiny", _tiny, splits=())
    with pytest.raises(TypeError, match="a string and a function"):
        data.register("tiny", None)


@pytest.mark.slow
def test_importing_the_room_imports_no_extra():
    program = "import sys, jaxeff.data; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    extras = ["tensorflow_datasets", "tensorflow", "array_record", "PIL", "sklearn", "matplotlib", "orbax"]
    done = subprocess.run([sys.executable, "-c", program, *extras], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
