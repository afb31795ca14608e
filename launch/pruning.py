"""Networks with gates in the training job: their ratios, how they learn, and their form in use."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from configs.classification import gates
from jaxeff import costs, data, dynamic, models, spec, training
from jaxeff.dynamic import figures
from jaxeff.ops import autotune
from jaxeff.training.workdir import CONFIG
from launch import classifier

RULES = ("ascent", "sandwich", "none")
SPEC = ("group_size", "tile", "order", "reduce", "ranking", "engine")
CHOSEN = "ratios"
"""Name of the chosen ratios in the config of a run's folder."""
# Steps from which on measuring engines, for seconds a layer, takes less time than they save.
WORTH_TUNING = 200
# Gates that learn: convolution factories, and what a config can say of them.
LEARNED = {
    "boosted": (dynamic.boosted_conv, ("channels", "group_size", "penalty", "gathered")),
    "channel_gated": (dynamic.channel_gated_conv, ("base", "target", "penalty", "slope")),
}
BY_BLOCK = ("channels", "columns", "group_size", "tile")


def network(section: Mapping[str, Any], dataset: data.Dataset, dtype: str = "float32") -> models.Network:
    """The network of a section of a config, with its gates if it has any; without ratios yet to be chosen.

    Raises:
      ValueError: as `launch.classifier.network`; for unknown fields, rules or methods, gates that learn in a network of
        another kind, or numbers that are not those of the blocks.
    """
    asked, learned = section.get("gates"), section.get("learned")
    own = {name: value for name, value in section.items() if name not in ("gates", "learned")}
    module = classifier.network(own, dataset, dtype)
    if learned is not None:
        module = module.clone(conv=_learned(learned, own))
    if asked is None:
        return _that_can_be_made(module) if learned is not None else module
    check(asked)
    found = dynamic.blocks(module.architecture)
    rows = [_row(asked, index, len(found)) for index in range(len(found))]
    settings = [dynamic.DynamicSpec(**row, **{name: asked[name] for name in SPEC if name not in row}) for row in rows]
    module = module.clone(architecture=dynamic.gate(module.architecture, settings), gate=dynamic.gate_layer)
    return _that_can_be_made(module)


def check(asked: Mapping[str, Any]) -> None:
    """Finds what is wrong with gates.

    Raises:
      ValueError: for unknown or missing fields, an unknown rule, or fields that need others.
    """
    valid = tuple(gates(0.5))
    classifier.check_fields("gates", asked, valid)
    if missing := sorted(set(valid) - set(asked)):
        raise ValueError(f"gates: missing field {', '.join(missing)}; make it by configs.classification.gates")
    if asked["rule"] not in RULES:
        raise ValueError(f"gates: rule must be one of {', '.join(map(repr, RULES))}, got {asked['rule']!r}")
    if not 0 < asked["climb"] <= 1:
        raise ValueError(f"gates: climb is a share of the steps, in (0, 1], got {asked['climb']}")
    if asked["epochs"] is not None and (asked["epochs"] < 1 or asked["rule"] == "none"):
        raise ValueError(
            f"gates: epochs must be at least 1, of a network that is trained, got {asked['epochs']} with rule "
            f"{asked['rule']!r}; None trains as long as the experiment says"
        )
    to_choose = [name for name in dynamic.DIMENSIONS if asked[name] is None]
    budgets = [name for name in ("macs", "seconds") if asked[name] is not None]
    if len(budgets) != bool(to_choose):
        raise ValueError(
            f"gates: macs={asked['macs']} and seconds={asked['seconds']}, but channels={asked['channels']} and "
            f"columns={asked['columns']}; give one budget where a ratio is None, and none where none is"
        )
    if to_choose and any(asked[name] for name in dynamic.DIMENSIONS):
        raise ValueError("gates: one of channels and columns is to be chosen; let the other be None or 0")
    if to_choose and asked["sensitivity_split"] is None:
        raise ValueError("gates: ratios are chosen by sensitivity, so sensitivity_split must name images for it")
    if asked["snap"] and (to_choose or asked["rule"] == "none"):
        raise ValueError(
            "gates: snap lowers ratios that are given, before a network learns; where ratios are chosen under a budget "
            "of time they are on its steps already, and rule 'none' learns nothing"
        )
    if asked["source"] is None and (to_choose or asked["rule"] == "none" or asked["sensitivity_split"] is not None):
        raise ValueError("gates: no source is named, so there are no weights to measure or to use; name a network")


