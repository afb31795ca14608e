"""Pooling without overlap, with a gradient that is fast on CPU.

The gradient of `lax.reduce_window` with max is a select-and-scatter, which XLA runs as a scalar loop on CPU. When
windows do not overlap (stride = window), both directions are element-wise operations on strided views.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax


def max_pool(x: jax.Array, window: tuple[int, int] = (2, 2)) -> jax.Array:
    """Maximum over disjoint windows; rows and columns that do not fill a window are dropped (VALID).

    The gradient goes to the first maximum of a window in row-major order, as in lax and PyTorch.

    Args:
      x: [N, H, W, C].
      window: (height, width), also the stride.

    Returns:
      [N, H // height, W // width, C].

    Raises:
      ValueError: if x is not of rank 4 or smaller than one window, or the window is not two positive sizes.
    """
    _check(x, window)
    return _max_pool(tuple(window), x.shape, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _max_pool(window, shape, x):
    y, *views = _views(x, window)
    for view in views:
        y = jnp.maximum(y, view)
    return y


def _max_pool_fwd(window, shape, x):
    y = _max_pool(window, shape, x)
    views = _views(x, window)
    # Where the maximum was, one byte for a whole window: the input need not be kept for the backward pass.
    dtype = jnp.uint8 if len(views) <= 256 else jnp.int32
    index = jnp.full(y.shape, len(views) - 1, dtype)
    for position in range(len(views) - 2, -1, -1):
        index = jnp.where(views[position] == y, jnp.asarray(position, dtype), index)
    return y, index


def _max_pool_bwd(window, shape, index, g):
    parts = [jnp.where(index == position, g, 0) for position in range(window[0] * window[1])]
    return (_interleave(parts, shape, window),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def avg_pool(x: jax.Array, window: tuple[int, int] = (2, 2)) -> jax.Array:
    """Mean over disjoint windows; rows and columns that do not fill a window are dropped (VALID).

    Args:
      x: [N, H, W, C].
      window: (height, width), also the stride.

    Returns:
      [N, H // height, W // width, C].

    Raises:
      ValueError: if x is not of rank 4 or smaller than one window, or the window is not two positive sizes.
    """
    _check(x, window)
    first, *others = _views(x, window)
    return sum(others, first) / (window[0] * window[1])


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Mean over space: [N, H, W, C] to [N, C]."""
    return jnp.mean(x, axis=(1, 2))


def _views(x: jax.Array, window: tuple[int, int]) -> list[jax.Array]:
    height, width = window
    rows, cols = x.shape[1] // height * height, x.shape[2] // width * width
    return [
        lax.slice(x, (0, i, j, 0), (x.shape[0], rows, cols, x.shape[3]), (1, height, width, 1))
        for i, j in product(range(height), range(width))
    ]


def _interleave(parts: Sequence[jax.Array], shape: tuple[int, ...], window: tuple[int, int]) -> jax.Array:
    height, width = window
    n, rows, cols, c = parts[0].shape
    grid = jnp.stack(parts).reshape(height, width, n, rows, cols, c)
    full = grid.transpose(2, 3, 0, 4, 1, 5).reshape(n, rows * height, cols * width, c)
    rest = (shape[1] - rows * height, shape[2] - cols * width)
    return jnp.pad(full, ((0, 0), (0, rest[0]), (0, rest[1]), (0, 0))) if any(rest) else full


def _check(x: jax.Array, window: tuple[int, int]) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [N, H, W, C], got shape {x.shape}")
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"window must be two sizes >= 1, got {tuple(window)}")
    if x.shape[1] < window[0] or x.shape[2] < window[1]:
        raise ValueError(f"x of shape {x.shape} is smaller than the pooling window {tuple(window)}")
