"""Figures of federated learning; PNGs of 150 dpi."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxeff import drawing
from jaxeff.federated.partition import Partition


def draw_partition(
    partition: Partition, path: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> pathlib.Path:
    """Draws who holds what: a disc for each client and class, its area the number of examples.

    Args:
      partition: of `jaxeff.federated.partition`.
      path: the PNG to write; its folder is created.
      classes: their names; None for their numbers.

    Returns:
      The path.
    """
    counts = partition.class_counts
    clients, number = counts.shape
    figure = drawing.figure(width=min(14.0, 2.4 + 0.36 * clients), height=1.5 + 0.32 * number)
    ax, bars = figure.subplots(2, 1, sharex=True, height_ratios=(number, 3))
    drawing.dress(ax, "examples of each class that a client holds")
    client, label = np.nonzero(counts)
    area = 150 * counts[client, label] / max(1, counts.max())
    ax.scatter(client, label, s=np.maximum(area, 2), color=drawing.COLOURS[0], lw=0, zorder=3)
    ax.set_yticks(range(number), classes or [str(c) for c in range(number)])
    ax.set_ylabel("class")
    ax.margins(x=0.6 / clients, y=0.6 / number)
    drawing.dress(bars, None)
    bars.bar(range(clients), partition.sizes, 0.7, color="#cfe3f2", zorder=2)
    bars.yaxis.set_major_formatter(lambda value, _: drawing.short(value))
    bars.set_xlabel("client")
    bars.set_ylabel("examples")
    bars.grid(False, axis="x")
    bars.xaxis.get_major_locator().set_params(integer=True)
    return drawing.save(figure, pathlib.Path(path))
