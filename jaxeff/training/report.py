"""What a run shows at its end: learning curves, networks side by side as figure and table, and `summary.json`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxeff.training import figure
from jaxeff.training.metrics import Row
from jaxeff.training.workdir import SUMMARY, write_json


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _count(value: float) -> str:
    return f"{int(value):,}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.2f} MiB"


def _milliseconds(value: float) -> str:
    return f"{value:,.3f} ms" if value < 10 else f"{value:,.1f} ms"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"


# What a row of a comparison may hold: key -> (title, how it is written). The name comes first.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "name": ("network", str),
    "accuracy": ("accuracy", _percent),
    "params": ("parameters", _count),
    "macs": ("MACs", _count),
    "memory_bytes": ("memory", _mebibytes),
    "latency_ms": ("latency", _milliseconds),
    "train_seconds": ("train", _seconds),
}

_CURVES = (("train/loss", "training loss"), ("eval/loss", "test loss"), ("eval/accuracy", "test accuracy"))
_COSTS = (("params", "parameters"), ("macs", "MACs per example"), ("latency_ms", "latency in ms"))


def learning_curves(histories: Mapping[str, Sequence[Row]], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws loss and accuracy against the step, one line per run, and saves it as a PNG of 150 dpi.

    Args:
      histories: rows of metrics by the run's name, as `fit` returns them or `read_metrics` reads them. Panels are
        drawn for what at least one run has of "train/loss", "eval/loss" and "eval/accuracy" ("train/accuracy"
        where nothing was evaluated).
      path: the file; its folder is created.

    Returns:
      The path.

    Raises:
      ValueError: if there is no run, or no run has any of these metrics.
      ImportError: if matplotlib is missing.
    """
    if not histories:
        raise ValueError("histories: expected at least one run, got none")
    present = {key for rows in histories.values() for row in rows for key in row}
    wanted = _CURVES if "eval/accuracy" in present else (*_CURVES[:2], ("train/accuracy", "training accuracy"))
    panels = [(key, title) for key, title in wanted if key in present]
    if not panels:
        raise ValueError(f"histories: no run has {', '.join(key for key, _ in wanted)}; found {sorted(present)}")
    curves = [
        {name: [(row["step"], row[key]) for row in rows if key in row] for name, rows in histories.items()}
        for key, _ in panels
    ]
    return figure.draw_curves(curves, panels, pathlib.Path(path))


def comparison_figure(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws accuracy against parameters, MACs and latency, one point per network, and saves it as a PNG of 150 dpi.

    Args:
      rows: one mapping per network: "name", "accuracy" in 0..1, optional "accuracy_range" (low, high) over seeds, and
        "params", "macs" (per example), "latency_ms" as far as they are known. A panel whose cost no network has is
        left out.
      path: the file; its folder is created.

    Returns:
      The path.

    Raises:
      ValueError: if there is no row, a row lacks its name or accuracy, or names repeat.
      ImportError: if matplotlib is missing.
    """
    _check_rows(rows)
    panels = [(key, title) for key, title in _COSTS if any(row.get(key) is not None for row in rows)]
    if not panels:
        raise ValueError(f"rows: no network has any of {', '.join(key for key, _ in _COSTS)}")
    return figure.draw_comparison(rows, panels, pathlib.Path(path))


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Any:
    """Returns networks side by side as a rich table.

    Args:
      rows: one mapping per network with "name", "accuracy", optional "accuracy_range" (low, high) over seeds, which
        stands behind the accuracy, and any other key of `COLUMNS`; columns that no network has are left out.
      title: a line above it.

    Returns:
      A `rich.table.Table`, for `rich.print`.

    Raises:
      ValueError: as `comparison_figure`.
      ImportError: if rich is missing; `comparison_markdown` needs nothing.
    """
    try:
        from rich import box, table
    except ImportError as error:
        raise ImportError('tables in colour need rich: pip install "jaxeff[train]"') from error
    header, body = _cells(rows)
    result = table.Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(header):
        result.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for line in body:
        result.add_row(*line)
    return result


def comparison_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of `comparison_table` in Markdown."""
    header, body = _cells(rows)
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def write_summary(workdir: str | os.PathLike[str], summary: Mapping[str, Any]) -> pathlib.Path:
    """Writes `summary.json` of a run so that the file is at every moment whole.

    Args:
      workdir: the work directory; created when missing.
      summary: what the run found out; what JSON does not know becomes its `str`.

    Returns:
      The path of the file.
    """
    path = pathlib.Path(workdir) / SUMMARY
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(summary))
    return path


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    _check_rows(rows)
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    return [COLUMNS[key][0] for key in keys], [[_cell(row, key) for key in keys] for row in rows]


def _cell(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "-"
    text = COLUMNS[key][1](row[key])
    low, high = row.get("accuracy_range") or (0, 0)
    if key == "accuracy" and low < high:
        text += f" ({100 * low:.2f} to {100 * high:.2f})"
    return text


def _check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise ValueError("rows: expected at least one network, got none")
    for index, row in enumerate(rows):
        missing = [key for key in ("name", "accuracy") if row.get(key) is None]
        if missing:
            raise ValueError(f"rows[{index}]: has no {' and no '.join(missing)}; it has {', '.join(map(str, row))}")
        if not 0 <= row["accuracy"] <= 1:
            raise ValueError(f"rows[{index}]: accuracy is a fraction in [0, 1], got {row['accuracy']}")
    names = [row["name"] for row in rows]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"rows: two networks are called {', '.join(repeated)}; give each its own name")
