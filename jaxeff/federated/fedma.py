"""FedMA: layers of clients are matched one after the other, and the global ones have as many units as that takes.

Networks that learned apart hold the same features in other places, and features that others lack. FedMA (Wang et al.,
ICLR 2020) matches the units of the first layer by what they read, and makes one layer of them all; clients take it,
freeze it, read it with their second layer, and train the rest again; then the second is matched, and so on to the last
layer, of which each class is averaged by the examples that clients have of it. Such a pass has as many phases as the
network has layers. Where another follows, clients begin it with their own units of the global network.

The phases, the matching and the class weights are theirs. Ours is that it takes any architecture, as `derive` finds who
reads which units; that matched layers are plain means of their units; and that deviations are relative to the norm of
units, so that one setting does for all layers.

Letters: N clients, M of them with examples, C classes, J units of a layer, D values of a unit.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxeff import models, spec, training, trees
from jaxeff.federated.accounting import Traffic
from jaxeff.federated.algorithms.base import Algorithm, Upload, local_training
from jaxeff.federated.clients import Clients
from jaxeff.federated.nonparametric import check_settings, match_units
from jaxeff.federated.permutation import Fixed, Permutations, derive, verify
from jaxeff.federated.rounds import Federation, Report, federate
from jaxeff.federated.stages import Leaves, Stage, moved, resized, stages_of, widths
from jaxeff.federated.task import Task

Tree = Any
OUTPUT = "of the output"
"""Why `derive` leaves the axis of classes alone."""


class FedMA(NamedTuple):
    """What `fed_ma` gives.

    Attributes:
      architecture: the network, grown.
      variables: of it.
      assignments: by layer int64 [N, J], the global unit of each unit that a client had in the last pass; -1 for
        clients that take no part. Layers that share their units, such as a depthwise convolution and the one before it,
        have the same.
      sizes: for each phase, the units of each hidden layer after it, by layer.
      traffic: for each phase, bytes to and from every client: it sends the layer that is matched, and receives that and
        the places of its own units in it. The variables that clients begin with are not counted.
      reports: for each phase, of the local training before it; None where there was none.
    """

    architecture: spec.Architecture
    variables: dict[str, Any]
    assignments: dict[str, np.ndarray]
    sizes: tuple[dict[str, int], ...]
    traffic: tuple[Traffic, ...]
    reports: tuple[Report | None, ...]


def fed_ma(
    architecture: spec.Architecture,
    task_of: Callable[[nn.Module], Task],
    optimizer: optax.GradientTransformation,
    clients: Clients,
    *,
    key: jax.Array,
    batch_size: int,
    epochs: int = 1,
    retrain_epochs: int | None = None,
    passes: int = 1,
    class_counts: Any = None,
    start: Tree = None,
    network: Callable[[spec.Architecture], nn.Module] = models.Network,
    sigma: float = 0.5,
    sigma_zero: float = 1.0,
    gamma: float = 1.0,
    iterations: int = 10,
    growth: float | None = None,
    backend: str = "stream",
    chunk: int = 8,
    mesh: Mesh | None = None,
) -> FedMA:
    """Matched averaging, layer by layer, of what clients learn.

    A client whose training diverges keeps, and is matched with, what it had before that phase; the report says so.

    Args:
      architecture: what each client trains, and of which the global network has the layers.
      task_of: module -> `Task`, such as `lambda module: classification(training.from_linen(module).apply, 10)`; called
        anew when the network has grown.
      optimizer: of the clients, new in every phase. It does not see matched layers: these, and statistics of their
        norms, stay as they are.
      clients: those without examples take no part.
      key: of the initial variables, of batches, and of the order in which clients are matched.
      batch_size: of the clients.
      epochs: of local training in the first phase of a pass; 0 for none, as of networks that have been trained.
      retrain_epochs: in every further phase; None for `epochs`.
      passes: over all layers.
      class_counts: [N, C], by which the last layer is averaged; None for the examples of each client.
      start: variables that clients begin with, leaves [N, ...]; None for the same initial ones for all.
      network: architecture -> module.
      sigma, sigma_zero: as of `match_units`, here as shares of the root mean square norm of the units of a layer.
      gamma, iterations: as of `match_units`.
      growth: to how many times its width a layer may grow, 1 for not at all; None for no limit.
      backend, chunk, mesh: of local training, as of `federate`.

    Returns:
      The global network, and what it took.

    Raises:
      ValueError: before anything is trained, for a network that cannot be matched layer by layer, as its shortcuts tie
        layers to later ones or its units are in groups; for settings out of range; for class counts or a `start` that
        do not fit.
    """
    check_settings(sigma, sigma_zero, gamma, iterations)
    members = _checked(clients, epochs, retrain_epochs, passes, growth)
    init_key, verify_key, train_key, order_key = jax.random.split(key, 4)
    leaves, like = _begun(architecture, network, clients.number, members, start, init_key)
    found = _found(architecture, network, _one(leaves, members[0], like), verify_key)
    stages = stages_of(architecture, found)
    shares = _shares(found, stages, clients, class_counts)
    matching: dict[str, Any] = {"sigma": sigma, "sigma_zero": sigma_zero, "gamma": gamma, "iterations": iterations}
    matching["seed"] = np.random.default_rng(np.asarray(jax.random.key_data(order_key)))
    local: dict[str, Any] = {"batch_size": batch_size, "backend": backend, "chunk": chunk, "mesh": mesh}
    compiled: dict[tuple[Any, ...], Federation] = {}

    def trained(leaves: Leaves, sizes: dict[str, int], frozen: frozenset[str], phase: int):
        length = epochs if not frozen or retrain_epochs is None else retrain_epochs
        if not length:
            return leaves, None
        wide = resized(architecture, stages, sizes)
        # Passes begin with the same network, and may go on with it.
        if (wide, frozen) not in compiled:
            algorithm = _apart(task_of(network(wide)), optimizer, frozen)
            compiled[wide, frozen] = federate(algorithm, epochs=length, **local)
        return _trained(compiled[wide, frozen], leaves, like, clients, jax.random.fold_in(train_key, phase))

    there = np.isin(np.arange(clients.number), members).astype(np.int64)
    assignments: dict[str, np.ndarray] = {}
    history: list[tuple[dict[str, int], Traffic, Report | None]] = []
    sizes = dict(found.sizes)
    for turn in range(passes):
        if turn:
            leaves, sizes = _returned(found, leaves, members, assignments, sizes), dict(found.sizes)
        frozen: frozenset[str] = frozenset()
        for stage in stages:
            leaves, report = trained(leaves, sizes, frozen, len(history))
            width = found.sizes[stage.name]
            limit = None if growth is None else int(np.ceil(growth * width))
            assigned, size = _assigned(stage, leaves, members, limit, matching)
            up = _bytes(leaves, stage.leaves)
            leaves = _matched(found, stage, leaves, members, assigned, sizes)
            down = _bytes(leaves, stage.leaves) + np.dtype(np.int32).itemsize * width
            assignments[stage.name], sizes = assigned, {**sizes, stage.name: size}
            frozen |= stage.leaves
            history.append((widths(stages, sizes), Traffic(down * there, up * there), report))
        leaves, report = trained(leaves, sizes, frozen, len(history))
        rest = leaves.keys() - frozen
        leaves = _averaged(found, leaves, rest, members, shares)
        sent = _bytes(leaves, rest) * there
        history.append((widths(stages, sizes), Traffic(sent, sent), report))
    return FedMA(
        resized(architecture, stages, sizes),
        jax.tree.map(jnp.asarray, _one(leaves, members[0], like)),
        {layer: assignments[stage.name] for stage in stages for layer in stage.layers},
        *zip(*history, strict=True),
    )


# --- before anything is trained ---------------------------------------------------------------------------------------


class _Shares(NamedTuple):
    """How much each client counts in the last layer: [N], and where classes are counted [N, C]."""

    by_size: np.ndarray
    by_class: np.ndarray | None


def _checked(clients: Clients, epochs, retrain_epochs, passes, growth) -> np.ndarray:
    """The clients that have examples."""
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    if epochs < 0 or (retrain_epochs or 0) < 0:
        raise ValueError(f"epochs and retrain_epochs must not be negative, got {epochs} and {retrain_epochs}")
    if growth is not None and not growth >= 1:
        raise ValueError(f"growth must be at least 1, as clients keep all of their units, got {growth}")
    members = np.flatnonzero(np.asarray(clients.sizes) > 0)
    if not len(members):
        raise ValueError("clients: none has any examples")
    return members


def _begun(architecture, network, number: int, members: np.ndarray, start: Tree, key: jax.Array) -> tuple[Leaves, Tree]:
    """What clients begin with, and a tree of its structure."""
    init, example = training.from_linen(network(architecture)).init, jnp.zeros((1, *architecture.input_shape))
    if start is None:
        one = init(key, example)
        return {path: np.repeat(np.asarray(x)[None], number, 0) for path, x in trees.flatten_names(one).items()}, one
    one = jax.eval_shape(init, key, example)
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype), one)
    if difference := trees.first_mismatch(start, expected, ("start", f"variables of {number} clients")):
        raise ValueError(f"start must be the variables of all clients, leaves [{number}, ...]: {difference}")
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten_names(start).items()}
    for i in members:
        if not trees.all_finite({path: leaf[i] for path, leaf in leaves.items()}):
            raise ValueError(
                f"start: client {i} begins with what is not finite; give it other variables or no examples"
            )
    return leaves, one


def _found(architecture, network, variables: Tree, key: jax.Array) -> Permutations:
    module = network(architecture)
    apply = lambda variables, x: module.apply(variables, x)
    example = jax.random.normal(key, (2, *architecture.input_shape))
    found = derive(apply, variables, example)
    verify(found, apply, variables, example, key=key)
    return found


def _shares(found: Permutations, stages: tuple[Stage, ...], clients: Clients, class_counts: Any) -> _Shares:
    examples = np.asarray(clients.sizes, np.float64)
    by_size = examples / examples.sum()
    if class_counts is None:
        return _Shares(by_size, None)
    counts = np.asarray(class_counts, np.float64)
    matched = frozenset().union(*(stage.leaves for stage in stages))
    classes = {axis.size for path in found.axes.keys() - matched for _, axis in _outputs(found, path)}
    if counts.ndim != 2 or len(counts) != clients.number or {counts.shape[1]} != classes or not (counts >= 0).all():
        raise ValueError(
            f"class_counts must be [{clients.number}, C], not negative, with the outputs of the last layer for C, "
            f"{', '.join(map(str, classes))}; got {counts.shape}"
        )
    counts = counts * (examples > 0)[:, None]
    total = counts.sum(0)
    return _Shares(by_size, np.where(total > 0, counts / np.where(total > 0, total, 1), by_size[:, None]))


def _outputs(found: Permutations, path: str) -> list[tuple[int, Fixed]]:
    """Axes of a variable that count the network's outputs."""
    axes = enumerate(found.axes[path])
    return [(number, axis) for number, axis in axes if isinstance(axis, Fixed) and axis.reason == OUTPUT]


