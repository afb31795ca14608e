"""Benchmarks of the ground floor: convolution gradients in loops, under vmap and grouped, and beside torch.

    python -m launch.bench.ops [--case NAME]... [--pairs 9] [--device cpu|gpu] [--json FILE]

Every case compiles first, lets the contestants take turns and reports the median of pairwise ratios. Prints one JSON
object a case; `make bench` keeps them in launch/bench/results/ops.json.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxeff import models, ops, spec, training
from jaxeff.ops import gathered_conv
from launch.bench import results, suite, torch_peers
from launch.bench.timing import Times, compile_seconds, contest

CLIENTS, STEPS, CLIENT_BATCH, BATCH = 8, 4, 16, 64


# --- workloads --------------------------------------------------------------------------------------------------------


def method_of(architecture: spec.Architecture, dtype: Any = None) -> training.Method:
    """SGD with momentum on a classification network, the step that every case times."""
    module = models.Network(architecture, dtype=dtype)
    tx = training.optimizer("sgd", 0.05, momentum=0.9)
    return training.classification(*training.from_linen(module), tx, num_classes=10)


def batch_of(architecture: spec.Architecture, *leading: int) -> dict[str, jax.Array]:
    """Random images in 0..1 and labels."""
    image_key, label_key = jax.random.split(jax.random.key(1))
    return {
        "image": jax.random.uniform(image_key, (*leading, *architecture.input_shape)),
        "label": jax.random.randint(label_key, leading, 0, 10),
    }


def client_step(params, batch, impl: str | None = None, pool: Callable[..., jax.Array] = ops.max_pool):
    """One plain SGD step of the CNN 3-16-32-64 on one client's batch; returns (params, loss)."""
    convolve = partial(ops.conv_general_dilated, impl=impl)

    def loss(params):
        x = batch["image"]
        for name in ("conv1", "conv2", "conv3"):
            x = convolve(x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = pool(jax.nn.relu(x), (2, 2))
        logits = x.reshape(x.shape[0], -1) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), value


def client_params() -> dict[str, jax.Array]:
    """Kaiming-normal parameters of the client CNN."""
    shapes = {"conv1": (3, 3, 3, 16), "conv2": (3, 3, 16, 32), "conv3": (3, 3, 32, 64), "head": (1024, 10)}
    init = jax.nn.initializers.he_normal()
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: init(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def stock_pool(x, window):
    """Flax's max pooling, whose gradient is a select-and-scatter."""
    return nn.max_pool(x, window, window)


def client_rounds(impl: str | None, pool: Callable[..., jax.Array] = ops.max_pool):
    """The literal round, vmap over clients of a scan over steps: (params, batches) -> (params, losses)."""

    def clients(params, batches):
        step = partial(client_step, impl=impl, pool=pool)
        return jax.vmap(lambda mine: lax.scan(step, params, mine))(batches)

    return clients


def unrolled_round(params, batches):
    """The same round with every client and step written out, in stock convolutions."""
    out = []
    for client in range(CLIENTS):
        mine, losses = params, []
        for step in range(STEPS):
            batch = jax.tree.map(lambda a, c=client, s=step: a[c, s], batches)
            mine, value = client_step(mine, batch, "lax")
            losses.append(value)
        out.append((mine, jnp.stack(losses)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *out)


# --- cases ------------------------------------------------------------------------------------------------------------


def scan_grad(pairs: int) -> Iterator[dict[str, Any]]:
    """Two train steps of VGG-9 in a scan, beside two calls of one jitted step."""
    architecture = models.vgg9()
    method, batches = method_of(architecture), batch_of(architecture, 2, BATCH)
    state = method.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batches))
    scan = jax.jit(lambda state, batches: lax.scan(method.step, state, batches))

    def separate(step):
        def run():
            current = state
            for index in range(2):
                current, metrics = step(current, jax.tree.map(lambda a, i=index: a[i], batches))
            return current, metrics

        return run

    with ops.conv_impl("lax"):
        stock = jax.jit(lambda state, batch: method.step(state, batch)).lower(state, _first(batches)).compile()
    ours = jax.jit(method.step)
    times = contest(
        {"scan": lambda: scan(state, batches), "ours": separate(ours), "stock": separate(stock)}, pairs=pairs
    )
    peer = times.fastest("ours", "stock")
    yield results.time_ratio(
        "scan_grad", times, "scan", peer, target=1.05, against=f"two jitted steps ({peer} convolution)"
    )


