"""Dense and convolutional layers of neurons as pure functions.

The functions take a dictionary of arrays, {"kernel_a": ..., "bias_a": ..., "kernel_b": ...}, one entry for each
projection of the kind; they are safe under jit, vmap, grad and shard_map.

>>> import jax, jax.numpy as jnp
>>> w = {"kernel_a": jnp.array([[1.0], [0.0]]), "kernel_b": jnp.array([[0.0], [-2.0]]), "kernel_c": jnp.ones((2, 1))}
>>> xor = dense(w, jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), kind="quadralib")
>>> xor[:, 0].tolist()
[0.0, 1.0, 1.0, 0.0]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.ops import Moments, conv_general_dilated
from jaxeff.quadratic import backward, kinds, projections
from jaxeff.quadratic.backward import Form, Save, Statistics
from jaxeff.quadratic.projections import Impl

Branch = Callable[[str, jax.Array], jax.Array]


def dense(
    params: Mapping[str, Any],
    x: jax.Array,
    *,
    kind: str = "quadralib",
    precision: Any = None,
    branch: Branch | None = None,
    impl: Impl = "auto",
    save: Save = "all",
) -> jax.Array:
    """Dense layer of neurons of a kind.

    Args:
      params: "kernel_<p>" [I, M * r] and optionally "bias_<p>" [M * r] for every projection p of the kind (r of them
        per neuron; mostly M is O and r is 1), [I * I, M] where it is of pairs, and the kind's extras.
      x: [..., I], same dtype as the kernels.
      kind: a name in `jaxeff.quadratic.KINDS`, or a family with options: "bergstra(rank=4)".
      precision: as in lax.
      branch: function (projection name, projection) -> projection, applied to each before they are combined.
      impl: "separate" products, one "stacked" product for all projections, "fused" with their combination into one
        kernel for GPU (kinds "t4" and "quadralib"), or "auto": what `jaxeff.quadratic.tune` found.
      save: what the backward pass keeps, see `jaxeff.quadratic.backward`.

    Returns:
      [..., O].

    Raises:
      ValueError: for an unknown kind, missing or extra parameters, or shapes that do not fit.
    """
    return dense_block(params, x, kind=kind, precision=precision, branch=branch, impl=impl, save=save)[0]


def conv(
    params: Mapping[str, Any],
    x: jax.Array,
    *,
    kind: str = "quadralib",
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    kernel_size: int | Sequence[int] | None = None,
    precision: Any = None,
    branch: Branch | None = None,
    impl: Impl = "auto",
    save: Save = "all",
    conv_general_dilated: Callable[..., jax.Array] = conv_general_dilated,
) -> jax.Array:
    """2D convolution of neurons of a kind.

    Args:
      params: "kernel_<p>" [kh, kw, I/groups, M * r] and optionally "bias_<p>" [M * r] for every projection p of the
        kind (r of them per neuron; mostly M is O and r is 1), [n * n, M] with n = kh * kw * I/groups where it is of
        pairs, and the kind's extras.
      x: [N, H, W, I], same dtype as the kernels.
      kind: a name in `jaxeff.quadratic.KINDS`, or a family with options: "bergstra(rank=4)".
      strides: one for both axes or two.
      padding: "SAME", "SAME_LOWER" or "VALID"; one number for all sides; or for each axis a number or (low, high).
      dilation: of the kernel, one for both axes or two.
      groups: channel groups; must divide I and O.
      kernel_size: (kh, kw), or one number for both; only kinds whose kernels are all of pairs need it.
      precision: as in lax.
      branch: function (projection name, projection) -> projection, applied to each before they are combined.
      impl: "separate" convolutions, one "stacked" convolution for all projections, "fused" with their combination into
        one kernel for GPU (1x1, kinds "t4" and "quadralib"), or "auto": what `jaxeff.quadratic.tune` found.
      save: what the backward pass keeps, see `jaxeff.quadratic.backward`.
      conv_general_dilated: the convolution, with lax's signature.

    Returns:
      [N, H', W', O].

    Raises:
      ValueError: for an unknown kind, missing or extra parameters, shapes that do not fit, a rank other than 4, or
        groups that do not divide.
    """
    window: dict[str, Any] = dict(
        strides=strides, padding=padding, dilation=dilation, groups=groups, kernel_size=kernel_size
    )
    settings: dict[str, Any] = dict(
        precision=precision, impl=impl, save=save, conv_general_dilated=conv_general_dilated
    )
    return conv_block(params, x, kind=kind, **window, **settings)[0]


def dense_block(
    params: Mapping[str, Any],
    x: jax.Array,
    statistics: Statistics | None = None,
    *,
    kind: str = "quadralib",
    precision: Any = None,
    impl: Impl = "auto",
    save: Save = "all",
    piece_bytes: int | None = None,
    **surroundings: Any,
) -> tuple[jax.Array, Statistics]:
    """A dense layer of neurons with everything around it, under one memory policy.

    Args:
      params, x, kind, precision, impl, save: as in `dense`; params also has the norms' parameters, see `Form`.
      statistics: running moments of its batch norms, or None for those of this batch.
      piece_bytes: as in `jaxeff.quadratic.backward.block`.
      **surroundings: branch_norm, branch_act, branch, out_norm, act and axis_name of `Form`.

    Returns:
      The output [..., O], and the moments that its batch norms used, by projection name and "out".

    Raises:
      ValueError: as `dense`; for an unknown norm or activation, or missing or extra parameters of norms.
    """
    chosen = kinds.get(kind)
    neurons = projections.check_params(chosen, params, x.shape[-1])
    if impl == "fused":
        form, params = _fused(chosen, params, precision, surroundings)
    else:
        impl = projections.resolved(impl, chosen, params, x, projections.Window())
        form = Form(chosen, projections.dense(chosen, precision, impl), **surroundings)
    _check_norms(chosen, neurons, params, statistics, surroundings)
    return backward.block(form, params, x, statistics, save=save, piece_bytes=piece_bytes)


def conv_block(
    params: Mapping[str, Any],
    x: jax.Array,
    statistics: Statistics | None = None,
    *,
    kind: str = "quadralib",
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    kernel_size: int | Sequence[int] | None = None,
    precision: Any = None,
    impl: Impl = "auto",
    save: Save = "all",
    piece_bytes: int | None = None,
    conv_general_dilated: Callable[..., jax.Array] = conv_general_dilated,
    **surroundings: Any,
) -> tuple[jax.Array, Statistics]:
    """A convolution of neurons with everything around it, under one memory policy.

    Args:
      params, x, kind, strides, padding, dilation, groups, kernel_size, precision, impl, save, conv_general_dilated: as
        in `conv`; params also has the norms' parameters, see `Form`.
      statistics: running moments of its batch norms, or None for those of this batch.
      piece_bytes: as in `jaxeff.quadratic.backward.block`.
      **surroundings: branch_norm, branch_act, branch, out_norm, act and axis_name of `Form`.

    Returns:
      The output [N, H', W', O], and the moments that its batch norms used, by projection name and "out".

    Raises:
      ValueError: as `conv`; for an unknown norm or activation, or missing or extra parameters of norms.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [N, H, W, C], got shape {x.shape}")
    chosen = kinds.get(kind)
    window = projections.window(strides, padding, dilation, groups, kernel_size)
    if (
        groups < 1
        or x.shape[-1] % groups
        or any(params[k].shape[-1] % groups for k in params if k.startswith("kernel_"))
    ):
        outputs = {k: params[k].shape[-1] for k in sorted(params) if k.startswith("kernel_")}
        raise ValueError(
            f"groups={groups} must be at least 1 and divide the {x.shape[-1]} input channels and the outputs of every "
            f"projection, {outputs}"
        )
    neurons = projections.check_params(chosen, params, x.shape[-1], window)
    if impl == "fused":
        pointwise = params[f"kernel_{chosen.projections[0].name}"].shape[:2] == (1, 1)
        unpadded = isinstance(window.padding, str) or all(pair == (0, 0) for pair in window.padding)
        if not (pointwise and unpadded and groups == 1 and window.strides == (1, 1)):
            raise ValueError(
                "impl='fused' is for 1x1 convolutions with stride 1, groups=1 and no padding, got "
                f"{tuple(window)}; use impl='auto'"
            )
        form, params = _fused(chosen, params, precision, surroundings)
    else:
        impl = projections.resolved(impl, chosen, params, x, window)
        form = Form(chosen, projections.conv(chosen, window, precision, impl, conv_general_dilated), **surroundings)
    _check_norms(chosen, neurons, params, statistics, surroundings)
    return backward.block(form, params, x, statistics, save=save, piece_bytes=piece_bytes)


