"""Figures of what `jaxeff.quadratic.diagnose` and `jaxeff.quadratic.memory` find; PNGs of 150 dpi.

Signed maps have a diverging colour map with white at zero, maps of amounts a perceptually uniform one; lines have
colours and markers that every kind of colour vision tells apart.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxeff import drawing
from jaxeff.quadratic.diagnose import ActivationParts, GradientNorms, Histogram, LayerStatistics
from jaxeff.quadratic.memory import MemoryReport

Path = str | os.PathLike[str]


def draw_activation_parts(images: Any, parts: ActivationParts, path: Path, *, layer: str = "") -> pathlib.Path:
    """Draws every image beside the second-order part, the first-order part and their sum, on one scale per image.

    Args:
      images: [N, H, W, C] with C of 1 or 3; each is stretched to its own range.
      parts: of these images.
      path: the PNG to write; its folder is created.
      layer: what the title names.

    Returns:
      The path.
    """
    titles = ("input", "second-order part", "first-order part", "sum")
    figure, axes = _sheet(len(images), titles)
    for row, image, *maps in zip(axes, np.asarray(images), *map(np.asarray, parts), strict=True):
        _picture(row[0], image)
        limit = max(float(np.abs(values).max()) for values in maps) or 1.0
        for ax, values in zip(row[1:], maps, strict=True):
            shown = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
        _bar(figure, shown, row[1:], "mean over channels")
    figure.suptitle(_titled("Activation by order", layer), x=0.01, ha="left", fontsize=11.5, color=drawing.INK)
    return drawing.save(figure, pathlib.Path(path))


def draw_maps(images: Any, maps: Mapping[str, Any], path: Path, *, layer: str = "") -> pathlib.Path:
    """Draws every image beside maps of where a network looks, each scaled to its own maximum.

    Args:
      images: as in `draw_activation_parts`.
      maps: arrays [N, H, W], not negative, by their title: `attention_map`, `grad_cam`.
      path: the PNG to write; its folder is created.
      layer: what the title names.

    Returns:
      The path.
    """
    figure, axes = _sheet(len(images), ("input", *maps))
    for row, image, *values in zip(axes, np.asarray(images), *map(np.asarray, maps.values()), strict=True):
        _picture(row[0], image)
        for ax, amount in zip(row[1:], values, strict=True):
            shown = ax.imshow(amount / (amount.max() or 1), cmap="viridis", vmin=0, vmax=1, interpolation="bicubic")
        _bar(figure, shown, row[1:], "share of maximum")
    figure.suptitle(_titled("Where the network looks", layer), x=0.01, ha="left", fontsize=11.5, color=drawing.INK)
    return drawing.save(figure, pathlib.Path(path))


def draw_histograms(
    histograms: Mapping[str, Mapping[str, Histogram]], path: Path, *, of: str = "weight"
) -> pathlib.Path:
    """Draws one panel per layer with the histogram of each projection; the number of values is logarithmic.

    Args:
      histograms: of `kernel_histograms`.
      path: the PNG to write; its folder is created.
      of: what was counted: "weight" or "gradient".

    Returns:
      The path.
    """
    columns = min(4, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    figure = drawing.figure(width=2.9 * columns + 0.4, height=2.35 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(name for kernels in histograms.values() for name in kernels))
    for ax, (layer, kernels) in zip(axes, histograms.items(), strict=False):
        drawing.dress(ax, layer)
        for name, histogram in kernels.items():
            colour, _ = drawing.look(names.index(name))
            ax.stairs(histogram.counts, histogram.edges, color=colour, lw=1.3, zorder=3)
        ax.set_yscale("log")
        highest = max(int(histogram.counts.max()) for histogram in kernels.values())
        # Room above for the lines of text: that share of an axis whose logarithm is even.
        top = 0.7 * (max(highest, 2) / 0.7) ** (1 / (1 - min(0.06 + 0.08 * len(kernels), 0.6)))
        ax.set_ylim(0.7, top)
        drawing.plain_log_ticks(ax.yaxis, 0.7, 1000 * top)
        ax.xaxis.get_major_locator().set_params(nbins=4)
        ax.xaxis.set_major_formatter(lambda value, _: drawing.short(value))
        lines = [f"{name}: rms {drawing.short(h.rms)}, kurtosis {h.kurtosis:.1f}" for name, h in kernels.items()]
        ax.text(
            0.98, 0.97, "\n".join(lines), transform=ax.transAxes, ha="right", va="top", fontsize=7, color=drawing.SOFT
        )
    for ax in axes[len(histograms) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(histograms) - columns) : len(histograms)]:
        ax.set_xlabel(of)
    for ax in axes[::columns]:
        ax.set_ylabel(f"{of}s per interval")
    drawing.legend(figure, [f"projection {name}" for name in names], lines=False)
    return drawing.save(figure, pathlib.Path(path))


def draw_layer_statistics(statistics: Mapping[str, LayerStatistics], path: Path) -> pathlib.Path:
    """Draws root mean square and kurtosis of every projection and the quadratic-to-linear ratio by depth.

    Args:
      statistics: of `layer_statistics`.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    figure = drawing.figure(width=13.0, height=3.9)
    rms, kurtosis, ratio = figure.subplots(1, 3)
    places, layers = range(len(statistics)), list(statistics)
    names = list(dict.fromkeys(name for layer in statistics.values() for name in layer.rms))
    for ax, title, of in (
        (rms, "root mean square of projections", lambda layer: layer.rms),
        (kurtosis, "kurtosis of projections (normal: 3)", lambda layer: layer.kurtosis),
    ):
        drawing.dress(ax, title)
        for index, name in enumerate(names):
            colour, marker = drawing.look(index)
            points = [of(layer).get(name, math.nan) for layer in statistics.values()]
            ax.plot(places, points, color=colour, marker=marker, ms=5, mew=0, lw=1.8, zorder=3)
        _log_axis(ax, [value for layer in statistics.values() for value in of(layer).values()])
    kurtosis.axhline(3, color=drawing.SOFT, lw=1, ls=(0, (4, 3)), zorder=2)
    drawing.dress(ratio, "rms of second-order / first-order part")
    values = [layer.quad_ratio if math.isfinite(layer.quad_ratio) else math.nan for layer in statistics.values()]
    ratio.bar(places, values, color=drawing.COLOURS[0], width=0.62, zorder=3)
    ratio.axhline(1, color=drawing.SOFT, lw=1, ls=(0, (4, 3)), zorder=4)
    for place, layer in enumerate(statistics.values()):
        if not math.isfinite(layer.quad_ratio):
            ratio.text(place, 0, "no first-\norder part", ha="center", va="bottom", fontsize=7, color=drawing.SOFT)
    for ax in (rms, kurtosis, ratio):
        drawing.layer_axis(ax, layers)
    drawing.legend(figure, [f"projection {name}" for name in names])
    return drawing.save(figure, pathlib.Path(path))


