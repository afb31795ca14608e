"""The gated convolution of channel groups, or of tiles, as one kernel for Hopper GPUs: slabs by TMA, products by WGMMA.

Groups of neighbouring channels are slabs that the copy engine moves whole: of the map [positions, group], of the kernel
[group, features]. A program takes a tile of positions and of output channels of one sample and walks over the taps of
its kept groups, several slabs in flight, summing in float32; bias, ReLU and the attention of the next gate follow
before the tile is written, as in `jaxeff.dynamic.engines.fused`.

What is multiplied is laid out in eights of positions, and a copy must begin at a multiple of eight, whereas the taps
look one position further each. So the map is laid out anew while it is padded: its columns in eight runs, and the
eights are of one column of every run. A tap moves within all runs at once, by a multiple of eight:

    w = run * A + a   ->   position (h, a, run),   a in 0..A + reach of the taps

The copy holds the reach of the taps eight times, and the rows of a tile that lie there are computed in vain: of a map
56 wide a fifth.

Written in Pallas for its Mosaic GPU backend; in tests it runs in that backend's interpreter, which finds races, too.

Letters: N batch, C input channels in groups of `size`, K groups kept, O output channels, T taps; m, n the sizes of a
tile along positions and O.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxeff import compat
from jaxeff.dynamic.engines import rows
from jaxeff.dynamic.engines.fused import Fused, masked_gradients, some_bias
from jaxeff.dynamic.engines.geometry import Geometry, out_size
from jaxeff.dynamic.masks import mask_of

EIGHT = 8


class SlabTile(NamedTuple):
    """Positions and output channels that one program takes, multiples of 64; slabs that are in flight."""

    m: int = 128
    n: int = 128
    stages: int = 4


SLAB_TILE = SlabTile()


def misfit(window: Geometry, size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why `group_slabs` cannot compute a convolution; None where it can."""
    if window.strides != (1, 1):
        return f"strides {window.strides}, where slabs need (1, 1)"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)}, where slabs need bfloat16 or float16"
    if size % 16:
        return f"group_size={size}, where slabs need a multiple of 16"
    return None


def group_slabs(
    window: Geometry,
    size: int,
    x: jax.Array,
    kernel: jax.Array,
    groups: jax.Array,
    bias: jax.Array | None = None,
    *,
    relu: bool = False,
    tile: SlabTile = SLAB_TILE,
    interpret: Any = False,
) -> Fused:
    """Convolution over the kept channel groups of each sample, with what follows it; exact.

    Args:
      window: geometry of the convolution, without strides.
      size: channels of a group, a multiple of 16 that divides C; 64 and more use the copies fully.
      x: [N, H, W, C], bfloat16 or float16.
      kernel: [kh, kw, C, O], same dtype.
      groups: int32 [N, K], ascending.
      bias: [O], or None.
      relu: whether a ReLU follows.
      tile: sizes of a tile.
      interpret: as `plgpu.kernel` takes it: False compiles for GPU, the backend's parameters run it on CPU.

    Returns:
      The output and its attention. Gradients pass through y alone.

    Raises:
      ValueError: if the convolution has strides, another dtype, or a group size that does not fit.
    """
    if reason := misfit(window, size, x.dtype):
        raise ValueError(f"the convolution has {reason}; take engine 'fused' or 'mask'")
    bias = some_bias(bias, x, kernel)
    return _slabs(window, size, relu, tile, interpret, x, kernel, bias, groups)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _slabs(window, size, relu, tile, interpret, x, kernel, bias, groups):
    return _forward(window, size, relu, tile, interpret, x, kernel, bias, groups)


def _forward(window, size, relu, tile, interpret, x, kernel, bias, groups) -> Fused:
    grid = _Grid.of(window, x.shape, kernel.shape)
    flat = _in_eights(grid, window, x, tile.m)
    return _computed(grid, flat, kernel, bias, groups, size=size, relu=relu, tile=tile, interpret=interpret)


