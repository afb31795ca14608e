"""Aggregates: one set of variables from those of the clients.

Means and feature-paired means are sums: they take the clients one after the other and keep none. Robust aggregates
need them all at once.

Letters: N clients, M of them in a round, G groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.federated import robust as robust_of
from jaxeff.federated.paired import WEIGHTS, add, empty, fixed_result, paired_average, result, term

Tree = Any


class Member(NamedTuple):
    """A client of a round, as an aggregate sees it.

    Attributes:
      number: which client, int32.
      size: examples it holds, float32.
      counted: float32; 0 for one that did not report, holds nothing or sent what is not finite; below 1 where it
        counts less, as it is late.
      round: int32, rounds that were finished before.
    """

    number: jax.Array
    size: jax.Array
    counted: jax.Array
    round: jax.Array


class Aggregate(NamedTuple):
    """How variables of clients become one.

    Attributes:
      weight: member -> how much it counts in means of other things that it sends, not negative.
      combine: (stacked variables [M, ...], members [M], previous variables) -> variables.
      empty: previous variables -> sums over nobody. None, as are the next two, for what needs all clients at once.
      term: (variables, member) -> its part of the sums.
      result: (sums, previous variables) -> variables.
      check: sizes int [N] -> None; raises ValueError where the aggregate does not fit these clients.
      over: (expected, owners) -> the same with fixed denominators, as of `fixed`; None where a client may count more
        than another, so that what one of them can change has no bound.
    """

    weight: Callable[[Member], jax.Array]
    combine: Callable[[Tree, Member, Tree], Tree]
    empty: Callable[[Tree], Tree] | None = None
    term: Callable[[Tree, Member], Tree] | None = None
    result: Callable[[Tree, Tree], Tree] | None = None
    over: Callable[..., "Aggregate"] | None = None
    check: Callable[[np.ndarray], None] = lambda sizes: None


def mean(by: str = "size") -> Aggregate:
    """Weighted mean: FedAvg's.

    Args:
      by: "size", the examples of a client, or "uniform".
    """
    return paired(None, np.zeros((1, 1), np.float32), by)


def paired(group_axes: Tree, omega: Any, by: str = "size") -> Aggregate:
    """Feature-paired mean: Fed2's.

    Args:
      group_axes: as of `jaxeff.federated.paired_average`, of the variables: a prefix of them.
      omega: [N, G], how much each client counts in each group, as of `group_weights`.
      by: how clients count in what all share: "size" or "uniform".

    Raises:
      ValueError: for an unknown `by`.
    """
    weight = _weight(by)
    omega = jnp.asarray(omega, jnp.float32)

    def of_groups(member):
        # Without groups there is one row, for whoever it is.
        return jnp.take(omega, member.number, 0, mode="clip") * member.counted[..., None]

    def one(variables, member):
        return term(variables, group_axes, of_groups(member), weight(member))

    def nobody(previous):
        return empty(previous, group_axes, omega.shape[1])

    def fixed(expected, owners=None):
        """Denominators that no client changes: privacy needs them."""
        finish = lambda sums, previous: fixed_result(sums, group_axes, previous, expected, owners)

        def combine(stacked, members, previous):
            sums, _ = jax.lax.scan(lambda so_far, m: (add(so_far, one(*m)), None), nobody(previous), (stacked, members))
            return finish(sums, previous)

        return Aggregate(weight, combine, nobody, one, finish, check=check)

    def check(sizes):
        if group_axes is not None and len(sizes) != len(omega):
            raise ValueError(f"omega has weights of {len(omega)} clients, but there are {len(sizes)}")

    alike = by == "uniform" and bool(np.isin(np.asarray(omega), (0, 1)).all())
    return Aggregate(
        weight,
        lambda stacked, members, previous: paired_average(
            stacked, group_axes, of_groups(members), weight(members), previous
        ),
        nobody,
        one,
        lambda sums, previous: result(sums, group_axes, previous),
        fixed if alike else None,
        check,
    )


def robust(
    rule: Callable[[Tree, jax.Array], Tree],
    *,
    least: int,
    group_axes: Tree = None,
    omega: Any = None,
    clip: float | None = None,
) -> Aggregate:
    """A robust aggregate of `jaxeff.federated.robust`, over the owners of each group where there are groups.

    Args:
      rule: (stacked, counted bool [M]) -> tree, for example `robust.median`, or
        `lambda stacked, counted: robust.krum(stacked, counted, 2)`.
      least: members that must be counted, of all and of the owners of each group: 1 for medians, 2 f + 3 for Krum and
        4 f + 3 for Bulyan; a round of fewer leaves the variables as they were.
      group_axes, omega: as of `paired`; None for no groups.
      clip: L2 norm to which updates are clipped first.

    Returns:
      The aggregate. Members that count less because they are late count as one.

    Raises:
      ValueError: for groups that never have so many owners; from `Federation.init`, for clients that are fewer.
    """
    owners = None if omega is None else jnp.asarray(omega, jnp.float32)
    if omega is not None:
        having = (np.asarray(omega) > 0).sum(0)
        if (having < least).any():
            few = ", ".join(f"{g} ({having[g]})" for g in np.flatnonzero(having < least))
            raise ValueError(
                f"the rule needs {least} owners of each group, but these have fewer: {few}; take a rule that needs "
                "fewer, such as the median, or fewer groups"
            )

    def check(sizes):
        if len(sizes) < least:
            raise ValueError(f"the rule needs {least} clients, but there are {len(sizes)}")
        if owners is not None and len(sizes) != len(owners):
            raise ValueError(f"omega has weights of {len(owners)} clients, but there are {len(sizes)}")

    def combine(stacked, members, previous):
        counted = members.counted > 0
        # What is not counted may be NaN, which not every rule keeps out by itself.
        there = lambda leaf: counted.reshape(-1, *(1,) * (leaf.ndim - 1))
        stacked = jax.tree.map(lambda leaf, old: jnp.where(there(leaf), leaf, old), stacked, previous)
        if clip is not None:
            stacked = robust_of.clipped(stacked, previous, clip)
        if group_axes is None or owners is None:
            found = rule(stacked, counted)
        else:
            owned = jnp.take(owners, members.number, 0, mode="clip")
            found = robust_of.by_group(rule, stacked, group_axes, owned, counted, previous, least=least)
        enough = counted.sum() >= least
        return jax.tree.map(lambda new, old: jnp.where(enough, new, old), found, previous)

    return Aggregate(_weight("uniform"), combine, check=check)


def _weight(by: str) -> Callable[[Member], jax.Array]:
    if by not in ("size", "uniform"):
        raise ValueError(f"by must be 'size' or 'uniform' (those of groups are {', '.join(WEIGHTS)}), got {by!r}")
    return (lambda member: member.size * member.counted) if by == "size" else (lambda member: member.counted)
