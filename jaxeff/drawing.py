"""How our figures look: colours, axes, labels, files; matplotlib's object interface, no global state."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette for every kind of colour vision, without its yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, SOFT = "#222222", "#5f5f5f"
DPI = 150


def figure(width: float, height: float) -> Any:
    """A white figure of that size in inches, with an Agg canvas.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "jaxeff[train]"') from error
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    """Writes a figure as PNG of `DPI` and 256 colours and returns the path; the file is at every moment whole."""
    from PIL import Image  # matplotlib needs it too

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    # A third of the bytes of true colour, which a notebook or README carries for ever.
    small = Image.open(drawn).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(temporary, format="png", optimize=True)
    temporary.replace(path)
    return path


def dress(ax: Any, title: str | None) -> None:
    """Gives axes their grid, spines, label sizes and title."""
    ax.grid(True, color="#e6e6e6", lw=0.8, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#b0b0b0")
    ax.tick_params(colors=SOFT, labelsize=9, length=3)
    ax.xaxis.label.set(color=INK, size=10)
    ax.yaxis.label.set(color=INK, size=10)
    if title:
        ax.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)


def look(index: int) -> tuple[str, str]:
    """Colour and marker of the network at that place in a list."""
    # The marker moves on when the colours start again, so no two networks of 49 look alike.
    turn = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)]


def legend(figure: Any, names: Sequence[str], *, lines: bool = True) -> None:
    """Puts a legend of networks above the axes of a figure: of lines with markers, or of filled areas."""
    from matplotlib.lines import Line2D

    handles = []
    for index, name in enumerate(names):
        colour, marker = look(index)
        style: dict[str, Any] = {"marker": marker, "ms": 5, "lw": 1.8} if lines else {"marker": "s", "ms": 8, "lw": 0}
        handles.append(Line2D([], [], color=colour, mew=0, label=name, **style))
    # In inches: a letter of this size, and the line with the space around it.
    fitting = int(figure.get_figwidth() / (0.065 * max(map(len, names)) + 0.6))
    columns = max(1, min(len(names), 5, fitting))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


def layer_axis(ax: Any, layers: Sequence[str]) -> None:
    """Puts the names of layers at 0, 1, ... of the horizontal axis, turned where there are many or long ones."""
    turned = len(layers) > 5 or max(map(len, layers), default=0) > 9
    ax.set_xticks(range(len(layers)), layers, rotation=55 if turned else 0, ha="right" if turned else "center")
    ax.tick_params(axis="x", labelsize=8)
    if turned:
        for label in ax.get_xticklabels():
            label.set_rotation_mode("anchor")


def plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5 of each decade while there is room, written as plain numbers (20k, 1M)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    decades = math.log10(high / low)
    multiples = (1.0, 2.0, 5.0) if decades <= 2 else (1.0, 3.0) if decades <= 3 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=multiples, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number for people: 20k, 1.5M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.3g}"
