"""The generation job: what a run leaves behind, going on, and configs that fail before anything is written."""

import json

import pytest

from configs.quadratic import sngan_fashion
from jaxeff import training
from launch import generate


def tiny():
    config = sngan_fashion.get_config("smoke")
    config.dataset, config.train_split, config.test_split = "digits", "train[:64]", "test[:40]"
    config.steps, config.batch_size, config.samples, config.sheet, config.latent = 4, 8, 40, (2, 3), 5
    config.discriminator_steps = 2
    first_order, quadratic = config.networks.first_order, config.networks.quadratic_rms
    config.networks = {"first_order": first_order, "quadratic": quadratic}
    for section in (first_order, quadratic):
        section.update({"generator": (4, 3), "discriminator": (3, 2)})
    config.classifier.network.options.plan = (2, "M", 3)
    config.classifier.batch_size = 32
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, generate.run(tiny().lock(), str(workdir))


@pytest.mark.slow
def test_a_run_leaves_everything_that_it_promises(finished):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name in ("first_order", "quadratic"):
        rows = training.read_metrics(workdir / name / "metrics.jsonl")
        assert [row["step"] for row in rows if "eval/frechet" in row] == [2, 4]
        assert rows[-1]["eval/frechet"] == next(
            row["frechet"] for row in summary["networks"] if row["name"] == name.replace("_", " ")
        )
    for figure in ("curves.png", "samples.png"):
        assert (workdir / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    first, quadratic = summary["networks"]
    # Dense 5 -> 4*4*4; 3x3 4 -> 3 with a norm; 3x3 3 -> 1. Quadratic: three kernels, each with a norm of its own.
    assert first["generator_params"] == 6 * 64 + 9 * 12 + 6 + 9 * 3 + 1
    assert quadratic["generator_params"] == first["generator_params"] + 2 * 9 * 12 + 3 * 6
    assert summary["frechet_of_training_images"] > 0


@pytest.mark.slow
def test_a_finished_run_started_again_gives_the_same_summary(finished):
    workdir, summary = finished
    again = generate.run(tiny().lock(), str(workdir))
    for old, new in zip(summary["networks"], again["networks"], strict=True):
        assert {**old, "train_seconds": 0} == {**new, "train_seconds": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.networks.quadratic.update(generator_kind="t9"), "unknown kind 't9'"),
        (lambda c: c.networks.quadratic.update(discriminator_norm="spectral"), "norm must be .*'spectral'"),
        (lambda c: c.networks.quadratic.update(generator=(4, 3, 2, 1, 1)), "divide by 16"),
        (lambda c: c.networks.update({"classifier": c.networks.quadratic}), "none of them called 'classifier'"),
        (lambda c: c.update(sample=3), "unknown field sample; valid fields: .*samples"),
        (lambda c: c.classifier.update(lr=3), "classifier: unknown field lr"),
        (lambda c: c.update(samples=1000), "samples asks for 1000 images, but 'digits.*' has 64"),
        (lambda c: c.update(sheet=(50, 1), samples=64), "sheet asks for 50 images"),
        (lambda c: c.update(evaluations=9), "evaluations=9 is more than steps=4"),
        (lambda c: c.update(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda c: c.update(samples=5), r"sheet=\(2, 3\) shows more images than samples=5"),
        (lambda c: c.__delitem__("classifier"), "missing field classifier"),
        (lambda c: c.classifier.update(epochs=0), "classifier.epochs must be at least 1, got 0"),
        (lambda c: c.networks.first_order.update(discriminator_norm="rms"), "'rms' is a norm of .* a quadratic"),
        (lambda c: c.networks.quadratic.update(generator_kind="emitting(rank=1)"), "do not divide 3 features"),
        (lambda c: c.networks.quadratic.update(discriminator_kind="emitting(rank=1)"), "do not divide 3 features"),
        (lambda c: c.generator_optimizer.update(name="adams"), "adam"),
    ],
    ids=[
        "kind", "norm", "widths", "name", "unknown field", "classifier field", "samples", "sheet", "evaluations",
        "batch", "few samples", "classifier", "classifier epochs", "norm of first order", "generator's kind",
        "discriminator's kind", "optimizer",
    ],
)  # fmt: skip
def test_bad_configs_fail_before_anything_is_written(tmp_path, change, message):
    config = tiny()
    with config.unlocked():
        change(config)
    with pytest.raises(ValueError, match=message):
        generate.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
