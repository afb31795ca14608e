"""Against the drift of clients: SCAFFOLD's control variates, and FedNova's normalised updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxeff.federated.aggregates import Aggregate, mean
from jaxeff.federated.algorithms.base import Algorithm, Upload, local_training
from jaxeff.federated.task import Task

Tree = Any


class Controlled(NamedTuple):
    """The server of SCAFFOLD: variables, and its control variate."""

    variables: dict[str, Any]
    control: Tree


def scaffold(
    task: Task, learning_rate: float, *, server_learning_rate: float = 1.0, aggregate: Aggregate | None = None
) -> Algorithm:
    """SCAFFOLD (Karimireddy et al., ICML 2020), with its second form of the control variates.

    Clients descend along g - c_i + c; then c_i becomes c_i - c + (w - w_i) / (K eta), of K steps.

    Args:
      task: what is learned.
      learning_rate: eta, of the clients' plain gradient descent.
      server_learning_rate: of the mean update.
      aggregate: None for the uniform mean, as in the paper.

    Returns:
      The algorithm; every client remembers a control variate, and sends its change.
    """

    def correct(grads, context):
        own, control = context
        return jax.tree.map(lambda g, mine, all_: g - mine + all_, grads, own, control)

    local = local_training(task.loss, optax.sgd(learning_rate), correct=correct)

    def final(state, server, own):
        start, control = server.variables["params"], server.control
        scale = 1 / (jnp.maximum(state.steps, 1) * learning_rate)
        change = jax.tree.map(lambda c, w, mine: scale * (w - mine) - c, control, start, state.variables["params"])
        # Without a step there is nothing to learn of the gradient.
        change = jax.tree.map(lambda d: jnp.where(state.steps > 0, d, 0), change)
        return Upload(state.variables, sum=change), optax.tree.add(own, change)

    def server(state, combined, about):
        start = state.variables["params"]
        toward = lambda w, mean: w + server_learning_rate * (mean - w)
        params = jax.tree.map(toward, start, combined.variables["params"])
        control = jax.tree.map(lambda c, d: c + d / about.clients, state.control, combined.sum)
        return Controlled({**combined.variables, "params": params}, control)

    return Algorithm(
        init=lambda variables: Controlled(dict(variables), optax.tree.zeros_like(variables["params"])),
        variables=lambda state: state.variables,
        own_init=lambda variables: optax.tree.zeros_like(variables["params"]),
        client_init=lambda state, own: local.start(state.variables, (own, state.control)),
        client_step=local.step,
        client_final=final,
        server=server,
        aggregate=aggregate or mean("uniform"),
    )


def fed_nova(
    task: Task, learning_rate: float, *, momentum: float = 0.0, aggregate: Aggregate | None = None
) -> Algorithm:
    """FedNova (Wang et al., NeurIPS 2020): updates are divided by how many steps they are worth, then averaged.

    Args:
      task: what is learned.
      learning_rate: of the clients' gradient descent.
      momentum: of it, in [0, 1); tau steps are worth (tau - m (1 - m^tau) / (1 - m)) / (1 - m).
      aggregate: None for the mean by examples.

    Raises:
      ValueError: for a momentum out of range.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    local = local_training(task.loss, optax.sgd(learning_rate, momentum=momentum or None))

    def final(state, server, own):
        tau = state.steps.astype(jnp.float32)
        worth = (tau - momentum * (1 - momentum**tau) / (1 - momentum)) / (1 - momentum)
        divided = jax.tree.map(
            lambda w, mine: w + (mine - w) / jnp.maximum(worth, 1), server["params"], state.variables["params"]
        )
        return Upload({**state.variables, "params": divided}, mean=worth), own

    def server(state, combined, about):
        again = lambda w, mean: w + combined.mean * (mean - w)
        return {**combined.variables, "params": jax.tree.map(again, state["params"], combined.variables["params"])}

    return Algorithm(
        init=lambda variables: dict(variables),
        variables=lambda server: server,
        client_init=lambda server, own: local.start(server),
        client_step=local.step,
        client_final=final,
        server=server,
        aggregate=aggregate or mean(),
    )
