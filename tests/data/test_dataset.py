import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.data.dataset import Dataset, DatasetInfo, parse_split

INFO = DatasetInfo(task="classification")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.data())
def test_row_slices_mean_what_python_slices_mean(length, data):
    start = data.draw(st.none() | st.integers(-length, length))
    stop = data.draw(st.none() | st.integers(-length, length))
    rows = list(range(length))[start:stop]
    text = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    if rows:
        assert list(range(*parse_split(text).bounds(length))) == rows
    else:
        with pytest.raises(ValueError, match="selects no row"):
            parse_split(text).bounds(length)


@pytest.mark.parametrize("length", [100, 999, 1437])
def test_neighbouring_percentages_cover_every_row_once(length):
    bounds = [parse_split(f"train[{p}%:{p + 10}%]").bounds(length) for p in range(0, 100, 10)]
    rows = [row for first, end in bounds for row in range(first, end)]
    assert rows == list(range(length))


def test_percentage_counts_from_the_end_when_negative():
    assert parse_split("test[-10%:]").bounds(200) == (180, 200)


def test_a_plain_split_is_everything():
    assert parse_split("validation") == ("validation", "", "")
    assert parse_split("validation").bounds(7) == (0, 7)


@pytest.mark.parametrize("split", ["", "train[", "train[1]", "train[a:b]", "train[::2]", "train + test", "[1:2]"])
def test_unreadable_split_shows_what_is_expected(split):
    with pytest.raises(ValueError, match=r"train\[10%:20%\]"):
        parse_split(split)


def test_split_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="split must be a string"):
        parse_split(3)


@pytest.mark.parametrize("split", ["train[:11]", "train[-11:]", "train[:101%]", "train[20:30]"])
def test_slice_outside_the_split_is_not_clipped(split):
    with pytest.raises(ValueError, match="has 10 rows"):
        parse_split(split).bounds(10)


def test_fractional_rows_are_refused():
    with pytest.raises(ValueError, match="whole number of rows"):
        parse_split("train[:2.5]").bounds(10)


def test_arrays_of_different_length_are_refused():
    with pytest.raises(ValueError, match="'label': 2"):
        Dataset("x", "train", {"image": np.zeros((3, 1)), "label": np.zeros(2)}, INFO)


def test_data_set_without_arrays_is_refused():
    with pytest.raises(ValueError, match="no arrays"):
        Dataset("x", "train", {}, INFO)


def test_length_and_summary_describe_the_rows():
    dataset = Dataset("x", "test", {"label": np.zeros(4, np.int32)}, INFO)
    assert len(dataset) == 4
    assert "label: int32[4]" in repr(dataset)


def test_unknown_task_lists_the_valid_ones():
    with pytest.raises(ValueError, match="classification, detection, clicks, ratings"):
        DatasetInfo(task="poetry")


def test_class_names_must_match_the_number_of_classes():
    with pytest.raises(ValueError, match="num_classes=3"):
        DatasetInfo(task="classification", num_classes=3, class_names=("a", "b"))
