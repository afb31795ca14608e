"""Clients whose losses are parabolas, so that every algorithm can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import federated

CURVATURE = np.array([1.0, 2.0, 0.5, 3.0])
CENTRE = np.array([1.0, -2.0, 4.0, 0.5])
SIZES = np.array([2, 4, 1, 3])
START = 0.7


def task():
    """Mean over a batch of a / 2 (w - b)^2, where a and b are those of the client."""

    def loss(variables, batch, key):
        w, mask = variables["params"]["w"], batch["mask"]
        values = batch["a"] / 2 * (w - batch["b"]) ** 2
        return (values * mask).sum() / mask.sum(), ({}, {})

    def evaluate(variables, batch):
        return {"loss": loss(variables, batch, None)[0] * batch["mask"].sum(), "count": batch["mask"].sum()}

    return federated.Task(loss, evaluate)


def clients():
    owner = np.repeat(np.arange(4), SIZES)
    arrays = {"a": CURVATURE[owner].astype(np.float32), "b": CENTRE[owner].astype(np.float32)}
    return federated.clients_of(arrays, [np.flatnonzero(owner == i) for i in range(4)])


def variables():
    return {"params": {"w": jnp.float32(START)}}


def run(algorithm, rounds, *, epochs=1, key=None, **settings):
    """Parameters after these rounds of clients with batches of one example, and the last state and report."""
    federation = federated.federate(algorithm, batch_size=1, epochs=epochs, **settings)
    state, report = federation.init(jax.random.key(0) if key is None else key, variables(), clients()), None
    for _ in range(rounds):
        state, report = federation.round(state, clients())
    return float(algorithm.variables(state.server)["params"]["w"]), state, report
