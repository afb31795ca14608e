"""A dense layer of neurons as one pass on an accelerator: projections and product meet in registers.

Plain XLA writes the projections a.x, b.x and c.x to memory and reads them again to combine them: six transfers of the
size of the output, where one is needed. Here a tile of each is accumulated in float32 side by side, combined, and only
the result is written. The backward pass computes a.x and b.x again, in the same way, and writes the cotangents of the
projections; matrix products by XLA do the rest.

Written in Pallas for GPU; on other devices, and in tests, it runs interpreted.

Letters: B rows, I inputs, O neurons; m, n, k the sizes of a tile along B, O and I.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class Tile(NamedTuple):
    """Rows, neurons and inputs that one program of the kernel takes at a time; powers of two, at least 16."""

    m: int = 64
    n: int = 64
    k: int = 32


TILE = Tile()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused_dense(
    x: jax.Array, kernels: tuple[jax.Array, ...], biases: tuple[Any, ...], tile: Tile = TILE, interpret: bool = False
) -> jax.Array:
    """(a.x) * (b.x), or (a.x) * (b.x) + c.x, in one pass that keeps only its input for the backward pass.

    Args:
      x: [B, I], float32 or bfloat16.
      kernels: two or three [I, O] in the dtype of x, in the order a, b, c.
      biases: as many [O] in float32.
      tile: sizes of a tile.
      interpret: run the kernel interpreted, on any device.

    Returns:
      [B, O] in the dtype of x; sums, biases and the product are in float32.

    Raises:
      ValueError: for another number of kernels.
    """
    return _forward(x, kernels, biases, tile, interpret)


def _forward(x, kernels, biases, tile, interpret):
    if len(kernels) not in (2, 3) or len(biases) != len(kernels):
        raise ValueError(
            f"fused_dense takes two or three kernels and as many biases, got {len(kernels)}, {len(biases)}"
        )
    rows, neurons = x.shape[0], kernels[0].shape[1]

    def kernel(x_ref, *refs):
        *inputs, y_ref = refs
        sums = _projections(x_ref, inputs[: len(kernels)], inputs[len(kernels) :], tile)
        y = sums[0] * sums[1] + (sums[2] if len(sums) == 3 else 0.0)
        y_ref[...] = y.astype(y_ref.dtype)

    (y,) = _call(kernel, x, kernels, biases, (), 1, tile, interpret)
    return y[:rows, :neurons]


def _fwd(x, kernels, biases, tile, interpret):
    return _forward(x, kernels, biases, tile, interpret), (x, kernels, biases)


def _bwd(tile, interpret, residuals, g):
    x, kernels, biases = residuals
    rows, neurons = g.shape

    def kernel(x_ref, a_ref, b_ref, a_bias, b_bias, g_ref, by_a_ref, by_b_ref):
        a, b = _projections(x_ref, (a_ref, b_ref), (a_bias, b_bias), tile)
        g = g_ref[...].astype(jnp.float32)
        by_a_ref[...] = (g * b).astype(by_a_ref.dtype)
        by_b_ref[...] = (g * a).astype(by_b_ref.dtype)

    by = _call(kernel, x, kernels[:2], biases[:2], (g,), 2, tile, interpret)
    by = [value[:rows, :neurons] for value in by] + [g] * (len(kernels) - 2)
    # One product each for all projections: the input and its gradient are read and written once.
    stacked, weights = jnp.concatenate(by, 1), jnp.concatenate(kernels, 1)
    by_x = lax.dot_general(stacked, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    by_weights = lax.dot_general(x, stacked, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    by_kernels = jnp.split(by_weights.astype(x.dtype), len(kernels), 1)
    by_biases = [value.astype(jnp.float32).sum(0).astype(bias.dtype) for value, bias in zip(by, biases, strict=True)]
    return by_x.astype(x.dtype), tuple(by_kernels), tuple(by_biases)


fused_dense.defvjp(_fwd, _bwd)


def _projections(x_ref, kernel_refs, bias_refs, tile):
    """float32 [m, n] of each kernel: the loop over I reads a tile of the input once for all of them."""
    inputs = x_ref.shape[1]

    def step(i, sums):
        span = pl.ds(i * tile.k, tile.k)
        x = x_ref[:, span]
        return tuple(
            total + jnp.dot(x, ref[span, :], preferred_element_type=jnp.float32)
            for total, ref in zip(sums, kernel_refs, strict=True)
        )

    start = tuple(jnp.zeros((tile.m, tile.n), jnp.float32) for _ in kernel_refs)
    sums = lax.fori_loop(0, inputs // tile.k, step, start)
    return [total + ref[...].astype(jnp.float32) for total, ref in zip(sums, bias_refs, strict=True)]


def _call(kernel, x, kernels, biases, more, outputs, tile, interpret):
    """Runs a kernel over all tiles of the output; arrays are padded with zeros to whole tiles."""
    x = _padded(x, (tile.m, tile.k))
    kernels = [_padded(value, (tile.k, tile.n)) for value in kernels]
    biases = [_padded(value[None], (1, tile.n)) for value in biases]
    more = [_padded(value, (tile.m, tile.n)) for value in more]
    inputs, neurons = kernels[0].shape
    by_tile = pl.BlockSpec((tile.m, tile.n), lambda i, j: (i, j))
    shape = jax.ShapeDtypeStruct((x.shape[0], neurons), x.dtype)
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // tile.m, neurons // tile.n),
        in_specs=[
            pl.BlockSpec((tile.m, inputs), lambda i, j: (i, 0)),
            *[pl.BlockSpec((inputs, tile.n), lambda i, j: (0, j)) for _ in kernels],
            *[pl.BlockSpec((1, tile.n), lambda i, j: (0, j)) for _ in biases],
            *[by_tile for _ in more],
        ],
        out_specs=[by_tile] * outputs,
        out_shape=[shape] * outputs,
        interpret=interpret,
    )(x, *kernels, *biases, *more)


def _padded(array, multiples):
    pads = [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, pads) if any(high for _, high in pads) else array
