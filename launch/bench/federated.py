"""Benchmarks of federated learning: whole rounds beside FedJAX and a loop of jitted steps, decoupled layers, memory.

    python -m launch.bench.federated [--case NAME]... [--pairs 9] [--json FILE]

FedJAX 0.0.17 does not install beside a jax of today, but runs without its dependencies and with one alias, which is
made here: pip install --no-deps fedjax==0.0.17 dm-haiku jmp tabulate msgpack. Without it a loop of jitted steps is the
only peer.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff import federated, models, ops, spec, training
from jaxeff.ops import gathered_conv, grouped
from launch.bench import results, suite
from launch.bench.matching import matching
from launch.bench.network import network
from launch.bench.timing import contest

RATE = 0.1


class Problem:
    """Clients of equal size with random examples, and what they learn by plain gradient descent."""

    def __init__(self, architecture: spec.Architecture, clients: int, each: int, batch: int, dtype: Any = None):
        rng = np.random.default_rng(0)
        count = clients * each
        self.arrays = {
            "image": rng.normal(size=(count, *architecture.input_shape)).astype(np.float32),
            "label": rng.integers(0, 10, count).astype(np.int32),
        }
        self.parts = np.split(np.arange(count), clients)
        self.batch = batch
        functions = training.from_linen(models.Network(architecture, dtype=dtype))
        self.task = federated.classification(functions.apply, 10)
        self.variables = functions.init(jax.random.key(0), jnp.zeros((1, *architecture.input_shape)))

    def ours(self, backend: str, **settings: Any) -> Callable[[], Any]:
        """A round of FedAvg."""
        algorithm = federated.fed_avg(self.task, optax.sgd(RATE))
        federation = federated.federate(algorithm, batch_size=self.batch, backend=backend, **settings)
        clients = federated.clients_of(self.arrays, self.parts)
        state = federation.init(jax.random.key(1), self.variables, clients)

        def run():
            nonlocal state
            state, _ = federation.round(state, clients)
            return state.server

        return run

    def gradient_step(self, impl: str | None = None) -> Callable[..., Any]:
        """(params, batch) -> params."""

        def step(params, batch):
            def loss(params):
                masked = {**batch, "mask": jnp.ones(len(batch["label"]))}
                return self.task.loss({"params": params}, masked, jax.random.key(0))[0]

            with ops.conv_impl(impl or "auto"):
                grads = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - RATE * g, params, grads)

        return step

    def loop_of_steps(self, impl: str | None = None) -> Callable[[], Any]:
        """A compiled step called for every batch, as one writes it by hand; clients are shuffled on the host."""
        step, add = jax.jit(self.gradient_step(impl)), jax.jit(_add_scaled)
        rng = np.random.default_rng(0)
        params = self.variables["params"]

        def run():
            nonlocal params
            total = jax.tree.map(jnp.zeros_like, params)
            for part in self.parts:
                mine, order = params, rng.permutation(part)
                for start in range(0, len(order), self.batch):
                    rows = order[start : start + self.batch]
                    mine = step(mine, {name: array[rows] for name, array in self.arrays.items()})
                total = add(total, mine, 1 / len(self.parts))
            params = total
            return params

        return run

    def literal(self, impl: str | None) -> Callable[[], Any]:
        """vmap over clients of a scan over steps."""
        step = self.gradient_step(impl)
        split = lambda array: array.reshape(len(self.parts), -1, self.batch, *array.shape[1:])
        batches = {name: jnp.asarray(split(array)) for name, array in self.arrays.items()}

        @jax.jit
        def round_of(params, batches):
            one = lambda mine: jax.lax.scan(lambda p, batch: (step(p, batch), None), params, mine)[0]
            return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(one)(batches))

        return lambda: round_of(self.variables["params"], batches)

    def fedjax(self) -> Callable[[], Any] | None:
        """A round of FedJAX's own loop over clients, its jit backend; None where it cannot be had."""
        try:
            jax.tree_map = jax.tree.map  # type: ignore[attr-defined]
            import fedjax
        except ImportError:
            return None
        step = self.gradient_step()
        datasets = [
            fedjax.ClientDataset({name: array[part] for name, array in self.arrays.items()}) for part in self.parts
        ]
        with fedjax.for_each_client_backend("jit"):
            for_each = fedjax.for_each_client(
                lambda shared, _: shared, lambda params, batch: step(params, batch), lambda shared, params: params
            )
        add = jax.jit(_add_scaled)
        params, count = self.variables["params"], 0

        def run():
            nonlocal params, count
            count += 1
            batches = [
                (i, one.shuffle_repeat_batch(batch_size=self.batch, num_epochs=1, seed=1000 * count + i), None)
                for i, one in enumerate(datasets)
            ]
            total = jax.tree.map(jnp.zeros_like, params)
            for _, mine in for_each(params, batches):
                total = add(total, mine, 1 / len(datasets))
            params = total
            return params

        return run


