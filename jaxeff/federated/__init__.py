"""Federated learning: who holds what, and what clients learn of it together."""

from jaxeff.federated.paired import group_weights, paired_average
from jaxeff.federated.partition import (
    Partition,
    by_classes,
    by_key,
    dirichlet,
    iid,
    noise_levels,
    quantity,
    with_noise,
)

__all__ = [
    "Partition",
    "by_classes",
    "by_key",
    "dirichlet",
    "group_weights",
    "iid",
    "noise_levels",
    "paired_average",
    "quantity",
    "with_noise",
]
