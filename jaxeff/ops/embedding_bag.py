"""Bags of rows of an embedding table, summed: padded to one length, or as offsets into a list.

`jnp.take` with a sum writes all rows that are looked up to memory before it adds any. `pooled_lookup` adds position by
position, and `embedding_bag.cc` fetches the rows that come next meanwhile. Both round every product and every sum by
itself and in the order of the positions, so that the bits of a sum depend neither on the padding, nor on where rows
lie, nor on which of the two computed it.

Semantics are torch's: a mean divides by the number of entries, with weights too; an empty bag is zero; an id that
occurs twice counts twice.

Letters: B bags, L entries of the longest, nnz entries of all, R rows of the table, D numbers in each.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff import compat
from jaxeff.ops import native
from jaxeff.ops.choice import NO_PRODUCTS

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
SYMBOL = "EmbeddingBag"
MODES: tuple[str, ...] = ("sum", "mean")
# Of rows that compiled code reads; the numbers of embedding_bag.cc.
KINDS: tuple[str, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
# Positions in one turn of the loop. On one core of an EPYC, 2048 bags of 32 rows of 64 numbers: 1.82 ms by one, 1.67 by
# four, 1.46 by eight, 1.40 by all, whose program grows with the bag. Parts of 128 to 512 bags at a time gain nothing
# over that, and a loop over bags takes twice as long.
_UNROLL = 8
# On a GPU a turn is a kernel that keeps its sums in registers, and between turns they go to memory and back.
_UNROLL_GPU = 64

Decode = Callable[[jax.Array], jax.Array]


def pooled_lookup(
    table: jax.Array,
    indices: jax.Array,
    lengths: jax.Array | None = None,
    weights: jax.Array | None = None,
    mode: str = "sum",
    *,
    decode: Decode | None = None,
) -> jax.Array:
    """Sums the rows of each bag, position by position.

    Pass the table as an argument of the function that is compiled: one that it closes over is copied into the program.

    Args:
      table: [R, D] of floating point, or rows of any other form that `decode` understands, as uint8 [R, row bytes].
      indices: integers [B, L], each in 0 .. R - 1 as `check_bags` makes sure; what lies behind the end of a bag may be
        anything. One that is out of range makes its sum NaN.
      lengths: integers [B], 0 .. L; None where every bag has L entries.
      weights: float32 [B, L], or None.
      mode: "sum", or "mean", the sum divided by the number of entries.
      decode: `rows [..., row bytes] -> float32 [..., D]`.

    Returns:
      float32 [B, D]. It can be differentiated in the weights and the table, whose gradient is dense.

    Raises:
      TypeError: for indices that are not integers, or rows that are not floating point without `decode`.
      ValueError: for an unknown mode or shapes that do not fit.
    """
    table, indices, lengths, weights = _arrays(table, indices, lengths, weights)
    _check_lookup(table, indices, weights, mode)
    if lengths is not None and lengths.shape != indices.shape[:1]:
        raise ValueError(f"lengths: expected shape {indices.shape[:1]}, one for each bag, got {lengths.shape}")
    read = decode or _as_float32
    if decode is None and not jnp.issubdtype(table.dtype, jnp.floating):
        raise TypeError(f"table: rows of {table.dtype} need decode; `jaxeff.sdm.encoding` has those of its formats")

    if indices.dtype.itemsize < 4:  # may not hold the number of rows
        indices = indices.astype(jnp.int32)
    count = indices.shape[1]
    valid = (indices >= 0) & (indices < len(table))
    if lengths is not None:
        valid |= jnp.arange(count) >= lengths[:, None]
    # Once for all positions: a gather that looks at its indices itself takes a fifth longer.
    indices = jnp.clip(indices, 0, len(table) - 1)

    def add(total: jax.Array, here: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
        position, ids, weight = here
        rows = read(table.at[ids].get(mode="promise_in_bounds"))
        if weight is not None:
            rows = rounded_product(rows, weight[:, None])
        if lengths is not None:
            rows = jnp.where((position < lengths)[:, None], rows, 0)
        return total + rows, None

    dim = jax.eval_shape(read, jax.ShapeDtypeStruct((1, *table.shape[1:]), table.dtype)).shape[-1]
    axes = compat.varying_axes(table) | compat.varying_axes(indices)
    for array in (lengths, weights):
        axes |= compat.varying_axes(array) if array is not None else frozenset()
    start = compat.vary(jnp.zeros((indices.shape[0], dim), jnp.float32), axes)
    over = (jnp.arange(count), indices.T, None if weights is None else weights.T.astype(jnp.float32))
    total, _ = lax.scan(
        add, start, over, unroll=max(1, min(_UNROLL_GPU if jax.default_backend() == "gpu" else _UNROLL, count))
    )
    total = jnp.where(valid.all(1)[:, None], total, jnp.nan)
    if mode == "mean":
        entries = jnp.full(indices.shape[:1], count) if lengths is None else lengths
        total = mean_of(total, entries)
    return total


@jax.custom_jvp
def rounded_product(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x * factor in float32, rounded by itself also where its only reader is a sum.

    XLA's compilers contract a product and a sum into one operation of one rounding, or do not, as the code around them
    happens to be; one bit that only they cannot know to be without effect keeps the two apart.

    Args:
      x: float32, of any shape.
      factor: float32 that broadcasts against it.

    Returns:
      The product, with gradients of any order.
    """
    return _opaque(x * factor, factor)


