"""One Flax module that runs any architecture, with layer factories for everything a method may replace.

A factory is a function from a layer description to a Linen module, so a network becomes quadratic, gated or grouped by
being given other factories, never by a second copy:

    conv(layer: spec.Conv, **settings) -> module; module(x, train) -> y
    dense(layer: spec.Dense, **settings) -> module; module(x, train) -> y
    gate(layer: spec.Conv) -> a factory of modules with lax.conv_general_dilated's signature

A gate stands at the input of a convolution and decides what of it is computed, so it takes the place of
`lax.conv_general_dilated` in the layer's module, as `conv_general_dilated_cls` of Linen's own convolution does.

A layer's norm and activation follow its module, unless that has an `out_norm` or `act` of its own: then it does both
itself, and can keep less than all of it for the backward pass.

`settings` are `name`, `bias: bool`, `groups: int` (convolutions), `dtype`, `param_dtype` and `axis_name`, and of gated
layers `conv_general_dilated_cls`, what the gate factory gave; a factory passes on what its module knows. Parameters are
plain nested dictionaries: `params["conv1"]["layer"]["kernel"]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff import spec
from jaxeff.ops import Norm, activation, avg_pool, conv_general_dilated, global_avg_pool, max_pool
from jaxeff.ops.norms import GROUPS as NORM_GROUPS


class FirstOrderConv(nn.Conv):
    """Stock Linen convolution through `jaxeff.ops.conv_general_dilated`; `train` is accepted and ignored."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Convolves x [N, H, W, I] to [N, H', W', features]."""
        return super().__call__(x)


class FirstOrderDense(nn.Dense):
    """Stock Linen dense layer; `train` is accepted and ignored."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [N, I] to [N, features]."""
        return super().__call__(x)


def first_order_conv(
    layer: spec.Conv,
    *,
    name: str,
    bias: bool,
    groups: int,
    dtype: Any,
    param_dtype: Any,
    axis_name: str | None = None,
    conv_general_dilated_cls: Any = None,
):
    """Convolution factory for kind "first_order": Kaiming-normal kernels, `jaxeff.ops` convolution.

    Raises:
      ValueError: for any other kind.
    """
    _check_first_order(layer, "conv")
    return FirstOrderConv(
        layer.features,
        layer.kernel,
        layer.strides,
        layer.padding,
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=conv_general_dilated,
        conv_general_dilated_cls=conv_general_dilated_cls,
        name=name,
    )


def first_order_dense(
    layer: spec.Dense, *, name: str, bias: bool, dtype: Any, param_dtype: Any, axis_name: str | None = None
):
    """Dense factory for kind "first_order"; Kaiming-normal before a ReLU, LeCun-normal otherwise.

    Raises:
      ValueError: for any other kind.
    """
    _check_first_order(layer, "dense")
    init = nn.initializers.he_normal() if layer.act == "relu" else nn.initializers.lecun_normal()
    return FirstOrderDense(layer.features, bias, dtype, param_dtype, kernel_init=init, name=name)


class Network(nn.Module):
    """Runs an architecture.

    Attributes:
      architecture: what to run.
      conv: convolution factory.
      dense: dense factory.
      gate: gate factory, for example `jaxeff.dynamic.gate_layer`; needed when a layer has a gate.
      dtype: dtype of activations and of the arithmetic (for example bfloat16); None follows the input.
      param_dtype: dtype of the parameters.
      axis_name: mapped axis over which batch norm shares its statistics.
      norm_groups: groups of channels that group norm normalises together, as of `jaxeff.ops.Norm`.

    Raises:
      ValueError: for an unknown activation or norm, a kind its factory does not know, or a gate without a factory.
    """

    architecture: spec.Architecture
    conv: Callable[..., nn.Module] = first_order_conv
    dense: Callable[..., nn.Module] = first_order_dense
    gate: Callable[[spec.Conv], Any] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    norm_groups: int = NORM_GROUPS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [N, *input_shape], floating point, to the last layer's output [N, features] in float32."""
        expected = tuple(self.architecture.input_shape)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{self.architecture.name!r} takes inputs [N, {', '.join(map(str, expected))}], got {x.shape}"
            )
        settings = _Settings(
            self.conv, self.dense, self.gate, self.dtype, self.param_dtype, self.axis_name, self.norm_groups
        )
        for layer in self.architecture.layers:
            x = _Step(layer, settings, name=layer.name)(x, train)
        # Losses and metrics are computed in float32 whatever the network computes in.
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class _Settings(NamedTuple):
    conv: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    gate: Callable[[spec.Conv], Any] | None
    dtype: Any
    param_dtype: Any
    axis_name: str | None
    norm_groups: int


