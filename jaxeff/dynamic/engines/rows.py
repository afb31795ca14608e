"""Reading and writing rows by index, in the forms that XLA compiles to copies of whole rows.

All indices here come from `top_k`, so they are in bounds; saying so halves the time of a gather on CPU.

Letters: N batch, S things, k of them kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import compat

IN_BOUNDS: Any = "promise_in_bounds"
ASCENDING: dict[str, Any] = {"mode": IN_BOUNDS, "unique_indices": True, "indices_are_sorted": True}


def take(array: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    """Rows of an array along an axis, by ascending indices [k]."""
    return array.at[(slice(None),) * (axis % array.ndim) + (indices,)].get(**ASCENDING)


def take_each(array: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    """Rows of every array [...] in [N, ...] along an axis, by indices [N, k] of its own."""
    return jnp.take_along_axis(array, _along(indices, axis, array.ndim), axis, mode=IN_BOUNDS)


def put_each(rows: jax.Array, indices: jax.Array, axis: int, size: int) -> jax.Array:
    """The inverse of `take_each`: `size` rows along the axis, zeros where there is none."""
    where = _along(slots(indices, size), axis, rows.ndim)
    kept = where < indices.shape[-1]
    return jnp.where(kept, jnp.take_along_axis(rows, jnp.where(kept, where, 0), axis, mode=IN_BOUNDS), 0)


def slots(indices: jax.Array, size: int) -> jax.Array:
    """Where each of `size` things stands among the kept: int32 [N, size] from [N, k]; k for those not kept."""
    batch, kept = indices.shape
    numbers = jnp.broadcast_to(jnp.arange(kept, dtype=jnp.int32), indices.shape)
    empty = jnp.full((batch, size), kept, jnp.int32)
    return empty.at[jnp.arange(batch)[:, None], indices].set(numbers, mode=IN_BOUNDS, unique_indices=True)


def of_groups(indices: jax.Array, size: int) -> jax.Array:
    """Members of groups of `size` neighbours: [N, k * size] from the indices of groups [N, k]."""
    return (indices[..., None] * size + jnp.arange(size, dtype=indices.dtype)).reshape(*indices.shape[:-1], -1)


def no_gradient(indices: jax.Array) -> np.ndarray:
    """The cotangent of integers."""
    return np.zeros(indices.shape, jax.dtypes.float0)


def _along(indices: jax.Array, axis: int, rank: int) -> jax.Array:
    shape = [1] * rank
    shape[0], shape[axis] = indices.shape
    return indices.reshape(shape)


def sum_like(kernel: jax.Array) -> jax.Array:
    """Zeros to sum the gradients of a kernel over samples in: float32 at least, as sums in bfloat16 stop growing."""
    zeros = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
    return compat.vary(zeros, compat.varying_axes(kernel))
