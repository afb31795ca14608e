"""From sections of a config to the parts of a generation run: networks, method, features, training with distances."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.generation import base
from configs.generation import gan as gan_section
from jaxeff import data, models, quadratic, spec, training
from jaxeff.ops.norms import checked_norm
from jaxeff.training.workdir import CHECKPOINTS, plain_config
from launch import classifier

CLASSIFIER = "classifier"
DISTANCE = "eval/frechet"


class Gan(NamedTuple):
    """The networks of one entry of a config, and the method that trains them."""

    generator: models.Network
    discriminator: models.Network
    method: training.Method


def check_config(config: Mapping[str, Any]) -> None:
    """Finds what is wrong with a config before a run writes anything.

    Raises:
      ValueError: for unknown or missing fields, listing the valid ones, counts out of range, or no networks.
    """
    valid = base("fashion_mnist")
    sections = {"config": (config, valid), CLASSIFIER: (config.get(CLASSIFIER, {}), valid[CLASSIFIER])}
    for what, (section, known) in sections.items():
        classifier.check_fields(what, section, tuple(known))
        if missing := sorted(set(known) - set(section)):
            raise ValueError(f"{what}: missing field {', '.join(missing)}; start from configs.generation.base")
    for name in ("batch_size", "steps", "evaluations", "log_every", "discriminator_steps"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    for name in ("epochs", "batch_size"):
        if config[CLASSIFIER][name] < 1:
            raise ValueError(f"{CLASSIFIER}.{name} must be at least 1, got {config[CLASSIFIER][name]}")
    if config["evaluations"] > config["steps"]:
        raise ValueError(f"evaluations={config['evaluations']} is more than steps={config['steps']}; take fewer")
    if config["samples"] < 2:
        raise ValueError(f"samples must be at least 2, for a covariance, got {config['samples']}")
    if len(config["sheet"]) != 2 or min(config["sheet"]) < 1:
        raise ValueError(f"sheet must be (rows, columns) of at least 1, got {tuple(config['sheet'])}")
    if config["samples"] < config["sheet"][0] * config["sheet"][1]:
        raise ValueError(
            f"sheet={tuple(config['sheet'])} shows more images than samples={config['samples']}; take fewer"
        )
    if not len(config["networks"]) or CLASSIFIER in config["networks"]:
        raise ValueError(f"networks: expected at least one, none of them called {CLASSIFIER!r}")


def build(section: Mapping[str, Any], config: Mapping[str, Any], dataset: data.Dataset) -> Gan:
    """Builds generator, discriminator and method of a section that `configs.generation.gan` made.

    Quadratic generators have a batch norm on every projection.

    Raises:
      ValueError: for an unknown field, kind or norm, a norm without a quadratic discriminator, or widths that do not
        fit the images or the kind.
    """
    classifier.check_fields("network", section, tuple(gan_section((1, 1), (1,))))
    shape = dataset.arrays["image"].shape[1:]
    generator = models.sngan_generator(section["generator"], latent=config["latent"], output_shape=shape)
    discriminator = models.sngan_discriminator(section["discriminator"], input_shape=shape)
    for role in ("generator", "discriminator"):
        quadratic.get(section[f"{role}_kind"])
    if checked_norm(section["discriminator_norm"]) is not None and section["discriminator_kind"] == "first_order":
        raise ValueError(
            f"discriminator_norm={section['discriminator_norm']!r} is a norm of the projections of a quadratic "
            "discriminator; set discriminator_kind or take it away"
        )
    if section["generator_kind"] != "first_order":
        generator = spec.quadratize(generator, section["generator_kind"], branch_norm="batch")
    if section["discriminator_kind"] != "first_order":
        discriminator = spec.quadratize(
            discriminator, section["discriminator_kind"], branch_norm=section["discriminator_norm"]
        )
    made, judging = (
        models.Network(net, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
        for net in (generator, discriminator)
    )
    method = training.adversarial(
        training.from_linen(made),
        training.from_linen(judging),
        training.optimizer_from(config["generator_optimizer"], config["steps"]),
        training.optimizer_from(config["discriminator_optimizer"], config["steps"] * config["discriminator_steps"]),
        latent=config["latent"],
        discriminator_steps=config["discriminator_steps"],
        ema_decay=config["ema_decay"],
    )
    check_start(method, dataset)
    return Gan(made, judging, method)


def check_start(method: training.Method, dataset: data.Dataset) -> None:
    """Raises the error with which a method would refuse to start, without computing anything."""
    jax.eval_shape(method.init, jax.random.key(0), {name: array[:2] for name, array in dataset.arrays.items()})


def classifier_method(network: models.Network, config: Mapping[str, Any], train: data.Dataset) -> training.Method:
    """The method that trains the classifier."""
    return classifier.method(network, config[CLASSIFIER], train, classifier_steps(config, train))


def classifier_steps(config: Mapping[str, Any], train: data.Dataset) -> int:
    """Steps for which the classifier is trained."""
    section = config[CLASSIFIER]
    return section["epochs"] * data.Batches(train.arrays, section["batch_size"], seed=config["seed"]).steps_per_epoch


def feature_extractor(
    network: models.Network, config: Mapping[str, Any], train: data.Dataset, test: data.Dataset, folder: pathlib.Path
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Trains the classifier, or finds it trained; returns uint8 images -> features and its test accuracy."""
    section = config[CLASSIFIER]
    source = data.Batches(train.arrays, section["batch_size"], seed=config["seed"])
    steps = classifier_steps(config, train)
    print(f"{CLASSIFIER}: {steps} steps of {section['batch_size']} on {len(train)} images of {config['dataset']}")
    result = training.fit(
        classifier_method(network, config, train),
        lambda start: data.prefetch(source.starting_at(start)),
        steps=steps,
        key=jax.random.key(config["seed"]),
        workdir=folder,
        evaluate_on=lambda: data.padded_batches(test.arrays, 250),
        log_every=config["log_every"],
        keep=1,
        config={**plain_config(section), "seed": config["seed"]},
    )
    preprocess, variables = classifier.standardisation(train), classifier.variables_of(result.state)

    def features(images: np.ndarray) -> np.ndarray:
        return training.features(network, variables, images, preprocess=preprocess)

    return features, result.evaluation["accuracy"]


