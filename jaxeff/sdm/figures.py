"""Figures of tiered memory: devices, placements, hit rates, timelines and power; PNGs of 150 dpi."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff import drawing
from jaxeff.sdm.device import DeviceProfile
from jaxeff.sdm.placement import Placement
from jaxeff.sdm.power import Comparison

# Fast memory is warm, the device cold, and what the cache spares it lies between.
TIER_COLOURS = {"memory": "#D55E00", "cached": "#E69F00", "direct": "#0072B2"}
_STAGES = ("fetch", "compute")
_STAGE_COLOURS = {"fetch": "#0072B2", "compute": "#E69F00"}
_PALE = "#cfd6dc"


class Span(NamedTuple):
    """A stage of a query.

    Attributes:
      query: its number, from 0.
      stage: "fetch" or "compute".
      start: seconds since the first query began.
      stop: seconds since then.
    """

    query: int
    stage: str
    start: float
    stop: float


def spans(stages: Sequence[tuple[float, float, float]]) -> list[Span]:
    """Spans of queries that were fetched ahead and computed one after another.

    Args:
      stages: of each query, when its rows began to be fetched, when they were there, and when it was computed, seconds.
    """
    found, done = [], 0.0
    for number, (start, fetched, computed) in enumerate(stages):
        start, fetched, computed = (moment - stages[0][0] for moment in (start, fetched, computed))
        found += [Span(number, "fetch", start, fetched), Span(number, "compute", max(fetched, done), computed)]
        done = computed
    return found


def draw_devices(
    devices: Sequence[DeviceProfile],
    path: str | os.PathLike[str],
    *,
    depth: int = 256,
    loads: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Draws what devices do as more reads are outstanding: reads per second, and the latency that this costs.

    Args:
      devices: their profiles.
      path: the PNG to write; its folder is created.
      depth: the most reads outstanding.
      loads: by text, reads per second that are drawn as a line: what a host needs.

    Returns:
      The path.

    Raises:
      ValueError: for no device or a depth below 2.
    """
    if not devices or depth < 2:
        raise ValueError(f"devices must not be empty and depth be at least 2, got {len(devices)} and {depth}")
    figure = drawing.figure(width=10.0, height=3.9)
    rates, waits = figure.subplots(1, 2)
    drawing.dress(rates, "reads per second")
    drawing.dress(waits, "latency of a read under load")
    depths = 2.0 ** np.linspace(0, np.log2(depth), 49)
    every_rate, every_wait = [], []
    for index, device in enumerate(devices):
        colour, marker = drawing.look(index)
        rate = np.array([device.iops(one) for one in depths])
        wait = np.array([1e6 * device.latency(one) for one in depths])
        style: dict[str, Any] = {"color": colour, "lw": 1.8, "marker": marker, "ms": 4.5, "mew": 0, "markevery": 12}
        rates.plot(depths, rate, zorder=3, **style)
        waits.plot(rate, wait, zorder=3, **style)
        every_rate.append(rate)
        every_wait.append(wait)
    for ax in (rates, waits):
        ax.set_xscale("log")
        ax.set_yscale("log")
    low, high = np.min(every_rate), np.max(every_rate)
    drawing.plain_log_ticks(rates.yaxis, low, high)
    drawing.plain_log_ticks(waits.xaxis, low, high)
    drawing.plain_log_ticks(waits.yaxis, np.min(every_wait), np.max(every_wait))
    powers = [2**k for k in range(0, int(np.log2(depth)) + 1, 2)]
    rates.set_xticks(powers, [str(power) for power in powers])
    rates.minorticks_off()
    rates.set_xlabel("reads outstanding")
    waits.set_xlabel("reads per second")
    waits.set_ylabel("microseconds")
    for name, value in (loads or {}).items():
        rates.axhline(value, color=drawing.INK, lw=1, ls="--", zorder=2)
        waits.axvline(value, color=drawing.INK, lw=1, ls="--", zorder=2)
        waits.text(value, 0.98, f"{name} ", transform=waits.get_xaxis_transform(), ha="right", va="top", fontsize=9)
    drawing.legend(figure, [device.name for device in devices])
    return drawing.save(figure, pathlib.Path(path))


