"""Convolution of chosen channels and positions, other ones for each sample, in compiled code on CPU.

XLA has no product that reads its operands through a list of indices: what is kept must be copied first, the kernel of a
convolution once for every sample, and on small maps that takes longer than what it saves. `gathered_conv.cc` reads rows
where they lie. With nothing dropped it is an ordinary convolution, and faster than XLA's.

Letters: N batch, P input and Q output positions, T taps, C input and O output channels, S positions and K channels
kept.
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
) -> jax.Array:
    """Convolution of what is kept of each sample; the rest counts as zero, and is never read.

    Args:
      x: float32 [N, *space, C].
      kernel: float32 [*taps, C, O].
      strides: one for every axis of space.
      padding: (low, high) of every axis.
      dilation: of the kernel, one for every axis.
      channels: int32 [N, K], ascending, the kept channels of each sample; None for all.
      columns: int32 [N, S], in row-major order and no two of a sample alike, the kept positions; None for all.

    Returns:
      float32 [N, *output space, O]. Its backward pass costs the kept share, too; of first order only.

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled; `unavailable` asks before.
      jax.errors.JaxRuntimeError: while it runs, for indices that are out of range.
    """
    native.register(SOURCE, *SYMBOLS)
    size, window = x.shape[1:-1], (kernel.shape[:-2], strides, padding, dilation)
    reads, writes = taps.read_positions(size, *window), taps.written_positions(size, *window)
    out = tuple(
        (n + low + high - (t - 1) * d - 1) // s + 1
        for n, t, s, (low, high), d in zip(size, *window, strict=True)
    )  # fmt: skip
    if 0 in (*x.shape, *kernel.shape, *out):
        return compat.vary(jnp.zeros((len(x), *out, kernel.shape[-1])), compat.varying_axes(x))
    flat, outputs = x.reshape(len(x), math.prod(size), x.shape[-1]), math.prod(out)
    if channels is None and columns is None and outputs < MANY_POSITIONS and len(x) * outputs <= MOST_POSITIONS:
        # Who keeps the same can be one sample of many positions, for which the kernel is read once.
        flat = flat.reshape(1, -1, x.shape[-1])
        reads, writes = (
            _of_all_samples(table, n, len(x)) for table, n in ((reads, math.prod(size)), (writes, outputs))
        )
        outputs *= len(x)
    everything = jnp.zeros((len(flat), 0), jnp.int32)
    chosen = tuple(everything if indices is None else indices for indices in (channels, columns))
    tables = compat.vary((*chosen, jnp.asarray(reads), jnp.asarray(writes)), compat.varying_axes(x))
    y = _gathered(outputs, _counted(flat, kernel, writes, outputs, *chosen), flat, _by_tap(kernel), *tables)
    return y.reshape(len(x), *out, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(outputs, counted, x, kernel, channels, columns, reads, writes):
    shape = (len(x), outputs, kernel.shape[-1])
    return _call("GatheredConv", counted, x, shape, x, kernel, channels, columns, reads, writes)


def _forward(outputs, counted, x, kernel, *tables):
    return _gathered(outputs, counted, x, kernel, *tables), (x, kernel, *tables)


def _backward(outputs, counted, residuals, g):
    x, kernel, *tables = residuals
    dx = _call("GatheredMapGradient", counted, x, x.shape, g, kernel, *tables)
    dk = _call("GatheredKernelGradient", counted, x, kernel.shape, g, x, *tables)
    return dx, dk, *(np.zeros(table.shape, jax.dtypes.float0) for table in tables)


_gathered.defvjp(_forward, _backward)


def _call(name: str, counted: tuple[int, int], like: jax.Array, shape: tuple[int, ...], *operands: jax.Array):
    result = compat.ffi_result_like(like, shape, jnp.float32)
    paper, xla = map(np.int64, counted)  # for jaxeff.costs, by its conventions
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")(*operands, paper_macs=paper, xla_macs=xla)


def _by_tap(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(-1, *kernel.shape[-2:])


def _of_all_samples(table: np.ndarray, size: int, batch: int) -> np.ndarray:
    """A table of who finds which of `size` positions, for one sample that is all samples, one after the other."""
    shifted = table[:, None] + size * np.arange(batch, dtype=np.int32)[:, None]
    return np.where(table[:, None] == size, batch * size, shifted).reshape(len(table), -1).astype(np.int32)


def _counted(x, kernel, writes, outputs, channels, columns) -> tuple[int, int]:
    """Multiply-accumulates with every tap of every output position, and without those in the padding."""
    batch, positions, width = x.shape
    per_product = batch * (channels.shape[1] or width) * kernel.shape[-1]
    kept = columns.shape[1] or positions
    return tuple(per_product * n * kept // positions for n in (outputs * len(writes), int((writes < outputs).sum())))