def client_vmap(pairs: int) -> Iterator[dict[str, Any]]:
    """A federated round as vmap(scan(step)), beside a Python loop over one jitted step."""
    params, batches = client_params(), batch_of(models.cnn(), CLIENTS, STEPS, CLIENT_BATCH)
    round_ = jax.jit(client_rounds(None))

    def loop(step):
        parts = [[jax.tree.map(lambda a, c=c, s=s: a[c, s], batches) for s in range(STEPS)] for c in range(CLIENTS)]

        def run():
            out = []
            for client in parts:
                mine = params
                for batch in client:
                    mine, _ = step(mine, batch)
                out.append(mine)
            return out

        return run

    contestants = {
        "vmap": lambda: round_(params, batches),
        "ours": loop(jax.jit(client_step)),
        "stock": loop(jax.jit(partial(client_step, impl="lax"))),
        "all stock": loop(jax.jit(partial(client_step, impl="lax", pool=stock_pool))),
    }
    times = contest(contestants, pairs=max(pairs, 15))
    peer = times.fastest("ours", "stock", "all stock")
    yield results.time_ratio(
        "client_vmap", times, "vmap", peer, target=1.0, against=f"Python loop over one jitted step ({peer} operations)"
    )
    yield results.time_ratio(
        "client_vmap.stock_loop", times, "vmap", "stock", against="the same loop, stock convolution"
    )
    yield results.time_ratio(
        "client_vmap.all_stock_loop", times, "vmap", "all stock", against="the same loop, stock conv and pooling"
    )


def client_vmap_stock(pairs: int) -> Iterator[dict[str, Any]]:
    """The same round with the stock convolution, beside ours."""
    params, batches = client_params(), batch_of(models.cnn(), CLIENTS, STEPS, CLIENT_BATCH)
    rounds = {
        "ours": client_rounds(None),
        "stock": client_rounds("lax", stock_pool),
        "stock conv": client_rounds("lax"),
    }
    compiled = {name: jax.jit(function) for name, function in rounds.items()}
    contestants = {name: partial(function, params, batches) for name, function in compiled.items()}
    # A stock round takes seconds, so that few pairs have to do.
    times = contest(contestants, pairs=min(pairs, 5))
    yield results.time_ratio(
        "client_vmap_stock", times, "stock", "ours", target=30, against="our vmap(scan)", better="higher"
    )
    yield results.time_ratio(
        "client_vmap_stock.conv_only", times, "stock conv", "ours", against="our vmap(scan)", better="higher"
    )


def toplevel(pairs: int) -> Iterator[dict[str, Any]]:
    """One VGG-9 train step outside any loop, our convolution beside the stock one."""
    architecture = models.vgg9()
    method, batch = method_of(architecture), batch_of(architecture, BATCH)
    state = method.init(jax.random.key(0), batch)
    ours = jax.jit(lambda state, batch: method.step(state, batch)).lower(state, batch).compile()
    with ops.conv_impl("lax"):
        stock = jax.jit(lambda state, batch: method.step(state, batch)).lower(state, batch).compile()
    times = contest({"ours": lambda: ours(state, batch), "stock": lambda: stock(state, batch)}, pairs=pairs)
    yield results.time_ratio("toplevel", times, "ours", "stock", target=1.05, against="stock convolution")


