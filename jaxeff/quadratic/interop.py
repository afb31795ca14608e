"""Checkpoints of PyTorch networks as variables of ours: names, layouts and running statistics; torch is not needed.

A checkpoint is a dictionary of NumPy arrays: `{name: tensor.numpy() for name, tensor in model.state_dict().items()}`.
Understood are the names of torchvision's VGG, of ResNets for small images in the naming of torchvision or QuadraLib,
and of QuadraLib's quadratic convolutions in both (github.com/zarekxu/QuadraLib):

| ours | there |
|---|---|
| layers in a row | `features.<position>`: a convolution, batch norm, activation or pooling each takes one |
| stem, block i of stage s | `conv1` and `bn1`; `layer<s>.<i - 1>.conv<j>` and `.bn<j>` |
| projection shortcut | `<block>.shortcut.0` and `.1`, or `<block>.downsample.0` and `.1` |
| projections a, b, c of a quadratic layer and their norms | `<layer>.conv1`, `.conv2`, `.conv3`; `<layer>.bn1`, ... |
| dense layers | whatever has weights [O, I]: `classifier`, `classifier.<position>`, `linear`, `fc` |

    state = {name: tensor.numpy() for name, tensor in torch.load(file, map_location="cpu")["net"].items()}
    resnet = models.resnet(14, shortcut="projection")
    architecture = like_torch(spec.quadratize(resnet, branch_norm="batch"), state)
    network = models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    variables = from_torch_state_dict(state, network)
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from jaxeff import spec
from jaxeff.quadratic import kinds

# QuadraLib's layers whose projections are convolutions; their order is that of our projections.
KINDS = ("first_order", "quadralib", "t2", "t3", "t4")
_ATTRIBUTES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

Leaf = tuple[str, ...]


def from_torch_state_dict(state_dict: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """Turns a PyTorch checkpoint into the variables of a network, running statistics included.

    Args:
      state_dict: arrays by name, floating point; convolutions [O, I / groups, kh, kw], dense layers [O, I]. A prefix
        "module." (of DataParallel) and entries "num_batches_tracked" are ignored.
      network: a `jaxeff.models.Network`; its architecture must compute what the checkpoint was trained for: see
        `like_torch`.

    Returns:
      {"params": ..., "batch_stats": ...} as `network.init` gives them, in its dtypes; no "batch_stats" where it has no
      batch norm.

    Raises:
      TypeError: if `network` has no architecture.
      ValueError: listing everything that does not fit at once: missing and extra names, wrong shapes and dtypes,
        parts of the network that such checkpoints cannot hold, and padding that PyTorch computes differently.
    """
    architecture = getattr(network, "architecture", None)
    if not isinstance(architecture, spec.Architecture):
        raise TypeError(
            f"network must be a jaxeff.models.Network, got {type(network).__name__}; an architecture becomes one by "
            "models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)"
        )
    state = _plain(state_dict)
    places = list(_places(architecture, state))
    wanted = _wanted(network, architecture)
    keys = {leaf: _key(places, leaf) for leaf in wanted}
    problems = _unlike(architecture)
    if strange := ["/".join(leaf) for leaf, key in keys.items() if key is None]:
        problems.append(f"parts of the network that such a checkpoint does not have: {', '.join(strange)}")
    problems += _misfits(state, {key: _shape_there(leaf, wanted[leaf].shape) for leaf, key in keys.items() if key})
    problems += _about_biases(state, places, {key for key in keys.values() if key})
    if problems:
        raise ValueError("\n  ".join([f"state_dict does not fit {architecture.name!r}:", *problems]))
    flattened = {place.path: place.flattened for place in places}
    variables = {leaf: _ours(state[str(key)], leaf, wanted[leaf].dtype, flattened) for leaf, key in keys.items()}
    return traverse_util.unflatten_dict(variables)


def like_torch(architecture: spec.Architecture, state_dict: Mapping[str, Any]) -> spec.Architecture:
    """The architecture with the biases that a checkpoint has, and with PyTorch's padding.

    PyTorch pads both sides alike. Our "SAME" does so too, except that for strides it pads less above and on the left if
    it can: there (k - 1) / 2 on every side takes its place, which gives the same shapes.

    Args:
      architecture: layers as the checkpoint has them, quadratic ones included.
      state_dict: as in `from_torch_state_dict`.

    Returns:
      The architecture to import the checkpoint into.

    Raises:
      ValueError: for an architecture that is neither layers in a row nor a ResNet of named stages.
    """
    state = _plain(state_dict)
    biased = {p.path: any(name in state for name in _bias_names(p)) for p in _places(architecture, state)}
    uneven = _uneven(architecture)
    for path, layer in spec.walk(architecture):
        if not isinstance(layer, spec.Conv | spec.Dense) or path not in biased:
            continue
        new = dataclasses.replace(layer, bias=biased[path])
        if isinstance(new, spec.Conv) and path in uneven and all(k % 2 for k in new.kernel):
            new = dataclasses.replace(new, padding=tuple(((k - 1) // 2, (k - 1) // 2) for k in new.kernel))
        architecture = spec.edit(architecture, _always(new), _only(path))
    return architecture


def _always(new: Any) -> Callable[[Any], Any]:
    return lambda layer: new


def _only(path: str) -> Callable[[str, Any], bool]:
    return lambda at, layer: at == path


# --- names ------------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a checkpoint keeps a layer.

    Attributes: the layer's path in the architecture, the layer, the names of its module and of the norm after it, and
    the shape (H, W, C) of the map that its input was flattened from, or None.
    """

    path: str
    layer: Any
    module: str
    norm: str
    flattened: tuple[int, ...] | None = None


