"""How one channels-last convolution, and its weight gradient, is handed to XLA.

Several forms compute the same numbers; which one is fast depends on the shape and, on CPU, on what XLA's convolution
does badly:

* `direct`: one `lax.conv_general_dilated` in NHWC / HWIO, the layout XLA's CPU convolution is written for, with one
  axis of the window drawn out to twice its length where that keeps it on all threads;
* `pointwise`: a 1x1 convolution as one matrix product;
* `patches`: one matrix product with the patches of all positions side by side, for maps of a few positions, which XLA's
  convolution runs on a scalar path or on one thread;
* `shifts`: one matrix product (depthwise and for a single input channel, one multiply-add) per kernel tap over a
  shifted view of the input;
* `per group`: each channel group on its own, because grouped convolutions run on a slow path.

Name scopes tell `jaxeff.costs` what a form hides from it ("real_positions_49_of_64"), so that it counts the convolution
that was asked for. Nothing here is differentiated by JAX: `jaxeff.ops.conv` defines the derivatives in terms of these
functions. Letters: N batch, I and O input and output channels, G groups, taps = kernel positions.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Above this many channel groups, separate convolutions cost more to compile than they save.
MAX_SEPARATE_GROUPS = 32
# Above this many taps (a 7x7 kernel), one product per tap loses to a single convolution.
MAX_TAPS = 49
# Up to so many output positions, of one image and of all, and from so many input channels, one product of patches beats
# every other form: at 4x4x512 and two cores its gradients take 0.35 (batch 1) to 0.6 (batch 8) of the convolution's
# time, and as long at batch 32, where the patches would only take memory.
MAX_PATCH_POSITIONS = 16
MAX_PATCH_ROWS = 256
MIN_PATCH_CHANNELS = 32
# With fewer input channels (a first layer, a batch of few images) Eigen's convolution is no faster than other forms.
MIN_EIGEN_CHANNELS = 8
# XLA leaves convolutions to Eigen by itself where neither channel count is above this.
MAX_SMALL_CHANNELS = 16


class Window(NamedTuple):
    """Static description of a channels-last convolution; hashable, so it may key a compilation."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1
    precision: Any = None
    out_dtype: Any = None


