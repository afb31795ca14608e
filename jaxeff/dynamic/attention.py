"""Parameter-free attention: how much of a feature map lies in each channel and in each column.

A channel of F [N, H, W, C] is F[n, :, :, c], a column F[n, h, w, :]. AntiDote (arXiv 2008.06543) ranks both by their
mean; after a ReLU that is already a magnitude, elsewhere take the mean of |F| or its root mean square.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Reduce = Literal["mean", "abs_mean", "l2"]
REDUCES: tuple[str, ...] = ("mean", "abs_mean", "l2")


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
    return _reduced(x, reduce, (1, 2))


def column_attention(x: jax.Array, reduce: Reduce = "mean") -> jax.Array:
    """Attention of every column: as `channel_attention`, but over the channels; [N, H, W]."""
    return _reduced(x, reduce, (3,))


def _reduced(x: jax.Array, reduce: str, axes: tuple[int, ...]) -> jax.Array:
    if reduce not in REDUCES:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, REDUCES))}, got {reduce!r}")
    if x.ndim != 4:
        raise ValueError(f"attention is over feature maps [N, H, W, C], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"attention needs floating-point feature maps, got {x.dtype}; convert and scale them first")
    # Sums over a map in half precision would make neighbouring scores equal.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if reduce == "mean":
        return wide.mean(axes)
    return jnp.abs(wide).mean(axes) if reduce == "abs_mean" else jnp.sqrt(jnp.square(wide).mean(axes))
