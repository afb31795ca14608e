"""Dynamic pruning in the training job: sources, ratios, cascades, what is left behind, configs that fail at once."""

import json

import numpy as np
import pytest

from configs.classification import gates, learned, network, sgd
from configs.dynamic import accuracy, cascade, fashion_mnist_vgg, one_for_all
from configs.dynamic import learned as learned_experiment
from jaxeff import data, dynamic, training
from jaxeff.ops import autotune
from launch import classifier, pruning, train

PLAN = (4, "M", 8, 8)
NETWORKS = ("whole", "chosen", "sandwich", "untrained", "boosted", "channel_gated")


def tiny(**changes):
    config = accuracy.get_config("smoke")
    config.train_split, config.test_split = "train[:64]", "test[:40]"
    config.eval_batch_size, config.latency_batch, config.steps = 20, 4, 6
    config.networks = {name: network("vgg", plan=PLAN) for name in NETWORKS}
    pace = {"source": "whole", "increment": 0.5}
    config.networks.chosen.gates = gates(None, macs=0.6, sensitivity_split="train[64:104]", **pace)
    config.networks.sandwich.gates = gates(0.5, columns=0.25, rule="sandwich", epochs=2)
    config.networks.untrained.gates = gates((0.5, 0.75), rule="none", source="sandwich", calibrate=2)
    config.networks.boosted.learned = learned("boosted", channels=0.5, group_size=2)
    config.networks.boosted.gates = gates(0.5, increment=0.5)
    config.networks.channel_gated.learned = learned("channel_gated", base=0.5, penalty=1e-3)
    config.optimizer = sgd(0.05, warmup=1)
    config.cascade = ("untrained", "whole")
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
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    names = {row["name"] for row in summary["networks"]}
    assert names == {name.replace("_", " ") for name in NETWORKS} and set(summary["pruned"]) == {*NETWORKS} - {"whole"}
    figures = {path.name for path in (workdir / "figures").iterdir()}
    # Channel gating leaves out single outputs, which no engine does.
    speeds = {f"{name}_speed.png" for name in summary["pruned"] if name != "channel_gated"}
    assert figures == speeds | {"cascade.png", "chosen_sensitivity.png", "curves.png", "comparison.png"}
    # Six steps are those of the experiment, two epochs of four batches those of one network.
    steps = {"whole": 6, "chosen": 6, "sandwich": 8, "boosted": 6, "channel_gated": 6}
    for name, count in steps.items():
        assert training.read_metrics(workdir / name / "seed0" / "metrics.jsonl")[-1]["step"] == count
    found = {row["name"].replace(" ", "_"): row["steps"] for row in summary["networks"]}
    assert found == {**steps, "untrained": 0}


@pytest.mark.slow
def test_multiply_accumulates_are_those_that_the_gates_leave(finished):
    _, summary = finished
    macs = {row["name"]: row["macs"] for row in summary["networks"]}
    # 3x3 convolutions 1-4 on 8x8, 4-8 and 8-8 on 4x4, and a dense layer 8-10.
    first, second, third, head = 64 * 9 * 4, 16 * 9 * 32, 16 * 9 * 64, 80
    assert macs["whole"] == first + second + third + head
    assert macs["sandwich"] == first + round(0.375 * second) + round(0.375 * third) + head
    assert macs["untrained"] == first + second // 2 + third // 4 + head
    assert macs["chosen"] <= 0.6 * macs["whole"]
    # Half of what every layer gives is left out, and half of what those read that have a gate.
    assert macs["boosted"] == first // 2 + second // 4 + third // 4 + head
    # Half of the channels decide where the others are needed; the first layer has one channel.
    opened = summary["pruned"]["channel_gated"]["open"]
    assert set(opened) == {"conv2", "conv3"} and all(0 < share < 1 for share in opened.values())
    shares = [(1 + opened[name]) / 2 for name in ("conv2", "conv3")]
    assert macs["channel gated"] == first + round(second * shares[0]) + round(third * shares[1]) + head
    ratios = np.array(summary["pruned"]["chosen"]["ratios"])
    assert ratios.shape == (2, 2) and not ratios[:, 1].any() and ratios[:, 0].any()


@pytest.mark.slow
def test_steps_of_a_cascade_alone_are_as_accurate_as_the_networks(finished):
    _, summary = finished
    accuracy = {row["name"]: row["accuracy"] for row in summary["networks"]}
    exits = summary["cascade"]
    first, second, *thresholds = exits["points"]
    assert exits["steps"] == ["untrained", "whole"] and len(thresholds) > 2
    assert (first["name"], second["name"]) == ("step 1 alone", "step 2 alone")
    np.testing.assert_allclose(first["accuracy"], accuracy["untrained"], atol=1e-6)
    np.testing.assert_allclose(second["accuracy"], accuracy["whole"], atol=1e-6)
    for point in thresholds:
        np.testing.assert_allclose(sum(point["left"]), 1)


