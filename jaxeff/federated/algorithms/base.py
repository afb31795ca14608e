"""The frame of all algorithms: what a client does, what it sends, and what the server makes of it.

An algorithm is seven pure functions and an aggregate; rounds run them in any of their backends. The whole of one:

    def fed_avg(task, optimizer):
        local = local_training(task.loss, optimizer)
        return Algorithm(
            init=lambda variables: variables,
            variables=lambda server: server,
            client_init=lambda server, own: local.start(server),
            client_step=local.step,
            client_final=lambda state, server, own: (Upload(state.variables), own),
            server=lambda server, combined, about: combined.variables,
        )
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxeff.federated.aggregates import Aggregate, mean
from jaxeff.federated.task import Batch, Loss, Metrics, Variables

Tree = Any


class Upload(NamedTuple):
    """What a client sends, and what the server gets of all of them.

    Attributes:
      variables: combined by the aggregate.
      mean: anything else of which the server gets the mean, with the weights that the aggregate gives clients.
      sum: anything else of which it gets the sum over those counted.
    """

    variables: Tree
    mean: Tree = ()
    sum: Tree = ()


class About(NamedTuple):
    """A round, as the server sees it.

    Attributes:
      key: random numbers of the server.
      counted: clients that are counted, float32.
      clients: all there are, N.
    """

    key: jax.Array
    counted: jax.Array
    clients: int


def nothing(*_: Any) -> Tree:
    """The state of clients that remember nothing."""
    return ()


class Algorithm(NamedTuple):
    """An algorithm of federated learning; all functions are pure and traced.

    Attributes:
      init: variables -> the server's state, any pytree.
      variables: server -> the variables of the global model.
      client_init: (server, own) -> local state, what a client starts a round with.
      client_step: (local state, batch, key) -> (local state, metrics); batches as of `jaxeff.federated.clients`.
      client_final: (local state, server, own) -> (`Upload`, own).
      server: (server, combined `Upload`, `About`) -> server.
      own_init: variables -> what each client remembers from one round to the next; kept as it was by a client that is
        not counted.
      personal: (server, own) -> the variables a client uses itself; None where these are the global ones.
      aggregate: how variables are combined.
      always: whether the server acts in rounds in which nobody is counted too; it stays as it was in them otherwise.
      wire: a leaf of the variables -> what a client sends in its place, for its shapes; None for the leaf itself.
      from_old: whether clients may start from an old server, as stale stragglers do.
    """

    init: Callable[[Variables], Tree]
    variables: Callable[[Tree], Variables]
    client_init: Callable[[Tree, Tree], Tree]
    client_step: Callable[[Tree, Batch, jax.Array], tuple[Tree, Metrics]]
    client_final: Callable[[Tree, Tree, Tree], tuple[Upload, Tree]]
    server: Callable[[Tree, Upload, About], Tree]
    own_init: Callable[[Variables], Tree] = nothing
    personal: Callable[[Tree, Tree], Variables] | None = None
    aggregate: Aggregate = mean()
    always: bool = False
    wire: Callable[[jax.Array], Tree] | None = None
    from_old: bool = True


class Drawn(NamedTuple):
    """The local state of a client, and bits of which it draws when it is done."""

    inner: Tree
    bits: jax.Array


def with_random_final(algorithm: Algorithm, final: Callable[[Tree, Tree, Tree, jax.Array], Any]) -> Algorithm:
    """The algorithm with another `client_final`, one that draws random numbers: (local, server, own, key)."""

    def step(state, batch, key):
        # Split before each level of wrapping, so that what is drawn here is of nobody else.
        key, own = jax.random.split(key)
        inner, metrics = algorithm.client_step(state.inner, batch, key)
        return Drawn(inner, jax.random.bits(own, (2,))), metrics

    def last(state, server, own):
        return final(state.inner, server, own, jax.random.wrap_key_data(state.bits, impl="threefry2x32"))

    return algorithm._replace(
        client_init=lambda server, own: Drawn(algorithm.client_init(server, own), jnp.zeros(2, jnp.uint32)),
        client_step=step,
        client_final=last,
    )


class Local(NamedTuple):
    """A client while it trains.

    Attributes:
      variables: "params" and the model's other collections.
      opt_state: of its optimiser.
      steps: int32, steps it has done this round.
      context: whatever else its algorithm needs.
    """

    variables: dict[str, Any]
    opt_state: Tree
    steps: jax.Array
    context: Tree


class LocalTraining(NamedTuple):
    """Gradient descent of one client: `start(variables, context) -> Local` and `step(local, batch, key)`."""

    start: Callable[..., Local]
    step: Callable[[Local, Batch, jax.Array], tuple[Local, Metrics]]


def local_training(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    penalty: Callable[[Tree, Tree, Batch], jax.Array] | None = None,
    correct: Callable[[Tree, Tree], Tree] | None = None,
) -> LocalTraining:
    """Local steps; the optimiser starts anew in every round.

    Args:
      loss: of a `Task`.
      optimizer: of the parameters.
      penalty: (variables, context, batch) -> what is added to the loss.
      correct: (gradients, context) -> gradients.
    """

    def start(variables, context=()):
        return Local(dict(variables), optimizer.init(variables["params"]), jnp.zeros((), jnp.int32), context)

    def step(local, batch, key):
        def objective(params):
            variables = {**local.variables, "params": params}
            value, (model_state, metrics) = loss(variables, batch, key)
            added = penalty(variables, local.context, batch) if penalty is not None else 0.0
            return value + added, (model_state, {"loss": value, **metrics})

        params = local.variables["params"]
        grads, (model_state, metrics) = jax.grad(objective, has_aux=True)(params)
        if correct is not None:
            grads = correct(grads, local.context)
        updates, opt_state = optimizer.update(grads, local.opt_state, params)
        variables = {**model_state, "params": optax.apply_updates(params, updates)}
        return Local(variables, opt_state, local.steps + 1, local.context), metrics

    return LocalTraining(start, step)