def _opaque(x: jax.Array, by: jax.Array) -> jax.Array:
    """x, which no compiler can tell to be what it is; where `by` is NaN, its last bit is set."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(bits | jnp.isnan(by).astype(jnp.int32), jnp.float32)


@rounded_product.defjvp
def _rounded_product_jvp(primals, tangents):
    (x, factor), (dx, dfactor) = primals, tangents
    return rounded_product(x, factor), dx * factor + x * dfactor


def unavailable() -> str | None:
    """Why compiled look-ups cannot be had here, or None; the first call on a machine compiles."""
    if jax.default_backend() != "cpu":
        return f"they are made for CPU, and the backend is {jax.default_backend()}"
    return native.reason(SOURCE, SYMBOL)


def native_lookup(
    table: jax.Array,
    indices: jax.Array,
    lengths: jax.Array | None = None,
    weights: jax.Array | None = None,
    mode: str = "sum",
    *,
    kind: str | None = None,
    dim: int | None = None,
) -> jax.Array:
    """`pooled_lookup` in compiled code on CPU: the same bits, without gradients.

    Args:
      table: float32, float16 or bfloat16 [R, D], or uint8 [R, at least row bytes].
      indices: integers [B, L].
      lengths: integers [B], or None.
      weights: float32 [B, L], or None.
      mode: "sum" or "mean".
      kind: what uint8 rows hold: numbers of "float32", "float16" or "bfloat16"; "int8", a byte each and then a scale
        and a bias in float32; "int4", two to a byte with the lower half first and then a scale and a bias in float16.
        They stand for byte * scale + bias. None for the dtype of the table.
      dim: D where rows are uint8; None for as many as fit.

    Returns:
      float32 [B, D].

    Raises:
      TypeError, ValueError: as `pooled_lookup`, and for an unknown kind or rows that are too short for it.
      jaxeff.ops.native.UnavailableError: where the code cannot be had; `unavailable` asks before.
      jax.errors.JaxRuntimeError: while it runs, for an index or a length out of range.
    """
    table, indices, lengths, weights = _arrays(table, indices, lengths, weights)
    _check_lookup(table, indices, weights, mode)
    flat = None if weights is None else weights.reshape(-1)
    bounds = jnp.zeros(0, jnp.int32) if lengths is None else lengths
    return _call(table, indices.reshape(-1), bounds, flat, mode, kind, dim, *indices.shape)


def embedding_bag_csr(
    table: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    weights: jax.Array | None = None,
    mode: str = "sum",
    *,
    kind: str | None = None,
    dim: int | None = None,
    decode: Decode | None = None,
) -> jax.Array:
    """Sums the rows of bags without padding: in compiled code where it can be had, else position by position.

    Args:
      table: as in `native_lookup`.
      indices: integers [nnz]; more than the last offset says are not read.
      offsets: integers [B + 1].
      weights: float32 [nnz], or None.
      mode: "sum" or "mean".
      kind: as in `native_lookup`.
      dim: as in `native_lookup`.
      decode: as in `pooled_lookup`; used only where compiled code cannot be had, for rows of uint8.

    Returns:
      float32 [B, D], the same bits either way; without reverse-mode gradients.

    Raises:
      TypeError, ValueError: as `native_lookup`, and without `decode` where it is needed.
      jax.errors.JaxRuntimeError: while it runs, for indices or offsets out of range, in compiled code; else they make
        sums NaN.
    """
    table, indices, offsets, weights = _arrays(table, indices, offsets, weights)
    if indices.ndim != 1 or offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"expected indices [nnz] and offsets [B + 1], got {indices.shape} and {offsets.shape}")
    _check_lookup(table, indices, weights, mode)
    if not jnp.issubdtype(offsets.dtype, jnp.integer):
        raise TypeError(f"offsets: expected integers, got {offsets.dtype}")
    if unavailable() is None:
        return _call(table, indices, offsets, weights, mode, kind, dim, len(offsets) - 1, -1)
    if decode is None and table.dtype == jnp.uint8:
        raise ValueError(f"decode: rows of uint8 need it, as there is no compiled code: {unavailable()}")
    begins, lengths = offsets[:-1].astype(jnp.int32), jnp.diff(offsets).astype(jnp.int32)

    def add(position: jax.Array, total: jax.Array) -> jax.Array:
        at = jnp.minimum(begins + position, max(len(indices) - 1, 0))
        weight = None if weights is None else weights[at][:, None]
        one = pooled_lookup(table, indices[at][:, None], (position < lengths).astype(jnp.int32), weight, decode=decode)
        return total + one

    start = pooled_lookup(table, jnp.zeros((len(begins), 0), jnp.int32), decode=decode)
    total = lax.fori_loop(0, lengths.max(initial=0), add, start) if len(indices) else start
    return mean_of(total, lengths) if mode == "mean" else total


def mean_of(total: jax.Array, entries: jax.Array) -> jax.Array:
    """Sums float32 [B, D] over their entries, integers [B], with the bits of look-ups; no entry counts as one."""
    # XLA makes a division by what is broadcast a product with its reciprocal, in some programs and not in others.
    counts = jnp.broadcast_to(jnp.maximum(entries, 1).astype(jnp.float32)[:, None], total.shape)
    return total / _opaque(counts, total)


def _call(table, indices, bounds, weights, mode, kind, dim, bags, pitch):
    kind, dim = _kind_of_rows(table, kind, dim)
    native.register(SOURCE, SYMBOL)
    weights = jnp.zeros(0, jnp.float32) if weights is None else weights.astype(jnp.float32)
    operands = (table, indices.astype(jnp.int32), bounds.astype(jnp.int32), weights)
    axes = frozenset[str]().union(*map(compat.varying_axes, operands))
    operands = compat.vary(operands, axes)
    result = compat.ffi_result_like(operands[0], (bags, dim), jnp.float32)
    numbers = {"kind": KINDS.index(kind), "dim": dim, "mean": int(mode == "mean"), "pitch": pitch}
    call = jax.ffi.ffi_call(SYMBOL, result, vmap_method="sequential")
    return call(*operands, **{name: np.int64(number) for name, number in numbers.items()}, **NO_PRODUCTS)


def _kind_of_rows(table: jax.Array, kind: str | None, dim: int | None) -> tuple[str, int]:
    if table.dtype != jnp.uint8:
        given, width = str(table.dtype), table.shape[1]
        if given not in KINDS[:3] or kind not in (None, given) or dim not in (None, width):
            raise TypeError(
                f"table: expected {', '.join(KINDS[:3])} or rows of uint8 with their kind, got {given} "
                f"{table.shape} and kind={kind!r}, dim={dim}"
            )
        return given, width
    if kind not in KINDS:
        raise ValueError(f"kind: rows of uint8 are of one of {', '.join(KINDS)}, got {kind!r}")
    width, extra = {"float32": (8, 0), "float16": (4, 0), "bfloat16": (4, 0), "int8": (2, 8), "int4": (1, 4)}[kind]
    room = 2 * (table.shape[1] - extra) // width  # half bytes
    if dim is None:
        dim = room
    if not 1 <= dim <= room:
        raise ValueError(f"dim: rows of {table.shape[1]} bytes hold 1 to {room} numbers of {kind!r}, got dim={dim}")
    return kind, dim


def _arrays(*arrays: Any) -> tuple[Any, ...]:
    return tuple(None if array is None else jnp.asarray(array) for array in arrays)


def _as_float32(rows: jax.Array) -> jax.Array:
    return rows.astype(jnp.float32)


def _check_lookup(table: jax.Array, indices: jax.Array, weights: jax.Array | None, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if table.ndim != 2 or indices.ndim not in (1, 2):
        raise ValueError(f"expected a table [R, D] and indices [B, L], got {table.shape} and {indices.shape}")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices: expected integers, got {indices.dtype}")
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(f"weights: expected shape {indices.shape}, one for each index, got {weights.shape}")
