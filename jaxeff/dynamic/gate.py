"""Gates in architectures: which layers can have one, and where the saving is.

A gate drops channels and columns of what a convolution gives; the saving is in the convolution that reads it. So a gate
is asked for by the layer that gives (AntiDote's tables name those), and stands, in `spec.Conv.gate`, at the input of
the layer that reads, after any pooling between the two. Where the output of a layer is added to a shortcut, or read by
anything but one convolution without groups, there is nothing to save and no gate.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxeff import spec
from jaxeff.dynamic.settings import DynamicSpec
from jaxeff.spec import Architecture


class _Flow(NamedTuple):
    """Readers by giver, both as paths, and why the other convolutions cannot be gated."""

    readers: dict[str, str]
    reasons: dict[str, str]


def gate(
    architecture: Architecture,
    settings: DynamicSpec | Sequence[DynamicSpec | None] | Mapping[str, DynamicSpec | None],
) -> Architecture:
    """Puts gates behind convolutions.

    Args:
      architecture: VGG, ResNet, MobileNet or any other; it stays as it is.
      settings: one for every layer that can have a gate; or a sequence of one for each of `blocks(architecture)`; or
        {path or glob of layers: settings}, of which the last that matches a layer counts. None is no gate.

    Returns:
      The architecture with `gate` at the convolutions that read what is gated; `models.Network(..., gate=gate_layer)`
      runs it.

    Raises:
      TypeError: for settings that are none.
      ValueError: for a layer that cannot have a gate (named, with the reason), a name that matches none, another number
        of blocks, or a group size or tile that does not fit the map of its layer.
    """
    flow = _flow(architecture)
    by_reader = {flow.readers[giver]: value for giver, value in _by_giver(architecture, flow, settings).items()}
    shapes = spec.shapes(architecture)
    for reader, value in by_reader.items():
        if value is not None:
            (height, width, channels), out = shapes[reader]
            try:
                value.groups_kept(channels)
                value.tiles_kept((height, width))
                value.tiles_kept((out[0], out[1]), "outputs")
            except ValueError as error:
                raise ValueError(f"gate before layer {reader!r} of {architecture.name!r}: {error}") from error
    for reader, value in by_reader.items():
        architecture = spec.gate(architecture, value, reader)
    return architecture


def blocks(architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    """Paths of the layers that can have a gate, in blocks: neighbours whose maps are of one size.

    VGG-16 has five blocks of 2, 2, 3, 3 and 2 such layers (the last convolution is read by the classifier), ResNet-56
    three of nine, the first of each residual block.
    """
    shapes = spec.shapes(architecture)
    found: list[tuple[tuple[int, ...], list[str]]] = []
    for giver in _flow(architecture).readers:
        size = shapes[giver].output[:2]
        if found and found[-1][0] == size:
            found[-1][1].append(giver)
        else:
            found.append((size, [giver]))
    return tuple(tuple(paths) for _, paths in found)


def readers(architecture: Architecture) -> dict[str, str]:
    """Of every layer that can have a gate, the convolution that reads it and where its gate stands; both as paths."""
    return dict(_flow(architecture).readers)


def _by_giver(architecture, flow, settings) -> dict[str, DynamicSpec | None]:
    several = settings.values() if isinstance(settings, Mapping) else settings
    for value in several if isinstance(settings, Mapping | Sequence) else (settings,):
        if value is not None and not isinstance(value, DynamicSpec):
            raise TypeError(f"settings: expected DynamicSpec, or a sequence or mapping of them, got {value!r}")
    if isinstance(settings, DynamicSpec):
        if not flow.readers:
            raise ValueError(f"no layer of {architecture.name!r} can have a gate: {_listed(flow.reasons)}")
        return dict.fromkeys(flow.readers, settings)
    if isinstance(settings, Mapping):
        result: dict[str, DynamicSpec | None] = {}
        known = [*flow.readers, *flow.reasons]
        for pattern, value in settings.items():
            matched = fnmatch.filter(known, pattern)
            if not matched:
                raise ValueError(f"{pattern!r} matches no convolution of {architecture.name!r}: {', '.join(known)}")
            if refused := {path: flow.reasons[path] for path in matched if path in flow.reasons}:
                raise ValueError(f"no gate fits behind these layers of {architecture.name!r}: {_listed(refused)}")
            result |= dict.fromkeys(matched, value)
        return result
    found = blocks(architecture)
    if len(settings) != len(found):
        names = "; ".join(", ".join(paths) for paths in found)
        raise ValueError(
            f"settings has {len(settings)} entries, but {architecture.name!r} has {len(found)} blocks: {names}"
        )
    return {path: value for paths, value in zip(found, settings, strict=True) for path in paths}


def _flow(architecture: Architecture) -> _Flow:
    flow = _Flow({}, {})
    last = _follow(architecture.layers, None, "", flow)
    if last is not None:
        flow.reasons[last] = "nothing reads its output"
    return flow


def _follow(layers, giver: str | None, prefix: str, flow: _Flow) -> str | None:
    """Notes who reads what in a sequence of layers; `giver` made its input, the result is who made its output."""
    for layer in layers:
        path = prefix + layer.name
        reason = None
        if isinstance(layer, spec.Conv):
            if giver is not None and layer.groups == 1:
                flow.readers[giver] = path
            elif layer.groups != 1:
                reason = f"it is read by {path!r}, which has groups: every output needs its own channel"
        elif isinstance(layer, spec.Residual):
            reason = f"it is read by the residual block {path!r}, whose shortcut needs all of it"
        elif not isinstance(layer, spec.Pool | spec.Dropout):
            reason = f"it is read by {path!r}, which is no convolution"
        if giver is not None and reason is not None:
            flow.reasons[giver] = reason
        if isinstance(layer, spec.Residual):
            end = _follow(layer.body, None, path + "/", flow)
            if end is not None:
                flow.reasons[end] = f"its output feeds the residual sum of {path!r}, whose shortcut is whole"
            if isinstance(layer.shortcut, spec.Conv):
                flow.reasons[f"{path}/{layer.shortcut.name}"] = f"its output feeds the residual sum of {path!r}"
            giver = None
        elif isinstance(layer, spec.Conv):
            giver = path
        elif not isinstance(layer, spec.Pool | spec.Dropout):
            giver = None
    return giver


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{path!r}: {reason}" for path, reason in reasons.items())