def convolve(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    """Convolution of x [N, *space, I] with k [*kernel, I/G, O], giving [N, *out_space, O]."""
    groups = window.groups
    if groups == 1:
        return _dense(window, x, k)
    if _is_depthwise(window, k.shape):
        return _depthwise(window, x, k)
    if groups <= MAX_SEPARATE_GROUPS:
        one = window._replace(groups=1)
        pairs = zip(jnp.split(x, groups, axis=-1), jnp.split(k, groups, axis=-1), strict=True)
        return jnp.concatenate([_dense(one, xg, kg) for xg, kg in pairs], axis=-1)
    return _direct(window, x, k)


def weight_gradient(window: Window, k_shape: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient of the kernel [*kernel, I/G, O] from the input x and the output gradient g [N, *out_space, O]."""
    groups = window.groups
    if 0 in g.shape[1:-1]:  # a convolution whose kernel had no positions could not be lowered
        return jnp.zeros(k_shape, x.dtype)
    if groups == 1:
        by_shifts = _weight_suits_shifts(window, k_shape, x.shape, x.dtype)
        return (_dense_weight_by_shifts if by_shifts else _dense_weight_by_convolution)(window, k_shape, x, g)
    if _is_depthwise(window, k_shape):
        return _depthwise_weight(window, k_shape, x, g)
    if groups <= MAX_SEPARATE_GROUPS:
        one, shape = window._replace(groups=1), (*k_shape[:-1], k_shape[-1] // groups)
        pairs = zip(jnp.split(x, groups, axis=-1), jnp.split(g, groups, axis=-1), strict=True)
        return jnp.concatenate([weight_gradient(one, shape, xg, gg) for xg, gg in pairs], axis=-1)
    return _grouped_weight_by_shifts(window, k_shape, x, g)


def dilated(size: int, dilation: int) -> int:
    """Length of an axis of `size` elements that lie `dilation` apart."""
    return (size - 1) * dilation + 1 if size else 0


def out_shape(window: Window, x_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the spatial axes of the output."""
    dilated_in = (dilated(size, d) for size, d in zip(x_shape[1:-1], window.lhs_dilation, strict=True))
    reach = (dilated(size, d) for size, d in zip(k_shape[:-2], window.rhs_dilation, strict=True))
    sizes = zip(dilated_in, window.padding, reach, window.strides, strict=True)
    return tuple(max((low + size + high - r) // s + 1, 0) for size, (low, high), r, s in sizes)


def separate_calls(window: Window, k_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> int:
    """How many convolutions or products `convolve` writes for an input of this shape; 0 if all is element-wise."""
    if _is_depthwise(window, k_shape):
        return 0
    if window.groups > MAX_SEPARATE_GROUPS:
        return 1
    by_shifts = _suits_shifts(k_shape, x_shape) and not suits_patches(window, k_shape, x_shape)
    return window.groups * (math.prod(k_shape[:-2]) if by_shifts else 1)


def separate_weight_calls(window: Window, k_shape: tuple[int, ...], x_shape: tuple[int, ...], dtype: Any) -> int:
    """How many convolutions or products `weight_gradient` writes for such an input; 0 if all is element-wise."""
    if _is_depthwise(window, k_shape):
        return 0
    taps = math.prod(k_shape[:-2])
    if window.groups > MAX_SEPARATE_GROUPS:
        return taps
    by_shifts = _weight_suits_shifts(window._replace(groups=1), k_shape, x_shape, dtype)
    return window.groups * (taps if by_shifts else 1)


def _is_depthwise(window: Window, k_shape: tuple[int, ...]) -> bool:
    return window.groups > 1 and k_shape[-2] == 1 and math.prod(k_shape[:-2]) <= MAX_TAPS


def _suits_shifts(k_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> bool:
    """Whether one product per tap beats the convolution.

    It does for a single input channel, where the products are element-wise and fuse, and for a kernel larger than the
    input: XLA exchanges the two, and the result runs on the scalar path.
    """
    larger = any(size > length for size, length in zip(k_shape[:-2], x_shape[1:-1], strict=True))
    return (larger or k_shape[-2] == 1) and math.prod(k_shape[:-2]) <= MAX_TAPS


def suits_patches(window: Window, k_shape, x_shape: tuple[int, ...]) -> bool:
    """Whether one product of patches beats the convolution and the products of single taps."""
    positions = math.prod(out_shape(window, x_shape, k_shape))
    few = 0 < positions <= MAX_PATCH_POSITIONS and x_shape[0] * positions <= MAX_PATCH_ROWS
    return few and k_shape[-2] >= MIN_PATCH_CHANNELS and 1 < math.prod(k_shape[:-2]) <= MAX_TAPS


def _weight_suits_shifts(window: Window, k_shape, x_shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether one product per tap beats the convolution in which the batch acts as the channels."""
    taps = math.prod(k_shape[:-2])
    larger = any(o > size for o, size in zip(out_shape(window, x_shape, k_shape), x_shape[1:-1], strict=True))
    suits_convolution = dtype == jnp.float32 and len(x_shape) == 4 and x_shape[0] >= MIN_EIGEN_CHANNELS and not larger
    return taps == 1 or (taps <= MAX_TAPS and not suits_convolution)


def _dense(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    if _is_pointwise(window, k.shape):
        return _pointwise(window, x, k)
    if suits_patches(window, k.shape, x.shape):
        return by_patches(window, x, k)
    return _by_shifts(window, x, k) if _suits_shifts(k.shape, x.shape) else _direct(window, x, k)


def _direct(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    if not any(low < 0 or high < 0 for low, high in window.padding):
        return _convolution(_for_eigen(window, x, k), x, k)
    # XLA's CPU convolution reads outside its input when padding is negative (jax 0.10.2), so we crop instead.
    n, margins = x.ndim - 2, zip(window.padding, window.lhs_dilation, strict=True)
    cropped = window._replace(padding=((0, 0),) * n, lhs_dilation=(1,) * n)
    with jax.named_scope("with_margins" + "".join(f"_{low}x{high}x{d}" for (low, high), d in margins)):
        return _convolution(_for_eigen(cropped, x, k), _with_margins(window, x), k)


def _for_eigen(window: Window, x: jax.Array, k: jax.Array) -> Window:
    """The same convolution in a form that XLA's CPU compiler does not give to YNNPACK.

    YNNPACK takes two-dimensional float32 convolutions (jax 0.10 and 0.11) and runs most sizes of them on one thread,
    the weight gradient of a VGG layer twenty times slower than Eigen. It takes none with holes in the input. So one
    axis of the window is drawn out to twice its length: the holes it then has lie where no tap of the kernel looks.
    """
    plain = x.ndim == 4 and x.dtype == jnp.float32 and window.groups == 1 and set(window.lhs_dilation) == {1}
    if not plain or k.shape[-2] < MIN_EIGEN_CHANNELS or max(k.shape[-2:]) <= MAX_SMALL_CHANNELS:
        return window
    return Window(
        strides=(window.strides[0], 2 * window.strides[1]),
        padding=(window.padding[0], (2 * window.padding[1][0], 2 * window.padding[1][1])),
        lhs_dilation=(1, 2),
        rhs_dilation=(window.rhs_dilation[0], 2 * window.rhs_dilation[1]),
        precision=window.precision,
        out_dtype=window.out_dtype,
    )


def by_patches(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    """`convolve` of one group as a product of patches, which JAX differentiates into such products."""
    out, taps = out_shape(window, x.shape, k.shape), tuple(np.ndindex(*k.shape[:-2]))
    patches = jnp.concatenate([_shifted(window, tap, out, x) for tap in taps], axis=-1)
    real = sum(_real_count(window, tap, x.shape, out) for tap in taps)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    with jax.named_scope(f"real_positions_{real}_of_{math.prod(out) * len(taps)}"):
        y = lax.dot_general(patches, k.reshape(-1, k.shape[-1]), dims, window.precision, _accumulator(x, window))
    return y.astype(window.out_dtype or x.dtype)


def _by_shifts(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    parts = []
    for tap, view in _shifted_views(window, k.shape, x):
        with _real_positions(window, tap, x.shape, view.shape):
            parts.append(lax.dot_general(view, k[tap], dims, window.precision, _accumulator(x, window)))
    return sum(parts[1:], parts[0]).astype(window.out_dtype or x.dtype)


def _convolution(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        k,
        window.strides,
        window.padding,
        window.lhs_dilation,
        window.rhs_dilation,
        _channels_last(x.ndim),
        window.groups,
        precision=window.precision,
        preferred_element_type=window.out_dtype,
    )


def _is_pointwise(window: Window, k_shape: tuple[int, ...]) -> bool:
    plain = all(pair == (0, 0) for pair in window.padding) and all(d == 1 for d in window.lhs_dilation)
    return plain and window.groups == 1 and math.prod(k_shape[:-2]) == 1


def _pointwise(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    """A 1x1 convolution as one matrix product."""
    view = lax.slice(x, (0,) * x.ndim, x.shape, (1, *window.strides, 1))
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    kernel = k.reshape(k.shape[-2:])
    return lax.dot_general(view, kernel, dims, precision=window.precision, preferred_element_type=window.out_dtype)


def _depthwise(window: Window, x: jax.Array, k: jax.Array) -> jax.Array:
    multiplier = k.shape[-1] // x.shape[-1]
    accumulator = _accumulator(x, window)

    def convolution(x, k):
        # Output feature o reads channel o // multiplier.
        views = _shifted_views(window, k.shape, jnp.repeat(x, multiplier, axis=-1) if multiplier > 1 else x)
        y = sum(view.astype(accumulator) * k[tap][0].astype(accumulator) for tap, view in views)
        return y.astype(window.out_dtype or x.dtype)

    return _named(f"depthwise_convolution_{x.ndim - 2}d", convolution)(x, k)


def _depthwise_weight(window: Window, k_shape, x: jax.Array, g: jax.Array) -> jax.Array:
    multiplier = k_shape[-1] // x.shape[-1]
    accumulator = _accumulator(x, window)

    def gradient(x, g):
        wide = g.astype(accumulator)
        views = _shifted_views(window, k_shape, jnp.repeat(x, multiplier, axis=-1) if multiplier > 1 else x)
        axes = tuple(range(x.ndim - 1))
        rows = [jnp.sum(view.astype(accumulator) * wide, axis=axes) for _, view in views]
        return jnp.stack(rows).reshape(k_shape).astype(x.dtype)

    return _named(f"depthwise_weight_gradient_{x.ndim - 2}d", gradient)(x, g)


def _named(name: str, function):
    """A call under a name by which `jaxeff.costs` counts the multiply-accumulates of what is element-wise to others."""
    function.__name__ = name
    return jax.jit(function)


def _dense_weight_by_shifts(window: Window, k_shape, x: jax.Array, g: jax.Array) -> jax.Array:
    contract = tuple(range(x.ndim - 1))
    dims = ((contract, contract), ((), ()))
    # XLA transposes the left operand of these products and vectorises over the channels of the right one: the gradient
    # on the left is transposed once for all taps, which pays as long as the input has no fewer channels.
    gradient_left = k_shape[-2] >= k_shape[-1]
    products = []
    for tap, view in _shifted_views(window, k_shape, x):
        a, b = (g, view) if gradient_left else (view, g)
        with _real_positions(window, tap, x.shape, g.shape):
            products.append(lax.dot_general(a, b, dims, precision=window.precision))
    stacked = jnp.stack(products)
    return (jnp.swapaxes(stacked, 1, 2) if gradient_left else stacked).reshape(k_shape)


def _real_positions(window: Window, tap: tuple[int, ...], x_shape: tuple[int, ...], out_shape: tuple[int, ...]):
    """A name scope that says at how many output positions this tap meets the input and neither margin nor hole."""
    real = _real_count(window, tap, x_shape, out_shape[1:-1])
    return jax.named_scope(f"real_positions_{real}_of_{math.prod(out_shape[1:-1])}")


def _real_count(window: Window, tap: tuple[int, ...], x_shape: tuple[int, ...], out: tuple[int, ...]) -> int:
    real = 1
    for axis, (low, _) in enumerate(window.padding):
        at = np.arange(out[axis]) * window.strides[axis] + tap[axis] * window.rhs_dilation[axis] - low
        dilation = window.lhs_dilation[axis]
        real *= int(np.count_nonzero((at >= 0) & (at < dilated(x_shape[1 + axis], dilation)) & (at % dilation == 0)))
    return real


def _grouped_weight_by_shifts(window: Window, k_shape, x: jax.Array, g: jax.Array) -> jax.Array:
    groups = window.groups
    per_group = g.reshape(*g.shape[:-1], groups, g.shape[-1] // groups)
    over, at = tuple(range(x.ndim - 1)), (x.ndim - 1,)
    products = []
    for tap, view in _shifted_views(window, k_shape, x):
        with _real_positions(window, tap, x.shape, g.shape):
            dims = ((over, over), (at, at))
            view = view.reshape(*view.shape[:-1], groups, k_shape[-2])
            products.append(lax.dot_general(view, per_group, dims, precision=window.precision))
    return jnp.swapaxes(jnp.stack(products), 1, 2).reshape(k_shape)


def _dense_weight_by_convolution(window: Window, k_shape, x: jax.Array, g: jax.Array) -> jax.Array:
    """The batch acts as the channels, so both operands are transposed first and the result is channels-last again."""
    space = tuple(range(1, x.ndim - 1))
    padding = []
    for axis, (low, _) in enumerate(window.padding):
        reach = (k_shape[axis] - 1) * window.rhs_dilation[axis] + 1
        dilated_in = dilated(x.shape[1 + axis], window.lhs_dilation[axis])
        dilated_out = dilated(g.shape[1 + axis], window.strides[axis])
        padding.append((low, reach - 1 + dilated_out - dilated_in - low))
    turned = Window(
        window.rhs_dilation, tuple(padding), window.lhs_dilation, window.strides, precision=window.precision
    )
    dk = _direct(turned, x.transpose(x.ndim - 1, *space, 0), g.transpose(*space, 0, x.ndim - 1))
    return dk.transpose(*space, 0, x.ndim - 1)


def _shifted_views(window: Window, k_shape, x: jax.Array) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """For every kernel tap, the part of the padded input that this tap multiplies: [N, *out_space, I]."""
    padded = _with_margins(window, x)
    kernel, strides = k_shape[:-2], window.strides
    out = out_shape(window, x.shape, k_shape)
    for tap in np.ndindex(*kernel):
        if 0 in out:
            yield tap, jnp.zeros((x.shape[0], *out, x.shape[-1]), x.dtype)
            continue
        start = [t * d for t, d in zip(tap, window.rhs_dilation, strict=True)]
        stop = [a + (o - 1) * s + 1 for a, o, s in zip(start, out, strides, strict=True)]
        yield tap, lax.slice(padded, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))


def _shifted(window: Window, tap: tuple[int, ...], out: tuple[int, ...], x: jax.Array) -> jax.Array:
    """One of `_shifted_views` from the input itself: what is differentiated is then no larger than the input either."""
    margins = []
    for axis, (low, _) in enumerate(window.padding):
        before = low - tap[axis] * window.rhs_dilation[axis]
        reach = (out[axis] - 1) * window.strides[axis] + 1
        dilation = window.lhs_dilation[axis]
        margins.append((before, reach - before - dilated(x.shape[1 + axis], dilation), dilation - 1))
    view = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    return lax.slice(view, (0,) * x.ndim, view.shape, (1, *window.strides, 1))


def _with_margins(window: Window, x: jax.Array) -> jax.Array:
    margins = [(low, high, d - 1) for (low, high), d in zip(window.padding, window.lhs_dilation, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *margins, (0, 0, 0)])


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    space = tuple(range(1, rank - 1))
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    return lax.ConvDimensionNumbers((0, rank - 1, *space), kernel, (0, rank - 1, *space))


def _accumulator(x: jax.Array, window: Window):
    return jnp.promote_types(window.out_dtype or x.dtype, jnp.float32)
