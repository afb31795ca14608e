"""Differential privacy of clients: clipped updates and Gaussian noise, by the server or by each client itself.

Both take an algorithm and give one, so that they compose with every other: `central(fed_avg(task, sgd), ...)`.

What is private is that a client took part, with all of its examples. A client changes the sum of the updates by no more
than the norm S to which each is clipped; noise of standard deviation z S hides it. That holds only where all clients
count alike and the sum is divided by a number that none of them changes: means weighted by examples or by classes are
refused, as the weights themselves would tell (McMahan et al., ICLR 2018).

The norm may follow a quantile of the clients' norms, which itself is learned from noisy counts (Andrew et al., NeurIPS
2021). What is spent is computed by `dp_accounting`, of the extra "privacy".

What a server sees of who owns which label:

    full mode, plain or compressed    the update of a client, from which labels can often be inferred
    subset mode of Fed2               which groups a client has, so which classes: before any inference
    class counts as weights           the counts
    secure aggregation                sums alone, in full mode; a subset is visible even where it is masked
    central noise                     all of the above; those who see the model later see no client
    local noise                       a noisy update; in subset mode still which groups
    medians, Krum, Bulyan             single updates, which they need

Letters: N clients, S norm, z noise multiplier, G groups.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff import trees
from jaxeff.federated.algorithms.base import Algorithm, with_random_final
from jaxeff.federated.participation import Participation

Tree = Any
ACCOUNTANTS: tuple[str, ...] = ("rdp", "pld")


class Quantile(NamedTuple):
    """A norm that follows a quantile of the clients' norms.

    Attributes:
      start: the first norm.
      quantile: share of the clients whose update is to be within the norm.
      rate: of the logarithm of the norm, in a round.
      noise: standard deviation of the noise on the count of clients within it; None for a twentieth of those expected,
        and no less than the noise multiplier.
    """

    start: float
    quantile: float = 0.5
    rate: float = 0.2
    noise: float | None = None


class Private(NamedTuple):
    """The server of a private algorithm: that of the algorithm, and the norm to which updates are clipped."""

    inner: Tree
    norm: jax.Array


def central(
    algorithm: Algorithm, *, clip: float | Quantile, noise: float, expected: float, owners: Any = None
) -> Algorithm:
    """Clips what clients send and lets the server add noise to the sum.

    Args:
      algorithm: whose clients send variables alone, and whose aggregate counts all of them alike.
      clip: S, L2 norm over all floating-point variables together; or how it is found.
      noise: z; together with the noise on counts, where the norm is found.
      expected: clients of a round, a number fixed beforehand by which sums are divided: `Participation.asked`, or the
        probability of taking part times N.
      owners: [G], the same for the groups of a feature-paired aggregate; None for `expected`.

    Returns:
      The algorithm; its server is `Private`. Reports of rounds, which count clients, are the simulator's and no part of
      what is private.

    Raises:
      ValueError: for an aggregate whose weights differ between clients or that is none of sums, settings out of range,
        or, when it is traced, clients that send more than variables.
    """
    target = _target(clip)
    _check("noise", noise)
    if not expected > 0 or (owners is not None and not (np.asarray(owners) > 0).all()):
        raise ValueError(f"expected and owners must be positive numbers of clients, got {expected} and {owners}")
    if algorithm.aggregate.over is None:
        raise ValueError(
            "the aggregate gives clients weights of their own (examples, class counts), or is none of sums: what one "
            "of them can change has no bound, so no noise hides it. Take aggregates.mean('uniform'), or "
            "fed2.aggregate(..., by='uniform', shared_by='uniform')"
        )
    aggregate, personal = algorithm.aggregate.over(expected, owners), algorithm.personal
    of_counts, z = _noises(target, noise, expected)

    def final(state, server, own):
        upload, own = algorithm.client_final(state, server.inner, own)
        upload = _variables_only(upload)
        start = algorithm.variables(server.inner)
        variables, within = _clipped(upload.variables, start, server.norm)
        return upload._replace(variables=variables, sum=(within - 0.5,) if target.rate else ()), own

    def act(server, combined, about):
        key, count_key = jax.random.split(about.key)
        assert aggregate.empty is not None and aggregate.result is not None
        before = algorithm.variables(server.inner)
        # What the aggregate makes of noise alone, so that groups get theirs by their own denominators.
        nobody = aggregate.empty(before)
        zeros = optax.tree.zeros_like(before)
        added = aggregate.result({**nobody, "sums": _gaussian(key, nobody["sums"], z * server.norm)}, zeros)
        variables = jax.tree.map(_plus, combined.variables, added)
        inner = algorithm.server(server.inner, combined._replace(variables=variables, sum=()), about)
        norm = server.norm
        if target.rate:
            share = 0.5 + (combined.sum[0] + of_counts * jax.random.normal(count_key)) / expected
            norm = norm * jnp.exp(-target.rate * (share - target.quantile))
        return Private(inner, norm)

    return algorithm._replace(
        init=lambda variables: Private(algorithm.init(variables), jnp.float32(target.start)),
        variables=lambda server: algorithm.variables(server.inner),
        client_init=lambda server, own: algorithm.client_init(server.inner, own),
        client_final=final,
        server=act,
        personal=None if personal is None else lambda server, own: personal(server.inner, own),
        aggregate=aggregate,
        always=True,
        # Their updates would be clipped to an old norm, and hidden by the noise of the new one.
        from_old=not target.rate,
    )


def local(algorithm: Algorithm, *, clip: float, noise: float) -> Algorithm:
    """Lets every client clip its update and add noise to it, so that it need not trust the server.

    Args:
      algorithm: whose clients send variables alone.
      clip: S, L2 norm over all floating-point variables together.
      noise: z, of every single client: its noise has standard deviation z S in each number.

    Raises:
      ValueError: for settings out of range, or, when it is traced, clients that send more than variables.
    """
    _check("clip", clip)
    _check("noise", noise)

    def final(state, server, own, key):
        upload, own = algorithm.client_final(state, server, own)
        upload = _variables_only(upload)
        variables, _ = _clipped(upload.variables, algorithm.variables(server), jnp.float32(clip))
        added = _gaussian(key, variables, noise * clip)
        return upload._replace(variables=jax.tree.map(_plus, variables, added)), own

    return with_random_final(algorithm, final)


def epsilon(
    noise: float,
    *,
    rounds: int,
    delta: float,
    clients: int,
    participation: Participation | None = None,
    accountant: str = "rdp",
) -> float:
    """What rounds of `central` have spent.

    Clients that come by themselves, `Participation(available=q)`, are a Poisson sample: neighbours differ by one
    client. A `fraction` of them is a sample of fixed size: neighbours replace a client, which changes a sum by 2 S.

    Args:
      noise: z.
      rounds: that were done.
      delta: probability with which epsilon need not hold, well below 1 / clients.
      clients: N.
      participation: who takes part; None for everyone.
      accountant: "rdp", or "pld", which is tighter and knows no samples of fixed size.

    Raises:
      ImportError: without the extra "privacy".
      ValueError: for settings out of range, an unknown accountant, or participation that is neither of the two.
    """
    make, event = _accounting(rounds, delta, clients, participation, accountant)
    _check("noise", noise)
    return float(make().compose(event(noise)).get_epsilon(delta))


def noise_for(
    target: float,
    *,
    rounds: int,
    delta: float,
    clients: int,
    participation: Participation | None = None,
    accountant: str = "rdp",
) -> float:
    """The least noise multiplier z with which rounds of `central` spend no more than an epsilon.

    Args:
      target: the epsilon.
      rounds, delta, clients, participation, accountant: as of `epsilon`.

    Raises:
      ImportError, ValueError: as `epsilon`.
    """
    make, event = _accounting(rounds, delta, clients, participation, accountant)
    _check("target", target)
    import dp_accounting

    bracket = dp_accounting.LowerEndpointAndGuess(1e-2, 1.0)
    return float(dp_accounting.calibrate_dp_mechanism(make, event, target, delta, bracket))


def local_epsilon(noise: float, *, rounds: int, delta: float, accountant: str = "rdp") -> float:
    """What a client spends that sends its noisy update in so many rounds of `local`: any two differ by up to 2 S.

    Raises:
      ImportError, ValueError: as `epsilon`.
    """
    make, event = _accounting(rounds, delta, 1, None, accountant)
    _check("noise", noise)
    return float(make().compose(event(noise / 2)).get_epsilon(delta))


def _accounting(rounds: int, delta: float, clients: int, how: Participation | None, accountant: str):
    """A maker of accountants, and noise -> what happens in all rounds."""
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {', '.join(map(repr, ACCOUNTANTS))}, got {accountant!r}")
    if rounds < 1 or not 0 < delta < 1:
        raise ValueError(f"rounds must be at least 1 and delta in (0, 1), got {rounds} and {delta}")
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise ImportError('accounting needs the extra "privacy": pip install "jaxeff[privacy]"') from error
    how = how or Participation()
    poisson = np.ndim(how.available) == 0 and how.fraction == 1
    fixed = np.ndim(how.available) == 0 and how.available == 1
    if not (poisson or fixed):
        raise ValueError(
            "participation must be a fraction of the clients, or all of them with one probability of being available; "
            f"nothing is known of both together, or of several probabilities: {how}"
        )
    if not poisson and accountant == "pld":
        raise ValueError("accountant 'pld' knows no samples of fixed size: take 'rdp', or clients with a probability")
    relation = dp_accounting.NeighboringRelation
    neighbours = relation.ADD_OR_REMOVE_ONE if poisson else relation.REPLACE_ONE

    def make():
        if accountant == "pld":
            return pld.PLDAccountant(neighbours)
        return rdp.RdpAccountant(neighboring_relation=neighbours)

    def event(noise):
        if poisson:
            one = dp_accounting.GaussianDpEvent(noise)
            sampled = dp_accounting.PoissonSampledDpEvent(float(np.asarray(how.available)), one)
            return dp_accounting.SelfComposedDpEvent(one if how.available == 1 else sampled, rounds)
        one = dp_accounting.GaussianDpEvent(noise / 2)
        sampled = dp_accounting.SampledWithoutReplacementDpEvent(clients, how.asked(clients), one)
        return dp_accounting.SelfComposedDpEvent(sampled, rounds)

    return make, event


def _target(clip: float | Quantile) -> Quantile:
    if not isinstance(clip, Quantile):
        _check("clip", clip)
        return Quantile(float(clip), rate=0.0)
    _check("clip: start", clip.start)
    _check("clip: rate", clip.rate)
    if not 0 < clip.quantile < 1:
        raise ValueError(f"clip: quantile must be in (0, 1), got {clip.quantile}")
    return clip


def _noises(target: Quantile, noise: float, expected: float) -> tuple[float, float]:
    """The noise on counts, and the multiplier for updates that leaves `noise` for both together.

    A count of who is within the norm, shifted by a half, changes by half a client: Andrew et al., Theorem 1.
    """
    if not target.rate:
        return 0.0, noise
    of_counts = max(expected / 20, noise) if target.noise is None else target.noise
    rest = noise**-2 - (2 * of_counts) ** -2 if of_counts > 0 else -1.0
    if rest <= 0:
        raise ValueError(
            f"clip: noise {of_counts} on the counts alone spends what a noise multiplier of {noise} allows: it must be "
            f"above {noise / 2}"
        )
    return of_counts, rest**-0.5


def _variables_only(upload):
    inexact = [leaf for leaf in jax.tree.leaves(upload.variables) if trees.is_inexact(leaf)]
    if narrow := {leaf.dtype.name for leaf in inexact if _wide(leaf).dtype != leaf.dtype}:
        raise ValueError(
            f"privacy needs float32 variables, got {', '.join(sorted(narrow))}: rounding would undo the clipping. Keep "
            "the parameters in float32 and compute in the narrow type"
        )
    if jax.tree.leaves((upload.mean, upload.sum)):
        raise ValueError(
            "clients of this algorithm send more than their variables (control variates, step counts), which would "
            "need a noise of its own: take one that sends variables alone, such as fed_avg, fed_prox or fed_opt"
        )
    return upload


def _clipped(variables: Tree, start: Tree, norm: jax.Array) -> tuple[Tree, jax.Array]:
    """Variables at most `norm` from where they started, integers where they were; and whether they were that near."""
    change = jax.tree.map(
        lambda new, old: _wide(new) - _wide(old) if trees.is_inexact(new) else jnp.zeros(()), variables, start
    )
    length = optax.tree.norm(change)
    scale = jnp.minimum(1.0, norm / jnp.maximum(length, 1e-30))
    near = lambda old, by: (_wide(old) + scale * by).astype(old.dtype) if trees.is_inexact(old) else old
    return jax.tree.map(near, start, change), (length <= norm).astype(jnp.float32)


def _gaussian(key: jax.Array, like: Tree, scale: Any) -> Tree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(1, len(leaves)))
    draw = lambda k, leaf: scale * jax.random.normal(k, leaf.shape) if trees.is_inexact(leaf) else leaf
    return jax.tree.unflatten(structure, [draw(k, leaf) for k, leaf in zip(keys, leaves, strict=False)])


def _plus(value: jax.Array, noise: jax.Array) -> jax.Array:
    return (value + noise).astype(value.dtype) if trees.is_inexact(value) else value


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _check(name: str, value: float) -> None:
    if not (value > 0 and np.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
