"""Secure aggregation, simulated: the server learns sums of what clients send, and nothing of any single one.

Every two clients share a secret number of which both draw the same mask; one adds it and the other subtracts it, so
that in the sum of all, masks vanish (Bonawitz et al., CCS 2017). Sums are of whole numbers modulo 2^32: they vanish
exactly. Of clients that drop out after masks were drawn, the others give the server the secrets that they shared with
them, and their masks are taken out of the sum.

What is simulated is the arithmetic, with real masks: what the server computes on are masked numbers. How secrets are
agreed on and shared is cryptography, which belongs to real networks and is not here.

Feature-paired averages are sums too, of weighted variables and of weights; they need full mode, as a client that sends
some groups only has told which those are. Medians and Krum need single clients and cannot be had.

Letters: M clients of a round, G groups.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff import trees
from jaxeff.federated.aggregates import Aggregate, Member, paired
from jaxeff.federated.paired import empty, result, term

Tree = Any
WHOLE = 2.0**30
"""Sums stay below it, and it is half of what a number with a sign can hold, so that rounding has room."""


class Masked(NamedTuple):
    """What clients have sent.

    Attributes:
      values: uint32 leaves [M, ...], masked.
      key: of the secrets.
    """

    values: Tree
    key: jax.Array


def secret(key: jax.Array, a: Any, b: Any, like: Tree) -> Tree:
    """The mask that two clients share, whichever of them draws it: uint32 leaves of the shapes of `like`."""
    own = jax.random.fold_in(jax.random.fold_in(key, jnp.minimum(a, b)), jnp.maximum(a, b))
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(own, max(1, len(leaves)))
    drawn = [jax.random.bits(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)


def mask(values: Tree, number: Any, clients: int, key: jax.Array) -> Tree:
    """What a client sends: its values, plus the masks it shares with those after it, minus those with those before it.

    Args:
      values: uint32 leaves [...].
      number: of the client, 0..clients - 1.
      clients: M.
      key: of the secrets.
    """

    def one(other, total):
        shared = secret(key, number, other, values)
        signed = lambda so_far, bits: (
            so_far + jnp.where(other == number, jnp.uint32(0), jnp.where(other > number, bits, -bits))
        )
        return jax.tree.map(signed, total, shared)

    return lax.fori_loop(0, clients, one, values)


def send(values: Tree, key: jax.Array) -> Masked:
    """What all clients send: uint32 leaves [M, ...], each masked by itself."""
    clients = len(jax.tree.leaves(values)[0])
    one = lambda member: mask(member[0], member[1], clients, key)
    return Masked(lax.map(one, (values, jnp.arange(clients))), key)


def receive(sent: Masked, reported: jax.Array) -> Tree:
    """The sum over those who reported, modulo 2^32, from masked values and the secrets shared with those who did not.

    Args:
      sent: of `send`.
      reported: bool [M]; what the others sent is not used.

    Returns:
      uint32 leaves [...].
    """
    clients = len(reported)
    there = lambda leaf: jnp.where(reported.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)
    total = jax.tree.map(lambda leaf: there(leaf).sum(0, dtype=jnp.uint32), sent.values)

    def unmasked(pair, total):
        a, b = pair // clients, pair % clients
        shared = secret(sent.key, a, b, total)
        left = reported[a] & ~reported[b]
        # Client a added the mask if it comes before b.
        return lax.cond(
            left,
            lambda: jax.tree.map(lambda so_far, bits: so_far - jnp.where(b > a, bits, -bits), total, shared),
            lambda: total,
        )

    return lax.fori_loop(0, clients * clients, unmasked, total)


def secure(
    key: jax.Array,
    *,
    bound: float,
    total: float,
    by: str = "size",
    group_axes: Tree = None,
    omega: Any = None,
) -> Aggregate:
    """A mean, or a feature-paired mean, of which the server sees sums alone.

    Args:
      key: of the secrets; those of a round are drawn from it and the number of the round.
      bound: on the size of any variable; what is larger is cut to it. A client rounds to steps of about
        bound / 2^30 of the whole.
      total: a public bound on the sum of the weights, for example all examples there are.
      by, group_axes, omega: as of `aggregates.paired`; without `omega` as of `aggregates.mean`.

    Returns:
      The aggregate. It covers variables; what an algorithm sends beside them is sent in the clear. Integers stay what
      they were.

    Raises:
      ValueError: for bounds that are not positive, or as `aggregates.paired`.
    """
    if not (bound > 0 and total > 0):
        raise ValueError(f"bound and total must be positive, got {bound} and {total}")
    weights = np.zeros((1, 1), np.float32) if omega is None else np.asarray(omega, np.float32)
    axes = None if omega is None else group_axes
    plain = paired(axes, weights, by)
    owned = jnp.asarray(weights)

    def combine(stacked: Tree, members: Member, previous: Tree) -> Tree:
        groups = jnp.take(owned, members.number, 0, mode="clip") * members.counted[:, None]
        shares = (groups / total, plain.weight(members) / total)

        def one(variables, of_groups, weight):
            cut = jax.tree.map(
                lambda leaf: jnp.clip(leaf, -bound, bound) if trees.is_inexact(leaf) else leaf, variables
            )
            sums = term(cut, axes, of_groups, weight)
            scale = {"omega": WHOLE, "weight": WHOLE, "sums": WHOLE / bound}
            whole = lambda name, leaf: (
                _whole(leaf, scale[name]) if trees.is_inexact(leaf) else jnp.zeros((), jnp.uint32)
            )
            return {name: jax.tree.map(lambda leaf, name=name: whole(name, leaf), part) for name, part in sums.items()}

        values = jax.vmap(one)(stacked, *shares)
        masks = jax.random.fold_in(key, members.round[0])
        got = receive(send(values, masks), members.counted > 0)
        zero = empty(previous, axes, owned.shape[1])
        real = lambda leaf, like, scale: _signed(leaf) / scale if trees.is_inexact(like) else like
        sums = {
            name: jax.tree.map(lambda leaf, like, by=by: real(leaf, like, by), got[name], zero[name])
            for name, by in (("omega", WHOLE), ("weight", WHOLE), ("sums", WHOLE / bound))
        }
        found = result(sums, axes, previous)
        return jax.tree.map(lambda new, old: new if trees.is_inexact(old) else old, found, previous)

    def check(sizes):
        plain.check(sizes)
        shared = float(sizes.sum()) if by == "size" else float(len(sizes))
        most = max(shared, float(weights.sum(0).max()))
        if most > total:
            raise ValueError(f"total bounds the sum of the weights, but these add up to {most:g}, more than {total:g}")

    return Aggregate(plain.weight, combine, check=check)


def _whole(leaf: jax.Array, scale: float) -> jax.Array:
    return lax.bitcast_convert_type(jnp.round(leaf.astype(jnp.float32) * scale).astype(jnp.int32), jnp.uint32)


def _signed(leaf: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(leaf, jnp.int32).astype(jnp.float32)
