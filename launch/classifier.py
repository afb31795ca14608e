"""From sections of a config to the parts of a classification run: network, augmentation, method, costs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.classification import base
from configs.classification import network as base_network
from jaxeff import costs, data, models, quadratic, spec, training
from jaxeff.quadratic import backward

DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
AUGMENTATIONS = ("crop", "flip", "cutout", "mixup")


def network(section: Mapping[str, Any], dataset: data.Dataset, dtype: str = "float32") -> models.Network:
    """Builds the network that a section of a config describes, for the images and classes of a data set.

    Args:
      section: {"model": name, "options": {...}, "kind": name, "branch_norm": name or None, "select": glob or None,
        "save": memory policy, "initialization": "kaiming" or "relinear"}; "gates" and "learned" are for
        `launch.pruning`.
      dataset: gives the input shape and the number of classes.
      dtype: "float32" or "bfloat16", what the network computes in; parameters are float32.

    Returns:
      The Linen module.

    Raises:
      ValueError: for an unknown field, model, kind or dtype, listing the valid ones.
    """
    check_fields("network", section, tuple(base_network("cnn")))
    for name in ("gates", "learned"):
        if section.get(name) is not None:
            raise ValueError(f"{name}: only launch.train prunes; leave it out here")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    quadratic.get(section.get("kind", "first_order"))
    architecture = models.architecture(
        section["model"],
        num_classes=dataset.info.num_classes,
        input_shape=dataset.arrays["image"].shape[1:],
        **section.get("options", {}),
    )
    if section.get("kind", "first_order") != "first_order":
        architecture = spec.quadratize(
            architecture, section["kind"], section.get("select"), branch_norm=section.get("branch_norm")
        )
    policy: dict[str, Any] = {"save": section.get("save", "all")}
    backward.check_save(policy["save"])
    conv = functools.partial(quadratic.conv_layer, **policy, initialization=section.get("initialization", "kaiming"))
    dense = functools.partial(quadratic.dense_layer, **policy, initialization=section.get("initialization", "kaiming"))
    return models.Network(architecture, conv=conv, dense=dense, dtype=DTYPES[dtype])


def method(
    module: models.Network,
    config: Mapping[str, Any],
    dataset: data.Dataset,
    steps: int,
    functions: training.ModelFunctions | None = None,
    penalty: Callable[[Any, Any], jax.Array] | None = None,
) -> training.Method:
    """Builds the classification method of a config: optimiser, restraint, label smoothing, average, augmentation.

    `functions` are those of the module where something else than its own are trained; `penalty` (params, model_state)
    is added to the loss.
    """
    return training.classification(
        *(functions or training.from_linen(module)),
        optimizer(module, config, steps),
        num_classes=dataset.info.num_classes,
        penalty=penalty,
        label_smoothing=config["label_smoothing"],
        ema_decay=config["ema_decay"],
        augment=augmentation(config["augment"]),
        preprocess=standardisation(dataset),
    )


def standardisation(dataset: data.Dataset) -> Callable[[Any], jax.Array]:
    """How networks see images: standardised by the channel statistics of a data set."""
    mean, deviation = data.channel_statistics(dataset.arrays["image"])
    return lambda images: data.standardise(images, mean, deviation)


def optimizer(module: models.Network, config: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """Builds the optimiser of a config, with its restraint of quadratic parameters where that changes anything."""
    tx = training.optimizer_from(config["optimizer"], steps)
    restraint = dict(config.get("restrain", {}))
    check_fields("restrain", restraint, ("gamma", "shrink"))
    if all(factor == 1 for factor in restraint.values()):
        return tx
    images = jnp.zeros((1, *module.architecture.input_shape))
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    labels = quadratic.parameter_groups(params, module.architecture)
    return optax.chain(tx, quadratic.restrain(labels, **restraint))


def starting_from(variables: Mapping[str, Any], method: training.Method) -> training.Method:
    """A method whose state starts with these variables; collections that they lack stay as they are."""

    def init(key, batch):
        state = method.init(key, batch)
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        average = None if state.ema is None else variables["params"]
        return state._replace(params=variables["params"], model_state={**state.model_state, **rest}, ema=average)

    return method._replace(init=init)


def variables_of(state: training.TrainState) -> dict[str, Any]:
    """The variables to evaluate."""
    return {"params": state.evaluation_params, **state.model_state}


def batch_of(dataset: data.Dataset) -> dict[str, np.ndarray]:
    """Two examples, for their shapes."""
    return {name: array[:2] for name, array in dataset.arrays.items()}


def tested(
    module: nn.Module,
    variables: Mapping[str, Any],
    dataset: data.Dataset,
    preprocess: Callable[[Any], jax.Array],
    batch_size: int,
) -> float:
    """Accuracy of a network on a data set."""
    apply = jax.jit(module.apply)
    right = 0
    for batch in data.padded_batches(dataset.arrays, batch_size):
        logits = np.asarray(apply(variables, preprocess(batch["image"])))
        right += int(((logits.argmax(-1) == batch["label"]) & (batch["mask"] > 0)).sum())
    return right / len(dataset)


def augmentation(section: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Builds (key, images, targets) -> (images, targets) from {"crop": pixels, "flip": bool, "cutout", "mixup"}.

    Fields that are absent, 0 or False are off; with all of them off the result is None.

    Raises:
      ValueError: for an unknown field, listing the valid ones.
    """
    check_fields("augment", section, AUGMENTATIONS)
    wanted = {name: section[name] for name in AUGMENTATIONS if section.get(name)}
    if not wanted:
        return None

    def augment(key, images, targets):
        crop_key, flip_key, cutout_key, mixup_key = jax.random.split(key, 4)
        if "crop" in wanted:
            images = data.random_crop(crop_key, images, padding=wanted["crop"])
        if "flip" in wanted:
            images = data.random_flip(flip_key, images)
        if "cutout" in wanted:
            images = data.cutout(cutout_key, images, size=wanted["cutout"])
        if "mixup" in wanted:
            images, targets = data.mixup(mixup_key, images, targets, alpha=wanted["mixup"])
        return images, targets

    return augment


