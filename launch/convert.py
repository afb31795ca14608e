"""Converts a trained first-order network to a smaller quadratic one, and reports every step.

    python -m launch.convert --config=configs/quadratic/convert_vgg.py --workdir=runs/convert [--config.source=DIR]

For every seed: trains the first-order network or takes it from a work directory of launch.train; makes it quadratic
with the same outputs and trains that a little; scores its layers; takes out what costs much and is worth little until
the budget is met; and trains what is left. Beside it the source is trained on for as long, under the same memory
policy. Writes config.json, summary.json and figures/ to the work directory, and for every training a folder with
metrics.jsonl and checkpoints/. Started again with the same work directory it goes on where it stopped. It runs
on one device.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.conversion import base
from jaxeff import costs, data, models, quadratic, spec, training
from jaxeff.quadratic import convert
from jaxeff.training.workdir import CHECKPOINTS, CONFIG, FIGURES, plain_config
from launch import classifier, job

SOURCE, CONTINUED, QUADRATIC, REDUCED = STAGES = ("source", "continued", "quadratic", "reduced")


class Data(NamedTuple):
    """Images to train on, to score layers on and to test on, and how networks see them: standardised by the first."""

    train: data.Dataset
    score: data.Dataset
    test: data.Dataset
    preprocess: Callable[[Any], jax.Array]


class Trained(NamedTuple):
    """A network with its weights."""

    network: models.Network
    variables: Mapping[str, Any]
    accuracy: float


def run(config: Mapping[str, Any], workdir: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Converts the network of a config once per seed; returns what it writes to summary.json."""
    # ---- everything that can be wrong is found before anything is written --------------------------------------------
    check_config(config)
    splits = [data.load(config["dataset"], config[f"{name}_split"]) for name in ("train", "score", "test")]
    classifier.check_task(splits[0])
    sets = Data(*splits, preprocess=classifier.standardisation(splits[0]))
    there = None if config["source"] is None else source_config(config)
    section = config["network"] if there is None else there["networks"][config["source_network"]]
    first_order = classifier.network(section, sets.train)
    target = convert.quadratize(first_order.architecture, config["kind"], branch_norm=config["branch_norm"])
    full = quadratic_network(target, config)
    reference = costs_of(first_order).total
    for name in STAGES:
        training.optimizer_from(config["training"][name]["optimizer"], max(1, steps_of(config, name, sets.train)))
    print("looking whether the budget can be met; for a deep network this takes minutes")
    under = costs_under(config)
    least = convert.smallest(target, dict(config["budget"]), under, reference=reference, actions=config["actions"])
    check_transplant(first_order, full)
    check_transplant(full, quadratic_network(least.architecture, config))
    folders = [f"seed{seed}/{name}" for seed in config["seeds"] for name in STAGES]
    directory, _ = training.prepare_workdir(workdir, plain_config(config), overwrite, folders)

    # ---- one conversion per seed -------------------------------------------------------------------------------------
    conversions = []
    for seed in config["seeds"]:
        folder = directory / f"seed{seed}"
        if there is None:
            source = trained(first_order, None, config, SOURCE, seed, sets, folder)
        else:
            source = restored(first_order, there, config, seed, sets)
        print(f"seed {seed}, source: test accuracy {source.accuracy:.2%}")
        conversions.append(conversion(source, full, reference, under, config, seed, sets, folder))

    # ---- comparison --------------------------------------------------------------------------------------------------
    rows = []
    for name in STAGES:
        steps = [done[name] for done in conversions]
        accuracy = [step["accuracy"] for step in steps]
        # Seeds may end in different architectures: the costs are those of the largest.
        rows.append(
            {
                "name": name,
                "accuracy": sum(accuracy) / len(accuracy),
                "accuracy_range": (min(accuracy), max(accuracy)),
                **{key: max(step[key] for step in steps) for key in ("params", "macs", "memory_bytes")},
            }
        )
    by_name = {row["name"]: row for row in rows}
    against = {name: ratios_of(by_name[REDUCED], by_name[name]) for name in (SOURCE, CONTINUED)}
    summary = {
        "dataset": {
            "name": sets.train.name,
            "source": sets.train.info.source,
            "train": len(sets.train),
            "test": len(sets.test),
        },
        "seeds": list(config["seeds"]),
        "networks": rows,
        **{f"reduced_to_{name}": ratios for name, ratios in against.items()},
        "conversions": conversions,
    }
    training.comparison_figure(rows, directory / FIGURES / "comparison.png")
    training.write_summary(directory, summary)
    job.show(training.comparison_table(rows, title=f"{sets.train.name}, test accuracy; memory per image in training"))
    for name, ratios in against.items():
        print(
            f"reduced to {name}: {ratios['accuracy_points']:+.2f} points, {ratios['params']:.3f} of the parameters, "
            f"{ratios['macs']:.3f} of the MACs, {ratios['memory_bytes']:.3f} of the residual bytes"
        )
    print(f"figure: {directory / FIGURES / 'comparison.png'}")
    return summary


