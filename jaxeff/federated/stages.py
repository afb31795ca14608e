"""Which units of a network are matched in which order, and its variables with other numbers of them.

A network can be matched layer by layer where every layer's units may be permuted one by one, and read nothing but units
that come before them. Layers that share their units, such as a depthwise convolution and the one before it, are one
stage. All of it is found by `derive`, and what cannot be matched is said by name.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff import spec
from jaxeff.federated.permutation import Axis, Fixed, Free, Permutations, Product

Leaves = dict[str, np.ndarray]


class Stage(NamedTuple):
    """Units that are matched together.

    Attributes:
      name: of them, in `Permutations`.
      layers: paths of those that have them.
      leaves: all variables of these layers.
      counted: those of them that the units index, with their last axis.
    """

    name: str
    layers: tuple[str, ...]
    leaves: frozenset[str]
    counted: tuple[str, ...]


def stages_of(architecture: spec.Architecture, found: Permutations) -> tuple[Stage, ...]:
    """The hidden layers of a network, each after all that it reads.

    Args:
      architecture: of the network.
      found: of `derive`, of all its variables, whose names begin with a collection and the path of a layer.

    Raises:
      ValueError: for layers whose units keep their order or are in groups, whose units a sum ties to later ones, and
        for networks that cannot have other widths.
    """
    layers = {path: layer for path, layer in spec.walk(architecture) if isinstance(layer, spec.Conv | spec.Dense)}
    of = _by_layer(layers, found)
    having: dict[str, list[str]] = {}
    for path in list(layers)[:-1]:
        name = _units(found, path, layers[path], of[path])
        # The last of those that share their units says when they are matched.
        having[name] = [*having.pop(name, []), path]
    reading: dict[str, set[str]] = {}
    for name in found.sizes:
        for leaf, axis in found.readers(name):
            if axis < len(found.axes[leaf]) - 1:
                reading.setdefault(leaf, set()).add(name)
    stages: list[Stage] = []
    known: set[str] = set()
    for name, paths in having.items():
        own = [leaf for path in paths for leaf in of[path]]
        if missing := sorted(set().union(*(reading.get(leaf, set()) for leaf in own)) - known):
            tied = ", ".join(dict.fromkeys(layer for other in missing for layer in having.get(other, [other])))
            raise ValueError(
                f"layers {', '.join(paths)} read units that {tied} share, as a shortcut adds them up, and that are not "
                "matched before all of these are; take a network without such shortcuts"
            )
        stages.append(Stage(name, tuple(paths), frozenset(own), tuple(leaf for leaf in own if found.axes[leaf])))
        known.add(name)
    if hidden := sorted(set(found.sizes) - known):
        raise ValueError(f"{', '.join(hidden)} may be permuted, but are units of no layer, and cannot be matched")
    try:
        resized(architecture, stages, {name: size + 1 for name, size in found.sizes.items()})
    except ValueError as error:
        raise ValueError(f"{architecture.name!r} cannot have other widths: {error}") from error
    return tuple(stages)


def widths(stages: Sequence[Stage], sizes: Mapping[str, int]) -> dict[str, int]:
    """Units of each hidden layer, from those of each name."""
    return {path: sizes[stage.name] for stage in stages for path in stage.layers}


def resized(architecture: spec.Architecture, stages: Sequence[Stage], sizes: Mapping[str, int]) -> spec.Architecture:
    """The network with so many units of each name."""
    layers = dict(spec.walk(architecture))
    # Depthwise layers follow the one before.
    given = {p: n for p, n in widths(stages, sizes).items() if getattr(layers[p], "groups", 1) != spec.DEPTHWISE}
    return spec.shrink(architecture, given) if given else architecture


def moved(found: Permutations, leaves: Leaves, places: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> Leaves:
    """`permute` for maps that change how many units there are.

    Args:
      found: of `derive`.
      leaves: variables by path, any of them.
      places: by name, of each new unit the old place, or -1 for zeros; what is not named stays.
      sizes: how many units of each name `leaves` have.
    """
    result = {}
    for path, leaf in leaves.items():
        for number, axis in enumerate(found.axes[path]):
            old, length = _old_places(axis, places, sizes)
            if not np.array_equal(old, np.arange(length)):
                leaf = np.take(leaf, np.maximum(old, 0), axis=number)
                np.moveaxis(leaf, number, 0)[old < 0] = 0
        result[path] = leaf
    return result


def _by_layer(layers: Collection[str], found: Permutations) -> dict[str, list[str]]:
    """Variables of each layer."""
    of: dict[str, list[str]] = {path: [] for path in layers}
    for leaf in found.axes:
        inner = leaf.partition("/")[2]
        owners = [path for path in layers if inner.startswith(f"{path}/")]
        if not owners:
            raise ValueError(f"variable {leaf!r} is of no layer of the architecture; these are {', '.join(layers)}")
        of[max(owners, key=len)].append(leaf)
    return of


def _units(found: Permutations, path: str, layer: Any, leaves: Sequence[str]) -> str:
    """The name of the units of a hidden layer: what the last axis of all its variables counts."""
    last = {found.axes[leaf][-1] for leaf in leaves if found.axes[leaf]}
    axis = next(iter(last), None)
    if len(last) == 1 and isinstance(axis, Free) and axis.size == layer.features:
        return axis.name
    if len(last) == 1 and isinstance(axis, Fixed):
        raise ValueError(f"layer {path!r}: its units cannot be matched, as their order is one {axis.reason}")
    raise ValueError(
        f"layer {path!r}: its {layer.features} units are in groups or have several parts (of a group norm, a grouped "
        "convolution, a padded shortcut or the factors of a neuron), and cannot be matched one by one"
    )


def _old_places(axis: Axis, places: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> tuple[np.ndarray, int]:
    """Of each new entry of an axis the old place, or -1; and the old length."""
    if isinstance(axis, Fixed):
        return np.arange(axis.size), axis.size
    if isinstance(axis, Free):
        size = sizes[axis.name]
        return places.get(axis.name, np.arange(size)), size
    parts = [_old_places(part, places, sizes) for part in axis.parts]
    if isinstance(axis, Product):
        old, length = np.zeros(1, np.int64), 1
        for inner, size in parts:
            old = np.where((old[:, None] < 0) | (inner < 0), -1, old[:, None] * size + inner).reshape(-1)
            length *= size
        return old, length
    starts = np.cumsum([0, *(size for _, size in parts)])
    every = [np.where(inner < 0, -1, inner + start) for (inner, _), start in zip(parts, starts, strict=False)]
    return np.concatenate(every), int(starts[-1])