# --- local training ---------------------------------------------------------------------------------------------------


def _apart(task: Task, optimizer: optax.GradientTransformation, frozen: frozenset[str]) -> Algorithm:
    """Every client trains variables of its own, all but those that are frozen, and nothing is averaged."""

    def still(grads, context):
        return trees.map_named(lambda name, g: jnp.zeros_like(g) if f"params/{name}" in frozen else g, grads)

    def step(state, batch, key):
        new, metrics = local.step(state, batch, key)
        # Weight decay moves what has no gradient, and statistics of norms never have one.
        kept = trees.map_named(lambda name, old, x: old if name in frozen else x, state.variables, new.variables)
        return new._replace(variables=kept), metrics

    def final(state, server, own):
        # One number shows whether all of them are finite.
        return Upload({}, optax.tree.norm(state.variables)), state.variables

    local = local_training(task.loss, optimizer, correct=still)
    return Algorithm(
        init=lambda variables: (),
        variables=lambda server: {},
        own_init=lambda variables: variables,
        client_init=lambda server, own: local.start(own),
        client_step=step,
        client_final=final,
        server=lambda server, combined, about: server,
        personal=lambda server, own: own,
    )


def _trained(
    federation: Federation, leaves: Leaves, like: Tree, clients: Clients, key: jax.Array
) -> tuple[Leaves, Report]:
    own = trees.unflatten_names({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, like)
    state = federation.init(key, jax.tree.map(lambda leaf: leaf[0], own), clients)._replace(own=own)
    state, report = federation.round(state, clients)
    return {path: np.asarray(leaf) for path, leaf in trees.flatten_names(state.own).items()}, report


# --- matching; variables of all clients are leaves [N, ...] by path ---------------------------------------------------


def _assigned(
    stage: Stage, leaves: Leaves, members: np.ndarray, limit: int | None, settings: Mapping[str, Any]
) -> tuple[np.ndarray, int]:
    """The global unit of every unit, int64 [N, J], and how many there are."""
    # Units are matched by all parameters that they index: what they read, their bias, the scale of their norm.
    read = [path for path in stage.counted if path.startswith("params/")]
    rows = lambda leaf: leaf.reshape(-1, leaf.shape[-1]).T.astype(np.float64)
    units = [np.concatenate([rows(leaves[path][i]) for path in read], axis=1) for i in members]
    scale = float(np.sqrt(np.mean([(mine**2).sum(1) for mine in units]))) or 1.0
    relative = {name: settings[name] * scale for name in ("sigma", "sigma_zero")}
    matching = match_units(units, limit=limit, **{**settings, **relative})
    number = len(leaves[read[0]])
    assigned = np.full((number, units[0].shape[0]), -1, np.int64)
    assigned[members] = matching.assignments
    return assigned, len(matching.counts)


def _matched(
    found: Permutations,
    stage: Stage,
    leaves: Leaves,
    members: np.ndarray,
    assigned: np.ndarray,
    sizes: Mapping[str, int],
) -> Leaves:
    """Everyone with the mean of the matched layers, and with later layers that read these."""
    counts = np.bincount(assigned[members].reshape(-1))
    places = np.full((len(assigned), len(counts)), -1)
    for i in members:
        places[i, assigned[i]] = np.arange(assigned.shape[1])
    result = {}
    for path, every in leaves.items():
        if path not in stage.leaves:
            of = ({path: mine} for mine in every)
            result[path] = np.stack(
                [moved(found, mine, {stage.name: old}, sizes)[path] for mine, old in zip(of, places, strict=True)]
            )
            continue
        if path in stage.counted and jnp.issubdtype(every.dtype, jnp.inexact):
            sums = np.zeros((len(counts), *every.shape[1:-1]))
            for i in members:
                sums[assigned[i]] += np.moveaxis(every[i].astype(np.float64), -1, 0)
            mean = (np.moveaxis(sums, 0, -1) / counts).astype(every.dtype)
        else:
            mean = _mean(every[members], 1 / len(members))
        result[path] = np.repeat(mean[None], len(every), 0)
    return result


def _averaged(
    found: Permutations, leaves: Leaves, paths: Collection[str], members: np.ndarray, shares: _Shares
) -> Leaves:
    """Everyone with the mean of these variables, that of each class by its own shares."""
    result = dict(leaves)
    for path in paths:
        own = leaves[path][members]
        weights, shape = shares.by_size, [len(members), *(1,) * (own.ndim - 1)]
        if shares.by_class is not None:
            for number, axis in _outputs(found, path):
                weights, shape[number + 1] = shares.by_class, axis.size
        result[path] = np.repeat(_mean(own, weights[members].reshape(shape))[None], len(leaves[path]), 0)
    return result


def _mean(own: np.ndarray, weights: Any) -> np.ndarray:
    """Weighted sum over clients [M, ...]; of counters, which have no mean, the greatest."""
    if not jnp.issubdtype(own.dtype, jnp.inexact):
        return own.max(0)
    return (own.astype(np.float64) * weights).sum(0).astype(own.dtype)


def _returned(
    found: Permutations,
    leaves: Leaves,
    members: np.ndarray,
    assignments: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
) -> Leaves:
    """Everyone with its own units of the global network."""
    whole = {path: leaf[members[0]] for path, leaf in leaves.items()}
    number = len(next(iter(leaves.values())))
    parts = [moved(found, whole, {name: every[i] for name, every in assignments.items()}, sizes) for i in range(number)]
    return {path: np.stack([part[path] for part in parts]) for path in whole}


def _one(leaves: Leaves, number: int, like: Tree) -> Tree:
    return trees.unflatten_names({path: leaf[number] for path, leaf in leaves.items()}, like)


def _bytes(leaves: Leaves, paths: Collection[str]) -> int:
    """Of one client."""
    return sum(leaves[path][0].nbytes for path in paths)
