"""Benchmarks of dynamic pruning: gated convolutions and networks beside the fastest dense form of each.

    python -m launch.bench.dynamic [--case NAME]... [--pairs 9] [--device cpu|gpu] [--json FILE]

Dense is whichever of these is fastest on the day: for a layer XLA's convolution, ours (`jaxeff.ops`), patches and one
matrix product, with and without a barrier between the two, the compiled code of the engines with nothing left out, and
the masked convolution; for a network XLA's convolutions, ours or compiled code throughout, gated by masks or without
gates. `make bench` keeps the results in launch/bench/results/dynamic.json.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff import costs, dynamic, models, training
from jaxeff.dynamic import DynamicSpec, engines
from jaxeff.dynamic.accounting import density
from jaxeff.dynamic.convolution import candidates
from jaxeff.ops import autotune, conv_impl, gathered_conv
from launch.bench import results, suite
from launch.bench.timing import Times, contest

# One turn lasts about as long as this, so that layers of a millisecond are not timed one by one.
TURN = 0.03


# --- workloads --------------------------------------------------------------------------------------------------------


def layer(batch: int, size: int, channels: int, features: int, kernel: int = 3) -> tuple[jax.Array, jax.Array]:
    """A feature map after a ReLU [batch, size, size, channels] and a kernel."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(batch, size, size, channels)), 0)
    k = rng.normal(size=(kernel, kernel, channels, features)) / (kernel * channels**0.5)
    return jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32)


def dense_forms(settings: DynamicSpec, x: jax.Array, kernel: jax.Array) -> dict[str, Callable[..., jax.Array]]:
    """Every form of the dense layer, and the masked one."""
    masked = dataclasses.replace(settings, engine="mask")
    return {
        **dynamic.dense_forms(engines.geometry(x.shape, kernel.shape), x.dtype),
        "mask": partial(dynamic.conv, settings=masked),
    }


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """The function compiled for these arguments, and bound to them."""
    return partial(jax.jit(function).lower(*args).compile(), *args)


def beside_dense(pairs: int, settings: dict[str, DynamicSpec], x: jax.Array, kernel: jax.Array) -> tuple[Times, str]:
    """Times of every gated convolution and of all dense forms, and the name of the fastest dense one."""
    first = next(iter(settings.values()))
    forms = {name: compiled(form, x, kernel) for name, form in dense_forms(first, x, kernel).items()}
    ours = {name: compiled(lambda x, k, s=s: dynamic.conv(x, k, s), x, kernel) for name, s in settings.items()}
    times = contest({**forms, **ours}, pairs=pairs, seconds=TURN)
    return times, times.fastest(*forms)


# --- layers -----------------------------------------------------------------------------------------------------------

ENGINES_OF = {
    "conv_channels": (
        1.8,
        {
            "channels": DynamicSpec(channels=0.5, engine="channels"),
            "grouped_32": DynamicSpec(channels=0.5, group_size=32, engine="grouped"),
            "grouped_64": DynamicSpec(channels=0.5, group_size=64, engine="grouped"),
            "native_channels": DynamicSpec(channels=0.5, engine="native_channels"),
        },
    ),
    "conv_columns": (
        1.75,
        {
            "columns": DynamicSpec(columns=0.5, engine="columns"),
            "native_columns": DynamicSpec(columns=0.5, engine="native_columns"),
        },
    ),
    "conv_both": (
        3.0,
        {
            "channels_and_columns": DynamicSpec(channels=0.5, columns=0.5, engine="channels_and_columns"),
            "native_channels_and_columns": DynamicSpec(channels=0.5, columns=0.5, engine="native_channels_and_columns"),
        },
    ),
}


