"""Engines that multiply only the kept columns: a convolution as a product of rows, summed over the taps.

The rows of the kept columns are multiplied with the kernel of every tap at once; each output position then adds up the
products that its taps find. Nothing is computed twice, and nothing for dropped columns, whatever their pattern (the
"kernel to row" form of Vasudevan et al. 2017, arXiv 1704.04428, with rows left out).

Letters: N batch, P input and Q output positions, T kernel taps, K columns kept, C channels, D channels kept, O output
channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff.dynamic.engines import rows, taps
from jaxeff.dynamic.engines.geometry import Geometry, out_size, read_positions, written_positions

Size = tuple[int, int]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gathered_columns(window: Geometry, size: Size, x: jax.Array, kernel: jax.Array, columns: jax.Array) -> jax.Array:
    """Convolution over the kept columns of each sample; exact.

    Args:
      window: geometry of the convolution.
      size: (H, W).
      x: [N, P, C], positions in row-major order.
      kernel: [kh, kw, C, O].
      columns: int32 [N, K], no two of a sample alike.

    Returns:
      [N, H', W', O]. Its backward pass costs the kept share, too.
    """
    return _columns_forward(window, size, x, kernel, columns)[0]


def _columns_forward(window, size, x, kernel, columns):
    kept = rows.take_each(x, columns, 1)
    products = _matmul(window, taps.closed(kept), _by_channel(kernel))
    return _summed(window, size, kernel.shape, products, columns), (kept, kernel, columns)


def _columns_backward(window, size, residuals, g):
    kept, kernel, columns = residuals
    spread = _spread(window, size, kernel.shape, g, columns)
    dx = _matmul(window, spread, _by_channel(kernel).T)
    dk = _matmul(window, kept.reshape(-1, kept.shape[-1]).T, spread.reshape(-1, spread.shape[-1]))
    return rows.put_each(dx, columns, 1, size[0] * size[1]), _by_tap(dk, kernel.shape), rows.no_gradient(columns)


gathered_columns.defvjp(_columns_forward, _columns_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gathered_both(
    window: Geometry, size: Size, x: jax.Array, kernel: jax.Array, columns: jax.Array, channels: jax.Array
) -> jax.Array:
    """Convolution over the kept columns and channels of each sample; exact.

    Args:
      window, size, x, kernel, columns: as for `gathered_columns`.
      channels: int32 [N, D], ascending.

    Returns:
      [N, H', W', O]. Its backward pass costs the kept share, too.
    """
    return _both_forward(window, size, x, kernel, columns, channels)[0]


def _both_forward(window, size, x, kernel, columns, channels):
    kept = rows.take_each(rows.take_each(x, columns, 1), channels, -1)
    flat = kernel.reshape(-1, *kernel.shape[2:])

    def one(sample):
        kept, columns, channels = sample
        products = _matmul(window, taps.closed(kept[None]), _rows_by_channel(flat, channels))
        return _summed(window, size, kernel.shape, products, columns[None])[0]

    return lax.map(one, (kept, columns, channels)), (kept, kernel, columns, channels)


def _both_backward(window, size, residuals, g):
    kept, kernel, columns, channels = residuals
    flat = kernel.reshape(-1, *kernel.shape[2:])

    def one(total, sample):
        kept, columns, channels, g = sample
        spread = _spread(window, size, kernel.shape, g[None], columns[None])[0]
        dx = _matmul(window, spread, _rows_by_channel(flat, channels).T)
        dk = _matmul(window, kept.T, spread).reshape(len(channels), *flat.shape[::2]).swapaxes(0, 1)
        return total.at[:, channels].add(dk, **rows.ASCENDING), dx

    dk, dx = lax.scan(one, rows.sum_like(flat), (kept, columns, channels, g))
    dx = rows.put_each(rows.put_each(dx, channels, -1, kernel.shape[2]), columns, 1, size[0] * size[1])
    dk = dk.reshape(kernel.shape).astype(kernel.dtype)
    return dx, dk, rows.no_gradient(columns), rows.no_gradient(channels)


gathered_both.defvjp(_both_forward, _both_backward)


def _by_channel(kernel: jax.Array) -> jax.Array:
    """The kernel [kh, kw, C, O] as one matrix for all taps: [C, T * O]."""
    channels, features = kernel.shape[2:]
    return kernel.reshape(-1, channels, features).swapaxes(0, 1).reshape(channels, -1)


def _by_tap(matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_by_channel`."""
    return matrix.reshape(shape[2], -1, shape[3]).swapaxes(0, 1).reshape(shape)


def _rows_by_channel(kernel: jax.Array, channels: jax.Array) -> jax.Array:
    """`_by_channel` of the kept channels of a kernel [T, C, O]: [D, T * O], in one pass over its rows."""
    positions, _, features = kernel.shape
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(1,), start_index_map=(1,))
    found = lax.gather(
        kernel, channels[:, None], numbers, (positions, 1, features),
        unique_indices=True, indices_are_sorted=True, mode=rows.IN_BOUNDS,
    )  # fmt: skip
    return found.reshape(len(channels), -1)


def _summed(window, size, kernel_shape, products, columns) -> jax.Array:
    reads = read_positions(window, size, kernel_shape[:2])
    y = taps.tap_sum(reads, size[0] * size[1], products, columns)
    return y.reshape(len(y), *out_size(window, size, kernel_shape[:2]), -1)


def _spread(window, size, kernel_shape, g, columns) -> jax.Array:
    writes = written_positions(window, size, kernel_shape[:2])
    return taps.tap_spread(writes, g.reshape(len(g), -1, g.shape[-1]), columns)


def _matmul(window, a, b):
    return jnp.matmul(a, b, precision=window.precision)
