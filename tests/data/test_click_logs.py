import numpy as np
import pytest

from jaxeff import data
from jaxeff.data.click_logs import compact_ids


def test_ids_are_dense_ordered_and_zero_only_where_missing():
    values = np.array([[2**32 - 1, -5], [7, 3], [7, -5], [0, 9]])
    missing = np.array([[False, False], [False, True], [False, False], [True, False]])
    ids, table_sizes = compact_ids(values, missing)
    assert ids.tolist() == [[2, 1], [1, 0], [1, 1], [0, 2]]
    assert table_sizes == (3, 3)
    assert ids.dtype == np.int32


def test_table_without_any_value_has_the_missing_row_only():
    ids, table_sizes = compact_ids(np.zeros((3, 1), np.int64), np.ones((3, 1), bool))
    assert ids.tolist() == [[0], [0], [0]]
    assert table_sizes == (1,)


@pytest.fixture
def criteo(data_folder):
    random = np.random.default_rng(0)
    rows = 20
    arrays = {
        "label": random.integers(0, 2, rows, np.uint8),
        "dense": random.integers(-2, 100, (rows, 13)).astype(np.int32),
        "dense_missing": random.random((rows, 13)) < 0.3,
        "cat": random.integers(1, 6, (rows, 26)).astype(np.uint32) * 700_000_000,
        "cat_missing": random.random((rows, 26)) < 0.2,
        "split": np.repeat([0, 1, 2], [14, 4, 2]).astype(np.uint8),
    }
    arrays["cat"][arrays["cat_missing"]] = 0
    np.savez(data_folder / "criteo_8k.npz", **arrays)
    return arrays


def test_criteo_schema_and_splits(criteo):
    parts = {split: data.load("criteo", split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [14, 4, 2]
    arrays = parts["train"].arrays
    assert (arrays["dense"].dtype, arrays["cat"].dtype, arrays["label"].dtype) == (np.float32, np.int32, np.float32)
    np.testing.assert_array_equal(parts["test"].arrays["label"], criteo["label"][18:])


def test_missing_dense_values_are_zero_and_marked(criteo):
    arrays = data.load("criteo", "validation").arrays
    missing = criteo["dense_missing"][14:18]
    np.testing.assert_array_equal(arrays["dense_missing"], missing)
    np.testing.assert_array_equal(arrays["dense"], np.where(missing, 0, criteo["dense"][14:18]))


def test_one_value_has_one_row_in_all_splits(criteo):
    train, test = (data.load("criteo", split).arrays["cat"][:, 0] for split in ("train", "test"))
    hashes = np.concatenate([criteo["cat"][:14, 0], criteo["cat"][18:, 0]])
    ids = np.concatenate([train, test])
    for value in np.unique(hashes):
        assert len(set(ids[hashes == value].tolist())) == 1
    np.testing.assert_array_equal(ids == 0, hashes == 0)


def test_ids_stay_below_the_table_sizes(criteo):
    dataset = data.load("criteo")
    assert np.all(dataset.arrays["cat"] < np.array(dataset.info.facts["table_sizes"]))
    assert len(dataset.info.facts["table_names"]) == 26


def test_avazu_is_all_categories(data_folder):
    random = np.random.default_rng(1)
    click = random.integers(0, 2, 9).astype(np.uint8)
    np.savez(
        data_folder / "avazu_9k.npz",
        click=click,
        hashed=random.integers(0, 2**32, (9, 9), np.uint32),
        integer=random.integers(-1, 3, (9, 13)).astype(np.int32),
        split=np.repeat([0, 1, 2], 3).astype(np.uint8),
    )
    dataset = data.load("avazu", "validation")
    assert dataset.arrays["dense"].shape == (3, 0)
    assert dataset.arrays["cat"].shape == (3, 22)
    assert dataset.arrays["cat"].min() >= 1
    assert len(dataset.info.facts["table_names"]) == 22
    np.testing.assert_array_equal(dataset.arrays["label"], click[3:6])


@pytest.mark.data
def test_criteo_has_the_published_access_skew():
    parts = [data.load("criteo", split) for split in ("train", "validation", "test")]
    cat = np.concatenate([part.arrays["cat"] for part in parts])
    hits = np.concatenate([np.bincount(cat[:, table])[1:] for table in range(26)])
    hits = np.sort(hits[hits > 0])[::-1]
    assert (hits.sum(), len(hits)) == (184_333, 37_088)
    assert sum(parts[0].info.facts["table_sizes"]) == 37_088 + 26
    share = lambda part: hits[: round(part * len(hits))].sum() / hits.sum()
    assert share(0.01) == pytest.approx(0.576, abs=5e-4)
    assert share(0.10) == pytest.approx(0.761, abs=5e-4)
    assert np.mean(hits == 1) == pytest.approx(0.71, abs=5e-3)


@pytest.mark.data
@pytest.mark.parametrize(("name", "rate", "rows"), [("criteo", 0.216, 8000), ("avazu", 0.174, 8999)])
def test_click_rates(name, rate, rows):
    label = np.concatenate([data.load(name, split).arrays["label"] for split in ("train", "validation", "test")])
    assert len(label) == rows
    assert label.mean() == pytest.approx(rate, abs=5e-4)