def conversion(
    source: Trained,
    full: models.Network,
    reference: costs.LayerCost,
    under: Callable[[spec.Architecture], costs.CostReport],
    config: Mapping[str, Any],
    seed: int,
    sets: Data,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Converts one trained network; returns what each step found, and prints it."""
    first_order = source.network.architecture
    score_key, *init_keys = jax.random.split(jax.random.key(seed), 3)

    # ---- the source trained on, for comparison -----------------------------------------------------------------------
    same_policy = quadratic_network(first_order, config)
    continued = trained(same_policy, source.variables, config, CONTINUED, seed, sets, folder)
    print(f"seed {seed}, continued: test accuracy {continued.accuracy:.2%}")

    # ---- the same function as a quadratic network, then trained as one -----------------------------------------------
    start = convert.transplant(source.variables, first_order, initial(full, init_keys[0]), full.architecture)
    images = sets.preprocess(sets.test.arrays["image"][:256])
    logits = [np.asarray(net.apply(v, images)) for net, v in ((source.network, source.variables), (full, start))]
    difference = float(np.abs(logits[0] - logits[1]).max())
    same = tested(full, start, config, sets)
    print(f"seed {seed}, transplanted: test accuracy {same:.2%}, logits differ by {difference:.1e} at most")
    whole = trained(full, start, config, QUADRATIC, seed, sets, folder)
    print(f"seed {seed}, quadratic: test accuracy {whole.accuracy:.2%}")

    # ---- what its layers are worth, and what is left -----------------------------------------------------------------
    scores = convert.score(
        full,
        whole.variables,
        full.architecture,
        sets.preprocess(sets.score.arrays["image"]),
        sets.score.arrays["label"],
        score_key,
        **config["score"],
    )
    print(scores)
    left = convert.reduce(
        full.architecture,
        scores,
        dict(config["budget"]),
        under,
        reference=reference,
        actions=config["actions"],
    )
    for action, name, cost in left.steps:
        print(f"{action} {name}: {described(cost, reference)}")
    small = quadratic_network(left.architecture, config)
    start = initial(small, init_keys[1])
    start = convert.transplant(whole.variables, full.architecture, start, left.architecture)
    fresh = convert.fresh_layers(full.architecture, left.architecture)
    print(f"seed {seed}, reduced: layers with new weights: {', '.join(fresh) or 'none'}")
    before = tested(small, start, config, sets)
    after = trained(small, start, config, REDUCED, seed, sets, folder)
    print(f"seed {seed}, reduced: test accuracy {before:.2%} before training, {after.accuracy:.2%} after")
    return {
        "seed": seed,
        SOURCE: {"accuracy": source.accuracy, **counted(reference)},
        CONTINUED: {"accuracy": continued.accuracy, **counted(costs_of(same_policy).total)},
        "transplanted": {"accuracy": same, "largest_logit_difference": difference},
        QUADRATIC: {"accuracy": whole.accuracy, **counted(costs_of(full).total)},
        # JSON has no infinity.
        "scores": [{**row._asdict(), "ri": row.ri if math.isfinite(row.ri) else None} for row in scores.rows],
        "steps": [{"action": action, "name": name, **counted(cost)} for action, name, cost in left.steps],
        REDUCED: {
            "accuracy_before_training": before,
            "accuracy": after.accuracy,
            "layers": [f"{path}: {x.kind}, {x.features}" for path, x in spec.walk(left.architecture) if has_kind(x)],
            "fresh_layers": list(fresh),
            **counted(left.cost),
        },
    }


def trained(
    network: models.Network,
    start: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    name: str,
    seed: int,
    sets: Data,
    folder: pathlib.Path,
) -> Trained:
    """Trains a network from given variables, or new ones, as the config says for this stage; resumes exactly."""
    section = config["training"][name]
    steps = steps_of(config, name, sets.train)
    if steps == 0 and start is not None:
        return Trained(network, start, tested(network, start, config, sets))
    method = method_of(network, section["optimizer"], config, sets.train, steps)
    batches = data.Batches(sets.train.arrays, config["batch_size"], seed=seed)
    result = training.fit(
        method if start is None else classifier.starting_from(start, method),
        lambda first: data.prefetch(batches.starting_at(first)),
        steps=steps,
        key=jax.random.key(seed),
        workdir=folder / name,
        evaluate_on=lambda: data.padded_batches(sets.test.arrays, config["eval_batch_size"]),
        log_every=config["log_every"],
        checkpoint_every=max(1, steps // 4),
        keep=1,
        config={**plain_config(config), "stage": name, "seed": seed, "network": str(network.architecture)},
    )
    return Trained(network, classifier.variables_of(result.state), result.evaluation["accuracy"])


def restored(
    network: models.Network, there: Mapping[str, Any], config: Mapping[str, Any], seed: int, sets: Data
) -> Trained:
    """The source network as a run of `launch.train` left it."""
    steps = there["steps"] or there["epochs"] * (len(sets.train) // there["batch_size"])
    method = classifier.method(network, there, sets.train, steps)
    like = jax.eval_shape(method.init, jax.random.key(0), classifier.batch_of(sets.train))
    path = pathlib.Path(config["source"]) / config["source_network"] / f"seed{seed}" / CHECKPOINTS
    with training.Checkpoints(path) as checkpoints:
        variables = classifier.variables_of(checkpoints.restore(like)[0])
    return Trained(network, variables, tested(network, variables, config, sets))


def source_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run of `launch.train` that `source` names.

    Raises:
      ValueError: if there is none, or it is of other images or has not the network or the seeds.
    """
    path = pathlib.Path(config["source"]) / CONFIG
    if not path.is_file():
        raise ValueError(f"source={config['source']!r} is no work directory of launch.train: {path} is missing")
    there = json.loads(path.read_text(encoding="utf-8"))["config"]
    for name in ("dataset", "train_split"):
        if there.get(name) != config[name]:
            raise ValueError(f"source was trained with {name}={there.get(name)!r}, not {config[name]!r}; set it so")
    if config["source_network"] not in there.get("networks", {}):
        raise ValueError(
            f"source_network={config['source_network']!r} is not in {path}, which has {', '.join(there['networks'])}"
        )
    if missing := sorted(set(config["seeds"]) - set(there["seeds"])):
        raise ValueError(f"seeds: {path} has the seeds {there['seeds']}, not {missing}")
    return there


def check_config(config: Mapping[str, Any]) -> None:
    """Finds what is wrong with a config before a run writes anything.

    Raises:
      ValueError: for unknown or missing fields, listing the valid ones; an unknown kind or action; no seeds.
    """
    valid = base("fashion_mnist")
    sections = {"config": (config, valid)}
    sections |= {name: (config[name], valid[name]) for name in ("score", "training") if name in config}
    for what, (section, known) in sections.items():
        classifier.check_fields(what, section, tuple(known))
        if missing := sorted(set(known) - set(section)):
            raise ValueError(f"{what}: missing field {', '.join(missing)}; start from configs.conversion.base")
    for name in STAGES:
        section = config["training"].get(name, {})
        classifier.check_fields(f"training.{name}", section, ("epochs", "optimizer"))
        if missing := sorted({"epochs", "optimizer"} - set(section)):
            raise ValueError(
                f"training.{name}: missing field {', '.join(missing)}; make it by configs.conversion.stage"
            )
        if not 0 <= section["epochs"] < math.inf:
            raise ValueError(f"training.{name}.epochs must be a number from 0, got {section['epochs']}")
    for name in ("batch_size", "eval_batch_size", "log_every"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if not len(config["seeds"]):
        raise ValueError("seeds is empty; name at least one")
    quadratic.kinds.relinear_starts(quadratic.get(config["kind"]))
    quadratic.backward.check_save(config["save"])
    convert.check_masking(**config["score"])
    classifier.check_fields("budget", config["budget"], convert.BUDGETS)
    classifier.check_fields("actions", dict.fromkeys(config["actions"]), tuple(convert.ACTIONS))


def quadratic_network(architecture: spec.Architecture, config: Mapping[str, Any]) -> models.Network:
    """The network that runs an architecture under the memory policy of the config."""
    conv, dense = (
        functools.partial(make, save=config["save"]) for make in (quadratic.conv_layer, quadratic.dense_layer)
    )
    return models.Network(architecture, conv=conv, dense=dense)


def costs_of(network: models.Network) -> costs.CostReport:
    """Parameters, MACs and residual bytes for one image in training."""
    return classifier.costs_of(network, network.architecture.input_shape)


def costs_under(config: Mapping[str, Any]) -> Callable[[spec.Architecture], costs.CostReport]:
    """Architecture -> its costs under the memory policy of the config; counted once for each architecture."""
    return functools.cache(lambda architecture: costs_of(quadratic_network(architecture, config)))


def check_transplant(network: models.Network, target: models.Network) -> None:
    """Raises the error with which `transplant` would refuse to give a network the weights of another."""
    # Ones, as what is nowhere zero: some layers could only take over biases that are.
    old, new = (
        jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), jax.eval_shape(initial_of(net), jax.random.key(0)))
        for net in (network, target)
    )
    convert.transplant(old, network.architecture, new, target.architecture)


