"""Targeted dropout with ratio ascent: a network learns to do without what its gates will drop.

Unlike dropout nothing is random and nothing is rescaled: the channels and columns of lowest attention are dropped, more
of them as training goes on, and the same gates stay when the network is used (AntiDote, arXiv 2008.06543). The ratios
are traced, so a whole ascent is one compilation.

Letters: B blocks of `jaxeff.dynamic.blocks`, N batch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import spec
from jaxeff.dynamic.gate import blocks, readers
from jaxeff.dynamic.linen import RATIOS, engines_at_own_ratios, reading_ratios
from jaxeff.dynamic.settings import DynamicSpec

Schedule = Callable[[jax.Array], jax.Array]
ASCENT = "ascent"
"""Name of the collection that counts the steps of an ascent."""


class Functions(NamedTuple):
    """A network as two functions, the form that `jaxeff.training` takes.

    Attributes:
      init: (key, inputs) -> variables.
      apply: (variables, inputs, train, key) -> (outputs, all collections but "params").
    """

    init: Callable[[jax.Array, Any], dict[str, Any]]
    apply: Callable[[Mapping[str, Any], Any, bool, jax.Array | None], tuple[Any, dict[str, Any]]]


def ratio_ascent(targets: Any, *, start: float = 0.1, increment: float = 0.05, every: int) -> Schedule:
    """Ratios that climb in equal steps from a start to their targets, as a function of the training step.

    Args:
      targets: [B, 2], shares of channels and columns that are dropped in the end, in [0, 1).
      start: the first ratio, where the target is not below it (0.1: our default).
      increment: what a ratio grows by (0.05: our default).
      every: steps between two increments.

    Returns:
      step -> float32 [B, 2], traced or not.

    Raises:
      ValueError: for other shapes, ratios out of range, or a climb that never ends.
    """
    goal = jnp.asarray(targets, jnp.float32)
    if goal.ndim != 2 or goal.shape[1] != 2:
        raise ValueError(f"targets must be [blocks, 2] (channels, columns), got shape {goal.shape}")
    _check_ratios("targets", targets)
    _check_ratios("start", start)
    if not increment > 0 or every < 1:
        raise ValueError(f"increment must be above 0 and every at least 1, got {increment} and {every}")

    def schedule(step):
        return jnp.minimum(goal, start + increment * (jnp.asarray(step) // every))

    return schedule


def ascent_steps(targets: Any, *, start: float = 0.1, increment: float = 0.05, every: int) -> int:
    """Steps until `ratio_ascent` of these arguments has reached every target.

    Raises:
      ValueError: for a climb that never ends.
    """
    if not increment > 0:
        raise ValueError(f"increment must be above 0, got {increment}")
    _check_ratios("targets", targets)
    highest = float(jnp.max(jnp.asarray(targets)))
    return max(0, math.ceil(round((highest - start) / increment, 6))) * every


def block_paths(architecture: spec.Architecture) -> tuple[tuple[str, ...], ...]:
    """Paths of the gates of every block in `models.Network`'s variables: ("conv2/layer/gate", ...)."""
    reads = readers(architecture)
    return tuple(tuple(f"{reads[path]}/layer/gate" for path in paths) for paths in blocks(architecture))


def ratio_variables(paths: Sequence[Sequence[str]], table: Any) -> dict[str, Any]:
    """The collection "ratios" that gives every gate the ratios of its block.

    Args:
      paths: of the gates of each block, as of `block_paths`; for a network of one's own, the paths of its convolutions
        with "/gate" behind them.
      table: [B, 2], shares of channels and columns that are dropped; or [B, 2, N], another for each sample. Traced or
        not.

    Raises:
      ValueError: if there are not as many ratios as blocks, or ratios that are not traced are outside [0, 1).
    """
    _check_ratios("table", table)
    table = jnp.asarray(table)
    if table.shape[:2] != (len(paths), 2):
        raise ValueError(f"table must be [{len(paths)}, 2], a pair for each block, got shape {table.shape}")
    tree: dict[str, Any] = {}
    for block, (channels, columns) in zip(paths, table, strict=True):
        for path in block:
            node = tree
            for name in path.split("/"):
                node = node.setdefault(name, {})
            node.update(channels=channels, columns=columns)
    return tree


