"""From the places of rows to the arguments of a program: bags in a static form whose sizes seldom change.

Letters: D dimension, G bags, N look-ups, V vectors that are ready.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxeff.sdm import pooling
from jaxeff.sdm.encoding import RowFormat
from jaxeff.sdm.lookups import Plan
from jaxeff.sdm.queries import Query


class Assembler:
    """Makes the arguments of a program; remembers the sizes that there were, so that few programs are compiled."""

    def __init__(self, csr: bool, dim: int, mode: str):
        """For bags end to end (`csr`) or padded, vectors of `dim` numbers, and "sum" or "mean"."""
        self.csr, self.dim, self.mode = csr, dim, mode
        self._sizes: dict[Any, int] = {}

    def bucket(self, name: Any, size: int) -> int:
        """A power of two that holds `size`, and whatever was asked for under this name before."""
        self._sizes[name] = max(self._sizes.get(name, 1), 1 << max(0, size - 1).bit_length())
        return self._sizes[name]

    def part(self, name: Any, rows: Any, positions: np.ndarray, nothing: int, asked: Query) -> pooling.Part:
        """Bags whose rows lie in one array.

        Args:
          name: under which sizes are remembered.
          rows: the array.
          positions: int [N], the row of each look-up.
          nothing: position of a row of zeros, for what is padded.
          asked: the bags.
        """
        bags = self.bucket((name, "bags"), len(asked.tables))
        lengths = np.zeros(bags, np.int64)
        lengths[: len(asked.tables)] = asked.lengths
        shape: tuple[int, ...]
        inside: Any
        if self.csr:
            shape, inside = (self.bucket((name, "lookups"), max(1, len(positions))),), slice(len(positions))
            bounds = np.concatenate([[0], np.cumsum(lengths)])
        else:
            longest = self.bucket((name, "longest"), max(1, int(lengths.max(initial=0))))
            shape, inside = (bags, longest), np.arange(longest) < lengths[:, None]
            bounds = lengths
        indices = np.full(shape, nothing, np.int32)
        indices[inside] = positions
        weights = None
        if asked.weights is not None:
            weights = np.zeros(shape, np.float32)
            weights[inside] = asked.weights
        return pooling.Part(rows, indices, bounds.astype(np.int32), weights)

    def arguments(
        self, plan: Plan, parts: Sequence[pooling.Part], formats: Sequence[RowFormat]
    ) -> tuple[pooling.Arrays, pooling.Layout]:
        """What a program takes.

        Args:
          plan: of the query.
          parts: one for each of its bags in memory, and then for each of those that it needs.
          formats: of their rows.
        """
        ready = np.zeros((0, self.dim), np.float32) if plan.vectors is None else plan.vectors
        if len(ready):
            ready = np.pad(ready, ((0, self.bucket("ready", len(ready)) - len(ready)), (0, 0)))
        order, start, done = plan.order.copy(), 0, 0
        for part, count in zip(parts, plan.bags, strict=True):
            order[(plan.order >= done) & (plan.order < done + count)] += start - done
            done, start = done + count, start + len(part.bounds) - self.csr
        order[plan.order >= done] += start - done
        return pooling.Arrays(tuple(parts), ready, order), pooling.Layout(tuple(formats), self.mode)
