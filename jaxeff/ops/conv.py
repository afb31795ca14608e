"""Convolution whose gradient is fast everywhere: at top level, inside loops and under `vmap`.

On CPU, XLA moves a convolution into its fast layout only in the entry computation of a program. Forward convolutions
in NHWC / HWIO are in that layout already, but the transposes that automatic differentiation writes are not, and inside
`lax.scan`, `lax.map` or `while` they fall to a scalar kernel (jax-ml/jax#12868). Grouped convolutions and their
weight gradients are slow for related reasons (jax-ml/jax#13800). Here both gradients are written out as programs that
are already in fast form, and a mapped client axis becomes separate convolutions, written out while they are few and
large and in a loop otherwise, instead of one grouped convolution.

Three bilinear maps close under differentiation, so gradients of any order are available in reverse mode:

    y  = forward(x, k)            dx = forward(g, flipped k)            dk = weight_gradient(x, g)

Letters used below: N batch, I and O input and output channels, G groups.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from jaxeff import compat
from jaxeff.ops import gathered_conv, lowering
from jaxeff.ops.lowering import Window

Impl = Literal["lax", "canonical", "native", "auto"]
IMPLS: tuple[str, ...] = ("lax", "canonical", "native", "auto")
PADDINGS: tuple[str, ...] = ("SAME", "SAME_LOWER", "VALID")

# (impl, unroll); part of what JAX remembers traces by.
_CHOICE = jax.make_user_context(("auto", None))

# Written out, a mapped axis costs compile time for every member; in a loop, a result is cleared before it is filled,
# which only large results notice. So small results always come from a loop.
MAX_UNROLLED = 32
MIN_UNROLLED_BYTES = 2**19


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    impl: Impl | None = None,
) -> jax.Array:
    """Drop-in for `jax.lax.conv_general_dilated` whose gradient stays fast in loops and under `vmap` on CPU.

    Pass it to stock Flax layers: `nn.Conv(..., conv_general_dilated=jaxeff.ops.conv_general_dilated)` (Linen and NNX).

    Made for kernels that differ along a mapped axis (clients) and for batches as an axis of the input. Where `vmap`
    maps over single examples that share one kernel, its gradient is computed for each before JAX adds them up:
    correct, but impl="lax" is faster there.

    Args:
      lhs: input of rank n+2, laid out as `dimension_numbers` says (lax's default is NCHW; Flax passes NHWC).
      rhs: kernel of rank n+2, same dtype.
      window_strides: n strides.
      padding: "SAME", "SAME_LOWER", "VALID" or n pairs (low, high); pairs may be asymmetric and negative.
      lhs_dilation: n input dilations (fractional strides), default 1.
      rhs_dilation: n kernel dilations, default 1.
      dimension_numbers: as in lax.
      feature_group_count: number of channel groups G; must divide both channel counts.
      batch_group_count: as in lax; anything but 1 is handed to lax.
      precision: as in lax.
      preferred_element_type: as in lax.
      out_sharding: as in lax; anything but None is handed to lax.
      impl: "lax" for the stock primitive (needed for forward-mode differentiation), "canonical" for ours, which is
        made for CPU, "auto" for ours on CPU and stock elsewhere. "native" is compiled C++ on CPU where that covers the
        convolution (float32, one group, no input dilation; gradients of first order), and ours where it does not; see
        `jaxeff.ops.native`. None takes the choice of the surrounding `conv_impl` context, "auto" outside.
        The choice is made when the function is traced.

    Returns:
      The convolution, equal to lax's within float rounding.

    Raises:
      ValueError: for an unknown `impl` or padding, ranks or channels that do not fit, strides or dilations below 1,
        groups that do not divide the channels, or impl="native" where nothing can be compiled.
      TypeError: if input and kernel differ in dtype, or preferred_element_type is narrower.
    """
    chosen = _checked_impl(current_impl() if impl is None else impl)
    _check_operands(lhs, rhs, dimension_numbers, feature_group_count, batch_group_count)
    _check_window(lhs, window_strides, padding, lhs_dilation, rhs_dilation)
    _check_result_dtype(lhs, preferred_element_type)
    use_lax = chosen == "lax" or (chosen == "auto" and jax.default_backend() != "cpu")
    outside = batch_group_count != 1 or out_sharding is not None or not jnp.issubdtype(lhs.dtype, jnp.floating)
    if outside and chosen == "canonical":
        raise ValueError(
            "impl='canonical' covers real floating-point convolutions with batch_group_count=1 and out_sharding=None; "
            f"got dtype {lhs.dtype}, batch_group_count={batch_group_count}, out_sharding={out_sharding}. "
            "Use impl='lax' or 'auto'."
        )
    if use_lax or outside:
        kwargs = {} if out_sharding is None else {"out_sharding": out_sharding}
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
            batch_group_count, precision, preferred_element_type, **kwargs,
        )  # fmt: skip

    n = lhs.ndim - 2
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    lhs_dilation = tuple(lhs_dilation) if lhs_dilation is not None else (1,) * n
    rhs_dilation = tuple(rhs_dilation) if rhs_dilation is not None else (1,) * n
    x = _permuted(lhs, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    k = _permuted(rhs, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    window = Window(
        strides=tuple(window_strides),
        padding=_explicit_padding(padding, x.shape[1:-1], k.shape[:-2], window_strides, lhs_dilation, rhs_dilation),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        groups=feature_group_count,
        precision=lax.Precision(precision) if isinstance(precision, str) else precision,
        out_dtype=None if preferred_element_type is None else np.dtype(preferred_element_type),
    )
    # Inside `shard_map`, a shared operand becomes one that may differ, so that its gradient is summed over devices.
    x, k = compat.vary(x, compat.varying_axes(k)), compat.vary(k, compat.varying_axes(x))
    if chosen == "native" and _has_native(window, x):
        y = gathered_conv.gathered_conv(x, k, window.strides, window.padding, window.rhs_dilation)
    else:
        y = (_small_conv if _is_small(window, k.shape, x.shape) else _conv)(window, x, k)
    # The canonical result is (batch, spatial..., features); out_spec says where lax's caller wants each of them.
    back = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    return _permuted(y, tuple(int(axis) for axis in back))


@contextlib.contextmanager
def conv_impl(impl: Impl, *, unroll: int | None = None) -> Iterator[None]:
    """Chooses the implementation of every convolution traced inside the `with` block that does not choose itself.

    JAX traces a jitted function anew when it is called under another choice.

    Args:
      impl: "lax", "canonical", "native" or "auto", see `conv_general_dilated`.
      unroll: how many separate convolutions or matrix products `vmap` may write out for one mapped operation; where
        the mapped axis needs more, it becomes a `lax.map`. None leaves it as it is: outside any context 32 where one
        result has half a mebibyte or more, else 0.

    Raises:
      ValueError: for an unknown `impl` or a negative `unroll`.
    """
    if unroll is not None and unroll < 0:
        raise ValueError(f"unroll must be >= 0 (0 makes every mapped axis a lax.map), got {unroll}")
    with _CHOICE((_checked_impl(impl), _CHOICE.value[1] if unroll is None else unroll)):
        yield


def _has_native(window: Window, x: jax.Array) -> bool:
    """Whether compiled code covers the convolution.

    Raises:
      ValueError: if it would, but cannot be had.
    """
    plain = window.groups == 1 and {*window.lhs_dilation} == {1} and window.out_dtype in (None, np.float32)
    if not plain or x.dtype != np.float32:
        return False
    if reason := gathered_conv.unavailable(x.dtype):
        raise ValueError(f"impl='native' cannot be had: {reason}; take 'auto'")
    return True


def current_impl() -> str:
    """The implementation of convolutions that do not choose one themselves, see `conv_impl`."""
    impl: str = _CHOICE.value[0]
    return impl


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _small_conv(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    """The convolution of a small map, whose gradients are products of patches too.

    They are those that JAX writes, except that the patches are made again: they are as many times larger than the input
    as the kernel has taps.
    """
    return lowering.by_patches(window, x, k)


def _is_small(window: Window, k_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> bool:
    """Whether a convolution has a small map and keeps its size: then forward pass and gradients do the same work."""
    keeps = lowering.out_shape(window, x_shape, k_shape) == x_shape[1:-1]
    plain = keeps and window.groups == 1 and {*window.strides, *window.lhs_dilation} == {1}
    return plain and lowering.suits_patches(window, k_shape, x_shape)


def _small_fwd(window, x, k):
    return _small_conv(window, x, k), (x, k)


def _small_bwd(window, residuals, g):
    return jax.vjp(partial(lowering.by_patches, window), *residuals)[1](g)


_small_conv.defvjp(_small_fwd, _small_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    return _forward(window, x, k)(x, k)


def _conv_fwd(window, x, k):
    # The rule itself goes through `_conv`, so that an outer differentiation finds a differentiable function here.
    return _conv(window, x, k), (x, k)


def _conv_bwd(window, residuals, g):
    x, k = residuals
    g = g.astype(x.dtype)  # differs when preferred_element_type widened the output
    return _input_gradient(window, x.shape, k, g), _weight_gradient(window, k.shape, x, g)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _input_gradient(window: Window, x_shape: tuple[int, ...], k: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient with respect to the input: again a forward convolution, with strides and input dilation swapped."""
    kernel = k.shape[:-2]
    padding = []
    for axis, (low, _) in enumerate(window.padding):
        reach = (kernel[axis] - 1) * window.rhs_dilation[axis]
        dilated_in = lowering.dilated(x_shape[1 + axis], window.lhs_dilation[axis])
        dilated_out = lowering.dilated(g.shape[1 + axis], window.strides[axis])
        padding.append((reach - low, dilated_in + low - dilated_out))
    turned = window._replace(
        strides=window.lhs_dilation, padding=tuple(padding), lhs_dilation=window.strides, out_dtype=None
    )
    return _conv(turned, g, _transposed_kernel(k, window.groups))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weight_gradient(window: Window, k_shape: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    return _weight(window, k_shape, x)(x, g)


def _weight_gradient_fwd(window, k_shape, x, g):
    return _weight_gradient(window, k_shape, x, g), (x, g)


def _weight_gradient_bwd(window, k_shape, residuals, dk):
    x, g = residuals
    return _input_gradient(window, x.shape, dk, g), _conv(window._replace(out_dtype=None), x, dk)


_weight_gradient.defvjp(_weight_gradient_fwd, _weight_gradient_bwd)


# --- the batching rule ------------------------------------------------------------------------------------------------


def _mappable(compute, calls, result_bytes, merge=None):
    """Wraps a binary function so that a mapped axis becomes separate calls instead of one grouped convolution.

    Args:
      compute: function (a, b) -> array of the unmapped operands.
      calls: how many convolutions or products one call of `compute` writes; written out for every member of the mapped
        axis they cost compile time, so past the limit the axis becomes a loop. 0 for element-wise work, which JAX maps
        as well as anyone.
      merge: optional function (a, b) for a mapped and b shared, which folds the mapped axis into the batch.
    """

    @custom_vmap
    def op(a, b):
        return compute(a, b)

    @op.def_vmap
    def rule(axis_size, in_batched, a, b):
        a_mapped, b_mapped = in_batched
        if merge is not None and a_mapped and not b_mapped:
            return merge(op, a, b), True
        if calls == 0:
            return jax.vmap(compute, tuple(0 if is_mapped else None for is_mapped in in_batched))(a, b), True
        if axis_size == 1 or (axis_size and axis_size * calls <= _unroll_limit(result_bytes)):
            parts = [op(a[i] if a_mapped else a, b[i] if b_mapped else b) for i in range(axis_size)]
            return jnp.stack(parts), True
        mapped = tuple(operand for operand, is_mapped in ((a, a_mapped), (b, b_mapped)) if is_mapped)

        def one(operands):
            rest = iter(operands)
            return op(next(rest) if a_mapped else a, next(rest) if b_mapped else b)

        return lax.map(one, mapped), True

    return op


def _forward(window: Window, x: jax.Array, k: jax.Array):
    def merge(op, x, k):
        y = op(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), k)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    result = (x.shape[0], *lowering.out_shape(window, x.shape, k.shape), k.shape[-1])
    size = math.prod(result) * np.dtype(window.out_dtype or x.dtype).itemsize
    calls = lowering.separate_calls(window, k.shape, x.shape)
    return _mappable(partial(lowering.convolve, window), calls, size, merge)


def _weight(window: Window, k_shape: tuple[int, ...], x: jax.Array):
    calls = lowering.separate_weight_calls(window, k_shape, x.shape, x.dtype)
    return _mappable(partial(lowering.weight_gradient, window, k_shape), calls, math.prod(k_shape) * x.dtype.itemsize)


def _unroll_limit(result_bytes: int) -> int:
    chosen = _CHOICE.value[1]
    if chosen is not None:
        return chosen
    return MAX_UNROLLED if result_bytes >= MIN_UNROLLED_BYTES else 0


# --- geometry ---------------------------------------------------------------------------------------------------------


def _transposed_kernel(k: jax.Array, groups: int) -> jax.Array:
    """[kh, kw, I/G, O] flipped in space, with the channels of each group swapped: [kh, kw, O/G, I]."""
    *kernel, i, o = k.shape
    flipped = lax.rev(k, tuple(range(len(kernel))))
    split = flipped.reshape(*kernel, i, groups, o // groups)
    return jnp.swapaxes(split, -1, -3).reshape(*kernel, o // groups, groups * i)


def _explicit_padding(padding, in_shape, kernel, strides, lhs_dilation, rhs_dilation) -> tuple[tuple[int, int], ...]:
    if not isinstance(padding, str):
        lengths = map(lowering.dilated, in_shape, lhs_dilation)
        if any(length + low + high < 0 for length, (low, high) in zip(lengths, padding, strict=True)):
            raise ValueError(f"padding={padding} crops more than there is of the input's spatial axes {in_shape}")
        return tuple((int(low), int(high)) for low, high in padding)
    reach = [(size - 1) * d + 1 for size, d in zip(kernel, rhs_dilation, strict=True)]
    pairs = lax.padtype_to_pads(in_shape, reach, strides, padding)
    return tuple((int(low), int(high)) for low, high in pairs)


def _permuted(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return array if axes == tuple(range(array.ndim)) else array.transpose(axes)


def _checked_impl(impl: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    return impl


def _check_operands(lhs, rhs, dimension_numbers, groups, batch_groups) -> None:
    if lhs.ndim != rhs.ndim or lhs.ndim < 3:
        raise ValueError(
            f"a convolution takes an input and a kernel of equal rank >= 3 (batch, channels and space), got input "
            f"{lhs.shape} and kernel {rhs.shape}"
        )
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"input and kernel must have one dtype, got {lhs.dtype} and {rhs.dtype}; cast one of them")
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    channels, per_group = lhs.shape[numbers.lhs_spec[1]], rhs.shape[numbers.rhs_spec[1]]
    features = rhs.shape[numbers.rhs_spec[0]]
    if groups < 1 or channels % groups or features % groups:
        raise ValueError(
            f"feature_group_count={groups} must divide the {channels} input channels and the {features} output "
            "features; choose a common divisor of both"
        )
    if per_group * groups != channels:
        raise ValueError(
            f"kernel {rhs.shape} takes {per_group} input channels per group, but the input {lhs.shape} has {channels} "
            f"channels in {groups} group(s), that is {channels // groups} per group"
        )
    if batch_groups != 1 and lhs.shape[numbers.lhs_spec[0]] % batch_groups:
        raise ValueError(f"batch_group_count={batch_groups} must divide the batch of input {lhs.shape}")


def _check_result_dtype(lhs, preferred_element_type) -> None:
    if preferred_element_type is None or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return  # lax checks what is not of floating point
    wanted = np.dtype(preferred_element_type)
    if not jnp.issubdtype(wanted, jnp.floating) or wanted.itemsize < lhs.dtype.itemsize:
        raise TypeError(
            f"preferred_element_type must be a floating-point dtype no narrower than the input's {lhs.dtype}, got "
            f"{wanted}; cast the result instead"
        )


def _check_window(lhs, strides, padding, lhs_dilation, rhs_dilation) -> None:
    n = lhs.ndim - 2
    for name, steps in (("window_strides", strides), ("lhs_dilation", lhs_dilation), ("rhs_dilation", rhs_dilation)):
        if steps is not None and (not isinstance(steps, Sequence) or len(steps) != n or min(steps) < 1):
            raise ValueError(f"{name} must have {n} entries >= 1 for input {lhs.shape}, got {steps}")
    if isinstance(padding, str):
        if padding.upper() not in PADDINGS:
            raise ValueError(f"padding must be (low, high) pairs or one of {', '.join(PADDINGS)}, got {padding!r}")
        if lhs_dilation is not None and any(d != 1 for d in lhs_dilation):
            raise ValueError(
                f"padding={padding!r} has no agreed meaning with lhs_dilation={tuple(lhs_dilation)}; give (low, high) "
                "pairs"
            )
    elif not isinstance(padding, Sequence) or len(padding) != n or any(np.shape(pair) != (2,) for pair in padding):
        raise ValueError(f"padding must have {n} (low, high) pairs for input {lhs.shape}, got {padding}")
