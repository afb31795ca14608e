"""Compressed updates: few bits a number, or few of the numbers, with what was lost remembered for the next round.

    algorithm = compressed(fed_avg(task, sgd), quantised(4))

A codec makes a message of a leaf and a leaf of a message; the message has the types and shapes that really travel, so
that `traffic` counts its bytes. Rounding is random and without bias (QSGD, Alistarh et al., NeurIPS 2017); the largest
numbers alone are biased, and need error feedback (Stich et al., NeurIPS 2018): a client adds what earlier messages of
its lost to its next update.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxeff import trees
from jaxeff.federated.algorithms.base import Algorithm, with_random_final
from jaxeff.federated.privacy import Private

Tree = Any
BITS: tuple[int, ...] = (2, 4, 8, 16)


class Codec(NamedTuple):
    """How a leaf of floating-point numbers travels.

    Attributes:
      encode: (key, leaf) -> message, any pytree of arrays.
      decode: (message, shape) -> leaf, float32.
    """

    encode: Callable[[jax.Array, jax.Array], Tree]
    decode: Callable[[Tree, tuple[int, ...]], jax.Array]


def quantised(bits: int) -> Codec:
    """Whole numbers of so many bits, scaled by the largest number of the leaf, randomly rounded without bias.

    Args:
      bits: 2, 4, 8 or 16, the sign among them; less than a byte is packed.

    Raises:
      ValueError: for other numbers of bits.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    levels = 2 ** (bits - 1) - 1
    together = max(1, 8 // bits)

    def encode(key, leaf):
        flat = leaf.astype(jnp.float32).reshape(-1)
        scale = jnp.abs(flat).max(initial=0.0)
        # NaN stays in the scale, so that what it becomes is as little finite as it was.
        steps = jnp.where(scale > 0, flat / scale, 0) * levels
        whole = jnp.floor(steps + jax.random.uniform(key, flat.shape))
        if together == 1:
            return {"scale": scale, "steps": whole.astype(jnp.int8 if bits == 8 else jnp.int16)}
        low = jnp.pad((whole + levels).astype(jnp.uint8), (0, -len(flat) % together)).reshape(-1, together)
        return {"scale": scale, "steps": (low << _shifts(bits)).sum(1).astype(jnp.uint8)}

    def decode(message, shape):
        steps, size = message["steps"], math.prod(shape)
        if together > 1:
            low = (steps[:, None] >> _shifts(bits)) & jnp.uint8(2**bits - 1)
            steps = low.reshape(-1)[:size].astype(jnp.float32) - levels
        return (steps.astype(jnp.float32) * (message["scale"] / levels)).reshape(shape)

    return Codec(encode, decode)


def top_k(share: float, values: Codec | None = None) -> Codec:
    """The largest numbers of every leaf, and where they stand; the rest is zero.

    Args:
      share: of the numbers of a leaf, in (0, 1]; at least one.
      values: how the numbers themselves travel; None for as they are.

    Raises:
      ValueError: for a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")

    def encode(key, leaf):
        flat = leaf.astype(jnp.float32).reshape(-1)
        count = min(flat.size, max(1, math.ceil(share * flat.size)))
        _, places = lax.top_k(jnp.abs(flat), count)
        kept = flat[places]
        return {"places": places, "values": kept if values is None else values.encode(key, kept)}

    def decode(message, shape):
        places = message["places"]
        kept = message["values"] if values is None else values.decode(message["values"], places.shape)
        return jnp.zeros(math.prod(shape), jnp.float32).at[places].set(kept).reshape(shape)

    return Codec(encode, decode)


def compressed(algorithm: Algorithm, codec: Codec, *, feedback: bool = True) -> Algorithm:
    """Sends the updates of clients through a codec.

    Args:
      algorithm: any; what its clients send beside variables is not compressed.
      codec: of the floating-point variables. Integers travel as they are.
      feedback: whether clients remember what was lost, float32 of the size of the variables each.

    Returns:
      The algorithm; clients remember (what they did, what was lost).

    Raises:
      ValueError: when it is traced, for an algorithm that `privacy.central` made: noise is measured by the norm of what
        arrives, so compress first.
    """
    personal = algorithm.personal
    zeros = lambda variables: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), variables)

    def final(state, server, own, key):
        if isinstance(server, Private):
            raise ValueError("compress first and then make it private: central(compressed(...), ...)")
        mine, lost = own
        upload, mine = algorithm.client_final(state, server, mine)
        start = algorithm.variables(server)
        leaves, structure = jax.tree.flatten(upload.variables)
        before = jax.tree.leaves(start)
        missed = jax.tree.leaves(lost) if feedback else [jnp.zeros(())] * len(leaves)
        sent, rest = [], []
        for number, (new, old, more) in enumerate(zip(leaves, before, missed, strict=True)):
            if not trees.is_inexact(new):
                sent.append(new)
                rest.append(more)
                continue
            wanted = new.astype(jnp.float32) - old.astype(jnp.float32) + more
            arrived = codec.decode(codec.encode(jax.random.fold_in(key, number), wanted), new.shape)
            sent.append((old.astype(jnp.float32) + arrived).astype(new.dtype))
            # What the server reads, which narrow numbers round once more.
            rest.append(wanted - (sent[-1].astype(jnp.float32) - old.astype(jnp.float32)))
        lost = jax.tree.unflatten(structure, rest) if feedback else ()
        return upload._replace(variables=jax.tree.unflatten(structure, sent)), (mine, lost)

    def wire(leaf):
        return codec.encode(jax.random.key(0), leaf) if trees.is_inexact(leaf) else leaf

    made = algorithm._replace(
        own_init=lambda variables: (algorithm.own_init(variables), zeros(variables) if feedback else ()),
        client_init=lambda server, own: algorithm.client_init(server, own[0]),
        personal=None if personal is None else lambda server, own: personal(server, own[0]),
        wire=wire,
    )
    return with_random_final(made, final)


def loss_of(codec: Codec, key: jax.Array, tree: Tree) -> jax.Array:
    """Share of the squared norm of a tree that a codec loses: 0 for none."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)]
    keys = jax.random.split(key, max(1, len(leaves)))
    back = [codec.decode(codec.encode(k, leaf), leaf.shape) for k, leaf in zip(keys, leaves, strict=False)]
    lost = optax.tree.norm(optax.tree.sub(back, leaves), squared=True)
    return lost / jnp.maximum(optax.tree.norm(leaves, squared=True), 1e-30)


def _shifts(bits: int) -> jax.Array:
    return jnp.arange(0, 8, bits, dtype=jnp.uint8)
