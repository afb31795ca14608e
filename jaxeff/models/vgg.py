"""VGG architectures (Simonyan and Zisserman 2015, arXiv 1409.1556) in their small-image form."""

from collections.abc import Sequence

from jaxeff.spec import Architecture, Conv, Dense, Dropout, Flatten, GlobalPool, Layer, Pool

M = "M"  # max pooling 2x2
PLANS: dict[str, tuple[int | str, ...]] = {
    "A": (64, M, 128, M, 256, 256, M, 512, 512, M, 512, 512, M),
    "B": (64, 64, M, 128, 128, M, 256, 256, M, 512, 512, M, 512, 512, M),
    "D": (64, 64, M, 128, 128, M, 256, 256, 256, M, 512, 512, 512, M, 512, 512, 512, M),
    # QuadraLib's seven-layer plan (github.com/zarekxu/QuadraLib).
    "Q7": (64, 64, M, 128, 128, M, 256, M, 512, M, 512, M),
}


def vgg(
    plan: str | Sequence[int | str] = "D",
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    norm: str | None = "batch",
    bias: bool | None = None,
    width: float = 1.0,
    dropout: float = 0.0,
) -> Architecture:
    """VGG of 3x3 convolutions, max pooling and one dense layer on the spatial mean.

    At 32x32 the last map is 1x1, so the mean is the flattening of the small-image VGGs; at 224x224 it takes the place
    of the two wide dense layers of the original.

    Args:
      plan: "A", "B", "D" (VGG-11, 13, 16), "Q7", or a sequence of widths and "M" for pooling.
      num_classes: width of the last layer.
      input_shape: (H, W, C).
      norm: norm after every convolution.
      bias: bias of the convolutions; None means only without norm, see `spec.Conv`.
      width: factor on every width of the plan.
      dropout: rate before the last layer.

    Returns:
      The architecture; layers are conv1, conv2, ..., pool1, ..., head.

    Raises:
      ValueError: for an unknown plan, or an input too small for its poolings.
    """
    if isinstance(plan, str) and plan not in PLANS:
        raise ValueError(f"plan must be a sequence or one of {', '.join(map(repr, PLANS))}, got {plan!r}")
    name = f"vgg_{plan}" if isinstance(plan, str) else "vgg"
    layers: list[Layer] = [*_stages(PLANS[plan] if isinstance(plan, str) else plan, width, norm, bias)]
    layers.append(GlobalPool("mean"))
    layers += _dropout(dropout)
    layers.append(Dense("head", num_classes))
    return Architecture(name, tuple(input_shape), tuple(layers))


def vgg9(
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    norm: str | None = None,
    width: float = 1.0,
    dropout: float = 0.0,
) -> Architecture:
    """VGG-9 of the federated-learning literature (FedMA, arXiv 2002.06440): six convolutions, two hidden dense layers.

    Args:
      num_classes: width of the last layer.
      input_shape: (H, W, C).
      norm: norm after every convolution and hidden dense layer.
      width: factor on every width.
      dropout: rate before each hidden dense layer.

    Returns:
      The architecture; 3,491,530 parameters at its defaults.

    Raises:
      ValueError: for an input smaller than 8x8.
    """
    layers: list[Layer] = [*_stages((32, 64, M, 128, 128, M, 256, 256, M), width, norm, None), Flatten("flatten")]
    for index in (1, 2):
        layers += _dropout(dropout, f"dropout{index}")
        layers.append(Dense(f"dense{index}", _scaled(512, width), act="relu", norm=norm, role="body"))
    layers.append(Dense("head", num_classes))
    return Architecture("vgg9", tuple(input_shape), tuple(layers))


def _stages(plan, width, norm, bias):
    convs = pools = 0
    for entry in plan:
        if entry == M:
            pools += 1
            yield Pool(f"pool{pools}")
        else:
            convs += 1
            yield Conv(f"conv{convs}", _scaled(entry, width), norm=norm, bias=bias)


def _scaled(features: int, width: float) -> int:
    return max(1, round(features * width))


def _dropout(rate: float, name: str = "dropout") -> list[Layer]:
    return [Dropout(name, rate)] if rate else []