def conv_engines(case: str, pairs: int) -> Iterator[dict[str, Any]]:
    """How many times faster than dense a 3x3 convolution of 16x16x256 maps is whose input is half dropped."""
    target, settings = ENGINES_OF[case]
    if engines.native_misfit(jnp.float32):
        settings = {name: chosen for name, chosen in settings.items() if not name.startswith("native")}
    for batch in (1, 8):
        times, dense = beside_dense(pairs, settings, *layer(batch, 16, 256, 256))
        best = times.fastest(*settings)
        for name in settings:
            against = f"dense ({dense})" + (f"; fastest engine: {best}" if name == best else "")
            yield results.time_ratio(
                f"{case}.batch{batch}.{name}", times, dense, name, against=against, better="higher",
                target=target if name == best else None,
            )  # fmt: skip


def conv_features(pairs: int) -> Iterator[dict[str, Any]]:
    """The same where half of the output channels are closed by a gate that learns, alone and with half of the input."""
    if engines.native_misfit(jnp.float32):
        return
    settings = {
        "outputs": DynamicSpec(engine="native_features"),
        "both": DynamicSpec(channels=0.5, engine="native_channels"),
    }
    for batch in (1, 8):
        x, kernel = layer(batch, 16, 256, 256)
        window = engines.geometry(x.shape, kernel.shape)
        run = {name: compiled(form, x, kernel) for name, form in dense_forms(settings["both"], x, kernel).items()}
        forms, rng = list(run), np.random.default_rng(1)
        opened = jnp.asarray(np.sort([rng.permutation(256)[:128] for _ in range(batch)]), jnp.int32)
        for name, chosen in settings.items():

            def some(x, k, features, chosen=chosen, window=window):
                kept = dynamic.select(x, chosen, dynamic.Reader(window, (3, 3)))._replace(features=features)
                return dynamic.conv(x, k, chosen, kept=kept)

            run[name] = compiled(some, x, kernel, opened)
        times = contest(run, pairs=pairs, seconds=TURN)
        dense = times.fastest(*forms)
        for name in settings:
            yield results.time_ratio(
                f"conv_features.batch{batch}.{name}", times, dense, name, against=f"dense ({dense})", better="higher"
            )


# Map size, input and output channels of a 3x3 convolution: of VGG-16 and ResNet-50 on small images.
LAYERS = (
    (32, 64, 64),
    (32, 64, 128),
    (16, 128, 128),
    (16, 64, 128),
    (16, 256, 256),
    (8, 128, 256),
    (8, 256, 256),
    (8, 512, 512),
    (4, 256, 512),
    (4, 512, 512),
    (2, 512, 512),
)


