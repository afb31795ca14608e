"""Quadratic dense and convolutional layers as Linen modules, and the factories that networks take them from."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff import spec
from jaxeff.ops import NormVariables, conv_general_dilated
from jaxeff.ops.norms import checked_norm
from jaxeff.quadratic import backward, kinds, projections
from jaxeff.quadratic.backward import Save
from jaxeff.quadratic.neurons import conv_block, dense_block
from jaxeff.quadratic.projections import Impl


class _QuadraticLayer(nn.Module, kw_only=True):
    """What dense and convolutional layers share: parameters of every projection, norms, initialisation."""

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
        if (branch_norm := checked_norm(self.branch_norm)) is not None:
            neurons = kind.neurons(self.features)
            for p in kind.projections:
                start = starts.get(p.name, "free")
                scale, bias = zeros if start in ("zero", "one") else ones, ones if start == "one" else zeros
                wanted.append((p.name, branch_norm, neurons * p.rank, scale, bias))
        if (out_norm := checked_norm(self.out_norm)) is not None:
            wanted.append((backward.OUT, out_norm, self.features, ones, zeros))
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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [..., I] to [..., features]; with `train`, batch norms use and update the statistics of this batch."""
        return self._run(dense_block, (x.shape[-1],), x, train)


class QuadraticConv(_QuadraticLayer):
    """2D convolution of neurons of a kind, with the attributes of `flax.linen.Conv`, on [N, H, W, C].

    Attributes:
      features: output channels O.
      kernel_size: (height, width), or one number for both.
      strides: one for both axes or two.
      padding: "SAME", "SAME_LOWER" or "VALID"; one number for all sides; or for each axis a number or (low, high).
      kernel_dilation: one for both axes or two.
      feature_group_count: channel groups.
      kind, use_bias, branch_norm, branch_act, out_norm, act, save, impl, initialization, dtype, param_dtype, precision,
        axis_name: as in `QuadraticDense`.
      conv_general_dilated: the convolution, with lax's signature.
      conv_general_dilated_cls: a factory of modules of that signature, which takes its place as in `flax.linen.Conv`.
        Where the module has a method `function`, its result is called instead of the module, so that it may run inside
        custom derivatives.
    """

    features: int
    kernel_size: int | tuple[int, int] = (3, 3)
    strides: int | tuple[int, int] = 1
    padding: Any = "SAME"
    kernel_dilation: int | tuple[int, int] = 1
    feature_group_count: int = 1
    conv_general_dilated: Callable[..., jax.Array] = conv_general_dilated
    conv_general_dilated_cls: Any = None

    @property
    def window(self) -> projections.Window:
        """Kernel size, strides, padding, dilation and groups, each in full."""
        if self.kernel_size is None:
            raise ValueError("kernel_size must be a positive integer or two, got None")
        groups = self.feature_group_count
        return projections.window(self.strides, self.padding, self.kernel_dilation, groups, self.kernel_size)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Convolves x [N, H, W, I] to [N, H', W', features]; `train` as in `QuadraticDense`."""
        groups, window = self.feature_group_count, self.window
        assert window.kernel_size is not None
        if x.ndim != 4:
            raise ValueError(f"x must be [N, H, W, C], got shape {x.shape}")
        neurons = kinds.get(self.kind).neurons(self.features)
        if groups < 1 or x.shape[-1] % groups or neurons % groups:
            what = "features" if neurons == self.features else f"neurons of {self.features // neurons} features each"
            raise ValueError(
                f"feature_group_count={groups} must divide the {x.shape[-1]} input channels and the {neurons} {what}; "
                "choose a common divisor of both"
            )
        return self._run(
            conv_block,
            (*window.kernel_size, x.shape[-1] // groups),
            x,
            train,
            **window._asdict(),
            conv_general_dilated=self._convolution(),
        )

    def _convolution(self) -> Callable[..., jax.Array]:
        if self.conv_general_dilated_cls is None:
            return self.conv_general_dilated
        module = self.conv_general_dilated_cls()
        return module.function() if hasattr(module, "function") else module


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
