"""Dynamic pruning by attention: for every input, the channels and columns that matter, and time saved for the rest."""

from jaxeff.dynamic.accounting import GatedCost, counted_macs, densities
from jaxeff.dynamic.attention import channel_attention, column_attention
from jaxeff.dynamic.convolution import ENGINES, Engine, conv
from jaxeff.dynamic.gate import blocks, gate
from jaxeff.dynamic.linen import Gated, GatedConvolution, gate_layer, gated
from jaxeff.dynamic.masks import keep_count, mask_of, top_k_indices, top_k_mask
from jaxeff.dynamic.selection import Kept, Reader, masked, masked_by_ratio, select
from jaxeff.dynamic.settings import DynamicSpec

__all__ = [
    "ENGINES",
    "DynamicSpec",
    "Engine",
    "Gated",
    "GatedConvolution",
    "GatedCost",
    "Kept",
    "Reader",
    "blocks",
    "channel_attention",
    "column_attention",
    "conv",
    "counted_macs",
    "densities",
    "gate",
    "gate_layer",
    "gated",
    "keep_count",
    "mask_of",
    "masked",
    "masked_by_ratio",
    "select",
    "top_k_indices",
    "top_k_mask",
]
