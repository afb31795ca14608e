"""The timing harness and the results file; nothing here asserts how long anything takes."""

import json
import statistics

import pytest

from launch.bench import ops, results, timing


def test_contestants_take_turns():
    turns = []
    timing.contest({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, pairs=3, warmup=1)
    assert turns == list("ab" + "ab" * 3) or turns == list("abababab")


def test_the_ratio_is_the_median_of_neighbouring_runs():
    times = timing.Times({"ours": [1.0, 4.0, 9.0], "theirs": [1.0, 2.0, 3.0]}, {})
    ratio = times.ratio("ours", "theirs")
    assert (ratio.value, ratio.n) == (2.0, 3)
    assert (ratio.low, ratio.high) == (1.5, 2.5)
    assert times.fastest("ours", "theirs") == "theirs"
    assert times.seconds("ours") == statistics.median([1.0, 4.0, 9.0])


def test_a_contest_needs_contestants_and_pairs():
    with pytest.raises(ValueError, match="pairs=0"):
        timing.contest({"a": lambda: None}, pairs=0)


def test_compiling_is_timed_without_the_cache():
    import jax

    executable, seconds = timing.compile_seconds(lambda x: x + 1, jax.numpy.ones(3))
    assert seconds > 0
    assert executable(jax.numpy.ones(3)).tolist() == [2, 2, 2]


def test_results_keep_the_cases_that_were_not_measured_again(tmp_path):
    path = tmp_path / "room.json"
    old = [results.case(name, "time ratio", 2.0, better="lower") for name in ("a", "b")]
    results.write(path, old, "first")
    results.write(path, [results.case("b", "time ratio", 1.0, better="lower", target=1.5)], "second")
    record = json.loads(path.read_text())
    assert set(record) == {"device", "versions", "date", "command", "cases"}
    assert [(c["case"], c["value"]) for c in record["cases"]] == [("a", 2.0), ("b", 1.0)]
    assert record["cases"][1]["spread"] == [1.0, 1.0]


def test_the_table_marks_what_was_missed(tmp_path):
    cases = [
        results.case("fast", "time ratio", 0.5, better="lower", target=1.0, spread=(0.4, 0.6), n=9, against="peer"),
        results.case("slow", "time ratio", 2.0, better="lower", target=1.0, n=9),
        results.case("far", "time ratio", 30.0, better="higher", target=20),
    ]
    results.write(tmp_path / "room.json", cases, "make bench")
    lines = results.table(tmp_path).splitlines()
    assert any("`fast`" in line and "missed" not in line and "0.4 to 0.6" in line for line in lines)
    assert any("`slow`" in line and "missed" in line for line in lines)
    assert any("`far`" in line and "missed" not in line and "≥ 20" in line for line in lines)


def test_the_readme_table_goes_between_the_markers(tmp_path):
    results.write(tmp_path / "room.json", [results.case("one", "time ratio", 1.0, better="lower")], "make bench")
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
        results.case("x", "time ratio", 1.0, better="smaller")


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
