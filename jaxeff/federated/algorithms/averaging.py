"""Averaging: FedAvg, FedProx, FedOpt, and MOON; Fed2 is any of them with a feature-paired aggregate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxeff.federated.aggregates import Aggregate, mean
from jaxeff.federated.algorithms.base import Algorithm, Upload, local_training
from jaxeff.federated.task import Task

Tree = Any


def fed_avg(task: Task, optimizer: optax.GradientTransformation, *, aggregate: Aggregate | None = None) -> Algorithm:
    """Federated averaging (McMahan et al., AISTATS 2017): the mean of what clients have learned.

    Args:
      task: what is learned.
      optimizer: of the clients, new in every round.
      aggregate: of their variables; None for the mean by examples.
    """
    return fed_prox(task, optimizer, 0.0, aggregate=aggregate)


def fed_prox(
    task: Task, optimizer: optax.GradientTransformation, mu: float, *, aggregate: Aggregate | None = None
) -> Algorithm:
    """FedProx (Li et al., MLSys 2020): clients pay mu / 2 times the squared distance from where they started.

    Args:
      task, optimizer, aggregate: as of `fed_avg`.
      mu: weight of the distance, not negative.

    Raises:
      ValueError: for a negative mu.
    """
    _check_not_negative("mu", mu)

    def distance(variables, start, batch):
        return mu / 2 * optax.tree.norm(optax.tree.sub(variables["params"], start), squared=True)

    local = local_training(task.loss, optimizer, penalty=distance if mu else None)
    return Algorithm(
        init=lambda variables: dict(variables),
        variables=lambda server: server,
        client_init=lambda server, own: local.start(server, server["params"] if mu else ()),
        client_step=local.step,
        client_final=lambda state, server, own: (Upload(state.variables), own),
        server=lambda server, combined, about: combined.variables,
        aggregate=aggregate or mean(),
    )


class Optimised(NamedTuple):
    """The server of FedOpt: variables, and the state of its optimiser."""

    variables: dict[str, Any]
    opt_state: Tree


def fed_opt(
    task: Task,
    optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation,
    *,
    aggregate: Aggregate | None = None,
) -> Algorithm:
    """FedOpt (Reddi et al., ICLR 2021): the server takes the mean update of the clients for a gradient.

    Args:
      task, optimizer, aggregate: as of `fed_avg`.
      server_optimizer: any of optax, `optax.sgd(1.0, momentum=0.9)` for FedAvgM; of `adaptive` for those of the paper.
        Collections other than "params" are averaged.
    """
    local = local_training(task.loss, optimizer)

    def server(state, combined, about):
        params = state.variables["params"]
        gradient = optax.tree.sub(params, combined.variables["params"])
        updates, opt_state = server_optimizer.update(gradient, state.opt_state, params)
        return Optimised({**combined.variables, "params": optax.apply_updates(params, updates)}, opt_state)

    return Algorithm(
        init=lambda variables: Optimised(dict(variables), server_optimizer.init(variables["params"])),
        variables=lambda state: state.variables,
        client_init=lambda state, own: local.start(state.variables),
        client_step=local.step,
        client_final=lambda state, server, own: (Upload(state.variables), own),
        server=server,
        aggregate=aggregate or mean(),
    )


class Moments(NamedTuple):
    """First and second moments of the server's optimiser."""

    first: Tree
    second: Tree


ADAPTIVE: tuple[str, ...] = ("adam", "yogi", "adagrad")


def adaptive(
    kind: str, learning_rate: float, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """The server optimisers of Reddi et al.: without bias correction, and with second moments that begin at tau^2.

    Those of optax correct the bias; give them to `fed_opt` where that is wanted.

    Args:
      kind: "adam", "yogi" or "adagrad" (which needs no `b2`).
      learning_rate: of the server.
      b1, b2: decay of the moments.
      tau: added to the root of the second moment.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind not in ADAPTIVE:
        raise ValueError(f"kind must be one of {', '.join(map(repr, ADAPTIVE))}, got {kind!r}")

    def init(params):
        return Moments(optax.tree.zeros_like(params), jax.tree.map(lambda p: jnp.full_like(p, tau**2), params))

    def second(v, g):
        square = g * g
        if kind == "adam":
            return b2 * v + (1 - b2) * square
        return v - (1 - b2) * square * jnp.sign(v - square) if kind == "yogi" else v + square

    def update(updates, state, params=None):
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, updates)
        moments = Moments(first, jax.tree.map(second, state.second, updates))
        step = lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau)
        return jax.tree.map(step, moments.first, moments.second), moments

    return optax.GradientTransformation(init, update)


def moon(
    task: Task,
    optimizer: optax.GradientTransformation,
    mu: float = 1.0,
    *,
    temperature: float = 0.5,
    aggregate: Aggregate | None = None,
) -> Algorithm:
    """MOON (Li et al., CVPR 2021): representations are drawn to the global model's and away from the last local one's.

    Args:
      task: with `features`.
      optimizer, aggregate: as of `fed_avg`.
      mu: weight of the contrast.
      temperature: of it.

    Returns:
      The algorithm; every client remembers a model.

    Raises:
      ValueError: for a task without `features`, a negative mu or a temperature that is not positive.
    """
    _check_not_negative("mu", mu)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if task.features is None:
        raise ValueError("moon compares representations: give the task features, (variables, images) -> [B, F]")
    represent = task.features

    def contrast(variables, context, batch):
        near, far = (represent(other, batch) for other in context)
        here = represent(variables, batch)
        sides = jnp.stack([_cosine(here, near), _cosine(here, far)], -1) / temperature
        losses = -jax.nn.log_softmax(sides)[:, 0] * batch["mask"]
        return mu * losses.sum() / jnp.maximum(batch["mask"].sum(), 1)

    local = local_training(task.loss, optimizer, penalty=contrast)
    return Algorithm(
        init=lambda variables: dict(variables),
        variables=lambda server: server,
        own_init=lambda variables: dict(variables),
        client_init=lambda server, own: local.start(server, (server, own)),
        client_step=local.step,
        client_final=lambda state, server, own: (Upload(state.variables), state.variables),
        server=lambda server, combined, about: combined.variables,
        aggregate=aggregate or mean(),
    )


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    square = (a * a).sum(-1) * (b * b).sum(-1)
    # A root has no derivative at 0, where a blank image may lie.
    return (a * b).sum(-1) / jnp.sqrt(jnp.where(square > 1e-16, square, 1e-16))


def _check_not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
