"""Who takes part in a round: sampling, absence, dropouts, stragglers. All of it is weights, so no shape changes.

Random numbers belong to a round and a client, never to a place in a list, so that they are the same in every backend.

Letters: N clients, M of them asked in a round.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LATE: tuple[str, ...] = ("partial", "drop", "stale")


class Participation(NamedTuple):
    """How clients take part.

    Attributes:
      fraction: of the clients that are asked in a round, in (0, 1].
      available: probability that a client that is asked takes part; one for all or [N].
      dropout: probability that it trains, and is then lost.
      stragglers: probability that it is late.
      late: what becomes of those: "partial", they send what they have after a share of their steps, drawn from (0, 1);
        "drop", they are not waited for; "stale", they send an update of a model that is some rounds old, which counts
        less: 1 / (1 + age)^decay.
      staleness: of "stale", the greatest age; so many models are kept.
      decay: of "stale".
    """

    fraction: float = 1.0
    available: float | Sequence[float] = 1.0
    dropout: float = 0.0
    stragglers: float = 0.0
    late: str = "partial"
    staleness: int = 1
    decay: float = 0.5

    def asked(self, clients: int) -> int:
        """M: clients asked in a round."""
        return max(1, round(self.fraction * clients))


class Plan(NamedTuple):
    """A round's part of everyone asked, [M].

    Attributes:
      number: which client, int32, ascending.
      share: of its steps that it does, float32.
      reports: whether what it learned arrives, bool.
      age: of the model it starts from, int32, in rounds.
      discount: what its weight is multiplied with, float32.
    """

    number: jax.Array
    share: jax.Array
    reports: jax.Array
    age: jax.Array
    discount: jax.Array


def check_participation(how: Participation, clients: int) -> None:
    """Raises ValueError for what is out of range, before anything is traced."""
    if not 0 < how.fraction <= 1:
        raise ValueError(f"participation: fraction must be in (0, 1], someone has to take part, got {how.fraction}")
    available = np.asarray(how.available, np.float64)
    if available.shape not in ((), (clients,)) or not ((available >= 0) & (available <= 1)).all():
        raise ValueError(
            f"participation: available must be a probability, or one for each of the {clients} clients, got "
            f"{how.available}"
        )
    if not available.any():
        raise ValueError("participation: available is 0 for every client, so that nobody could take part")
    for name in ("dropout", "stragglers"):
        if not 0 <= getattr(how, name) < 1:
            raise ValueError(f"participation: {name} must be in [0, 1), got {getattr(how, name)}")
    if how.late not in LATE:
        raise ValueError(f"participation: late must be one of {', '.join(map(repr, LATE))}, got {how.late!r}")
    if how.staleness < 1 or how.decay < 0:
        raise ValueError(
            f"participation: staleness must be at least 1 and decay not negative, got {how.staleness}, {how.decay}"
        )


def planned(how: Participation, key: jax.Array, round_number: jax.Array, clients: int) -> Plan:
    """The plan of a round.

    Args:
      how: who takes part.
      key: of the round.
      round_number: int32; models before the first one cannot be older than it.
      clients: N.
    """
    keys = jax.vmap(lambda number: client_key(key, number))(jnp.arange(clients))
    draws = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0), (5,)))(keys)
    asked = how.asked(clients)
    number = jnp.arange(clients, dtype=jnp.int32)
    if asked < clients:
        number = jnp.sort(jnp.argsort(draws[:, 0])[:asked]).astype(jnp.int32)
    chance, lost, late, part = (draws[number, i] for i in range(1, 5))
    there = chance < jnp.broadcast_to(jnp.asarray(how.available, jnp.float32), (clients,))[number]
    slow = late < how.stragglers
    reports = there & (lost >= how.dropout)
    share, age = there.astype(jnp.float32), jnp.zeros(asked, jnp.int32)
    if how.stragglers and how.late == "drop":
        reports = reports & ~slow
    elif how.stragglers and how.late == "partial":
        share = jnp.where(slow, share * part, share)
    elif how.stragglers:
        oldest = jnp.minimum(round_number, how.staleness)
        age = jnp.where(slow, jnp.minimum((part * how.staleness).astype(jnp.int32) + 1, oldest), 0)
    return Plan(number, share, reports, age, (1.0 + age) ** -how.decay)


def client_key(key: jax.Array, number: Any) -> jax.Array:
    """Random numbers of a client in a round, from those of the round."""
    return jax.random.fold_in(key, number + 1)
