"""Which of S scored things are kept: exactly k of them, whatever the scores.

Higher scores first, among equal ones lower indices first, NaN last: a NaN in a feature map never selects its channel,
and exactly k are kept under ties and of dead channels too, which `scores >= kth_score` does not ensure.

Letters: S things, k of them kept.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff import compat
from jaxeff.ops import choice


def keep_count(ratio: float, size: int) -> int:
    """How many of `size` things are kept when a share is dropped: at least one, rounded half up.

    Args:
      ratio: share that is dropped, in [0, 1).
      size: how many there are.

    Raises:
      ValueError: for a ratio outside [0, 1), or a size below 1.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share that is dropped, in [0, 1), got {ratio}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    # What is meant by 0.9 is nine tenths: (1 - 0.9) * 15 is not quite 1.5.
    return max(1, math.floor(round((1 - ratio) * size, 9) + 0.5))


def top_k_indices(scores: jax.Array, k: int) -> jax.Array:
    """Indices of the k highest scores, ascending.

    Args:
      scores: [..., S].
      k: how many, 1..S.

    Returns:
      int32 [..., k], without gradient.

    Raises:
      TypeError: for a k that is no whole number.
      ValueError: for a k outside 1..S.
    """
    _check_count(k, scores)
    k = int(k)
    # Ascending, because neighbours in memory are then read one after the other.
    if choice.available(scores):
        return choice.highest(lax.stop_gradient(scores), k)
    return jnp.sort(lax.top_k(_ranked(scores), k)[1], axis=-1)


def mask_of(indices: jax.Array, size: int) -> jax.Array:
    """Mask of the kept: bool [..., size] from indices [..., k]."""
    rows = indices.reshape(-1, indices.shape[-1])
    mask = jnp.zeros((len(rows), size), bool)
    mask = mask.at[jnp.arange(len(rows))[:, None], rows].set(True, mode="promise_in_bounds", unique_indices=True)
    return mask.reshape(*indices.shape[:-1], size)


def top_k_mask(scores: jax.Array, k: int | jax.Array) -> jax.Array:
    """Mask of the k highest scores: bool [..., S] with exactly k True, without gradient.

    Args:
      scores: [..., S].
      k: how many; a traced number too, or an array that broadcasts against the scores, so that a sweep over ratios
        compiles once; a traced one outside 1..S is taken as 0 or S.

    Raises:
      TypeError: for a number with a fraction.
      ValueError: for a number that is not traced, outside 1..S.
    """
    if isinstance(k, float | np.floating):
        raise TypeError(f"k must be a whole number, got {k!r}")
    if isinstance(k, int | np.integer):
        _check_count(int(k), scores)
    if choice.available(scores):
        return choice.highest_mask(lax.stop_gradient(scores), k)
    keys = _ordered(_ranked(scores))
    # The k-th highest, bit by bit: sorting takes twenty times as long on CPU.
    zero, bits = jnp.zeros((), keys.dtype), jnp.iinfo(keys.dtype).bits

    def with_next_bit(i, threshold):
        higher = threshold | (jnp.ones_like(zero) << (bits - 1 - i).astype(keys.dtype))
        return jnp.where((keys >= higher).sum(-1, keepdims=True) >= k, higher, threshold)

    start = compat.vary(jnp.zeros((*keys.shape[:-1], 1), keys.dtype), compat.varying_axes(keys))
    threshold = lax.fori_loop(0, bits, with_next_bit, start)
    above, equal = keys > threshold, keys == threshold
    return above | (equal & (jnp.cumsum(equal, -1) <= k - above.sum(-1, keepdims=True)))


def _check_count(k: int, scores: jax.Array) -> None:
    if not isinstance(k, int | np.integer):
        raise TypeError(f"k must be a whole number, got {k!r}")
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be in 1..{scores.shape[-1]}, the number of scores, got {k}")


def _ordered(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of floating-point numbers without NaN."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    unsigned = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    keys = lax.bitcast_convert_type(scores, unsigned)
    sign = jnp.ones((), unsigned) << (jnp.iinfo(unsigned).bits - 1)
    return jnp.where(keys & sign, ~keys, keys | sign)


def _ranked(scores: jax.Array) -> jax.Array:
    ordered = jnp.where(scores == 0, 0, scores)  # top_k puts -0.0 below 0.0
    return lax.stop_gradient(jnp.where(jnp.isnan(scores), -jnp.inf, ordered))
