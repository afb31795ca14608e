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
from jax import lax

from jaxeff import spec
from jaxeff.ops import Norm, conv_general_dilated
from jaxeff.ops.norms import checked_norm
from jaxeff.quadratic import kinds

Branch = Callable[[str, jax.Array], jax.Array]
BRANCH_ACTS = {None: lambda x: x, "relu": jax.nn.relu}


def dense(
    params: Mapping[str, jax.Array],
    x: jax.Array,
    *,
    kind: str = "quadralib",
    precision: Any = None,
    branch: Branch | None = None,
) -> jax.Array:
    """Dense layer of neurons of a kind.

    Args:
      params: "kernel_<p>" [I, O] and optionally "bias_<p>" [O] for every projection p of the kind.
      x: [..., I], same dtype as the kernels.
      kind: a name in `jaxeff.quadratic.KINDS`.
      precision: as in lax.
      branch: function (projection name, projection) -> projection, applied to each before they are combined.

    Returns:
      [..., O].

    Raises:
      ValueError: for an unknown kind, or missing or extra parameters.
    """

    def project(z, kernel):
        return lax.dot_general(z, kernel, (((z.ndim - 1,), (0,)), ((), ())), precision=precision)

    return _neuron(params, x, kind, project, branch)


def conv(
    params: Mapping[str, jax.Array],
    x: jax.Array,
    *,
    kind: str = "quadralib",
    strides: Sequence[int] = (1, 1),
    padding: Any = "SAME",
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    precision: Any = None,
    branch: Branch | None = None,
    conv_general_dilated: Callable[..., jax.Array] = conv_general_dilated,
) -> jax.Array:
    """2D convolution of neurons of a kind.

    Args:
      params: "kernel_<p>" [kh, kw, I/groups, O] and optionally "bias_<p>" [O] for every projection p of the kind.
      x: [N, H, W, I], same dtype as the kernels.
      kind: a name in `jaxeff.quadratic.KINDS`.
      strides: two strides.
      padding: "SAME", "VALID" or two (low, high) pairs.
      dilation: two kernel dilations.
      groups: channel groups; must divide I and O.
      precision: as in lax.
      branch: function (projection name, projection) -> projection, applied to each before they are combined.
      conv_general_dilated: the convolution, with lax's signature.

    Returns:
      [N, H', W', O].

    Raises:
      ValueError: for an unknown kind, missing or extra parameters, a rank other than 4, or groups that do not divide.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [N, H, W, C], got shape {x.shape}")

    def project(z, kernel):
        return conv_general_dilated(
            z,
            kernel,
            tuple(strides),
            padding,
            rhs_dilation=tuple(dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            precision=precision,
        )

    return _neuron(params, x, kind, project, branch)


class _QuadraticLayer(nn.Module):
    """What dense and convolutional layers share: parameters of every projection, branch norms, initialisation."""

    def _params(self, kernel_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        kind = kinds.get(self.kind)
        if self.initialization not in ("kaiming", "relinear"):
            raise ValueError(f"initialization must be 'kaiming' or 'relinear', got {self.initialization!r}")
        bias = self.use_bias if self.use_bias is not None else self.branch_norm is None
        starts = kinds.relinear_starts(kind) if self.initialization == "relinear" else {}
        normed = checked_norm(self.branch_norm) is not None
        if "one" in starts.values() and not (bias if not normed else self.branch_norm != "rms"):
            raise ValueError(
                f"ReLinear initialisation of kind {self.kind!r} starts a projection at one, which needs an offset: "
                "use_bias=True or a branch_norm other than 'rms' ('rms' has none)"
            )
        if len(starts) > 1 and self.branch_act is not None:
            raise ValueError(
                f"ReLinear initialisation needs branch_act=None, got {self.branch_act!r}: it would change the "
                "first-order part and hold the quadratic part at zero"
            )
        params = {}
        for projection in kind.projections:
            start = starts.get(projection.name, "kaiming")
            # With a branch norm it is the norm's scale and offset that switch the branch off, see `_branch`.
            off = start != "kaiming" and not normed
            gain = 1.0 if normed or starts else projection.gain
            kernel = nn.initializers.zeros if off else _kaiming(gain)
            params[f"kernel_{projection.name}"] = self.param(
                f"kernel_{projection.name}", kernel, kernel_shape, self.param_dtype
            )
            if bias:
                offset = nn.initializers.ones if off and start == "one" else nn.initializers.zeros
                params[f"bias_{projection.name}"] = self.param(
                    f"bias_{projection.name}", offset, kernel_shape[-1:], self.param_dtype
                )
        return params

    def _branch(self, train: bool) -> Branch:
        if self.branch_act not in BRANCH_ACTS:
            raise ValueError(f"branch_act must be None or 'relu', got {self.branch_act!r}")
        act = BRANCH_ACTS[self.branch_act]
        kind = kinds.get(self.kind)
        starts = kinds.relinear_starts(kind) if self.initialization == "relinear" else {}

        def apply(name, z):
            if self.branch_norm is not None:
                start = starts.get(name, "kaiming")
                z = Norm(
                    self.branch_norm,
                    axis_name=self.axis_name,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    scale_init=nn.initializers.ones if start == "kaiming" else nn.initializers.zeros,
                    bias_init=nn.initializers.ones if start == "one" else nn.initializers.zeros,
                    name=f"norm_{name}",
                )(z, train)
            return act(z)

        return apply

    def _cast(self, params, x):
        dtype = self.dtype or jnp.result_type(x, *params.values())
        return {name: value.astype(dtype) for name, value in params.items()}, x.astype(dtype)


class QuadraticDense(_QuadraticLayer):
    """Dense layer of neurons of a kind.

    Attributes:
      features: output width O.
      kind: a name in `jaxeff.quadratic.KINDS`.
      use_bias: bias of every projection; None means only without branch norm.
      branch_norm: norm of every projection ("batch", "group", "layer", "rms") or None.
      branch_act: activation of every projection after its norm, "relu" or None.
      initialization: "kaiming" (unit output variance where the inputs are rectified standard normals, as after norm
        and ReLU) or "relinear" (starts as the first-order layer).
      dtype: dtype of the arithmetic; None follows input and parameters.
      param_dtype: dtype of the parameters.
      precision: as in lax.
      axis_name: mapped axis over which batch norm shares its statistics.
    """

    features: int
    kind: str = "quadralib"
    use_bias: bool | None = None
    branch_norm: str | None = None
    branch_act: Literal["relu"] | None = None
    initialization: Literal["kaiming", "relinear"] = "kaiming"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [..., I] to [..., features]."""
        params, x = self._cast(self._params((x.shape[-1], self.features)), x)
        return dense(params, x, kind=self.kind, precision=self.precision, branch=self._branch(train))


