"""Figures of federated learning; PNGs of 150 dpi."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

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


def draw_rounds(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], epochs: int, path: str | os.PathLike[str]
) -> pathlib.Path:
    """Draws test accuracy against rounds, local epochs and exchanged bytes: means over seeds, and their range.

    Args:
      runs: by method, for each seed {"accuracy": [(round, value), ...], "bytes_per_round": number}.
      epochs: of a client in a round.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    figure = drawing.figure(width=11.0, height=3.5)
    axes = figure.subplots(1, 3, sharey=True)
    for number, (ax, title) in enumerate(zip(axes, ("rounds", "local epochs", "exchanged bytes"), strict=True)):
        drawing.dress(ax, "test accuracy" if not number else None)
        ax.set_xlabel(title)
        for index, several in enumerate(runs.values()):
            per_round = (1, epochs, float(np.mean([one["bytes_per_round"] for one in several])))[number]
            _curve(ax, index, several, per_round)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(lambda value, _: drawing.short(value))
        ax.xaxis.get_major_locator().set_params(nbins=5)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    drawing.legend(figure, [name.replace("_", " ") for name in runs])
    return drawing.save(figure, pathlib.Path(path))


def draw_comparison(
    runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: str | os.PathLike[str]
) -> pathlib.Path:
    """Draws test accuracy against rounds under several partitions side by side: means over seeds, and their range.

    Args:
      runs: by partition, what `draw_rounds` takes.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    figure = drawing.figure(width=max(5.0, 3.1 * len(runs) + 0.6), height=3.5)
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for number, (ax, (partition, methods)) in enumerate(zip(axes, runs.items(), strict=True)):
        drawing.dress(ax, partition.replace("_", " "))
        ax.set_xlabel("rounds")
        if not number:
            ax.set_ylabel("test accuracy")
        for index, several in enumerate(methods.values()):
            _curve(ax, index, several, 1)
        ax.set_xlim(left=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    drawing.legend(figure, [name.replace("_", " ") for name in next(iter(runs.values()))])
    return drawing.save(figure, pathlib.Path(path))


def draw_classes(
    accuracy: Mapping[str, Any], path: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> pathlib.Path:
    """Draws the test accuracy of each class, where a group of features that learned nothing is seen first.

    Args:
      accuracy: by method, [C].
      path: the PNG to write; its folder is created.
      classes: their names; None for their numbers.

    Returns:
      The path.
    """
    number = len(next(iter(accuracy.values())))
    figure = drawing.figure(width=max(6.0, 0.75 * number + 1.5), height=3.3)
    ax = figure.subplots()
    drawing.dress(ax, "test accuracy of each class")
    width = 0.8 / len(accuracy)
    for index, values in enumerate(accuracy.values()):
        places = np.arange(number) + (index - (len(accuracy) - 1) / 2) * width
        ax.bar(places, values, width, color=drawing.look(index)[0], zorder=2)
    names = list(classes or map(str, range(number)))
    if max(map(len, names)) <= 3:
        ax.set_xticks(range(number), names)
    else:
        drawing.layer_axis(ax, names)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.grid(False, axis="x")
    drawing.legend(figure, [name.replace("_", " ") for name in accuracy], lines=False)
    return drawing.save(figure, pathlib.Path(path))


def draw_features(
    primary: Mapping[str, Any], path: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> pathlib.Path:
    """Draws what each unit of a layer is for, client under client: columns of one colour are features that align.

    Args:
      primary: by title, int [N, J], the class that each unit of each client does most for, as of `primary_classes`;
        units that are for none are left white.
      path: the PNG to write; its folder is created.
      classes: their names; None for their numbers.

    Returns:
      The path.
    """
    maps = {title: np.asarray(values) for title, values in primary.items()}
    number = len(classes) if classes else 1 + max(int(values.max()) for values in maps.values())
    tallest = max(len(values) for values in maps.values())
    figure = drawing.figure(width=9.0, height=0.7 + len(maps) * (0.75 + 0.16 * tallest))
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    colours = _class_colours(number)
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        drawing.dress(ax, title)
        ax.grid(False)
        shown = np.ma.masked_less(values, 0)
        ax.pcolormesh(np.arange(values.shape[1] + 1), np.arange(len(values) + 1), shown, cmap=colours, vmin=-0.5,
                      vmax=number - 0.5, edgecolors="white", lw=0.4)  # fmt: skip
        ax.set_ylim(len(values), 0)
        ax.set_yticks(np.arange(len(values)) + 0.5, range(len(values)))
        ax.tick_params(axis="y", labelsize=7)
        ax.set_ylabel("client")
    axes[-1].set_xlabel("unit")
    from matplotlib.lines import Line2D

    names = list(classes or map(str, range(number)))
    handles = [
        Line2D([], [], marker="s", ms=8, lw=0, mew=0, color=colours(c), label=name) for c, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9, title="primary class")
    return drawing.save(figure, pathlib.Path(path))


def draw_variance(
    variances: Mapping[str, float], path: str | os.PathLike[str], *, share: float = 0.5, first: str | None = None
) -> pathlib.Path:
    """Draws how much the units of each layer differ in the classes they are for, and where a network is divided.

    Args:
      variances: of `total_variance`, of the layers in order.
      path: the PNG to write; its folder is created.
      share: of `choose_depth`: the line from which on layers belong to groups.
      first: the first layer of the groups.

    Returns:
      The path.
    """
    names, values = list(variances), list(variances.values())
    figure = drawing.figure(width=max(5.0, 0.55 * len(names) + 2.0), height=3.3)
    ax = figure.subplots()
    drawing.dress(ax, "how much the units of a layer differ in the classes they are for")
    shared = len(names) if first is None else names.index(first)
    colours = [("#cfe3f2" if number < shared else drawing.COLOURS[0]) for number in range(len(names))]
    ax.bar(range(len(names)), values, 0.7, color=colours, zorder=2)
    ax.axhline(share * max(values), color=drawing.INK, lw=1, ls="--", zorder=3)
    drawing.layer_axis(ax, names)
    ax.set_ylabel("total variance")
    ax.grid(False, axis="x")
    if first is not None:
        ax.text(shared - 0.5, 1.0, " groups begin", transform=ax.get_xaxis_transform(), ha="left", va="top", fontsize=9)
        ax.axvline(shared - 0.5, color=drawing.SOFT, lw=1, zorder=1)
    return drawing.save(figure, pathlib.Path(path))


def _curve(ax: Any, index: int, several: Sequence[Mapping[str, Any]], per_round: float) -> None:
    """Mean and range over seeds, against rounds times whatever a round is."""
    colour, marker = drawing.look(index)
    rounds = np.array([at for at, _ in several[0]["accuracy"]], float)
    values = np.array([[value for _, value in one["accuracy"]] for one in several])
    dots: dict[str, Any] = {"marker": marker, "ms": 4, "mew": 0} if len(rounds) <= 16 else {}
    ax.plot(rounds * per_round, values.mean(0), color=colour, lw=1.8, zorder=3, **dots)
    if len(values) > 1:
        ax.fill_between(rounds * per_round, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)


def _class_colours(number: int) -> Any:
    """As many colours that are told apart as there are classes; shades of a wheel where there are many."""
    import matplotlib

    return matplotlib.colormaps["tab10" if number <= 10 else "hsv"].resampled(number)
