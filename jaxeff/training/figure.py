"""Drawing of the run figures: colours, axes and labels; matplotlib's object interface, no global state."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxeff import drawing

_DIRECT_LABELS = 7  # with more networks than this, labels would cover the points and a legend is drawn

Curve = Sequence[tuple[float, float]]


def draw_curves(
    curves: Sequence[Mapping[str, Curve]], panels: Sequence[tuple[str, str]], path: pathlib.Path
) -> pathlib.Path:
    """Draws one panel per metric with one line per run and saves the figure.

    Args:
      curves: for every panel, points (step, value) by the run's name.
      panels: for every panel, the metric's key and its title.
      path: the PNG to write.

    Returns:
      The path.
    """
    figure = drawing.figure(width=4.1 * len(panels) + 0.6, height=3.4)
    names = list(dict.fromkeys(name for panel in curves for name in panel))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, lines, (key, title) in zip(axes, curves, panels, strict=True):
        drawing.dress(ax, title)
        for name, points in lines.items():
            if not points:
                continue
            colour, marker = drawing.look(names.index(name))
            steps, values = zip(*points, strict=True)
            dots: dict[str, Any] = {"marker": marker, "ms": 4, "mew": 0} if len(points) <= 25 else {}
            ax.plot(steps, values, color=colour, lw=1.8 if len(points) <= 200 else 1.1, zorder=3, **dots)
        shown = [value for points in lines.values() for _, value in points if math.isfinite(value)]
        if key.endswith("accuracy"):
            _percent_axis(ax, shown)
        elif shown and min(shown) > 0 and max(shown) > 20 * min(shown):
            ax.set_yscale("log")
            drawing.plain_log_ticks(ax.yaxis, min(shown), max(shown))
        ax.set_xlabel("step")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(lambda value, _: drawing.short(value))
        ax.xaxis.get_major_locator().set_params(nbins=5, integer=True)
    if len(names) > 1:
        drawing.legend(figure, names)
    return drawing.save(figure, path)


def draw_comparison(
    rows: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str]], path: pathlib.Path
) -> pathlib.Path:
    """Draws one panel per cost with one point per network and saves the figure.

    Args:
      rows: networks with "name", "accuracy" (0..1), optional "accuracy_range", and costs.
      panels: for every panel, the cost's key and its title.
      path: the PNG to write.

    Returns:
      The path.
    """
    figure = drawing.figure(width=3.7 * len(panels) + 0.5, height=3.5)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    heights = [row["accuracy"] for row in rows] + [end for row in rows for end in row.get("accuracy_range") or ()]
    direct = len(rows) <= _DIRECT_LABELS
    for ax, (key, title) in zip(axes, panels, strict=True):
        drawing.dress(ax, None)
        known = [row for row in rows if row.get(key) is not None]
        costs = [float(row[key]) for row in known]
        for row, cost in zip(known, costs, strict=True):
            colour, marker = drawing.look([r["name"] for r in rows].index(row["name"]))
            low, high = row.get("accuracy_range") or (row["accuracy"], row["accuracy"])
            ax.plot([cost, cost], [low, high], color=colour, lw=1.6, alpha=0.55, solid_capstyle="round", zorder=2)
            ax.plot(cost, row["accuracy"], color=colour, marker=marker, ms=8.5, mec="white", mew=0.9, zorder=3)
        _cost_axis(ax, costs)
        ax.set_xlabel(title)
    _percent_axis(axes[0], heights)
    axes[0].set_ylabel("test accuracy")
    if direct:
        figure.draw_without_rendering()  # places the axes, so that the labels can be kept off each other
        for ax, (key, _) in zip(axes, panels, strict=True):
            _label_points(figure, ax, [(row, float(row[key])) for row in rows if row.get(key) is not None], rows)
    else:
        drawing.legend(figure, [row["name"] for row in rows])
    return drawing.save(figure, path)


def draw_sheets(
    sheets: Mapping[str, np.ndarray], columns: int, path: pathlib.Path, captions: Mapping[str, str] | None = None
) -> pathlib.Path:
    """Draws sets of images as sheets next to each other and saves the figure.

    Args:
      sheets: images uint8 [N, H, W, C] with C of 1 or 3, by the title of their sheet; all of one shape. N fills whole
        rows.
      columns: images per row.
      path: the PNG to write.
      captions: a line below a sheet, by its title.

    Returns:
      The path.

    Raises:
      ValueError: if the images of a sheet do not fill its rows.
    """
    for title, images in sheets.items():
        if not len(images) or len(images) % columns:
            raise ValueError(f"sheets[{title!r}]: {len(images)} images do not fill rows of columns={columns}")
    pictures = {title: _tiled(images, columns) for title, images in sheets.items()}
    height, width = next(iter(pictures.values())).shape[:2]
    figure = drawing.figure(width=4.0 * len(pictures) + 0.3, height=4.0 * height / width + 0.75)
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
        # Whole pixels of the image are many pixels of the figure, so nothing is blurred.
        ax.imshow(picture, interpolation="nearest", interpolation_stage="rgba")
        ax.set_title(title, loc="left", fontsize=10.5, color=drawing.INK, pad=8)
        ax.set_axis_off()
        if captions and title in captions:
            ax.text(0, -0.02, captions[title], transform=ax.transAxes, va="top", fontsize=9, color=drawing.SOFT)
    return drawing.save(figure, path)


# ---- Parts of a figure ----------------------------------------------------------------------------------------------


def _tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [N, H, W, C] as one picture [rows, columns, 3] with white lines between them."""
    rows, (height, width) = len(images) // columns, images.shape[1:3]
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    grid = framed.reshape(rows, columns, *framed.shape[1:]).swapaxes(1, 2)
    picture = grid.reshape(rows * (height + 2), columns * (width + 2), -1)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def _darker(colour: str) -> str:
    """The colour for text, which needs more contrast with white than a marker."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(0.72 * channel):02x}" for channel in channels)


def _percent_axis(ax: Any, values: Sequence[float]) -> None:
    """Limits around the values, never beyond 0 and 100 % by more than the markers need."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = max(0.14 * (high - low), 0.004)
    ax.set_ylim(max(low - room, -0.02), min(high + room, 1.0 + 0.25 * room))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    # As many digits as the distance between ticks needs.
    digits = 0 if high - low > 0.025 else 1
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}f} %" if value <= 1 else ""))


