"""The training job, through its command line as a user starts it and through its function."""

import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from configs.quadratic import accuracy
from jaxeff import costs, data, training
from launch import classifier, train

SMOKE = "configs/quickstart.py:smoke"


def tiny(**changes) -> ConfigDict:
    config = quickstart.get_config("smoke")
    del config.networks.pruned  # see test_pruning.py
    config.train_split, config.test_split = "train[:64]", "test[:40]"
    config.batch_size, config.epochs, config.eval_batch_size, config.latency_batch = 16, 2, 16, 4
    for section in config.networks.values():
        section.options.widths = (2, 3, 4)
    config.optimizer.schedule.warmup = 2
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.run(tiny().lock(), str(workdir))


@pytest.mark.slow
def test_a_run_leaves_everything_that_it_promises(finished):
    workdir, summary = finished
    assert json.loads((workdir / "config.json").read_text())["config"]["batch_size"] == 16
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name in ("first_order", "quadratic"):
        rows = training.read_metrics(workdir / name / "seed0" / "metrics.jsonl")
        assert rows[-1]["step"] == summary["steps"] == 8
        assert (workdir / name / "seed0" / "checkpoints").is_dir()
    for figure in ("curves.png", "comparison.png"):
        assert (workdir / "figures" / figure).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_comparison_counts_parameters_and_macs_of_each_network(finished):
    _, summary = finished
    first, quadratic = summary["networks"]
    # Three 3x3 convolutions without bias 1-2-3-4, each with a batch norm, and a dense layer 4-10.
    assert first["params"] == 9 * (2 + 6 + 12) + 2 * (2 + 3 + 4) + 50
    assert first["macs"] == 64 * 9 * 2 + 16 * 9 * 6 + 4 * 9 * 12 + 40
    # Three kernels, each with a norm of its own, in the place of one kernel.
    assert quadratic["params"] == 3 * (9 * 20 + 2 * 9) + 2 * 9 + 50
    assert quadratic["macs"] == 3 * (first["macs"] - 40) + 40
    assert quadratic["memory_bytes"] > first["memory_bytes"] > 0
    assert all(0 <= row["accuracy"] <= 1 and row["latency_ms"] > 0 for row in (first, quadratic))


@pytest.mark.slow
def test_a_finished_run_started_again_gives_the_same_summary(finished):
    workdir, summary = finished
    again = train.run(tiny().lock(), str(workdir))
    for old, new in zip(summary["networks"], again["networks"], strict=True):
        assert {**old, "latency_ms": 0, "train_seconds": 0} == {**new, "latency_ms": 0, "train_seconds": 0}


