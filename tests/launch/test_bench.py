"""The timing harness and the results file; nothing here asserts how long anything takes."""

import json
import statistics
import types

import pytest

from launch.bench import ops, results, timing


def test_contestants_take_turns():
    turns = []
    timing.contest({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, pairs=3, warmup=1)
    assert turns == list("ab" + "ab" * 3) or turns == list("abababab")


def test_the_ratio_is_the_median_of_neighbouring_runs():
    times = timing.Times({"ours": [1.0, 4.0, 9.0], "theirs": [1.0, 2.0, 3.0]}, {"ours": [2.0] * 3, "theirs": [1.0] * 3})
    ratio = times.ratio("ours", "theirs")
    assert (ratio.value, ratio.n) == (2.0, 3)
    assert (ratio.low, ratio.high) == (1.5, 2.5)
    assert times.fastest("ours", "theirs") == "theirs"
    assert times.seconds("ours") == statistics.median([1.0, 4.0, 9.0])
    assert times.cpu_ratio("ours", "theirs") == timing.Ratio(2.0, 2.0, 2.0, 3)


def test_a_contest_also_counts_the_cpu_time_of_every_turn(monkeypatch):
    clock = types.SimpleNamespace(wall=0.0, cpu=0.0)

    def run(wall, cpu):
        clock.wall, clock.cpu = clock.wall + wall, clock.cpu + cpu

    clocks = types.SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    monkeypatch.setattr(timing, "time", clocks)
    times = timing.contest({"two threads": lambda: run(1.0, 2.0), "asleep": lambda: run(4.0, 0.25)}, pairs=3)
    assert times.wall == {"two threads": [1.0] * 3, "asleep": [4.0] * 3}
    assert times.cpu == {"two threads": [2.0] * 3, "asleep": [0.25] * 3}
    assert times.cpu_seconds("asleep") == 0.25


def test_a_contest_needs_contestants_and_pairs():
    with pytest.raises(ValueError, match="pairs=0"):
        timing.contest({"a": lambda: None}, pairs=0)


def test_compiling_is_timed_without_the_cache():
    import jax

    executable, seconds, cpu_seconds = timing.compile_seconds(lambda x: x + 1, jax.numpy.ones(3))
    assert seconds > 0 and cpu_seconds > 0
    assert executable(jax.numpy.ones(3)).tolist() == [2, 2, 2]


def test_results_keep_the_cases_that_were_not_measured_again(tmp_path):
    path = tmp_path / "room.json"
    old = [results.case(name, "seconds", 2.0, better="lower") for name in ("a", "b")]
    results.write(path, old, "first")
    results.write(path, [results.case("b", "seconds", 1.0, better="lower", target=1.5)], "second")
    record = json.loads(path.read_text())
    assert set(record) == {"device", "versions", "date", "command", "cases"}
    assert [(c["case"], c["value"]) for c in record["cases"]] == [("a", 2.0), ("b", 1.0)]
    assert record["cases"][1]["spread"] == [1.0, 1.0]


def test_the_table_marks_what_was_missed(tmp_path):
    cases = [
        results.case("fast", "seconds", 0.5, better="lower", target=1.0, spread=(0.4, 0.6), n=9, against="peer"),
        results.case("slow", "seconds", 2.0, better="lower", target=1.0, n=9),
        results.case("far", "images/s", 30.0, better="higher", target=20),
    ]
    results.write(tmp_path / "room.json", cases, "make bench")
    lines = results.table(tmp_path).splitlines()
    assert any("`fast`" in line and "missed" not in line and "0.4 to 0.6" in line for line in lines)
    assert any("`slow`" in line and "missed" in line for line in lines)
    assert any("`far`" in line and "missed" not in line and "≥ 20" in line for line in lines)
    assert "by CPU time" not in results.table(tmp_path)


TIMES = timing.Times({"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 2.0]}, {"a": [3.0, 6.0, 9.0], "b": [2.0, 2.0, 2.0]})


def test_a_time_ratio_carries_its_cpu_time_to_the_file_and_the_table(tmp_path):
    item = results.time_ratio("one", TIMES, "a", "b", against="peer", target=0.9)
    assert (item["value"], item["spread"], item["n"]) == (1.0, [0.75, 1.25], 3)
    assert (item["cpu_ratio"], item["seconds"], item["cpu_seconds"]) == (3.0, [2.0, 2.0], [6.0, 2.0])
    results.write(tmp_path / "room.json", [item, results.case("two", "seconds", 1.0, better="lower")], "make bench")
    text = (tmp_path / "room.json").read_text()
    assert '"seconds": [2.0, 2.0]' in text and json.loads(text)["cases"][0] == item
    lines = results.table(tmp_path).splitlines()
    assert lines[2] == "| case | measured | quartiles | by CPU time | target | against |"
    assert "| `one`: time ratio | 1 (missed) | 0.75 to 1.25 | 3 | ≤ 0.9 | peer |" in lines
    assert "| `two`: seconds | 1 | - | - | reported |  |" in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu_ratio": None}, "case 'one' lacks cpu_ratio; make a time ratio by time_ratio"),
        ({"against": None}, "case 'one' lacks against$"),
        ({"cpu_ratio": 0.0}, "case 'one': cpu_ratio must be above 0, got 0.0"),
        ({"seconds": [1.0]}, r"case 'one': seconds must be 2 finite number\(s\), got \[1.0\]"),
        ({"value": float("nan")}, r"case 'one': value must be 1 finite number\(s\), got nan"),
        ({"better": "smaller"}, "case 'one': better must be 'lower' or 'higher', got 'smaller'"),
        ({"n": 0}, "case 'one': n must be at least 1, got 0"),
    ],
)
def test_a_case_in_another_form_is_not_written(tmp_path, changes, message):
    item = {**results.time_ratio("one", TIMES, "a", "b", against="peer"), **changes}
    item = {key: value for key, value in item.items() if value is not None or key == "target"}
    with pytest.raises(ValueError, match=message):
        results.write(tmp_path / "room.json", [item], "make bench")
    assert not list(tmp_path.iterdir())


def test_a_time_ratio_without_its_cpu_time_is_not_made():
    with pytest.raises(ValueError, match="lacks cpu_ratio, seconds, cpu_seconds; make a time ratio by time_ratio"):
        results.case("one", "time ratio", 1.0, better="lower")


def test_the_results_of_record_have_the_form_of_every_results_file():
    paths = sorted(results.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert {"device", "versions", "date", "command", "cases"} == set(record)
        names = [item["case"] for item in record["cases"]]
        assert len(names) == len(set(names)) and all(set(results.KEYS) <= set(item) for item in record["cases"])


def test_the_readme_table_goes_between_the_markers(tmp_path):
    results.write(tmp_path / "room.json", [results.case("one", "seconds", 1.0, better="lower")], "make bench")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "`one`" in text and "old" not in text
    with pytest.raises(ValueError, match="results: begin"):
        readme.write_text("nothing")
        results.update_readme(readme, tmp_path)


def test_another_direction_than_lower_or_higher_is_refused():
    with pytest.raises(ValueError, match="'lower' or 'higher'"):
        results.case("x", "seconds", 1.0, better="smaller")


@pytest.mark.slow
def test_the_workloads_of_the_ops_benchmark_agree_with_each_other():
    import jax
    import numpy as np

    from jaxeff import models

    params = ops.client_params()
    batches = jax.tree.map(lambda a: a[:2, :2, :2], ops.batch_of(models.cnn(), 8, 4, 4))
    ours, losses = jax.jit(ops.client_rounds(None))(params, batches)
    for client in range(2):
        mine = params
        for step in range(2):
            mine, loss = ops.client_step(mine, jax.tree.map(lambda a, c=client, s=step: a[c, s], batches), "lax")
            np.testing.assert_allclose(losses[client, step], loss, rtol=1e-4)
        for name, value in mine.items():
            np.testing.assert_allclose(ours[name][client], value, atol=1e-4)


def test_a_recorded_run_becomes_a_table_of_the_readme(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "results"
    (run / "figures").mkdir(parents=True)
    (run / "figures" / "comparison.png").write_bytes(b"png")
    (run / "config.json").write_text(json.dumps({"config": {"epochs": 2}}))
    network = {"name": "first order", "accuracy": 0.5, "params": 1234}
    summary = {"dataset": {"name": "digits", "train": 10, "test": 5}, "steps": 7, "seeds": [0, 1], "latency_batch": 4}
    (run / "summary.json").write_text(json.dumps({**summary, "networks": [network]}))
    results.record(run, "mine", folder / "experiments")
    assert (folder / "experiments" / "mine.png").read_bytes() == b"png"
    assert json.loads((folder / "experiments" / "mine.json").read_text())["config"] == {"epochs": 2}
    readme = tmp_path / "README.md"
    readme.write_text(f"{results.BEGIN}{results.END}\n<!-- mine: begin --><!-- mine: end -->\nafter")
    results.update_readme(readme, folder)
    text = readme.read_text()
    assert "| first order | 50.00 % | 1,234 |" in text and "mean over seeds 0, 1" in text and text.endswith("after")


def test_a_recorded_recommendation_shows_what_serving_took(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "results"
    (run / "figures").mkdir(parents=True)
    (run / "figures" / "hit_rates.png").write_bytes(b"png")
    (run / "config.json").write_text(json.dumps({"config": {"serving": {"examples": 64}}}))
    row = {"kind": "int8", "table_bytes": 5e6, "fast_bytes": 5e5, "qps": 90, "qps_in_memory": 120, "p50": 1e-3}
    row |= {"p99": 2e-3, "hit_rate": 0.875, "reads": 12.34, "reads_foretold": 12.0, "auc": 0.7, "log_loss": 0.6}
    summary = {"dataset": {"name": "films", "train": 1000, "test": 100}, "served": [row], "seeds": [0]}
    (run / "summary.json").write_text(json.dumps(summary))
    results.record(run, "films", folder / "experiments")
    text = results.experiment_table(folder / "experiments" / "films.json")
    assert (
        "| int8 | 5.00 MB | 0.500 MB | 90 | 0.75 | 1.00 ms | 2.00 ms | 87.5 % | 12.3 | 12.0 | 0.7000 | 0.6000 |" in text
    )
    assert "films: 1,000 training and 100 test examples, queries of 64 examples, seeds 0" in text


def test_a_recorded_cascade_shows_where_images_left(tmp_path):
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    (run / "figures" / "cascade.png").write_bytes(b"curve")
    (run / "config.json").write_text(json.dumps({"config": {}}))
    points = [
        {"name": "step 1 alone", "accuracy": 0.5, "milliseconds": 0.1, "left": [1.0]},
        {"name": "threshold 0.9", "accuracy": 0.75, "milliseconds": 0.25, "left": [0.6, 0.4]},
    ]
    summary = {
        "dataset": {"name": "digits", "train": 10, "test": 5}, "steps": 7, "seeds": [0], "latency_batch": 4,
        "networks": [{"name": "small", "accuracy": 0.5, "params": 1234}],
        "cascade": {"steps": ["at_7x7", "large"], "points": points},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    results.record(run, "exits", tmp_path)
    assert (tmp_path / "exits.png").read_bytes() == b"curve"
    table = results.experiment_table(tmp_path / "exits.json")
    assert "| cascade | accuracy | per image | left at 7x7 | left large |\n| --- | ---: | ---: | ---: | ---: |" in table
    assert "| threshold 0.9 | 75.00 % | 0.250 ms | 60 % | 40 % |" in table
    assert "| step 1 alone | 50.00 % | 0.100 ms | - | - |" in table
