"""Exact MACs, parameters and bytes per layer of any jax function, and XLA's own analysis beside them."""

from jaxeff.costs.attribution import analyze
from jaxeff.costs.report import CostReport, LayerCost
from jaxeff.costs.xla import CompiledCost, compiled

__all__ = ["CompiledCost", "CostReport", "LayerCost", "analyze", "compiled"]
