"""How one row of an embedding table is spelled in bytes: plain floats, or integers with a scale and a bias of the row.

Letters: n rows, D values of a row, q the integers of a quantised row, s its scale, b its bias. A row is worth

    w = fl(fl(q * s) + b)        (float32, two roundings)

in `decode` and in `decode_jax`, to the bit: compilers that contract a multiply-add would round once, so the JAX form
splits s into two parts whose products with q are exact, and has nothing left that could be contracted.

Layouts, little endian, those of PyTorch's `quantized.embedding_bag_byte_prepack` and `embedding_bag_4bit_prepack`:

    float32 | float16 | bfloat16   D values
    int8                           D bytes q, float32 s, float32 b
    int4                           ceil(D / 2) bytes (q of even columns in the low nibble), float16 s, float16 b
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

KINDS = ("float32", "float16", "bfloat16", "int8", "int4")

_FLOATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": jnp.dtype(jnp.bfloat16),
}
_PARAMETERS: dict[str, np.dtype[Any]] = {"int8": np.dtype("<f4"), "int4": np.dtype("<f2")}
# Of values, or of scale and bias: the integers of the same width, and the bits of an exponent that is not finite.
_EXPONENT = {
    "float32": ("<u4", 0x7F800000),
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "int8": ("<u4", 0x7F800000),
    "int4": ("<u2", 0x7C00),
}
# PyTorch's guard against a division by zero in rows whose values are all the same.
_EPSILON = np.float32(1e-8)
# The upper 16 bits of a float32's significand: 8 bits of q times these, or times the 8 bits below, are exact.
_UPPER = 0xFFFFFF00


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a table are stored.

    Attributes:
      kind: one of `KINDS`.
      dim: D, values of a row.
    """

    kind: str
    dim: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is not known; use one of {', '.join(KINDS)}")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int | np.integer) or self.dim < 1:
            raise ValueError(f"dim: expected a positive integer, got {self.dim!r}")
        object.__setattr__(self, "dim", int(self.dim))

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        if self.kind in _FLOATS:
            return self.dim * _FLOATS[self.kind].itemsize
        return self.integer_bytes + 2 * _PARAMETERS[self.kind].itemsize

    @property
    def integer_bytes(self) -> int:
        """Bytes of a row before its scale and bias: those of q, or all of them where there is neither."""
        if self.kind in _FLOATS:
            return self.row_bytes
        return self.dim if self.kind == "int8" else -(-self.dim // 2)

    @property
    def quantised(self) -> bool:
        """Whether a row is integers with a scale and a bias."""
        return self.kind in _PARAMETERS


def encode(values: np.ndarray, fmt: RowFormat, *, first_row: int = 0) -> np.ndarray:
    """Stores rows in a format.

    Bytes are those of PyTorch 2.13 on x86 (the formulas of its `*_prepack`), but for the sign of a zero bias, which is
    positive here and there depends on the order of the columns. An odd D leaves the last high nibble of int4 zero.

    Args:
      values: float32 [n, D].
      fmt: the format.
      first_row: number of the first row in its table, for messages.

    Returns:
      uint8 [n, row_bytes]. Of float32 rows a view of `values` where those are contiguous.

    Raises:
      TypeError: for values that are not float32.
      ValueError: for another shape, or a row that has a NaN, an infinity, or values that its format cannot hold.
    """
    values = np.asarray(values)
    if values.dtype != np.float32:
        raise TypeError(f"values: expected float32, got {values.dtype}; convert it yourself, knowing what is lost")
    if values.ndim != 2 or values.shape[1] != fmt.dim:
        raise ValueError(f"values: expected shape [n, {fmt.dim}] of {fmt}, got {list(values.shape)}")
    if not (finite := np.isfinite(values)).all():
        _refuse(values, ~finite, first_row, "is not finite; a table may not hold it")
    if fmt.kind == "float32":
        return np.ascontiguousarray(values, "<f4").view(np.uint8)
    with np.errstate(over="ignore", under="ignore"):
        if fmt.quantised:
            scale, bias, inverse = _parameters_of(values, fmt.kind)
            holds = np.isfinite(scale) & np.isfinite(bias)
        else:
            stored = values.astype(_FLOATS[fmt.kind])
            holds = np.isfinite(stored)
    if not holds.all():
        row = int(np.argwhere(~holds)[0, 0])
        raise ValueError(
            f"values: row {first_row + row} spans {values[row].min()} .. {values[row].max()}, beyond what {fmt.kind} "
            "can hold; store the table as float32, or clip it"
        )
    return _quantised(values, scale, bias, inverse, fmt) if fmt.quantised else stored.view(np.uint8)


def check_rows(rows: np.ndarray, fmt: RowFormat, *, first_row: int = 0) -> None:
    """Refuses stored rows that are not rows of a format.

    Args:
      rows: uint8 [n, row_bytes].
      fmt: the format.
      first_row: number of the first row in its table, for messages.

    Raises:
      TypeError: for another dtype.
      ValueError: for another shape, or a row with a value, scale or bias that is a NaN or an infinity.
    """
    _check_bytes(rows, fmt)
    if (wrong := _not_finite(rows, fmt)).any():
        what = "scale or bias" if fmt.quantised else "value"
        row = first_row + int(np.flatnonzero(wrong)[0])
        raise ValueError(f"rows: row {row} has a {what} that is not finite; it is damaged, or of another format")


def decode(rows: np.ndarray, fmt: RowFormat) -> np.ndarray:
    """Reads stored rows on the host.

    Args:
      rows: uint8 [..., row_bytes].
      fmt: the format.

    Returns:
      float32 [..., D]. Of contiguous float32 rows a view.

    Raises:
      TypeError: for another dtype.
      ValueError: for another shape.
    """
    _check_bytes(rows, fmt)
    if fmt.kind in _FLOATS:
        return np.ascontiguousarray(rows).view(_FLOATS[fmt.kind]).astype(np.float32, copy=False)
    integers = rows[..., : fmt.integer_bytes]
    scale, bias = np.moveaxis(_parameters(rows, fmt).astype(np.float32), -1, 0)[..., None]
    if fmt.kind == "int4":
        integers = np.stack([integers & 15, integers >> 4], -1).reshape(*rows.shape[:-1], -1)[..., : fmt.dim]
    values = integers.astype(np.float32)
    with np.errstate(under="ignore"):
        values *= scale
        values += bias
    return values


def decode_jax(rows: jax.Array, fmt: RowFormat) -> jax.Array:
    """Reads stored rows inside a program: the same bits as `decode`, for a `vmap`, `jit` or `scan` of any kind.

    Scale, bias or values below 1.2e-38 are what XLA makes of subnormal numbers: zero, on CPU.

    Args:
      rows: uint8 [..., row_bytes].
      fmt: the format, static.

    Returns:
      float32 [..., D].

    Raises:
      TypeError: for another dtype.
      ValueError: for another shape.
    """
    _check_bytes(rows, fmt)
    if fmt.kind in _FLOATS:
        return _bitcast(rows, fmt.dim, fmt.kind).astype(jnp.float32)
    integers = rows[..., : fmt.integer_bytes]
    parameters = _bitcast(rows[..., fmt.integer_bytes :], 2, _PARAMETERS[fmt.kind].name).astype(jnp.float32)
    scale, bias = parameters[..., :1], parameters[..., 1:]
    if fmt.kind == "int4":
        pairs = jnp.stack([integers & 15, integers >> 4], -1)
        integers = pairs.reshape(*rows.shape[:-1], 2 * fmt.integer_bytes)[..., : fmt.dim]
        # 4 bits times the 11 of a float16: this product is exact, contracted or not.
        return integers.astype(jnp.float32) * scale + bias
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(scale, jnp.uint32) & jnp.uint32(_UPPER), jnp.float32)
    values = integers.astype(jnp.float32)
    return (values * upper + values * (scale - upper)) + bias