def check_config(config: Mapping[str, Any], devices: int) -> None:
    """Finds what is wrong with a config before a run writes anything.

    Raises:
      ValueError: for unknown or missing fields, listing the valid ones; counts out of range; no networks or seeds; a
        batch that does not divide by the devices.
    """
    valid = tuple(base("digits"))
    check_fields("config", config, valid)
    if missing := sorted(set(valid) - set(config)):
        raise ValueError(f"config: missing field {', '.join(missing)}; start from configs.classification.base")
    for name in ("batch_size", "eval_batch_size", "latency_batch", "log_every", "keep"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    for name in ("epochs", "steps", "eval_every", "checkpoint_every"):
        if config[name] < 0:
            raise ValueError(f"{name} must not be negative (0 is its default), got {config[name]}")
    if not config["epochs"] and not config["steps"]:
        raise ValueError("epochs and steps are both 0, so there is nothing to train; set one of them")
    for name in ("networks", "seeds"):
        if not len(config[name]):
            raise ValueError(f"{name} is empty; name at least one")
    if config["batch_size"] % devices:
        raise ValueError(
            f"batch_size={config['batch_size']} does not divide by the {devices} devices; take a multiple of {devices}"
        )


def check_task(dataset: data.Dataset) -> None:
    """Raises ValueError if a data set is not one of images with classes."""
    if dataset.info.task != "classification":
        usable = "cifar10, cifar100, digits, fashion_mnist, kmnist, mnist, usps"
        raise ValueError(
            f"dataset {dataset.name!r} is for {dataset.info.task}; this job trains classifiers, for example on {usable}"
        )


def costs_of(module: nn.Module, shape: tuple[int, ...]) -> costs.CostReport:
    """Counts MACs, parameters and bytes of the network for one image, as it is trained."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(images.shape)))
    rest = {name: value for name, value in variables.items() if name != "params"}

    def train_forward(params, rest, images):
        return module.apply({"params": params, **rest}, images, True, mutable=list(rest))[0]

    return costs.analyze(train_forward, variables["params"], rest, images)


def check_fields(what: str, section: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises ValueError, listing the valid fields, if a section has others."""
    if unknown := sorted(set(section) - set(known)):
        raise ValueError(f"{what}: unknown field {', '.join(unknown)}; valid fields: {', '.join(known)}")
