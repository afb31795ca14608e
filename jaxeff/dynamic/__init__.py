"""Dynamic pruning by attention: for every input, the channels and columns that matter, and time saved for the rest."""

from jaxeff.dynamic.accounting import GatedCost, counted_macs, densities
from jaxeff.dynamic.attention import channel_attention, column_attention
from jaxeff.dynamic.budget import choose_ratios, ratios_within_macs, ratios_within_seconds, snap_ratios
from jaxeff.dynamic.cascade import ExitCurve, ExitPoint, Traversal, at_resolution, exit_curve, traverse
from jaxeff.dynamic.convolution import ENGINES, Engine, conv
from jaxeff.dynamic.gate import blocks, gate, readers
from jaxeff.dynamic.learned import (
    BoostedConv,
    ChannelGatedConv,
    boosted_conv,
    channel_gated_conv,
    gate_densities,
    gate_losses,
)
from jaxeff.dynamic.linen import Gated, GatedCall, GatedConvolution, gate_layer, gated, gated_calls
from jaxeff.dynamic.masks import keep_count, mask_of, top_k_indices, top_k_mask
from jaxeff.dynamic.selection import Kept, Reader, masked, masked_by_ratio, select
from jaxeff.dynamic.sensitivity import DIMENSIONS, Sensitivity, sensitivity
from jaxeff.dynamic.settings import DynamicSpec
from jaxeff.dynamic.speed import LayerSpeed, SpeedReport, dense_forms, speed_report
from jaxeff.dynamic.targeted_dropout import (
    ASCENT,
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
    "ASCENT",
    "BoostedConv",
    "ChannelGatedConv",
    "DIMENSIONS",
    "ENGINES",
    "DynamicSpec",
    "Engine",
    "ExitCurve",
    "ExitPoint",
    "Gated",
    "GatedCall",
    "GatedConvolution",
    "GatedCost",
    "Kept",
    "LayerSpeed",
    "Reader",
    "Sensitivity",
    "SpeedReport",
    "Traversal",
    "ascent_steps",
    "at_resolution",
    "block_paths",
    "blocks",
    "boosted_conv",
    "calibrate",
    "channel_gated_conv",
    "channel_attention",
    "choose_ratios",
    "column_attention",
    "conv",
    "counted_macs",
    "dense_forms",
    "densities",
    "exit_curve",
    "gate",
    "gate_densities",
    "gate_layer",
    "gate_losses",
    "gated",
    "gated_calls",
    "keep_count",
    "mask_of",
    "masked",
    "masked_by_ratio",
    "ratio_ascent",
    "ratio_variables",
    "ratios_within_macs",
    "ratios_within_seconds",
    "readers",
    "sandwich",
    "select",
    "sensitivity",
    "snap_ratios",
    "speed_report",
    "targeted_dropout",
    "top_k_indices",
    "top_k_mask",
    "traverse",
    "tune",
    "with_ratios",
]
