"""Architectures as data: what a network is, without a line of how it computes.

An `Architecture` is a tuple of frozen layer descriptions. Every change that a method makes to a network (quadratic
layers, gates, groups, other widths, fewer layers) is a pure function from architecture to architecture, so methods
compose and no network is written twice. `jaxeff.models.Network` turns an architecture into a Flax module.

>>> net = Architecture("tiny", (8, 8, 1), (Conv("conv1", 16), Pool("pool"), GlobalPool("mean"), Dense("head", 10)))
>>> [layer.kind for _, layer in walk(quadratize(net)) if isinstance(layer, Conv)]
['quadralib']
>>> shapes(net)["pool"].output
(4, 4, 16)
"""

from jaxeff.spec.architecture import (
    DEPTHWISE,
    Architecture,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalPool,
    Layer,
    Pool,
    Reshape,
    Residual,
    Role,
    Shape,
    Upsample,
    shapes,
    walk,
)
from jaxeff.spec.edits import Select, cut, edit, gate, group, quadratize, remove, selected, shrink

__all__ = [
    "DEPTHWISE",
    "Architecture",
    "Conv",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalPool",
    "Layer",
    "Pool",
    "Reshape",
    "Residual",
    "Role",
    "Select",
    "Shape",
    "Upsample",
    "cut",
    "edit",
    "gate",
    "group",
    "quadratize",
    "remove",
    "selected",
    "shapes",
    "shrink",
    "walk",
]