def efficiency(pairs: int) -> Iterator[dict[str, Any]]:
    """Share of the counted speed-up that is real, half of the channels dropped in eighths of them: geometric mean."""
    shares, gains = [], {}
    for batch in (1, 8):
        for size, channels, features in LAYERS:
            drops = DynamicSpec(channels=0.5, group_size=channels // 8)
            x, kernel = layer(batch, size, channels, features)
            names = candidates(drops, x, engines.geometry(x.shape, kernel.shape))
            settings = {name: dataclasses.replace(drops, engine=name) for name in names}
            forms = {name: partial(dynamic.conv, settings=chosen) for name, chosen in settings.items()}
            engine = autotune.fastest(forms, (x, kernel), rounds=max(9, pairs), standard="mask")
            times, dense = beside_dense(pairs, {"auto": settings[engine]}, x, kernel)
            gain = times.ratio(dense, "auto").value
            shares.append(gain / 2)
            gains[f"{size}x{size}x{channels} to {features}, batch {batch}, {engine}"] = gain
    low, _, high = statistics.quantiles(shares, n=4, method="inclusive")
    yield results.case(
        "efficiency", "real / counted speed-up, geometric mean", statistics.geometric_mean(shares), better="higher",
        target=0.75, spread=(low, high), n=len(shares), against="the fastest dense form of each layer",
    )  # fmt: skip
    slowest = min(gains, key=gains.__getitem__)
    yield results.case(
        "efficiency.slowest", "speed-up", gains[slowest], better="higher", target=0.97, against=f"dense; {slowest}"
    )


# --- networks ---------------------------------------------------------------------------------------------------------

VGG16 = {
    "vgg16_antidote": ((0.2, 0.2, 0.6, 0.9, 0.9), {1: 2.2, 8: 2.1}),
    "vgg16_half": ((0.5,) * 5, {1: 1.6, 8: 1.2}),
}
# Channels of a group in each block: single channels, and eighths of the channels where that pays.
GROUPS = {"single": (1, 1, 1, 1, 1), "eighths": (8, 16, 32, 64, 64)}


def vgg16(case: str, pairs: int) -> Iterator[dict[str, Any]]:
    """How many times faster than dense the whole of VGG-16 on 32x32 images is, channels dropped by block."""
    ratios, targets = VGG16[case]
    architecture = models.vgg("D")
    plain = models.Network(architecture)
    variables = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    report = costs.analyze(plain.apply, variables, jnp.zeros((1, 32, 32, 3)), residuals=False)
    for batch, target in targets.items():
        images = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
        masked = gated([DynamicSpec(channels=ratio, engine="mask") for ratio in ratios])
        run = {}
        for impl in dense_impls():
            with conv_impl(impl):
                run[impl] = compiled(lambda *args: plain.apply(*args), variables, images)
                run[f"mask_{impl}"] = compiled(lambda *args, net=masked: net.apply(*args), variables, images)
        forms = list(run)
        counted = {}
        for name, sizes in GROUPS.items():
            drops = [DynamicSpec(channels=ratio, group_size=g) for ratio, g in zip(ratios, sizes, strict=True)]
            network = gated(drops)
            with own_table():
                dynamic.tune(network, images)
                run[name] = compiled(network.apply, variables, images)
            counted[name] = 1 / (1 - dynamic.counted_macs(network.architecture, report)["total"].reduction)
        times = contest(run, pairs=pairs, seconds=TURN)
        dense, best = times.fastest(*forms), times.fastest(*GROUPS)
        for name in GROUPS:
            yield results.time_ratio(
                f"{case}.batch{batch}.{name}", times, dense, name, better="higher",
                against=f"dense ({dense}); counted {counted[name]:.2f}", target=target if name == best else None,
            )  # fmt: skip


def dense_impls() -> tuple[str, ...]:
    """Implementations of the convolution to compare with: those of `jaxeff.ops.conv_impl` that can be had."""
    return ("auto", "lax") if gathered_conv.unavailable(jnp.float32) else ("auto", "lax", "native")


def gated(settings: list[DynamicSpec]) -> models.Network:
    """VGG-16 with gates, one setting for each of its blocks."""
    return models.Network(dynamic.gate(models.vgg("D"), settings), gate=dynamic.gate_layer)


@contextlib.contextmanager
def own_table() -> Iterator[None]:
    """A table of fastest engines that begins empty and is thrown away."""
    before = os.environ.get("JAXEFF_CACHE_DIR")
    engines.native_misfit(jnp.float32)  # compiles, if at all, for all that follow, and not into the folder
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAXEFF_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["JAXEFF_CACHE_DIR"]
            else:
                os.environ["JAXEFF_CACHE_DIR"] = before


def train_step(pairs: int) -> Iterator[dict[str, Any]]:
    """Gradient of VGG-16 in targeted dropout that has reached AntiDote's ratios, with measured engines, and masked."""
    ratios, _ = VGG16["vgg16_antidote"]
    table = [[ratio, 0.0] for ratio in ratios]
    for batch, target in ((8, 1.5), (32, None)):
        images, labels = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3)), jnp.arange(batch) % 10
        run, groups = {}, {f"mask_{impl}": GROUPS["single"] for impl in dense_impls()} | GROUPS
        for name, sizes in groups.items():
            masked = name.startswith("mask_")
            settings = {"engine": "mask" if masked else "auto"}
            drops = [DynamicSpec(channels=r, group_size=g, **settings) for r, g in zip(ratios, sizes, strict=True)]
            network = gated(drops)
            plain, paths = training.from_linen(network), dynamic.block_paths(network.architecture)
            schedule = dynamic.ratio_ascent(table, start=1 - 1e-6, every=1)
            functions = dynamic.targeted_dropout(plain, paths, schedule)
            variables = functions.init(jax.random.key(0), images)

            def loss(params, rest, images, functions=functions, labels=labels):
                logits, _ = functions.apply({"params": params, **rest}, images, True, jax.random.key(0))
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
            with own_table(), conv_impl(name.removeprefix("mask_") if masked else dense_impls()[-1]):
                if not masked:
                    dynamic.tune(network, images, train=True)
                run[name] = compiled(jax.grad(loss), params, rest, images)
        times = contest(run, pairs=pairs, seconds=TURN)
        dense, best = times.fastest(*(name for name in groups if name not in GROUPS)), times.fastest(*GROUPS)
        for name in GROUPS:
            yield results.time_ratio(
                f"train_step.batch{batch}.{name}", times, dense, name, better="higher",
                against=f"masked ({dense.removeprefix('mask_')})", target=target if name == best else None,
            )  # fmt: skip