@pytest.mark.slow
def test_what_trains_starts_from_its_source_and_a_run_goes_on_where_it_stopped(finished, capsys, monkeypatch):
    workdir, summary = finished
    timed = {"latency_ms", "train_seconds"}
    monkeypatch.setattr(pruning, "chosen", lambda *args: pytest.fail("ratios are those that the run began with"))
    again = train.run(tiny().lock(), str(workdir))
    for before, after in zip(summary["networks"], again["networks"], strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {k: v for k, v in after.items() if k not in timed}
    assert again["pruned"]["chosen"]["ratios"] == summary["pruned"]["chosen"]["ratios"]
    assert "drops (channels, columns) of its blocks" in capsys.readouterr().out


@pytest.mark.data
@pytest.mark.slow
def test_the_experiment_has_a_smoke_form_that_runs(tmp_path):
    summary = train.run(fashion_mnist_vgg.get_config("smoke").lock(), str(tmp_path))
    dense, pruned = summary["networks"]
    assert pruned["macs"] <= 0.5 * dense["macs"]


@pytest.mark.parametrize(
    ("experiment", "arguments", "image"),
    [
        (accuracy, ("fashion_mnist", "smoke"), (28, 28, 1)),
        (accuracy, ("cifar10",), (32, 32, 3)),
        (one_for_all, ("", "smoke"), (28, 28, 1)),
        (cascade, ("", "smoke"), (28, 28, 1)),
        (learned_experiment, ("", "smoke"), (28, 28, 1)),
    ],
)
def test_the_networks_of_the_other_experiments_can_be_made(experiment, arguments, image):
    info = data.DatasetInfo(task="classification", num_classes=10)
    images = data.Dataset("images", "train", {"image": np.zeros((2, *image), np.uint8)}, info)
    for argument in arguments:
        sections = experiment.get_config(argument).lock().networks.to_dict()
        asked = {name: section.get("gates") for name, section in sections.items()}
        modules = {name: pruning.network(section, images) for name, section in sections.items()}
        assert pruning.sources_first(asked, modules)
        for name in asked:
            for call in dynamic.gated_calls(modules[name], np.zeros((1, *image), np.float32)) if asked[name] else ():
                call.settings.groups_kept(call.x.shape[-1])


def test_channel_gating_beside_a_gate_is_refused_before_anything_is_trained():
    digits, section = data.load("digits", "train[:8]"), network("vgg", plan=PLAN)
    section.learned, section.gates = learned("channel_gated"), gates(0.5)
    with pytest.raises(ValueError, match="has a gate on its input already; channel gating takes none"):
        pruning.network(section, digits)


def test_engines_for_training_are_those_of_the_network_as_it_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path))
    digits, section = data.load("digits", "train[:8]"), network("vgg", plan=PLAN)
    section.learned, section.gates = learned("boosted", channels=0.5), gates(0.5, increment=0.4)
    module = pruning.network(section, digits)
    measured = {}
    monkeypatch.setattr(
        autotune, "fastest", lambda forms, *rest, **options: measured.setdefault("channels", "channels")
    )
    pruning.tune(module, section.gates, {"batch_size": 4}, 1000)
    images = np.zeros((4, 8, 8, 1), np.float32)
    calls = dynamic.gated_calls(module, images, options={"train": True})
    assert len(calls) == 2 and measured
    assert all(call.features is None and autotune.lookup(call.signature) == "channels" for call in calls)


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (learned("gumbel"), {}, "learned: method must be one of 'boosted', 'channel_gated', got 'gumbel'"),
        (learned("boosted", base=0.5), {}, "learned, method 'boosted': unknown field base; valid fields: method, chan"),
        (learned("boosted"), {"kind": "t4"}, "first-order layers with their own backward, got {'kind': 't4'}"),
        (learned("channel_gated"), {"save": "x"}, "first-order layers .* got {'save': 'x'}"),
        (learned("boosted", channels=1.0), {}, "channels is the share that is dropped"),
    ],
)
def test_gates_that_learn_say_what_is_wrong_with_them(asked, changes, message):
    digits, section = data.load("digits", "train[:8]"), network("vgg", plan=PLAN, **changes)
    section.learned = asked
    with pytest.raises(ValueError, match=message):
        pruning.network(section, digits)
    with pytest.raises(ValueError, match="learned: only launch.train prunes"):
        classifier.network(section, digits)


