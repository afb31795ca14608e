"""One client of a network: the local training of the simulator, in an app of Flower.

Letters: N clients, n examples of this one, C classes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import data, trees
from jaxeff.federated.aggregates import mean
from jaxeff.federated.algorithms.base import Algorithm
from jaxeff.federated.clients import clients_of
from jaxeff.federated.records import (
    ARRAYS,
    CONFIG,
    COUNTS,
    EXAMPLES,
    FINGERPRINT,
    METRICS,
    MISSING,
    PARTITION,
    ROUND,
    Layout,
    need_flwr,
)
from jaxeff.federated.rounds import Federation, federate
from jaxeff.federated.task import CLASSES, Task

if MISSING is None:
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

Tree = Any


class Client(NamedTuple):
    """What one client of a network has; see `client_app`.

    Attributes:
      task: what is learned.
      algorithm: `fed_avg` or `fed_prox`, or a user's own whose server is the variables and whose clients remember
        nothing.
      layout: how variables travel, the same as the server's.
      arrays: its own examples by name, [n, ...], with "label" int [n].
      number: which of the clients it is, in 0..N-1; no two may have one number.
      clients: N.
      batch_size, epochs: as of `jaxeff.federated.federate`.
      key: of random numbers, the same for all clients: that of the simulator's state for the simulator's results.
      fingerprint: of the experiment; where the server sends one, it must be this.
    """

    task: Task
    algorithm: Algorithm
    layout: Layout
    arrays: Mapping[str, Any]
    number: int
    clients: int
    batch_size: int
    epochs: int
    key: jax.Array
    fingerprint: str = ""

    @property
    def class_counts(self) -> np.ndarray:
        """Its examples of each class, int64 [C]."""
        return np.bincount(np.asarray(self.arrays["label"], np.int64), minlength=self.layout.classes)


def train(client: Client, variables: Tree, round_number: int) -> tuple[Tree, dict[str, float]]:
    """What a client makes of the global model in a round: the round of the simulator in which all others have nothing.

    With the same key, round, number, examples in the same order, batch size and epochs this is, bit for bit, what the
    client of that number has learned in `jaxeff.federated.federate` on the same kind of device.

    Args:
      client: the client.
      variables: of the global model, leaves [...].
      round_number: rounds that were finished before.

    Returns:
      The variables it sends, and its metrics.

    Raises:
      FloatingPointError: if what it has learned is not finite.
      ValueError: for an algorithm whose clients remember something, or a number out of range.
    """
    if not 0 <= client.number < client.clients:
        raise ValueError(f"number must be in 0..{client.clients - 1}, got {client.number}")
    plain = client.algorithm
    server: Any = jax.eval_shape(plain.init, variables)
    if jax.tree.leaves(plain.own_init(variables)) or trees.paths(server) != trees.paths(variables):
        raise ValueError(
            "algorithm: clients of a network remember nothing and get variables alone; take fed_avg or fed_prox, and "
            "give Fed2Strategy a server_optimizer for fed_opt"
        )
    size = len(client.arrays["label"])
    if not size:
        return variables, {}
    rows = [np.arange(size if number == client.number else 0) for number in range(client.clients)]
    own = {}
    if client.layout.mode == "subset":
        assert client.layout.class_to_group is not None
        mine = np.isin(client.layout.class_to_group, client.layout.owned(client.class_counts))
        own = {CLASSES: np.repeat(mine[None], client.clients, 0)}
    members = clients_of(client.arrays, rows, own)
    federation = _alone(plain, client.batch_size, client.epochs)
    state = federation.init(client.key, variables, members)._replace(number=jnp.int32(round_number))
    state, report = federation.round(state, members)
    if not bool(report.finite[client.number]):
        raise FloatingPointError(f"client {client.number}, round {round_number}: what it has learned is not finite")
    metrics = {name: float(value) for name, value in report.metrics.items() if name != "counted"}
    return jax.tree.map(np.asarray, plain.variables(state.server)), metrics


@functools.lru_cache(maxsize=8)
def _alone(algorithm: Algorithm, batch_size: int, epochs: int) -> Federation:
    """Rounds whose result is what one client sends: alone and of weight one, its variables are the mean."""
    server = lambda server, combined, about: combined.variables
    alone = algorithm._replace(server=server, aggregate=mean("uniform"))
    return federate(alone, batch_size=batch_size, epochs=epochs)


def evaluate(task: Task, variables: Tree, arrays: Mapping[str, Any], batch_size: int = 256) -> dict[str, np.ndarray]:
    """Means of a task's tests over examples, by name; for each class where they are sums of it, as "correct" is.

    Args:
      task: what is learned.
      variables: of a model.
      arrays: examples by name, [n, ...].
      batch_size: of the tests.

    Returns:
      Arrays by name: scalars, and [C] for what is told of each class; {} without examples.
    """
    tested = jax.jit(task.evaluate)
    sums: dict[str, np.ndarray] = {}
    for batch in data.padded_batches(arrays, batch_size):
        for name, value in tested(variables, batch).items():
            sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
    count = sums.pop("count", np.zeros(()))
    return {name: value / count for name, value in sums.items()} if count else {}


def client_app(prepare: Callable[[Any], Client]) -> "ClientApp":
    """The app of a client, for Flower's SuperNodes.

    Args:
      prepare: context of Flower -> the client. "partition-id" and "num-partitions" are in `context.node_config`.

    Raises:
      ImportError: without flwr.
    """
    need_flwr()
    app = ClientApp()

    def answered(message: Any, context: Any, act: Callable[[Client, Any], tuple[Any, dict[str, float]]]) -> "Message":
        client, config = prepare(context), message.content.get(CONFIG, {})
        theirs = config.get(FINGERPRINT, "")
        if theirs and client.fingerprint and theirs != client.fingerprint:
            raise ValueError(
                f"the server runs another experiment ({theirs}) than this client ({client.fingerprint}): start both "
                "with the same config, method, partition and seed"
            )
        record, metrics = act(client, message)
        counts = client.class_counts
        told = {EXAMPLES: int(counts.sum()), COUNTS: counts.tolist(), PARTITION: int(client.number), **metrics}
        content = RecordDict({METRICS: MetricRecord(told)})
        if record is not None:
            content[ARRAYS] = record
        return Message(content, reply_to=message)

    def learn(client: Client, message: Any) -> tuple[Any, dict[str, float]]:
        layout = client.layout
        groups = layout.owned(client.class_counts) if layout.mode == "subset" else None
        start = layout.read(message.content[ARRAYS], groups)
        variables, metrics = train(client, start, int(message.content[CONFIG][ROUND]) - 1)
        return layout.record(variables, groups), metrics

    def test(client: Client, message: Any) -> tuple[Any, dict[str, float]]:
        found = evaluate(client.task, client.layout.read(message.content[ARRAYS]), client.arrays)
        return None, {name: float(value) for name, value in found.items() if not value.ndim}

    @app.train()
    def _(message: Any, context: Any) -> "Message":
        return answered(message, context, learn)

    @app.evaluate()
    def _(message: Any, context: Any) -> "Message":
        return answered(message, context, test)

    @app.query()
    def _(message: Any, context: Any) -> "Message":
        return answered(message, context, lambda client, message: (None, {}))

    return app
