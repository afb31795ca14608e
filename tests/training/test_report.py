import json
import struct
import sys

import pytest

from jaxeff.training import (
    comparison_figure,
    comparison_markdown,
    comparison_table,
    learning_curves,
    write_summary,
)

# fmt: off
ROWS = [
    {"name": "first-order", "accuracy": 0.975, "params": 24570, "macs": 812544, "latency_ms": 0.4567},
    {
        "name": "quadratic",
        "accuracy": 0.98125,
        "params": 12801,
        "macs": 455100,
        "latency_ms": 12.3,
        "memory_bytes": 2**20,
    },
]
# fmt: on
HISTORY = [
    {"step": 10, "train/loss": 2.0},
    {"step": 20, "train/loss": 0.05},
    {"step": 20, "eval/loss": 0.3, "eval/accuracy": 0.9},
]


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.slow
def test_learning_curves_have_a_panel_for_each_metric_there_is(tmp_path):
    three = learning_curves({"a": HISTORY, "b": HISTORY}, tmp_path / "new" / "curves.png")
    one = learning_curves({"a": HISTORY[:2]}, tmp_path / "one.png")
    assert png_size(three)[0] > 2.5 * png_size(one)[0]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["curves.png", "one.png"]  # no temporary file


@pytest.mark.parametrize("networks", [1, 2, 7, 12])
def test_the_comparison_is_drawn_for_few_and_many_networks(tmp_path, networks):
    rows = [
        {"name": f"net {i}", "accuracy": 0.9 + i / 200, "params": 10**i + 1, "macs": 1000 + i, "latency_ms": 2.0**i}
        for i in range(networks)
    ]
    rows[0]["accuracy_range"] = (0.88, 0.93)
    assert png_size(comparison_figure(rows, tmp_path / "figure.png"))[1] > 400


def test_a_cost_nobody_has_gets_no_panel(tmp_path):
    whole = comparison_figure(ROWS, tmp_path / "whole.png")
    rows = [{key: value for key, value in row.items() if key != "latency_ms"} for row in ROWS]
    assert png_size(comparison_figure(rows, tmp_path / "two.png"))[0] < png_size(whole)[0]


def test_figures_leave_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    learning_curves({"a": HISTORY}, tmp_path / "curves.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_markdown_table_has_one_line_per_network_and_leaves_unknown_columns_out():
    assert comparison_markdown(ROWS).splitlines() == [
        "| network | accuracy | parameters | MACs | memory | latency |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| first-order | 97.50 % | 24,570 | 812,544 | - | 0.457 ms |",
        "| quadratic | 98.12 % | 12,801 | 455,100 | 1.00 MiB | 12.3 ms |",
    ]


def test_a_mean_over_seeds_stands_before_its_range():
    rows = [{**ROWS[0], "accuracy_range": (0.97, 0.9812)}, {**ROWS[1], "accuracy_range": (0.98125, 0.98125)}]
    cells = [line.split(" | ")[1] for line in comparison_markdown(rows).splitlines()[2:]]
    assert cells == ["97.50 % (97.00 to 98.12)", "98.12 %"]


def test_the_rich_table_has_the_same_cells():
    pytest.importorskip("rich")
    table = comparison_table(ROWS, title="Digits")
    assert [column.header for column in table.columns][:3] == ["network", "accuracy", "parameters"]
    assert list(table.columns[1].cells) == ["97.50 %", "98.12 %"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: expected at least one network, got none"),
        ([{"name": "a"}], r"rows\[0\]: has no accuracy; it has name"),
        ([{"name": "a", "accuracy": 97.0, "params": 1}], r"rows\[0\]: accuracy is a fraction in \[0, 1\], got 97.0"),
        ([ROWS[0], ROWS[0]], "rows: two networks are called first-order"),
        ([{"name": "a", "accuracy": 0.5}], "rows: no network has any of params, macs, latency_ms"),
    ],
)
def test_rows_that_cannot_be_compared_are_explained(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        comparison_figure(rows, tmp_path / "figure.png")


def test_histories_without_metrics_are_explained(tmp_path):
    with pytest.raises(ValueError, match="histories: expected at least one run"):
        learning_curves({}, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="histories: no run has train/loss"):
        learning_curves({"a": [{"step": 1}]}, tmp_path / "curves.png")


def test_without_matplotlib_or_rich_the_error_names_the_extra(tmp_path, monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "jaxeff\[train\]"'):
        learning_curves({"a": HISTORY}, tmp_path / "curves.png")
    with pytest.raises(ImportError, match=r'pip install "jaxeff\[train\]"'):
        comparison_table(ROWS)
    assert "quadratic" in comparison_markdown(ROWS)


def test_the_summary_replaces_the_old_one_whole(tmp_path):
    write_summary(tmp_path / "run", {"accuracy": 0.5})
    path = write_summary(tmp_path / "run", {"accuracy": 0.75, "device": object})
    assert json.loads(path.read_text())["accuracy"] == 0.75
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]