def draw_gradient_norms(norms: Mapping[str, GradientNorms], path: Path) -> pathlib.Path:
    """Draws the norm of the gradient by depth, one line per network; the vertical axis is logarithmic.

    Args:
      norms: of `gradient_norms`, by the network's name.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    figure = drawing.figure(width=7.2, height=4.0)
    ax = figure.subplots()
    drawing.dress(ax, "gradient of the loss by each layer's kernels (in brackets: last / first)")
    for index, found in enumerate(norms.values()):
        colour, marker = drawing.look(index)
        values = np.where(found.norms > 0, found.norms, math.nan)
        ax.plot(range(len(values)), values, color=colour, marker=marker, ms=5, mew=0, lw=1.8, zorder=3)
    _log_axis(ax, [float(value) for found in norms.values() for value in found.norms])
    longest = max(norms.values(), key=lambda found: len(found.layers)).layers
    drawing.layer_axis(ax, longest)
    ax.set_ylabel("Euclidean norm")
    drawing.legend(figure, [f"{name} ({_ratio(found)})" for name, found in norms.items()])
    return drawing.save(figure, pathlib.Path(path))


def draw_memory(reports: Mapping[str, MemoryReport], path: Path) -> pathlib.Path:
    """Draws what every layer keeps for the backward pass, and the totals by formula, trace and compiler.

    Args:
      reports: of `memory_report`, by the name of policy or network.
      path: the PNG to write; its folder is created.

    Returns:
      The path.
    """
    layers = list(dict.fromkeys(row.name for report in reports.values() for row in report.rows))
    figure = drawing.figure(width=max(9.0, 0.5 * len(layers) + 5.0), height=4.0)
    by_layer, totals = figure.subplots(1, 2, width_ratios=(max(1.4, 0.13 * len(layers)), 1))
    drawing.dress(by_layer, "kept for the backward pass, by layer")
    drawing.dress(totals, "whole gradient")
    width = 0.8 / len(reports)
    groups = ["kept,\nby formula", "kept,\ntraced", "temporaries,\ncompiled"]
    if all(report.compiled is None for report in reports.values()):
        groups = groups[:2]
    for index, report in enumerate(reports.values()):
        colour, _ = drawing.look(index)
        shift = (index - (len(reports) - 1) / 2) * width
        kept = {row.name: row.residual_bytes for row in report.rows}
        heights = [kept.get(name, 0) / report.batch / 2**20 for name in layers]
        by_layer.bar([place + shift for place in range(len(layers))], heights, width, color=colour, zorder=3)
        temporaries = None if report.compiled is None else report.compiled.temp_bytes
        sums = (report.analytic_bytes, report.traced.total.residual_bytes, temporaries)
        sizes = [math.nan if size is None else size / report.batch / 2**20 for size in sums[: len(groups)]]
        bars = totals.bar([place + shift for place in range(len(groups))], sizes, width, color=colour, zorder=3)
        labels = ["" if math.isnan(size) else f"{size:.2f}" for size in sizes]
        totals.bar_label(bars, labels, padding=2, fontsize=8, color=drawing.SOFT)
    drawing.layer_axis(by_layer, layers)
    totals.set_xticks(range(len(groups)), groups)
    for ax in (by_layer, totals):
        ax.set_ylabel("MiB per example")
        ax.grid(False, axis="x")
    totals.margins(y=0.12)
    drawing.legend(figure, list(reports), lines=False)
    return drawing.save(figure, pathlib.Path(path))


# ---- Parts of a figure ----------------------------------------------------------------------------------------------


def _sheet(rows: int, titles: Sequence[str]) -> tuple[Any, Any]:
    figure = drawing.figure(width=1.75 * len(titles) + 1.2, height=1.75 * rows + 0.75)
    axes = figure.subplots(rows, len(titles), squeeze=False)
    for ax in axes.ravel():
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9.5, color=drawing.INK, pad=6)
    return figure, axes


def _picture(ax: Any, image: np.ndarray) -> None:
    ax.imshow(np.broadcast_to(_stretched(image), (*image.shape[:2], 3)), interpolation="nearest")


def _stretched(image: np.ndarray) -> np.ndarray:
    """An image, whatever it was standardised to, in 0..1."""
    low, high = float(image.min()), float(image.max())
    return (np.asarray(image, np.float64) - low) / ((high - low) or 1)


def _bar(figure: Any, shown: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.86, aspect=14, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=drawing.SOFT, labelsize=7.5, length=2)
    bar.set_label(label, fontsize=7.5, color=drawing.SOFT)
    bar.locator.set_params(nbins=5)
    bar.update_ticks()


def _log_axis(ax: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where the values differ enough for it."""
    shown = [value for value in values if math.isfinite(value) and value > 0]
    if not shown or max(shown) < 10 * min(shown):
        ax.set_ylim(bottom=0)
        return
    ax.set_yscale("log")
    low, high = min(shown) / 1.3, max(shown) * 1.3
    ax.set_ylim(low, high)
    drawing.plain_log_ticks(ax.yaxis, low, high)


def _ratio(found: GradientNorms) -> str:
    finite = np.isfinite(found.norms).all()
    return drawing.short(found.ratio) if finite else "not finite"


def _titled(text: str, layer: str) -> str:
    return f"{text}: {layer}" if layer else text