def draw_placement(placements: Mapping[str, Placement], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws where the bytes of the tables lie, and who serves their look-ups: stacked bars, one for each placement.

    Args:
      placements: by title.
      path: the PNG to write; its folder is created.

    Returns:
      The path.

    Raises:
      ValueError: for no placement.
    """
    if not placements:
        raise ValueError("placements must not be empty")
    figure = drawing.figure(width=10.0, height=1.55 + 0.5 * len(placements))
    bytes_ax, lookups_ax = figure.subplots(1, 2, sharey=True)
    drawing.dress(bytes_ax, "where the bytes of the tables lie")
    drawing.dress(lookups_ax, "who serves the rows of a query")
    for place, placement in enumerate(placements.values()):
        pairs = list(zip(placement.tables, placement.options, strict=True))
        sizes = {tier: sum(t.size for t, option in pairs if option.tier == tier) for tier in TIER_COLOURS}
        in_memory = sum(table.unique for table, option in pairs if option.tier == "memory")
        served = {
            "memory": in_memory,
            "cached": sum(table.unique for table, _ in pairs) - in_memory - placement.reads,
            "direct": placement.reads,
        }
        _stack(bytes_ax, place, sizes, "B")
        _stack(lookups_ax, place, served, "")
    bytes_ax.set_yticks(range(len(placements)), list(placements))
    bytes_ax.set_ylim(len(placements) - 0.4, -0.6)
    for ax in (bytes_ax, lookups_ax):
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    names = ("fast memory", "cached: in slow memory, rows in use also in the cache", "slow memory")
    _key(figure, dict(zip(names, TIER_COLOURS.values(), strict=True)))
    return drawing.save(figure, pathlib.Path(path))


def draw_hit_rates(
    curves: Mapping[str, tuple[Any, Any]],
    path: str | os.PathLike[str],
    *,
    bounds: Mapping[str, float] | None = None,
    total_bytes: float | None = None,
) -> pathlib.Path:
    """Draws hit rates of caches against their size.

    Args:
      curves: by name, sizes [S] in bytes and hit rates [S]; sizes of 0 are left out.
      path: the PNG to write; its folder is created.
      bounds: by text, hit rates that no cache surpasses, drawn as lines.
      total_bytes: of the tables; with it, a second axis above tells the share of them.

    Returns:
      The path.

    Raises:
      ValueError: for no curve, or one without a size above 0.
    """
    kept = {}
    for name, (sizes, rates) in curves.items():
        sizes, rates = np.asarray(sizes, np.float64), np.asarray(rates, np.float64)
        kept[name] = (sizes[sizes > 0], rates[sizes > 0])
    if not kept or not all(len(sizes) for sizes, _ in kept.values()):
        raise ValueError(f"curves must not be empty, and have sizes above 0 each; got {list(kept)}")
    figure = drawing.figure(width=6.6, height=4.0)
    ax = figure.subplots()
    drawing.dress(ax, None)
    for index, (sizes, rates) in enumerate(kept.values()):
        colour, marker = drawing.look(index)
        dots: dict[str, Any] = {"marker": marker, "ms": 4.5, "mew": 0} if len(sizes) <= 20 else {}
        ax.plot(sizes, rates, color=colour, lw=1.8, zorder=3, **dots)
    low = min(sizes.min() for sizes, _ in kept.values())
    high = max(sizes.max() for sizes, _ in kept.values())
    ax.set_xscale("log")
    if high > low:
        ax.set_xlim(low, high)
    drawing.plain_log_ticks(ax.xaxis, low, max(high, 2 * low))
    for text, value in (bounds or {}).items():
        ax.axhline(value, color=drawing.SOFT, lw=1, ls="--", zorder=2)
        # Above its line, where there is room between it and the axis.
        where = "bottom" if value < 0.92 else "top"
        ax.text(0.01, value, text, transform=ax.get_yaxis_transform(), va=where, fontsize=9, color=drawing.SOFT)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.set_xlabel("bytes of the cache")
    ax.set_ylabel("hit rate")
    if total_bytes:
        above = ax.secondary_xaxis("top", functions=(lambda size: size / total_bytes, lambda part: part * total_bytes))
        drawing.plain_log_ticks(above.xaxis, low / total_bytes, max(high, 2 * low) / total_bytes)
        above.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        above.set_xlabel("share of the tables", size=10, color=drawing.INK)
        above.tick_params(colors=drawing.SOFT, labelsize=9, length=3)
        above.spines["top"].set_color("#b0b0b0")
    drawing.legend(figure, list(kept))
    return drawing.save(figure, pathlib.Path(path))


def draw_timeline(runs: Mapping[str, Sequence[Span]], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws when the rows of each query were fetched and when it was computed: staircases that overlap, or do not.

    Args:
      runs: by title, the spans of a few queries (more than 40 leave no room).
      path: the PNG to write; its folder is created.

    Returns:
      The path.

    Raises:
      ValueError: for no run, one without spans, another stage, or a span that ends before it starts.
    """
    if not runs or not all(runs.values()):
        raise ValueError(f"runs must not be empty, nor any run; got {list(runs)}")
    for span in (one for spans in runs.values() for one in spans):
        if span.stage not in _STAGES or not span.stop >= span.start:
            raise ValueError(f"a span must be one of {_STAGES} and stop no earlier than it starts, got {span}")
    queries = {title: 1 + max(span.query for span in spans) for title, spans in runs.items()}
    figure = drawing.figure(width=10.0, height=1.2 + sum(0.75 + 0.19 * number for number in queries.values()))
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=list(queries.values()))[:, 0]
    unit, scale = _seconds(max(span.stop for spans in runs.values() for span in spans))
    for ax, (title, spans) in zip(axes, runs.items(), strict=True):
        end = max(span.stop for span in spans)
        drawing.dress(ax, f"{title}: {queries[title] / end:,.0f} queries per second" if end else title)
        for span in spans:
            ax.barh(span.query, scale * (span.stop - span.start), 0.72, scale * span.start,
                    color=_STAGE_COLOURS[span.stage], lw=0, zorder=3)  # fmt: skip
        ax.set_ylim(queries[title] - 0.4, -0.6)
        ax.yaxis.get_major_locator().set_params(integer=True, nbins=max(1, min(6, queries[title])))
        ax.grid(False, axis="y")
        ax.set_ylabel("query")
    axes[-1].set_xlim(left=0)
    axes[-1].set_xlabel(unit)
    _key(figure, {"rows are fetched": _STAGE_COLOURS["fetch"], "model is computed": _STAGE_COLOURS["compute"]})
    return drawing.save(figure, pathlib.Path(path))