def compilations(pairs: int) -> Iterator[dict[str, Any]]:
    """How often a step is traced in a whole ratio ascent, and a network in a whole sensitivity sweep."""
    architecture = dynamic.gate(models.cnn((4, 8, 8), pools=1, input_shape=(8, 8, 1)), DynamicSpec())
    network, paths = models.Network(architecture, gate=dynamic.gate_layer), dynamic.block_paths(architecture)
    schedule = dynamic.ratio_ascent([[0.6, 0.3]] * len(paths), every=1)
    functions = dynamic.targeted_dropout(training.from_linen(network), paths, schedule)
    method = training.classification(*functions, optax.sgd(0.1), num_classes=10)
    batch = {"image": jnp.ones((4, 8, 8, 1)), "label": jnp.arange(4)}
    state, step = method.init(jax.random.key(0), batch), jax.jit(method.step)
    steps = dynamic.ascent_steps([[0.6, 0.3]] * len(paths), every=1) + 2
    for _ in range(steps):
        state, _ = step(state, batch)
    yield results.case(
        "compilations.ascent", "compilations", step._cache_size(), better="lower", target=1, n=steps,
        against=f"{steps} steps, every ratio another",
    )  # fmt: skip
    calls = []

    def apply(variables, images):
        calls.append(images.shape)
        return network.apply(variables, images)

    variables = {"params": state.params, "batch_stats": state.model_state["batch_stats"]}
    found = dynamic.sensitivity(apply, variables, batch["image"], batch["label"], paths)
    yield results.case(
        "compilations.sensitivity", "compilations", len(calls), better="lower", target=1,
        against=f"{found.accuracy.size} evaluations of a block at a ratio",
    )  # fmt: skip


GPU_DROPS = {
    "grouped": DynamicSpec(channels=0.5, group_size=64),
    "single": DynamicSpec(channels=0.5),
    "columns": DynamicSpec(columns=0.5),
    "outputs": DynamicSpec(outputs=0.5, tile=8),
    "both": DynamicSpec(channels=0.5, columns=0.5, group_size=64),
    "both_single": DynamicSpec(channels=0.5, columns=0.5),
}
"""What is dropped of a layer on a GPU."""


