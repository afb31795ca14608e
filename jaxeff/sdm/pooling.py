"""The part of a tiered look-up that JAX compiles: rows that were staged, and rows in memory, pooled in one program.

Letters: D dimension, G bags, L look-ups of the longest bag, N look-ups, R rows.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.ops.embedding_bag import embedding_bag_csr, pooled_lookup
from jaxeff.sdm.encoding import RowFormat, decode_jax
from jaxeff.sdm.queries import Query

# NumPy's on the host, JAX's inside a program.
Array = Any


class Part(NamedTuple):
    """Bags whose rows lie in one array.

    Attributes:
      rows: float32 [R, D], or uint8 [R, row bytes] in another format.
      indices: int32, positions in `rows`: [N] bag after bag, or [G, L] padded.
      bounds: int32, offsets [G + 1] of the first form, lengths [G] of the second.
      weights: float32, shaped as `indices`, or None.
    """

    rows: Array
    indices: Array
    bounds: Array
    weights: Array | None


class Arrays(NamedTuple):
    """What a program takes to pool the bags of a query.

    Attributes:
      parts: of bags whose rows lie together.
      ready: float32 [V, D], vectors of bags that need no rows.
      order: int32 [G], where the vector of each bag is: bags of the parts one after another, then those that are ready.
    """

    parts: tuple[Part, ...]
    ready: Array
    order: Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """What of a staged query is static.

    Attributes:
      formats: of the rows of each part.
      mode: "sum" or "mean".
    """

    formats: tuple[RowFormat, ...]
    mode: str


def pool(arrays: Arrays, layout: Layout) -> jax.Array:
    """Pools the bags of a query; may be called inside jit, with `layout` static.

    Returns:
      float32 [G, D], a vector for each bag, in the order of the query.
    """
    return jnp.concatenate([*parts_pooled(arrays, layout), arrays.ready])[arrays.order]


def parts_pooled(arrays: Arrays, layout: Layout) -> list[jax.Array]:
    """The bags of each part, float32 [bags, D]."""
    return [_pooled(part, form, layout.mode) for part, form in zip(arrays.parts, layout.formats, strict=True)]


def pool_on_host(rows: np.ndarray, asked: Query, mode: str) -> np.ndarray:
    """Sums rows float32 [N, D], one for each look-up, position by position as compiled programs do."""
    if asked.weights is not None:
        rows = rows * asked.weights[:, None]
    lengths, starts = asked.lengths, asked.offsets[:-1]
    pooled = np.zeros((len(lengths), rows.shape[1]), np.float32)
    for position in range(lengths.max(initial=0)):
        longer = lengths > position
        pooled[longer] += rows[starts[longer] + position]
    return pooled / np.maximum(lengths, 1)[:, None].astype(np.float32) if mode == "mean" else pooled


def _pooled(part: Part, form: RowFormat, mode: str) -> jax.Array:
    decode = None if form.kind == "float32" else partial(decode_jax, fmt=form)
    if part.indices.ndim == 2:
        return pooled_lookup(part.rows, part.indices, part.bounds, part.weights, mode, decode=decode)
    return embedding_bag_csr(
        part.rows, part.indices, part.bounds, part.weights, mode, kind=form.kind, dim=form.dim, decode=decode
    )
