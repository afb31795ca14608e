"""Ratios of every block under a budget of multiply-accumulates or of time, at the least loss of accuracy.

The loss of a choice is taken as the sum of what each block loses alone (`jaxeff.dynamic.sensitivity`), its cost as the
sum over blocks. Both are additive, so the best choice is found exactly, by dynamic programming over the budget.

Letters: B blocks, R ratios of the grid.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from jaxeff import costs, spec
from jaxeff.dynamic import convolution
from jaxeff.dynamic.accounting import counted_macs
from jaxeff.dynamic.gate import blocks, readers
from jaxeff.dynamic.linen import gated_calls, parameter_bytes
from jaxeff.dynamic.sensitivity import DIMENSIONS, Sensitivity
from jaxeff.dynamic.speed import dense_forms
from jaxeff.dynamic.targeted_dropout import with_ratios
from jaxeff.dynamic.tune import with_engine
from jaxeff.ops import autotune


def ratios_within_macs(
    architecture: spec.Architecture,
    report: costs.CostReport,
    found: Sensitivity,
    share: float,
    *,
    dimensions: Sequence[str] = ("channels",),
    conv: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Ratios at which the network counts no more than a share of its multiply-accumulates.

    Args:
      architecture: with gates in every block.
      report: `jaxeff.costs.analyze` of the network without gates, for one image.
      found: how much accuracy each block loses.
      share: of all multiply-accumulates, in (0, 1].
      dimensions: what may be dropped, of "channels" and "columns".
      conv: convolution factory of the network, where its layers have gates that learn: the share is then of what these
        leave.

    Returns:
      [B, 2], channels and columns, for `jaxeff.dynamic.with_ratios` or `ratio_ascent`.

    Raises:
      ValueError: for unknown dimensions, or a budget that cannot be met; the smallest reachable is named.
    """
    options = _options(found, dimensions)
    owner = _blocks_of_readers(architecture)
    rows = np.zeros((len(found.names), len(options)))
    for column, option in enumerate(options):
        table = counted_macs(with_ratios(architecture, [_pair(found, option)] * len(rows)), report, conv=conv)
        for path, block in owner.items():
            rows[block, column] += table[path].counted
    total = table["total"].dense
    rest = table["total"].counted - sum(table[path].counted for path in owner)
    try:
        return _chosen(found, options, rows, share * total - rest)
    except ValueError as error:
        least = (rows.min(1).sum() + rest) / total
        raise ValueError(
            f"share={share:g} of the multiply-accumulates cannot be met: the least is {least:.3g}"
        ) from error


def ratios_within_seconds(
    network: nn.Module,
    x: Any,
    architecture: spec.Architecture,
    found: Sensitivity,
    share: float,
    *,
    dimensions: Sequence[str] = ("channels",),
    rounds: int = 5,
) -> np.ndarray:
    """Ratios at which the gated convolutions take no more than a share of their time without gates.

    Measures every exact engine of every gated convolution at every ratio: seconds per layer and ratio.

    Args:
      network: runs the architecture, for example `jaxeff.models.Network`.
      x: an input of the batch size that matters, an array or `jax.ShapeDtypeStruct`.
      architecture: with gates in every block.
      found: how much accuracy each block loses.
      share: of the time of the fastest dense forms, in (0, 1].
      dimensions: what may be dropped, of "channels" and "columns".
      rounds: how often everything is timed, in turn.

    Returns:
      [B, 2], channels and columns.

    Raises:
      ValueError: for unknown dimensions, or a budget that cannot be met; the smallest reachable is named.
    """
    options = _options(found, dimensions)
    owner = _blocks_of_readers(architecture)
    rows, dense, measured = np.zeros((len(found.names), len(options))), 0.0, {}
    footprint = parameter_bytes(network, x)
    for call in gated_calls(network, x):
        if _leaves_out_outputs_alone(call, owner):
            continue
        name = call.signature
        if name not in measured:
            measured[name] = _layer_seconds(call, [_pair(found, option) for option in options], rounds, footprint)
        rows[_owner(owner, call.path)] += measured[name][0]
        dense += measured[name][1]
    try:
        return _chosen(found, options, rows, share * dense)
    except ValueError as error:
        least = rows.min(1).sum() / dense
        raise ValueError(f"share={share:g} of the dense time cannot be met: the least is {least:.3g}") from error


