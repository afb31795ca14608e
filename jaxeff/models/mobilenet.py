"""MobileNet for small images (Howard et al. 2017, arXiv 1704.04861)."""

from collections.abc import Sequence
from typing import Any

from jaxeff.spec import DEPTHWISE, Architecture, Conv, Dense, GlobalPool, Layer

# (output channels, stride) of each depthwise-separable block: QuadraLib's plan for 32x32 images.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (1024, 2))


def mobilenet(
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    norm: str | None = "batch",
    bias: bool | None = None,
    width: float = 1.0,
) -> Architecture:
    """A 3x3 stem with 32 channels, then blocks of a depthwise 3x3 and a pointwise 1x1 convolution.

    Args:
      blocks: (output channels, stride) of each block.
      num_classes: width of the last layer.
      input_shape: (H, W, C).
      norm: norm after every convolution.
      bias: bias of the convolutions; None means only without norm, see `spec.Conv`.
      width: factor on every width.

    Returns:
      The architecture; block i has layers "block{i}_depthwise" and "block{i}_pointwise".
    """
    common: dict[str, Any] = {"norm": norm, "bias": bias}
    channels = max(1, round(32 * width))
    layers: list[Layer] = [Conv("conv1", channels, role="stem", **common)]
    for index, (features, stride) in enumerate(blocks, start=1):
        layers.append(Conv(f"block{index}_depthwise", channels, strides=(stride, stride), groups=DEPTHWISE, **common))
        channels = max(1, round(features * width))
        layers.append(Conv(f"block{index}_pointwise", channels, (1, 1), **common))
    layers += [GlobalPool("mean"), Dense("head", num_classes)]
    return Architecture("mobilenet", tuple(input_shape), tuple(layers))
