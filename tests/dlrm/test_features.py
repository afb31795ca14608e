"""Data sets as features, against what each row says."""

import numpy as np
import pytest

from jaxeff import data
from jaxeff.data.dataset import Dataset, DatasetInfo
from jaxeff.dlrm.features import log_counts, of_clicks, of_ratings

YEAR = 365.2425 * 24 * 3600


def clicks():
    arrays = {
        "dense": np.array([[3.0, -2], [0, 7]], np.float32),
        "dense_missing": np.array([[False, False], [True, False]]),
        "cat": np.array([[1, 0, 4], [2, 3, 1]], np.int32),
        "label": np.array([1.0, 0], np.float32),
    }
    facts = {"table_sizes": (3, 4, 5), "table_names": ("a", "b", "c")}
    return Dataset("log", "train", arrays, DatasetInfo("clicks", facts=facts))


def ratings(count=40):
    rng = np.random.default_rng(0)
    arrays = {
        "user": rng.integers(0, 5, count).astype(np.int32),
        "item": rng.integers(0, 4, count).astype(np.int32),
        "rating": rng.choice([3.0, 3.5, 4.0, 5.0], count).astype(np.float32),
        "timestamp": np.int64(YEAR * 40) + rng.permutation(count),
    }
    facts = {
        "num_users": 5,
        "num_items": 4,
        "item_genre_bits": np.array([0b101, 0, 0b1, 0b110], np.uint32),
        "item_year": np.array([2000, 0, 1899, 2014], np.uint16),
        "genres": ("x", "y", "z"),
    }
    return Dataset("films", "train", arrays, DatasetInfo("ratings", facts=facts))


def test_counts_are_on_a_scale_of_logarithms():
    values, missing = np.array([[0, 1, -2, 1e6]]), np.array([[False, False, False, True]])
    np.testing.assert_allclose(log_counts(values, missing), [[0, np.log(2), 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(log_counts(values, signed=True), [[0, np.log(2), -np.log(3), np.log1p(1e6)]], rtol=1e-6)
    assert log_counts(values).dtype == np.float32


def test_click_logs_have_one_id_for_each_table():
    found = of_clicks(clicks(), signed=True)
    np.testing.assert_allclose(found.arrays["dense"], [[np.log(4), -np.log(3)], [0, np.log(8)]], rtol=1e-6)
    assert found.arrays["ids"][..., 0].tolist() == [[1, 0, 4], [2, 3, 1]]
    assert (found.arrays["lengths"] == 1).all() and len(found) == 2
    assert found.rows == (3, 4, 5) and found.tables == ("a", "b", "c")
    architecture = found.architecture("kaggle", dim=4)
    assert (architecture.dense, architecture.rows, architecture.bag_lengths) == (2, (3, 4, 5), (1, 1, 1))


@pytest.mark.parametrize("split", ["time", "random"])
def test_ratings_are_rows_of_four_tables(split):
    films = ratings()
    train, test = of_ratings(films, split=split, held_out=0.25)
    assert len(train) == 30 and len(test) == 10
    assert train.rows == (5, 4, 3, 24) and train.tables == ("user", "item", "genre", "year")
    years = {0: 21, 1: 0, 2: 1, 3: 23}
    genres = {0: [0, 2], 1: [], 2: [0], 3: [1, 2]}
    by_key = {}
    for u, i, rating, when in zip(*(films.arrays[n] for n in ("user", "item", "rating", "timestamp")), strict=True):
        by_key.setdefault((u, i), []).append((float(rating >= 4), when))
    for part in (train, test):
        for ids, lengths, label, dense in zip(*(part.arrays[n] for n in ("ids", "lengths", "label", "dense")),
                                              strict=True):  # fmt: skip
            user, item = int(ids[0, 0]), int(ids[1, 0])
            assert label in [found for found, _ in by_key[user, item]]
            assert lengths.tolist() == [1, 1, len(genres[item]), 1]
            assert ids[2, : lengths[2]].tolist() == genres[item] and ids[3, 0] == years[item]
            age = {0: 10, 1: 0, 2: 111, 3: 0}[item]
            np.testing.assert_allclose(dense, [np.log1p(age)], atol=1e-5)
    assert train.architecture().bag_lengths == (1, 1, 2, 1)


def test_the_latest_ratings_are_held_out():
    films = ratings()
    order = np.argsort(films.arrays["timestamp"])
    train, test = of_ratings(films, held_out=0.25)
    for part, rows in ((train, order[:30]), (test, order[30:])):
        np.testing.assert_array_equal(part.arrays["ids"][:, 0, 0], films.arrays["user"][rows])
        np.testing.assert_array_equal(part.arrays["label"], films.arrays["rating"][rows] >= 4)


def test_random_splits_are_those_of_their_seed():
    first, again, other = (of_ratings(ratings(), split="random", seed=seed)[1].arrays["ids"] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_data_sets_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="dataset: 'films' is no click log, it has no dense"):
        of_clicks(ratings())
    with pytest.raises(ValueError, match="dataset: 'log' holds no ratings, it has no user"):
        of_ratings(clicks())
    with pytest.raises(ValueError, match="split: expected time or random, got 'user'"):
        of_ratings(ratings(), split="user")
    for share in (0, 1, 0.001):
        with pytest.raises(ValueError, match="held_out: expected a share"):
            of_ratings(ratings(), held_out=share)


@pytest.mark.data
def test_published_logs_are_read():
    criteo, avazu = (of_clicks(data.load(name, "validation")) for name in ("criteo", "avazu"))
    assert criteo.arrays["ids"].shape[1:] == (26, 1) and avazu.arrays["dense"].shape[1] == 0
    for found in (criteo, avazu):
        assert (found.arrays["ids"][..., 0].max(0) < found.rows).all()
        assert found.architecture("small").rows == found.rows