def _places(architecture: spec.Architecture, state: Mapping[str, Any]) -> Iterator[_Place]:
    blocks = any(isinstance(layer, spec.Residual) for layer in architecture.layers)
    dense = sum(isinstance(layer, spec.Dense) for layer in architecture.layers)
    heads = sorted({key.removesuffix(".weight") for key in state if _is_linear(key, state[key])}, key=_natural)
    heads = heads if len(heads) == dense else []
    yield from _of_blocks(architecture, state, heads) if blocks else _in_a_row(architecture, heads)


def _in_a_row(architecture, heads) -> Iterator[_Place]:
    table = spec.shapes(architecture)
    single = sum(isinstance(layer, spec.Dense) for layer in architecture.layers) == 1
    section, position, flattened = "features", 0, None
    for layer in architecture.layers:
        if isinstance(layer, spec.Conv | spec.Dense):
            name = f"{section}.{position}"
            if isinstance(layer, spec.Dense):
                name = heads.pop(0) if heads else "classifier" if single else name
            yield _Place(layer.name, layer, name, f"{section}.{position + 1}", flattened)
            position += 1 + bool(layer.norm) + bool(layer.act)
            flattened = None
        elif isinstance(layer, spec.GlobalPool | spec.Flatten):
            shape = table[layer.name].input
            section, position, flattened = "classifier", 0, shape if isinstance(layer, spec.Flatten) else None
        elif isinstance(layer, spec.Pool | spec.Dropout):
            position += 1
        else:
            raise ValueError(
                f"layer {layer.name!r} of {architecture.name!r} is a {type(layer).__name__}, for which checkpoints in "
                "torchvision's or QuadraLib's naming have no name"
            )


def _of_blocks(architecture, state, heads) -> Iterator[_Place]:
    shortcut = "downsample" if any(".downsample." in key for key in state) else "shortcut"
    blocks: Counter[str] = Counter()
    for position, layer in enumerate(architecture.layers):
        if isinstance(layer, spec.Conv):
            if position:
                raise ValueError(f"a ResNet checkpoint has one convolution before its blocks, not {layer.name!r} too")
            yield _Place(layer.name, layer, "conv1", "bn1")
        elif isinstance(layer, spec.Dense):
            name = heads.pop(0) if heads else "linear"
            yield _Place(layer.name, layer, name, "")
        elif isinstance(layer, spec.Residual):
            stage = re.fullmatch(r"stage(\d+)_block\d+", layer.name)
            if stage is None:
                raise ValueError(f"residual block {layer.name!r} must be called stage<s>_block<i> to find its weights")
            block = f"layer{stage[1]}.{blocks[stage[1]]}"
            blocks[stage[1]] += 1
            convs = [inner for inner in layer.body if isinstance(inner, spec.Conv)]
            for index, inner in enumerate(convs, start=1):
                yield _Place(f"{layer.name}/{inner.name}", inner, f"{block}.conv{index}", f"{block}.bn{index}")
            if isinstance(layer.shortcut, spec.Conv):
                path = f"{layer.name}/{layer.shortcut.name}"
                yield _Place(path, layer.shortcut, f"{block}.{shortcut}.0", f"{block}.{shortcut}.1")


def _key(places: list[_Place], leaf: Leaf) -> str | None:
    """The checkpoint's name for a variable of ours, (collection, *path, name); None where it has none."""
    for place in places:
        path = tuple(place.path.split("/"))
        if leaf[1 : 1 + len(path)] == path:
            break
    else:
        return None
    # Norms stand in the layer or beside it.
    names = [name for name in leaf[1 + len(path) :] if name != "layer"]
    if place.layer.kind not in KINDS or (len(names) > 1 and names[-1] not in _ATTRIBUTES):
        return None
    if names[0] in ("norm_out", "norm"):
        return f"{place.norm}.{_ATTRIBUTES[names[-1]]}" if place.norm else None
    part, _, projection = names[0].partition("_")
    if part not in ("kernel", "bias", "norm"):
        return None
    attribute = "weight" if part == "kernel" else _ATTRIBUTES[names[-1]] if part == "norm" else "bias"
    if place.layer.kind == "first_order":
        return None if part == "norm" else f"{place.module}.{attribute}"
    index = [p.name for p in kinds.get(place.layer.kind).projections].index(projection) + 1
    return f"{place.module}.{'bn' if part == 'norm' else 'conv'}{index}.{attribute}"