def _cost_axis(ax: Any, costs: Sequence[float]) -> None:
    """A logarithmic axis where costs differ by more than a factor of 3, a linear one from 0 otherwise."""
    low, high = min(costs), max(costs)
    if low > 0 and high / low > 3:
        ax.set_xscale("log")
        room = (high / low) ** 0.18
        ax.set_xlim(low / room, high * room)
        drawing.plain_log_ticks(ax.xaxis, low / room, high * room)
    else:
        ax.set_xlim(0, high * 1.25 or 1)
        ax.xaxis.get_major_locator().set_params(nbins=5)
        ax.xaxis.set_major_formatter(lambda value, _: drawing.short(value))


def _label_points(figure: Any, ax: Any, points: Sequence[tuple[Mapping[str, Any], float]], rows: Sequence[Any]) -> None:
    """Writes each name next to its point: at the first of eight places where it covers nothing, else the least bad."""
    from matplotlib.patheffects import withStroke

    renderer = figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    marks = []
    for row, cost in points:
        low, high = row.get("accuracy_range") or (row["accuracy"], row["accuracy"])
        on_bar = [(low + (high - low) * part / 8, 2) for part in range(9)]
        # In pixels, with half the width of what is drawn there.
        marks += [(*ax.transData.transform((cost, height)), half) for height, half in ((row["accuracy"], 9), *on_bar)]
    taken: list[Any] = []
    places = [
        (9, 0, "left", "center"),
        (-9, 0, "right", "center"),
        (0, 9, "center", "bottom"),
        (0, -9, "center", "top"),
    ]
    places += [(7, 7, "left", "bottom"), (7, -7, "left", "top"), (-7, 7, "right", "bottom"), (-7, -7, "right", "top")]
    names = [row["name"] for row in rows]
    for row, cost in points:
        best: Any = None
        for x, y, horizontal, vertical in places:
            text = ax.annotate(
                row["name"], (cost, row["accuracy"]), (x, y), textcoords="offset points", ha=horizontal, va=vertical,
                fontsize=8.5, color=_darker(drawing.look(names.index(row["name"]))[0]), zorder=4,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            cost_of_place = _covered(box, frame, marks, taken)
            if best is None or cost_of_place < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost_of_place, text, box)
            else:
                text.remove()
            if cost_of_place == 0:
                break
        taken.append(best[2])
        best[1].set_in_layout(False)  # the axes stay where they were when the place was chosen


def _covered(box: Any, frame: Any, marks: Sequence[Any], taken: Sequence[Any]) -> float:
    """How much a label at this place is in the way: area outside the axes, over other labels, and over markers."""
    beside = max(frame.x0 - box.x0, 0) + max(box.x1 - frame.x1, 0)
    beyond = max(frame.y0 - box.y0, 0) + max(box.y1 - frame.y1, 0)
    area = beside * box.height + beyond * box.width
    for other in taken:
        wide, high = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
        area += max(wide, 0) * max(high, 0)
    over_marks = sum(box.x0 - r < x < box.x1 + r and box.y0 - r < y < box.y1 + r for x, y, r in marks)
    return area + 150 * over_marks
