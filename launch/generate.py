"""Trains the generative adversarial networks of a config one after the other and shows them side by side.

    python -m launch.generate --config=configs/quadratic/sngan_fashion.py --workdir=runs/sngan [--config.steps=5000]

First a classifier is trained, on whose features the Frechet distance between generated and test images is measured;
the distance of as many training images is the least that a generator can hope for. Writes config.json, summary.json
and figures/ to the work directory, and for the classifier and every network a folder with metrics.jsonl and
checkpoints/. Started again with the same work directory it goes on where it stopped. It runs on one device.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxeff import data, training
from jaxeff.training import figure
from jaxeff.training.workdir import FIGURES, plain_config
from launch import classifier, gan, job

PANELS = (
    (gan.DISTANCE, "Fréchet distance"),
    ("train/loss", "discriminator loss"),
    ("train/generator_loss", "generator loss"),
)


def run(config: Mapping[str, Any], workdir: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Trains and compares the networks of a config; returns what it writes to summary.json."""
    # ---- data, networks and methods: everything that can be wrong is found before anything is written ----------------
    gan.check_config(config)
    train = data.load(config["dataset"], config["train_split"])
    test = data.load(config["dataset"], config["test_split"])
    classifier.check_task(train)
    rows, columns = config["sheet"]
    for name, images, needed in (("samples", train, config["samples"]), ("sheet", test, rows * columns)):
        if needed > len(images):
            raise ValueError(f"{name} asks for {needed} images, but {images.name!r} has {len(images)} in this split")
    source = data.Batches(train.arrays, gan.images_per_step(config), seed=config["seed"])
    gans = {name: gan.build(section, config, train) for name, section in config["networks"].items()}
    judge = classifier.network(config[gan.CLASSIFIER]["network"], train)
    gan.check_start(gan.classifier_method(judge, config, train), train)
    directory, _ = training.prepare_workdir(workdir, plain_config(config), overwrite, [gan.CLASSIFIER, *gans])

    # ---- the classifier and its features -----------------------------------------------------------------------------
    features, accuracy = gan.feature_extractor(judge, config, train, test, directory / gan.CLASSIFIER)
    real = training.feature_moments(features(test.arrays["image"]))
    some = np.sort(np.random.default_rng(config["seed"]).permutation(len(train))[: config["samples"]])
    floor = training.frechet_distance(training.feature_moments(features(train.arrays["image"][some])), real)

    # ---- training ----------------------------------------------------------------------------------------------------
    latents = jax.random.normal(jax.random.key(config["seed"] + 1), (config["samples"], config["latent"]))
    histories, sheets, table = {}, {"test images": test.arrays["image"][: rows * columns]}, []
    for name, (generator, discriminator, method) in gans.items():
        print(
            f"{name}: {config['steps']} steps of {config['batch_size']} on {len(train)} images of {config['dataset']}"
        )
        draw = gan.sampler(generator)

        def distance(state: training.AdversarialState, draw=draw) -> float:
            return training.frechet_distance(training.feature_moments(features(draw(state, latents))), real)

        state, history = gan.fit(method, source, config, name, directory / name, distance)
        title = name.replace("_", " ")
        histories[title], sheets[title] = history, draw(state, latents[: rows * columns])
        table.append(
            {
                "name": title,
                "frechet": [row[gan.DISTANCE] for row in history if gan.DISTANCE in row][-1],
                **gan.sizes("generator", generator),
                **gan.sizes("discriminator", discriminator),
                "train_seconds": job.seconds(
                    [training.FitResult(state, config["steps"], history, {})],
                    config["steps"] * gan.images_per_step(config),
                ),
            }
        )

    # ---- comparison --------------------------------------------------------------------------------------------------
    summary = {
        "dataset": {"name": train.name, "source": train.info.source, "train": len(train), "test": len(test)},
        "steps": config["steps"],
        "classifier_accuracy": accuracy,
        "frechet_of_training_images": floor,
        "networks": table,
    }
    curves = [
        {name: [(r["step"], r[key]) for r in history if key in r] for name, history in histories.items()}
        for key, _ in PANELS
    ]
    captions = {row["name"]: f"Fréchet distance {row['frechet']:.2f}" for row in table}
    captions["test images"] = f"Fréchet distance of as many training images {floor:.2f}"
    figures = directory / FIGURES
    figure.draw_curves(curves, PANELS, figures / "curves.png")
    figure.draw_sheets(sheets, columns, figures / "samples.png", captions)
    training.write_summary(directory, summary)
    job.show(gan.comparison(table, floor, title=f"{train.name}, {config['steps']} steps"))
    print(f"figures: {figures / 'samples.png'}, {figures / 'curves.png'}")
    return summary


if __name__ == "__main__":
    job.main(run, __doc__)