class _Step(nn.Module):
    """One layer of an architecture with what follows it; residual blocks hold further steps."""

    layer: Any
    settings: _Settings

    @nn.compact
    def __call__(self, x, train):
        layer = self.layer
        if isinstance(layer, spec.Conv | spec.Dense):
            return _weighted(layer, self.settings, x, train)
        if isinstance(layer, spec.Pool):
            return (max_pool if layer.reduce == "max" else avg_pool)(x, layer.window)
        if isinstance(layer, spec.GlobalPool):
            return global_avg_pool(x)
        if isinstance(layer, spec.Flatten):
            return x.reshape(x.shape[0], -1)
        if isinstance(layer, spec.Reshape):
            return x.reshape(x.shape[0], *layer.shape)
        if isinstance(layer, spec.Upsample):
            return x.repeat(layer.factor[0], 1).repeat(layer.factor[1], 2)
        if isinstance(layer, spec.Dropout):
            return nn.Dropout(layer.rate)(x, deterministic=not train)
        if isinstance(layer, spec.Residual):
            return _residual(layer, self.settings, x, train)
        raise TypeError(f"{type(layer).__name__} is not a layer class of jaxeff.spec")


def _weighted(layer, net: _Settings, x, train):
    """Runs inside the compact call of a step, so the modules made here belong to that step."""
    if net.dtype is not None:
        x = x.astype(net.dtype)
    settings: dict[str, Any] = dict(name="layer", dtype=net.dtype, param_dtype=net.param_dtype, axis_name=net.axis_name)
    settings["bias"] = _takes_bias(layer) if layer.bias is None else layer.bias
    if isinstance(layer, spec.Conv):
        if layer.gate is not None:
            if net.gate is None:
                raise ValueError(f"layer {layer.name!r} has a gate, but the network has no gate factory: pass gate=")
            settings["conv_general_dilated_cls"] = net.gate(layer)
        module = net.conv(layer, groups=layer.groups or x.shape[-1], **settings)
    else:
        module = net.dense(layer, **settings)
    try:
        x = module(x, train)
    except ValueError as error:
        raise ValueError(f"layer {'/'.join(getattr(module, 'path', (layer.name, ''))[:-1])!r}: {error}") from error
    if getattr(module, "out_norm", None) is None and getattr(module, "act", None) is None:
        kept: dict[str, Any] = dict(axis_name=net.axis_name, dtype=net.dtype, param_dtype=net.param_dtype)
        norm = Norm(layer.norm, net.norm_groups, name="norm", **kept)
        x = activation(layer.act)(norm(x, train))
    return x


def _takes_bias(layer) -> bool:
    """Whether the projections of a layer get a bias where its description leaves that open.

    A bias just before a norm is dead weight, as the norm has an offset of its own (before a batch norm the gradient of
    the bias is zero). The output norm of a quadratic neuron, though, stands after the product: the biases of
    (a.x + p) (b.x + q) add the linear part q a.x + p b.x, which no later norm replaces. There only a branch norm, which
    QuadraLib's layers always have, takes the biases away: the default of `jaxeff.quadratic`'s own layers.
    """
    if layer.kind == "first_order":
        return not (layer.norm or layer.branch_norm)
    return not layer.branch_norm


def _residual(layer, net: _Settings, x, train):
    y = x
    for inner in layer.body:
        y = _Step(inner, net, name=inner.name)(y, train)
    if isinstance(layer.shortcut, spec.Conv):
        x = _Step(layer.shortcut, net, name=layer.shortcut.name)(x, train)
    elif layer.shortcut == "pad":
        stride = [-(-a // b) for a, b in zip(x.shape[1:3], y.shape[1:3], strict=True)]
        extra = y.shape[-1] - x.shape[-1]
        x = jnp.pad(x[:, :: stride[0], :: stride[1]], ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
    return activation(layer.act)(y + x.astype(y.dtype))


def _check_first_order(layer: Any, argument: str) -> None:
    if layer.kind != "first_order":
        raise ValueError(
            f"layer {layer.name!r} is of kind {layer.kind!r}, and the network's {argument} factory only makes "
            f"'first_order' layers; pass {argument}=jaxeff.quadratic.{argument}_layer (or a factory of your own)"
        )
