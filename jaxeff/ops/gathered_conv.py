"""Convolution of chosen channels and positions, other ones for each sample, in compiled code on CPU.

XLA has no product that reads its operands through a list of indices: what is kept must be copied first, the kernel of a
convolution once for every sample, and on small maps that takes longer than what it saves. `gathered_conv.cc` reads rows
where they lie. With nothing dropped it is an ordinary convolution, and faster than XLA's.

Letters: N batch, P input and Q output positions, T taps, C input and O output channels, S positions and K channels
kept, L output channels computed.
"""

import math
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import compat
from jaxeff.ops import native, taps

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
# Maps of fewer positions are multiplied together where all is kept, up to so many positions of all samples, whose table
# is a constant of the program.
MANY_POSITIONS, MOST_POSITIONS = 64, 2**14
SYMBOLS: tuple[str, ...] = ("GatheredConv", "GatheredMapGradient", "GatheredKernelGradient")


def unavailable(dtype: Any) -> str | None:
    """Why `gathered_conv` cannot compute with this dtype here, or None; the first call on a machine compiles."""
    if jax.default_backend() != "cpu":
        return f"it is made for CPU, and the backend is {jax.default_backend()}"
    if jnp.dtype(dtype) != jnp.float32:
        return f"it computes in float32, not in {jnp.dtype(dtype)}"
    return native.reason(SOURCE, *SYMBOLS)


