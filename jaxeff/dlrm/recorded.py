"""Traces from real logs: film ratings in order of time, and rows of click logs."""

import numpy as np

from jaxeff.data import Dataset
from jaxeff.dlrm.traces import TableTrace, Trace


def ratings_trace(dataset: Dataset, history: int = 20) -> Trace:
    """The look-ups of ratings in order of time, one query each, with what the user had rated before.

    Args:
      dataset: with `user`, `item` and `timestamp` [N], and `num_users` and `num_items` in its facts, as
        `jaxeff.data.load("movielens")` has them.
      history: the most items of the "history" bag.

    Returns:
      Trace of N queries, all of one item: tables "user" and "history" (the user's last items before the query, newest
      last, in rows of their own; empty at first) on the user side, "item" and, where the facts have `item_genre_bits`
      and `genres`, "genres" on the item side. Consecutive ratings of one user are a session.

    Raises:
      ValueError: for a data set of another task, or a history below 0.
    """
    if dataset.info.task != "ratings":
        raise ValueError(f"dataset must hold ratings, got {dataset.name!r} of task {dataset.info.task!r}")
    if history < 0:
        raise ValueError(f"history must be at least 0, got {history}")
    order = np.argsort(dataset.arrays["timestamp"], kind="stable")
    user, item = (np.asarray(dataset.arrays[name])[order].astype(np.int64) for name in ("user", "item"))
    facts, queries = dataset.info.facts, len(order)
    one = np.arange(queries + 1)
    tables = [
        TableTrace("user", facts["num_users"], "user", user, one),
        TableTrace("history", facts["num_items"], "user", *_history(user, item, history)),
        TableTrace("item", facts["num_items"], "item", item, one),
    ]
    if "genres" in facts and "item_genre_bits" in facts:
        has = (np.asarray(facts["item_genre_bits"])[:, None] >> np.arange(len(facts["genres"]))) & 1  # [items, genres]
        query, genre = np.nonzero(has[item])
        tables.append(TableTrace("genres", len(facts["genres"]), "item", genre, np.searchsorted(query, one)))
    return Trace(tuple(tables), 1, np.cumsum(np.diff(user, prepend=user[:1]) != 0))


def clicks_trace(dataset: Dataset, batch_items: int = 1) -> Trace:
    """The look-ups of a click log in its order, so many rows of it in a query.

    Args:
      dataset: with `cat` [N, T] and, in its facts, `table_sizes` and `table_names`, as `jaxeff.data.load("criteo")` and
        `jaxeff.data.load("avazu")` have them.
      batch_items: rows of the log in a query; rows that do not fill the last one are left out.

    Returns:
      Trace of N // batch_items queries; every table is on the item side with bags of one row.

    Raises:
      ValueError: for a data set of another task, or fewer rows than a query has.
    """
    if dataset.info.task != "clicks":
        raise ValueError(f"dataset must hold clicks, got {dataset.name!r} of task {dataset.info.task!r}")
    ids = np.asarray(dataset.arrays["cat"])
    if not 1 <= batch_items <= len(ids):
        raise ValueError(f"batch_items must be in 1..{len(ids)}, the rows of the log, got {batch_items}")
    queries = len(ids) // batch_items
    kept, one = ids[: queries * batch_items].astype(np.int64), np.arange(queries * batch_items + 1)
    facts = dataset.info.facts
    tables = tuple(
        TableTrace(name, size, "item", np.ascontiguousarray(kept[:, t]), one)
        for t, (name, size) in enumerate(zip(facts["table_names"], facts["table_sizes"], strict=True))
    )
    return Trace(tables, batch_items, np.arange(queries))


def _history(user: np.ndarray, item: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The user's last items before each query: indices int64 [nnz] and offsets int64 [N + 1]."""
    by_user = np.argsort(user, kind="stable")  # the queries of one user after the other, each in order
    seat = np.empty(len(user), np.int64)
    seat[by_user] = np.arange(len(user))
    first = np.searchsorted(user[by_user], user)
    length = np.minimum(seat - first, most)
    offsets = np.append(0, np.cumsum(length))
    place = np.arange(offsets[-1]) + np.repeat(seat - length - offsets[:-1], length)
    return item[by_user][place], offsets
