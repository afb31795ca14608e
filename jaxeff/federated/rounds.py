"""Rounds of federated learning: any algorithm, in any backend, as one pure function of a state.

    federation = federate(fed_avg(task, optax.sgd(0.1)), batch_size=32, epochs=2)
    state = federation.init(jax.random.key(0), variables, clients)
    for _ in range(50):
        state, report = federation.round(state, clients)

Nothing depends on the order or the number of clients that are computed together: random numbers are those of a round
and a client, and clients of different sizes do different numbers of steps of one compiled loop.

Letters: N clients, M of them asked in a round.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxeff import parallel, training, trees
from jaxeff.federated import automatic, backends
from jaxeff.federated.aggregates import Member
from jaxeff.federated.algorithms.base import About, Algorithm, Upload
from jaxeff.federated.clients import Clients, batch_at, shuffled, steps_per_epoch
from jaxeff.federated.paired import LIMIT
from jaxeff.federated.participation import Participation, Plan, check_participation, client_key, planned
from jaxeff.federated.task import Task

Tree = Any


class State(NamedTuple):
    """Everything that a round reads and writes; a pytree of arrays that can be saved and restored.

    Attributes:
      server: of the algorithm.
      own: what each client remembers, leaves [N, ...].
      number: int32, rounds that are finished.
      key: never changes.
      past: servers of earlier rounds, newest first, [staleness, ...], where stragglers start from old ones; else ().
    """

    server: Tree
    own: Tree
    number: jax.Array
    key: jax.Array
    past: Tree


class Report(NamedTuple):
    """What happened in a round.

    Attributes:
      metrics: means over the steps of the clients counted, weighted by their examples; and "counted", how many.
      client: int32 [M], who was asked.
      steps: int32 [M], what it has done.
      counted: bool [M]; whether it took part in the result.
      finite: bool [M]; whether what it sent is, and no larger than 1e20. A client that sends NaN is left out.
    """

    metrics: dict[str, jax.Array]
    client: jax.Array
    steps: jax.Array
    counted: jax.Array
    finite: jax.Array

    def rejected(self) -> list[int]:
        """The clients that were left out, as what they sent is not finite."""
        return np.asarray(self.client)[~np.asarray(self.finite)].tolist()


class Federation(NamedTuple):
    """A federation; see `federate`.

    Attributes:
      init: (key, variables, clients) -> `State`.
      round: (state, clients) -> (state, `Report`); the state is given up.
      algorithm: the algorithm.
      tune: (state, clients) -> the backend of these rounds; measures where it is "auto" and nothing is remembered.
    """

    init: Callable[[jax.Array, Tree, Clients], State]
    round: Callable[[State, Clients], tuple[State, Report]]
    algorithm: Algorithm
    tune: Callable[[State, Clients], str]


def federate(
    algorithm: Algorithm,
    *,
    batch_size: int,
    epochs: int | Sequence[int] = 1,
    participation: Participation | None = None,
    backend: str = "stream",
    chunk: int = 8,
    mesh: Mesh | None = None,
) -> Federation:
    """Makes rounds of an algorithm.

    Args:
      algorithm: of `jaxeff.federated.algorithms`, or a user's own.
      batch_size: of the clients.
      epochs: over its examples that a client does in a round; one for all, or [N].
      participation: who takes part; None for everyone.
      backend: one of `jaxeff.federated.backends.BACKENDS`. All give the same result; aggregates that need all clients
        at once keep their variables in any of them. "auto" measures some of them on shortened clients before the first
        round and remembers the fastest; "pmap" is another word for "shard".
      chunk: clients computed together, of "chunk".
      mesh: of "shard": with an axis "clients"; None for all devices.

    Returns:
      The federation.

    Raises:
      ValueError: for an unknown backend, or settings out of range; from `init`, for those that do not fit the clients.
    """
    how = participation or Participation()
    check_participation(how._replace(available=1.0), 1)
    backend = backends.ALIASES.get(backend, backend)
    if backend not in (*backends.BACKENDS, "auto"):
        raise ValueError(f"backend must be one of {', '.join(map(repr, backends.BACKENDS))} or 'auto', got {backend!r}")
    if batch_size < 1 or chunk < 1:
        raise ValueError(f"batch_size and chunk must be at least 1, got {batch_size} and {chunk}")
    if not np.issubdtype(np.asarray(epochs).dtype, np.integer):
        raise ValueError(f"epochs must be whole numbers, got {epochs}")
    if np.ndim(epochs) > 1 or np.min(epochs, initial=1) < 0 or not np.any(np.asarray(epochs) > 0):
        raise ValueError(f"epochs must be a number of at least 1, or one of at least 0 for each client, got {epochs}")
    if backend == "auto":
        made = {
            name: federate(
                algorithm,
                batch_size=batch_size,
                epochs=epochs,
                participation=participation,
                backend=name,
                chunk=chunk,
            )
            for name in automatic.candidates()
        }
        return _of_the_fastest(made, batch_size)
    if backend == "shard" and mesh is None:
        mesh = parallel.mesh({backends.AXIS: -1})
    if mesh is not None and backends.AXIS not in mesh.shape:
        raise ValueError(f"mesh must have an axis {backends.AXIS!r}, got {dict(mesh.shape)}")
    stale = how.staleness if how.stragglers and how.late == "stale" else 0
    if stale and not algorithm.from_old:
        raise ValueError(
            "participation: late='stale' lets clients start from an old server, which this algorithm does not allow, "
            "as one of `privacy.central` whose norm changes; take 'partial' or 'drop', or a norm that is fixed"
        )

    def init(key: jax.Array, variables: Tree, clients: Clients) -> State:
        check_participation(how, clients.number)
        if np.ndim(epochs) and len(np.asarray(epochs)) != clients.number:
            raise ValueError(f"epochs must be one for each of the {clients.number} clients, got {len(epochs)}")  # type: ignore[arg-type]
        if not isinstance(clients.sizes, jax.core.Tracer):
            algorithm.aggregate.check(np.asarray(clients.sizes))
        if "params" not in variables:
            raise ValueError(f"variables must have 'params', got {', '.join(map(str, variables))}")
        variables = jax.tree.map(lambda leaf: jnp.array(leaf), dict(variables))
        server = algorithm.init(variables)
        repeat = lambda tree, times: jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], times, 0), tree)
        own = repeat(algorithm.own_init(variables), clients.number)
        # Rounds give up their state, and the caller's key is the caller's.
        return State(server, own, jnp.zeros((), jnp.int32), jnp.copy(key), repeat(server, stale) if stale else ())

    keep = backend == "map" or algorithm.aggregate.term is None
    one = partial(_client, algorithm, batch_size, bool(stale), keep)

    def begin(state: State, clients: Clients):
        key = jax.random.fold_in(state.key, state.number)
        plan = planned(how, key, state.number, clients.number)
        own = jax.tree.map(lambda leaf: leaf[plan.number], state.own)
        lengths = jnp.broadcast_to(jnp.asarray(epochs, jnp.int32), (clients.number,))
        context = _Context(state.server, state.past, clients, lengths, key, state.number)
        zero = _nobody(
            None if keep else algorithm.aggregate.empty, one, context, (plan, own), algorithm.variables(state.server)
        )
        return context, (plan, own), zero

    def finish(state: State, clients: Clients, plan: Plan, sums: Tree, results: Tree) -> tuple[State, Report]:
        return _finished(algorithm, state, clients, plan, sums, results, bool(stale))

    def whole(state: State, clients: Clients) -> tuple[State, Report]:
        context, members, zero = begin(state, clients)
        idle = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), members)
        plan = members[0]
        lengths = plan.share * context.epochs[plan.number] * clients.sizes[plan.number]
        sums, results = backends.added_up(
            backend, one, context, members, zero, idle=idle, lengths=lengths, chunk=chunk, mesh=mesh
        )
        return finish(state, clients, plan, sums, results)

    tune = lambda state, clients: backend
    if backend not in backends.FROM_PYTHON:
        return Federation(init, jax.jit(whole, donate_argnums=0), algorithm, tune)
    begin_compiled, finish_compiled = jax.jit(begin), jax.jit(finish)

    def looped(state: State, clients: Clients) -> tuple[State, Report]:
        context, members, zero = begin_compiled(state, clients)
        sums, results = backends.added_up(backend, one, context, members, zero, idle=None)
        return finish_compiled(state, clients, members[0], sums, results)

    return Federation(init, looped, algorithm, tune)


def _of_the_fastest(made: Mapping[str, Federation], batch_size: int) -> Federation:
    """Rounds of whichever federation is fastest for the clients that come."""
    rounds = {name: federation.round for name, federation in made.items()}
    chosen: dict[Any, str] = {}

    def tune(state: State, clients: Clients) -> str:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(clients))
        if shapes not in chosen:
            chosen[shapes] = automatic.fastest(rounds, state, clients, batch_size)
        return chosen[shapes]

    first = next(iter(made.values()))
    return first._replace(round=lambda state, clients: rounds[tune(state, clients)](state, clients), tune=tune)


def as_method(federation: Federation, task: Task, init: Callable[[jax.Array], Tree]) -> training.Method:
    """A federation as something that `jaxeff.training.fit` runs: a step is a round, its batch the clients.

        fit(as_method(federation, task, init), lambda start: itertools.repeat(clients), steps=rounds, ...)

    so that rounds are saved, resumed, evaluated and logged as any training is; a client that is left out, as it sent
    what is not finite, is logged by its number ("first_rejected", -1 for none).

    Args:
      federation: of `federate`, in any backend but "loop" and "threads", which are no compiled programs; "auto" must be
        tuned before.
      task: what is learned, for the evaluation of the global model.
      init: key -> variables.
    """

    def start(key: jax.Array, clients: Any) -> State:
        own, key = jax.random.split(key)
        return federation.init(key, init(own), clients)

    def step(state: Any, clients: Any) -> tuple[Any, dict[str, jax.Array]]:
        state, report = federation.round(state, clients)
        rejected = (~report.finite).sum().astype(jnp.float32)
        first = jnp.where(rejected > 0, report.client[jnp.argmax(~report.finite)], -1).astype(jnp.float32)
        steps = jnp.where(report.counted, report.steps, 0).sum().astype(jnp.float32)
        return state, {**report.metrics, "rejected": rejected, "first_rejected": first, "local_steps": steps}

    def evaluate(state: Any, batch: Any) -> dict[str, jax.Array]:
        sums = tested(federation.algorithm, task, state, batch)
        return {name: value for name, value in sums.items() if value.ndim == 0}

    return training.Method(start, step, evaluate)


def tested(algorithm: Algorithm, task: Task, state: State, batch: Any) -> dict[str, jax.Array]:
    """What `Task.evaluate` finds of the global model; of one that is partly each client's own, their mean."""
    if algorithm.personal is None:
        return task.evaluate(algorithm.variables(state.server), batch)
    personal = algorithm.personal
    every = lax.map(lambda own: task.evaluate(personal(state.server, own), batch), state.own)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32).mean(0), every)


