"""Trains the networks of a config one after the other and shows them side by side.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.epochs=20] [--overwrite]

Writes config.json, summary.json and figures/ to the work directory, and for every network and seed a folder with
metrics.jsonl and checkpoints/. Started again with the same work directory it goes on where it stopped.

Networks with gates are dynamically pruned: they learn under rising ratios, which are given or chosen by sensitivity,
and are used with the fastest engine of every layer; their MACs are those that the gates leave, their latency is real.
Gates that learn (feature boosting, channel gating) choose what a layer gives; a network has them alone or beside these.

With a cascade, easy images leave at a cheap network; its accuracy by the time it takes is measured.

On several hosts, start it on each of them with the same work directory, which all of them must see, and with
--config.distributed.coordinator_address=HOST:PORT (of host 0), --config.distributed.num_processes=N and
--config.distributed.process_id=0 .. N-1. A signal to any of them makes all of them save and stop.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxeff import data, parallel, training
from jaxeff.training.workdir import FIGURES, plain_config
from launch import cascade, classifier, job, pruning


def run(config: Mapping[str, Any], workdir: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Trains and compares the networks of a config; returns what it writes to summary.json."""
    # ---- devices -----------------------------------------------------------------------------------------------------
    parallel.initialize_distributed(config["distributed"])
    mesh = parallel.mesh() if jax.device_count() > 1 else None
    placement: dict[str, Any] = {}
    rows_of = parallel.batch_sharding(mesh) if mesh is not None else None
    if mesh is not None:
        placement["step_transform"] = lambda step: parallel.data_parallel(step, mesh)
        placement["state_sharding"] = parallel.replicated(mesh)

    # ---- data, networks and methods: everything that can be wrong is found before anything is written ----------------
    classifier.check_config(config, jax.device_count())
    cascade.check(config["cascade"], tuple(config["networks"]))
    train = data.load(config["dataset"], config["train_split"])
    test = data.load(config["dataset"], config["test_split"])
    classifier.check_task(train)
    batch = config["batch_size"]
    sources = {seed: data.Batches(train.arrays, batch, seed=seed) for seed in config["seeds"]}
    per_epoch = sources[config["seeds"][0]].steps_per_epoch
    steps = config["steps"] or config["epochs"] * per_epoch
    shape = train.arrays["image"].shape[1:]
    gates = {name: net.get("gates") for name, net in config["networks"].items()}
    modules = {name: pruning.network(net, train, config["dtype"]) for name, net in config["networks"].items()}
    order = pruning.sources_first(gates, modules)
    lengths = {name: pruning.steps(asked, steps, per_epoch) for name, asked in gates.items()}
    for name, module in modules.items():
        pruning.method(module, gates[name], config, train, lengths[name])
    splits = {asked["sensitivity_split"] for asked in gates.values() if asked is not None} - {None}
    held_out = {split: data.load(config["dataset"], split) for split in splits}
    preprocess = classifier.standardisation(train)
    reports = {name: classifier.costs_of(pruning.dense(module), shape) for name, module in modules.items()}
    folders = {(name, seed): f"{name}/seed{seed}" for name in order for seed in sources}
    # Which machines do it is not part of what is done: a run that is resumed may have others.
    settings = {name: value for name, value in plain_config(config).items() if name != "distributed"}
    directory, _ = training.prepare_workdir(workdir, settings, overwrite, folders.values())

    # ---- training ----------------------------------------------------------------------------------------------------
    results: dict[str, dict[int, training.FitResult]] = {name: {} for name in modules}
    tables: dict[str, list[list[float]]] = {}
    for (name, seed), folder in folders.items():
        asked, length = gates[name], lengths[name]
        start = None if asked is None or asked["source"] is None else results[asked["source"]][seed].state
        if seed == config["seeds"][0] and asked is not None and asked["sensitivity_split"] is not None:
            images, labels = (held_out[asked["sensitivity_split"]].arrays[key] for key in ("image", "label"))
            found = (modules[name], asked, start, preprocess(images), labels, reports[name], config["latency_batch"])
            path = directory / FIGURES / f"{name}_sensitivity.png"
            began = directory / folder
            tables[name] = parallel.on_first(
                lambda began=began, found=found, path=path: pruning.settled(began) or pruning.chosen(*found, path)
            )
            modules[name] = pruning.with_ratios(modules[name], tables[name])
            if parallel.is_first():
                print(f"{name}: drops (channels, columns) of its blocks: {tables[name]}; figure: {path}")
        if seed == config["seeds"][0] and asked is not None and asked["snap"]:
            found, began = (modules[name], config["latency_batch"]), directory / folder
            tables[name] = parallel.on_first(
                lambda began=began, found=found: pruning.settled(began) or pruning.snapped(*found)
            )
            modules[name] = pruning.with_ratios(modules[name], tables[name])
            if parallel.is_first():
                print(f"{name}: drops (channels, columns) of its blocks, on the steps of this machine: {tables[name]}")
        method = pruning.method(modules[name], asked, config, train, length, start)
        if asked is not None and asked["rule"] == "none":
            example = {key: array[:2] for key, array in train.arrays.items()}
            result = training.FitResult(method.init(jax.random.key(seed), example), 0, [], {})
        else:
            if parallel.is_first():
                print(f"{name}, seed {seed}: {length} steps of {batch} on {len(train)} images of {config['dataset']}")
            if asked is not None:
                pruning.tune(modules[name], asked, config, length)
            chosen = {pruning.CHOSEN: tables[name]} if name in tables else {}
            result = training.fit(
                method,
                lambda start, source=sources[seed]: data.prefetch(source.starting_at(start), sharding=rows_of),
                steps=length,
                key=jax.random.key(seed),
                workdir=directory / folder,
                evaluate_on=lambda: data.padded_batches(test.arrays, config["eval_batch_size"]),
                eval_every=config["eval_every"] or max(1, length // 10),
                log_every=config["log_every"],
                checkpoint_every=config["checkpoint_every"] or max(1, length // 4),
                keep=config["keep"],
                config={**settings, "network": name, "seed": seed, **chosen},
                tensorboard=config["tensorboard"],
                **placement,
            )
        if asked is not None:
            result = pruning.finished(result, modules[name], asked, method, train, test, config)
        results[name][seed] = result

    # ---- engines of pruned networks ----------------------------------------------------------------------------------
    trained = {name: (modules[name], next(iter(runs.values())).state) for name, runs in results.items()}
    pruned: dict[str, Any] = {}
    for name in (name for name, net in config["networks"].items() if gates[name] or net.get("learned")):
        path = directory / FIGURES / f"{name}_speed.png"
        found = (*trained[name], test, preprocess, reports[name], config["latency_batch"], path)
        pruned[name] = parallel.on_first(lambda found=found: pruning.deployed(*found))
        if parallel.is_first() and "table" in pruned[name] and not (gates[name] and gates[name]["rule"] == "none"):
            print(f"{name}, calls of {config['latency_batch']} images:\n{pruned[name]['table']}\nfigure: {path}")

    # ---- early exits -------------------------------------------------------------------------------------------------
    exits: dict[str, Any] = {}
    if config["cascade"]:
        steps_of = {name: trained[name] for name in config["cascade"]}
        labelled = (preprocess(test.arrays["image"]), test.arrays["label"])
        path = directory / FIGURES / "cascade.png"
        exits = parallel.on_first(lambda: cascade.measured(steps_of, *labelled, config["latency_batch"], path))
        if parallel.is_first():
            print(f"{' -> '.join(exits['steps'])}, {config['latency_batch']} images at a time:\n{exits['table']}")
            print(f"figure: {path}")

    # ---- comparison --------------------------------------------------------------------------------------------------
    latency = parallel.on_first(lambda: job.latencies(trained, shape, config["latency_batch"]))
    rows = []
    for name, runs in results.items():
        total = reports[name].total
        accuracy = [result.evaluation["accuracy"] for result in runs.values()]
        rows.append(
            {
                "name": name.replace("_", " "),
                "accuracy": sum(accuracy) / len(accuracy),
                "accuracy_range": (min(accuracy), max(accuracy)),
                "params": total.params,
                "macs": pruned[name]["macs"] if name in pruned else total.macs,
                "memory_bytes": total.residual_bytes,
                "latency_ms": latency[name],
                "train_seconds": job.seconds(runs.values(), lengths[name] * batch),
                "steps": max(result.step for result in runs.values()),
            }
        )
    summary = {
        "dataset": {"name": train.name, "source": train.info.source, "train": len(train), "test": len(test)},
        "steps": steps,
        "seeds": list(config["seeds"]),
        "latency_batch": config["latency_batch"],
        "networks": rows,
        **({"pruned": pruned} if pruned else {}),
        **({"cascade": exits} if exits else {}),
    }
    if parallel.is_first():
        figures = directory / FIGURES
        first = config["seeds"][0]
        histories = {
            name.replace("_", " "): runs[first].history for name, runs in results.items() if runs[first].history
        }
        training.learning_curves(histories, figures / "curves.png")
        training.comparison_figure(rows, figures / "comparison.png")
        training.write_summary(directory, summary)
        job.show(training.comparison_table(rows, title=f"{train.name}, test accuracy after {steps} steps"))
        print(f"figures: {figures / 'comparison.png'}, {figures / 'curves.png'}")
    return summary


if __name__ == "__main__":
    job.main(run, __doc__)
