"""Readers of the click logs in `$JAXEFF_DATA`: Criteo display ads and Avazu mobile ads."""

import numpy as np

from jaxeff.data.dataset import Dataset, DatasetInfo
from jaxeff.data.local import data_file, read_npz

_SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}
_AVAZU_TABLES = (
    *("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model"),
    *("hour", "C1", "banner_pos", "device_type", "device_conn_type"),
    *("C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21"),
)


def read_criteo(split: str) -> Dataset:
    """Reads the head of the Criteo display-ads log from `criteo_8k.npz`.

    Missing values: a missing dense feature is 0 and marked in `dense_missing`; a missing categorical feature is row 0
    of its table, which nothing else uses. Dense values are as published (counts; the second column can be -2); take
    their logarithm in the model.

    Args:
      split: "train" (7,200 rows), "validation" (409, the file's dev part) or "test" (391).

    Returns:
      Data set with `dense` float32 [N, 13], `dense_missing` bool [N, 13], `cat` int32 [N, 26] (row ids, see
      `compact_ids`) and `label` float32 [N] (1 = click). `info.facts["table_sizes"]` gives the rows of each table, over
      all splits.

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    dense, dense_missing, cat, cat_missing, label, part = read_npz(
        data_file("criteo_8k.npz"), "dense", "dense_missing", "cat", "cat_missing", "label", "split"
    )
    ids, table_sizes = compact_ids(cat, cat_missing)
    info = DatasetInfo(
        task="clicks",
        num_classes=2,
        class_names=("no click", "click"),
        citation="Criteo Labs (2014), Display Advertising Challenge",
        licence="research only, non-commercial",
        notes="The first 8,000 rows of the log. Missing dense values are 0, missing categories are row 0.",
        facts={
            "table_sizes": table_sizes,
            "table_names": tuple(f"C{number}" for number in range(1, 27)),
            "dense_names": tuple(f"I{number}" for number in range(1, 14)),
        },
    )
    arrays = {
        "dense": np.where(dense_missing, 0, dense).astype(np.float32),
        "dense_missing": dense_missing,
        "cat": ids,
        "label": label.astype(np.float32),
    }
    return _of_split("criteo", split, arrays, part, info)


def read_avazu(split: str) -> Dataset:
    """Reads the head of the Avazu mobile-ads click log from `avazu_9k.npz`.

    All 22 features are categorical, so `dense` has no columns. Nothing is missing (row 0 of every table is unused);
    the -1 of column C20 is kept as a category of its own, as published.

    Args:
      split: "train" (8,087 rows), "validation" (480, the file's dev part) or "test" (432).

    Returns:
      Data set with `dense` float32 [N, 0], `dense_missing` bool [N, 0], `cat` int32 [N, 22] (row ids, see
      `compact_ids`) and `label` float32 [N] (1 = click). `info.facts["table_sizes"]` gives the rows of each table, over
      all splits.

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    click, hashed, integer, part = read_npz(data_file("avazu_9k.npz"), "click", "hashed", "integer", "split")
    values = np.concatenate([hashed.astype(np.int64), integer.astype(np.int64)], axis=1)
    ids, table_sizes = compact_ids(values, np.zeros(values.shape, bool))
    info = DatasetInfo(
        task="clicks",
        num_classes=2,
        class_names=("no click", "click"),
        citation="Avazu (2014), Click-Through Rate Prediction, Kaggle",
        licence="Kaggle competition data; research only",
        notes="The first 8,999 rows of the log, all of one hour.",
        facts={"table_sizes": table_sizes, "table_names": _AVAZU_TABLES, "dense_names": ()},
    )
    arrays = {
        "dense": np.zeros((len(click), 0), np.float32),
        "dense_missing": np.zeros((len(click), 0), bool),
        "cat": ids,
        "label": click.astype(np.float32),
    }
    return _of_split("avazu", split, arrays, part, info)


def compact_ids(values: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Numbers the distinct values of every column, so that they can be rows of an embedding table.

    Args:
      values: int [N, T], any integers, one column per table.
      missing: bool [N, T], True where there is no value.

    Returns:
      `(ids, table_sizes)`: ids int32 [N, T], 0 where missing and otherwise 1, 2, ... in increasing order of the value;
      table_sizes, the number of rows of each table, row 0 included.

    >>> compact_ids(np.array([[70], [5], [70], [0]]), np.array([[False], [False], [False], [True]]))[0].ravel().tolist()
    [2, 1, 2, 0]
    """
    ids = np.zeros(values.shape, np.int32)
    table_sizes = []
    for table in range(values.shape[1]):
        present = ~missing[:, table]
        distinct, inverse = np.unique(values[present, table], return_inverse=True)
        ids[present, table] = inverse + 1
        table_sizes.append(len(distinct) + 1)
    return ids, tuple(table_sizes)


def _of_split(name: str, split: str, arrays: dict[str, np.ndarray], part: np.ndarray, info: DatasetInfo) -> Dataset:
    rows = part == _SPLIT_CODES[split]
    return Dataset(name, split, {key: array[rows] for key, array in arrays.items()}, info)