def _add_scaled(total: Any, tree: Any, weight: float) -> Any:
    return jax.tree.map(lambda a, b: a + weight * b, total, tree)


def round_mlp(pairs: int) -> Iterator[dict[str, Any]]:
    """A hundred clients of an MLP 784-64-10 with ten batches of ten."""
    problem = Problem(models.mlp((64,), input_shape=(784,)), 100, 100, 10)
    yield from _round("round_mlp", problem, pairs, ("threads", "stream", "chunk", "vmap"), "threads", 0.25)


def round_cnn(pairs: int) -> Iterator[dict[str, Any]]:
    """Ten clients of a CNN 3-16-32-64 on 32x32 images with three batches of 32."""
    problem = Problem(models.cnn((16, 32, 64), pools=3, norm=None), 10, 96, 32)
    yield from _round("round_cnn", problem, pairs, ("auto", "stream", "loop"), "auto", 1.05)


def _round(name, problem, pairs, backends, judged, target) -> Iterator[dict[str, Any]]:
    run = {backend: problem.ours(backend) for backend in backends}
    peers = {"loop of jitted steps": problem.loop_of_steps(), "loop of jitted steps, lax": problem.loop_of_steps("lax")}
    if (fedjax := problem.fedjax()) is not None:
        peers["FedJAX"] = fedjax
    times = contest({**run, **peers}, pairs=pairs, warmup=2)
    best = times.fastest(*peers)
    for backend in backends:
        goal = target if backend == judged else None
        theirs = "FedJAX" if name == "round_mlp" and fedjax is not None else best
        yield results.time_ratio(f"{name}.{backend}", times, backend, theirs, against=theirs, target=goal)
    if name == "round_mlp":
        yield results.time_ratio(f"{name}.stream_beside_best_peer", times, "stream", best, against=best)


def vmap_stock(pairs: int) -> Iterator[dict[str, Any]]:
    """The literal vmap of a scan with stock convolution, beside the same round of ours."""
    problem = Problem(models.cnn((16, 32, 64), pools=3, norm=None), 3, 64, 32)
    times = contest({"literal": problem.literal("lax"), "ours": problem.ours("stream")}, pairs=pairs)
    yield results.time_ratio(
        "vmap_stock", times, "literal", "ours", against="a streamed round", better="higher", target=30
    )