def targeted_dropout(
    functions: Any,
    paths: Sequence[Sequence[str]],
    schedule: Schedule,
) -> Functions:
    """A network whose gates follow a schedule while it learns; `jaxeff.training` takes the result as it is.

    The step is counted in the model's own state (collection "ascent"), so it is saved and resumed with it; evaluation
    has the ratios of the steps done so far.

    While ratios climb, gates mask, as shapes cannot follow. Where they have come to what the settings of a gate say,
    its engine leaves out what is dropped, forward and backward, if `jaxeff.dynamic.tune(..., train=True)` has measured
    that this is faster (or the settings name an engine). Both are branches of one program, of which a step runs one:
    the whole ascent is one compilation still.

    Args:
      functions: (init, apply) of a gated network, for example `jaxeff.training.from_linen(network)`; its gates have the
        last ratios of the schedule as their own.
      paths: of the gates of each block, as of `block_paths`.
      schedule: step -> [B, 2], for example `ratio_ascent(...)`.

    Returns:
      The functions of the same network under the schedule.
    """

    def start(key, inputs):
        return {**functions.init(key, inputs), ASCENT: {"step": jnp.zeros((), jnp.int32)}}

    def apply(variables, inputs, train, key):
        inner = {name: value for name, value in variables.items() if name != ASCENT}
        step = variables[ASCENT]["step"]
        with engines_at_own_ratios():
            outputs, state = _at(functions, paths, schedule(step), inner, inputs, train, key)
        return outputs, {**state, ASCENT: {"step": step + train}}

    return Functions(start, apply)


def sandwich(
    functions: Any,
    paths: Sequence[Sequence[str]],
    least: Any,
    most: Any,
) -> Functions:
    """A network that learns for all ratios between two at once: quarters of every batch have least, most, two random.

    The sandwich rule of slimmable networks (Yu and Huang 2019, arXiv 1903.05134) with a quarter of the batch for each
    of its four passes, so a step costs what it costs without it. Every quarter has its own batch statistics, as norms
    that see a mixture of ratios fit none of them. The running ones are those of the highest ratios, which evaluation
    has too; `calibrate` them for other ratios. Other state, such as losses of gates, is the mean of the four.

    Args:
      functions: (init, apply) of a gated network.
      paths: of the gates of each block, as of `block_paths`.
      least: [B, 2], the lowest ratios.
      most: [B, 2], the highest ratios.

    Returns:
      The functions of the same network under the rule. While training, `apply` needs a key and a batch of a multiple of
      four, whose examples belong to the quarters in turn; it raises ValueError otherwise.

    Raises:
      ValueError: for ratios outside [0, 1).
    """
    _check_ratios("least", least)
    _check_ratios("most", most)
    low, high = jnp.asarray(least, jnp.float32), jnp.asarray(most, jnp.float32)

    def at(table, *call):
        return _at(functions, paths, table, *call)

    def apply(variables, inputs, train, key):
        if not train:
            return at(high, variables, inputs, train, key)
        if key is None:
            raise ValueError("key: the sandwich rule draws ratios, so a PRNG key is needed when train=True")
        count = len(jax.tree.leaves(inputs)[0])
        if count % 4:
            raise ValueError(f"inputs: the sandwich rule trains on quarters, but the batch has {count} examples")
        drawn = jax.random.uniform(jax.random.fold_in(key, 1), (2,))
        share = jnp.concatenate([jnp.array([0.0, 1.0]), drawn])
        tables = low + (high - low) * share[:, None, None]
        # Turn by turn, so that every device of a mesh, which has neighbours, has all quarters.
        quarters = jax.tree.map(lambda array: array.reshape(-1, 4, *array.shape[1:]), inputs)
        each = jax.vmap(lambda table, part, key: at(table, variables, part, True, key), (0, 1, 0), (1, 0))
        outputs, state = each(tables, quarters, jax.random.split(key, 4))
        together = jax.tree.map(lambda array: array.reshape(count, *array.shape[2:]), outputs)
        running = {name: jax.tree.map(lambda leaf: leaf[1], state[name]) for name in ("batch_stats",) if name in state}
        return together, {**jax.tree.map(lambda leaf: leaf.mean(0).astype(leaf.dtype), state), **running}

    return Functions(functions.init, apply)


