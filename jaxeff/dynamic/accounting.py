"""What a gated architecture counts: multiply-accumulates that are left, and what choosing them costs.

A convolution that keeps k_c of C channels and k_s of P columns does MACs * k_c / C * k_s / P, and k_o of Q outputs
k_o / Q of that (padding taps included, the convention of the pruning literature). Counted is not measured: see
`jaxeff.dynamic.speed_report` for the clock.
"""

from typing import NamedTuple

from jaxeff import costs, spec
from jaxeff.dynamic.settings import DynamicSpec


class GatedCost(NamedTuple):
    """Multiply-accumulates of one layer for one image.

    Attributes:
      dense: of the layer without its gate.
      counted: of what its gate keeps.
      attention: additions of the sums that rank channels and columns; not part of `counted`. Comparing the sums costs
        next to nothing: one number for each channel and column.
    """

    dense: int
    counted: int
    attention: int

    @property
    def reduction(self) -> float:
        """Share of the dense multiply-accumulates that is not counted, in [0, 1)."""
        return 1 - self.counted / self.dense


def densities(architecture: spec.Architecture) -> dict[str, float]:
    """Share of its multiply-accumulates that every convolution does, by path; 1 without a gate."""
    shapes, found = spec.shapes(architecture), {}
    for path, layer in spec.walk(architecture):
        if isinstance(layer, spec.Conv):
            found[path] = density(layer.gate, *shapes[path]) if isinstance(layer.gate, DynamicSpec) else 1.0
    return found


def counted_macs(architecture: spec.Architecture, report: costs.CostReport) -> dict[str, GatedCost]:
    """Dense and counted multiply-accumulates of every layer.

    Args:
      architecture: with gates, for example of `jaxeff.dynamic.gate`.
      report: `jaxeff.costs.analyze` of the network without gates, for one image.

    Returns:
      By path, for the convolutions and dense layers, and their sum as "total".

    Raises:
      ValueError: if the report has no costs of some layer.
    """
    shapes, share = spec.shapes(architecture), densities(architecture)
    names = {row.name.split("/")[0] for row in report.rows if not row.name.startswith("(")}
    # Linen puts the class of the outermost module before every path.
    root = f"{names.pop()}/" if len(names) == 1 and not names & {layer.name for layer in architecture.layers} else ""
    table: dict[str, GatedCost] = {}
    for path, layer in spec.walk(architecture):
        if isinstance(layer, spec.Conv | spec.Dense):
            dense = sum(row.macs for row in report.rows if f"{row.name}/".startswith(f"{root}{path}/"))
            if not dense:
                raise ValueError(f"the report has no multiply-accumulates of layer {path!r}: is it of this network?")
            gate = layer.gate if isinstance(layer, spec.Conv) else None
            counted = round(dense * share.get(path, 1.0))
            table[path] = GatedCost(dense, counted, _attention(gate, shapes[path].input))
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
