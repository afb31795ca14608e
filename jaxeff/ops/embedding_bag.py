"""Bags of rows of an embedding table, summed: on the host as offsets into a list, on devices padded to one length.

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
from typing import Any, NamedTuple

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
POLICIES: tuple[str, ...] = ("raise", "drop", "hash")
# Of rows that compiled code reads; the numbers of embedding_bag.cc.
KINDS: tuple[str, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
# Positions in one turn of the loop. On one core of an EPYC, 2048 bags of 32 rows of 64 numbers: 1.82 ms by one, 1.67 by
# four, 1.46 by eight, 1.40 by all, whose program grows with the bag. Parts of 128 to 512 bags at a time gain nothing
# over that, and a loop over bags takes twice as long.
_UNROLL = 8
# On a GPU a turn is a kernel that keeps its sums in registers, and between turns they go to memory and back.
_UNROLL_GPU = 64

Decode = Callable[[jax.Array], jax.Array]


class Bags(NamedTuple):
    """Bags of ids on the host.

    Attributes:
      indices: integers [nnz], the ids of all bags, one bag after the other.
      offsets: int64 [B + 1]; bag b has the entries from offsets[b] to offsets[b + 1]; the last is nnz.
      weights: float32 [nnz], or None where every entry counts as it is.
    """

    indices: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Number of entries of each bag, int64 [B]."""
        return np.diff(self.offsets)


def check_bags(bags: Bags, rows: int | np.ndarray, policy: str = "raise", dtype: Any = np.int32) -> Bags:
    """Finds what is wrong with bags before a look-up, where out of range would be silent.

    Args:
      bags: of any integer dtypes.
      rows: of the table; or integers [B], of the table of each bag, where bags of several lie end to end.
      policy: for ids outside 0 .. rows - 1: "raise" an error, "drop" the entry (its bag has one less, also for a
        mean), or "hash", the id modulo the number of rows.
      dtype: of the ids that are handed back; np.int64 for tables of more rows than JAX can index.

    Returns:
      Bags with ids of that dtype, int64 offsets and float32 weights; arrays that have these already are not copied.

    Raises:
      TypeError: for ids or offsets that are not integers, or weights that are not numbers.
      ValueError: for an unknown policy; a table without rows or of more rows than the dtype holds; offsets that are not
        one-dimensional, do not begin with 0, are negative, decrease, or do not end at nnz; weights of another shape or
        not finite; ids out of range under "raise".
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    most = np.iinfo(dtype).max
    limits = np.asarray(rows)
    # Of several tables one may be empty, if its bags are.
    least = 0 if limits.ndim else 1
    if limits.size and not least <= limits.min() <= limits.max() <= most:
        wrong = limits.min() if limits.min() < least else limits.max()
        raise ValueError(
            f"rows: expected 1 to {most} to be indexed by {np.dtype(dtype)}, got {wrong}; a table of more rows cannot "
            "be one JAX array: split it, or keep it on disk and pass dtype=np.int64"
        )
    bags = well_formed(bags)
    indices, offsets, weights = bags
    if limits.ndim:
        if limits.shape != (len(offsets) - 1,):
            raise ValueError(
                f"rows: expected one number, or one for each of {len(offsets) - 1} bags, got {limits.shape}"
            )
        limits = np.repeat(limits, np.diff(offsets))
    outside = (indices < 0) | (indices >= limits)
    if outside.any():
        if policy == "raise":
            at = int(outside.argmax())
            bag = int(np.searchsorted(offsets, at, side="right")) - 1
            limit = np.broadcast_to(limits, indices.shape)[at]
            raise ValueError(
                f"indices: {int(outside.sum())} of {len(indices)} are outside 0..{limit - 1}, the first is "
                f'{indices[at]} in bag {bag}; correct them, or pass policy="drop" or "hash"'
            )
        if policy == "hash":
            indices = indices % limits
        else:
            kept = ~outside
            offsets = np.concatenate([[0], np.cumsum(kept)])[offsets]
            indices, weights = indices[kept], None if weights is None else weights[kept]
    return Bags(indices.astype(dtype, copy=False), offsets, weights)


def well_formed(bags: Bags) -> Bags:
    """Bags whose offsets and weights belong to their ids, whatever table these are of.

    Args:
      bags: of any integer dtypes, arrays or lists.

    Returns:
      The same with int64 offsets and float32 weights, and ids as they are.

    Raises:
      TypeError, ValueError: as `check_bags`, but for ids out of range.
    """
    indices, offsets = np.asarray(bags.indices), np.asarray(bags.offsets)
    for name, array in (("indices", indices), ("offsets", offsets)):
        if not np.issubdtype(array.dtype, np.integer) and array.size:
            raise TypeError(f"{name}: expected integers, got {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
    if indices.dtype == np.uint64 and indices.size and indices.max() > np.iinfo(np.int64).max:
        raise ValueError(f"indices: {indices.max()} is more than int64 holds; hash ids to fewer numbers")
    offsets = offsets.astype(np.int64, copy=False)
    _check_offsets(offsets, len(indices))
    weights = None if bags.weights is None else _checked_weights(np.asarray(bags.weights), len(indices))
    return Bags(indices, offsets, weights)


def padded(bags: Bags, length: int | None = None, fill: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Bags as a rectangle, for `pooled_lookup`.

    Args:
      bags: with valid offsets, as from `check_bags`.
      length: L; None for that of the longest bag.
      fill: the id behind the end of a bag, where nothing is added.

    Returns:
      `(indices int32 [B, L], lengths int32 [B], weights float32 [B, L] or None)`; weights are zero behind the end.

    Raises:
      ValueError: for a bag that is longer than `length`, or ids beyond int32.
    """
    lengths = bags.lengths
    longest = int(lengths.max(initial=0))
    if length is None:
        length = longest
    elif longest > length:
        raise ValueError(
            f"length: bag {int(lengths.argmax())} has {longest} entries, more than length={length}; raise it, or cut "
            "the bag"
        )
    limits = np.iinfo(np.int32)
    if bags.indices.dtype != np.int32 and bags.indices.size:
        low, high = int(bags.indices.min()), int(bags.indices.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"indices: {low if low < limits.min else high} does not fit int32; number the rows anew")
    inside = np.arange(length) < lengths[:, None]  # row-major, as the entries are
    indices = np.full((len(lengths), length), fill, np.int32)
    indices[inside] = bags.indices
    weights = None
    if bags.weights is not None:
        weights = np.zeros(indices.shape, np.float32)
        weights[inside] = bags.weights
    return indices, lengths.astype(np.int32), weights


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


