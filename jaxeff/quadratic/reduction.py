"""Fewer and smaller layers: what is expensive and unimportant is taken out of an architecture."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxeff import costs, spec
from jaxeff.quadratic import kinds
from jaxeff.quadratic.importance import Scores, ri, shares
from jaxeff.quadratic.transplant import has_linear_part, weighted_layers
from jaxeff.spec import DEPTHWISE, Architecture, Conv, Dense, Residual

BUDGETS: tuple[str, ...] = ("params", "macs", "residual_bytes")


class Reduction(NamedTuple):
    """A reduced architecture.

    Attributes:
      architecture: the architecture.
      cost: its costs, what `costs_of` says of it in total.
      steps: what was done, in order: (action, the name of the layer or block, costs after it).
    """

    architecture: Architecture
    cost: costs.LayerCost
    steps: tuple[tuple[str, str, costs.LayerCost], ...]


def reduce(
    architecture: Architecture,
    scores: Scores,
    budget: Mapping[str, float],
    costs_of: Callable[[Architecture], costs.CostReport],
    *,
    reference: costs.LayerCost | None = None,
    actions: str | Sequence[str] = ("remove",),
) -> Reduction:
    """Takes away what has the highest RI until a network fits its budget.

    Where that ends in a network from which nothing more can be taken, what saves most is taken away instead, from the
    start and whatever its RI (`smallest`): a budget is refused only if that does not meet it either.

    What is taken away is a layer, a residual block as a whole, or a depthwise and the pointwise convolution behind it,
    whose parameters, MACs and losses are added up. The shares are those of the network as it is by then.

    Args:
      architecture: the network.
      scores: of its layers.
      budget: the most that "params", "macs" and "residual_bytes" may be: an integer is a number, a float a fraction of
        the reference's.
      costs_of: architecture -> its costs; with residuals where they have a budget. Rows are called
        "<network>/<path>/...", as those of `jaxeff.models.Network` are.
      reference: what fractions refer to, for example `costs_of(first_order).total`.
      actions: one or several, the first that is possible for the highest RI: "remove"; "revert" (to first order, its
        norm behind it); "shrink" (to half its width; of a residual block the width inside). What is removed where the
        shape changes is merged with the next layer or block, which takes over its stride and shortcut.

    Returns:
      The architecture with what was done. Give it weights by `transplant`.

    Raises:
      ValueError: for an unknown budget or action, scores of other layers, a fraction without a reference, or a budget
        that cannot be met: the smallest reachable network is named.
    """
    drops = {row.layer: row.drop for row in scores.rows}
    if unknown := sorted(set(drops) - {path for path, _ in weighted_layers(architecture)}):
        raise ValueError(f"scores are of layers that {architecture.name!r} does not have: {', '.join(unknown)}")
    limits = _limits(budget, reference)

    def by_ri(units, report, possible):
        def rank(unit):
            params_share, macs_share = shares(report, unit.paths)
            share = params_share * macs_share
            return ri(share, sum(drops.get(path, 0.0) for path in unit.paths)), share

        ranked = sorted(units, key=rank, reverse=True)
        return next((step for unit in ranked for step in possible(unit)), None)

    found = _taken_away(architecture, drops, costs_of, limits, actions, by_ri)
    if _fits(found.cost, limits):
        return found
    return smallest(architecture, budget, costs_of, reference=reference, actions=actions, layers=drops)


def smallest(
    architecture: Architecture,
    budget: Mapping[str, float],
    costs_of: Callable[[Architecture], costs.CostReport],
    *,
    reference: costs.LayerCost | None = None,
    actions: str | Sequence[str] = ("remove",),
    layers: Collection[str] | None = None,
) -> Reduction:
    """Takes away what saves most until a network fits its budget; says before any training what a budget can be.

    Counting costs takes seconds, and what a unit saves hardly grows when others go: one that saved less when it was
    last counted than the best does now is not counted again, unless the budget is not met that way.

    Args:
      architecture, budget, costs_of, reference, actions: as in `reduce`.
      layers: paths of the layers that may be touched; None for those of role "body", as in `score`.

    Returns:
      The architecture with what was done.

    Raises:
      ValueError: as `reduce`.
    """
    if layers is None:
        layers = [path for path, layer in weighted_layers(architecture) if layer.role == "body"]
    limits = _limits(budget, reference)

    saved: dict[tuple[str, ...], float] = {}

    def most_saving(units, report, possible):
        def saving(step):
            return sum(
                (getattr(report.total, name) - getattr(step[-1].total, name)) / max(limit, 1)
                for name, limit in limits.items()
            )

        best, most = None, -math.inf
        for unit in sorted(units, key=lambda unit: saved.get(unit.names, math.inf), reverse=True):
            if best is not None and most >= saved.get(unit.names, math.inf):
                break
            if (step := max(possible(unit), key=saving, default=None)) is None:
                continue
            if saving(step) > most:
                best, most = step, saving(step)
            if not exact and saving(step) > 0:
                saved[unit.names] = saving(step)
        return best

    exact = False
    found = _taken_away(architecture, layers, costs_of, limits, actions, most_saving)
    if not _fits(found.cost, limits):
        exact = True
        saved.clear()
        found = _taken_away(architecture, layers, costs_of, limits, actions, most_saving)
    if not _fits(found.cost, limits):
        reached = ", ".join(f"{name} {getattr(found.cost, name):,} (budget {limits[name]:,})" for name in limits)
        raise ValueError(
            f"budget {dict(budget)} cannot be met: the smallest network that actions={actions} reach from "
            f"{architecture.name!r} has {reached}; allow more or further actions of {', '.join(ACTIONS)}"
        )
    return found


def _taken_away(architecture, layers, costs_of, limits, actions, choose) -> Reduction:
    """Does what `choose` chooses of what is possible with the units until it fits or nothing is possible."""
    actions = (actions,) if isinstance(actions, str) else tuple(actions)
    if not actions or not set(actions) <= set(ACTIONS):
        raise ValueError(f"actions must be some of {', '.join(map(repr, ACTIONS))}, got {actions}")
    report = costs_of(architecture)
    if "residual_bytes" in limits and report.total.residual_bytes is None:
        raise ValueError("budget has residual_bytes, but costs_of does not count them; analyze with residuals=True")
    done: list[tuple[str, str, costs.LayerCost]] = []
    while not _fits(report.total, limits):
        possible = partial(_possible, architecture, report, costs_of, limits, actions)
        step = choose(_units(architecture, layers), report, possible)
        if step is None:
            break
        action, name, architecture, report = step
        done.append((action, name, report.total))
    return Reduction(architecture, report.total, tuple(done))


def _possible(
    architecture, report, costs_of, limits, actions, unit
) -> Iterator[tuple[str, str, Architecture, costs.CostReport]]:
    """Yields what can be done with a unit without a cost that rises: action, name, architecture and costs after it."""
    for action in actions:
        if (smaller := ACTIONS[action](architecture, unit)) is None:
            continue
        after = costs_of(smaller)
        if all(getattr(after.total, name) <= getattr(report.total, name) for name in limits):
            yield action, unit.names[-1], smaller, after


def _fits(cost: costs.LayerCost, limits: Mapping[str, int]) -> bool:
    return all(getattr(cost, name) <= limit for name, limit in limits.items())


class _Unit(NamedTuple):
    """Neighbouring top-level layers that are removed together, and the paths of the weighted layers inside."""

    names: tuple[str, ...]
    paths: tuple[str, ...]


def _units(architecture: Architecture, scored: Collection[str]) -> list[_Unit]:
    units: list[_Unit] = []
    layers = list(architecture.layers)
    while layers:
        layer = layers.pop(0)
        members = [layer]
        if isinstance(layer, Conv) and layer.groups == DEPTHWISE and layers and _pointwise(layers[0]):
            members.append(layers.pop(0))
        names = tuple(member.name for member in members)
        paths = tuple(path for path, _ in weighted_layers(architecture) if path.split("/")[0] in names)
        if any(path in scored for path in paths):
            units.append(_Unit(names, paths))
    return units


def _pointwise(layer: Any) -> bool:
    return isinstance(layer, Conv) and layer.kernel == (1, 1) and layer.groups == 1


def _removed(architecture: Architecture, unit: _Unit) -> Architecture | None:
    """Without a unit; where it changes the shape, the next one does it in its place. None where that is impossible."""
    shapes = spec.shapes(architecture)
    names = [layer.name for layer in architecture.layers]
    first, last = (names.index(name) for name in (unit.names[0], unit.names[-1]))
    gone = architecture.layers[first : last + 1]
    before, after = shapes[unit.names[0]].input, shapes[unit.names[-1]].output
    weighted = [layer for layer in architecture.layers if isinstance(layer, Conv | Dense | Residual)]
    if all(layer.name in unit.names or getattr(layer, "role", "body") != "body" for layer in weighted):
        return None  # nothing would be left
    try:
        if before != after:
            index = next((i for i in range(last + 1, len(names)) if architecture.layers[i] in weighted), None)
            if index is None:
                return None
            layers = list(architecture.layers)
            layers[index] = _taking_over(layers[index], gone, shapes)
            architecture = dataclasses.replace(architecture, layers=tuple(layers))
        return spec.remove(architecture, *unit.names)
    except ValueError:
        return None


def _taking_over(layer: Any, gone: Sequence[Any], shapes: Mapping[str, spec.Shape]) -> Any:
    """A layer that also does the stride of those that go, and what their shortcut did."""
    inside = [conv for removed in gone for conv in (removed.body if isinstance(removed, Residual) else (removed,))]
    vertical = horizontal = 1
    for conv in inside:
        if isinstance(conv, Conv):
            vertical, horizontal = vertical * conv.strides[0], horizontal * conv.strides[1]

    def strided(conv):
        return dataclasses.replace(conv, strides=(vertical * conv.strides[0], horizontal * conv.strides[1]))

    if isinstance(layer, Residual):
        shortcut = layer.shortcut
        if isinstance(shortcut, Conv):
            shortcut = strided(shortcut)
        elif shortcut == "identity":
            shortcut = next((r.shortcut for r in gone if isinstance(r, Residual)), shortcut)
            if isinstance(shortcut, Conv):
                shortcut = dataclasses.replace(shortcut, features=shapes[layer.name].output[-1])
        body = (strided(layer.body[0]) if isinstance(layer.body[0], Conv) else layer.body[0], *layer.body[1:])
        return dataclasses.replace(layer, body=body, shortcut=shortcut)
    return strided(layer) if isinstance(layer, Conv) else layer


def _reverted(architecture: Architecture, unit: _Unit) -> Architecture | None:
    """With first-order layers in a unit; None where they are that already, or one has no first-order part."""

    def first_order(layer):
        norm, bias = layer.norm or layer.branch_norm, layer.bias
        if bias is None and layer.branch_norm is None and norm not in (None, "batch"):
            bias = True  # a quadratic neuron's bias stands inside of it, and such a norm does not take it away
        return dataclasses.replace(layer, kind="first_order", branch_norm=None, norm=norm, bias=bias)

    others = [layer for path, layer in weighted_layers(architecture) if path in unit.paths]
    others = [layer for layer in others if layer.kind != "first_order"]
    if not others or not all(map(has_linear_part, others)):
        return None
    return spec.edit(architecture, first_order, lambda path, layer: path in unit.paths and layer.kind != "first_order")


def _shrunk(architecture: Architecture, unit: _Unit) -> Architecture | None:
    """With half the width of a unit, of a residual block inside of it; None where that is impossible."""
    layers = dict(weighted_layers(architecture))
    block = next(layer for layer in architecture.layers if layer.name == unit.names[0])
    if isinstance(block, Residual):
        body = [f"{block.name}/{layer.name}" for layer in block.body]
        paths = [path for path in body if path in layers][:-1]
    else:
        paths = [unit.paths[-1]]
    widths = {path: layers[path].features // 2 for path in paths}
    try:
        for path, features in widths.items():
            kinds.get(layers[path].kind).neurons(features)
        return spec.shrink(architecture, widths) if widths else None
    except ValueError:
        return None


ACTIONS: dict[str, Callable[[Architecture, _Unit], Architecture | None]] = {
    "remove": _removed,
    "revert": _reverted,
    "shrink": _shrunk,
}


def _limits(budget: Mapping[str, float], reference: costs.LayerCost | None) -> dict[str, int]:
    if not budget or not set(budget) <= set(BUDGETS):
        raise ValueError(f"budget must have some of {', '.join(BUDGETS)}, got {sorted(budget)}")
    limits: dict[str, int] = {}
    for name, given in budget.items():
        value: Any = given.item() if hasattr(given, "item") else given
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"budget {name} must be a positive number, an integer or a fraction, got {value!r}")
        if not isinstance(value, int):
            if reference is None or getattr(reference, name) is None:
                raise ValueError(f"budget {name}={value} is a fraction; pass reference= with its {name}, or an integer")
            value = value * getattr(reference, name)
        limits[name] = int(value)
    return limits
