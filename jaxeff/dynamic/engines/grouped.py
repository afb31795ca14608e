"""Engines that read every weight once a batch: channel groups as experts.

Each sample keeps some of G groups of neighbouring channels, as each token of a mixture of experts keeps some experts,
and the samples that keep a group share its slab of the kernel. The pairs (sample, group), exactly N * k when each
sample keeps k groups, are cut into tiles of samples of one group; a loop runs over the tiles, whose number alone
depends on the input: as many of the largest size as there are, then the rest of each group in halves of it, so no tile
is padded and nothing is computed that the counted saving leaves out.

Letters: N batch, G channel groups of C / G channels, O output channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import compat
from jaxeff.dynamic.engines import rows
from jaxeff.dynamic.engines.geometry import Geometry, convolve, out_size
from jaxeff.dynamic.masks import mask_of

# Larger tiles read the kernel less often, but leave more sizes for the rest; beyond 8 samples nothing is gained on CPU.
MAX_TILE = 8


class _Tile(NamedTuple):
    """`size` samples (int32 [size]) that keep one group (int32 scalar)."""

    samples: jax.Array
    group: jax.Array


def grouped_channels(window: Geometry, size: int, x: jax.Array, kernel: jax.Array, groups: jax.Array) -> jax.Array:
    """Convolution over the kept channel groups of each sample; exact.

    Args:
      window: geometry of the convolution.
      size: channels of a group; divides C.
      x: [N, H, W, C].
      kernel: [kh, kw, C, O].
      groups: int32 [N, k].

    Returns:
      [N, H', W', O]. Its backward pass costs the kept share, too; of first order only.
    """
    return _grouped(window, size, x, kernel, mask_of(groups, x.shape[-1] // size))


def width_slices(window: Geometry, size: int, x: jax.Array, kernel: jax.Array, widths: jax.Array) -> jax.Array:
    """Convolution over the first channels of each sample, another width for each (slimmable, as in DS-Net); exact.

    Args:
      window, size, x, kernel: as for `grouped_channels`.
      widths: int32 [N], how many groups of `size` channels a sample keeps, from the first; 0..C / size.

    Returns:
      [N, H', W', O], at the cost of the widths.
    """
    return _grouped(window, size, x, kernel, jnp.arange(x.shape[-1] // size) < widths[:, None])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(window: Geometry, size: int, x: jax.Array, kernel: jax.Array, kept: jax.Array) -> jax.Array:
    def add(tile, y):
        part = convolve(window, _slabs(x, tile, size), _slab_of(kernel, tile.group, size))
        for i, sample in enumerate(tile.samples):
            there = lax.dynamic_slice_in_dim(y, sample, 1)
            y = lax.dynamic_update_slice_in_dim(y, there + part[i : i + 1], sample, 0)
        return y

    out = (len(x), *out_size(window, x.shape[1:3], kernel.shape[:2]), kernel.shape[-1])
    return _over_tiles(kept, add, jnp.zeros(out, x.dtype))


def _forward(window, size, x, kernel, kept):
    return _grouped(window, size, x, kernel, kept), (x, kernel, kept)


def _backward(window, size, residuals, g):
    x, kernel, kept = residuals

    def add(tile, gradients):
        dx, dk = gradients
        _, pullback = jax.vjp(partial(convolve, window), _slabs(x, tile, size), _slab_of(kernel, tile.group, size))
        by_x, by_kernel = pullback(jnp.concatenate([lax.dynamic_slice_in_dim(g, n, 1) for n in tile.samples]))
        start = tile.group * size
        for i, sample in enumerate(tile.samples):
            dx = lax.dynamic_update_slice(dx, by_x[i : i + 1], _at(sample, start))
        by_kernel = by_kernel + _slab_of(dk, tile.group, size)
        return dx, lax.dynamic_update_slice_in_dim(dk, by_kernel, start, 2)

    dx, dk = _over_tiles(kept, add, (jnp.zeros_like(x), rows.sum_like(kernel)))
    return dx, dk.astype(kernel.dtype), rows.no_gradient(kept)


_grouped.defvjp(_forward, _backward)


def _over_tiles(kept: jax.Array, add: Callable[[_Tile, Any], Any], carry: Any) -> Any:
    """Folds `add` over all tiles of the pairs (sample, group) in kept [N, G]."""
    order = jnp.argsort(~kept.T, axis=-1, stable=True).astype(jnp.int32)  # who keeps a group comes first
    counts = kept.sum(0, dtype=jnp.int32)
    largest = min(MAX_TILE, 1 << (len(kept).bit_length() - 1))
    size, carry = largest, compat.vary(carry, compat.varying_axes(kept))
    while size:
        if size == largest:
            tiles, first = counts // size, jnp.zeros_like(counts)
        else:
            tiles, first = counts // size % 2, counts // (2 * size) * (2 * size)
        ends = jnp.cumsum(tiles, dtype=jnp.int32)

        def body(i, carry, size=size, tiles=tiles, first=first, ends=ends):
            group = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
            start = first[group] + (i - (ends[group] - tiles[group])) * size
            return add(_Tile(lax.dynamic_slice(order, (group, start), (1, size))[0], group), carry)

        carry = lax.fori_loop(0, ends[-1], body, carry)
        size //= 2
    return carry


def _slabs(x: jax.Array, tile: _Tile, size: int) -> jax.Array:
    """The channels of a tile's group, of its samples: [tile, H, W, size]."""
    start, shape = tile.group * size, (1, *x.shape[1:-1], size)
    return jnp.concatenate([lax.dynamic_slice(x, _at(sample, start), shape) for sample in tile.samples])


def _at(sample: jax.Array, channel: jax.Array) -> tuple[jax.Array, ...]:
    """Where a slab begins: all of one type, as lax asks for and Python's 0 is not under `jax_enable_x64`."""
    zero = jnp.zeros_like(sample)
    return sample, zero, zero, channel.astype(sample.dtype)


def _slab_of(kernel: jax.Array, group: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(kernel, group * size, size, 2)