def fit(
    method: training.Method,
    source: data.Batches,
    config: Mapping[str, Any],
    name: str,
    folder: pathlib.Path,
    distance: Callable[[training.AdversarialState], float],
) -> tuple[training.AdversarialState, list[dict[str, Any]]]:
    """Trains in `evaluations` parts with a Frechet distance after each; returns the last state and all metrics."""
    parts = config["evaluations"]
    with training.Checkpoints(folder / CHECKPOINTS) as checkpoints:
        start = checkpoints.latest() or 0
    for stop in (config["steps"] * part // parts for part in range(1, parts + 1)):
        if stop < start:
            continue
        result = training.fit(
            method,
            lambda start: data.prefetch(source.starting_at(start)),
            steps=stop,
            key=jax.random.key(config["seed"]),
            workdir=folder,
            log_every=config["log_every"],
            keep=1,
            config={**plain_config(config), "network": name},
        )
        history = result.history
        if not any(DISTANCE in row for row in history if row["step"] == stop):
            with training.MetricsWriter(folder, resume_from=stop) as writer:
                history.append(writer.write(stop, {DISTANCE: distance(result.state)}))
    return result.state, history


def sampler(generator: models.Network) -> Callable[[training.AdversarialState, jax.Array], np.ndarray]:
    """Returns (state, latents [N, latent]) -> uint8 images [N, H, W, C]."""
    functions = training.from_linen(generator)

    @jax.jit
    def draw(state: training.AdversarialState, latents: jax.Array) -> jax.Array:
        return (127.5 * (training.generated(functions, state, latents) + 1)).round().astype("uint8")

    def batched(state: training.AdversarialState, latents: jax.Array) -> np.ndarray:
        parts = [draw(state, latents[i : i + 500]) for i in range(0, len(latents), 500)]
        return np.concatenate(jax.device_get(parts))

    return batched


def sizes(role: str, network: models.Network) -> dict[str, int]:
    """Parameters and MACs per image of a network."""
    total = classifier.costs_of(network, network.architecture.input_shape).total
    return {f"{role}_params": total.params, f"{role}_macs": total.macs}


def images_per_step(config: Mapping[str, Any]) -> int:
    """Real images per step."""
    return config["batch_size"] * config["discriminator_steps"]


def comparison(rows: list[dict[str, Any]], floor: float, title: str) -> Any:
    """The networks side by side as a rich table, with the training images' distance as the last row."""
    from rich import box, table

    result = table.Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    result.add_column("network", no_wrap=True)
    for heading in ("Fréchet distance", "parameters of G", "MACs of G", "parameters of D", "MACs of D", "train"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        counts = (row[f"{role}_{count}"] for role in ("generator", "discriminator") for count in ("params", "macs"))
        seconds = "-" if row["train_seconds"] is None else f"{row['train_seconds']:,.1f} s"
        result.add_row(row["name"], f"{row['frechet']:.2f}", *(f"{count:,}" for count in counts), seconds)
    result.add_row("training images", f"{floor:.2f}", *("-",) * 5)
    return result
