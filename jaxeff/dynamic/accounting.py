"""What a gated architecture counts: multiply-accumulates that are left, and what choosing them costs.

A convolution that keeps k_c of C channels and k_s of P columns does MACs * k_c / C * k_s / P, and k_o of Q outputs
k_o / Q of that (padding taps included, the convention of the pruning literature). A layer with a gate that learns does
of that what its gate leaves open. Counted is not measured: see `jaxeff.dynamic.speed_report` for the clock.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxeff import costs, spec
from jaxeff.dynamic.settings import DynamicSpec


class GatedCost(NamedTuple):
    """Multiply-accumulates of one layer for one image.

    Attributes:
      dense: of the layer without its gate.
      counted: of what its gate keeps.
      attention: additions of the sums that rank channels and columns, and multiply-accumulates of what a gate learns
        from them; not part of `counted`. Comparing the sums costs next to nothing: one number for each channel and
        column.
    """

    dense: int
    counted: int
    attention: int

    @property
    def reduction(self) -> float:
        """Share of the dense multiply-accumulates that is not counted, in [0, 1)."""
        return 1 - self.counted / self.dense


def densities(architecture: spec.Architecture) -> dict[str, float]:
    """Share of its multiply-accumulates that every convolution does, by path; 1 without a gate of `dynamic.gate`."""
    shapes, found = spec.shapes(architecture), {}
    for path, layer in spec.walk(architecture):
        if isinstance(layer, spec.Conv):
            found[path] = density(layer.gate, *shapes[path]) if isinstance(layer.gate, DynamicSpec) else 1.0
    return found


def counted_macs(
    architecture: spec.Architecture,
    report: costs.CostReport,
    *,
    conv: Callable[..., Any] | None = None,
    opened: Mapping[str, float] | None = None,
) -> dict[str, GatedCost]:
    """Dense and counted multiply-accumulates of every layer.

    Args:
      architecture: with gates, for example of `jaxeff.dynamic.gate`.
      report: `jaxeff.costs.analyze` of the network without these gates, for one image; where gates learn, in the
        "xla" convention, of the network as it is trained, as in use compiled code may leave out what they close.
      conv: convolution factory of the network, where its layers have gates that learn, for example
        `jaxeff.dynamic.boosted_conv()`.
      opened: share of the outputs that such gates leave open, by path, where they do not fix it themselves; see
        `jaxeff.dynamic.gate_densities`.

    Returns:
      By path, for the convolutions and dense layers, and their sum as "total".

    Raises:
      ValueError: if the report has no costs of some layer, or `opened` none of a layer that needs it.
    """
    shapes, share = spec.shapes(architecture), densities(architecture)
    names = {row.name.split("/")[0] for row in report.rows if not row.name.startswith("(")}
    # Linen puts the class of the outermost module before every path.
    root = f"{names.pop()}/" if len(names) == 1 and not names & {layer.name for layer in architecture.layers} else ""
    macs = lambda path: sum(row.macs for row in report.rows if f"{row.name}/".startswith(f"{root}{path}/"))
    table: dict[str, GatedCost] = {}
    for path, layer in spec.walk(architecture):
        if isinstance(layer, spec.Conv | spec.Dense):
            gate = layer.gate if isinstance(layer, spec.Conv) else None
            ranking = _attention(gate, shapes[path].input)
            dense, left = macs(path), share.get(path, 1.0)
            if not dense:
                raise ValueError(f"the report has no multiply-accumulates of layer {path!r}: is it of this network?")
            if isinstance(layer, spec.Conv) and (learned := _learned(conv, layer)) is not None:
                choosing = sum(macs(f"{path}/layer/{name}") for name in learned.choosing)
                ranking += choosing + learned.additions(shapes[path].input)
                dense -= choosing
                if report.convention == "paper":
                    dense = math.prod(shapes[path].output) * math.prod(layer.kernel) * shapes[path].input[-1]
                try:
                    left *= learned.left(shapes[path].input[-1], None if opened is None else opened.get(path))
                except ValueError as error:
                    raise ValueError(f"layer {path!r}: {error}") from error
            table[path] = GatedCost(dense, round(dense * left), ranking)
    table["total"] = GatedCost(*map(sum, zip(*table.values(), strict=True)))
    return table


def density(gate: DynamicSpec, shape: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Share of its multiply-accumulates that a gated convolution of an input (H, W, C) does; `out` is (H', W', ...)."""
    height, width, channels = shape
    tiles, outputs = height * width / gate.tile**2, out[0] * out[1] / gate.tile**2
    kept = gate.groups_kept(channels) * gate.group_size / channels
    if gate.columns:
        kept *= gate.tiles_kept((height, width)) / tiles
    if gate.outputs:
        kept *= gate.tiles_kept((out[0], out[1]), "outputs") / outputs
    return kept


def _attention(gate: object, shape: tuple[int, ...]) -> int:
    if not isinstance(gate, DynamicSpec):
        return 0
    height, width, channels = shape
    return height * width * channels * (bool(gate.channels) + bool(gate.columns or gate.outputs))


def _learned(conv: Callable[..., Any] | None, layer: spec.Conv) -> Any:
    """The module of a layer, if it has a gate that learns."""
    if conv is None:
        return None
    module = conv(layer, name=None, bias=False, groups=layer.groups, dtype=None, param_dtype=jnp.float32)
    return module if hasattr(module, "left") else None
