"""One option from each menu, so that all fit a budget and cost least: greedy, and exact.

Each option takes bytes and leaves reads; what is least is the sum of reads.

    greedy    steps along the convex hull of every menu, most reads saved per byte first; in a second try behind the one
              option that saves most. The better try saves at least half of what could be saved, and near all of it
              where options are many and small
    exact     dynamic programming over partial choices that none beats in both (Nemhauser and Ullmann, Management
              Science 1969), cut by the bound of the linear relaxation
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Sums of the same reads in another order differ by less, relative to the largest.
_ROUNDING = 1e-12


class OverBudget(ValueError):
    """What must lie in fast memory is more than there is."""


class Option(NamedTuple):
    """One way to place a table: its tier, bytes of fast memory, and rows of a query read from slow memory."""

    tier: str
    bytes: float
    reads: float


def greedy(menus: Sequence[Sequence[Option]], budget: float) -> tuple[Option, ...]:
    """Chooses by reads saved per byte.

    Args:
      menus: of each table, at least one option.
      budget: bytes of all chosen options together.

    Returns:
      One option of each menu.

    Raises:
      OverBudget: if the smallest options do not fit.
    """
    problem = _Problem.of(menus, budget)
    return problem.options(_greedy(problem))


def exact(menus: Sequence[Sequence[Option]], budget: float, *, max_states: int = 1 << 20) -> tuple[Option, ...]:
    """Chooses so that no choice within the budget reads less.

    Args:
      menus: as of `greedy`.
      budget: as of `greedy`.
      max_states: partial choices that are looked at together; each takes some 50 bytes, and 16 for each menu.

    Returns:
      One option of each menu.

    Raises:
      OverBudget: as `greedy`.
      ValueError: where more states would be needed.
    """
    problem = _Problem.of(menus, budget)
    return problem.options(_exact(problem, max_states))


class _Upgrades(NamedTuple):
    """Steps along the convex hulls of all menus, most reads saved per byte first; each [steps].

    Attributes:
      owner: menu.
      option: that the step leads to, in its menu.
      bytes: more than the option before.
      saved: reads.
    """

    owner: np.ndarray
    option: np.ndarray
    bytes: np.ndarray
    saved: np.ndarray


class _Problem(NamedTuple):
    """Menus without what is never chosen: each starts with its smallest option, and what takes more bytes reads less.

    Attributes:
      menus: options of each, all of which fit where the others are smallest.
      left: bytes of the budget beyond the smallest options.
      upgrades: of the menus.
    """

    menus: list[tuple[Option, ...]]
    left: float
    upgrades: _Upgrades

    @classmethod
    def of(cls, menus: Sequence[Sequence[Option]], budget: float) -> "_Problem":
        sorted_menus = [_undominated(options) for options in menus]
        least = sum(options[0].bytes for options in sorted_menus)
        if not least <= budget:
            raise OverBudget(f"the smallest options need {least:.0f} bytes, but budget is {budget:.0f}: raise it")
        left = budget - least
        fitting = [tuple(one for one in options if one.bytes - options[0].bytes <= left) for options in sorted_menus]
        return cls(fitting, left, _upgrades(fitting))

    def options(self, choice: Sequence[int]) -> tuple[Option, ...]:
        return tuple(options[index] for options, index in zip(self.menus, choice, strict=True))

    def saved(self, choice: Sequence[int]) -> float:
        return sum(options[0].reads - options[index].reads for options, index in zip(self.menus, choice, strict=True))


def _greedy(problem: _Problem) -> list[int]:
    nothing = [0] * len(problem.menus)
    first = _climb(problem, nothing)
    if not nothing:
        return first
    gains = [options[0].reads - options[-1].reads for options in problem.menus]
    best = int(np.argmax(gains))
    alone = nothing.copy()
    alone[best] = len(problem.menus[best]) - 1
    return max(first, _climb(problem, alone), key=problem.saved)


def _climb(problem: _Problem, choice: list[int]) -> list[int]:
    """Takes every step that fits, in the order of reads saved per byte, for menus where nothing is chosen yet."""
    choice = choice.copy()
    left = problem.left - sum(
        options[index].bytes - options[0].bytes for options, index in zip(problem.menus, choice, strict=True)
    )
    held = {number: index for number, index in enumerate(choice) if index}
    steps = problem.upgrades
    for owner, option, size in zip(steps.owner.tolist(), steps.option.tolist(), steps.bytes.tolist(), strict=True):
        if owner in held:
            continue
        if size <= left:
            choice[owner] = option
            left -= size
        else:
            # Later steps of this menu lead further still.
            held[owner] = option
    # Where a step was too long, there may be an option between that is on no hull.
    for owner, stop in held.items():
        options, index = problem.menus[owner], choice[owner]
        between = [one for one in range(index, stop) if options[one].bytes - options[index].bytes <= left]
        if between:
            choice[owner] = between[-1]
            left -= options[between[-1]].bytes - options[index].bytes
    return choice


def _exact(problem: _Problem, max_states: int) -> list[int]:
    steps, menus = problem.upgrades, problem.menus
    # Menus by their steepest step: those that surely go up it come first, and bounds are tight early.
    order = list(dict.fromkeys(steps.owner.tolist()))
    rank = np.full(len(menus), -1)
    rank[order] = np.arange(len(order))
    best = problem.saved(_greedy(problem))
    slack = _ROUNDING * sum(options[0].reads for options in menus)
    size, saved = np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for place, owner in enumerate(order):
        options = menus[owner]
        more = np.array([one.bytes - options[0].bytes for one in options])
        gain = np.array([options[0].reads - one.reads for one in options])
        sizes, gains = (size[:, None] + more).ravel(), (saved[:, None] + gain).ravel()
        fits = np.flatnonzero(sizes <= problem.left)
        room = problem.left - sizes[fits]
        # The other menus do no better than their steps in order, the last one in part; and no worse than without it.
        rest = rank[steps.owner] > place
        rest_size = np.append(0.0, np.cumsum(steps.bytes[rest]))
        rest_saved = np.append(0.0, np.cumsum(steps.saved[rest]))
        most = gains[fits] + np.interp(room, rest_size, rest_saved)
        least = gains[fits] + rest_saved[np.searchsorted(rest_size, room, side="right") - 1]
        best = max(best, float(least.max()))
        kept = fits[most >= best - slack]
        kept = kept[np.lexsort((-gains[kept], sizes[kept]))]
        before = np.maximum.accumulate(np.append(-1.0, gains[kept][:-1]))
        kept = kept[gains[kept] > before]
        if len(kept) > max_states:
            raise ValueError(
                f"the exact choice needs {len(kept)} partial choices at once, more than max_states={max_states}: take "
                "the greedy one, which is near it where there are so many options"
            )
        history.append((kept // len(options), kept % len(options)))
        size, saved = sizes[kept], gains[kept]
    choice = [0] * len(menus)
    state = int(saved.argmax())
    for owner, (parent, option) in zip(reversed(order), reversed(history), strict=True):
        choice[owner] = int(option[state])
        state = int(parent[state])
    return choice


def _undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """By bytes, without those that read no less than a smaller one."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.bytes, one.reads)):
        if not kept or option.reads < kept[-1].reads:
            kept.append(option)
    return tuple(kept)


def _upgrades(menus: Sequence[Sequence[Option]]) -> _Upgrades:
    steps: list[tuple[int, int, float, float]] = []
    for owner, options in enumerate(menus):
        hull = [0]
        for index in range(1, len(options)):
            while len(hull) > 1 and _slope(options, hull[-1], index) > _slope(options, hull[-2], hull[-1]):
                hull.pop()
            hull.append(index)
        for before, index in zip(hull[:-1], hull[1:], strict=True):
            low, high = options[before], options[index]
            steps.append((owner, index, high.bytes - low.bytes, low.reads - high.reads))
    steps.sort(key=lambda step: -step[3] / step[2])
    return _Upgrades(
        owner=np.array([step[0] for step in steps], np.int64),
        option=np.array([step[1] for step in steps], np.int64),
        bytes=np.array([step[2] for step in steps], np.float64),
        saved=np.array([step[3] for step in steps], np.float64),
    )


def _slope(options: Sequence[Option], low: int, high: int) -> float:
    """Reads saved per byte; no two options of a menu take the same bytes."""
    return (options[low].reads - options[high].reads) / (options[high].bytes - options[low].bytes)