def gathered_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    channels: jax.Array | None = None,
    columns: jax.Array | None = None,
    features: jax.Array | None = None,
) -> jax.Array:
    """Convolution of what is kept of each sample; the rest counts as zero, and is never read.

    Args:
      x: float32 [N, *space, C].
      kernel: float32 [*taps, C, O].
      strides: one for every axis of space.
      padding: (low, high) of every axis.
      dilation: of the kernel, one for every axis.
      channels: integers [N, K], ascending and no two alike, the kept channels of each sample; None for all.
      columns: integers [N, S], numbers of positions in row-major order, no two of a sample alike, those that are kept;
        None for all.
      features: integers [N, L], ascending and no two alike, the output channels of each sample that are computed, the
        others being zero; None for all.

    Returns:
      float32 [N, *output space, O]. Its backward pass, of any order, costs the kept share, too, but for `features`:
      there it costs what it does for all of them.

    Raises:
      TypeError: for indices that are not integers.
      ValueError: for shapes that do not fit.
      jaxeff.ops.native.UnavailableError: where the code cannot be had; `unavailable` asks before.
      jax.errors.JaxRuntimeError: while it runs, for indices that are out of range or in another order.
    """
    native.register(SOURCE, *SYMBOLS)
    if x.ndim != kernel.ndim or x.ndim < 3 or x.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"x must be [N, *space, C] and kernel [*taps, C, O], got {x.shape} and {kernel.shape}")
    positions = math.prod(x.shape[1:-1])
    limits = (("channels", channels, x.shape[-1]), ("columns", columns, positions))
    for name, indices, limit in (*limits, ("features", features, kernel.shape[-1])):
        if indices is not None and not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {indices.dtype}")
        if indices is not None and not (indices.shape[:-1] == x.shape[:1] and 1 <= indices.shape[-1] <= max(1, limit)):
            raise ValueError(f"{name} must be of shape [{len(x)}, 1..{limit}], got {indices.shape}")
    axes = compat.varying_axes(x) | compat.varying_axes(kernel)
    x, kernel = compat.vary((x, kernel), axes)
    window = (kernel.shape[:-2], strides, padding, dilation)
    reads = taps.read_positions(x.shape[1:-1], *window)
    writes = taps.inverse(reads, positions)
    out = tuple(
        max(0, (n + low + high - (t - 1) * d - 1) // s + 1)
        for n, t, s, (low, high), d in zip(x.shape[1:-1], *window, strict=True)
    )  # fmt: skip
    if 0 in (*x.shape, *kernel.shape, *out):
        return compat.vary(jnp.zeros((len(x), *out, kernel.shape[-1])), axes)
    batch, outputs = len(x), math.prod(out)
    everything_kept = channels is None and columns is None and features is None
    if everything_kept and outputs < MANY_POSITIONS and batch * outputs <= MOST_POSITIONS:
        # Who keeps the same can be one sample of many positions, for which the kernel is read once.
        reads, writes = _of_all_samples(reads, positions, batch), _of_all_samples(writes, outputs, batch)
        batch, outputs = 1, batch * outputs
    everything = jnp.zeros((batch, 0), jnp.int32)
    chosen = tuple(everything if i is None else i.astype(jnp.int32) for i in (channels, columns))
    tables = compat.vary((*chosen, jnp.asarray(reads), jnp.asarray(writes)), axes)
    counted = _counted(x, kernel, writes, outputs, batch, *chosen)
    if features is None:
        y = _convolution(counted, (batch, outputs), x, kernel, *tables)
    else:
        few = compat.vary(features.astype(jnp.int32), axes)
        y = _few_features(counted, (batch, outputs), x, kernel, few, *tables)
    return y.reshape(len(x), *out, -1)


# The convolution and its two gradients are bilinear and close under differentiation: with a gradient u of x, or v of
# the kernel, in the place of x or of the kernel, each is the derivative of the others.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(counted, size, x, kernel, *tables):
    shape, everything = (*size, kernel.shape[-1]), jnp.zeros((size[0], 0), jnp.int32)
    everything = compat.vary(everything, compat.varying_axes(x))
    return _call("GatheredConv", counted, x, shape, _flat(size, x), _by_tap(kernel), *tables, everything)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _map_gradient(counted, size, shape, g, kernel, *tables):
    flat = (size[0], math.prod(shape[:-1]) // size[0], shape[-1])
    return _call("GatheredMapGradient", counted, g, flat, g, _by_tap(kernel), *tables).reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel_gradient(counted, size, shape, g, x, *tables):
    flat = (math.prod(shape[:-2]), *shape[-2:])
    return _call("GatheredKernelGradient", counted, g, flat, g, _flat(size, x), *tables).reshape(shape)


def _convolution_backward(counted, size, residuals, g):
    x, kernel, *tables = residuals
    dx = _map_gradient(counted, size, x.shape, g, kernel, *tables)
    return dx, _kernel_gradient(counted, size, kernel.shape, g, x, *tables), *_none(tables)


def _map_gradient_backward(counted, size, shape, residuals, u):
    g, kernel, *tables = residuals
    dg = _convolution(counted, size, u, kernel, *tables)
    return dg, _kernel_gradient(counted, size, kernel.shape, g, u, *tables), *_none(tables)


def _kernel_gradient_backward(counted, size, shape, residuals, v):
    g, x, *tables = residuals
    dg = _convolution(counted, size, x, v, *tables)
    return dg, _map_gradient(counted, size, x.shape, g, v, *tables), *_none(tables)


_convolution.defvjp(lambda counted, size, *rest: (_convolution(counted, size, *rest), rest), _convolution_backward)
for _function, _rule in ((_map_gradient, _map_gradient_backward), (_kernel_gradient, _kernel_gradient_backward)):
    _function.defvjp(
        lambda counted, size, shape, *rest, function=_function: (function(counted, size, shape, *rest), rest), _rule
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _few_features(counted, size, x, kernel, features, *tables):
    shape, few = (*size, kernel.shape[-1]), tuple(n * features.shape[1] // kernel.shape[-1] for n in counted)
    return _call("GatheredConv", few, x, shape, _flat(size, x), _by_tap(kernel), *tables, features)


def _few_features_backward(counted, size, residuals, g):
    x, kernel, features, *tables = residuals
    computed = jnp.zeros((size[0], kernel.shape[-1]), bool).at[jnp.arange(size[0])[:, None], features].set(True)
    g = jnp.where(computed[:, None], g, 0)
    dx = _map_gradient(counted, size, x.shape, g, kernel, *tables)
    return dx, _kernel_gradient(counted, size, kernel.shape, g, x, *tables), *_none((features, *tables))


_few_features.defvjp(lambda counted, size, *rest: (_few_features(counted, size, *rest), rest), _few_features_backward)


def _none(tables):
    return (np.zeros(table.shape, jax.dtypes.float0) for table in tables)


def _call(name: str, counted: tuple[int, int], like: jax.Array, shape: tuple[int, ...], *operands: jax.Array):
    result = compat.ffi_result_like(like, shape, jnp.float32)
    paper, xla = map(np.int64, counted)  # for jaxeff.costs, see its conventions
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")(*operands, paper_macs=paper, xla_macs=xla)


def _flat(size: tuple[int, int], x: jax.Array) -> jax.Array:
    return x.reshape(size[0], -1, x.shape[-1])


def _by_tap(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(-1, *kernel.shape[-2:])


def _of_all_samples(table: np.ndarray, size: int, batch: int) -> np.ndarray:
    """A table of who finds which of `size` positions, for one sample that is all samples, one after the other."""
    shifted = table[:, None] + size * np.arange(batch, dtype=np.int32)[:, None]
    return np.where(table[:, None] == size, batch * size, shifted).reshape(len(table), -1).astype(np.int32)


def _counted(x, kernel, writes, outputs, batch, channels, columns) -> tuple[int, int]:
    """Multiply-accumulates with every tap of every output position, and without those in the padding."""
    positions = x.size // x.shape[-1] // batch
    per_product = batch * (channels.shape[1] or x.shape[-1]) * kernel.shape[-1]
    kept = columns.shape[1] or positions
    everywhere, inside = outputs * len(writes), int((writes < outputs).sum())
    return per_product * everywhere * kept // positions, per_product * inside * kept // positions