def calibrate(
    functions: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    paths: Sequence[Sequence[str]] = (),
    table: Any = None,
) -> dict[str, Any]:
    """Running statistics of batch norms, taken anew at given ratios: means over the batches.

    Args:
      functions: (init, apply) of a network with a collection "batch_stats" of means and variances, leaves called "mean"
        and "var"; where ratios are given here, not those of `targeted_dropout`, which has its own.
      variables: of the network.
      batches: inputs, each as large as a training batch.
      paths: of the gates of each block, as of `block_paths`; empty for the gates' own ratios.
      table: [B, 2], shares of channels and columns that are dropped; with `paths`, and only with them.

    Returns:
      The variables with the new statistics; those that do not change in training, of norms that are frozen, are kept.

    Raises:
      ValueError: without batches or statistics, for an empty batch, for paths without a table, or where something else
        sets the ratios.
    """
    if bool(len(paths)) != (table is not None):
        raise ValueError("paths and table belong together: give both, or neither for the gates' own ratios")
    rest = {name: value for name, value in variables.items() if name not in ("batch_stats", RATIOS)}
    old = variables.get("batch_stats")
    if not old:
        raise ValueError("variables have no batch_stats: there is nothing to calibrate")

    @jax.jit
    def updated(stats, inputs):
        call = {**rest, "batch_stats": stats}, inputs, True, jax.random.key(0)
        _, state = _at(functions, paths, table, *call) if len(paths) else functions.apply(*call)
        return state["batch_stats"]

    total, count = None, 0
    for inputs in batches:
        if not len(jax.tree.leaves(inputs)[0]):
            raise ValueError(f"batches: batch {count} is empty; its statistics would be NaN")
        if total is None:
            # What stays at any two constants is of frozen norms, which all others see as they are.
            tried = [jax.tree.map(lambda leaf, n=n: jnp.full_like(leaf, n), old) for n in (0.0, 1.0)]
            stays = [jax.tree.map(lambda a, b: (a == b).all(), stats, updated(stats, inputs)) for stats in tried]
            frozen = jax.tree.map(jnp.logical_and, *stays)
            zeros, ones = (jax.tree.map(jnp.where, frozen, old, stats) for stats in tried)
            # A norm keeps m * old + (1 - m) * batch; from zeros and from ones, both m and the batch's own are known.
            kept = jax.tree.map(jnp.subtract, updated(ones, inputs), updated(zeros, inputs))
        own = jax.tree.map(
            lambda fixed, was, value, m: jnp.where(fixed, was, value / jnp.where(fixed, 1, 1 - m)),
            frozen, old, updated(zeros, inputs), kept,
        )  # fmt: skip
        total = own if total is None else jax.tree.map(jnp.add, total, own)
        count += 1
    if total is None:
        raise ValueError("batches is empty: give at least one batch of inputs")
    return {**variables, "batch_stats": jax.tree.map(lambda value: value / count, total)}


def _at(functions, paths, table, variables, inputs, train, key):
    """Calls a network whose gates have the ratios of a table."""
    if RATIOS in variables:
        raise ValueError(
            "the ratios of the gates are given twice: take the functions of the network itself, not those of "
            "`targeted_dropout` or `sandwich`"
        )
    with reading_ratios(paths):
        outputs, state = functions.apply({**variables, RATIOS: ratio_variables(paths, table)}, inputs, train, key)
    return outputs, {name: value for name, value in state.items() if name != RATIOS}


def _check_ratios(name: str, ratios: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(ratios)):
        return
    values = np.asarray(ratios, np.float64)
    if not ((values >= 0) & (values < 1)).all():
        raise ValueError(f"{name}: ratios are shares that are dropped, in [0, 1), got {np.round(values, 6).tolist()}")


def with_ratios(architecture: spec.Architecture, table: Any) -> spec.Architecture:
    """The gated architecture with other ratios, static ones: what is deployed after training.

    Args:
      architecture: with gates.
      table: [B, 2], shares of channels and columns that are dropped in each block.

    Raises:
      ValueError: if there are not as many ratios as blocks, or no layer has a gate.
    """
    found = blocks(architecture)
    rows = [[round(float(value), 6) for value in row] for row in table]  # 0.1 in float32 is a little more
    if len(rows) != len(found):
        raise ValueError(f"table must have {len(found)} rows, one for each block, got {len(rows)}")
    gates = {path: layer.gate for path, layer in spec.walk(architecture) if isinstance(layer, spec.Conv)}
    if not any(isinstance(gate, DynamicSpec) for gate in gates.values()):
        raise ValueError(f"{architecture.name!r} has no gates to give ratios to: call `jaxeff.dynamic.gate` first")
    reads = readers(architecture)
    for paths, (channels, columns) in zip(found, rows, strict=True):
        for path in paths:
            gate = gates[reads[path]]
            if isinstance(gate, DynamicSpec):
                changed = dataclasses.replace(gate, channels=channels, columns=columns)
                architecture = spec.gate(architecture, changed, reads[path])
    return architecture
