"""Readers of access traces in `$JAXEFF_DATA`: MovieLens ratings, and the reuse of rows in Meta's embedding traces."""

import json
from typing import NamedTuple

import numpy as np

from jaxeff.data.dataset import Dataset, DatasetInfo, NotHere
from jaxeff.data.local import data_file, read_npz

# Bit order of `item_genre_bits`.
MOVIELENS_GENRES = (
    *("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
    "(no genres listed)",
)


class LocalityTrace(NamedTuple):
    """How often rows are used again within one batch of a published embedding trace.

    Attributes:
      tables: number of embedding tables.
      batch: number of samples in the batch.
      lookups: number of row reads.
      distinct_rows: number of different rows read.
      reuse_low: int64 [B]; bin b holds the rows that are hit more than `reuse_low[b]` times.
      reuse_high: float64 [B]; and at most `reuse_high[b]` times; the last is infinite.
      rows_share: float64 [B], share of the distinct rows in each bin.
      lookups_share: float64 [B], share of the lookups that go to rows of each bin.
    """

    tables: int
    batch: int
    lookups: int
    distinct_rows: int
    reuse_low: np.ndarray
    reuse_high: np.ndarray
    rows_share: np.ndarray
    lookups_share: np.ndarray


def read_movielens(split: str) -> Dataset:
    """Reads the MovieLens latest-small ratings (September 2018) from `movielens_latest_small.npz`.

    There is no published split: "train" is everything, sorted by user and then movie. Sort by `timestamp` for an
    access trace, or slice by time for a split of your own.

    Args:
      split: "train", the only one.

    Returns:
      Data set with `user` int32 [100836] (0 .. 609), `item` int32 [100836] (0 .. 9741), `rating` float32 [100836]
      (0.5 .. 5) and `timestamp` int64 [100836] (seconds since 1970). `info.facts` has `num_users`, `num_items`, the
      items' `item_movie_id` uint32, `item_genre_bits` uint32 and `item_year` uint16 (0 = unknown), all [9742], and
      `genres`, the names of the bits.

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    user_id, movie_id, half_stars, timestamp, item_movie_id, genre_bits, year = read_npz(
        data_file("movielens_latest_small.npz"),
        *("user_id", "movie_id", "rating_half_stars", "timestamp", "item_movie_id", "item_genre_bits", "item_year"),
    )
    users, user = np.unique(user_id, return_inverse=True)
    by_id = np.argsort(item_movie_id, kind="stable")
    item = by_id[np.searchsorted(item_movie_id, movie_id, sorter=by_id)]
    info = DatasetInfo(
        task="ratings",
        citation="Harper and Konstan (2015), The MovieLens Datasets, ACM TiiS 5(4):19, doi 10.1145/2827872",
        licence="GroupLens terms: no endorsement implied, redistribution under the same terms, no commercial use "
        "without permission, no warranty",
        notes="No published split; 'train' holds all ratings.",
        facts={
            "num_users": len(users),
            "num_items": len(item_movie_id),
            "item_movie_id": item_movie_id,
            "item_genre_bits": genre_bits,
            "item_year": year,
            "genres": MOVIELENS_GENRES,
        },
    )
    arrays = {
        "user": user.astype(np.int32),
        "item": item.astype(np.int32),
        "rating": half_stars.astype(np.float32) / 2,
        "timestamp": timestamp.astype(np.int64),
    }
    return Dataset("movielens", split, arrays, info)


def locality_traces() -> dict[str, LocalityTrace]:
    """Reads the reuse histograms of Meta's published DLRM embedding traces from `dlrm_locality.json`.

    Use them to calibrate a synthetic generator of accesses.

    Returns:
      The traces by name.

    Raises:
      FileNotFoundError: the file is not in `$JAXEFF_DATA`.
      ValueError: the file is damaged.
    """
    try:
        path = data_file("dlrm_locality.json")
    except NotHere as reason:
        raise FileNotFoundError(f"the locality traces were not found. Searched {reason}") from None
    try:
        content = json.loads(path.read_text())
        low = np.array(content["reuse_bins_lo"], np.int64)
        high = np.array([np.inf if bound is None else bound for bound in content["reuse_bins_hi"]], np.float64)
        return {
            name: LocalityTrace(
                tables=trace["tables"],
                batch=trace["batch"],
                lookups=trace["lookups"],
                distinct_rows=trace["distinct_rows"],
                reuse_low=low,
                reuse_high=high,
                rows_share=np.array(trace["rows_share"]),
                lookups_share=np.array(trace["lookups_share"]),
            )
            for name, trace in content["traces"].items()
        }
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); copy it again") from error