def steps(asked: Mapping[str, Any] | None, default: int, per_epoch: int) -> int:
    """How many steps a network is trained for: as its gates ask, or else as many as the experiment has."""
    return default if asked is None or asked["epochs"] is None else asked["epochs"] * per_epoch


def sources_first(gates_of: Mapping[str, Any], modules: Mapping[str, models.Network]) -> list[str]:
    """The names of all networks, each after the one that it starts from.

    Raises:
      ValueError: if a source is no network of the experiment, starts from the network itself, or has other variables.
    """
    sources = {name: None if asked is None else asked["source"] for name, asked in gates_of.items()}
    order: list[str] = []
    while len(order) < len(sources):
        ready = [name for name, source in sources.items() if name not in order and source in (None, *order)]
        if not ready:
            left = {name: source for name, source in sources.items() if name not in order}
            raise ValueError(
                f"gates: a source must be another network of {', '.join(sources)}, and the first of them without one; "
                f"these are not: {left}"
            )
        order += ready
    for name, source in sources.items():
        if source is not None and _shapes(modules[source]) != _shapes(modules[name]):
            raise ValueError(f"gates of {name!r}: its source {source!r} has parameters of other shapes")
    return order


def dense(module: models.Network) -> models.Network:
    """The network without its gates; the variables are the same."""
    return module.clone(architecture=spec.gate(module.architecture, None), gate=None)


def ratios(module: models.Network) -> np.ndarray:
    """Ratios of channels and columns in every block of a gated network, [B, 2]."""
    reads, layers = dynamic.readers(module.architecture), dict(spec.walk(module.architecture))
    asked = [layers[reads[paths[0]]].gate for paths in dynamic.blocks(module.architecture)]
    return np.array([(gate.channels, gate.columns) for gate in asked])


def chosen(
    module: models.Network,
    asked: Mapping[str, Any],
    state: training.TrainState,
    images: jax.Array,
    labels: np.ndarray,
    report: costs.CostReport,
    batch: int,
    path: pathlib.Path,
) -> list[list[float]]:
    """Measures and draws how much every block can drop, and gives the ratios: those asked for, or chosen by it.

    Args:
      module: the gated network.
      asked: its gates in the config.
      state: of the source.
      images: standardised, [N, H, W, C].
      labels: int [N].
      report: costs of the network without gates.
      batch: images of one call, where the budget is one of time.
      path: of the figure.

    Returns:
      [B, 2], channels and columns.
    """
    architecture, free = module.architecture, [name for name in dynamic.DIMENSIONS if asked[name] is None]
    found = dynamic.blocks(architecture)
    names = [paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}" for paths in found]
    paths = dynamic.block_paths(architecture)
    measured = dynamic.sensitivity(module.apply, weights(state), images, labels, paths, names=names)
    figures.draw_sensitivity(measured, path)
    if asked["macs"] is not None:
        given = {"dimensions": free, "conv": module.conv}
        table = dynamic.ratios_within_macs(architecture, report, measured, asked["macs"], **given)
    elif asked["seconds"] is not None:
        inputs = jax.ShapeDtypeStruct((batch, *architecture.input_shape), np.float32)
        table = dynamic.ratios_within_seconds(module, inputs, architecture, measured, asked["seconds"], dimensions=free)
    else:
        table = ratios(module)
    return table.tolist()


def snapped(module: models.Network, batch: int) -> list[list[float]]:
    """The ratios, [B, 2], those of channels lowered as far as calls of so many images take no longer for it."""
    architecture = module.architecture
    inputs = jax.ShapeDtypeStruct((batch, *architecture.input_shape), np.float32)
    lowered = dict(spec.walk(dynamic.snap_ratios(module, inputs, architecture)))
    reads = dynamic.readers(architecture)
    # A block has one ratio: the lowest that costs none of its layers time.
    rows = [[lowered[reads[path]].gate for path in paths] for paths in dynamic.blocks(architecture)]
    return [[max(gate.channels for gate in row), row[0].columns] for row in rows]


def settled(folder: pathlib.Path) -> list[list[float]] | None:
    """The ratios that a run in this folder began with, [B, 2], so that it goes on with them; None where none began.

    Chosen again they might be others, where the budget is one of measured time.
    """
    path = folder / CONFIG
    return json.loads(path.read_text())["config"].get(CHOSEN) if path.is_file() else None


