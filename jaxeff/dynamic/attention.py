"""Parameter-free attention: how much of a feature map lies in each channel and in each column.

A channel of F [N, H, W, C] is F[n, :, :, c], a column F[n, h, w, :]. AntiDote (arXiv 2008.06543) ranks both by their
mean; after a ReLU that is already a magnitude, elsewhere take the mean of |F| or its root mean square.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff.ops import choice

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
    x = _checked(x, reduce)
    if choice.available(x):
        return choice.map_means(_by_position(x), "positions", reduce)
    # One axis after the other, which XLA:CPU adds up four times as fast as both at once or products with ones.
    means = _terms(x, reduce).sum(1).sum(1) / (x.shape[1] * x.shape[2])
    return jnp.sqrt(means) if reduce == "l2" else means


def group_attention(x: jax.Array, reduce: Reduce, size: int) -> jax.Array:
    """Attention of groups of so many neighbouring channels, the mean of theirs: [N, C / size]."""
    x = _checked(x, reduce)
    if choice.available(x):
        return choice.map_means(_by_position(x), "positions", reduce, size)
    return channel_attention(x, reduce).reshape(len(x), -1, size).mean(-1)


def column_attention(x: jax.Array, reduce: Reduce = "mean") -> jax.Array:
    """Attention of every column: as `channel_attention`, but over the channels; [N, H, W]."""
    x = _checked(x, reduce)
    if choice.available(x):
        return choice.map_means(_by_position(x), "channels", reduce).reshape(x.shape[:3])
    if jax.default_backend() == "cpu":
        ones = jnp.ones(x.shape[-1], x.dtype)
        means = jnp.matmul(_terms(x, reduce), ones, precision=lax.Precision.HIGHEST) / x.shape[-1]
    else:
        means = _terms(x, reduce).mean(3)
    return jnp.sqrt(means) if reduce == "l2" else means


def _by_position(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), x.shape[1] * x.shape[2], x.shape[-1])


def _checked(x: jax.Array, reduce: str) -> jax.Array:
    """The map, at least in float32."""
    if reduce not in REDUCES:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, REDUCES))}, got {reduce!r}")
    if x.ndim != 4:
        raise ValueError(f"attention is over feature maps [N, H, W, C], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"attention needs floating-point feature maps, got {x.dtype}; convert and scale them first")
    # Sums over a map in half precision would make neighbouring scores equal.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _terms(x: jax.Array, reduce: str) -> jax.Array:
    """What the mean is taken of."""
    return {"mean": lambda: x, "abs_mean": lambda: jnp.abs(x), "l2": lambda: jnp.square(x)}[reduce]()
