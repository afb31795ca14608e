"""What a round costs: bytes to and from every client, found in the algorithm itself."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxeff import trees
from jaxeff.federated.algorithms.base import Algorithm
from jaxeff.federated.paired import SHARED, spread_axes
from jaxeff.federated.participation import Participation

Tree = Any


class Traffic(NamedTuple):
    """Bytes between the server and each client in a round that it takes part in: int64 [N]."""

    down: np.ndarray
    up: np.ndarray


def traffic(
    algorithm: Algorithm,
    variables: Mapping[str, Any],
    batch: Mapping[str, Any],
    clients: int,
    *,
    group_axes: Tree = None,
    owned: Any = None,
) -> Traffic:
    """Bytes of a round of an algorithm, from its traced functions.

    A client gets of the server's state what it reads, and sends what it does not just hand back: so SCAFFOLD counts its
    control variates both ways, FedBN leaves out norms, and what is compressed counts as what is sent in its place.

    Args:
      algorithm: of `jaxeff.federated.algorithms`, or a user's own.
      variables: that it begins with, for their shapes.
      batch: one batch, for its shapes, with "mask".
      clients: N.
      group_axes: of Fed2's subset mode, as of `jaxeff.federated.paired_average`: groups that a client does not own are
        neither sent nor received. None for all of it.
      owned: bool [N, G], of the same mode.

    Raises:
      ValueError: where only one of `group_axes` and `owned` is given.
    """
    if (group_axes is None) != (owned is None):
        raise ValueError("group_axes and owned belong together: give both, or neither for all of the variables")
    server = jax.eval_shape(algorithm.init, variables)
    own = jax.eval_shape(algorithm.own_init, variables)
    flat, structure = jax.tree.flatten(server)

    def exchange(leaves, own, batch):
        state: Any = structure
        start = state.unflatten(leaves)
        local, _ = algorithm.client_step(algorithm.client_init(start, own), batch, jax.random.key(0))
        return algorithm.client_final(local, start, own)[0]

    closed, upload = jax.make_jaxpr(exchange, return_shape=True)(flat, own, batch)
    jaxpr = closed.jaxpr
    known = jaxpr.invars[: len(flat)]
    read = {id(var) for equation in jaxpr.eqns for var in equation.invars}
    given = {id(var) for var in jaxpr.invars}
    down = sum(_bytes(leaf) for leaf, var in zip(flat, known, strict=True) if id(var) in read)
    wire = algorithm.wire or (lambda leaf: leaf)
    leaves = [*(jax.eval_shape(wire, leaf) for leaf in jax.tree.leaves(upload.variables))]
    leaves += jax.tree.leaves((upload.mean, upload.sum))
    up = sum(trees.nbytes(leaf) for leaf, var in zip(leaves, jaxpr.outvars, strict=True) if id(var) not in given)
    share = np.ones(clients) if owned is None else _share(group_axes, owned, variables)
    return Traffic(*(np.round(total * share).astype(np.int64) for total in (down, up)))


def expected_bytes(found: Traffic, how: Participation) -> float:
    """Bytes of a round in which clients take part as planned, on average: both ways, of all of them together.

    Args:
      found: of `traffic`.
      how: who takes part. What a client sends that is then lost is not counted.
    """
    clients = len(found.up)
    there = how.asked(clients) / clients * np.broadcast_to(np.asarray(how.available, np.float64), (clients,))
    arrives = (1 - how.dropout) * (1 - how.stragglers if how.late == "drop" else 1.0)
    return float((there * (found.down + arrives * found.up)).sum())


def _share(group_axes: Tree, owned: Any, variables: Tree) -> np.ndarray:
    """What each client exchanges of the variables, [N]; whatever else there is, is divided as they are."""
    axes = jax.tree.leaves(spread_axes(group_axes, variables))
    sizes = np.array([_bytes(leaf) for leaf in jax.tree.leaves(variables)], np.float64)
    grouped = sizes[np.array(axes) != SHARED].sum() / sizes.sum()
    return 1 - grouped + grouped * np.asarray(owned, np.float64).mean(1)


def _bytes(leaf: Any) -> int:
    return trees.nbytes([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)])
