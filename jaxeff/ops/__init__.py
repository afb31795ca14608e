"""Operations that are fast everywhere, also as gradients inside loops and under `vmap` on CPU."""

from jaxeff.ops.activations import ACTIVATIONS, activation
from jaxeff.ops.conv import conv_general_dilated, conv_impl
from jaxeff.ops.grouped import channel_major, group_major, group_major_kernel, grouped_conv, grouped_dense
from jaxeff.ops.norms import NORMS, Moments, Norm, NormVariables, moments, normalise
from jaxeff.ops.pooling import avg_pool, global_avg_pool, max_pool

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "Moments",
    "Norm",
    "NormVariables",
    "activation",
    "avg_pool",
    "channel_major",
    "conv_general_dilated",
    "conv_impl",
    "global_avg_pool",
    "group_major",
    "group_major_kernel",
    "grouped_conv",
    "grouped_dense",
    "max_pool",
    "moments",
    "normalise",
]
