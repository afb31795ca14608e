import json

import numpy as np
import pytest

from jaxeff import data


@pytest.fixture
def movielens(data_folder):
    np.savez(
        data_folder / "movielens_latest_small.npz",
        user_id=np.array([1, 1, 4, 9], np.uint16),
        movie_id=np.array([50, 7, 7, 300], np.uint32),
        rating_half_stars=np.array([1, 10, 7, 8], np.uint8),
        timestamp=np.array([4_000_000_000, 2, 3, 4], np.uint32),
        item_movie_id=np.array([300, 7, 50, 8], np.uint32),
        item_genre_bits=np.array([1, 2, 4, 8], np.uint32),
        item_year=np.array([1990, 0, 2001, 1977], np.uint16),
    )


def test_movielens_ids_are_rows_of_the_tables(movielens):
    dataset = data.load("movielens")
    assert dataset.arrays["user"].tolist() == [0, 0, 1, 2]
    assert dataset.arrays["item"].tolist() == [2, 1, 1, 0]
    assert dataset.arrays["rating"].tolist() == [0.5, 5.0, 3.5, 4.0]
    assert dataset.arrays["timestamp"].tolist() == [4_000_000_000, 2, 3, 4]
    assert (dataset.info.facts["num_users"], dataset.info.facts["num_items"]) == (3, 4)


def test_locality_traces_keep_the_open_last_bin(data_folder):
    trace = {
        "tables": 3,
        "batch": 8,
        "lookups": 10,
        "distinct_rows": 5,
        "rows_share": [0.6, 0.4],
        "lookups_share": [0.3, 0.7],
    }
    content = {"reuse_bins_lo": [0, 1], "reuse_bins_hi": [1, None], "traces": {"t": trace}}
    (data_folder / "dlrm_locality.json").write_text(json.dumps(content))
    trace = data.locality_traces()["t"]
    assert trace.reuse_high.tolist() == [1, np.inf]
    assert trace.tables == 3


def test_missing_locality_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"dlrm_locality\.json"):
        data.locality_traces()


def test_damaged_locality_file_is_named(data_folder):
    (data_folder / "dlrm_locality.json").write_text("{")
    with pytest.raises(ValueError, match=r"dlrm_locality\.json is damaged"):
        data.locality_traces()


@pytest.mark.data
def test_movielens_has_the_published_access_skew():
    dataset = data.load("movielens")
    hits = np.sort(np.bincount(dataset.arrays["item"], minlength=9742))[::-1]
    hits = hits[hits > 0]
    assert (hits.sum(), len(hits), dataset.info.facts["num_users"]) == (100_836, 9_724, 610)
    assert hits[: round(0.01 * len(hits))].sum() / hits.sum() == pytest.approx(0.157, abs=5e-4)
    assert hits[: round(0.10 * len(hits))].sum() / hits.sum() == pytest.approx(0.600, abs=5e-4)
    assert np.mean(hits == 1) == pytest.approx(0.35, abs=5e-3)


@pytest.mark.data
def test_locality_traces_have_the_published_mean_reuse():
    traces = data.locality_traces()
    reuse = [trace.lookups / trace.distinct_rows for trace in traces.values()]
    pooling = [trace.lookups / trace.tables / trace.batch for trace in traces.values()]
    np.testing.assert_allclose(reuse, [6.9, 7.6, 12.7], atol=0.05)
    np.testing.assert_allclose(pooling, [15.8, 8.3, 13.6], atol=0.05)
    for trace in traces.values():
        # Seventeen shares rounded to three decimals each.
        assert trace.rows_share.sum() == pytest.approx(1, abs=17 * 5e-4)
        assert trace.lookups_share.sum() == pytest.approx(1, abs=17 * 5e-4)
