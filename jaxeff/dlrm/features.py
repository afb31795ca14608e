"""Click logs and ratings as what the model takes: dense numbers, bags of ids for each table, a label.

Data sets in memory come through `jaxeff.data`; files of your own, of Criteo's or Avazu's layout, through
`jaxeff.dlrm.click_files` under the same names.

Letters: N examples, n_d dense features, T tables, L entries of the longest bag.
"""

import dataclasses

import numpy as np

from jaxeff.data import Dataset
from jaxeff.dlrm.model import Architecture, preset

# Ratings from which on a film counts as liked.
LIKED = 4.0
# Years of films that share a row, and where the rows begin.
_YEARS, _FIRST_YEAR = 5, 1900
_SECONDS_PER_YEAR = 365.2425 * 24 * 3600


@dataclasses.dataclass(frozen=True)
class Features:
    """Examples under one schema, whatever they come from.

    Attributes:
      arrays: `dense` float32 [N, n_d], `ids` int32 [N, T, L], `lengths` int32 [N, T], `label` float32 [N]; ids behind
        the end of a bag are 0.
      rows: of each table.
      tables: their names.
    """

    arrays: dict[str, np.ndarray]
    rows: tuple[int, ...]
    tables: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def architecture(self, name: str = "small", dim: int | None = None) -> Architecture:
        """A preset of `jaxeff.dlrm.model` for these features."""
        lookups = np.maximum(self.arrays["lengths"].max(0, initial=1), 1)
        return preset(name, dense=self.arrays["dense"].shape[1], rows=self.rows, lookups=lookups.tolist(), dim=dim)


def log_counts(values: np.ndarray, missing: np.ndarray | None = None, *, signed: bool = False) -> np.ndarray:
    """Counts on a scale that a network can read: log(1 + x).

    Args:
      values: [N, n_d].
      missing: bool [N, n_d], where there is none, which becomes 0; None where there are all.
      signed: whether negative numbers keep their sign, -log(1 - x); otherwise they become 0, as in the reference.

    Returns:
      float32 [N, n_d].
    """
    values = np.asarray(values, np.float64)
    scaled = np.sign(values) * np.log1p(np.abs(values)) if signed else np.log1p(np.maximum(values, 0))
    if missing is not None:
        scaled = np.where(missing, 0, scaled)
    return scaled.astype(np.float32)


def of_clicks(dataset: Dataset, *, signed: bool = False) -> Features:
    """Features of a click log, `jaxeff.data.load("criteo", ...)` or "avazu".

    Args:
      dataset: with `dense`, `dense_missing`, `cat` and `label`, and `table_sizes` and `table_names` among its facts.
      signed: as in `log_counts`.

    Returns:
      The features, one id for each table.

    Raises:
      ValueError: for another data set.
    """
    needed = ("dense", "dense_missing", "cat", "label")
    if missing := [name for name in needed if name not in dataset.arrays]:
        raise ValueError(f"dataset: {dataset.name!r} is no click log, it has no {', '.join(missing)}")
    arrays = dataset.arrays
    ids = np.asarray(arrays["cat"], np.int32)[..., None]
    features = {
        "dense": log_counts(arrays["dense"], arrays["dense_missing"], signed=signed),
        "ids": ids,
        "lengths": np.ones(ids.shape[:2], np.int32),
        "label": np.asarray(arrays["label"], np.float32),
    }
    facts = dataset.info.facts
    return Features(features, tuple(facts["table_sizes"]), tuple(facts["table_names"]))


def of_ratings(
    dataset: Dataset, *, split: str = "time", held_out: float = 0.1, liked: float = LIKED, seed: int = 0
) -> tuple[Features, Features]:
    """Features of MovieLens, `jaxeff.data.load("movielens")`: will this user like this film?

    Tables are users, films, genres (a bag of all that a film has) and the years of films in steps of five, row 0 for
    those unknown. The dense feature is log(1 + age of the film in years when it was rated), 0 where that is unknown.

    Args:
      dataset: with `user`, `item`, `rating` and `timestamp`.
      split: "time", the latest ratings are held out; or "random".
      held_out: their share, in (0, 1).
      liked: the rating from which on the label is 1.
      seed: of a random split.

    Returns:
      `(train, test)`, train in the order of time.

    Raises:
      ValueError: for another data set, an unknown split, or a share that leaves one of both empty.
    """
    needed = ("user", "item", "rating", "timestamp")
    if missing := [name for name in needed if name not in dataset.arrays]:
        raise ValueError(f"dataset: {dataset.name!r} holds no ratings, it has no {', '.join(missing)}")
    if split not in ("time", "random"):
        raise ValueError(f"split: expected time or random, got {split!r}")
    user, item, rating, timestamp = (np.asarray(dataset.arrays[name]) for name in needed)
    count = round(held_out * len(user))
    if not 0 < held_out < 1 or not 0 < count < len(user):
        raise ValueError(f"held_out: expected a share in (0, 1) that leaves both parts some ratings, got {held_out}")
    facts = dataset.info.facts
    genres, sizes = _genre_bags(np.asarray(facts["item_genre_bits"]), len(facts["genres"]))
    year = np.asarray(facts["item_year"]).astype(np.int64)
    era = np.where(year > 0, 1 + np.maximum(year - _FIRST_YEAR, 0) // _YEARS, 0)
    age = np.where(year[item] > 0, 1970 + timestamp / _SECONDS_PER_YEAR - year[item], 0)
    ids = np.zeros((len(user), 4, max(genres.shape[1], 1)), np.int32)
    ids[:, 0, 0], ids[:, 1, 0], ids[:, 2, : genres.shape[1]], ids[:, 3, 0] = user, item, genres[item], era[item]
    lengths = np.ones((len(user), 4), np.int32)
    lengths[:, 2] = sizes[item]
    arrays = {
        "dense": log_counts(age[:, None]),
        "ids": ids,
        "lengths": lengths,
        "label": (rating >= liked).astype(np.float32),
    }
    rows = (facts["num_users"], facts["num_items"], len(facts["genres"]), int(era.max(initial=0)) + 1)
    in_time = np.lexsort((item, user, timestamp))
    if split == "time":
        parts = in_time[:-count], in_time[-count:]
    else:
        held = np.zeros(len(user), bool)
        held[np.random.default_rng(seed).permutation(len(user))[:count]] = True
        parts = in_time[~held[in_time]], in_time[held[in_time]]
    train, test = ({name: array[part] for name, array in arrays.items()} for part in parts)
    names = ("user", "item", "genre", "year")
    return Features(train, rows, names), Features(test, rows, names)


def _genre_bags(bits: np.ndarray, genres: int) -> tuple[np.ndarray, np.ndarray]:
    """Genres of each film as ids [items, most of one film], and how many it has."""
    has = (bits[:, None] >> np.arange(genres, dtype=bits.dtype)) & 1 > 0
    sizes = has.sum(1)
    # Stable, so those that a film has come first, in order.
    first = np.argsort(~has, 1, kind="stable")[:, : int(sizes.max(initial=0))]
    return np.where(np.arange(first.shape[1]) < sizes[:, None], first, 0).astype(np.int32), sizes.astype(np.int32)
