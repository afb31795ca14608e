"""QuadraNet's block: a depthwise quadratic convolution where ConvNeXt has a depthwise first-order one.

Xu et al. 2023, "QuadraNet: improving high-order neural interaction efficiency with hardware-aware quadratic neural
networks", arXiv 2311.17956; the form is that of github.com/miniHuiHui/QuadraNet.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.quadratic.backward import Save
from jaxeff.quadratic.layers import QuadraticConv

LAYER_SCALE = 1e-6


class QuadraNetBlock(nn.Module):
    """x + g1 * quadratic_depthwise(norm(x)), then x + g2 * pointwise(gelu(pointwise(norm(x)))).

    Attributes:
      kernel_size: of the depthwise convolution.
      kind: type of its neurons.
      expansion: width of the hidden features in units of the channels.
      drop_path: probability with which an example skips each branch in training; needs the "dropout" random stream.
      layer_scale: start of the factors g1 and g2 [C]; None has none.
      save: memory policy of the quadratic convolution.
      dtype: dtype of the arithmetic; None follows the input.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: for a drop_path outside of [0, 1).
    """

    kernel_size: tuple[int, int] = (7, 7)
    kind: str = "quadralib"
    expansion: int = 4
    drop_path: float = 0.0
    layer_scale: float | None = LAYER_SCALE
    save: Save = "all"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [N, H, W, C] to the same shape."""
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        channels = x.shape[-1]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        spatial = QuadraticConv(
            channels,
            self.kernel_size,
            kind=self.kind,
            feature_group_count=channels,
            save=self.save,
            name="spatial",
            **types,
        )
        x = self._add(x, spatial(nn.LayerNorm(name="norm1", **types)(x), train), "scale1", train)
        hidden = nn.Dense(self.expansion * channels, name="expand", **types)(nn.LayerNorm(name="norm2", **types)(x))
        return self._add(x, nn.Dense(channels, name="reduce", **types)(jax.nn.gelu(hidden)), "scale2", train)

    def _add(self, x, branch, name, train):
        if self.layer_scale is not None:
            scale = self.param(name, nn.initializers.constant(self.layer_scale), x.shape[-1:], self.param_dtype)
            branch = branch * scale.astype(branch.dtype)
        # One decision per example: the whole branch or nothing of it.
        dropped = nn.Dropout(self.drop_path, broadcast_dims=tuple(range(1, x.ndim)))(branch, deterministic=not train)
        return x + dropped.astype(x.dtype)