def with_ratios(module: models.Network, table: Any) -> models.Network:
    """The gated network with other ratios, [B, 2]."""
    return module.clone(architecture=dynamic.with_ratios(module.architecture, table))


def method(
    module: models.Network,
    asked: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    dataset: data.Dataset,
    steps: int,
    source: training.TrainState | None = None,
) -> training.Method:
    """The classification method of a network, under the rule by which its gates learn, from the weights of its source.

    Raises:
      ValueError: if the ratios need more steps to climb than there are, or the norms more images than there are.
    """
    if asked is None:
        return classifier.method(module, config, dataset, steps, penalty=_gate_losses)
    if asked["calibrate"] * config["batch_size"] > len(dataset):
        raise ValueError(
            f"gates: calibrate={asked['calibrate']} batches of {config['batch_size']}, but there are {len(dataset)} "
            "images; renew the norms with fewer"
        )
    found = classifier.method(module, config, dataset, steps, _functions(module, asked, steps), _gate_losses)
    return found if source is None else classifier.starting_from(weights(source), found)


def tune(module: models.Network, asked: Mapping[str, Any], config: Mapping[str, Any], steps: int) -> None:
    """Finds the engines that a network trains with once its ratios stand, where it then trains for long enough.

    What is known is not measured again: a run that goes on takes the engines that it began with. On several hosts
    nothing is measured, as each might find another engine, and all must run one program.
    """
    if asked["rule"] != "ascent" or asked["engine"] != "auto" or jax.process_count() > 1:
        return
    if steps - _pace(asked, ratios(module), steps)[1] < WORTH_TUNING:
        return
    images = jax.ShapeDtypeStruct((config["batch_size"], *module.architecture.input_shape), np.float32)
    # As they are while they learn: boosted layers, which leave out nothing then, are others in use.
    options = {"train": True}
    if not all(autotune.lookup(call.signature) for call in dynamic.gated_calls(module, images, options=options)):
        dynamic.tune(module, images, options=options, train=True)


def weights(state: training.TrainState) -> dict[str, Any]:
    """The variables of a network to evaluate or to start from; not how far its ratios have climbed."""
    variables = jax.device_get(classifier.variables_of(state))
    return {name: tree for name, tree in variables.items() if name != dynamic.ASCENT}


def finished(
    result: training.FitResult,
    module: models.Network,
    asked: Mapping[str, Any],
    method: training.Method,
    train: data.Dataset,
    test: data.Dataset,
    config: Mapping[str, Any],
) -> training.FitResult:
    """A result with its norms renewed, if that is asked for, and evaluated, if it is not yet."""
    state, batch = result.state, config["batch_size"]
    if asked["calibrate"]:
        images, preprocess = train.arrays["image"], classifier.standardisation(train)
        parts = (preprocess(images[i * batch : (i + 1) * batch]) for i in range(asked["calibrate"]))
        renewed = dynamic.calibrate(training.from_linen(module), weights(state), parts)["batch_stats"]
        state = state._replace(model_state={**state.model_state, "batch_stats": renewed})
    elif result.evaluation:
        return result
    sums, evaluate = training.EvaluationSums(), jax.jit(method.evaluate)
    for part in data.padded_batches(test.arrays, config["eval_batch_size"]):
        sums.add(evaluate(state, part))
    return result._replace(state=state, evaluation=sums.means())


def deployed(
    module: models.Network,
    state: training.TrainState,
    test: data.Dataset,
    preprocess: Callable[[Any], jax.Array],
    report: costs.CostReport,
    batch: int,
    path: pathlib.Path,
) -> dict[str, Any]:
    """Chooses the engine of every gated layer by measuring, and draws what that saves.

    Args:
      module: a network with gates, some that learn, or both.
      state: with its weights.
      test: images on which gates that learn open what they do.
      preprocess: standardises them.
      report: costs of the network without gates.
      batch: images of one call.
      path: of the figure.

    Returns:
      What the network counts and, where it has gates on what its layers read, what it really saves, for summary.json.
    """
    opened = _opened(module, weights(state), test, preprocess)
    total = dynamic.counted_macs(module.architecture, report, conv=module.conv, opened=opened)["total"]
    found = {"dense_macs": total.dense, "macs": total.counted, "attention_additions": total.attention}
    if opened:
        found["open"] = opened
    inputs = jax.ShapeDtypeStruct((batch, *module.architecture.input_shape), np.float32)
    if not dynamic.gated_calls(module, inputs):
        return found
    dynamic.tune(module, inputs)
    measured = dynamic.speed_report(module, inputs)
    figures.draw_speed(measured, path)
    layers = [
        {"layer": row.path.removesuffix("/layer"), "engine": row.engine, "counted": row.counted, "real": row.real}
        for row in measured.rows
    ]
    return {
        **({} if module.gate is None else {"ratios": ratios(module).tolist()}),
        **found,
        "efficiency": measured.efficiency,
        "layers": layers,
        "table": str(measured),
    }


