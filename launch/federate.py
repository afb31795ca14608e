"""Lets clients learn together without showing their examples, by every method of a config, and compares them.

    python -m launch.federate --config=configs/federated/digits.py --workdir=runs/federated [--config.rounds=50]

Every method learns under every partition and seed. Writes config.json, summary.json and figures/ to the work directory,
and for every run a folder with metrics.jsonl and checkpoints/. Started again with the same work directory it goes on
where it stopped.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff import costs, data, federated, quadratic, training
from jaxeff.federated import aggregates, compression, fed2, figures, privacy
from jaxeff.training.workdir import FIGURES, plain_config
from launch import classifier, job

PARTITIONS = {
    "iid": federated.iid,
    "by_classes": federated.by_classes,
    "dirichlet": federated.dirichlet,
    "quantity": federated.quantity,
}
ALGORITHMS = ("fed_avg", "fed_prox", "fed_opt", "scaffold", "fed_nova", "moon", "fed_bn")
ROBUST = ("", "median", "trimmed_mean", "krum", "bulyan")
PRIVACY = ("", "central", "local")


class Prepared(NamedTuple):
    """A method of a config: its network, with groups or without, and what it costs."""

    module: nn.Module
    grouped: fed2.Grouped | None
    functions: training.ModelFunctions
    report: costs.CostReport


def run(config: Mapping[str, Any], workdir: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Runs every method under every partition; returns what it writes to summary.json."""
    # ---- data, networks and partitions: everything that can be wrong is found before anything is written -------------
    train = data.load(config["dataset"], config["train_split"])
    test = data.load(config["dataset"], config["test_split"])
    classifier.check_task(train)
    preprocess = classifier.standardisation(train)
    prepared = {name: prepare(section, train) for name, section in config["methods"].items()}
    if not prepared or not config["partitions"]:
        raise ValueError("config: methods and partitions each need at least one section")
    parts = {
        (name, seed): part(section, train, config["clients"], seed)
        for name, section in config["partitions"].items()
        for seed in config["seeds"]
    }
    settings = plain_config(config)
    runs = list(itertools.product(config["partitions"], config["methods"], config["seeds"]))
    folders = {key: f"{key[0]}/{key[1]}/seed{key[2]}" for key in runs}
    for key in runs:
        federation_of(config, key, prepared, parts, preprocess, train)
    epsilons = {name: spent(config, section) for name, section in config["methods"].items()}
    how = federated.Participation(**config["participation"])
    directory, _ = training.prepare_workdir(workdir, settings, overwrite, folders.values())
    for (name, seed), partition in parts.items():
        if seed == config["seeds"][0]:
            figures.draw_partition(partition, directory / FIGURES / f"{name}.png", train.info.class_names or None)

    # ---- rounds ------------------------------------------------------------------------------------------------------
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for key in runs:
        federation, task, clients, init, traffic = federation_of(config, key, prepared, parts, preprocess, train)
        rounds = config["rounds"]
        if config["backend"] == "auto":
            start = jax.random.key(key[2])
            print(f"backend: {federation.tune(federation.init(start, init(start), clients), clients)}")
        print(f"{key[0]}, {key[1]}, seed {key[2]}: {rounds} rounds of {config['clients']} clients")
        result = training.fit(
            federated.as_method(federation, task, init),
            lambda start, clients=clients: itertools.repeat(clients),
            steps=rounds,
            key=jax.random.key(key[2]),
            workdir=directory / folders[key],
            evaluate_on=lambda: data.padded_batches(test.arrays, config["eval_batch_size"]),
            eval_every=config["eval_every"],
            log_every=1,
            checkpoint_every=config["checkpoint_every"] or max(1, rounds // 4),
            keep=config["keep"],
            config={**settings, "partition": key[0], "method": key[1], "seed": key[2]},
            examples_per_step=int(np.asarray(clients.sizes).mean() * how.asked(clients.number)) * config["epochs"],
            tensorboard=config["tensorboard"],
        )
        if bad := sorted({int(row["train/first_rejected"]) for row in result.history if row.get("train/rejected")}):
            print(f"left out in some rounds, as they sent what is not finite: clients {', '.join(map(str, bad))}")
        found[key] = {
            "accuracy": [(row["step"], row["eval/accuracy"]) for row in result.history if "eval/accuracy" in row],
            "by_class": by_class(federation.algorithm, task, result.state, test, config["eval_batch_size"]),
            "bytes_per_round": federated.expected_bytes(traffic, how),
        }

    # ---- comparison --------------------------------------------------------------------------------------------------
    summary = {
        "dataset": {"name": train.name, "source": train.info.source, "train": len(train), "test": len(test)},
        "clients": config["clients"],
        "rounds": config["rounds"],
        "epochs": config["epochs"],
        "seeds": list(config["seeds"]),
        "baseline": baseline_of(config),
        "results": [
            compared(config, found, prepared, partition, name) | {"epsilon": epsilons[name]}
            for partition in config["partitions"]
            for name in config["methods"]
        ],
    }
    runs_of = {
        partition: {name: [found[partition, name, seed] for seed in config["seeds"]] for name in config["methods"]}
        for partition in config["partitions"]
    }
    figures.draw_comparison(runs_of, directory / FIGURES / "comparison.png")
    for partition, curves in runs_of.items():
        figures.draw_rounds(curves, config["epochs"], directory / FIGURES / f"{partition}_rounds.png")
        figures.draw_classes(
            {name: np.mean([one["by_class"] for one in several], 0) for name, several in curves.items()},
            directory / FIGURES / f"{partition}_classes.png",
            train.info.class_names or None,
        )
    training.write_summary(directory, summary)
    job.show(table(summary, f"{train.name}, {config['clients']} clients, test accuracy"))
    print(f"figures: {directory / FIGURES}")
    return summary


def prepare(section: Mapping[str, Any], train: data.Dataset) -> Prepared:
    """The network of a method.

    Raises:
      ValueError: for unknown fields, algorithms, or groups that do not fit.
    """
    parts = ("network", "algorithm", "options", "groups", "robust", "compression", "privacy")
    classifier.check_fields("methods", section, parts)
    for name, value, known in (
        ("algorithm", section["algorithm"], ALGORITHMS),
        ("robust: rule", section["robust"]["rule"], ROBUST),
        ("privacy: kind", section["privacy"]["kind"], PRIVACY),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    groups, grouped = section["groups"], None
    network = classifier.network(section["network"], train)
    if groups["psi_net"]:
        grouped = fed2.psi_net(network.architecture)
    elif groups["number"]:
        if groups["first"] is None:
            raise ValueError("groups: name the layer with which they begin, first=...")
        grouped = fed2.adapt(network.architecture, groups["first"], groups=groups["number"], entry=groups["entry"])
    module: nn.Module = network
    if grouped is not None:
        module = fed2.GroupedNetwork(grouped, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
        for path, (wanted, got) in grouped.rounded.items():
            print(f"{path}: {wanted} features do not divide by {grouped.groups} groups, {got} are taken")
    shape = train.arrays["image"].shape[1:]
    return Prepared(module, grouped, training.from_linen(module), classifier.costs_of(module, shape))


def part(section: Mapping[str, Any], train: data.Dataset, clients: int, seed: int) -> federated.Partition:
    """The examples of each client."""
    if section["kind"] not in PARTITIONS:
        raise ValueError(f"partitions: kind must be one of {', '.join(PARTITIONS)}, got {section['kind']!r}")
    deal: Callable[..., federated.Partition] = PARTITIONS[section["kind"]]
    options = {**section["options"], "seed": seed, "num_classes": train.info.num_classes}
    return deal(train.arrays["label"], clients, **options)


def federation_of(config, key, prepared, parts, preprocess, train):
    """The federation of a run, its task, clients, initial variables and traffic."""
    partition, name, seed = key
    section, method, dealt = config["methods"][name], prepared[name], parts[partition, seed]
    task = federated.classification(
        method.functions.apply,
        train.info.num_classes,
        preprocess=preprocess,
        augment=image_augmentation(config["augment"]),
        features=features_of(method) if section["algorithm"] == "moon" else None,
    )
    example = preprocess(train.arrays["image"][:2])
    init = lambda key: method.functions.init(key, jnp.zeros(example.shape, example.dtype))
    variables = jax.eval_shape(init, jax.random.key(0))
    how = federated.Participation(**config["participation"])
    algorithm = algorithm_of(config, section, task)
    algorithm = algorithm._replace(aggregate=aggregate_of(section, method, variables, dealt))
    algorithm = sent_as(section, algorithm, how, dealt, method.grouped)
    own, exchanged = {}, {}
    groups = section["groups"]
    if method.grouped is not None and groups["mode"] == "subset":
        own = fed2.brought(method.grouped, dealt.class_counts, groups["mode"])
        owned = fed2.owned_groups(method.grouped, dealt.class_counts)
        exchanged = {"group_axes": fed2.group_axes(variables), "owned": owned}
    clients = federated.clients_of(train.arrays, dealt, own)
    batch = {name: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype) for name, a in clients.arrays.items()}
    batch |= {name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in clients.own.items()}
    batch["mask"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    traffic = federated.traffic(algorithm, variables, batch, clients.number, **exchanged)
    federation = federated.federate(
        algorithm,
        batch_size=config["batch_size"],
        epochs=config["epochs"],
        participation=how,
        backend=config["backend"],
        chunk=config["chunk"],
    )
    return federation, task, clients, init, traffic


def algorithm_of(config: Mapping[str, Any], section: Mapping[str, Any], task: federated.Task) -> federated.Algorithm:
    """The algorithm of a method; its options are those of the functions of `jaxeff.federated`."""
    name, options = section["algorithm"], dict(section["options"])
    if name in ("scaffold", "fed_nova"):
        momentum = {"momentum": config["momentum"]} if name == "fed_nova" else {}
        return getattr(federated, name)(task, config["learning_rate"], **momentum, **options)
    sgd = optax.sgd(config["learning_rate"], momentum=config["momentum"] or None)
    if name == "fed_opt":
        server = federated.adaptive(options.pop("kind", "adam"), options.pop("server_learning_rate", 0.01))
        return federated.fed_opt(task, sgd, server, **options)
    return getattr(federated, name)(task, sgd, **options)


def aggregate_of(section: Mapping[str, Any], method: Prepared, variables: Any, dealt: federated.Partition):
    """How what clients have learned becomes one: of groups over their owners, and robust where that is asked for.

    Raises:
      ValueError: for settings of a rule that do not fit.
    """
    robust = section["robust"]
    # SCAFFOLD's control variates are means of clients alike, and so are its models.
    by = "uniform" if section["privacy"]["kind"] == "central" or section["algorithm"] == "scaffold" else "size"
    grouped, counts = method.grouped, dealt.class_counts
    if not robust["rule"]:
        if grouped is None:
            return aggregates.mean(by)
        weights = "uniform" if by == "uniform" else section["groups"]["by"]
        return fed2.aggregate(grouped, variables, counts, by=weights, shared_by=by)
    bad, select, share = robust["byzantine"], robust["select"], robust["share"]
    rules: dict[str, tuple[Any, int]] = {
        "median": (federated.robust.median, 1),
        "trimmed_mean": (lambda stacked, counted: federated.robust.trimmed_mean(stacked, counted, share), 1),
        "krum": (lambda stacked, counted: federated.robust.krum(stacked, counted, bad, select=select), 2 * bad + 3),
        "bulyan": (lambda stacked, counted: federated.robust.bulyan(stacked, counted, bad), 4 * bad + 3),
    }
    rule, least = rules[robust["rule"]]
    groups: dict[str, Any] = {}
    if grouped is not None:
        groups = {"group_axes": fed2.group_axes(variables), "omega": fed2.owned_groups(grouped, counts)}
    return aggregates.robust(rule, least=least, clip=robust["clip"] or None, **groups)


def sent_as(section, algorithm: federated.Algorithm, how: federated.Participation, dealt, grouped):
    """The algorithm with what clients send compressed and private, where that is asked for.

    How many clients own each group is taken for public: sums of groups are divided by it.
    """
    packed, private = section["compression"], section["privacy"]
    if packed["bits"] or packed["share"]:
        values = compression.quantised(packed["bits"]) if packed["bits"] else None
        codec = compression.top_k(packed["share"], values) if packed["share"] else values
        algorithm = compression.compressed(algorithm, codec, feedback=packed["feedback"])
    if private["kind"] == "local":
        return privacy.local(algorithm, clip=private["clip"], noise=private["noise"])
    if private["kind"] == "central":
        expected = how.asked(len(dealt.indices)) * how.available
        clip = privacy.Quantile(private["clip"], private["quantile"]) if private["quantile"] else private["clip"]
        owners = None
        if grouped is not None:
            owned = fed2.owned_groups(grouped, dealt.class_counts).sum(0)
            owners = np.maximum(1, owned) * expected / len(dealt.indices)
        return privacy.central(algorithm, clip=clip, noise=private["noise"], expected=expected, owners=owners)
    return algorithm


def spent(config: Mapping[str, Any], section: Mapping[str, Any]) -> float | None:
    """Epsilon of all rounds; None where nothing is private.

    Raises:
      ImportError: without the extra "privacy".
    """
    private, rounds = section["privacy"], config["rounds"]
    if not private["kind"]:
        return None
    if private["kind"] == "local":
        return privacy.local_epsilon(private["noise"], rounds=rounds, delta=private["delta"])
    return privacy.epsilon(
        private["noise"],
        rounds=rounds,
        delta=private["delta"],
        clients=config["clients"],
        participation=federated.Participation(**config["participation"]),
    )


def features_of(method: Prepared) -> Callable[[Any, jax.Array], jax.Array]:
    """What comes before the last layer, for MOON.

    Raises:
      ValueError: for a network in groups, whose features are several.
    """
    if method.grouped is not None:
        raise ValueError("moon compares one representation: take a network without groups")
    architecture = method.module.architecture
    body = dataclasses.replace(architecture, layers=architecture.layers[:-1])
    network = method.module.copy(architecture=body)
    return lambda variables, images: network.apply(variables, images)


def image_augmentation(section: Mapping[str, Any]) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Crops and flips (key, images) -> images, or None."""
    classifier.check_fields("augment", section, ("crop", "flip"))
    augment = classifier.augmentation(section)
    if augment is None:
        return None
    return lambda key, images: augment(key, images, jnp.zeros((len(images), 1)))[0]


def by_class(
    algorithm: federated.Algorithm, task: federated.Task, state: Any, test: data.Dataset, batch_size: int
) -> list[float]:
    """Test accuracy of each class."""
    evaluate = jax.jit(lambda state, batch: federated.tested(algorithm, task, state, batch))
    sums = [evaluate(state, batch) for batch in data.padded_batches(test.arrays, batch_size)]
    correct, examples = (sum(np.asarray(one[name]) for one in sums) for name in ("correct", "examples"))
    return (correct / np.maximum(examples, 1)).tolist()


def compared(config, found, prepared, partition: str, name: str) -> dict[str, Any]:
    """A row of the comparison, with means over seeds."""
    several = [found[partition, name, seed] for seed in config["seeds"]]
    last = [one["accuracy"][-1][1] for one in several]
    best = [max(value for _, value in one["accuracy"]) for one in several]
    total = prepared[name].report.total
    return {
        "partition": partition,
        "method": name,
        "accuracy": statistics.mean(last),
        "accuracy_range": (min(last), max(last)),
        "best": statistics.mean(best),
        "curves": [one["accuracy"] for one in several],
        "by_class": np.mean([one["by_class"] for one in several], 0).tolist(),
        "bytes_per_round": statistics.mean(one["bytes_per_round"] for one in several),
        "params": total.params,
        "macs": total.macs,
        "rounds_to": rounds_to(config, found, partition, name),
    }


def rounds_to(config, found, partition: str, name: str) -> float | None:
    """Rounds until a method is as good as the baseline at its best, a mean over seeds; None where one never is."""
    first, taken = baseline_of(config), []
    for seed in config["seeds"]:
        goal = max(value for _, value in found[partition, first, seed]["accuracy"])
        reached = [at for at, value in found[partition, name, seed]["accuracy"] if value >= goal]
        if not reached:
            return None
        taken.append(reached[0])
    return statistics.mean(taken)


def baseline_of(config: Mapping[str, Any]) -> str:
    """The method that the others are compared with."""
    return config["baseline"] if config["baseline"] in config["methods"] else next(iter(config["methods"]))


def table(summary: Mapping[str, Any], title: str) -> Any:
    """The comparison as a table."""
    from rich.table import Table

    shown = Table(title=title)
    reach = f"rounds to {summary['baseline'].replace('_', ' ')}'s best"
    private = any(row["epsilon"] is not None for row in summary["results"])
    columns = ["partition", "method", "last", "best", reach, "parameters", "MACs", "MB a round"]
    for column in [*columns, *(["epsilon"] if private else [])]:
        shown.add_column(column, justify="left" if column in ("partition", "method") else "right")
    for row in summary["results"]:
        low, high = row["accuracy_range"]
        spread = f" ({100 * low:.2f} to {100 * high:.2f})" if low < high else ""
        shown.add_row(
            row["partition"].replace("_", " "),
            row["method"].replace("_", " "),
            f"{100 * row['accuracy']:.2f} %{spread}",
            f"{100 * row['best']:.2f} %",
            "never" if row["rounds_to"] is None else f"{row['rounds_to']:.3g}",
            f"{row['params']:,}",
            f"{row['macs']:,}",
            f"{row['bytes_per_round'] / 1e6:.2f}",
            *([] if not private else ["none" if row["epsilon"] is None else f"{row['epsilon']:.3g}"]),
        )
    return shown


if __name__ == "__main__":
    job.main(run, __doc__)
