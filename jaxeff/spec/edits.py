"""Edits: pure functions from architecture to architecture, which compose."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxeff.spec.architecture import DEPTHWISE, Architecture, Conv, Dense, Layer, Reshape, Residual, shapes, walk

Select = str | Callable[[str, Any], bool] | None


def edit(architecture: Architecture, change: Callable[[Any], Any], select: Select = None) -> Architecture:
    """Applies `change(layer) -> layer` to every selected convolution and dense layer.

    Args:
      architecture: what to edit; it stays as it is.
      change: returns the new layer, usually by `dataclasses.replace`.
      select: glob over paths ("stage3_*"), predicate (path, layer) -> bool, or None for layers of role "body".

    Returns:
      The edited architecture.

    Raises:
      ValueError: if nothing is selected, or the result does not fit together.
    """
    return _edit(architecture, change, _selector(select), select)


def selected(architecture: Architecture, select: Select = None) -> tuple[str, ...]:
    """Paths of the convolutions and dense layers that `edit` changes with this `select`, in order.

    Raises:
      ValueError: if nothing is selected.
    """
    chosen = _selector(select)
    layers = [(path, layer) for path, layer in walk(architecture) if isinstance(layer, Conv | Dense)]
    found = tuple(path for path, layer in layers if chosen(path, layer))
    if not found:
        raise _no_match(architecture, select)
    return found


def quadratize(
    architecture: Architecture,
    kind: str = "quadralib",
    select: Select = None,
    *,
    branch_norm: str | None = None,
) -> Architecture:
    """Turns the selected layers (by default all of role "body") into neurons of another kind."""
    return edit(architecture, lambda layer: dataclasses.replace(layer, kind=kind, branch_norm=branch_norm), select)


def gate(architecture: Architecture, settings: Any, select: Select = None) -> Architecture:
    """Puts a gate with `settings` on the input of the selected convolutions; None removes it."""
    return _edit(architecture, lambda layer: dataclasses.replace(layer, gate=settings), _convolutions(select), select)


def group(architecture: Architecture, groups: int, select: Select) -> Architecture:
    """Splits the selected convolutions into `groups` channel groups.

    Raises:
      ValueError: if `groups` does not divide the channels of a selected layer, which is named.
    """
    return _edit(architecture, lambda layer: dataclasses.replace(layer, groups=groups), _convolutions(select), select)


def shrink(
    architecture: Architecture,
    widths: float | Mapping[str, int],
    select: Select = None,
    *,
    input_shape: tuple[int, ...] | None = None,
) -> Architecture:
    """Changes the number of output features.

    Args:
      architecture: what to edit.
      widths: a factor for every selected layer (rounded to the nearest integer, at least 1), or {path: features}.
      select: which layers a factor applies to; by default every convolution and every hidden dense layer.
      input_shape: of what the network then reads; None for what it read.

    Returns:
      The architecture with the new widths; depthwise layers follow their input.

    Raises:
      ValueError: for a factor that is not positive, an unknown path, or widths that break a residual sum.
    """
    if isinstance(widths, Mapping):
        known = {path for path, layer in walk(architecture) if isinstance(layer, Conv | Dense)}
        if unknown := sorted(set(widths) - known):
            raise ValueError(f"widths name unknown layers {unknown}; known: {', '.join(sorted(known))}")
        resized = architecture.layers
        for path, features in widths.items():
            resized = _with_features(resized, "", {path: int(features)})
        result = _following_depthwise(architecture, resized, input_shape)
        for path, layer in walk(result):
            if isinstance(layer, Conv) and path in widths and layer.features != int(widths[path]):
                raise ValueError(
                    f"widths give {path!r} {widths[path]} features, but it is depthwise and follows its input, which "
                    f"gives it {layer.features}; change the layer before it"
                )
        return result
    if not (math.isfinite(widths) and widths > 0):
        raise ValueError(f"widths must be a positive factor or a mapping path -> features, got {widths}")
    last = [path for path, layer in walk(architecture) if isinstance(layer, Conv | Dense)][-1]
    chosen = _selector(select) if select is not None else lambda path, layer: path != last
    table = {
        path: max(1, round(layer.features * widths))
        for path, layer in walk(architecture)
        if isinstance(layer, Conv | Dense) and chosen(path, layer)
    }
    return _following_depthwise(architecture, _with_features(architecture.layers, "", table), input_shape)


def remove(architecture: Architecture, *names: str) -> Architecture:
    """Removes top-level layers or residual blocks by name; the next layer takes the shapes that arrive.

    Depthwise layers keep their number of features per channel.

    Raises:
      ValueError: for a name that is not a top-level layer.
    """
    known = [layer.name for layer in architecture.layers]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"cannot remove {unknown}; the top-level layers are: {', '.join(known)}")
    return _following_depthwise(architecture, tuple(x for x in architecture.layers if x.name not in names))


def cut(architecture: Architecture, at: str) -> tuple[Architecture, Architecture]:
    """Two networks, one after the other, of one.

    Args:
      architecture: what to cut; it stays as it is.
      at: the top-level layer or residual block with which the second begins. Layers without weights just before it,
        such as pooling and flattening, go with it.

    Returns:
      What is before, and from there on; the output of one is the input of the other.

    Raises:
      ValueError: if no top-level layer is called so, or nothing with weights is before it.
    """
    names = [layer.name for layer in architecture.layers]
    if at not in names:
        raise ValueError(f"{architecture.name!r} has no top-level layer {at!r}; it has: {', '.join(names)}")
    place = names.index(at)
    while place and not isinstance(architecture.layers[place - 1], Conv | Dense | Residual):
        place -= 1
    if not place:
        raise ValueError(f"nothing before {at!r} of {architecture.name!r} has weights, so there is nothing to cut off")
    before = dataclasses.replace(architecture, layers=architecture.layers[:place])
    shape = shapes(architecture)[names[place - 1]].output
    return before, Architecture(architecture.name, shape, architecture.layers[place:])


def _edit(architecture, change, chosen, select) -> Architecture:
    touched: list[str] = []

    def visit(layers, prefix):
        result = []
        for layer in layers:
            path = prefix + layer.name
            if isinstance(layer, Residual):
                layer = dataclasses.replace(layer, body=visit(layer.body, path + "/"))
                if isinstance(layer.shortcut, Conv):
                    layer = dataclasses.replace(layer, shortcut=visit((layer.shortcut,), path + "/")[0])
            elif isinstance(layer, Conv | Dense) and chosen(path, layer):
                touched.append(path)
                layer = change(layer)
            result.append(layer)
        return tuple(result)

    edited = visit(architecture.layers, "")
    if not touched:
        raise _no_match(architecture, select)
    return dataclasses.replace(architecture, layers=edited)


def _no_match(architecture, select) -> ValueError:
    paths = ", ".join(path for path, layer in walk(architecture) if isinstance(layer, Conv | Dense))
    return ValueError(f"select={select!r} matches no layer of {architecture.name!r}; its layers are: {paths}")


def _selector(select: Select) -> Callable[[str, Any], bool]:
    if select is None:
        return lambda path, layer: layer.role == "body"
    if isinstance(select, str):
        return lambda path, layer: fnmatch.fnmatchcase(path, select)
    return select


def _convolutions(select: Select) -> Callable[[str, Any], bool]:
    chosen = _selector(select)
    return lambda path, layer: isinstance(layer, Conv) and chosen(path, layer)


def _with_features(layers, prefix, table) -> tuple[Layer, ...]:
    result = []
    for layer in layers:
        path = prefix + layer.name
        if isinstance(layer, Residual):
            layer = dataclasses.replace(layer, body=_with_features(layer.body, path + "/", table))
            if isinstance(layer.shortcut, Conv):
                short = _with_features((layer.shortcut,), path + "/", table)[0]
                layer = dataclasses.replace(layer, shortcut=short)
        elif path in table:
            layer = dataclasses.replace(layer, features=table[path])
        result.append(layer)
    return tuple(result)


def _following_depthwise(architecture, layers, input_shape=None) -> Architecture:
    """`architecture` with new `layers`; depthwise ones keep their features per channel, whatever width arrives."""
    old = shapes(architecture)

    def visit(layers, channels, prefix):
        result = []
        for layer in layers:
            path = prefix + layer.name
            if isinstance(layer, Residual):
                body, out = visit(layer.body, channels, path + "/")
                layer = dataclasses.replace(layer, body=body)
                if isinstance(layer.shortcut, Conv):
                    layer = dataclasses.replace(layer, shortcut=visit((layer.shortcut,), channels, path + "/")[0][0])
                channels = out
            elif isinstance(layer, Conv):
                if layer.groups == DEPTHWISE:
                    per_channel = old[path].output[-1] // old[path].input[-1]
                    layer = dataclasses.replace(layer, features=channels * per_channel)
                channels = layer.features
            elif isinstance(layer, Reshape):
                channels = layer.shape[-1]
            result.append(layer)
        return tuple(result), channels

    shape = input_shape or architecture.input_shape
    return dataclasses.replace(architecture, input_shape=shape, layers=visit(layers, shape[-1], "")[0])
