import json
import math
import sys

import jax.numpy as jnp
import pytest

from jaxeff.training import EvaluationSums, MetricsWriter, mean_of, read_metrics


def test_rows_are_read_as_they_were_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "accuracy": 1})
        writer.write(2, {"loss": 0.25})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "accuracy": 1.0}, {"step": 2, "loss": 0.25}]
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(tmp_path)


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
    writer.close()


def test_the_file_is_strict_json_also_where_values_are_not_finite(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"grad_norm": math.inf, "loss": math.nan, "accuracy": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "grad_norm": None, "loss": None, "accuracy": 0.5}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["grad_norm"]) and math.isnan(row["loss"])


def test_resuming_drops_the_rows_after_the_step_and_a_line_that_was_cut_off(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (5, 10, 15):
            writer.write(step, {"loss": math.nan if step == 5 else step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    with MetricsWriter(tmp_path, resume_from=10) as writer:
        writer.write(15, {"loss": 0.5})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert math.isnan(rows[0]["loss"]) and rows[2]["loss"] == 0.5


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a JSON object"):
        read_metrics(tmp_path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)


def test_a_full_disk_names_the_file(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer._file.close()
    writer._file = open("/dev/full", "w")
    with pytest.raises(OSError, match=r"No space left.*metrics of step 7 could not be written.*metrics.jsonl"):
        writer.write(7, {"loss": 1})
    writer.close()


@pytest.mark.slow
def test_tensorboard_files_hold_the_same_values(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"train/loss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_tensorboard_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'pip install "jaxeff\[tensorboard\]"'):
        MetricsWriter(tmp_path, tensorboard=True)


def test_means_of_rows_are_float64():
    assert mean_of([{"loss": 1e16}, {"loss": 1.0}, {"loss": -1e16}])["loss"] == 1 / 3
    assert mean_of([]) == {}


def test_evaluation_sums_weigh_batches_by_their_count():
    sums = EvaluationSums()
    sums.add({"loss": jnp.float32(6), "count": jnp.float32(3)})
    sums.add({"loss": jnp.float32(1), "count": jnp.float32(1)})
    assert sums.means() == {"loss": 1.75}


def test_evaluation_sums_without_a_count_say_what_is_missing():
    with pytest.raises(ValueError, match='the sums need a "count" of valid examples, got loss'):
        EvaluationSums().add({"loss": jnp.float32(1)})