def snap_ratios(
    network: nn.Module, x: Any, architecture: spec.Architecture, *, tolerance: float = 0.02, rounds: int = 7
) -> spec.Architecture:
    """Lets every gate keep as many channels as it can in the time that its ratio takes.

    Time is a staircase in the number of channels: products have widths that they are fast at, and engines change. Each
    gate moves to the highest step that is no slower than where it stands.

    Args:
      network: runs the architecture, for example `jaxeff.models.Network`.
      x: an input of the batch size that matters, an array or `jax.ShapeDtypeStruct`.
      architecture: with gates.
      tolerance: how much slower is no slower.
      rounds: how often everything is timed, in turn.

    Returns:
      The architecture with ratios of channels that are as low as before or lower.
    """
    footprint = parameter_bytes(network, x)
    for call in gated_calls(network, x):
        settings = call.settings
        groups = call.x.shape[-1] // settings.group_size
        kept = settings.groups_kept(call.x.shape[-1])
        # The next multiples of what products are fast at, as far as a quarter of the channels away.
        steps = {-(-kept * settings.group_size // unit) * unit / settings.group_size for unit in (4, 8, 16, 32, 64)}
        counts = [kept, *sorted(int(n) for n in steps if n % 1 == 0 and kept < n <= min(groups, kept + groups // 4))]
        if kept == groups or len(counts) == 1:
            continue
        pairs = [(1 - n / groups, settings.columns) for n in counts]
        seconds, _ = _layer_seconds(call, pairs, rounds, footprint)
        best = max(n for n, time in zip(counts, seconds, strict=True) if time <= (1 + tolerance) * seconds[0])
        changed = dataclasses.replace(settings, channels=1 - best / groups)
        architecture = spec.gate(architecture, changed, call.path.removesuffix("/layer"))
    return architecture


def choose_ratios(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float, *, steps: int = 2000
) -> tuple[int, ...]:
    """One option for each block, of the least total loss whose total cost keeps a budget.

    Args:
      costs: of every option of every block, counted MACs or seconds; not negative.
      losses: of the same options, for example the fall in accuracy of `Sensitivity`.
      budget: what the costs may add up to.
      steps: how finely costs are told apart; they are rounded up, so the budget is kept whatever this is.

    Returns:
      The index of the option of each block.

    Raises:
      ValueError: if no choice keeps the budget, of which the smallest reachable cost is named; for steps below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    least = sum(min(row) for row in costs)
    if least > budget * (1 + 1e-9):
        raise ValueError(f"budget={budget:.6g} cannot be met: the cheapest options together cost {least:.6g}")
    # Costs are rounded up below, which would refuse a budget that the choice of no loss meets exactly.
    free = tuple(int(np.argmin(row)) for row in losses)
    if sum(row[option] for row, option in zip(costs, free, strict=True)) <= budget * (1 + 1e-9):
        return free
    # From the cheapest choice on, what each option costs more, in steps of what is left of the budget.
    # Where nothing is left, whatever costs more is too much.
    smallest = min((cost for row in costs for cost in row if cost > 0), default=1.0)
    unit = max(budget - least, 1e-9 * smallest) / steps
    best = np.full(steps + 1, np.inf)
    best[0] = 0.0
    chosen: list[np.ndarray] = []
    for row, loss in zip(costs, losses, strict=True):
        more = [_steps_of(cost - min(row), unit) for cost in row]
        options = np.full((len(row), steps + 1), np.inf)
        for i, (extra, value) in enumerate(zip(more, loss, strict=True)):
            if extra <= steps:
                options[i, extra:] = best[: steps + 1 - extra] + value
        chosen.append(options.argmin(0))
        best = options.min(0)
    at, picks = int(best.argmin()), []
    for row, pick in zip(reversed(costs), reversed(chosen), strict=True):
        option = int(pick[at])
        picks.append(option)
        at -= _steps_of(row[option] - min(row), unit)
    return tuple(reversed(picks))


def _steps_of(cost: float, unit: float) -> int:
    """Steps of a cost, rounded up; what is meant by three units is three of them."""
    return int(np.ceil(round(cost / unit, 6)))


def _options(found: Sensitivity, dimensions: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of places in the grid, of channels and columns."""
    if unknown := sorted(set(dimensions) - set(DIMENSIONS)):
        raise ValueError(f"dimensions are of {', '.join(map(repr, DIMENSIONS))}, got {unknown}")
    places = [range(len(found.grid)) if name in dimensions else (0,) for name in DIMENSIONS]
    return [(i, j) for i in places[0] for j in places[1]]


def _pair(found: Sensitivity, option: tuple[int, int]) -> tuple[float, float]:
    return found.grid[option[0]], found.grid[option[1]]


def _chosen(found, options, rows, budget) -> np.ndarray:
    losses = [[float(found.losses[0, b, i] + found.losses[1, b, j]) for i, j in options] for b in range(len(rows))]
    return np.array([_pair(found, options[i]) for i in choose_ratios(rows.tolist(), losses, budget)])


def _blocks_of_readers(architecture: spec.Architecture) -> dict[str, int]:
    reads = readers(architecture)
    return {reads[path]: index for index, paths in enumerate(blocks(architecture)) for path in paths}


def _leaves_out_outputs_alone(call, owner) -> bool:
    """Whether a layer has a gate that learns, on what it gives, and none on what it reads."""
    return call.features is not None and call.path.removesuffix("/layer") not in owner


def _owner(owner: dict[str, int], path: str) -> int:
    if (layer := path.removesuffix("/layer")) not in owner:
        raise ValueError(
            f"architecture: the gate of {path!r} is of none of its blocks; gates that learn, and layers that hold "
            "their convolution in another one, have no ratios to choose"
        )
    return owner[layer]


def _layer_seconds(call, pairs, rounds, footprint) -> tuple[list[float], float]:
    """Median time of the fastest engine at every pair of ratios, and of the fastest dense form."""
    forms: dict[Any, Any] = {("dense", name): form for name, form in dense_forms(call.window, call.x.dtype).items()}
    for number, (channels, columns) in enumerate(pairs):
        settings = dataclasses.replace(call.settings, channels=channels, columns=columns)
        if channels or columns:
            at = call._replace(settings=settings)
            names = convolution.candidates(settings, call.x, call.window, call.features)
            forms |= {(number, name): with_engine(at, name) for name in names}
    optional = [key for key in forms if key[0] != "dense" and key[1] != "mask"]
    times = {
        key: statistics.median(values)
        for key, values in autotune.seconds(forms, (call.x, call.kernel), rounds, optional, footprint).items()
    }
    dense = min(seconds for key, seconds in times.items() if key[0] == "dense")
    fastest = [
        min((seconds for key, seconds in times.items() if key[0] == number), default=dense)
        for number in range(len(pairs))
    ]
    return fastest, dense