def grouped(pairs: int) -> Iterator[dict[str, Any]]:
    """A group-major layer (G = 10, 8x8x240, batch 32), forward and backward, beside the stock forms."""
    groups, batch, size, channels = 10, 32, 8, 240
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, channels // groups, channels)) * 0.05
    wide = jax.random.normal(jax.random.key(2), (3, 3, channels, channels)) * 0.05
    numbers = ("NHWC", "HWIO", "NHWC")

    def trained(function):
        @jax.jit
        def both(x, kernel):
            y, pullback = jax.vjp(function, x, kernel)
            return y, pullback(y)

        return both

    ours = trained(ops.grouped_conv)
    stock = trained(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", None, None, numbers, groups))
    dense = {impl: trained(partial(_plain_conv, impl=impl, numbers=numbers)) for impl in ("lax", "canonical")}
    grouped_x, grouped_kernel = ops.group_major(x, groups), ops.group_major_kernel(kernel, groups)
    contestants = {
        "ours": lambda: ours(grouped_x, grouped_kernel),
        "stock": lambda: stock(x, kernel),
        "dense stock": lambda: dense["lax"](x, wide),
        "dense ours": lambda: dense["canonical"](x, wide),
    }
    times = contest(contestants, pairs=pairs)
    yield results.time_ratio("grouped.stock", times, "ours", "stock", target=0.125, against="feature_group_count")
    peer = times.fastest("dense stock", "dense ours")
    yield results.time_ratio(
        "grouped.dense",
        times,
        "ours",
        peer,
        target=0.6,
        against=f"dense convolution of equal width ({peer.split()[1]})",
    )


def compile_time(pairs: int) -> Iterator[dict[str, Any]]:
    """Compile time of the vmapped round, beside the fully unrolled program."""
    params, batches = client_params(), batch_of(models.cnn(), CLIENTS, STEPS, CLIENT_BATCH)
    contestants = {"ours": client_rounds(None), "unrolled": unrolled_round}
    times = Times({name: [] for name in contestants}, {name: [] for name in contestants})
    for _ in range(min(pairs, 5)):
        for name, function in contestants.items():
            _, wall, cpu = compile_seconds(function, params, batches)
            times.wall[name].append(wall)
            times.cpu[name].append(cpu)
    yield results.time_ratio("compile", times, "ours", "unrolled", target=0.6, against="unrolled program")


def torch_step(pairs: int) -> Iterator[dict[str, Any]]:
    """Our train step beside torch's in channels_last, equal threads; batch 64 on CPU, bf16 and batch 1024 on a GPU."""
    on_gpu = jax.default_backend() == "gpu"
    networks = {"vgg16": models.vgg("D")} if on_gpu else {"vgg9": models.vgg9()}
    networks["resnet20"] = models.resnet(20)
    size, dtype = (1024, jnp.bfloat16) if on_gpu else (BATCH, None)
    for name, architecture in networks.items():
        method, batch = method_of(architecture, dtype), batch_of(architecture, size)
        state = method.init(jax.random.key(0), batch)
        forms = {"ours": jax.jit(method.step).lower(state, batch).compile()}
        if not on_gpu and gathered_conv.unavailable(jnp.float32) is None:
            with ops.conv_impl("native"):
                forms["native"] = jax.jit(method.step).lower(state, batch).compile()
        run = {form: partial(step, state, batch) for form, step in forms.items()}
        run["torch"] = torch_peers.train_step(architecture, batch, bf16=on_gpu, compiled=on_gpu)
        times = contest(run, pairs=pairs, warmup=3)
        target = 1.0 if on_gpu else None
        against = "torch.compile, channels_last, bf16" if on_gpu else "torch CPU, channels_last, equal threads"
        for form in forms:
            case = f"torch_step.{name}" + ("" if form == "ours" else ".native")
            yield results.time_ratio(
                case, times, form, "torch", target=target, against=against + (", conv_impl native" * (form != "ours"))
            )


def ceilings(pairs: int) -> Iterator[dict[str, Any]]:
    """What the device can do at most, to read the other numbers by: copy bandwidth and bf16 matrix products."""
    words, side = 2**28, 8192
    source = jax.random.normal(jax.random.key(0), (words,))
    square = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    copy, matmul = jax.jit(lambda x: x + 1), jax.jit(lambda x: x @ x)
    times = contest({"copy": lambda: copy(source), "matmul": lambda: matmul(square)}, pairs=pairs, warmup=3)
    for name, metric, work in (("copy", "GB/s", 8e-9 * words), ("matmul", "TFLOP/s", 2e-12 * side**3)):
        rates = [work / second for second in times.wall[name]]
        low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
        yield results.case(f"ceiling.{name}", metric, middle, better="higher", spread=(low, high), n=pairs)


def import_time(pairs: int) -> Iterator[dict[str, Any]]:
    """Seconds that `import jaxeff`, and then every room, adds to `import jax, flax`, in fresh interpreters."""
    rooms = "; import jaxeff.costs, jaxeff.data, jaxeff.models, jaxeff.parallel, jaxeff.quadratic, jaxeff.training"
    for name, target, more in (("import", 0.3, ""), ("import.every_room", None, rooms)):
        program = (
            "import time, jax, flax; start = time.perf_counter(); import jaxeff"
            f"{more}; print(time.perf_counter() - start)"
        )
        took = []
        for _ in range(pairs):
            output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            took.append(float(output))
        low, middle, high = statistics.quantiles(took, n=4, method="inclusive")
        yield results.case(
            name, "seconds", middle, better="lower", target=target, spread=(low, high), n=pairs,
            against="above `import jax, flax`",
        )  # fmt: skip


CASES: Mapping[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "scan_grad": scan_grad,
    "client_vmap": client_vmap,
    "client_vmap_stock": client_vmap_stock,
    "toplevel": toplevel,
    "grouped": grouped,
    "compile": compile_time,
    "torch_step": torch_step,
    "ceilings": ceilings,
    "import": import_time,
}
ON_GPU = ("ceilings", "torch_step")


def main(argv: list[str] | None = None) -> None:
    """Runs the chosen cases and writes what they measured."""
    suite.main("ops", __doc__, CASES, ON_GPU, argv)


def _plain_conv(x, kernel, impl, numbers):
    return ops.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, impl=impl)


def _first(batches):
    return jax.tree.map(lambda a: a[0], batches)


if __name__ == "__main__":
    main()
