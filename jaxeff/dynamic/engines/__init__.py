"""Ways to compute a gated convolution: each gives what masking gives, in less time where the shapes suit it.

Engines know feature maps, kernels and indices, nothing of attention or networks; `jaxeff.dynamic.conv` runs them
behind one signature.
"""

from jaxeff.dynamic.engines.channels import gathered_channels, shared_channels
from jaxeff.dynamic.engines.columns import gathered_both, gathered_columns
from jaxeff.dynamic.engines.fused import Fused, fused_channels
from jaxeff.dynamic.engines.fused_columns import Columns, fused_columns
from jaxeff.dynamic.engines.geometry import Geometry, convolve, geometry, out_size
from jaxeff.dynamic.engines.grouped import grouped_channels, width_slices
from jaxeff.dynamic.engines.native import native_conv, native_misfit
from jaxeff.dynamic.engines.outputs import output_columns, output_tiles
from jaxeff.dynamic.engines.rows import of_groups
from jaxeff.dynamic.engines.slabs import group_slabs, misfit, tile_misfit, tile_slabs

__all__ = [
    "Columns",
    "Fused",
    "Geometry",
    "convolve",
    "fused_channels",
    "fused_columns",
    "gathered_both",
    "gathered_channels",
    "gathered_columns",
    "geometry",
    "group_slabs",
    "grouped_channels",
    "misfit",
    "native_conv",
    "native_misfit",
    "of_groups",
    "out_size",
    "output_columns",
    "output_tiles",
    "shared_channels",
    "tile_misfit",
    "tile_slabs",
    "width_slices",
]
