"""The gated convolution as one kernel for GPU: gather, products, sum over taps, bias, ReLU and the next attention.

A program takes a tile of output positions and of output channels of one sample. It loops over the taps and over the
kept channels, loads the inputs at those channels and the rows of the kernel that read them by index, and sums their
products in float32. Before the tile is written, bias and ReLU are done and it is summed along both of its axes: the
channel and column attention that the gate of the next layer needs is then a sum of a few numbers.

A network that runs the engine takes the output alone: its norms stand between a convolution and its ReLU. Whoever folds
them into kernel and bias calls `fused_channels` and has all of it.

Written in Pallas for its Triton backend, which loads by index; on other devices, and in tests, it runs interpreted.

Letters: N batch, C input channels, K of them kept, O output channels, P output positions; m, n, k the sizes of a tile
along P, O and K.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxeff import compat
from jaxeff.dynamic.engines import rows
from jaxeff.dynamic.engines.geometry import Geometry, convolve, out_size
from jaxeff.dynamic.masks import mask_of


class Tile(NamedTuple):
    """Positions, output and input channels that one program takes at a time; powers of two, at least 16."""

    m: int = 64
    n: int = 64
    k: int = 32


TILE = Tile()


class Fused(NamedTuple):
    """What the kernel gives.

    Attributes:
      y: [N, H', W', O].
      channels: float32 [N, O], mean of y over positions.
      columns: float32 [N, H', W'], mean of y over channels.
    """

    y: jax.Array
    channels: jax.Array
    columns: jax.Array


def fused_channels(
    window: Geometry,
    x: jax.Array,
    kernel: jax.Array,
    channels: jax.Array,
    bias: jax.Array | None = None,
    *,
    relu: bool = False,
    tile: Tile = TILE,
    interpret: bool | None = None,
) -> Fused:
    """Convolution over the kept channels of each sample, with what follows it; exact.

    Args:
      window: geometry of the convolution.
      x: [N, H, W, C], float32 or bfloat16.
      kernel: [kh, kw, C, O], same dtype.
      channels: int32 [N, K], ascending.
      bias: [O], or None.
      relu: whether a ReLU follows.
      tile: sizes of a tile.
      interpret: run the kernel interpreted; None does so where there is no GPU.

    Returns:
      The output and its attention. Gradients pass through y alone.

    Raises:
      ValueError: inside `shard_map` without a GPU, see `interpreted`.
    """
    bias = some_bias(bias, x, kernel)
    return _fused(window, relu, tile, interpreted(interpret, x), x, kernel, bias, channels)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _fused(window, relu, tile, interpret, x, kernel, bias, channels):
    return _forward(window, relu, tile, interpret, x, kernel, bias, channels)


def _forward(window, relu, tile, interpret, x, kernel, bias, channels) -> Fused:
    count, features = len(x), kernel.shape[-1]
    height, width = out_size(window, x.shape[1:3], kernel.shape[:2])
    places, kept = height * width, channels.shape[-1]
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    across, length = padded.shape[2], padded.shape[1] * padded.shape[2]
    steps = pl.cdiv(kept, tile.k)
    wide = pl.cdiv(features, tile.n) * tile.n
    down = pl.cdiv(places, tile.m)
    weights = jnp.pad(kernel.reshape(-1, kernel.shape[2], features), ((0, 0), (0, 0), (0, wide - features)))
    # What fills the last tile of channels is not used: it is set to zero on both sides, as the map may have NaN there.
    indices = jnp.pad(channels, ((0, 0), (0, steps * tile.k - kept)))
    taps = [
        i * window.dilation[0] * across + j * window.dilation[1]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]

    def body(x_ref, w_ref, index_ref, bias_ref, y_ref, by_channel_ref, by_column_ref):
        place = pl.program_id(1) * tile.m + jnp.arange(tile.m)
        inside = place < places
        at = jnp.where(inside, place, 0)
        first = (at // width) * window.strides[0] * across + (at % width) * window.strides[1]

        def products(step, total):
            span = step * tile.k + jnp.arange(tile.k)
            own = index_ref[0, span]
            used = span < kept
            for number, offset in enumerate(taps):
                values = x_ref[0, (first + offset)[:, None], own[None, :]]
                values = jnp.where(used[None, :], values, jnp.zeros((), values.dtype))
                rows_of = w_ref[number, own, :]
                rows_of = jnp.where(used[:, None], rows_of, jnp.zeros((), rows_of.dtype))
                total += jnp.dot(values, rows_of, preferred_element_type=jnp.float32, precision=window.precision)
            return total

        y = lax.fori_loop(0, steps, products, jnp.zeros((tile.m, tile.n), jnp.float32))
        y = y + bias_ref[...].astype(jnp.float32)
        y = jnp.maximum(y, 0.0) if relu else y
        y_ref[0] = y.astype(y_ref.dtype)
        feature = pl.program_id(2) * tile.n + jnp.arange(tile.n)
        real = jnp.where(inside[:, None] & (feature < features)[None, :], y, 0.0)
        by_channel_ref[0, 0] = real.sum(0)
        by_column_ref[0, 0] = real.sum(1)

    y, by_channel, by_column = pl.pallas_call(
        body,
        grid=(count, down, wide // tile.n),
        in_specs=[
            pl.BlockSpec((1, length, x.shape[-1]), lambda n, p, o: (n, 0, 0)),
            pl.BlockSpec((len(taps), x.shape[-1], tile.n), lambda n, p, o: (0, 0, o)),
            pl.BlockSpec((1, steps * tile.k), lambda n, p, o: (n, 0)),
            pl.BlockSpec((tile.n,), lambda n, p, o: (o,)),
        ],
        out_specs=[
            pl.BlockSpec((1, tile.m, tile.n), lambda n, p, o: (n, p, o)),
            pl.BlockSpec((1, 1, tile.n), lambda n, p, o: (n, p, o)),
            pl.BlockSpec((1, 1, tile.m), lambda n, p, o: (n, o, p)),
        ],
        out_shape=[
            compat.result_like(x, (count, down * tile.m, wide), x.dtype),
            compat.result_like(x, (count, down, wide), jnp.float32),
            compat.result_like(x, (count, wide // tile.n, down * tile.m), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="gated_convolution",
    )(padded.reshape(count, length, -1), weights, indices, jnp.pad(bias, (0, wide - features)))
    return Fused(
        y[:, :places, :features].reshape(count, height, width, features),
        by_channel.sum(1)[:, :features] / places,
        by_column.sum(1)[:, :places].reshape(count, height, width) / features,
    )


def _fwd(window, relu, tile, interpret, x, kernel, bias, channels):
    result = _forward(window, relu, tile, interpret, x, kernel, bias, channels)
    return result, (x, kernel, bias, channels, result.y if relu else None)


def _bwd(window, relu, tile, interpret, residuals, cotangents):
    x, kernel, bias, channels, y = residuals
    mask = mask_of(channels, x.shape[-1])[:, None, None]
    return *masked_gradients(window, x, kernel, bias, mask, y, cotangents.y), rows.no_gradient(channels)


_fused.defvjp(_fwd, _bwd)


def some_bias(bias: jax.Array | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The bias of a kernel, zeros for None; inside `shard_map` one that may differ, so that its gradient is summed."""
    given = jnp.zeros(kernel.shape[-1], jnp.float32) if bias is None else bias
    return compat.vary(given, compat.varying_axes(x))


