"""The recommendation job trains, converts, plans and serves, and says what is wrong with a config."""

import json

import pytest

from configs.recommend import movielens, trace
from launch import recommend


def smoke(module):
    config = module.get_config("smoke")
    config.trace.queries, config.store.kinds = 12, ("int8",)
    return config


@pytest.mark.slow
def test_a_generated_trace_is_served_from_files_as_from_memory(tmp_path):
    summary = recommend.run(smoke(trace), tmp_path / "run")
    (row,) = summary["served"]
    assert row["kind"] == "int8" and row["fast_bytes"] <= 0.1 * row["table_bytes"]
    assert 0 < row["hit_rate"] < 1 and row["reads"] > 0 and row["qps"] > 0
    figures = sorted(path.name for path in (tmp_path / "run" / "figures").iterdir())
    assert figures == ["devices.png", "hit_rates.png", "placement.png", "power.png", "timeline.png"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["served"][0]["reads"] == row["reads"]


@pytest.mark.slow
def test_rows_can_be_split_and_bags_kept(tmp_path):
    config = smoke(trace)
    config.memory.update({"split_rows": True, "pooled_share": 0.2, "cache_share": 0.3})
    config.serving.update({"lookahead": 4, "measured": 5})
    config.trace.update({"session_queries": 8.0, "queries": 40})
    (row,) = recommend.run(config, tmp_path / "run")["served"]
    assert sum(row["pinned_rows"].values()) > 0 and set(row["tiers"].values()) == {"cached"}
    assert row["pooled_hit_rate"] > 0


@pytest.mark.slow
@pytest.mark.data
def test_films_are_learned_once_and_scored_in_every_format(tmp_path):
    config = movielens.get_config("smoke")
    first = recommend.run(config, tmp_path / "run")
    again = recommend.run(config, tmp_path / "run")  # goes on from the last checkpoint
    scores = {row["kind"]: row["auc"] for row in first["served"]}
    assert set(scores) == {"float32", "int8", "int4"}
    assert abs(scores["int8"] - scores["float32"]) < 0.01
    assert [row["auc"] for row in again["served"]] == [row["auc"] for row in first["served"]]


@pytest.mark.slow
def test_a_click_log_of_ones_own_is_streamed(tmp_path):
    lines = [
        "\t".join([str(n % 2), *(str(n * k % 7) for k in range(13)), *(f"{n * k % 11 + 1:x}" for k in range(26))])
        for n in range(96)
    ]
    for name in ("train", "test"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    config = smoke(trace)
    config.dataset = "file"
    config.file.update({"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "rows": 50})
    config.training.update({"epochs": 2, "batch_size": 32})
    config.memory.share = 0.5
    summary = recommend.run(config, tmp_path / "run")
    assert summary["dataset"]["train"] == 96 and 0 <= summary["served"][0]["auc"] <= 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset", "books", "dataset='books' is unknown; there are movielens"),
        ("memory.share", 1.5, "memory.share must be 0 .. 1, got 1.5"),
        ("store.kinds", ("int2",), "store.kinds: 'int2' is unknown"),
        ("device", "tape", "device='tape' is unknown; there are measured, nand"),
        ("serving.depth", 9, "serving.depth must be 1 .. 3, got 9"),
        ("serving.examples", 0, "serving.examples must be at least 1, got 0"),
        ("serving.measured", 0, "serving.measured must be at least 1"),
        ("serving.reader", "foo", "serving.reader='foo' must be one of auto, uring"),
        ("store.packing", "x", "store.packing='x' must be one of dense, block"),
        ("store.kinds", (), "store.kinds must not be empty"),
        ("seeds", (), "seeds must not be empty"),
        ("training.epochs", 0, "training.epochs must be at least 1"),
        ("memory.share", 0.0, "memory.share must be above 0"),
        ("model.preset", "no", "model.preset='no' must be one of mlperf_v1"),
        ("trace.popularity", "1999", "trace.popularity must be one of 2021"),
    ],
)
def test_what_is_wrong_in_a_config_is_named_before_anything_is_written(tmp_path, field, value, message):
    config = smoke(trace)
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=message):
        recommend.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
