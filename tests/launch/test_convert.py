"""The conversion job: what a run leaves behind, going on, other sources, and configs that fail at once."""

import json

import pytest

from configs.quadratic import convert_vgg
from jaxeff import training
from launch import convert, train


def tiny():
    config = convert_vgg.get_config("smoke")
    config.dataset, config.train_split, config.score_split = "digits", "train[:64]", "train[64:104]"
    config.test_split, config.batch_size, config.eval_batch_size = "test[:40]", 16, 20
    config.network.options.plan = (2, 2, "M", 3, 3)
    config.score.batch_size = 20
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, convert.run(tiny().lock(), str(workdir))


@pytest.mark.slow
def test_a_run_leaves_everything_that_it_promises(finished):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (workdir / "figures" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in ("source", "continued", "quadratic", "reduced"):
        assert training.read_metrics(workdir / "seed0" / name / "metrics.jsonl")[-1]["step"] == 4
        assert (workdir / "seed0" / name / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_every_step_is_reported_and_the_budget_holds(finished):
    _, summary = finished
    (done,) = summary["conversions"]
    assert done["transplanted"]["accuracy"] == pytest.approx(done["source"]["accuracy"])
    assert done["transplanted"]["largest_logit_difference"] < 1e-5
    # 3x3 convolutions 1-2-2-3-3 with a batch norm each and a dense layer 3-10; three times that with biases.
    assert done["source"]["params"] == 9 * (2 + 4 + 6 + 9) + 2 * 10 + 40
    assert done["quadratic"]["params"] == 3 * 9 * (2 + 4 + 6 + 9) + 3 * 10 + 2 * 10 + 40
    assert [row["layer"] for row in done["scores"]] == ["conv1", "conv2", "conv3", "conv4"]
    assert done["steps"][-1]["params"] == done["reduced"]["params"]
    assert done["reduced"]["params"] <= 0.85 * done["source"]["params"]
    for name in ("macs", "memory_bytes"):
        assert done["reduced"][name] <= done["source"][name]
    # The source trained on is the same network, with nothing kept but what its layers read.
    assert done["continued"]["params"] == done["source"]["params"]
    assert done["reduced"]["memory_bytes"] <= done["continued"]["memory_bytes"] < done["source"]["memory_bytes"]
    ratios = summary["reduced_to_source"]
    assert ratios["params"] == done["reduced"]["params"] / done["source"]["params"]
    gain = done["reduced"]["accuracy"] - done["source"]["accuracy"]
    assert ratios["accuracy_points"] == pytest.approx(100 * gain)


@pytest.mark.slow
def test_a_finished_run_started_again_gives_the_same_summary(finished):
    workdir, summary = finished
    assert convert.run(tiny().lock(), str(workdir)) == summary


@pytest.mark.slow
def test_a_network_of_the_training_job_can_be_the_source(finished, tmp_path):
    from configs import quickstart

    there = quickstart.get_config("smoke")
    config = tiny()
    there.train_split, there.test_split, there.batch_size, there.epochs = config.train_split, config.test_split, 16, 1
    there.optimizer.schedule.warmup, there.networks = 1, {"first_order": config.network}
    trained = train.run(there.lock(), str(tmp_path / "source"))
    config.source = str(tmp_path / "source")
    summary = convert.run(config.lock(), str(tmp_path / "run"))
    (done,) = summary["conversions"]
    assert done["source"]["accuracy"] == pytest.approx(trained["networks"][0]["accuracy"])
    assert done["transplanted"]["accuracy"] == pytest.approx(done["source"]["accuracy"])
    assert not (tmp_path / "run" / "seed0" / "source").exists()
    with config.unlocked():
        config.source_network = "second_order"
    with pytest.raises(ValueError, match="source_network='second_order' is not in .*, which has first_order"):
        convert.run(config, str(tmp_path / "other"))
    with config.unlocked():
        config.update({"source_network": "first_order", "train_split": "train[:32]"})
    with pytest.raises(ValueError, match=r"trained with train_split='train\[:64\]', not 'train\[:32\]'"):
        convert.run(config, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="t3"), "kind 't3' .*cannot start as a first-order layer.* quadralib"),
        (lambda c: c.update(kind="t99"), "unknown kind 't99'"),
        (lambda c: c.update(source="nowhere"), "source='nowhere' is no work directory of launch.train"),
        (lambda c: c.update(save="b"), "save must be one of 'all', 'ab', 'x'"),
        (lambda c: c.update(actions=("delete",)), "actions: unknown field delete; valid fields: remove"),
        (lambda c: c.budget.update(flops=1), "budget: unknown field flops; valid fields: params, macs"),
        (lambda c: c.update(sead=1), "unknown field sead; valid fields: .*seeds"),
        (lambda c: c.update(seeds=()), "seeds is empty"),
        (lambda c: c.update(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda c: c.training.reduced.update(epochs=-1.0), "training.reduced.epochs must be a number from 0, got -1.0"),
        (lambda c: c.training.reduced.update(epochs=float("nan")), "training.reduced.epochs must be a number .* nan"),
        (lambda c: c.training.reduced.__delitem__("epochs"), "training.reduced: missing field epochs"),
        (lambda c: c.score.update(ratio=1.5), r"ratio must be in 0..1, got 1.5"),
        (lambda c: c.score.update(masks=0), "masks and batch_size must be at least 1, got 0 and 20"),
        (lambda c: c.update(branch_norm="layer"), "layer 'conv1': norm='batch', .* cannot be kept"),
        (lambda c: c.network.update(kind="qres"), "layer 'conv1': .*"),
        (lambda c: c.training.source.optimizer.update(name="sgdd"), "sgd"),
    ],
    ids=[
        "twin",
        "kind",
        "source",
        "save",
        "actions",
        "budget",
        "field",
        "seeds",
        "batch",
        "epochs",
        "nan",
        "stage",
        "ratio",
        "masks",
        "norm",
        "source_kind",
        "optimizer",
    ],
)
def test_bad_configs_fail_before_anything_is_written(tmp_path, change, message):
    config = tiny()
    with config.unlocked():
        change(config)
    with pytest.raises(ValueError, match=message):
        convert.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.data
@pytest.mark.slow
def test_the_experiment_has_a_smoke_form_that_runs(tmp_path, capsys):
    assert convert.run(convert_vgg.get_config("smoke").lock(), str(tmp_path))["networks"]
    assert "reduced to source:" in capsys.readouterr().out