def _that_can_be_made(module: models.Network) -> models.Network:
    """The network, whose layers have said what is wrong with them, before anything is trained."""
    images = jax.ShapeDtypeStruct((1, *module.architecture.input_shape), np.float32)
    jax.eval_shape(module.init, jax.random.key(0), images)
    return module


def _learned(asked: Mapping[str, Any], section: Mapping[str, Any]) -> Callable[..., Any]:
    """The convolution factory of gates that learn."""
    if asked.get("method") not in LEARNED:
        valid = ", ".join(map(repr, LEARNED))
        raise ValueError(f"learned: method must be one of {valid}, got {asked.get('method')!r}")
    plain = {"kind": "first_order", "save": "all", "initialization": "kaiming"}
    if other := {name: section[name] for name, value in plain.items() if section.get(name, value) != value}:
        raise ValueError(f"learned: gates that learn are of first-order layers with their own backward, got {other}")
    make, valid = LEARNED[asked["method"]]
    classifier.check_fields(f"learned, method {asked['method']!r}", asked, ("method", *valid))
    return make(**{name: value for name, value in asked.items() if name != "method"})


def _gate_losses(params: Any, model_state: Mapping[str, Any]) -> jax.Array:
    return dynamic.gate_losses(model_state)


def _opened(module, variables, test, preprocess) -> dict[str, float]:
    """Share of outputs that channel gating leaves open, by layer: the mean over images; empty without such gates."""
    if "gate_density" not in variables:
        return {}
    apply = jax.jit(functools.partial(module.apply, mutable=["gate_density"]))
    images = test.arrays["image"]
    parts = [images[start : start + 256] for start in range(0, len(images), 256)]
    found = [dynamic.gate_densities(apply(variables, preprocess(part))[1]) for part in parts]
    sizes = [len(part) for part in parts]
    return {name: float(np.average([by_layer[name] for by_layer in found], weights=sizes)) for name in found[0]}


def _functions(module: models.Network, asked: Mapping[str, Any], steps: int) -> training.ModelFunctions:
    plain, paths, table = training.from_linen(module), dynamic.block_paths(module.architecture), ratios(module)
    if asked["rule"] == "none":
        return plain
    if asked["rule"] == "sandwich":
        return training.ModelFunctions(*dynamic.sandwich(plain, paths, np.zeros_like(table), table))
    schedule = dynamic.ratio_ascent(table, **_pace(asked, table, steps)[0])
    return training.ModelFunctions(*dynamic.targeted_dropout(plain, paths, schedule))


def _pace(asked: Mapping[str, Any], table: Any, steps: int) -> tuple[dict[str, Any], int]:
    """The pace of an ascent, as `dynamic.ratio_ascent` takes it, and the step at which the ratios are reached."""
    pace = {"start": asked["start"], "increment": asked["increment"]}
    climbs = dynamic.ascent_steps(table, **pace, every=1)
    if climbs > asked["climb"] * steps:
        raise ValueError(
            f"gates: the ratios climb in {climbs} steps from {asked['start']} by {asked['increment']}, but there are "
            f"only {int(asked['climb'] * steps)}; train longer or let increment be higher"
        )
    every = max(1, int(asked["climb"] * steps) // max(1, climbs))
    return {**pace, "every": every}, climbs * every


def _row(asked: Mapping[str, Any], index: int, blocks: int) -> dict[str, Any]:
    row = {}
    for name in BY_BLOCK:
        value = asked[name]
        if isinstance(value, Sequence):
            if len(value) != blocks:
                raise ValueError(f"gates: {name} has {len(value)} entries, but the network has {blocks} blocks")
            value = value[index]
        row[name] = 0.0 if value is None else value
    return row


def _shapes(module: models.Network) -> Any:
    images = jax.ShapeDtypeStruct((1, *module.architecture.input_shape), np.float32)
    return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(module.init, jax.random.key(0), images))