def test_dense_networks_are_left_as_they_are():
    digits = data.load("digits", "train[:8]")
    section = network("vgg", plan=PLAN)
    plain = pruning.network(section, digits)
    section.gates = gates(0.5)
    assert pruning.dense(pruning.network(section, digits)).architecture == plain.architecture
    assert [list(row) for row in pruning.ratios(pruning.network(section, digits))] == [[0.5, 0.0]] * 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (gates(0.5, ratio=1), "unknown field ratio"),
        (gates(0.5, rule="climb"), "rule must be one of 'ascent', 'sandwich', 'none', got 'climb'"),
        (gates(0.5, climb=0.0), "climb is a share of the steps"),
        (gates(0.5, epochs=0), "epochs must be at least 1, of a network that is trained, got 0 with rule 'ascent'"),
        (gates(0.5, epochs=2, rule="none", source="wide"), "epochs must be at least 1, .* got 2 with rule 'none'"),
        (gates(None, source="whole", sensitivity_split="train"), "give one budget where a ratio is None"),
        (gates(0.5, macs=0.5), "give one budget where a ratio is None"),
        (gates(None, macs=0.5, source="whole"), "sensitivity_split must name images"),
        (gates(None, macs=0.5, sensitivity_split="train"), "no source is named"),
        (gates(None, 0.5, macs=0.5, sensitivity_split="train", source="whole"), "let the other be None or 0"),
        (gates(0.5, rule="none"), "no source is named"),
        (gates(0.5, rule="none", source="wide", snap=True), "snap lowers ratios that are given"),
        (gates((0.5, 0.5, 0.5)), "channels has 3 entries, but the network has 2 blocks"),
        (gates(1.5), "channels is the share that is dropped"),
        (gates(0.5, group_size=3), "group_size=3 does not divide"),
        (gates(0.5, increment=0.01), r"climb in 40 steps from 0.1 by 0.01, but there are only 3"),
        (gates(0.5, calibrate=5), "calibrate=5 batches of 16, but there are 64 images"),
        (gates(0.5, source="other"), "a source must be another network of"),
        (gates(0.5, source="sandwich"), "a source must be another network of"),
        (gates(0.5, source="wide"), "its source 'wide' has parameters of other shapes"),
    ],
)
def test_configs_fail_before_anything_is_written(tmp_path, asked, message):
    sections = {"wide": network("vgg", plan=(8, "M", 8, 8)), "sandwich": network("vgg", plan=PLAN)}
    sections["sandwich"].gates = asked
    with pytest.raises(ValueError, match=message):
        train.run(tiny(networks=sections, cascade=()).lock(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [("whole",), ("whole", "whole"), ("whole", "small")])
def test_cascades_name_networks_of_the_experiment(tmp_path, names):
    with pytest.raises(ValueError, match="must name two or more different networks, from cheap to dear, out of"):
        train.run(tiny(cascade=names).lock(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_jobs_say_that_they_take_no_gates(tmp_path):
    from configs.quadratic import convert_vgg
    from launch import convert

    config = convert_vgg.get_config("smoke")
    config.dataset, config.train_split, config.score_split = "digits", "train[:64]", "train[64:104]"
    config.network.gates = gates(0.5)
    with pytest.raises(ValueError, match="gates: only launch.train prunes"):
        convert.run(config.lock(), str(tmp_path / "run"))


def test_rankings_and_blocks_reach_the_gates():
    digits = data.load("digits", "train[:8]")
    section = network("vgg", plan=PLAN)
    section.gates = gates((0.5, 0.25), group_size=(2, 4), ranking="inverse", engine="mask")
    module = pruning.network(section, digits)
    found = {c.path: c.settings for c in dynamic.gated_calls(module, np.zeros((1, 8, 8, 1), np.float32))}
    assert found["conv2/layer"] == dynamic.DynamicSpec(0.5, group_size=2, ranking="inverse", engine="mask")
    assert found["conv3/layer"] == dynamic.DynamicSpec(0.25, group_size=4, ranking="inverse", engine="mask")


def test_snapped_ratios_are_the_lowest_that_cost_no_layer_of_a_block_time(monkeypatch):
    digits = data.load("digits", "train[:8]")
    section = network("vgg", plan=(8, 8, "M", 8, 8))
    section.gates = gates(0.75, snap=True)
    module = pruning.network(section, digits)
    # Half of the channels of the block's first layer take no longer than a quarter of them, of its second all.
    seconds = iter([[1.0, 1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
    monkeypatch.setattr(
        "jaxeff.dynamic.budget._layer_seconds", lambda call, pairs, *_: (next(seconds)[: len(pairs)], 1.0)
    )
    table = pruning.snapped(module, 4)
    assert table == [[0.5, 0.0], [0.75, 0.0]]
    assert pruning.ratios(pruning.with_ratios(module, table)).tolist() == table


def test_long_runs_measure_engines_once_and_short_ones_do_not(monkeypatch):
    digits, tuned, known = data.load("digits", "train[:8]"), [], []
    section = network("vgg", plan=PLAN)
    section.gates = gates(0.5, increment=0.4)
    module, config = pruning.network(section, digits), {"batch_size": 4}
    watched = lambda module, x, options, train: tuned.append((x.shape, options, train))
    monkeypatch.setattr(pruning.dynamic, "tune", watched)
    monkeypatch.setattr(pruning.autotune, "lookup", lambda name: "mask" if known else None)
    asked = section.gates.to_dict()
    pruning.tune(module, asked, config, 300)
    assert not tuned  # the ratios are reached at step 150, so only 150 are left
    pruning.tune(module, asked, config, 400)
    assert tuned == [((4, 8, 8, 1), {"train": True}, True)]
    known.append(True)
    pruning.tune(module, asked, config, 400)
    pruning.tune(module, {**asked, "rule": "sandwich"}, config, 400)
    pruning.tune(module, {**asked, "engine": "mask"}, config, 400)
    assert len(tuned) == 1
