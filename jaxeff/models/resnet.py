"""Residual networks for small images (He et al. 2016, arXiv 1512.03385, section 4.2)."""

from typing import Any

from jaxeff.spec import Architecture, Conv, Dense, GlobalPool, Layer, Residual


def resnet(
    depth: int = 20,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    norm: str | None = "batch",
    bias: bool | None = None,
    shortcut: str = "pad",
    width: float = 1.0,
) -> Architecture:
    """ResNet-CIFAR: a 3x3 stem, three stages of basic blocks with 16, 32 and 64 channels, mean, dense layer.

    Args:
      depth: 6n + 2 for n basic blocks a stage: 14, 20, 32, 56, ...
      num_classes: width of the last layer.
      input_shape: (H, W, C).
      norm: norm after every convolution.
      bias: bias of the convolutions; None means only without norm, see `spec.Conv`.
      shortcut: where the shape changes, "pad" (option A: no parameters) or "projection" (option B: 1x1 convolution).
      width: factor on 16, 32, 64.

    Returns:
      The architecture; block i of stage s is "stage{s}_block{i}" with conv1, conv2 and, if projected, "shortcut".

    Raises:
      ValueError: for a depth that is not 6n + 2 or an unknown shortcut.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 56, ...), got {depth}")
    if shortcut not in ("pad", "projection"):
        raise ValueError(f"shortcut must be 'pad' or 'projection', got {shortcut!r}")
    widths = [max(1, round(w * width)) for w in (16, 32, 64)]
    common: dict[str, Any] = {"norm": norm, "bias": bias}
    layers: list[Layer] = [Conv("conv1", widths[0], role="stem", **common)]
    for stage, features in enumerate(widths, start=1):
        for block in range(1, blocks + 1):
            changes = stage > 1 and block == 1
            strides = (2, 2) if changes else (1, 1)
            projection = Conv("shortcut", features, (1, 1), strides, act=None, role="shortcut", norm=norm, bias=bias)
            branch = (
                Conv("conv1", features, strides=strides, **common),
                Conv("conv2", features, act=None, **common),
            )
            across = {"pad": "pad", "projection": projection}[shortcut] if changes else "identity"
            layers.append(Residual(f"stage{stage}_block{block}", branch, across))
    layers += [GlobalPool("mean"), Dense("head", num_classes)]
    return Architecture(f"resnet{depth}", tuple(input_shape), tuple(layers))