def _check_norms(kind, neurons: int, params, statistics, surroundings) -> None:
    """Raises ValueError if there are not the parameters and statistics of the norms, or others."""
    widths = {p.name: neurons * p.rank for p in kind.projections} | {backward.OUT: neurons * kind.outputs}
    kinds_of = dict.fromkeys(widths, surroundings.get("branch_norm")) | {backward.OUT: surroundings.get("out_norm")}
    norms = {name: norm for name, norm in kinds_of.items() if norm}
    needed, given = {f"norm_{name}" for name in norms}, {name for name in params if name.startswith("norm_")}
    if needed != given:
        raise ValueError(
            f"kind {kind.name!r} with branch_norm={surroundings.get('branch_norm')!r} and "
            f"out_norm={surroundings.get('out_norm')!r}: missing {sorted(needed - given)}, unexpected "
            f"{sorted(given - needed)} among the parameters"
        )
    for name, norm in norms.items():
        expected = {part: (widths[name],) for part in (("scale",) if norm == "rms" else ("scale", "bias"))}
        if (shapes := {part: jnp.shape(value) for part, value in params[f"norm_{name}"].items()}) != expected:
            raise ValueError(f"norm_{name}: parameters of a {norm!r} norm have shapes {expected}, got {shapes}")
        if norm == "batch" and statistics is not None:
            moments = statistics.get(name)
            if not isinstance(moments, Moments) or {jnp.shape(value) for value in moments} != {(widths[name],)}:
                raise ValueError(
                    f"statistics[{name!r}] must be jaxeff.ops.Moments of {widths[name]} channels, got {moments}; "
                    "statistics=None takes those of this batch"
                )


def _fused(kind, params, precision, surroundings) -> tuple[Form, dict[str, Any]]:
    """The neurons as one projection of a first-order form, with the output norm and activation after it."""
    inside = [name for name in ("branch_norm", "branch_act", "branch") if surroundings.get(name) is not None]
    if inside:
        raise ValueError(f"impl='fused' has nothing between projections and product, got {', '.join(inside)}")
    if precision is not None:
        raise ValueError(f"impl='fused' computes in the precision of its kernel, got precision={precision!r}; use None")
    # As far as the form knows, the biases belong to the kernel: they are inside of its product.
    inner = {f"kernel_{name}": name for name in params if name.startswith(("kernel_", "bias_"))}

    def project(params, x):
        return (projections.fused(kind, {name: params[outer] for outer, name in inner.items()}, x),)

    rest = {name: value for name, value in params.items() if name.startswith("norm_")}
    renamed = {outer: params[name] for outer, name in inner.items()}
    return Form(kinds.get("first_order"), project, **surroundings), {**renamed, **rest}