def _check_offsets(offsets: np.ndarray, entries: int) -> None:
    if not len(offsets):
        raise ValueError("offsets: expected B + 1 of them for B bags, got none")
    if (offsets < 0).any():
        at = int((offsets < 0).argmax())
        raise ValueError(f"offsets: expected no negative ones, got {offsets[at]} at {at}")
    if offsets[0]:
        raise ValueError(f"offsets: must begin with 0, got {offsets[0]}")
    falls = np.diff(offsets) < 0
    if falls.any():
        at = int(falls.argmax())
        raise ValueError(f"offsets: must not decrease, got {offsets[at]} and then {offsets[at + 1]} at {at + 1}")
    if offsets[-1] != entries:
        raise ValueError(f"offsets: must end at the number of indices, {entries}, got {offsets[-1]}")


def _checked_weights(weights: np.ndarray, entries: int) -> np.ndarray:
    if weights.shape != (entries,):
        raise ValueError(f"weights: expected shape ({entries},), one for each index, got {weights.shape}")
    if not np.issubdtype(weights.dtype, np.number) or np.issubdtype(weights.dtype, np.complexfloating):
        raise TypeError(f"weights: expected real numbers, got {weights.dtype}")
    finite = np.isfinite(weights)
    if not finite.all():
        at = int((~finite).argmax())
        raise ValueError(f"weights: expected finite numbers, got {weights[at]} at {at}")
    return weights.astype(np.float32, copy=False)