def fed2_layer(pairs: int) -> Iterator[dict[str, Any]]:
    """A decoupled layer, 8x8x240 to 240 in ten groups, batch 32, forward and backward."""
    groups, width = 10, 240
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (groups, 32, 8, 8, width // groups))
    kernel = jax.random.normal(keys[1], (groups, 3, 3, width // groups, width // groups))
    flat, dense = grouped.channel_major(x), jax.random.normal(keys[2], (3, 3, width, width))
    stacked = jnp.moveaxis(kernel, 0, -2).reshape(3, 3, width // groups, width)
    dims = ("NHWC", "HWIO", "NHWC")

    def both(convolve):
        return jax.jit(jax.value_and_grad(lambda x, k: (convolve(x, k) ** 2).mean(), (0, 1)))

    stock = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=dims)
    native = partial(ops.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=dims)
    forms: dict[str, tuple[Callable[..., Any], jax.Array, jax.Array]] = {
        "ours": (both(grouped.grouped_conv), x, kernel),
        "ours.matmul": (both(partial(grouped.grouped_conv, impl="matmul")), x, kernel),
        "feature_group_count": (both(partial(stock, feature_group_count=groups)), flat, stacked),
        "dense lax": (both(stock), flat, dense),
        "dense ops": (both(native), flat, dense),
    }

    def with_native(run):
        def call(*operands):
            with ops.conv_impl("native"):
                return run(*operands)

        return call

    if not gathered_conv.unavailable(jnp.float32):
        forms["dense native"] = (with_native(both(native)), flat, dense)
        forms["ours.native"] = (with_native(both(grouped.grouped_conv)), x, kernel)
    times = contest({name: partial(*form) for name, form in forms.items()}, pairs=pairs)
    ours = times.fastest(*(name for name in forms if name.startswith("ours")))
    full = times.fastest(*(name for name in forms if name.startswith("dense")))
    yield results.time_ratio(
        "fed2_layer.stock", times, ours, "feature_group_count", against=f"feature_group_count; {ours}", target=0.125
    )
    yield results.time_ratio(
        "fed2_layer.dense", times, ours, full, against=f"{full} of equal width; {ours}", target=0.6
    )


def memory(pairs: int) -> Iterator[dict[str, Any]]:
    """Peak memory of a streamed round of 16 and of 256 clients of one data set, each in a process of its own."""
    peaks = {}
    for clients in (16, 256):
        command = [sys.executable, "-c", f"from launch.bench import federated; federated.peak({clients})"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[clients] = json.loads(done.stdout.splitlines()[-1])
    yield results.case(
        "memory", "growth of the peak, 256 clients beside 16", peaks[256] / peaks[16] - 1, better="lower", target=0.1,
        against=f"{peaks[16] / 2**20:.0f} MiB with 16 clients",
    )  # fmt: skip


def peak(clients: int) -> None:
    """Prints the peak memory of this process after two rounds of so many clients who share 8192 examples."""
    problem = Problem(models.cnn((32, 64, 128), pools=3, hidden=(512,), norm=None), clients, 8192 // clients, 32)
    run = problem.ours("stream")
    for _ in range(2):
        jax.block_until_ready(run())
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def gpu_round(pairs: int, clients: int = 100, each: int = 64, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """A round of many VGG-9 clients in bfloat16, beside a loop of jitted steps."""
    problem = Problem(_vgg9(scale), clients, each, 32, jnp.bfloat16)
    runs = {f"chunk{size}": problem.ours("chunk", chunk=size) for size in (10, 25)}
    runs |= {"vmap": problem.ours("vmap"), "stream": problem.ours("stream")}
    times = contest({**runs, "loop of jitted steps": problem.loop_of_steps()}, pairs=pairs, warmup=2)
    ours = times.fastest(*runs)
    for name in runs:
        yield results.time_ratio(
            f"gpu_round.{name}", times, "loop of jitted steps", name, against="a loop of jitted steps", better="higher",
            target=10 if name == ours else None,
        )  # fmt: skip


def gpu_memory(pairs: int, clients: int = 1000, each: int = 32, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """Peak of the device's memory in a round of a thousand VGG-9 clients, 25 at a time."""
    run = Problem(_vgg9(scale), clients, each, 32, jnp.bfloat16).ours("chunk", chunk=25)
    jax.block_until_ready(run())
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    yield results.case(
        "gpu_memory", "peak in GiB", peak / 2**30, better="lower", target=40, against=f"{clients} clients"
    )


def _vgg9(scale: float) -> spec.Architecture:
    """Eight convolutions at most, then dense 512-512-10: FedMA's, with group norm."""
    return models.vgg9(num_classes=10, input_shape=(32, 32, 3), width=scale, norm="group")


CASES = {
    "round_mlp": round_mlp,
    "round_cnn": round_cnn,
    "vmap_stock": vmap_stock,
    "fed2_layer": fed2_layer,
    "memory": memory,
    "matching": matching,
    "network": network,
    "gpu_round": gpu_round,
    "gpu_memory": gpu_memory,
}
GPU = ("gpu_round", "gpu_memory")

if __name__ == "__main__":
    suite.main("federated", __doc__, CASES, GPU)
