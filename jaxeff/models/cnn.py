"""Small networks: a plain CNN and a multilayer perceptron."""

from collections.abc import Sequence

from jaxeff.spec import Architecture, Conv, Dense, Flatten, GlobalPool, Layer, Pool


def cnn(
    widths: Sequence[int] = (16, 32, 64),
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    norm: str | None = "batch",
    pools: int | None = None,
    hidden: Sequence[int] = (),
) -> Architecture:
    """3x3 convolutions, each followed by 2x2 max pooling while `pools` last, then the spatial mean and dense layers.

    Args:
      widths: channels of each convolution.
      num_classes: width of the last layer.
      input_shape: (H, W, C).
      norm: norm after every convolution.
      pools: how many of the first convolutions are followed by pooling; None pools after all but the last.
      hidden: widths of dense layers before the last; with any, the map is flattened instead of averaged.

    Returns:
      The architecture; layers are conv1, pool1, conv2, ..., head.

    Raises:
      ValueError: if `widths` is empty or the input is too small for the poolings.
    """
    if not widths:
        raise ValueError("widths must name at least one convolution, for example (16, 32, 64)")
    pools = len(widths) - 1 if pools is None else pools
    layers: list[Layer] = []
    for index, features in enumerate(widths, start=1):
        layers.append(Conv(f"conv{index}", features, norm=norm))
        if index <= pools:
            layers.append(Pool(f"pool{index}"))
    layers.append(Flatten("flatten") if hidden else GlobalPool("mean"))
    layers += _hidden(hidden)
    layers.append(Dense("head", num_classes))
    return Architecture("cnn", tuple(input_shape), tuple(layers))


def mlp(
    hidden: Sequence[int] = (64,),
    *,
    num_classes: int = 10,
    input_shape: tuple[int, ...] = (8, 8, 1),
    norm: str | None = None,
) -> Architecture:
    """Multilayer perceptron on flattened inputs.

    Args:
      hidden: widths of the hidden layers, each followed by `norm` and ReLU.
      num_classes: width of the last layer.
      input_shape: shape of one input, of any rank.
      norm: norm of the hidden layers.

    Returns:
      The architecture; layers are flatten, dense1, dense2, ..., head.
    """
    layers = (Flatten("flatten"), *_hidden(hidden, norm), Dense("head", num_classes))
    return Architecture("mlp", tuple(input_shape), layers)


def _hidden(widths: Sequence[int], norm: str | None = None) -> list[Layer]:
    return [
        Dense(f"dense{index}", features, act="relu", norm=norm, role="body")
        for index, features in enumerate(widths, start=1)
    ]
