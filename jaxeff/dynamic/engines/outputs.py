"""Engines that compute only the kept positions of the output: single ones from patches, tiles with their halo.

Everything else of the output is zero: y = M * conv(x), the form of DynConv (Verelst and Tuytelaars 2020, arXiv
1912.03203) and, in tiles, of SBNet (Ren et al. 2018, arXiv 1801.02108).

Letters: N batch, P input and Q output positions, T kernel taps, K kept, C input and O output channels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import compat
from jaxeff.dynamic.engines import rows, taps
from jaxeff.dynamic.engines.geometry import Geometry, convolve, out_size, read_positions, written_positions

Size = tuple[int, int]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def output_columns(window: Geometry, size: Size, x: jax.Array, kernel: jax.Array, outputs: jax.Array) -> jax.Array:
    """Convolution at the kept output positions of each sample; exact.

    Args:
      window: geometry of the convolution.
      size: (H, W).
      x: [N, P, C], positions in row-major order.
      kernel: [kh, kw, C, O].
      outputs: int32 [N, K], no two of a sample alike.

    Returns:
      [N, Q, O], zeros at the other positions. Its backward pass costs the kept share, too.
    """
    return _outputs_forward(window, size, x, kernel, outputs)[0]


def _outputs_forward(window, size, x, kernel, outputs):
    reads = read_positions(window, size, kernel.shape[:2])
    patches = taps.tap_spread(reads, x, outputs)
    y = jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), precision=window.precision)
    return rows.put_each(y, outputs, 1, reads.shape[1]), (patches, kernel, outputs)


def _outputs_backward(window, size, residuals, g):
    patches, kernel, outputs = residuals
    flat = kernel.reshape(-1, kernel.shape[-1])
    kept = rows.take_each(g, outputs, 1)
    products = jnp.matmul(taps.closed(kept), flat.T, precision=window.precision)
    writes = written_positions(window, size, kernel.shape[:2])
    dx = taps.tap_sum(writes, g.shape[1], products, outputs)
    inner = patches.reshape(-1, patches.shape[-1])
    dk = jnp.matmul(inner.T, kept.reshape(-1, kept.shape[-1]), precision=window.precision)
    return dx, dk.reshape(kernel.shape), rows.no_gradient(outputs)


output_columns.defvjp(_outputs_forward, _outputs_backward)


Form = Callable[[Geometry, jax.Array, jax.Array], jax.Array]


def output_tiles(
    window: Geometry,
    size: Size,
    tile: int,
    x: jax.Array,
    kernel: jax.Array,
    tiles: jax.Array,
    form: Form = convolve,
) -> jax.Array:
    """Convolution of the kept tiles of the output, each from its own part of the input; exact.

    Args:
      window: geometry of the convolution, without negative padding.
      size: (H, W).
      tile: a tile has tile x tile output positions; divides H' and W'.
      x: [N, H, W, C].
      kernel: [kh, kw, C, O].
      tiles: int32 [N, K], numbered in row-major order, no two of a sample alike.
      form: how the parts of the input, [N * K, h, w, C], are convolved: function (window without padding, parts,
        kernel) -> [N * K, tile, tile, O].

    Returns:
      [N, H', W', O], zeros in the other tiles. Its backward pass costs the kept share, too.
    """
    return _output_tiles(window, size, tile, form, x, kernel, tiles)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _output_tiles(window, size, tile, form, x, kernel, tiles):
    return _tiles_forward(window, size, tile, form, x, kernel, tiles)[0]


def _tiles_forward(window, size, tile, form, x, kernel, tiles):
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    grid = _grid(window, size, tile, kernel.shape)
    shape = (1, *_reach(window, tile, kernel.shape), x.shape[-1])
    corners = _corners(window, tile, grid, tiles)
    parts = jax.vmap(lambda corner: lax.dynamic_slice(padded, (*corner, 0), shape)[0])(corners)
    y = form(_inside(window), parts, kernel).reshape(*tiles.shape, tile, tile, -1)
    whole = rows.put_each(y, tiles, 1, grid[0] * grid[1]).reshape(len(x), *grid, tile, tile, -1)
    whole = whole.swapaxes(2, 3).reshape(len(x), grid[0] * tile, grid[1] * tile, -1)
    return whole, (parts, kernel, tiles)


def _tiles_backward(window, size, tile, form, residuals, g):
    parts, kernel, tiles = residuals
    grid = _grid(window, size, tile, kernel.shape)
    by_tile = g.reshape(len(g), grid[0], tile, grid[1], tile, -1).swapaxes(2, 3)
    kept = rows.take_each(by_tile.reshape(len(g), -1, *by_tile.shape[3:]), tiles, 1)
    _, pullback = jax.vjp(partial(convolve, _inside(window)), parts, kernel)
    by_parts, dk = pullback(kept.reshape(-1, *kept.shape[2:]))
    corners = _corners(window, tile, grid, tiles)

    def add(i, dx):  # halos overlap
        corner = (*corners[i], 0)
        there = lax.dynamic_slice(dx, corner, (1, *by_parts.shape[1:]))
        return lax.dynamic_update_slice(dx, there + by_parts[i][None], corner)

    (top, bottom), (left, right) = window.padding
    padded = (len(g), top + size[0] + bottom, left + size[1] + right, parts.shape[-1])
    zeros = compat.vary(jnp.zeros(padded, parts.dtype), compat.varying_axes(parts))
    dx = lax.fori_loop(0, len(parts), add, zeros)
    return dx[:, top : top + size[0], left : left + size[1]], dk, rows.no_gradient(tiles)


_output_tiles.defvjp(_tiles_forward, _tiles_backward)


def _grid(window: Geometry, size: Size, tile: int, kernel_shape) -> Size:
    height, width = out_size(window, size, kernel_shape[:2])
    return height // tile, width // tile


def _inside(window: Geometry) -> Geometry:
    return window._replace(padding=((0, 0), (0, 0)))


def _reach(window: Geometry, tile: int, kernel_shape) -> tuple[int, int]:
    """How much of the input one tile of the output reads."""
    height, width = (
        (tile - 1) * s + (taps - 1) * d + 1
        for s, taps, d in zip(window.strides, kernel_shape, window.dilation, strict=False)
    )
    return height, width


def _corners(window: Geometry, tile: int, grid: Size, tiles: jax.Array) -> jax.Array:
    """(sample, row, column) in the padded input where each kept tile begins: int32 [N * K, 3]."""
    across = grid[1]
    sample = jnp.broadcast_to(jnp.arange(len(tiles), dtype=jnp.int32)[:, None], tiles.shape)
    row, column = tiles // across * (tile * window.strides[0]), tiles % across * (tile * window.strides[1])
    return jnp.stack([sample, row, column], -1).reshape(-1, 3)
