"""Clients: who holds which examples, and in which batches they see them.

All examples lie on the device once; a client is a row of numbers of examples. Clients of different sizes have rows of
one length, and masks say what of a batch is theirs, so that no size is compiled for.

Letters: N clients, n examples, R examples of the largest client, B batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.federated.partition import Partition

MASK = "mask"


class Clients(NamedTuple):
    """A pytree, handed to compiled rounds as an argument.

    Attributes:
      arrays: all examples by name, [n, ...].
      rows: int32 [N, R], numbers of the examples of each client; padded at the end by the first of them, so that
        nothing of another client is ever read.
      sizes: int32 [N], how many of these are its own.
      own: what each client brings to its batches beside examples, [N, ...] by name.
    """

    arrays: dict[str, jax.Array]
    rows: jax.Array
    sizes: jax.Array
    own: dict[str, jax.Array]

    @property
    def number(self) -> int:
        """N."""
        return self.rows.shape[0]


def clients_of(arrays: Mapping[str, Any], partition: Partition | Any, own: Mapping[str, Any] | None = None) -> Clients:
    """Clients of a partition.

    Args:
      arrays: all examples by name, [n, ...], for example those of a `jaxeff.data.Dataset`.
      partition: a `Partition`, or for each client the numbers of its examples; a client may have none.
      own: arrays [N, ...] by name that join every batch of a client, such as the classes it may answer with.

    Raises:
      ValueError: for arrays of unequal length, numbers out of range, names that are taken, or no clients.
    """
    parts = [np.asarray(part, np.int64) for part in getattr(partition, "indices", partition)]
    own = dict(own or {})
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"arrays must all have one length, that of the examples, got {lengths}")
    if not parts:
        raise ValueError("partition has no clients")
    examples = next(iter(lengths.values()))
    for number, part in enumerate(parts):
        if part.ndim != 1 or (len(part) and not (0 <= part.min() and part.max() < examples)):
            raise ValueError(f"client {number} must hold numbers of examples in 0..{examples - 1}, got {part}")
    if taken := sorted({MASK, *arrays} & set(own)):
        raise ValueError(f"own must have names that batches do not have already, got {', '.join(taken)}")
    if wrong := {name: np.shape(a) for name, a in own.items() if np.shape(a)[:1] != (len(parts),)}:
        raise ValueError(f"own must have one entry for each of the {len(parts)} clients, got {wrong}")
    rows = np.zeros((len(parts), max(1, max(map(len, parts)))), np.int32)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
        row[len(part) :] = part[0] if len(part) else 0
    return Clients(
        {name: jnp.asarray(array) for name, array in arrays.items()},
        jnp.asarray(rows),
        jnp.asarray([len(part) for part in parts], jnp.int32),
        {name: jnp.asarray(array) for name, array in own.items()},
    )


def steps_per_epoch(size: jax.Array, batch_size: int) -> jax.Array:
    """Batches of one epoch of a client; the last one may be filled in part only."""
    return -(-size // batch_size)


def shuffled(clients: Clients, number: jax.Array, key: jax.Array, batch_size: int) -> jax.Array:
    """Numbers of the examples of a client in random order, int32 [R rounded up to whole batches]; padding is last."""
    row, size = clients.rows[number], clients.sizes[number]
    length = -(-len(row) // batch_size) * batch_size
    drawn = jax.random.bits(key, row.shape) >> 1
    order = jnp.argsort(jnp.where(jnp.arange(len(row)) < size, drawn, jnp.uint32(2**32 - 1)))
    # Padding is the client's first example, however long the row is: batch norm sees it, though the loss does not.
    own = jnp.where(jnp.arange(len(row)) < size, row[order], row[0])
    return jnp.concatenate([own, jnp.broadcast_to(row[0], (length - len(row),))])


def batch_at(
    clients: Clients, number: jax.Array, order: jax.Array, place: jax.Array, batch_size: int
) -> dict[str, jax.Array]:
    """Batch `place` of an epoch.

    Args:
      clients: the clients.
      number: which of them.
      order: of `shuffled`.
      place: in 0..steps_per_epoch - 1.
      batch_size: B.

    Returns:
      The examples by name, [B, ...]; "mask" float32 [B], 1 for those that are there and 0 for padding; what the client
      brings of its own, [...].
    """
    start = place * batch_size
    picked = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
    mask = (start + jnp.arange(batch_size) < clients.sizes[number]).astype(jnp.float32)
    examples = {name: jnp.take(array, picked, 0, mode="clip") for name, array in clients.arrays.items()}
    return {**examples, MASK: mask, **{name: array[number] for name, array in clients.own.items()}}