def _computed(grid: "_Grid", flat, kernel, bias, groups, *, size, relu, tile: SlabTile, interpret) -> Fused:
    count, features = len(groups), kernel.shape[-1]
    wide = -(-features // tile.n) * tile.n
    weights = jnp.pad(kernel.reshape(-1, features), ((0, 0), (0, wide - features)))
    tiles = -(-grid.positions // tile.m)
    real = np.zeros(tiles * tile.m, np.float32)
    real[: grid.positions] = grid.real.reshape(-1)
    y, by_channel, by_column = _launch(
        flat, weights, groups, jnp.pad(bias.astype(jnp.float32), (0, wide - features)), jnp.asarray(real),
        grid=grid, size=size, relu=relu, tile=tile, interpret=interpret,
    )  # fmt: skip
    places = math.prod(grid.out)
    return Fused(
        _in_rows(grid, y.reshape(count, -1, wide)[..., :features]),
        by_channel.reshape(count, tiles, wide).sum(1)[:, :features] / places,
        _in_rows(grid, by_column.sum(0).reshape(count, -1, 1))[..., 0] / features,
    )


def tile_slabs(
    window: Geometry,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    relu: bool = False,
    tile: SlabTile = SLAB_TILE,
    interpret: Any = False,
) -> Fused:
    """Convolution of many small maps, such as the kept tiles of larger ones with what they read around them.

    Eight maps lie side by side, so that what the taps move by is eight positions again, and nothing is read in vain but
    the reach of the taps.

    Args:
      window: geometry of the convolution, without strides and padding.
      x: [B, h, w, C], bfloat16 or float16, C a multiple of 16.
      kernel: [kh, kw, C, O], same dtype.
      bias: [O], or None.
      relu: whether a ReLU follows.
      tile: sizes of a tile of the product.
      interpret: as for `group_slabs`.

    Returns:
      The output [B, h', w', O] and its attention. Gradients pass through y alone.

    Raises:
      ValueError: if the convolution has strides, padding, another dtype, or channels that do not fit.
    """
    if reason := tile_misfit(window, x.shape[-1], x.dtype):
        raise ValueError(f"the convolution has {reason}; take engine 'output_tiles' or 'mask'")
    if window.padding != ((0, 0), (0, 0)):
        raise ValueError(f"maps have what they read around them, so padding must be 0, got {window.padding}")
    bias = some_bias(bias, x, kernel)
    return _tile_slabs(window, relu, tile, interpret, x, kernel, bias)


def tile_misfit(window: Geometry, channels: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why `tile_slabs` cannot compute a convolution; None where it can."""
    if channels % 16:
        return f"{channels} channels, where slabs need a multiple of 16"
    return misfit(window, _slab_of(channels), dtype)


def _slab_of(channels: int) -> int:
    return math.gcd(channels, 64)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _tile_slabs(window, relu, tile, interpret, x, kernel, bias):
    count, (high, wide), reach = len(x), x.shape[1:3], (kernel.shape[1] - 1) * window.dilation[1]
    size, teams = _slab_of(x.shape[-1]), -(-len(x) // EIGHT)
    grid = _Grid.of(window, (1, high, EIGHT * (wide - reach) + reach), kernel.shape)
    teamed = jnp.pad(x, ((0, teams * EIGHT - count), (0, 0), (0, 0), (0, 0)))
    flat = jnp.moveaxis(teamed.reshape(teams, EIGHT, *x.shape[1:]), 1, 3).reshape(-1, x.shape[-1])
    flat = jnp.pad(flat, ((0, tile.m + EIGHT * reach), (0, 0)))
    slabs = jnp.broadcast_to(jnp.arange(x.shape[-1] // size, dtype=jnp.int32), (teams, x.shape[-1] // size))
    slabs = compat.vary(slabs, compat.varying_axes(x))
    found = _computed(grid, flat, kernel, bias, slabs, size=size, relu=relu, tile=tile, interpret=interpret)

    def apart(rows):
        each = rows.reshape(teams, grid.out[0], EIGHT, grid.run, *rows.shape[3:])
        return jnp.moveaxis(each, 2, 1).reshape(teams * EIGHT, grid.out[0], grid.run, *rows.shape[3:])[:count]

    y = apart(found.y)
    # The kernel adds up the channels of eight maps together.
    return Fused(y, y.astype(jnp.float32).mean((1, 2)), apart(found.columns))


def _tile_fwd(window, relu, tile, interpret, x, kernel, bias):
    result = _tile_slabs(window, relu, tile, interpret, x, kernel, bias)
    return result, (x, kernel, bias, result.y if relu else None)


def _tile_bwd(window, relu, tile, interpret, residuals, cotangents):
    x, kernel, bias, y = residuals
    return masked_gradients(window, x, kernel, bias, jnp.array(True), y, cotangents.y)


_tile_slabs.defvjp(_tile_fwd, _tile_bwd)


class _Grid(NamedTuple):
    """Where positions lie: (h, a, run), of the padded input and of the output alike.

    Attributes:
      out: (H', W').
      height: rows of the padded input.
      run: columns of a run, A.
      reach: how far the taps look beyond a column.
      offsets: how many rows of the layout further each tap looks.
    """

    out: tuple[int, int]
    height: int
    run: int
    reach: int
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, window: Geometry, x_shape, kernel_shape) -> "_Grid":
        out = out_size(window, x_shape[1:3], kernel_shape[:2])
        high, wide = kernel_shape[:2]
        down, right = window.dilation
        run, reach = -(-out[1] // EIGHT), (wide - 1) * right
        offsets = tuple(EIGHT * (i * down * (run + reach) + j * right) for i in range(high) for j in range(wide))
        return cls(out, x_shape[1] + sum(window.padding[0]), run, reach, offsets)

    @property
    def across(self) -> int:
        return EIGHT * (self.run + self.reach)

    @property
    def positions(self) -> int:
        """Of an output, with what lies in the reach."""
        return self.out[0] * self.across

    @property
    def real(self) -> np.ndarray:
        """Which of the positions are in the output: bool [H', A + reach, 8]."""
        a, run = np.arange(self.run + self.reach)[:, None], np.arange(EIGHT)
        inside = (a < self.run) & (run * self.run + a < self.out[1])
        return np.broadcast_to(inside, (self.out[0], *inside.shape))


def _in_eights(grid: _Grid, window: Geometry, x: jax.Array, slack: int) -> jax.Array:
    """The padded map in the layout of slabs, [rows, C], and as many rows more as the last tile reads in vain."""
    right = EIGHT * grid.run + grid.reach - x.shape[2] - window.padding[1][0]
    padded = jnp.pad(x, ((0, 0), window.padding[0], (window.padding[1][0], max(right, 0)), (0, 0)))
    runs = [padded[:, :, b * grid.run : (b + 1) * grid.run + grid.reach] for b in range(EIGHT)]
    flat = jnp.stack(runs, 3).reshape(-1, x.shape[-1])
    return jnp.pad(flat, ((0, slack + EIGHT * grid.reach), (0, 0)))


def _in_rows(grid: _Grid, y: jax.Array) -> jax.Array:
    """An output in the layout of slabs, [N, positions, F], as [N, H', W', F]."""
    runs = y[:, : grid.positions].reshape(len(y), grid.out[0], grid.run + grid.reach, EIGHT, -1)
    columns = runs[:, :, : grid.run].swapaxes(2, 3)
    return columns.reshape(len(y), grid.out[0], EIGHT * grid.run, -1)[:, :, : grid.out[1]]


def _launch(x, weights, groups, bias, real, *, grid: _Grid, size, relu, tile: SlabTile, interpret):
    """The kernel: [N * tiles * m, O], sums of channels [N * tiles, O] and of columns [O / n, N * tiles * m]."""
    # Here, as it takes a second, which a machine without such a GPU need not wait.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def swizzled(columns):
        """How a tile of so many columns lies in shared memory for WGMMA."""
        bits = jnp.dtype(x.dtype).itemsize * 8
        swizzle = plgpu.find_swizzle(columns * bits)
        return plgpu.TilingTransform((EIGHT, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)

    def vector(ref, axis):
        """A vector of shared memory in the registers of an accumulator that lacks that axis."""
        return ref[...] if interpret else plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(axis))

    count, kept = groups.shape
    channels, wide = x.shape[1], weights.shape[1]
    tiles, taps = len(real) // tile.m, len(grid.offsets)
    steps, length = kept * taps, grid.height * grid.across
    stages = min(tile.stages, steps)

    def body(
        x_ref, w_ref, group_ref, offset_ref, bias_ref, real_ref,
        y_ref, by_channel_ref, by_column_ref,
        x_slab, w_slab, y_tile, bias_tile, real_tile, channel_sums, column_sums, ready, rest_ready,
    ):  # fmt: skip
        sample, place, feature = (lax.axis_index(axis) for axis in ("sample", "place", "feature"))
        some_rows = pl.ds((sample * tiles + place) * tile.m, tile.m)
        some_features = pl.ds(feature * tile.n, tile.n)
        plgpu.copy_gmem_to_smem(bias_ref.at[some_features], bias_tile, rest_ready)
        plgpu.copy_gmem_to_smem(real_ref.at[pl.ds(place * tile.m, tile.m)], real_tile, rest_ready)

        def fetch(step):
            slot, tap = lax.rem(step, stages), lax.rem(step, taps)
            first = group_ref[sample * kept + lax.div(step, taps)] * size
            start = sample * length + place * tile.m + offset_ref[tap]
            some_channels = pl.ds(first, size)
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(start, tile.m), some_channels], x_slab.at[slot], ready.at[slot])
            slab = w_ref.at[pl.ds(tap * channels + first, size), some_features]
            plgpu.copy_gmem_to_smem(slab, w_slab.at[slot], ready.at[slot])

        for step in range(stages):
            fetch(jnp.int32(step))

        def products(total):
            def add(step, carry):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(ready.at[slot])
                plgpu.wgmma(total, x_slab.at[slot], w_slab.at[slot])
                # The product before this one is done then, and its slabs may be overwritten.
                plgpu.wgmma_wait(1)

                @pl.when((step > 0) & (step - 1 + stages < steps))
                def _():
                    fetch(step - 1 + stages)

                return carry

            lax.fori_loop(0, steps, add, None)
            return total[...]

        y = pl.run_scoped(products, plgpu.ACC((tile.m, tile.n), jnp.float32))
        plgpu.barrier_wait(rest_ready)
        y = y + lax.broadcast_in_dim(vector(bias_tile, 0), y.shape, (1,))
        y = jnp.maximum(y, 0.0) if relu else y
        y_tile[...] = y.astype(y_tile.dtype)
        # Where the tile ends beyond the map, the copies have what lies behind it, which may be NaN.
        y = jnp.where(lax.broadcast_in_dim(vector(real_tile, 1), y.shape, (0,)) > 0, y, jnp.zeros_like(y))
        channel_sums[...] = y.sum(0)
        column_sums[...] = y.sum(1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile, y_ref.at[some_rows, some_features])
        plgpu.copy_smem_to_gmem(channel_sums, by_channel_ref.at[sample * tiles + place, some_features])
        plgpu.copy_smem_to_gmem(column_sums, by_column_ref.at[feature, some_rows])
        plgpu.wait_smem_to_gmem(0)

    total = count * tiles * tile.m
    run = plgpu.kernel(
        body,
        out_type=(
            compat.result_like(x, (total, wide), x.dtype),
            compat.result_like(x, (count * tiles, wide), jnp.float32),
            compat.result_like(x, (wide // tile.n, total), jnp.float32),
        ),
        scratch_types=(
            # Both operands of a product are swizzled alike.
            plgpu.SMEM((stages, tile.m, size), x.dtype, transforms=swizzled(size)),
            plgpu.SMEM((stages, size, tile.n), x.dtype, transforms=swizzled(size)),
            plgpu.SMEM((tile.m, tile.n), x.dtype, transforms=swizzled(tile.n)),
            plgpu.SMEM((tile.n,), jnp.float32),
            plgpu.SMEM((tile.m,), jnp.float32),
            plgpu.SMEM((tile.n,), jnp.float32),
            plgpu.SMEM((tile.m,), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        ),
        grid=(count, tiles, wide // tile.n),
        grid_names=("sample", "place", "feature"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return run(x, weights, groups.reshape(-1), jnp.asarray(grid.offsets, jnp.int32), bias, real)


def _fwd(window, size, relu, tile, interpret, x, kernel, bias, groups):
    result = _forward(window, size, relu, tile, interpret, x, kernel, bias, groups)
    return result, (x, kernel, bias, groups, result.y if relu else None)


def _bwd(window, size, relu, tile, interpret, residuals, cotangents):
    x, kernel, bias, groups, y = residuals
    mask = jnp.repeat(mask_of(groups, x.shape[-1] // size), size, axis=1)[:, None, None]
    return *masked_gradients(window, x, kernel, bias, mask, y, cotangents.y), rows.no_gradient(groups)


_slabs.defvjp(_fwd, _bwd)