@pytest.mark.slow
def test_the_work_directory_of_another_config_is_refused_and_left_alone(finished):
    workdir, _ = finished
    before = sorted(path for path in workdir.rglob("*"))
    with pytest.raises(training.ForeignWorkdir, match=r"batch_size.*overwrite"):
        train.run(tiny(batch_size=32).lock(), str(workdir))
    assert sorted(path for path in workdir.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.networks.quadratic.update(kind="t9"), "unknown kind 't9'; known: first_order, .*quadralib"),
        (lambda c: c.networks.quadratic.update(model="vgg99"), "unknown model 'vgg99'; known: cnn"),
        (lambda c: c.update(dataset="digit"), "digits"),
        (lambda c: c.optimizer.update(name="sgdd"), "sgd"),
        (lambda c: c.optimizer.schedule.update(base=-1.0), "base"),
        (lambda c: c.optimizer.schedule.update(base=float("nan")), "base"),
        (lambda c: c.augment.update({"rotate": 3}), "unknown field rotate; valid fields: crop, flip"),
        (lambda c: c.update(dtype="float8"), "float32, bfloat16"),
        (lambda c: c.update(batch_size=1000), "1000"),
        (lambda c: c.update(label_smooting=0.1), "unknown field label_smooting; valid fields: .*label_smoothing"),
        (lambda c: c.update(latency_batch=0), "latency_batch must be at least 1"),
        (lambda c: c.update(seeds=()), "seeds is empty"),
        (lambda c: c.update(epochs=0), "nothing to train"),
        (lambda c: c.networks.first_order.options.update({"depth": 3}), "no option depth; it has: widths"),
    ],
    ids=[
        "kind",
        "model",
        "data set",
        "optimizer",
        "negative rate",
        "nan rate",
        "augment",
        "dtype",
        "batch",
        "unknown field",
        "count",
        "seeds",
        "no steps",
        "model option",
    ],
)
def test_bad_configs_fail_before_anything_is_written(tmp_path, change, message):
    config = tiny()
    with config.unlocked():
        change(config)
    with pytest.raises((ValueError, TypeError), match=message):
        train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_overwrite_that_is_interrupted_leaves_no_old_results_to_go_on_from(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    taken = []

    def recorded(batches, **options):
        taken.append(0)
        for batch in prefetch(batches, **options):
            taken[-1] += 1
            if len(taken) == 1 and taken[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    prefetch = data.prefetch
    monkeypatch.setattr(data, "prefetch", recorded)
    with pytest.raises(training.Interrupted):
        train.run(tiny().lock(), str(workdir), overwrite=True)
    assert "saved after step 3 of 8; run the same command again, without overwrite" in capsys.readouterr().err
    assert {path.name for path in workdir.iterdir()} == {"config.json", "first_order"}
    taken.append(None)
    again = train.run(tiny().lock(), str(workdir))
    assert taken[2:] == [5, 8]
    assert [row["accuracy"] for row in again["networks"]] == [row["accuracy"] for row in finished[1]["networks"]]


@pytest.mark.slow
def test_an_unknown_field_on_the_command_line_lists_the_valid_ones(finished_job, tmp_path):
    result = finished_job("train", SMOKE, tmp_path, "--config.bach_size=3")
    assert result.returncode != 0
    assert "bach_size" in result.stderr and "batch_size" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_run_killed_in_the_middle_ends_in_the_same_parameters(start_job, finished_job, tmp_path, final_params):
    config = pathlib.Path(__file__).with_name("pair_config.py")
    whole = finished_job("train", config, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = start_job("train", config, tmp_path / "cut", **nowhere)
    metrics = tmp_path / "cut" / "first_order" / "seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    resumed = finished_job("train", config, tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("first_order", "quadratic"):
        one, other = (final_params(tmp_path / run / name / "seed0") for run in ("whole", "cut"))
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name", ["fashion_mnist_vgg", "cifar10_qvgg7", "cifar10_resnet", "cifar10_mobilenet", "accuracy"]
)
@pytest.mark.data
@pytest.mark.slow
def test_every_experiment_has_a_smoke_form_that_runs(tmp_path, name):
    config = importlib.import_module(f"configs.quadratic.{name}").get_config("smoke")
    rows = train.run(config.lock(), str(tmp_path))["networks"]
    assert {row["name"] for row in rows} == {name.replace("_", " ") for name in config.networks}


@pytest.mark.parametrize(
    ("study", "image", "equal"),
    [
        ("fashion_mnist", (28, 28, 1), {"quadratic_equal_parameters": ("params",), "quadratic_equal_macs": ("macs",)}),
        ("cifar10", (32, 32, 3), {"quadratic_equal_parameters": ("params",), "quadratic_equal_macs": ("macs",)}),
        ("resnet", (32, 32, 3), {"quadratic": ("params", "macs")}),
        ("mobilenet", (32, 32, 3), {"quadratic": ("params", "macs")}),
    ],
)
def test_the_networks_of_the_accuracy_study_cost_the_same(study, image, equal):
    info = data.DatasetInfo(task="classification", num_classes=10)
    images = data.Dataset("images", "train", {"image": np.zeros((2, *image), np.uint8)}, info)
    networks = accuracy.get_config(study).networks

    def counted(module):
        x = jax.ShapeDtypeStruct((1, *image), np.float32)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        rest = {"batch_stats": variables["batch_stats"]}
        args = variables["params"], rest, x
        return costs.analyze(lambda p, rest, x: module.apply({"params": p, **rest}, x), *args, residuals=False).total

    total = {name: counted(classifier.network(section, images)) for name, section in networks.items()}
    for name, counts in equal.items():
        for count in counts:
            ratio = getattr(total[name], count) / getattr(total["first_order"], count)
            assert ratio == pytest.approx(1, abs=0.04)


def test_a_batch_must_divide_by_the_devices():
    with pytest.raises(ValueError, match="batch_size=16 does not divide by the 3 devices; take a multiple of 3"):
        classifier.check_config(tiny(), 3)


def test_data_sets_without_classes_are_refused():
    images = np.zeros((2, 8, 8, 1), np.uint8)
    clicks = data.Dataset("clicks", "train", {"image": images}, data.DatasetInfo(task="clicks"))
    with pytest.raises(ValueError, match=r"'clicks' is for clicks.*fashion_mnist"):
        classifier.check_task(clicks)


def test_networks_can_compute_in_bfloat16():
    digits = data.load("digits", "train[:16]")
    section = quickstart.get_config("smoke").networks.quadratic
    module = classifier.network(section, digits, "bfloat16")
    images = jax.numpy.zeros((2, 8, 8, 1))
    shapes = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images))
    assert shapes[0].dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[1]["params"])} == {np.dtype(np.float32)}


def test_augmentations_switch_on_one_by_one():
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    targets = jax.nn.one_hot(np.arange(4), 10)
    assert classifier.augmentation({"crop": 0, "flip": False}) is None
    for section in ({"crop": 2}, {"flip": True}, {"cutout": 3}, {"mixup": 0.4}):
        new_images, new_targets = classifier.augmentation(section)(jax.random.key(1), images, targets)
        assert new_images.shape == images.shape and not np.allclose(new_images, images)
        assert np.allclose(new_targets, targets) != ("mixup" in section)
        np.testing.assert_allclose(np.sum(new_targets, axis=1), 1, rtol=1e-6)
