"""Recommendations whose tables lie in tiers: queries from examples, pooled bags arranged for the model, scores.

A query has a bag for each example and table; tables of the user's side may have one bag alone, which all examples
share.

Letters: B examples of a query, D numbers in a row, G bags, L entries of the longest, T tables.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxeff import sdm
from jaxeff.dlrm.model import DLRM, Architecture


def query_of(ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray | None = None) -> sdm.Query:
    """The bags of some examples, table after table.

    Args:
      ids: integers [B, T, L]; those behind the end of a bag are not read.
      lengths: integers [B, T], 0 .. L.
      weights: float32 [B, T, L], or None.

    Raises:
      TypeError: for ids or lengths that are not integers.
      ValueError: for shapes that do not fit together, or lengths out of range.
    """
    ids, lengths = np.asarray(ids), np.asarray(lengths)
    for name, array in (("ids", ids), ("lengths", lengths)):
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if ids.ndim != 3 or lengths.shape != ids.shape[:2] or (weights is not None and np.shape(weights) != ids.shape):
        raise ValueError(f"expected ids [B, T, L] and lengths [B, T], got {ids.shape} and {lengths.shape}")
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= ids.shape[2]:
        raise ValueError(f"lengths: expected 0 .. {ids.shape[2]}, got {lengths.min()} .. {lengths.max()}")
    by_table, counts = ids.swapaxes(0, 1), lengths.T
    inside = np.arange(ids.shape[2]) < counts[..., None]
    return sdm.Query(
        indices=by_table[inside].astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts.ravel())]).astype(np.int64),
        tables=np.repeat(np.arange(ids.shape[1], dtype=np.int32), len(ids)),
        weights=None if weights is None else np.asarray(weights, np.float32).swapaxes(0, 1)[inside],
    )


def per_example(pooled: jax.Array, bags: Sequence[int], examples: int) -> jax.Array:
    """Vectors of a query as the model takes them.

    Args:
      pooled: float32 [G, D], table after table.
      bags: of each table in the query, `examples`, or 1 for one that all of them share.
      examples: B.

    Returns:
      float32 [B, T, D].

    Raises:
      ValueError: for another number of bags.
    """
    if odd := [count for count in bags if count not in (1, examples)]:
        raise ValueError(f"bags: expected 1 or {examples} for each table, got {odd[0]}")
    if len(pooled) != sum(bags):
        raise ValueError(f"bags: the query has {len(pooled)} bags, but {tuple(bags)} are {sum(bags)}")
    starts = np.cumsum([0, *bags[:-1]])
    where = np.stack([start + np.arange(examples) * (count > 1) for start, count in zip(starts, bags, strict=True)], 1)
    return pooled[where]


Score = Callable[[Any, Any, sdm.Arrays, Any], tuple[jax.Array, jax.Array]]


def scorer(architecture: Architecture, bags: Sequence[int], examples: int) -> Score:
    """A compiled function (params, dense [B, n_d], arrays, layout) -> (logits [B], vectors of the bags [G, D]).

    Args:
      architecture: of the model.
      bags: as in `per_example`.
      examples: B.
    """
    model = DLRM(architecture)

    @partial(jax.jit, static_argnames="layout")
    def score(params: Any, dense: jax.Array, arrays: sdm.Arrays, layout: Any) -> tuple[jax.Array, jax.Array]:
        pooled = sdm.pool(arrays, layout)
        logits = model.apply({"params": params}, dense, per_example(pooled, bags, examples))
        return logits, pooled  # type: ignore[return-value]

    return score


def serve(
    tiers: sdm.Tiers,
    score: Score,
    params: Any,
    requests: Iterable[tuple[sdm.Query, Any]],
    *,
    depth: int = 2,
    lookahead: int = 0,
    deadline: float | None = None,
    keep_going: bool = False,
) -> Generator[tuple[sdm.Staged | sdm.Failed, jax.Array | None], None, None]:
    """Scores queries one after another, while the rows of the next ones are fetched.

    Vectors of bags are kept for when the same bag is asked for again, if the tiers have a cache of them.

    Args:
      tiers: with the tables.
      score: of `scorer`.
      params: of the model without its tables.
      requests: queries, and the dense features [B, n_d] of each.
      depth, lookahead, deadline, keep_going: as of `jaxeff.sdm.stream`.

    Yields:
      Each query as it was staged, and its logits [B], perhaps not computed yet; or, with `keep_going`, one that failed,
      and None.
    """
    dense: deque[Any] = deque()
    last: tuple[sdm.Staged, jax.Array] | None = None

    def asked() -> Generator[sdm.Query, None, None]:
        for query, features in requests:
            dense.append(features)
            yield query

    options = {"depth": depth, "lookahead": lookahead, "deadline": deadline, "keep_going": keep_going}
    for staged in sdm.stream(tiers, asked(), **options):  # type: ignore[arg-type]
        features = dense.popleft()
        if isinstance(staged, sdm.Failed):
            yield staged, None
            continue
        logits, pooled = score(params, features, staged.arrays, staged.layout)
        tiers.read_by(staged, pooled)
        if tiers.vectors is not None:
            # One query late, so that nobody waits for the program that has just begun.
            if last is not None:
                tiers.remember(*last)
            last = staged, pooled
        yield staged, logits
    if last is not None:
        tiers.remember(*last)
