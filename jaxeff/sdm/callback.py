"""A tiered look-up inside any program of JAX's, for notebooks: the program stops and asks the host.

Nothing overlaps and every result is copied; `jaxeff.sdm.pipeline` is for speed.

Letters: B samples, D dimension, L look-ups of the longest bag, T tables.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.sdm.queries import Query
from jaxeff.sdm.tiers import Tiers


def callback_lookup(tiers: Tiers) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function that looks up the tables of `tiers` and may be called inside jit and vmap.

    Args:
      tiers: open as long as the function is used.

    Returns:
      A function (ids int32 [B, T, L], lengths int32 [B, T]) -> float32 [B, T, D]. Ids beyond the length of a bag are
      ignored. Errors of the look-up end the program, with their message. A program that has it must not be told to
      `Tiers.read_by` of the same tiers, which would wait for each other.
    """

    def on_host(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        if (lengths < 0).any() or (lengths > ids.shape[-1]).any():
            raise ValueError(f"lengths must be 0 .. {ids.shape[-1]}, got {lengths.min()} .. {lengths.max()}")
        samples, tables, _ = ids.shape
        inside = np.arange(ids.shape[-1]) < lengths[..., None]
        offsets = np.concatenate([[0], np.cumsum(lengths.ravel())]).astype(np.int64)
        of_bags = np.tile(np.arange(tables, dtype=np.int32), samples)
        pooled = tiers.lookup_on_host(Query(ids[inside].astype(np.int64), offsets, of_bags))
        return pooled.reshape(samples, tables, -1)

    def look_up(ids: jax.Array, lengths: jax.Array) -> jax.Array:
        for name, array in (("ids", ids), ("lengths", lengths)):
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise TypeError(f"{name} must be integers, got {array.dtype}")
        if ids.ndim != 3 or ids.shape[:2] != lengths.shape or ids.shape[1] != len(tiers.rows):
            raise ValueError(
                f"ids must be [B, {len(tiers.rows)}, L] and lengths [B, {len(tiers.rows)}], got {ids.shape} and "
                f"{lengths.shape}"
            )
        result = jax.ShapeDtypeStruct((*lengths.shape, tiers.dim), jnp.float32)
        return jax.pure_callback(on_host, result, ids, lengths, vmap_method="sequential")

    return look_up
