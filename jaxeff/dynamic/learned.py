"""Gates that learn: feature boosting (FBS) and channel gating, as layers, with their losses.

Both are convolutions with a gate of their own on what they give, where the parameter-free gate of
`jaxeff.dynamic.gate` chooses of what a layer reads. A boosted layer leaves no more than so many channels of its output
above zero, so the parameter-free gate of that ratio before the next layer drops nothing but what the boosted layer
closed; both savings multiply where a layer has both.

Losses are values of the collection "gate_losses", one number per layer; `gate_losses` adds them up, for the `penalty`
of `jaxeff.training.classification`.

To `jaxeff.dynamic.counted_macs` a layer says by `left` which share of the multiply-accumulates its gate leaves, by
`additions` what ranking costs, and by `choosing` which of its parts serve the choice alone.

Letters: N batch, H and W space, I and O input and output channels, k output channels that are kept.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import lax

from jaxeff import spec
from jaxeff.dynamic.attention import channel_attention
from jaxeff.dynamic.engines import of_groups
from jaxeff.dynamic.linen import GatedConvolution, gated
from jaxeff.dynamic.masks import mask_of, top_k_indices
from jaxeff.dynamic.settings import DynamicSpec
from jaxeff.ops import activation, conv_general_dilated

LOSSES = "gate_losses"
"""Name of the collection of losses."""
DENSITY = "gate_density"
"""Name of the collection of shares that are open."""


class BoostedConv(nn.Module):
    """A convolution whose output channels are chosen and weighted by what it reads (FBS, arXiv 1810.05331).

        s = mean over H, W of |x|          g = relu(s Phi + r)
        y = act(keep_k(g) * (norm(conv(x)) + beta))

    keep_k leaves the k highest of each sample and makes the others zero; the norm has no scale, which g takes the place
    of; r starts at 1. Its loss is the mean over the batch of the sum of g, times `penalty`.

    Attributes:
      features: output channels O.
      channels: share of them that is closed, in [0, 1).
      group_size: channels are closed in groups of so many neighbours, which share one g.
      kernel_size: (vertical, horizontal).
      strides: one for both axes or two.
      padding: "SAME", "VALID" or pairs.
      act: name of an activation, or None.
      penalty: weight of the loss (1e-8, the paper's).
      gathered: whether the engine of the layer may leave closed channels out while the norm has its running
        statistics: those in compiled code do, where `jaxeff.dynamic.tune` finds that it pays. While it learns, the
        batch's statistics need all of them.
      dtype: of the arithmetic; None follows the input.
      param_dtype: of the parameters.
      axis_name: mapped axis over which the norm shares its statistics.
      conv_general_dilated_cls: a gate on what the layer reads, see `jaxeff.dynamic.gated`.
    """

    features: int
    channels: float = 0.5
    group_size: int = 1
    kernel_size: tuple[int, int] = (3, 3)
    strides: int | tuple[int, int] = 1
    padding: Any = "SAME"
    act: str | None = "relu"
    penalty: float = 1e-8
    gathered: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    conv_general_dilated_cls: Any = None
    # Says to `jaxeff.models.Network` that the norm is done here.
    out_norm: str = "batch"
    choosing: ClassVar[tuple[str, ...]] = ("saliency",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [N, H, W, I] to [N, H', W', features].

        Raises:
          ValueError: for a share outside [0, 1) or a group size that does not divide the features.
        """
        kept, groups = self._kept(), self.features // self.group_size
        saliency = channel_attention(x, "abs_mean")
        g = nn.relu(_dense(groups, bias=1.0, param_dtype=self.param_dtype, name="saliency")(saliency))
        _set(self, LOSSES, self.penalty * g.sum(-1).mean())
        chosen = top_k_indices(lax.stop_gradient(g), kept)
        # The gate is one of this layer, so that its path is what it is in every other layer.
        convolve: Any = conv_general_dilated
        # What a gated convolution refuses is computed whole.
        cropped = not isinstance(self.padding, str) and np.min(self.padding) < 0
        few = self.gathered and not train and kept < groups and x.size > 0 and not cropped
        if self.conv_general_dilated_cls is not None or few:
            convolve = (self.conv_general_dilated_cls or gated(DynamicSpec()))()
        # Ratios that are traced may be one per sample.
        if few and isinstance(convolve, GatedConvolution) and not convolve.has_ratios:
            convolve = functools.partial(convolve.function(), features=of_groups(chosen, self.group_size))
        y = nn.Conv(
            self.features,
            self.kernel_size,
            self.strides,
            self.padding,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.he_normal(),
            conv_general_dilated_cls=lambda: convolve,
            name="conv",
        )(x)
        norm = _norm(self, train, use_bias=True, name="norm")
        boost = jnp.repeat(jnp.where(mask_of(chosen, groups), g, 0), self.group_size, axis=1)
        return activation(self.act)(boost[:, None, None].astype(y.dtype) * norm(y))

    def left(self, channels: int, opened: float | None = None) -> float:
        """Share of the multiply-accumulates of open channels; `channels` of the input and `opened` do not matter."""
        return self._kept() * self.group_size / self.features

    def additions(self, shape: tuple[int, ...]) -> int:
        """Additions of the saliency of an input (H, W, C)."""
        return math.prod(shape)

    def _kept(self) -> int:
        return DynamicSpec(channels=self.channels, group_size=self.group_size).groups_kept(self.features)


class ChannelGatedConv(nn.Module):
    """A convolution that finishes an output only where a part of its input says so (channel gating, arXiv 1805.12549).

        base = conv of the first channels        open = norm(base) > tau
        y = base + open * (conv of the others)

    The norm has neither scale nor offset; tau is learned for every output channel and pulled up to `target` by the loss
    `penalty` * sum (target - tau)^2. Backwards, open is a sigmoid of slope `slope`. Which outputs are open varies
    freely, so nothing is left out on CPU and GPU, where whole channels or tiles are needed for that: the share of open
    outputs, in the collection "gate_density", is what an accelerator for it would count.

    With so few input channels that one part has none, it is an ordinary convolution.

    Attributes:
      features: output channels O.
      base: share of the input channels that the decision is made from, in (0, 1).
      target: what the thresholds are pulled up to.
      penalty: weight of the loss.
      slope: of the sigmoid.
      kernel_size: (vertical, horizontal).
      strides: one for both axes or two.
      padding: "SAME", "VALID" or pairs.
      use_bias: whether a bias is added to y.
      dtype: of the arithmetic; None follows the input.
      param_dtype: of the parameters.
      axis_name: mapped axis over which the norm shares its statistics.
    """

    features: int
    base: float = 0.25
    target: float = 1.0
    penalty: float = 1e-4
    slope: float = 5.0
    kernel_size: tuple[int, int] = (3, 3)
    strides: int | tuple[int, int] = 1
    padding: Any = "SAME"
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    choosing: ClassVar[tuple[str, ...]] = ()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [N, H, W, I] to [N, H', W', features].

        Raises:
          ValueError: if `base` is not in (0, 1).
        """
        first = self._first(x.shape[-1])
        part = functools.partial(
            nn.Conv,
            self.features,
            self.kernel_size,
            self.strides,
            self.padding,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=conv_general_dilated,
        )
        he = nn.initializers.variance_scaling
        if not 0 < first < x.shape[-1]:
            return part(use_bias=self.use_bias, kernel_init=he(2.0, "fan_in", "normal"), name="base")(x)
        # Variances that add up to that of one convolution.
        share = first / x.shape[-1]
        base = part(use_bias=False, kernel_init=he(2.0 * share, "fan_in", "normal"), name="base")(x[..., :first])
        rest = part(use_bias=False, kernel_init=he(2.0 - 2.0 * share, "fan_in", "normal"), name="rest")(x[..., first:])
        tau = self.param("threshold", nn.initializers.zeros, (self.features,), self.param_dtype)
        _set(self, LOSSES, self.penalty * jnp.sum((self.target - tau) ** 2))
        above = _norm(self, train, use_bias=False, name="norm")(base).astype(jnp.float32) - tau
        soft = nn.sigmoid(self.slope * above)
        is_open = (above > 0).astype(jnp.float32)
        _set(self, DENSITY, is_open.mean())
        y = base + (soft + lax.stop_gradient(is_open - soft)).astype(base.dtype) * rest
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(y.dtype)
        return y

    def left(self, channels: int, opened: float | None = None) -> float:
        """Share of the multiply-accumulates of the base and of what is open beside it, of so many input channels.

        Raises:
          ValueError: if the share that is open is not given.
        """
        first = self._first(channels)
        if not 0 < first < channels:
            return 1.0
        if opened is None:
            raise ValueError("channel gating opens as many outputs as its input asks for; pass the share as opened=")
        return (first + opened * (channels - first)) / channels

    def additions(self, shape: tuple[int, ...]) -> int:
        """None: what decides is a part of the output."""
        return 0

    def _first(self, channels: int) -> int:
        if not 0 < self.base < 1:
            raise ValueError(f"base is a share of the input channels, in (0, 1), got {self.base}")
        return round(self.base * channels)


def boosted_conv(**settings: Any) -> Callable[..., nn.Module]:
    """Convolution factory of `jaxeff.models.Network(conv=...)` that makes boosted layers with these settings.

    It follows the architecture in everything else; layers with groups, or of other kinds than "first_order", are
    refused.
    """

    def make(layer: spec.Conv, *, name, bias, groups, conv_general_dilated_cls=None, **passed):
        _check_plain(layer, groups)
        return BoostedConv(
            layer.features,
            kernel_size=layer.kernel,
            strides=layer.strides,
            padding=layer.padding,
            act=layer.act,
            conv_general_dilated_cls=conv_general_dilated_cls,
            name=name,
            **{**passed, **settings},
        )

    return make


def channel_gated_conv(**settings: Any) -> Callable[..., nn.Module]:
    """Convolution factory of `jaxeff.models.Network(conv=...)` that makes channel-gated layers with these settings.

    Layers with groups, or of other kinds than "first_order", are refused.
    """

    def make(layer: spec.Conv, *, name, bias, groups, conv_general_dilated_cls=None, **passed):
        _check_plain(layer, groups)
        if conv_general_dilated_cls is not None:
            raise ValueError(f"layer {layer.name!r} has a gate on its input already; channel gating takes none")
        return ChannelGatedConv(
            layer.features,
            kernel_size=layer.kernel,
            strides=layer.strides,
            padding=layer.padding,
            use_bias=bias,
            name=name,
            **{**passed, **settings},
        )

    return make


def gate_losses(model_state: Mapping[str, Any]) -> jax.Array:
    """Sum of the losses of all gates that learn, float32; 0 where there are none.

    Args:
      model_state: the collections of a network's variables, with "gate_losses".
    """
    return sum(jax.tree.leaves(model_state.get(LOSSES, {})), jnp.zeros((), jnp.float32))


def gate_densities(model_state: Mapping[str, Any]) -> dict[str, float]:
    """Share of the outputs that channel gating left open in the last call whose "gate_density" was kept, by layer.

    Args:
      model_state: the collections of a network's variables, of which "gate_density" is read.
    """
    leaves = flatten_dict(dict(model_state.get(DENSITY, {})), sep="/")
    return {path.removesuffix("/value").removesuffix("/layer"): float(value) for path, value in leaves.items()}


def _set(module: nn.Module, collection: str, value: jax.Array) -> None:
    variable = module.variable(collection, "value", jnp.zeros, (), jnp.float32)
    if module.is_mutable_collection(collection):
        variable.value = value.astype(jnp.float32)


def _dense(features: int, *, bias: float, param_dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.he_normal(),
        bias_init=nn.initializers.constant(bias),
        name=name,
    )


def _norm(module: Any, train: bool, *, use_bias: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        use_scale=False,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        axis_name=None if module.is_initializing() else module.axis_name,
        name=name,
    )


def _check_plain(layer: spec.Conv, groups: int) -> None:
    if layer.kind != "first_order" or groups != 1:
        raise ValueError(
            f"layer {layer.name!r} is of kind {layer.kind!r} with {groups} groups; gates that learn take first-order "
            "convolutions without groups"
        )
