"""Engines that gather the kept channels of each sample, and the rows of the kernel that read them.

A convolution reads a dropped channel nowhere, so neither the channel nor its rows of the kernel are needed: per sample
one ordinary, narrower convolution. It pays while the map is large, or the batch small: each sample copies and reads
its own share of the kernel.

Letters: N batch, C input channels, K of them kept, O output channels.
"""

from functools import partial

import jax
from jax import lax

from jaxeff.dynamic.engines import rows
from jaxeff.dynamic.engines.geometry import Geometry, convolve


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered_channels(window: Geometry, x: jax.Array, kernel: jax.Array, channels: jax.Array) -> jax.Array:
    """Convolution over the kept channels of each sample; exact.

    Args:
      window: geometry of the convolution.
      x: [N, H, W, C].
      kernel: [kh, kw, C, O].
      channels: int32 [N, K], ascending.

    Returns:
      [N, H', W', O]. Its backward pass costs the kept share, too.
    """
    return _forward(window, x, kernel, channels)[0]


def _forward(window, x, kernel, channels):
    kept = rows.take_each(x, channels, -1)

    def one(sample):
        x, channels = sample
        return convolve(window, x[None], rows.take(kernel, channels, 2))[0]

    return lax.map(one, (kept, channels)), (kept, kernel, channels, x.shape[-1])


def _forward_rule(window, x, kernel, channels):
    y, (kept, kernel, channels, _) = _forward(window, x, kernel, channels)
    return y, (kept, kernel, channels)


def _backward_rule(window, residuals, g):
    kept, kernel, channels = residuals

    def one(total, sample):
        x, channels, g = sample
        _, pullback = jax.vjp(partial(convolve, window), x[None], rows.take(kernel, channels, 2))
        dx, dk = pullback(g[None])
        return total.at[:, :, channels].add(dk, **rows.ASCENDING), dx[0]

    dk, dx = lax.scan(one, rows.sum_like(kernel), (kept, channels, g))
    return rows.put_each(dx, channels, -1, kernel.shape[2]), dk.astype(kernel.dtype), rows.no_gradient(channels)


gathered_channels.defvjp(_forward_rule, _backward_rule)


def shared_channels(window: Geometry, x: jax.Array, kernel: jax.Array, channels: jax.Array) -> jax.Array:
    """Convolution over channels [K] that the whole batch keeps: one narrower convolution, an approximation."""
    return convolve(window, rows.take(x, channels, -1), rows.take(kernel, channels, 2))
