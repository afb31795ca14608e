"""Quadratic dense and convolutional layers: pure functions, and Linen modules over them.

The functions take a dictionary of arrays, {"kernel_a": ..., "bias_a": ..., "kernel_b": ...}, one entry for each
projection of the kind; they are safe under jit, vmap, grad and shard_map.

>>> import jax, jax.numpy as jnp
>>> w = {"kernel_a": jnp.array([[1.0], [0.0]]), "kernel_b": jnp.array([[0.0], [-2.0]]), "kernel_c": jnp.ones((2, 1))}
>>> xor = dense(w, jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), kind="quadralib")
>>> xor[:, 0].tolist()
[0.0, 1.0, 1.0, 0.0]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff import spec
from jaxeff.ops import NormVariables, conv_general_dilated
from jaxeff.ops.norms import checked_norm
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
      ValueError: for an unknown kind, or missing or extra parameters.
    """
    return dense_block(params, x, kind=kind, precision=precision, branch=branch, impl=impl, save=save)[0]


def conv(
    params: Mapping[str, Any],
    x: jax.Array,
    *,
    kind: str = "quadralib",
    strides: Sequence[int] = (1, 1),
    padding: Any = "SAME",
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    kernel_size: Sequence[int] | None = None,
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
      strides: two strides.
      padding: "SAME", "VALID" or two (low, high) pairs.
      dilation: two kernel dilations.
      groups: channel groups; must divide I and O.
      kernel_size: (kh, kw); only kinds whose kernels are all of pairs need it.
      precision: as in lax.
      branch: function (projection name, projection) -> projection, applied to each before they are combined.
      impl: "separate" convolutions, one "stacked" convolution for all projections, "fused" with their combination into
        one kernel for GPU (1x1, kinds "t4" and "quadralib"), or "auto": what `jaxeff.quadratic.tune` found.
      save: what the backward pass keeps, see `jaxeff.quadratic.backward`.
      conv_general_dilated: the convolution, with lax's signature.

    Returns:
      [N, H', W', O].

    Raises:
      ValueError: for an unknown kind, missing or extra parameters, a rank other than 4, or groups that do not divide.
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
      ValueError: as `dense`; for an unknown norm or activation.
    """
    chosen = kinds.get(kind)
    projections.check_params(chosen, params)
    if impl == "fused":
        return _fused_block(chosen, params, x, statistics, save, surroundings)
    project = projections.dense(chosen, precision, impl)
    return backward.block(
        Form(chosen, project, **surroundings), params, x, statistics, save=save, piece_bytes=piece_bytes
    )


def conv_block(
    params: Mapping[str, Any],
    x: jax.Array,
    statistics: Statistics | None = None,
    *,
    kind: str = "quadralib",
    strides: Sequence[int] = (1, 1),
    padding: Any = "SAME",
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    kernel_size: Sequence[int] | None = None,
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
      ValueError: as `conv`; for an unknown norm or activation.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [N, H, W, C], got shape {x.shape}")
    chosen = kinds.get(kind)
    projections.check_params(chosen, params)
    window = projections.Window(tuple(strides), padding, tuple(dilation), groups, tuple(kernel_size or ()) or None)
    if impl == "fused":
        pointwise = params[f"kernel_{chosen.projections[0].name}"].shape[:2] == (1, 1)
        unpadded = isinstance(padding, str) or all(tuple(pair) == (0, 0) for pair in padding)
        if not (pointwise and unpadded and groups == 1 and tuple(strides) == (1, 1)):
            raise ValueError(
                "impl='fused' is for 1x1 convolutions with stride 1, groups=1 and no padding, got "
                f"{tuple(window)}; use impl='auto'"
            )
        return _fused_block(chosen, params, x, statistics, save, surroundings)
    project = projections.conv(chosen, window, precision, impl, conv_general_dilated)
    return backward.block(
        Form(chosen, project, **surroundings), params, x, statistics, save=save, piece_bytes=piece_bytes
    )


def _fused_block(kind, params, x, statistics, save, surroundings):
    """The neurons as one kernel, and the output norm and activation after it."""
    backward.check_save(save)
    inside = [name for name in ("branch_norm", "branch_act", "branch") if surroundings.get(name) is not None]
    if inside:
        raise ValueError(f"impl='fused' has nothing between projections and product, got {', '.join(inside)}")
    form = Form(kinds.get("first_order"), lambda params, y: (y,), **surroundings)
    y = projections.fused(kind, params, x)
    rest = {name: value for name, value in params.items() if name == f"norm_{backward.OUT}"}
    return backward.block(form, rest, y, statistics)


class _QuadraticLayer(nn.Module):
    """What dense and convolutional layers share: parameters of every projection, norms, initialisation."""

    def _run(self, function: Callable[..., Any], receptive: tuple[int, ...], x: jax.Array, train: bool, **options: Any):
        """Declares the variables, runs the block and keeps the running statistics; receptive is [..., I / groups]."""
        kind = kinds.get(self.kind)
        backward.check_save(self.save)
        starts = self._checked_starts(kind)
        params = self._params(kind, starts, receptive, options.get("groups", 1))
        dtype = self.dtype or jnp.result_type(x, *params.values())
        params = {name: v.astype(dtype) if name.startswith("kernel_") else v for name, v in params.items()}
        norms, running = self._norms(kind, starts)
        statistics = None if train else {name: r.moments() for name, r in running.items()}
        y, used = function(
            {**params, **norms},
            x.astype(dtype),
            statistics or None,
            kind=self.kind,
            branch_norm=self.branch_norm,
            branch_act=self.branch_act,
            out_norm=self.out_norm,
            act=self.act,
            axis_name=None if self.is_initializing() else self.axis_name,
            precision=self.precision,
            impl=self.impl,
            save="all" if self.is_initializing() else self.save,
            **options,
        )
        if train and not self.is_initializing():
            for name, r in running.items():
                r.update(used[name])
        return y

    def _checked_starts(self, kind: kinds.Kind) -> Mapping[str, kinds.Start]:
        if self.initialization not in ("kaiming", "relinear"):
            raise ValueError(f"initialization must be 'kaiming' or 'relinear', got {self.initialization!r}")
        if self.initialization == "kaiming":
            return {}
        starts = kinds.relinear_starts(kind)
        branches = [starts[p.name] for p in kind.projections]
        offset = self._has_bias() if checked_norm(self.branch_norm) is None else self.branch_norm != "rms"
        if "one" in branches and not offset:
            raise ValueError(
                f"ReLinear initialisation of kind {self.kind!r} starts a projection at one, which needs an offset: "
                "use_bias=True or a branch_norm other than 'rms' ('rms' has none)"
            )
        if len(branches) > 1 and self.branch_act is not None:
            raise ValueError(
                f"ReLinear initialisation needs branch_act=None, got {self.branch_act!r}: it would change the "
                "first-order part and hold the quadratic part at zero"
            )
        return starts

    def _has_bias(self) -> bool:
        return self.use_bias if self.use_bias is not None else self.branch_norm is None

    def _params(self, kind, starts, receptive, groups) -> dict[str, jax.Array]:
        neurons = kind.neurons(self.features)
        normed = checked_norm(self.branch_norm) is not None
        params = {}
        for p in kind.projections:
            start = starts.get(p.name, "free")
            # With a branch norm it is the norm's scale and offset that switch the branch off, see `_norms`.
            off = start in ("zero", "one") and not normed
            gain = 1.0 if normed or starts else p.gain
            if p.kernel is None:
                shape = projections.kernel_shape(p, receptive, neurons)
                kernel = nn.initializers.zeros if off else _kaiming(gain)
                params[f"kernel_{p.name}"] = self.param(f"kernel_{p.name}", kernel, shape, self.param_dtype)
            if self._has_bias() and p.bias:
                offset = nn.initializers.ones if off and start == "one" else nn.initializers.zeros
                shape = (neurons * p.rank,)
                params[f"bias_{p.name}"] = self.param(f"bias_{p.name}", offset, shape, self.param_dtype)
        for extra in kind.extras:
            if extra.bias and not self._has_bias():
                continue
            init = STARTS[starts[extra.name]] if starts else extra.init
            shape = extra.shape(neurons, groups)
            params[extra.name] = self.param(extra.name, init, shape, self.param_dtype)
        return params

    def _norms(self, kind, starts):
        """Parameters of the norms by the name under which `Form` takes them, and running statistics by branch."""
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        wanted = []
        if checked_norm(self.branch_norm) is not None:
            neurons = kind.neurons(self.features)
            for p in kind.projections:
                start = starts.get(p.name, "free")
                scale, bias = zeros if start in ("zero", "one") else ones, ones if start == "one" else zeros
                wanted.append((p.name, self.branch_norm, neurons * p.rank, scale, bias))
        if checked_norm(self.out_norm) is not None:
            wanted.append((backward.OUT, self.out_norm, self.features, ones, zeros))
        params, running = {}, {}
        for name, norm, features, scale, bias in wanted:
            variables = NormVariables(norm, self.param_dtype, scale, bias, name=f"norm_{name}")
            params[f"norm_{name}"], kept = variables(features)
            if kept is not None:
                running[name] = kept
        return params, running


class QuadraticDense(_QuadraticLayer):
    """Dense layer of neurons of a kind.

    Attributes:
      features: output width O.
      kind: a name in `jaxeff.quadratic.KINDS`, or a family with options: "bergstra(rank=4)".
      use_bias: bias of every projection; None means only without branch norm.
      branch_norm: norm of every projection ("batch", "group", "layer", "rms") or None.
      branch_act: activation of every projection after its norm ("relu", ...) or None.
      out_norm: norm of the output, or None.
      act: activation of the output ("relu", ...) or None.
      save: what the backward pass keeps of the layer and its norms: "all", "ab" (input and projections) or "x" (input
        only); the last two have reverse mode only. See `jaxeff.quadratic.backward`.
      impl: "separate", "stacked", "fused" or "auto", as in `jaxeff.quadratic.dense`.
      initialization: "kaiming" (unit output variance where the inputs are rectified standard normals, as after norm
        and ReLU) or "relinear" (starts as the first-order layer).
      dtype: dtype of input, kernels and output; None follows input and parameters. Between them it is at least float32.
      param_dtype: dtype of the parameters.
      precision: as in lax.
      axis_name: mapped axis over which batch norm shares its statistics.
    """

    features: int
    kind: str = "quadralib"
    use_bias: bool | None = None
    branch_norm: str | None = None
    branch_act: str | None = None
    out_norm: str | None = None
    act: str | None = None
    save: Save = "all"
    impl: Impl = "auto"
    initialization: Literal["kaiming", "relinear"] = "kaiming"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [..., I] to [..., features]; with `train`, batch norms use and update the statistics of this batch."""
        return self._run(dense_block, (x.shape[-1],), x, train)


class QuadraticConv(_QuadraticLayer):
    """2D convolution of neurons of a kind; drop-in for `flax.linen.Conv` on [N, H, W, C].

    Attributes:
      features: output channels O.
      kernel_size: (height, width).
      strides: two strides.
      padding: "SAME", "VALID" or two (low, high) pairs.
      kernel_dilation: two kernel dilations.
      feature_group_count: channel groups.
      kind, use_bias, branch_norm, branch_act, out_norm, act, save, impl, initialization, dtype, param_dtype, precision,
        axis_name: as in `QuadraticDense`.
      conv_general_dilated: the convolution, with lax's signature.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    kernel_dilation: tuple[int, int] = (1, 1)
    feature_group_count: int = 1
    kind: str = "quadralib"
    use_bias: bool | None = None
    branch_norm: str | None = None
    branch_act: str | None = None
    out_norm: str | None = None
    act: str | None = None
    save: Save = "all"
    impl: Impl = "auto"
    initialization: Literal["kaiming", "relinear"] = "kaiming"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    axis_name: str | None = None
    conv_general_dilated: Callable[..., jax.Array] = conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Convolves x [N, H, W, I] to [N, H', W', features]; `train` as in `QuadraticDense`."""
        groups = self.feature_group_count
        if x.ndim != 4:
            raise ValueError(f"x must be [N, H, W, C], got shape {x.shape}")
        if groups < 1 or x.shape[-1] % groups or kinds.get(self.kind).neurons(self.features) % groups:
            raise ValueError(
                f"feature_group_count={groups} must divide the {x.shape[-1]} input channels and the "
                f"{self.features} features; choose a common divisor of both"
            )
        return self._run(
            conv_block,
            (*self.kernel_size, x.shape[-1] // groups),
            x,
            train,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=groups,
            kernel_size=self.kernel_size,
            conv_general_dilated=self.conv_general_dilated,
        )


def conv_layer(
    layer: spec.Conv, *, bias: bool, groups: int, save: Save = "all", initialization: Any = "kaiming", **settings: Any
) -> QuadraticConv:
    """Convolution factory for `jaxeff.models.Network(conv=...)`: every kind, first order included.

    The layer's norm and activation are part of the block, so that `functools.partial(conv_layer, save="x")` makes a
    network that keeps only the inputs of its layers.
    """
    return QuadraticConv(
        layer.features,
        layer.kernel,
        layer.strides,
        layer.padding,
        feature_group_count=groups,
        kind=layer.kind,
        use_bias=bias,
        branch_norm=layer.branch_norm,
        out_norm=layer.norm,
        act=layer.act,
        save=save,
        initialization=initialization,
        **settings,
    )


def dense_layer(
    layer: spec.Dense, *, bias: bool, save: Save = "all", initialization: Any = "kaiming", **settings: Any
) -> QuadraticDense:
    """Dense factory for `jaxeff.models.Network(dense=...)`: every kind, first order included; see `conv_layer`."""
    return QuadraticDense(
        layer.features,
        kind=layer.kind,
        use_bias=bias,
        branch_norm=layer.branch_norm,
        out_norm=layer.norm,
        act=layer.act,
        save=save,
        initialization=initialization,
        **settings,
    )


def _identity(key, shape, dtype=jnp.float32):
    """A map between features [rows, M] that leaves each of the M / rows groups of channels as it is."""
    rows, columns = shape
    return jnp.tile(jnp.eye(rows, dtype=dtype), (1, columns // rows))


STARTS = {"zero": nn.initializers.zeros, "one": nn.initializers.ones, "identity": _identity}


def _kaiming(gain: float):
    """Kaiming normal over the fan-in, with the standard deviation multiplied by `gain`."""
    return nn.initializers.variance_scaling(2.0 * gain**2, "fan_in", "normal")
