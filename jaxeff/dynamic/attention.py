"""Parameter-free attention: how much of a feature map lies in each channel and in each column.

A channel of F [N, H, W, C] is F[n, :, :, c], a column F[n, h, w, :]. AntiDote (arXiv 2008.06543) ranks both by their
mean; after a ReLU that is already a magnitude, elsewhere take the mean of |F| or its root mean square.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Reduce = Literal["mean", "abs_mean", "l2"]
REDUCES: tuple[str, ...] = ("mean", "abs_mean", "l2")

# On CPU, XLA hands a sum over a map to its threads, and waking them takes longer than the sum: 0.2 ms of 0.05 for one
# map of 16x16x256. A product with ones is not handed over; for larger batches that no longer matters.
MAX_PRODUCTS = 8


def channel_attention(x: jax.Array, reduce: Reduce = "mean") -> jax.Array:
    """Attention of every channel.

    Args:
      x: [N, H, W, C], floating point.
      reduce: "mean", "abs_mean" (mean of |x|) or "l2" (root mean square) over the map.

    Returns:
      [N, C], float32 (float64 of float64).

    Raises:
      TypeError: if x is not floating point.
      ValueError: for another rank, or an unknown `reduce`.
    """
    x = _magnitude(x, reduce)
    if len(x) <= MAX_PRODUCTS and jax.default_backend() == "cpu":
        flat = x.reshape(len(x), -1, x.shape[-1])
        ones = jnp.ones((1, flat.shape[1]), x.dtype)
        sums = [jnp.matmul(ones, sample, precision=lax.Precision.HIGHEST) for sample in flat]
        means = jnp.concatenate(sums) / flat.shape[1] if sums else flat.sum(1)
    else:
        means = x.mean((1, 2))
    return jnp.sqrt(means) if reduce == "l2" else means


def column_attention(x: jax.Array, reduce: Reduce = "mean") -> jax.Array:
    """Attention of every column: as `channel_attention`, but over the channels; [N, H, W]."""
    x = _magnitude(x, reduce)
    if jax.default_backend() == "cpu":
        means = jnp.matmul(x, jnp.ones(x.shape[-1], x.dtype), precision=lax.Precision.HIGHEST) / x.shape[-1]
    else:
        means = x.mean(3)
    return jnp.sqrt(means) if reduce == "l2" else means


def _magnitude(x: jax.Array, reduce: str) -> jax.Array:
    """What the mean is taken of, at least in float32."""
    if reduce not in REDUCES:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, REDUCES))}, got {reduce!r}")
    if x.ndim != 4:
        raise ValueError(f"attention is over feature maps [N, H, W, C], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"attention needs floating-point feature maps, got {x.dtype}; convert and scale them first")
    # Sums over a map in half precision would make neighbouring scores equal.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return {"mean": lambda: wide, "abs_mean": lambda: jnp.abs(wide), "l2": lambda: jnp.square(wide)}[reduce]()