def gpu_engines(pairs: int, batches: tuple[int, ...] = (64, 256), size: int = 56) -> Iterator[dict[str, Any]]:
    """How many times faster than dense in bf16 a 3x3 convolution of 56x56x256 maps is, half of it dropped.

    Half of the channels (in groups or one by one), columns, output tiles, or of channels and columns both. Kernels that
    do not compile on the device are left out, by name.
    """
    for batch in batches:
        x, kernel = (a.astype(jnp.bfloat16) for a in layer(batch, size, 256, 256))
        window = engines.geometry(x.shape, kernel.shape)
        settings = {
            f"{name}.{engine}": dataclasses.replace(drops, engine=engine)
            for name, drops in GPU_DROPS.items()
            for engine in candidates(drops, x, window)
            if engine != "mask"
        }
        for name, chosen in list(settings.items()):
            try:
                compiled(partial(dynamic.conv, settings=chosen), x, kernel)
            except Exception as error:  # compilers fail in ways of their own
                print(f"skipped gpu_engines.batch{batch}.{name}: {error}", file=sys.stderr)
                del settings[name]
        times, dense = beside_dense(pairs, settings, x, kernel)
        best = {}
        for name in GPU_DROPS:
            if own := [key for key in settings if key.startswith(f"{name}.")]:
                best[name] = times.fastest(*own)
        for name in settings:
            yield results.time_ratio(
                f"gpu_engines.batch{batch}.{name}", times, dense, name, against=f"dense ({dense})", better="higher",
                target=1.5 if name == best.get("grouped") else None,
            )  # fmt: skip
        for name, engine in best.items():
            counted = 1 / density(GPU_DROPS[name], x.shape[1:], x.shape[1:])
            yield results.case(
                f"gpu_engines.batch{batch}.{name}.efficiency", "real / counted speed-up",
                times.ratio(dense, engine).value / counted, better="higher", target=0.7 if name == "both" else None,
                against=f"dense ({dense}); {engine.split('.')[1]}; counted {counted:.2f}",
            )  # fmt: skip


def gpu_vgg16(pairs: int, size: int = 224, batches: tuple[int, ...] = (64,)) -> Iterator[dict[str, Any]]:
    """How many times faster than dense in bf16 the whole of VGG-16 on 224x224 images is, half of both dropped.

    Channels in eighths, and columns, with the engines that are fastest on the device.
    """
    architecture = models.vgg("D", num_classes=1000, input_shape=(size, size, 3))
    plain = models.Network(architecture, dtype=jnp.bfloat16)
    variables = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    report = costs.analyze(plain.apply, variables, jnp.zeros((1, size, size, 3)), residuals=False)
    for batch in batches:
        images = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
        run = {}
        for impl in ("auto", "lax"):
            with conv_impl(impl):
                run[impl] = compiled(lambda *args: plain.apply(*args), variables, images)
        forms, counted = list(run), {}
        for name, columns in (("channels", 0.0), ("both", 0.5)):
            drops = [DynamicSpec(channels=0.5, columns=columns, group_size=g) for g in GROUPS["eighths"]]
            network = plain.clone(architecture=dynamic.gate(architecture, drops), gate=dynamic.gate_layer)
            with own_table():
                dynamic.tune(network, images)
                run[name] = compiled(network.apply, variables, images)
            counted[name] = 1 / (1 - dynamic.counted_macs(network.architecture, report)["total"].reduction)
        times = contest(run, pairs=pairs, seconds=TURN)
        dense = times.fastest(*forms)
        for name, ideal in counted.items():
            against = f"dense ({dense}); counted {ideal:.2f}"
            yield results.time_ratio(
                f"gpu_vgg16.batch{batch}.{name}", times, dense, name, better="higher", against=against
            )
            yield results.case(
                f"gpu_vgg16.batch{batch}.{name}.efficiency", "real / counted speed-up",
                times.ratio(dense, name).value / ideal, better="higher", target=0.7 if name == "both" else None,
                against=against,
            )  # fmt: skip


CASES = {
    **{case: partial(conv_engines, case) for case in ENGINES_OF},
    "conv_features": conv_features,
    "efficiency": efficiency,
    **{case: partial(vgg16, case) for case in VGG16},
    "train_step": train_step,
    "compilations": compilations,
    "gpu_engines": gpu_engines,
    "gpu_vgg16": gpu_vgg16,
}
GPU = ("gpu_engines", "gpu_vgg16")


if __name__ == "__main__":
    suite.main("dynamic", __doc__ or "", CASES, GPU)
