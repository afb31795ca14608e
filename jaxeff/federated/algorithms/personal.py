"""Models that are partly each client's own: FedBN."""

from collections.abc import Callable
from typing import Any

import optax

from jaxeff import trees
from jaxeff.federated.aggregates import Aggregate, mean
from jaxeff.federated.algorithms.base import Algorithm, Upload, local_training
from jaxeff.federated.task import Task

Tree = Any


def fed_bn(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    select: str | Callable[[str, Any], bool] = "*[nN]orm*",
    aggregate: Aggregate | None = None,
) -> Algorithm:
    """FedBN (Li et al., ICLR 2021): norms stay with their clients, everything else is averaged.

    The global model keeps the norms that it began with, so it is to be tested with those of a client: `personal`.

    Args:
      task, optimizer, aggregate: as of `fed_avg`.
      select: which variables stay, a glob over paths such as "params/conv1/norm/scale", or (path, leaf) -> bool.

    Returns:
      The algorithm; every client remembers its norms.
    """
    local = local_training(task.loss, optimizer)

    def parts(variables):
        chosen, rest = trees.partition(variables, select)
        return chosen, rest

    def personal(server, own):
        return trees.merge(own, parts(server)[1])

    def final(state, server, own):
        mine, shared = parts(state.variables)
        return Upload(trees.merge(parts(server)[0], shared)), mine

    return Algorithm(
        init=lambda variables: dict(variables),
        variables=lambda server: server,
        own_init=lambda variables: parts(variables)[0],
        client_init=lambda server, own: local.start(personal(server, own)),
        client_step=local.step,
        client_final=final,
        server=lambda server, combined, about: combined.variables,
        personal=personal,
        aggregate=aggregate or mean(),
    )
