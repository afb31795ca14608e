"""Figures of what `jaxeff.dynamic` measures; PNGs of 150 dpi."""

import os
import pathlib

from jaxeff import drawing
from jaxeff.dynamic.cascade import ExitCurve
from jaxeff.dynamic.sensitivity import DIMENSIONS, Sensitivity
from jaxeff.dynamic.speed import SpeedReport

Path = str | os.PathLike[str]


def draw_speed(report: SpeedReport, path: Path) -> pathlib.Path:
    """Draws the counted and the real speed-up of every gated layer, with the engine that it has.

    Args:
      report: of `jaxeff.dynamic.speed_report`.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    rows = report.rows
    figure = drawing.figure(width=max(6.4, 0.62 * len(rows) + 2.2), height=4.2)
    ax = figure.subplots()
    drawing.dress(ax, f"speed-up over the fastest dense form (efficiency {report.efficiency:.2f})")
    places = range(len(rows))
    counted, real = "#cfe3f2", drawing.COLOURS[0]
    ax.bar(places, [row.counted for row in rows], 0.72, color=counted, zorder=2)
    bars = ax.bar(places, [row.real for row in rows], 0.44, color=real, zorder=3)
    for place, row in enumerate(rows):
        at = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "zorder": 5}
        ax.annotate(f"{row.real:.2f}", (place, 0), fontsize=8, color="white", **at)
    ax.axhline(1, color=drawing.SOFT, lw=1, ls=(0, (4, 3)), zorder=4)
    drawing.layer_axis(ax, [f"{row.path.removesuffix('/layer')} ({row.engine})" for row in rows])
    ax.set_ylabel("times faster than dense")
    ax.grid(False, axis="x")
    ax.margins(y=0.1)
    side = max(0.6, 3.5 - len(rows) / 2)
    ax.set_xlim(-side, len(rows) - 1 + side)
    handles = [ax.patches[0], bars[0]]
    labels = ["counted multiply-accumulates", "real time"]
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=drawing.INK)
    return drawing.save(figure, pathlib.Path(path))


def draw_sensitivity(found: Sensitivity, path: Path) -> pathlib.Path:
    """Draws accuracy by ratio, one line for each block, for channels and columns.

    Args:
      found: of `jaxeff.dynamic.sensitivity`.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    figure = drawing.figure(width=10.0, height=4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, dimension, accuracy in zip(axes, DIMENSIONS, found.accuracy, strict=True):
        drawing.dress(ax, f"{dimension} of one block dropped")
        for index, values in enumerate(accuracy):
            colour, marker = drawing.look(index)
            ax.plot(found.grid, 100 * values, color=colour, marker=marker, ms=5, mew=0, lw=1.8, zorder=3)
        ax.set_xlabel(f"share of the {dimension} that is dropped")
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes[0].set_ylabel("accuracy")
    drawing.legend(figure, found.names)
    return drawing.save(figure, pathlib.Path(path))


def draw_exit_curve(curve: ExitCurve, path: Path) -> pathlib.Path:
    """Draws accuracy against latency: the cascade by threshold, and its steps alone.

    Args:
      curve: of `jaxeff.dynamic.exit_curve`.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    figure = drawing.figure(width=6.4, height=4.2)
    ax = figure.subplots()
    drawing.dress(ax, "accuracy of a cascade by the time it takes")
    alone = [point for point in curve.points if point.threshold is None]
    cascade = [point for point in curve.points if point.threshold is not None]
    for index, points in enumerate((cascade, alone)):
        colour, marker = drawing.look(index)
        places = [point.milliseconds for point in points], [100 * point.accuracy for point in points]
        ax.plot(*places, color=colour, marker=marker, ms=6, mew=0, lw=0 if index else 1.8, zorder=3)
        for x, y, point in zip(*places, points, strict=True):
            name = f"{point.threshold:g}" if index == 0 else point.name.removesuffix(" alone")
            at = {"xytext": (0, -12 if index else 6), "textcoords": "offset points", "ha": "center"}
            ax.annotate(name, (x, y), fontsize=8, color=colour, **at)
    ax.set_xlabel("milliseconds per image")
    ax.set_ylabel("accuracy")
    ax.set_xlim(left=0)
    ax.margins(y=0.15)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.1f} %")
    drawing.legend(figure, ["cascade, by threshold", "one step alone"])
    return drawing.save(figure, pathlib.Path(path))
