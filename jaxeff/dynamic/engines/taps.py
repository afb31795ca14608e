"""Moving rows between positions and the taps that read them, for every engine that leaves out positions.

A table says which row each tap finds for each position ([T, positions], the number of rows where it finds none). It is
made from static shapes, see `jaxeff.dynamic.engines.geometry`; only who is kept depends on the input.

Letters: N batch, T kernel taps, K kept.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.dynamic.engines import rows


def closed(kept: jax.Array) -> jax.Array:
    """Rows [N, K, C] with one more of zeros, for taps that find none: [N * K + 1, C]."""
    return jnp.pad(kept.reshape(-1, kept.shape[-1]), ((0, 1), (0, 0)))


def tap_sum(table: np.ndarray, count: int, products: jax.Array, kept: jax.Array) -> jax.Array:
    """Adds up, for every position, what each of its taps finds.

    Args:
      table: int [T, positions], which of `count` things a tap finds; `count` for none.
      count: number of things.
      products: [N * K + 1, T * F]: of the kept things for every tap; the last row is of zeros.
      kept: int32 [N, K], indices of the kept things.

    Returns:
      [N, positions, F].
    """
    batch, number = kept.shape
    first = jnp.arange(batch, dtype=jnp.int32)[:, None] * number
    row_of = jnp.full((batch, count + 1), batch * number, jnp.int32)
    row_of = row_of.at[jnp.arange(batch)[:, None], kept].set(
        first + jnp.arange(number, dtype=jnp.int32), mode=rows.IN_BOUNDS, unique_indices=True
    )
    taps = len(table)
    flat = products.reshape(len(products) * taps, -1)
    parts = [
        flat.at[(row_of[:, found] * taps + tap).reshape(-1)].get(mode=rows.IN_BOUNDS) for tap, found in enumerate(table)
    ]
    return sum(parts[1:], parts[0]).reshape(batch, table.shape[1], -1)


def tap_spread(table: np.ndarray, values: jax.Array, kept: jax.Array) -> jax.Array:
    """Collects, for every kept position, what each of its taps finds.

    Args:
      table: int [T, positions], which of V values a tap finds; V for none.
      values: [N, V, F].
      kept: int32 [N, K], indices of the kept positions.

    Returns:
      [N, K, T * F], zeros where a tap finds none.
    """
    padded = jnp.pad(values, ((0, 0), (0, 1), (0, 0)))
    found = jnp.asarray(table.T)[kept].reshape(len(kept), -1)
    return rows.take_each(padded, found, 1).reshape(*kept.shape, -1)