class QuadraticConv(_QuadraticLayer):
    """2D convolution of neurons of a kind; drop-in for `flax.linen.Conv` on [N, H, W, C].

    Attributes:
      features: output channels O.
      kernel_size: (height, width).
      strides: two strides.
      padding: "SAME", "VALID" or two (low, high) pairs.
      kernel_dilation: two kernel dilations.
      feature_group_count: channel groups.
      kind, use_bias, branch_norm, branch_act, initialization, dtype, param_dtype, precision, axis_name: as in
        `QuadraticDense`.
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
    branch_act: Literal["relu"] | None = None
    initialization: Literal["kaiming", "relinear"] = "kaiming"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    axis_name: str | None = None
    conv_general_dilated: Callable[..., jax.Array] = conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Convolves x [N, H, W, I] to [N, H', W', features]."""
        groups = self.feature_group_count
        if x.ndim != 4:
            raise ValueError(f"x must be [N, H, W, C], got shape {x.shape}")
        if groups < 1 or x.shape[-1] % groups or self.features % groups:
            raise ValueError(
                f"feature_group_count={groups} must divide the {x.shape[-1]} input channels and the "
                f"{self.features} features; choose a common divisor of both"
            )
        shape = (*self.kernel_size, x.shape[-1] // groups, self.features)
        params, x = self._cast(self._params(shape), x)
        return conv(
            params,
            x,
            kind=self.kind,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=groups,
            precision=self.precision,
            branch=self._branch(train),
            conv_general_dilated=self.conv_general_dilated,
        )


def conv_layer(layer: spec.Conv, *, bias: bool, groups: int, **settings: Any) -> QuadraticConv:
    """Convolution factory for `jaxeff.models.Network(conv=...)`: every kind, first order included."""
    return QuadraticConv(
        layer.features,
        layer.kernel,
        layer.strides,
        layer.padding,
        feature_group_count=groups,
        kind=layer.kind,
        use_bias=bias,
        branch_norm=layer.branch_norm,
        **settings,
    )


def dense_layer(layer: spec.Dense, *, bias: bool, **settings: Any) -> QuadraticDense:
    """Dense factory for `jaxeff.models.Network(dense=...)`: every kind, first order included."""
    return QuadraticDense(layer.features, kind=layer.kind, use_bias=bias, branch_norm=layer.branch_norm, **settings)


def _neuron(params, x, kind_name, project, branch) -> jax.Array:
    kind = kinds.get(kind_name)
    needed = {f"kernel_{p.name}" for p in kind.projections}
    allowed = needed | {f"bias_{p.name}" for p in kind.projections}
    if not needed <= set(params) <= allowed:
        raise ValueError(
            f"kind {kind.name!r} ({kind.formula}) takes {sorted(needed)} and optional biases; "
            f"missing {sorted(needed - set(params))}, unexpected {sorted(set(params) - allowed)}"
        )
    values = []
    for p in kind.projections:
        z = project(x if p.power == 1 else x**p.power, params[f"kernel_{p.name}"])
        if (offset := params.get(f"bias_{p.name}")) is not None:
            z = z + offset
        values.append(z if branch is None else branch(p.name, z))
    return kind.combine(*values)


def _kaiming(gain: float):
    """Kaiming normal over the fan-in, with the standard deviation multiplied by `gain`."""
    return nn.initializers.variance_scaling(2.0 * gain**2, "fan_in", "normal")
