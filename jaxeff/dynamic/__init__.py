"""Dynamic pruning by attention: for every input, the channels and columns that matter, and time saved for the rest."""

from jaxeff.dynamic.accounting import GatedCost, counted_macs, densities
from jaxeff.dynamic.attention import channel_attention, column_attention
from jaxeff.dynamic.convolution import ENGINES, Engine, conv
from jaxeff.dynamic.gate import blocks, gate
from jaxeff.dynamic.linen import Gated, GatedCall, GatedConvolution, gate_layer, gated, gated_calls
from jaxeff.dynamic.masks import keep_count, mask_of, top_k_indices, top_k_mask
from jaxeff.dynamic.selection import Kept, Reader, masked, masked_by_ratio, select
from jaxeff.dynamic.sensitivity import Sensitivity, choose_ratios, sensitivity
from jaxeff.dynamic.settings import DynamicSpec
from jaxeff.dynamic.speed import LayerSpeed, SpeedReport, dense_forms, speed_report
from jaxeff.dynamic.targeted_dropout import (
    ascent_steps,
    block_paths,
    calibrate,
    ratio_ascent,
    ratio_variables,
    sandwich,
    targeted_dropout,
    with_ratios,
)
from jaxeff.dynamic.tune import tune

__all__ = [
    "ENGINES",
    "DynamicSpec",
    "Engine",
    "Gated",
    "GatedCall",
    "GatedConvolution",
    "GatedCost",
    "Kept",
    "LayerSpeed",
    "Reader",
    "Sensitivity",
    "SpeedReport",
    "ascent_steps",
    "block_paths",
    "blocks",
    "calibrate",
    "channel_attention",
    "choose_ratios",
    "column_attention",
    "conv",
    "counted_macs",
    "dense_forms",
    "densities",
    "gate",
    "gate_layer",
    "gated",
    "gated_calls",
    "keep_count",
    "mask_of",
    "masked",
    "masked_by_ratio",
    "ratio_ascent",
    "ratio_variables",
    "sandwich",
    "select",
    "sensitivity",
    "speed_report",
    "targeted_dropout",
    "top_k_indices",
    "top_k_mask",
    "tune",
    "with_ratios",
]