def draw_savings(comparisons: Sequence[Comparison], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws the power that serves each scenario with and without slow memory, relative to that without.

    Args:
      comparisons: of `jaxeff.sdm.power.compare`.
      path: the PNG to write; its folder is created.

    Returns:
      The path.

    Raises:
      ValueError: for no comparison, or a base without power.
    """
    if not comparisons or not all(one.base.power > 0 for one in comparisons):
        raise ValueError("comparisons must not be empty, and have a power above 0 for each base")
    figure = drawing.figure(width=8.2, height=1.15 + 0.72 * len(comparisons))
    ax = figure.subplots()
    drawing.dress(ax, "power of all hosts, relative to serving without slow memory")
    highest = 1.0
    for place, one in enumerate(comparisons):
        ratio = one.sdm.power / one.base.power
        highest = max(highest, ratio)
        ax.barh(place - 0.19, 1.0, 0.34, color=_PALE, zorder=2)
        ax.barh(place + 0.19, ratio, 0.34, color=drawing.COLOURS[2], zorder=2)
        word = "less" if one.saving >= 0 else "more"
        ax.text(ratio + 0.012, place + 0.2, f"{100 * abs(one.saving):.0f} % {word}", va="center", fontsize=10,
                color=drawing.INK, weight="bold")  # fmt: skip
        for offset, fleet in ((-0.19, one.base), (0.19, one.sdm)):
            helpers = f" and {fleet.helpers:,} helpers" if fleet.helpers else ""
            ax.text(0.012, place + offset + 0.01, f"{fleet.hosts:,} hosts{helpers}", va="center", fontsize=8.5,
                    color=drawing.INK if fleet is one.base else "white", zorder=4)  # fmt: skip
    ax.set_yticks(range(len(comparisons)), [f"{one.name}\n{one.origin}" for one in comparisons])
    ax.set_ylim(len(comparisons) - 0.45, -0.55)
    ax.set_xlim(0, 1.14 * highest)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    _key(figure, {"without": _PALE, "with slow memory": drawing.COLOURS[2]})
    return drawing.save(figure, pathlib.Path(path))


def _stack(ax: Any, place: int, parts: Mapping[str, float], unit: str) -> None:
    """One bar of shares by tier, with what each is where there is room."""
    total = sum(parts.values()) or 1.0
    start = 0.0
    for tier, value in parts.items():
        share = max(0.0, value) / total
        ax.barh(place, share, 0.62, start, color=TIER_COLOURS[tier], edgecolor="white", lw=0.8, zorder=2)
        text = drawing.short(float(f"{value:.3g}")) + unit
        if share > 0.025 * len(text):
            ax.text(start + share / 2, place, text, ha="center", va="center", fontsize=9,
                    color=drawing.INK if tier == "cached" else "white", zorder=4)  # fmt: skip
        start += share


def _key(figure: Any, colours: Mapping[str, str]) -> None:
    """A legend of filled areas above the axes."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"marker": "s", "ms": 8, "lw": 0, "mew": 0}
    handles = [Line2D([], [], color=colour, label=name, **style) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9,
                  labelcolor=drawing.INK)  # fmt: skip


def _seconds(longest: float) -> tuple[str, float]:
    for unit, scale in (("seconds", 1.0), ("milliseconds", 1e3)):
        if longest * scale >= 2:
            return unit, scale
    return "microseconds", 1e6
