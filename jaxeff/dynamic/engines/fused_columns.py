"""The gated convolution of kept columns, or of kept outputs, as one kernel for GPU: rows sorted by the taps they need.

A matrix unit multiplies tiles of rows, and where single columns of a map are dropped, nearly every tile of neighbouring
outputs has a use for every tap. So outputs are sorted by which of their taps find something, as masks are in sparse
convolutions of point clouds: rows that need the same taps come together, and a tile walks over its own taps alone. What
is summed stays where it is, nothing is added up through memory, and the tile is written to where its outputs belong.

Columns may be dropped and all channels kept: then rows of the whole batch are sorted together, as all have one kernel.
With channels of their own, the rows of every sample are sorted by themselves.

Written in Pallas for its Triton backend, which loads and stores by index; on other devices, and in tests, it runs
interpreted.

Letters: S samples that are sorted apart (1 or N), R rows (outputs) of each, T taps, C input channels, K of them kept,
O output channels; m, n, k the sizes of a tile along R, O and K.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxeff import compat
from jaxeff.dynamic.engines import rows
from jaxeff.dynamic.engines.fused import Fused, Tile, interpreted, masked_gradients, some_bias
from jaxeff.dynamic.engines.geometry import Geometry, out_size, read_positions
from jaxeff.dynamic.masks import mask_of

COLUMN_TILE = Tile(128, 128, 32)
# Taps in one number; the sign is left alone.
WORD = 31


class Columns(NamedTuple):
    """What is kept of each sample; None is everything.

    Attributes:
      columns: int32 [N, k_s], positions of the input in row-major order.
      channels: int32 [N, K], ascending.
      outputs: int32 [N, k_o], positions of the output; the others are zero.
    """

    columns: jax.Array | None = None
    channels: jax.Array | None = None
    outputs: jax.Array | None = None


def fused_columns(
    window: Geometry,
    x: jax.Array,
    kernel: jax.Array,
    kept: Columns,
    bias: jax.Array | None = None,
    *,
    relu: bool = False,
    tile: Tile = COLUMN_TILE,
    interpret: bool | None = None,
) -> Fused:
    """Convolution over what is kept of each sample, with what follows it; exact.

    Args:
      window: geometry of the convolution.
      x: [N, H, W, C], float32 or bfloat16.
      kernel: [kh, kw, C, O], same dtype.
      kept: columns, channels and outputs.
      bias: [O], or None.
      relu: whether a ReLU follows.
      tile: sizes of a tile.
      interpret: run the kernel interpreted; None does so where there is no GPU.

    Returns:
      The output and its attention, whose sums over positions take one more look at y, as a tile has rows of several
      samples. Gradients pass through y alone.

    Raises:
      ValueError: inside `shard_map` without a GPU, see `interpreted`.
    """
    bias = some_bias(bias, x, kernel)
    return _fused(window, relu, tile, interpreted(interpret, x), x, kernel, bias, kept)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _fused(window, relu, tile, interpret, x, kernel, bias, kept):
    return _forward(window, relu, tile, interpret, x, kernel, bias, kept)


def _forward(window, relu, tile, interpret, x, kernel, bias, kept: Columns) -> Fused:
    count, features, out = len(x), kernel.shape[-1], out_size(window, x.shape[1:3], kernel.shape[:2])
    y, by_column = _launch(window, relu, tile, interpret, x, kernel, bias, kept, out)
    y, by_column = y[..., :features].reshape(count, *out, features), by_column.reshape(count, *out)
    if kept.outputs is not None:
        computed = mask_of(kept.outputs, math.prod(out)).reshape(count, *out)
        y, by_column = jnp.where(computed[..., None], y, 0), jnp.where(computed, by_column, 0)
    # A tile may have rows of several samples, so the sum over positions is one more look at what was written.
    return Fused(y, y.astype(jnp.float32).mean((1, 2)), by_column / features)


class _Plan(NamedTuple):
    """Who computes what.

    Attributes:
      order: int32 [S, tiles * m], the output of each row among those of its S; the number of them where there is none.
      words: int32 [S, words, tiles * m], bits of the taps that find something for each row.
      taps: int32 [S, tiles, T], first those that any row of the tile needs.
      needed: int32 [S, tiles], how many these are.
    """

    order: jax.Array
    words: jax.Array
    taps: jax.Array
    needed: jax.Array


def _plan(window, x, kernel, kept: Columns, out: tuple[int, int], m: int) -> _Plan:
    count, inputs, outputs = len(x), x.shape[1] * x.shape[2], math.prod(out)
    # [T, outputs], the number of inputs where a tap reads padding, which is as good as dropped.
    reads = read_positions(window, (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]))
    taps = len(reads)
    there = jnp.ones((count, inputs), bool) if kept.columns is None else mask_of(kept.columns, inputs)
    finds = jnp.pad(there, ((0, 0), (0, 1)))[:, reads.T]  # [N, outputs, T]
    place = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), (count, outputs))
    if kept.outputs is not None:
        place = kept.outputs.astype(jnp.int32)
        finds = jnp.take_along_axis(finds, place[..., None], 1, mode=rows.IN_BOUNDS)
    words = [
        (finds[..., first : first + WORD] << jnp.arange(min(WORD, taps - first), dtype=jnp.int32)).sum(-1)
        for first in range(0, taps, WORD)
    ]
    if kept.channels is None:
        place = (place + outputs * jnp.arange(count, dtype=jnp.int32)[:, None]).reshape(1, -1)
        words = [word.reshape(1, -1) for word in words]
    if kept.columns is not None:
        *words, place = lax.sort((*words, place), dimension=1, num_keys=len(words))
    short = -place.shape[1] % m
    nowhere = outputs * (count if kept.channels is None else 1)
    place = jnp.pad(place, ((0, 0), (0, short)), constant_values=nowhere)
    bits = jnp.pad(jnp.stack(words, 1), ((0, 0), (0, 0), (0, short)))
    by_tile = lax.reduce(bits.reshape(*bits.shape[:2], -1, m), jnp.int32(0), lax.bitwise_or, (3,))
    number = jnp.arange(taps)
    wanted = (by_tile[:, number // WORD] >> (number % WORD)[:, None]) & 1  # [S, T, tiles]
    return _Plan(
        place.astype(jnp.int32),
        bits,
        jnp.argsort(1 - wanted, axis=1, stable=True).astype(jnp.int32).swapaxes(1, 2),
        wanted.sum(1, dtype=jnp.int32),
    )


def _launch(window, relu, tile: Tile, interpret, x, kernel, bias, kept: Columns, out):
    features, axes = kernel.shape[-1], compat.varying_axes(x)
    plan = compat.vary(_plan(window, x, kernel, kept, out, tile.m), axes)
    sorted_apart, outputs = len(plan.order), math.prod(out) * (len(x) if kept.channels is None else 1)
    (height, width), (down, across) = x.shape[1:3], window.strides
    channels = x.shape[-1] if kept.channels is None else kept.channels.shape[-1]
    steps, wide = pl.cdiv(channels, tile.k), pl.cdiv(features, tile.n) * tile.n
    words, tiles = plan.words.shape[1], plan.order.shape[1] // tile.m
    weights = jnp.pad(kernel.reshape(-1, kernel.shape[2], features), ((0, 0), (0, 0), (0, wide - features)))
    # From the place of an output, where each tap reads, as a distance in rows of the map.
    offsets = jnp.asarray(
        [
            (i * window.dilation[0] - window.padding[0][0]) * width + j * window.dilation[1] - window.padding[1][0]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        ],
        jnp.int32,
    )
    indices = () if kept.channels is None else (jnp.pad(kept.channels, ((0, 0), (0, steps * tile.k - channels))),)

    def body(x_ref, w_ref, order_ref, words_ref, taps_ref, needed_ref, offsets_ref, bias_ref, *refs):
        *index_ref, y_ref, by_column_ref = refs
        place = order_ref[...]
        inside = place < outputs
        at = jnp.where(inside, place, 0)
        sample, at = divided(at, math.prod(out))
        vertical, horizontal = divided(at, out[1])
        first = (sample * height + vertical * down) * width + horizontal * across

        def products(i, total):
            turn, step = divided(i, steps)
            number, span = taps_ref[turn], step * tile.k + jnp.arange(tile.k)
            word, bit = divided(number, WORD)
            used = span < channels
            own = index_ref[0][0, span] if index_ref else span
            bits = words_ref[...] if words == 1 else words_ref[jnp.full(tile.m, word), jnp.arange(tile.m)]
            finds = ((bits >> bit) & 1) == 1
            row = jnp.where(finds, first + offsets_ref[number], 0)
            values = plgpu.load(x_ref.at[0, row[:, None], own[None, :]], mask=finds[:, None] & used[None, :], other=0)
            rows_of = plgpu.load(
                w_ref.at[number, own[:, None], jnp.arange(tile.n)[None, :]],
                mask=jnp.broadcast_to(used[:, None], (tile.k, tile.n)),
                other=0,
            )
            return total + jnp.dot(values, rows_of, preferred_element_type=jnp.float32, precision=window.precision)

        y = lax.fori_loop(0, needed_ref[...] * steps, products, jnp.zeros((tile.m, tile.n), jnp.float32))
        y = y + bias_ref[...].astype(jnp.float32)
        y = jnp.maximum(y, 0.0) if relu else y
        across_tile = jnp.arange(tile.n)[None, :]
        plgpu.store(
            y_ref.at[0, place[:, None], across_tile],
            y.astype(y_ref.dtype),
            mask=jnp.broadcast_to(inside[:, None], y.shape),
        )
        feature = pl.program_id(2) * tile.n + across_tile
        plgpu.store(by_column_ref.at[0, 0, place], jnp.where(feature < features, y, 0.0).sum(1), mask=inside)

    # Of what is not negative: `//` and `%` would ask for the sign.
    divided = lambda a, by: (lax.div(a, jnp.int32(by)), lax.rem(a, jnp.int32(by)))
    flat = x.reshape(sorted_apart, -1, x.shape[-1])
    whole = lambda *shape: pl.BlockSpec(shape, lambda s, p, o: (0,) * len(shape))
    y, by_column = pl.pallas_call(
        body,
        grid=(sorted_apart, tiles, wide // tile.n),
        in_specs=[
            pl.BlockSpec((1, *flat.shape[1:]), lambda s, p, o: (s, 0, 0)),
            pl.BlockSpec((len(offsets), x.shape[-1], tile.n), lambda s, p, o: (0, 0, o)),
            pl.BlockSpec((None, tile.m), lambda s, p, o: (s, p)),
            pl.BlockSpec((None, words if words > 1 else None, tile.m), lambda s, p, o: (s, 0, p)),
            pl.BlockSpec((None, None, len(offsets)), lambda s, p, o: (s, p, 0)),
            pl.BlockSpec((None, None), lambda s, p, o: (s, p)),
            whole(len(offsets)),
            pl.BlockSpec((tile.n,), lambda s, p, o: (o,)),
            *(pl.BlockSpec((1, steps * tile.k), lambda s, p, o: (s, 0)) for _ in indices),
        ],
        out_specs=[
            pl.BlockSpec((1, outputs, tile.n), lambda s, p, o: (s, 0, o)),
            pl.BlockSpec((1, 1, outputs), lambda s, p, o: (s, o, 0)),
        ],
        out_shape=[
            compat.result_like(x, (sorted_apart, outputs, wide), x.dtype),
            compat.result_like(x, (sorted_apart, wide // tile.n, outputs), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="gated_columns",
    )(flat, weights, *plan, compat.vary(offsets, axes), jnp.pad(bias, (0, wide - features)), *indices)
    return y, by_column.sum(1)


def _fwd(window, relu, tile, interpret, x, kernel, bias, kept):
    result = _forward(window, relu, tile, interpret, x, kernel, bias, kept)
    return result, (x, kernel, bias, kept, result.y if relu else None)


def _bwd(window, relu, tile, interpret, residuals, cotangents):
    x, kernel, bias, kept, y = residuals
    g, mask = cotangents.y, jnp.array(True)
    if kept.outputs is not None:
        g = jnp.where(mask_of(kept.outputs, g.shape[1] * g.shape[2]).reshape(*g.shape[:3], 1), g, 0)
    if kept.columns is not None:
        mask = mask & mask_of(kept.columns, x.shape[1] * x.shape[2]).reshape(*x.shape[:3], 1)
    if kept.channels is not None:
        mask = mask & mask_of(kept.channels, x.shape[-1])[:, None, None]
    nothing = jax.tree.map(rows.no_gradient, kept)
    return *masked_gradients(window, x, kernel, bias, mask, y, g), nothing


_fused.defvjp(_fwd, _bwd)