def interpreted(asked: bool | None, x: jax.Array) -> bool:
    """Whether a kernel on the Triton backend runs interpreted: as asked, or where there is no GPU.

    Raises:
      ValueError: inside a `shard_map` that checks which values differ between devices, as the interpreter does not
        know it.
    """
    found = jax.default_backend() != "gpu" if asked is None else asked
    if found and compat.varying_axes(x):
        raise ValueError(
            "the fused kernels need a GPU inside shard_map; take another engine, or pass check_vma=False to shard_map"
        )
    return found


def masked_gradients(
    window: Geometry,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    mask: jax.Array,
    y: jax.Array | None,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, kernel and bias: cuDNN's of the masked convolution, as those of a gather would scatter.

    Args:
      window, x, kernel, bias: as for `fused_channels`.
      mask: bool, what is kept; of a shape that x broadcasts.
      y: the output where a ReLU made it, else None.
      g: gradient of the output.
    """
    if y is not None:
        g = jnp.where(y > 0, g, 0)
    _, pullback = jax.vjp(partial(convolve, window), jnp.where(mask, x, 0), kernel)
    dx, dk = pullback(g)
    return jnp.where(mask, dx, 0), dk, g.astype(jnp.float32).sum((0, 1, 2)).astype(bias.dtype)