def method_of(network, optimizer, config, train, steps) -> training.Method:
    """The classification method of a stage."""
    return classifier.method(network, {**config, "optimizer": optimizer}, train, steps)


def initial(network: models.Network, key: jax.Array) -> Mapping[str, Any]:
    """New variables of a network."""
    return initial_of(network)(key)


def initial_of(network: models.Network) -> Callable[[jax.Array], Mapping[str, Any]]:
    """Key -> new variables of a network."""
    images = np.zeros((1, *network.architecture.input_shape), np.float32)
    return functools.partial(training.from_linen(network).init, inputs=images)


def tested(network: models.Network, variables: Mapping[str, Any], config: Mapping[str, Any], sets: Data) -> float:
    """Accuracy on the test images."""
    return classifier.tested(network, variables, sets.test, sets.preprocess, config["eval_batch_size"])


def steps_of(config: Mapping[str, Any], name: str, train: data.Dataset) -> int:
    """Steps of a stage."""
    return round(config["training"][name]["epochs"] * (len(train) // config["batch_size"]))


def counted(cost: costs.LayerCost) -> dict[str, int | None]:
    """Costs as columns of a comparison."""
    return {"params": cost.params, "macs": cost.macs, "memory_bytes": cost.residual_bytes}


def ratios_of(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """What one row of the comparison has of another: accuracy in points more, costs as ratios."""
    ratios = {key: row[key] / other[key] for key in ("params", "macs", "memory_bytes")}
    return {"accuracy_points": 100 * (row["accuracy"] - other["accuracy"]), **ratios}


def described(cost: costs.LayerCost, reference: costs.LayerCost) -> str:
    """Costs beside those of the source, for people."""
    shares = (f"{getattr(cost, name) / getattr(reference, name):.2f} of the {name}" for name in convert.BUDGETS)
    return ", ".join(shares)


def has_kind(layer: Any) -> bool:
    """Whether a layer has neurons."""
    return isinstance(layer, spec.Conv | spec.Dense)


if __name__ == "__main__":
    job.main(run, __doc__)
