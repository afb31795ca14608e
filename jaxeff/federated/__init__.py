"""Federated learning: who holds what, and what clients learn of it together."""

from jaxeff.federated import robust
from jaxeff.federated.matching import assign, weight_match
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
from jaxeff.federated.permutation import Permutations, derive, permute, random_perms, verify

__all__ = [
    "Permutations",
    "Partition",
    "assign",
    "by_classes",
    "by_key",
    "derive",
    "dirichlet",
    "group_weights",
    "iid",
    "noise_levels",
    "paired_average",
    "permute",
    "quantity",
    "random_perms",
    "robust",
    "verify",
    "weight_match",
    "with_noise",
]
