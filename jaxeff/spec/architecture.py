"""What an architecture is: layer descriptions, and the shapes that follow from them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

Role = Literal["body", "stem", "shortcut", "head"]
DEPTHWISE = 0
"""As `Conv.groups`: one group per input channel."""


@dataclasses.dataclass(frozen=True)
class Conv:
    """A 2D convolution with what follows it, norm and activation, and what may stand before it, a gate.

    Attributes:
      name: unique among its siblings.
      features: output channels.
      kernel: (height, width).
      strides: (vertical, horizontal).
      padding: "SAME", "VALID" or two (low, high) pairs.
      groups: channel groups; `DEPTHWISE` (0) for one group per input channel.
      kind: neuron type; "first_order" or a kind of `jaxeff.quadratic`.
      branch_norm: norm of each projection inside a neuron with several ("batch", "group", ..., None).
      norm: norm of the layer's output.
      act: "relu", "relu6", "leaky_relu", "gelu", "silu", "tanh" or None.
      bias: whether the projections have a bias; None means only where no norm follows them directly: neither
        `branch_norm` nor, in a first-order layer, `norm` (between a quadratic neuron's projections and `norm` stands
        their product, which needs the biases).
      gate: settings of a gate on the input, which drops some of it for every input anew (`jaxeff.dynamic`); None for no
        gate.
      role: what the layer is for; edits touch "body" layers unless told otherwise.
    """

    name: str
    features: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    groups: int = 1
    kind: str = "first_order"
    branch_norm: str | None = None
    norm: str | None = None
    act: str | None = "relu"
    bias: bool | None = None
    gate: Any = None
    role: Role = "body"


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer with what follows it; the attributes mean what they mean in `Conv`."""

    name: str
    features: int
    kind: str = "first_order"
    branch_norm: str | None = None
    norm: str | None = None
    act: str | None = None
    bias: bool | None = None
    role: Role = "head"


@dataclasses.dataclass(frozen=True)
class Pool:
    """Pooling over disjoint windows; `reduce` is "max" or "avg", `window` is also the stride."""

    name: str
    window: tuple[int, int] = (2, 2)
    reduce: Literal["max", "avg"] = "max"


@dataclasses.dataclass(frozen=True)
class GlobalPool:
    """Mean over space: [N, H, W, C] to [N, C]."""

    name: str


@dataclasses.dataclass(frozen=True)
class Flatten:
    """[N, H, W, C] to [N, H*W*C]."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reshape:
    """[N, F] to [N, *shape], or any other change of shape that keeps the number of values."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Upsample:
    """Nearest-neighbour upsampling: every pixel becomes a block of `factor` = (vertical, horizontal) pixels."""

    name: str
    factor: tuple[int, int] = (2, 2)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Sets a fraction `rate` of the activations to zero while training."""

    name: str
    rate: float


@dataclasses.dataclass(frozen=True)
class Residual:
    """`act(body(x) + shortcut(x))`.

    Attributes:
      name: unique among its siblings.
      body: the layers of the branch.
      shortcut: "identity"; "pad" (strided identity with zero channels, option A of He et al. 2016, arXiv 1512.03385);
        or a `Conv` (option B).
      act: activation after the sum.
    """

    name: str
    body: tuple["Layer", ...]
    shortcut: Any = "identity"
    act: str | None = "relu"


Layer = Conv | Dense | Pool | GlobalPool | Flatten | Reshape | Upsample | Dropout | Residual


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network: its name, the shape of one input (H, W, C) and its layers in order.

    Raises:
      ValueError: when made, if names repeat or shapes do not fit; the layer is named.
    """

    name: str
    input_shape: tuple[int, ...]
    layers: tuple[Layer, ...]

    def __post_init__(self):
        shapes(self)


class Shape(NamedTuple):
    """Shapes of one example on entry and exit of a layer, without the batch axis."""

    input: tuple[int, ...]
    output: tuple[int, ...]


def walk(architecture: Architecture) -> Iterator[tuple[str, Layer]]:
    """Yields (path, layer) of every layer in order, those inside residual blocks as "block/conv1"."""
    yield from _walk(architecture.layers, "")


def shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shapes of every layer by path.

    Raises:
      ValueError: if names repeat or a layer does not fit its input.
    """
    table: dict[str, Shape] = {}
    _infer(architecture.layers, tuple(architecture.input_shape), "", table, architecture.name)
    return table


def _walk(layers, prefix) -> Iterator[tuple[str, Layer]]:
    for layer in layers:
        yield prefix + layer.name, layer
        if isinstance(layer, Residual):
            inner = f"{prefix}{layer.name}/"
            yield from _walk(layer.body, inner)
            if isinstance(layer.shortcut, Conv):
                yield from _walk((layer.shortcut,), inner)


def _infer(layers, shape, prefix, table, owner) -> tuple[int, ...]:
    for layer in layers:
        path = prefix + layer.name
        if path in table:
            raise ValueError(f"{owner!r} has two layers named {path!r}; names must be unique among siblings")
        table[path] = Shape(shape, shape)
        shape = _output_shape(layer, shape, path, table, owner)
        table[path] = Shape(table[path].input, shape)
    return shape


def _output_shape(layer, shape, path, table, owner) -> tuple[int, ...]:
    where = f"layer {path!r} of {owner!r}"
    if isinstance(layer, Conv | Pool | GlobalPool | Upsample) and len(shape) != 3:
        raise ValueError(f"{where} needs an input (H, W, C), got {shape}")
    if isinstance(layer, Conv | Dense) and layer.features < 1:
        raise ValueError(f"{where} has features={layer.features}; it must be at least 1")
    if isinstance(layer, Conv):
        _check_geometry(layer, where)
        groups = layer.groups or shape[-1]
        if shape[-1] % groups or layer.features % groups:
            raise ValueError(
                f"{where}: groups={groups} must divide its {shape[-1]} input channels and {layer.features} features"
            )
        size = [
            _strided(*args) for args in zip(shape, layer.kernel, layer.strides, _pairs(layer.padding), strict=False)
        ]
        if min(size) < 1:
            raise ValueError(f"{where}: a {layer.kernel} kernel with padding {layer.padding!r} does not fit {shape}")
        return (*size, layer.features)
    if isinstance(layer, Pool):
        if len(layer.window) != 2 or min(layer.window) < 1:
            raise ValueError(f"{where}: window must be two sizes >= 1, got {layer.window}")
        if layer.reduce not in ("max", "avg"):
            raise ValueError(f"{where}: reduce must be 'max' or 'avg', got {layer.reduce!r}")
        if shape[0] < layer.window[0] or shape[1] < layer.window[1]:
            raise ValueError(f"{where}: window {layer.window} is larger than its input {shape}; remove the pooling")
        return (shape[0] // layer.window[0], shape[1] // layer.window[1], shape[2])
    if isinstance(layer, GlobalPool):
        return (shape[-1],)
    if isinstance(layer, Flatten):
        return (math.prod(shape),)
    if isinstance(layer, Reshape):
        if min(layer.shape, default=1) < 1 or math.prod(layer.shape) != math.prod(shape):
            raise ValueError(
                f"{where}: shape={layer.shape} holds {math.prod(layer.shape)} values, but its input {shape} has "
                f"{math.prod(shape)}"
            )
        return tuple(layer.shape)
    if isinstance(layer, Upsample):
        if len(layer.factor) != 2 or min(layer.factor) < 1:
            raise ValueError(f"{where}: factor must be two whole numbers >= 1, got {layer.factor}")
        return (shape[0] * layer.factor[0], shape[1] * layer.factor[1], shape[2])
    if isinstance(layer, Dense):
        if len(shape) != 1:
            raise ValueError(f"{where} needs a flat input, got {shape}; put a GlobalPool or Flatten before it")
        return (layer.features,)
    if isinstance(layer, Dropout):
        if not 0 <= layer.rate < 1:
            raise ValueError(f"{where}: rate must be in [0, 1), got {layer.rate}")
        return shape
    if isinstance(layer, Residual):
        out = _infer(layer.body, shape, f"{path}/", table, owner)
        short = shape
        if isinstance(layer.shortcut, Conv):
            short = _infer((layer.shortcut,), shape, f"{path}/", table, owner)
        elif layer.shortcut == "pad":
            # Striding by the ratio of the sizes; channels that the input lacks are zeros.
            short = out if len(shape) == len(out) == 3 and _pads_to(shape, out) else shape
        elif layer.shortcut != "identity":
            raise ValueError(f"{where}: shortcut must be 'identity', 'pad' or a Conv, got {layer.shortcut!r}")
        if short != out:
            raise ValueError(f"{where} adds a branch of shape {out} to a shortcut of shape {short}; they must be equal")
        return out
    raise TypeError(f"{where} is a {type(layer).__name__}; expected one of the layer classes of jaxeff.spec")


def _check_geometry(layer, where) -> None:
    for name in ("kernel", "strides"):
        if len(getattr(layer, name)) != 2 or min(getattr(layer, name)) < 1:
            raise ValueError(f"{where}: {name} must be two sizes >= 1, got {getattr(layer, name)}")
    named = isinstance(layer.padding, str)
    if layer.padding not in ("SAME", "VALID") if named else [len(pair) for pair in layer.padding] != [2, 2]:
        raise ValueError(f"{where}: padding must be 'SAME', 'VALID' or two (low, high) pairs, got {layer.padding!r}")
    if layer.groups < 0:
        raise ValueError(f"{where}: groups must be at least 1, or 0 for depthwise, got {layer.groups}")


def _pads_to(shape, out) -> bool:
    strides = [-(-a // b) for a, b in zip(shape[:2], out[:2], strict=True)]
    return out[-1] >= shape[-1] and all(-(-a // s) == b for a, s, b in zip(shape, strides, out, strict=False))


def _pairs(padding):
    return (padding, padding) if isinstance(padding, str) else padding


def _strided(size: int, kernel: int, stride: int, padding) -> int:
    if padding == "SAME":
        return -(-size // stride)
    low, high = (0, 0) if padding == "VALID" else padding
    return (size + low + high - kernel) // stride + 1
