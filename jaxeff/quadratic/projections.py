"""The linear maps of a layer of neurons: their kernels, and how all of them are computed."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.ops import autotune
from jaxeff.quadratic.kinds import Kind, Projection, weights_of

Impl = Literal["separate", "stacked", "fused", "auto"]
IMPLS: tuple[str, ...] = ("separate", "stacked", "fused", "auto")
# 64 MiB of float32: the weights of a full quadratic form grow with the square of the patch. So does what it computes on
# the way: symmetric_pairs the products of all pairs for every output position, pairs n numbers for every neuron there.
MAX_PAIR_WEIGHTS = 2**24
PAIRS = ("pairs", "symmetric_pairs")

Project = Callable[[Mapping[str, Any], jax.Array], tuple[jax.Array, ...]]


class Window(NamedTuple):
    """The window of a 2D convolution.

    Attributes:
      strides: (vertical, horizontal).
      padding: "SAME", "SAME_LOWER", "VALID" or two (low, high) pairs.
      dilation: kernel dilations.
      groups: channel groups.
      kernel_size: (height, width); None reads it off a kernel, which those of pairs do not show.
    """

    strides: tuple[int, ...] = (1, 1)
    padding: Any = "SAME"
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    kernel_size: tuple[int, ...] | None = None


def window(
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    kernel_size: int | Sequence[int] | None = None,
) -> Window:
    """The window that users mean by an integer for both axes, or by one for each.

    Args:
      strides, dilation, groups, kernel_size: as in `Window`.
      padding: a name that the convolution knows; a number of zeros on all four sides; or for each axis a number or
        (low, high).

    Raises:
      ValueError: for anything else, naming it.
    """
    sizes = {"strides": strides, "dilation": dilation}
    if kernel_size is not None:
        sizes["kernel_size"] = kernel_size
    pairs = {name: _pair(size) for name, size in sizes.items()}
    for name, pair in pairs.items():
        if len(pair) != 2 or not all(isinstance(size, int | np.integer) and size > 0 for size in pair):
            raise ValueError(f"{name} must be a positive integer or two, got {sizes[name]!r}")
    if not isinstance(padding, str):
        pads = tuple(map(_pair, _pair(padding)))
        if [len(pair) for pair in pads] != [2, 2] or not all(isinstance(n, int | np.integer) for n in sum(pads, ())):
            raise ValueError(f"padding must be an integer, two, two (low, high) pairs or a name, got {padding!r}")
        padding = pads
    return Window(pairs["strides"], padding, pairs["dilation"], groups, pairs.get("kernel_size"))


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value, value)


def kernel_shape(projection: Projection, receptive: Sequence[int], neurons: int) -> tuple[int, ...]:
    """Shape of a projection's kernel for neurons that see `receptive` inputs: (I,) or (kh, kw, I / groups).

    Raises:
      ValueError: for a quadratic form over so many pairs of inputs that its weights are too many.
    """
    if projection.of not in PAIRS:
        return (*receptive, neurons * projection.rank)
    inputs = math.prod(receptive)
    pairs = weights_of(projection.of, inputs)
    if pairs * neurons > MAX_PAIR_WEIGHTS:
        raise ValueError(
            f"a full quadratic form over {inputs} inputs has {pairs:,} weights in each of {neurons} neurons, "
            f"{pairs * neurons:,} in all, above the limit of {MAX_PAIR_WEIGHTS:,}; kind 't1_low_rank(rank=2)' has "
            f"{4 * inputs * neurons:,}"
        )
    return (pairs, neurons * projection.rank)


def fused(kind: Kind, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """A dense layer (or 1x1 convolution) of "t4" or "quadralib" neurons as one kernel; x [..., I] to [..., O].

    Keeps only its input for the backward pass. On devices other than a GPU the kernel is interpreted, which is slow.

    Raises:
      ValueError: for another kind.
    """
    if [p.name for p in kind.projections] not in (["a", "b"], ["a", "b", "c"]) or kind.name not in ("t4", "quadralib"):
        raise ValueError(f"impl='fused' is for kinds 't4' and 'quadralib', got {kind.name!r}; use impl='auto'")
    from jaxeff.quadratic import kernels  # Pallas takes longer to import than all of this package

    names = [p.name for p in kind.projections]
    matrices = tuple(params[f"kernel_{name}"].reshape(x.shape[-1], -1) for name in names)
    none = jnp.zeros((matrices[0].shape[-1],), jnp.float32)
    biases = tuple(params.get(f"bias_{name}", none) for name in names)
    rows = x.reshape(-1, x.shape[-1])
    y = kernels.fused_dense(rows, matrices, biases, kernels.TILE, jax.default_backend() != "gpu")
    return y.reshape(*x.shape[:-1], -1)


def check_params(kind: Kind, params: Mapping[str, Any], inputs: int, window: Window | None = None) -> int:
    """Checks the parameters of a kind; those of norms, called norm_<projection> and norm_out, are left to others.

    Args:
      kind: the type of neuron.
      params: kernels, biases and extras by name.
      inputs: I, the channels of the input.
      window: of a convolution; None for a dense layer.

    Returns:
      M, the number of neurons.

    Raises:
      ValueError: naming them, if parameters are missing or there are others, or shapes do not fit each other.
    """
    needed = {f"kernel_{p.name}" for p in kind.projections if p.kernel is None}
    needed |= {extra.name for extra in kind.extras if not extra.bias}
    allowed = needed | {f"bias_{p.name}" for p in kind.projections if p.bias}
    allowed |= {extra.name for extra in kind.extras}
    given = {name for name in params if not name.startswith("norm_")}
    if not needed <= given <= allowed:
        raise ValueError(
            f"kind {kind.name!r} ({kind.formula}) takes {sorted(needed)} and optional biases; "
            f"missing {sorted(needed - given)}, unexpected {sorted(given - allowed)}"
        )
    shapes = {name: jnp.shape(params[name]) for name in sorted(given)}
    own = [p for p in kind.projections if p.kernel is None]
    # What most of them say: so that one wrong kernel is not what the others are measured by.
    neurons = statistics.mode((shapes[f"kernel_{p.name}"] or (0,))[-1] // p.rank for p in own)
    groups = 1 if window is None else window.groups
    receptive: tuple[int, ...] | None = (inputs,)
    if window is not None:
        sizes = [shapes[f"kernel_{p.name}"][:-2] for p in own if p.of not in PAIRS]
        size = window.kernel_size or (statistics.mode(sizes) if sizes else None)
        receptive = None if size is None else (*size, inputs // groups)
    expected: dict[str, tuple[int, ...]] = {extra.name: tuple(extra.shape(neurons, groups)) for extra in kind.extras}
    for p in kind.projections:
        expected[f"bias_{p.name}"] = (neurons * p.rank,)
        if receptive is None:  # kernels of pairs alone do not show how large the window is
            expected[f"kernel_{p.name}"] = (*shapes.get(f"kernel_{p.name}", ())[:-1], neurons * p.rank)
        else:
            leading = receptive if p.of not in PAIRS else (weights_of(p.of, math.prod(receptive)),)
            expected[f"kernel_{p.name}"] = (*leading, neurons * p.rank)
    if wrong := {name: shape for name, shape in shapes.items() if shape != expected[name]}:
        raise ValueError(
            f"kind {kind.name!r} ({kind.formula}), {neurons} neurons with {inputs} input channels in {groups} groups: "
            f"expected shapes { ({name: expected[name] for name in wrong}) }, got {wrong}"
        )
    return neurons


def resolved(impl: Impl, kind: Kind, params: Mapping[str, Any], x: jax.Array, window: Window) -> Impl:
    """What "auto" stands for in a layer; decided once, as backward passes see pieces of x.

    Raises:
      ValueError: for an unknown implementation.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    kernels = [params[f"kernel_{name}"] for name in stackable(kind)]
    if impl != "auto" or len(kernels) < 2:
        return "separate" if impl == "auto" else impl
    measured: Any = autotune.lookup(signature(x, kernels, window))
    # On CPU stacking and splitting are real copies; an accelerator reads the input once instead of three times.
    return measured or ("separate" if jax.default_backend() == "cpu" else "stacked")


