"""Federated learning: who holds what, and what clients learn of it together."""

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

__all__ = ["Partition", "by_classes", "by_key", "dirichlet", "iid", "noise_levels", "quantity", "with_noise"]