def _bias_names(place: _Place) -> list[str]:
    if place.layer.kind == "first_order":
        return [f"{place.module}.bias"]
    return [f"{place.module}.conv{index}.bias" for index, _ in enumerate(kinds.get(place.layer.kind).projections, 1)]


def _plain(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint without prefixes and counters."""
    plain: dict[str, Any] = {}
    for key, value in state_dict.items():
        if key.endswith("num_batches_tracked"):
            continue
        if not hasattr(value, "shape"):
            raise ValueError(
                f"state_dict[{key!r}] is a {type(value).__name__}, not an array; if it is a dictionary of them "
                f"(as in checkpoints with 'net' or 'state_dict' inside), pass that: state_dict[{key!r}]"
            )
        name = key.removeprefix("module.")
        if name in plain:
            raise ValueError(f"state_dict has both {name!r} and 'module.{name}'; leave one of them out")
        plain[name] = value
    return plain


def _is_linear(key: str, value: Any) -> bool:
    return key.endswith(".weight") and len(value.shape) == 2


def _natural(name: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


# --- what does not fit ------------------------------------------------------------------------------------------------


def _unlike(architecture: spec.Architecture) -> list[str]:
    """Where an architecture does what QuadraLib's and torchvision's networks do not."""
    problems = []
    for path, layer in spec.walk(architecture):
        if not isinstance(layer, spec.Conv | spec.Dense):
            continue
        able = KINDS if isinstance(layer, spec.Conv) else KINDS[:1]
        if layer.kind not in able:
            problems.append(f"layer {path!r}: kind {layer.kind!r} is not among {', '.join(map(repr, able))}")
        for argument in ("norm", "branch_norm"):
            if getattr(layer, argument) not in (None, "batch"):
                problems.append(f"layer {path!r}: {argument}={getattr(layer, argument)!r}, expected None or 'batch'")
    if uneven := _uneven(architecture):
        problems.append(
            f"padding='SAME' of {', '.join(uneven)} pads one side more than the other, which PyTorch does not: take "
            "like_torch(architecture, state_dict)"
        )
    return problems


def _uneven(architecture: spec.Architecture) -> list[str]:
    table = spec.shapes(architecture)
    paths = []
    for path, layer in spec.walk(architecture):
        if isinstance(layer, spec.Conv) and layer.padding == "SAME":
            pads = lax.padtype_to_pads(table[path].input[:2], layer.kernel, layer.strides, "SAME")
            if any(low != high for low, high in pads):
                paths.append(path)
    return paths


def _misfits(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing, extra = sorted(shapes.keys() - state.keys(), key=_natural), sorted(state.keys() - shapes.keys())
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"extra: {', '.join(sorted(extra, key=_natural))}"] if extra else []
    for key, shape in shapes.items():
        if key in state and tuple(state[key].shape) != shape:
            problems.append(f"wrong shape: {key} is {tuple(state[key].shape)}, expected {shape}")
        if key in state and not jnp.issubdtype(np.asarray(state[key]).dtype, jnp.floating):
            problems.append(f"wrong dtype: {key} is {state[key].dtype}, expected floating point (dequantise it first)")
    return problems


def _about_biases(state: Mapping[str, Any], places: list[_Place], wanted: set[str]) -> list[str]:
    """What to change in the architecture if nothing but biases is missing or too much in some layers."""
    problems = []
    for bias, unmatched in ((True, state.keys() - wanted), (False, wanted - state.keys())):
        if layers := [place.path for place in places if any(name in unmatched for name in _bias_names(place))]:
            problems.append(
                f"the checkpoint has {'' if bias else 'no '}biases in {', '.join(layers)}: these layers of the "
                f"architecture need bias={bias}, which like_torch(architecture, state_dict) sets"
            )
    return problems


# --- arrays -----------------------------------------------------------------------------------------------------------


def _wanted(network: nn.Module, architecture: spec.Architecture) -> dict[Leaf, Any]:
    example = jax.ShapeDtypeStruct((1, *architecture.input_shape), jnp.float32)
    return traverse_util.flatten_dict(jax.eval_shape(network.init, jax.random.key(0), example))


def _shape_there(leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not leaf[-1].startswith("kernel"):
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _ours(value: Any, leaf: Leaf, dtype: Any, flattened: Mapping[str, tuple[int, ...] | None]) -> jax.Array:
    array = np.asarray(value)
    if leaf[-1].startswith("kernel") and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif leaf[-1].startswith("kernel"):
        if (space := flattened[leaf[1]]) is not None:
            height, width, channels = space
            # PyTorch flattens channel by channel, we position by position.
            array = array.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(array.shape)
        array = array.T
    return jnp.array(array, dtype)