def signature(x: Any, kernels: Sequence[Any], window: Window) -> str:
    """The name of a layer's product in the table of fastest forms."""
    return autotune.signature("projections", (x, *kernels), tuple(window)[:4])


def stackable(kind: Kind) -> list[str]:
    """Names of the projections of x that have kernels of their own, which can be one product."""
    return [p.name for p in kind.projections if p.of == "x" and p.kernel is None]


def dense(kind: Kind, precision: Any, impl: Impl) -> Project:
    """The projections of a dense layer, as a function (params, x [..., I]) -> arrays [..., M * r], without biases."""

    def linear(z, kernel):
        return lax.dot_general(z, kernel, (((z.ndim - 1,), (0,)), ((), ())), precision=precision)

    return _project(kind, linear, lambda x, params: x[..., None, :], impl, 1, precision)


def conv(kind: Kind, window: Window, precision: Any, impl: Impl, convolution: Callable[..., jax.Array]) -> Project:
    """The projections of a convolution, as a function (params, x [N, H, W, I]) -> arrays [N, H', W', M * r].

    Raises:
      ValueError: (the function) where the size of the window is neither given nor to be seen.
    """

    def linear(z, kernel):
        return convolution(
            z,
            kernel,
            window.strides,
            window.padding,
            rhs_dilation=window.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=window.groups,
            precision=precision,
        )

    def patches(x, params):
        return _patches(x, _kernel_size(window, kind, params), window)

    return _project(kind, linear, patches, impl, window.groups, precision)


