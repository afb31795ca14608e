"""The federated job: what it writes, that it resumes exactly, and what it refuses."""

import json

import numpy as np
import pytest

from configs.federated import digits
from configs.federation import method, partition
from jaxeff import training
from launch import federate

pytestmark = pytest.mark.slow


def tiny(**changes):
    config = digits.get_config("smoke")
    config.train_split, config.test_split = "train[:120]", "test[:40]"
    config.clients, config.rounds, config.checkpoint_every = 5, 2, 1
    config.partitions.two_classes = partition("by_classes", classes_per_client=2)
    small = {"widths": (2, 10), "norm": "group"}
    config.methods.fed_avg = method("cnn", **small)
    config.methods.fed2 = method("cnn", groups=5, first="conv2", mode="subset", **small)
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("federated")
    return workdir, federate.run(tiny().lock(), str(workdir))


def test_a_run_leaves_everything_that_it_promises(finished):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    rows = {row["method"]: row for row in summary["results"]}
    assert set(rows) == {"fed_avg", "fed2"}
    # In subset mode a client of two classes gets and sends two groups of five at most.
    assert rows["fed2"]["bytes_per_round"] < rows["fed_avg"]["bytes_per_round"]
    for name in rows:
        logged = training.read_metrics(workdir / "two_classes" / name / "seed0" / "metrics.jsonl")
        assert [row["step"] for row in logged if "train/loss" in row] == [1, 2]
        assert logged[-2]["train/counted"] == 5 and logged[-2]["train/rejected"] == 0
        assert len(rows[name]["by_class"]) == 10 and [at for at, _ in rows[name]["curves"][0]] == [1, 2]
    for figure in ("two_classes", "two_classes_rounds", "two_classes_classes"):
        assert (workdir / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_resume_exactly(finished, tmp_path):
    _, whole = finished
    config = tiny()
    federate.run(config.lock(), str(tmp_path))
    for folder in (tmp_path / "two_classes").glob("*/seed0"):
        saved = sorted((folder / "checkpoints").iterdir(), key=lambda path: path.name)
        assert [path.name for path in saved if path.is_dir()] == ["1", "2"]
        for path in sorted(saved[-1].rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        saved[-1].rmdir()
    again = federate.run(config.lock(), str(tmp_path))
    for before, after in zip(whole["results"], again["results"], strict=True):
        assert before["accuracy"] == after["accuracy"] and before["by_class"] == after["by_class"]


@pytest.mark.parametrize("algorithm", ["fed_prox", "fed_opt", "scaffold", "fed_nova", "moon"])
def test_every_algorithm_runs_from_a_config(algorithm, tmp_path):
    config = tiny(rounds=1)
    del config.methods.fed2
    options = {"fed_prox": {"mu": 0.1}, "fed_opt": {"kind": "yogi"}}.get(algorithm, {})
    config.methods.fed_avg = method("mlp", algorithm, hidden=(4,), options=options)
    (row,) = federate.run(config.lock(), str(tmp_path))["results"]
    assert np.isfinite(row["accuracy"])


def test_what_clients_send_is_robust_compressed_and_private(tmp_path):
    pytest.importorskip("dp_accounting")
    small = {"widths": (2, 10), "norm": "group"}
    dense = {"hidden": (8,)}
    config = tiny(clients=5)
    config.methods = {
        "median": method("cnn", groups=5, first="conv2", robust={"rule": "median", "clip": 1.0}, **small),
        "compressed": method("mlp", compression={"bits": 4, "share": 0.1}, **dense),
        "private": method(
            "cnn",
            groups=5,
            first="conv2",
            privacy={"kind": "central", "clip": 0.5, "noise": 2.0, "quantile": 0.5},
            **small,
        ),
        "noisy": method("mlp", privacy={"kind": "local", "noise": 4.0}, **dense),
        "plain": method("mlp", **dense),
    }
    rows = {row["method"]: row for row in federate.run(config.lock(), str(tmp_path))["results"]}
    assert rows["compressed"]["bytes_per_round"] < 0.7 * rows["plain"]["bytes_per_round"]
    assert rows["plain"]["epsilon"] is None and rows["private"]["epsilon"] > 1 and rows["noisy"]["epsilon"] > 1
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.methods.update(bad=method("cnn", "fed_ma")), "algorithm must be one of 'fed_avg'"),
        (lambda config: config.methods.update(bad=method("cnn", groups=5)), "name the layer with which they begin"),
        (lambda config: config.partitions.update(bad=partition("by_colour")), "kind must be one of iid"),
        (lambda config: config.update(clients=2), "would be owned by nobody"),
        (lambda config: config.participation.update(fraction=0.0), "someone has to take part"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(change, message, tmp_path):
    config = tiny()
    change(config)
    with pytest.raises(ValueError, match=message):
        federate.run(config.lock(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
