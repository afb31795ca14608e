"""Units of several networks as samples of common ones, of which there may be any number: PFNM's matching.

A client's layer is a set of units, each the sum of an atom, which all clients share, and noise. A beta process says
which atoms a client uses: one that c of the N clients use is used by another with odds c / (N - c), and each brings a
Poisson number of new ones, gamma / N on average. What is searched for is the most probable assignment of units to atoms
(Yurochkin et al., ICML 2019; layer by layer in Wang et al., ICLR 2020): given all other clients, that of one client is
an assignment problem, and clients take turns.

The costs and the turns are theirs. The stop, when everyone has had a turn and none changed anything, and the order of
the atoms are ours. The odds of an atom count twice in the cost, as does everything else that is the logarithm of a
probability; in the authors' programs they count once, and clients above ten do not count. How many atoms are new is
another number for each client, so turns lower no common cost, and some go round in circles until they are stopped.

Letters: N clients, J units or atoms, D values of a unit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment


class Matching(NamedTuple):
    """Units of all clients, matched.

    Attributes:
      atoms: float64 [J, D], the mean of the units of each atom. The most probable atom is this, drawn to zero by the
        factor c / (c + sigma^2 / sigma_zero^2); without that, equal networks are matched to what they are.
      assignments: for each client int64 [J_i], the atom of each unit; all different.
      counts: int64 [J], c, how many clients use each atom.
    """

    atoms: np.ndarray
    assignments: tuple[np.ndarray, ...]
    counts: np.ndarray


def match_units(
    units: Sequence[Any],
    *,
    sigma: float = 1.0,
    sigma_zero: float = 1.0,
    gamma: float = 1.0,
    iterations: int = 10,
    limit: int | None = None,
    seed: Any = 0,
) -> Matching:
    """Matches units of clients to common atoms, as many as it takes.

    Args:
      units: for each client float [J_i, D].
      sigma: deviation of units from their atom. It weighs the squared distance of whole vectors, and no normaliser goes
        with it: units become one atom where they are within a few sigma.
      sigma_zero: deviation of atoms from zero.
      gamma: mass of the beta process; the more, the more atoms.
      iterations: turns of all clients, at most; they end before when nothing changes.
      limit: atoms, at most; None for no limit.
      seed: of the order of the turns, for `numpy.random.default_rng`.

    Returns:
      The matching. Atoms are in the order in which units of the first client, then of the second and so on, use them.

    Raises:
      ValueError: for no clients, units that are not finite or not of one length D, settings that are not positive, or a
        limit below the units of one client.
    """
    check_settings(sigma, sigma_zero, gamma, iterations)
    rows = _checked(units, limit)
    state = _State(rows, sigma, sigma_zero, gamma, limit)
    random = np.random.default_rng(seed)
    for client in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        state.assign(client)
    for _ in range(iterations):
        before = state.labels()
        settled = True
        for client in random.permutation(len(rows)):
            state.release(client)
            state.assign(client)
            now = state.labels()
            settled &= all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))
            before = now
        if settled:
            break
    found = state.labels()
    counts = np.bincount(np.concatenate(found))
    sums = np.zeros((len(counts), rows[0].shape[1]))
    for mine, assigned in zip(rows, found, strict=True):
        sums[assigned] += mine
    return Matching(sums / counts[:, None], tuple(found), counts)


class _State:
    """Sums over the units of each atom, and who is in them."""

    def __init__(self, rows, sigma, sigma_zero, gamma, limit):
        self.rows, self.limit = rows, limit
        self.noise, self.prior, self.gamma = sigma**-2.0, sigma_zero**-2.0, gamma
        self.sums = np.zeros((0, rows[0].shape[1]))
        self.counts = np.zeros(0, np.int64)
        self.atoms: list[np.ndarray] = [np.zeros(0, np.int64)] * len(rows)

    def cost(self, mine: np.ndarray) -> np.ndarray:
        """Of each unit: twice the logarithm of the probability that is lost by each atom, and by the k-th new one."""
        clients, existing = len(self.rows), len(self.sums)
        slots = len(mine) if self.limit is None else min(len(mine), self.limit - existing)
        own, all_, cross = (mine**2).sum(1), (self.sums**2).sum(1), mine @ self.sums.T
        precision = self.prior + self.counts * self.noise
        gain = (own[:, None] + 2 * cross + all_) / (precision + self.noise) - all_ / precision
        known = -(self.noise**2) * gain - 2 * np.log(self.counts / (clients - self.counts))
        new = -(self.noise**2) * own[:, None] / (self.prior + self.noise)
        return np.hstack([known, new + 2 * np.log(np.arange(1, slots + 1) * clients / self.gamma)])

    def assign(self, client: int) -> None:
        mine, existing = self.rows[client], len(self.sums)
        columns = linear_sum_assignment(self.cost(mine))[1]
        new = columns >= existing
        atoms = np.where(new, existing + np.cumsum(new) - 1, columns)
        self.sums = np.vstack([self.sums, np.zeros((new.sum(), mine.shape[1]))])
        self.counts = np.concatenate([self.counts, np.zeros(new.sum(), np.int64)])
        self.sums[atoms] += mine
        self.counts[atoms] += 1
        self.atoms[client] = atoms

    def release(self, client: int) -> None:
        atoms = self.atoms[client]
        self.sums[atoms] -= self.rows[client]
        self.counts[atoms] -= 1
        left = self.counts > 0
        renamed = np.cumsum(left) - 1
        self.atoms[client] = np.zeros(0, np.int64)
        self.atoms = [renamed[other] for other in self.atoms]
        self.sums, self.counts = self.sums[left], self.counts[left]

    def labels(self) -> list[np.ndarray]:
        """Assignments, with atoms numbered as they first occur."""
        first = np.unique(np.concatenate(self.atoms), return_index=True)[1]
        rank = np.argsort(np.argsort(first))
        return [rank[atoms] for atoms in self.atoms]


def check_settings(sigma: float, sigma_zero: float, gamma: float, iterations: int) -> None:
    """Raises ValueError for settings of `match_units` that are out of range."""
    for name, value in (("sigma", sigma), ("sigma_zero", sigma_zero), ("gamma", gamma)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")


def _checked(units: Sequence[Any], limit: int | None) -> list[np.ndarray]:
    rows = [np.asarray(mine, np.float64) for mine in units]
    shapes = [mine.shape for mine in rows]
    if not rows or any(len(shape) != 2 or shape[0] < 1 or shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(f"units must be [J_i, D] for each client, with one D for all and units of all, got {shapes}")
    for number, mine in enumerate(rows):
        if not np.isfinite(mine).all():
            raise ValueError(f"units of client {number} are not finite; leave such a client out")
    most = max(len(mine) for mine in rows)
    if limit is not None and limit < most:
        raise ValueError(
            f"limit must be at least {most}, the units of one client, which all become different; got {limit}"
        )
    return rows