@functools.cache
def zero_row(fmt: RowFormat) -> np.ndarray:
    """The stored row that decodes to zeros, uint8 [row_bytes], read-only."""
    row = np.zeros(fmt.row_bytes, np.uint8)
    row.flags.writeable = False
    return row


def _parameters_of(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale and bias of rows as PyTorch has them, of the dtype they are stored in, and its multiplier, each [n, 1]."""
    # Adding zero makes a negative zero positive.
    low, high = values.min(1, keepdims=True) + np.float32(0), values.max(1, keepdims=True) + np.float32(0)
    if kind == "int8":
        span = high - low
        return span / np.float32(255), low, np.float32(255) / (span + _EPSILON)
    # The scale spans from the bias as it is rounded, and is never zero.
    bias = low.astype(np.float16)
    scale = ((high - bias.astype(np.float32)) / np.float32(15)).astype(np.float16)
    scale = np.where(scale == 0, np.float16(1), scale)
    return scale, bias, np.float32(1) / scale.astype(np.float32)


def _quantised(
    values: np.ndarray, scale: np.ndarray, bias: np.ndarray, inverse: np.ndarray, fmt: RowFormat
) -> np.ndarray:
    rows = np.empty((len(values), fmt.row_bytes), np.uint8)
    integers = values - bias.astype(np.float32)
    integers *= inverse
    # To even, as `nearbyint`.
    np.rint(integers, out=integers)
    if fmt.kind == "int8":
        rows[:, : fmt.dim] = integers
    else:
        nibbles = np.zeros((len(values), 2 * fmt.integer_bytes), np.uint8)
        nibbles[:, : fmt.dim] = integers.clip(0, 15, out=integers)
        rows[:, : fmt.integer_bytes] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    parameters = np.concatenate([scale, bias], 1).astype(_PARAMETERS[fmt.kind], copy=False)
    rows[:, fmt.integer_bytes :] = parameters.view(np.uint8)
    return rows


def _not_finite(rows: np.ndarray, fmt: RowFormat) -> np.ndarray:
    """bool [n]: rows whose values, or whose scale or bias, have an exponent of all ones."""
    dtype, mask = _EXPONENT[fmt.kind]
    numbers = np.ascontiguousarray(rows[..., fmt.integer_bytes :] if fmt.quantised else rows).view(dtype)
    return ((numbers & mask) == mask).any(-1)


def _parameters(rows: np.ndarray, fmt: RowFormat) -> np.ndarray:
    return np.ascontiguousarray(rows[..., fmt.integer_bytes :]).view(_PARAMETERS[fmt.kind])


def _bitcast(rows: jax.Array, count: int, dtype: str) -> jax.Array:
    return lax.bitcast_convert_type(rows.reshape(*rows.shape[:-1], count, -1), jnp.dtype(dtype))


def _check_bytes(rows: np.ndarray | jax.Array, fmt: RowFormat) -> None:
    if rows.dtype != np.uint8:
        raise TypeError(f"rows: expected uint8, the bytes of stored rows, got {rows.dtype}")
    if rows.ndim < 1 or rows.shape[-1] != fmt.row_bytes:
        raise ValueError(f"rows: expected shape [..., {fmt.row_bytes}] of {fmt}, got {list(rows.shape)}")


def _refuse(values: np.ndarray, wrong: np.ndarray, first_row: int, why: str) -> None:
    row, column = np.argwhere(wrong)[0]
    raise ValueError(f"values: row {first_row + row}, column {column} is {values[row, column]}, which {why}")