class _Context(NamedTuple):
    """What all clients of a round see."""

    server: Tree
    past: Tree
    clients: Clients
    epochs: jax.Array
    key: jax.Array
    number: jax.Array


class _Sums(NamedTuple):
    """What is added up over clients."""

    variables: Tree
    mean: Tree
    sum: Tree
    weight: jax.Array
    counted: jax.Array
    metrics: Tree
    examples: jax.Array


class _Result(NamedTuple):
    """What a client returns beside it."""

    own: Tree
    steps: jax.Array
    counted: jax.Array
    finite: jax.Array
    kept: Tree


def _client(
    algorithm: Algorithm, batch_size: int, stale: bool, keep: bool, context: _Context, member: Any
) -> tuple[_Sums, _Result]:
    """One client of a round."""
    plan, own = member
    clients, number = context.clients, plan.number
    server = context.server
    if stale:
        old = jax.tree.map(lambda leaf: leaf[jnp.maximum(plan.age - 1, 0)], context.past)
        server = jax.tree.map(lambda now, before: jnp.where(plan.age > 0, before, now), server, old)
    key = client_key(context.key, number)
    size = clients.sizes[number]
    per_epoch = steps_per_epoch(size, batch_size)
    total = jnp.ceil(plan.share * (context.epochs[number] * per_epoch)).astype(jnp.int32)

    def step(epoch, order, place, carry):
        local, metrics = carry
        step_key = jax.random.fold_in(jax.random.fold_in(key, 2), epoch * per_epoch + place)
        batch = batch_at(clients, number, order, place, batch_size)
        local, found = algorithm.client_step(local, batch, step_key)
        return local, jax.tree.map(lambda a, b: a + b.astype(jnp.float32), metrics, found)

    def epoch(count, carry):
        order = shuffled(clients, number, jax.random.fold_in(jax.random.fold_in(key, 1), count), batch_size)
        left = jnp.minimum(per_epoch, total - count * per_epoch)
        return lax.fori_loop(0, left, lambda place, inner: step(count, order, place, inner), carry)

    start = algorithm.client_init(server, own)
    names = jax.eval_shape(lambda local: _metrics_of(algorithm, clients, number, batch_size, key, local), start)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), names)
    rounds = -(-total // jnp.maximum(per_epoch, 1))
    local, metrics = lax.fori_loop(0, rounds, epoch, (start, zeros))

    upload, new = algorithm.client_final(local, server, own)
    if stale:
        # An old model's update, and not the old model, is what a late client has to say.
        moved = lambda leaf, now, before: leaf + (now - before) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
        current, base = algorithm.variables(context.server), algorithm.variables(server)
        upload = upload._replace(variables=jax.tree.map(moved, upload.variables, current, base))
    finite = trees.all_finite(upload, LIMIT)
    counted = plan.reports & finite & (total > 0)
    weight = counted.astype(jnp.float32)
    aggregate = algorithm.aggregate
    about = Member(number, size.astype(jnp.float32), weight * plan.discount, context.number)
    share = aggregate.weight(about)
    scaled = lambda by: lambda leaf: jnp.where(by > 0, by * leaf.astype(jnp.float32), 0)
    examples = weight * about.size
    per_step = examples / jnp.maximum(total, 1)
    sums = _Sums(
        () if keep or aggregate.term is None else aggregate.term(upload.variables, about),
        jax.tree.map(scaled(share), upload.mean),
        jax.tree.map(scaled(weight), upload.sum),
        share,
        weight,
        jax.tree.map(scaled(per_step), metrics),
        examples,
    )
    kept = (upload.variables, about) if keep else ()
    remembered = jax.tree.map(lambda now, before: jnp.where(counted, now, before), new, own)
    return sums, _Result(remembered, total, counted, finite, kept)


def _metrics_of(algorithm, clients, number, batch_size, key, local):
    batch = batch_at(clients, number, jnp.zeros(batch_size, jnp.int32), jnp.int32(0), batch_size)
    return algorithm.client_step(local, batch, key)[1]


def _nobody(empty: Callable[[Tree], Tree] | None, one: Any, context: _Context, members: Any, variables: Tree) -> _Sums:
    """Sums over no clients."""
    first = jax.tree.map(lambda leaf: leaf[0], members)
    like, _ = jax.eval_shape(one, context, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return zeros if empty is None else zeros._replace(variables=empty(variables))


def _finished(algorithm, state, clients, plan, sums, results, stale) -> tuple[State, Report]:
    """The server's part of a round."""
    aggregate, previous = algorithm.aggregate, algorithm.variables(state.server)
    if results.kept:
        variables = aggregate.combine(*results.kept, previous)
    else:
        assert aggregate.result is not None
        variables = aggregate.result(sums.variables, previous)
    over = jnp.where(sums.weight > 0, sums.weight, 1)
    combined = Upload(variables, jax.tree.map(lambda leaf: leaf / over, sums.mean), sums.sum)
    about = About(jax.random.fold_in(jax.random.fold_in(state.key, state.number), 0), sums.counted, clients.number)
    server = algorithm.server(state.server, combined, about)
    if not algorithm.always:
        server = jax.tree.map(lambda new, old: jnp.where(sums.counted > 0, new, old), server, state.server)
    own = jax.tree.map(lambda all_, new: all_.at[plan.number].set(new), state.own, results.own)
    past = state.past
    if stale:
        newest = lambda now, old: jnp.concatenate([now[None], old[:-1]])
        past = jax.tree.map(newest, state.server, state.past)
    metrics = jax.tree.map(lambda leaf: leaf / jnp.maximum(sums.examples, 1), sums.metrics)
    report = Report({**metrics, "counted": sums.counted}, plan.number, results.steps, results.counted, results.finite)
    return State(server, own, state.number + 1, state.key, past), report