def _project(kind, linear, patches, impl, groups, precision) -> Project:
    def project(params, x):
        of_x = stackable(kind)
        values = {}
        if impl == "stacked" and len(of_x) > 1:
            values = _stacked(linear, x, {name: params[f"kernel_{name}"] for name in of_x}, groups)
        for p in kind.projections:
            kernel = params[f"kernel_{p.kernel or p.name}"]
            if p.of in PAIRS:
                values[p.name] = _of_pairs(patches(x, params), kernel, p.of, precision)
            elif p.name not in values:
                values[p.name] = linear(x * x if p.of == "square" else x, kernel)
        return tuple(values[p.name] for p in kind.projections)

    return project


def _stacked(linear, x, kernels, groups: int) -> dict[str, jax.Array]:
    """All projections at once; within each channel group their outputs lie side by side."""
    widths = [kernel.shape[-1] // groups for kernel in kernels.values()]
    parts = [k.reshape(*k.shape[:-1], groups, w) for k, w in zip(kernels.values(), widths, strict=True)]
    wide = jnp.concatenate(parts, -1)
    z = linear(x, wide.reshape(*wide.shape[:-2], -1))
    z = z.reshape(*z.shape[:-1], groups, sum(widths))
    bounds = [sum(widths[:i]) for i in range(1, len(widths))]
    pieces = jnp.split(z, bounds, axis=-1)
    return {name: piece.reshape(*piece.shape[:-2], -1) for name, piece in zip(kernels, pieces, strict=True)}


def _of_pairs(patches, kernel, of, precision):
    """Quadratic forms of patches [..., G, n] with kernel [pairs, M]: [..., M]."""
    groups, inputs = patches.shape[-2:]
    by_group = kernel.reshape(kernel.shape[0], groups, -1)
    if of == "pairs":
        matrix = by_group.reshape(inputs, inputs, groups, -1)
        half = jnp.einsum("...gi,ijgo->...gjo", patches, matrix, precision=precision)
        z = jnp.einsum("...gjo,...gj->...go", half, patches, precision=precision)
    else:
        i, j = np.triu_indices(inputs)
        z = jnp.einsum("...gp,pgo->...go", patches[..., i] * patches[..., j], by_group, precision=precision)
    return z.reshape(*z.shape[:-2], -1)


def _patches(x, size: Sequence[int], window: Window):
    """im2col: [N, H', W', G, kh * kw * I / G], within a group in the order of a kernel's leading axes."""
    reach = [(k - 1) * d + 1 for k, d in zip(size, window.dilation, strict=True)]
    pads = window.padding
    if isinstance(pads, str):
        pads = lax.padtype_to_pads(x.shape[1:3], reach, window.strides, pads)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pair, 0) for pair in pads), (0, 0, 0)))
    if any(size < needed for size, needed in zip(x.shape[1:3], reach, strict=True)):
        raise ValueError(
            f"a window of {tuple(size)} with dilation {window.dilation} does not fit into an input that is "
            f"{x.shape[1:3]} with padding {window.padding!r}; take a smaller window or pad"
        )
    ends = [(x.shape[1 + a] - reach[a]) // window.strides[a] * window.strides[a] + 1 for a in range(2)]
    taps = []
    for row, col in product(range(size[0]), range(size[1])):
        top, left = row * window.dilation[0], col * window.dilation[1]
        stop = (x.shape[0], top + ends[0], left + ends[1], x.shape[3])
        taps.append(lax.slice(x, (0, top, left, 0), stop, (1, *window.strides, 1)))
    stacked = jnp.stack(taps, -2)  # [N, H', W', taps, I]
    split = stacked.reshape(*stacked.shape[:-1], window.groups, -1)
    return jnp.swapaxes(split, -2, -3).reshape(*stacked.shape[:3], window.groups, -1)


def _kernel_size(window: Window, kind: Kind, params: Mapping[str, Any]) -> Sequence[int]:
    if window.kernel_size is not None:
        return window.kernel_size
    for p in kind.projections:
        if p.of not in PAIRS and p.kernel is None:
            return params[f"kernel_{p.name}"].shape[:2]
    raise ValueError(f"kind {kind.name!r} has kernels of pairs only, which do not show their window: give kernel_size")
