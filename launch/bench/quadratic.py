"""Benchmarks of quadratic layers: memory of the compiled gradient, what it costs in time, and layers beside torch.

    python -m launch.bench.quadratic [--case NAME]... [--pairs 9] [--device cpu|gpu] [--json FILE]

Memory is what XLA reports of the compiled program. `make bench` keeps the results in
launch/bench/results/quadratic.json.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff import models, quadratic, spec
from jaxeff.quadratic import convert
from jaxeff.quadratic.backward import SAVES
from launch.bench import results, suite
from launch.bench.timing import contest

MEBIBYTE = 2**20


# --- workloads --------------------------------------------------------------------------------------------------------


def network(architecture: spec.Architecture, save: str, dtype: Any = None) -> models.Network:
    """The network whose layers run under a memory policy."""
    conv = partial(quadratic.conv_layer, save=save)
    return models.Network(architecture, conv=conv, dense=quadratic.dense_layer, dtype=dtype)


def qvgg7() -> spec.Architecture:
    """QuadraLib's QVGG-7 with all its norms."""
    return spec.quadratize(models.vgg("Q7"), "quadralib", branch_norm="batch")


def gradient(module: models.Network) -> Callable[..., Any]:
    """(variables, images) -> gradient by the parameters of a scalar of the logits, in training."""

    def step(variables, images):
        rest = {name: value for name, value in variables.items() if name != "params"}

        def value(params):
            logits, changed = module.apply({"params": params, **rest}, images, True, mutable=list(rest))
            return jax.nn.logsumexp(logits, -1).mean(), changed

        return jax.grad(value, has_aux=True)(variables["params"])

    return step


def temporaries(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that a compiled call holds besides its arguments and results."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def memory_per_image(architecture: spec.Architecture, save: str, low: int = 32, high: int = 128) -> float:
    """MiB by which the temporaries of the gradient grow with every image of the batch."""
    module = network(architecture, save)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *architecture.input_shape)))
    sizes = [
        temporaries(gradient(module), variables, jax.ShapeDtypeStruct((n, *architecture.input_shape), jnp.float32))
        for n in (low, high)
    ]
    return (sizes[1] - sizes[0]) / (high - low) / MEBIBYTE


def blocks_gradient(save: str, depth: int, scanned: bool, norms: bool) -> float:
    """Temporaries of the gradient of a stack of equal blocks (32 images, 32x32x64), in output tensors."""
    settings = dict(branch_norm="batch", out_norm="batch", act="relu") if norms else {}
    batch, size, channels = 32, 32, 64
    params: dict[str, Any] = {
        f"kernel_{p}": jax.ShapeDtypeStruct((depth, 3, 3, channels, channels), jnp.float32) for p in "abc"
    }
    for name in ("a", "b", "c", "out") if norms else ():
        leaf = jax.ShapeDtypeStruct((depth, channels), jnp.float32)
        params[f"norm_{name}"] = {"scale": leaf, "bias": leaf}

    def block(x, params):
        return quadratic.conv_block(params, x, save=save, **settings)[0]

    def loss(params, x):
        if scanned:
            return lax.scan(lambda x, params: (block(x, params), None), x, params)[0].sum()
        for i in range(depth):
            x = block(x, jax.tree.map(lambda leaf: leaf[i], params))  # noqa: B023
        return x.sum()

    x = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    return temporaries(jax.grad(loss, (0, 1)), params, x) / (4 * batch * size * size * channels)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_qvgg7(pairs: int) -> Iterator[dict[str, Any]]:
    """MiB per image of the compiled gradient of QVGG-7 with all norms, between batch 32 and 128."""
    against = {"x": "plain differentiation, see memory_qvgg7.all"}
    for save in reversed(SAVES):
        name = "memory_qvgg7" if save == "x" else f"memory_qvgg7.{save}"
        yield results.case(
            name,
            "MiB per image",
            memory_per_image(qvgg7(), save),
            better="lower",
            target=2.5 if save == "x" else None,
            against=against.get(save, f"save={save!r}"),
        )
    for save in ("all", "x"):
        value = memory_per_image(models.vgg("D"), save)
        yield results.case(
            f"memory_qvgg7.first_order_vgg16_{save}", "MiB per image", value, better="lower", against="13 convolutions"
        )


def memory_blocks(scanned: bool, pairs: int) -> Iterator[dict[str, Any]]:
    """Output tensors by which the compiled gradient grows with each quadratic block, from depth 4 to 8."""
    base, target = ("memory_scan", 1.1) if scanned else ("memory_unrolled", 2.0)
    for norms in (True, False):
        for save in ("x", "all"):
            growth = (blocks_gradient(save, 8, scanned, norms) - blocks_gradient(save, 4, scanned, norms)) / 4
            setting = "" if norms and save == "x" else f".{'norms' if norms else 'plain'}_{save}"
            yield results.case(
                base + setting,
                "output tensors per block",
                growth,
                better="lower",
                target=target if save == "x" else None,
                against=f"save={save!r}, {'all norms' if norms else 'no norms'}",
            )


# --- time -------------------------------------------------------------------------------------------------------------


def step_cost(pairs: int) -> Iterator[dict[str, Any]]:
    """Gradient of QVGG-7, batch 64, under each policy beside save='all'."""
    images = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
    contestants = {}
    for save in SAVES:
        module = network(qvgg7(), save)
        variables = jax.jit(module.init)(jax.random.key(0), images)
        contestants[save] = partial(jax.jit(gradient(module)), variables, images)
    times = contest(contestants, pairs=pairs)
    yield results.time_ratio("step_cost", times, "x", "all", target=1.4, against="our own save='all'")
    yield results.time_ratio("step_cost.ab", times, "ab", "all", against="our own save='all'")


def layer_vs_torch(pairs: int) -> Iterator[dict[str, Any]]:
    """A quadratic convolution with branch norms (16 x 32x32x64), forward and backward, beside plain torch."""
    x = jax.random.normal(jax.random.key(0), (16, 32, 32, 64))

    def ours(save):
        layer = quadratic.QuadraticConv(64, branch_norm="batch", save=save)
        variables = jax.jit(layer.init)(jax.random.key(0), x)

        @jax.jit
        def step(variables, x):
            def run(params, x):
                rest = {"batch_stats": variables["batch_stats"]}
                return layer.apply({"params": params, **rest}, x, True, mutable=["batch_stats"])

            y, pullback, changed = jax.vjp(run, variables["params"], x, has_aux=True)
            return y, changed, pullback(y)

        return partial(step, variables, x)

    contestants = {**{save: ours(save) for save in SAVES}, **torch_layers(np.asarray(x))}
    times = contest(contestants, pairs=max(pairs, 15), warmup=3)
    peer = times.fastest("torch NCHW", "torch channels_last")
    yield results.time_ratio("layer_vs_torch", times, "ab", peer, target=1.0, against=f"{peer}, save='ab'")
    for save in ("all", "x"):
        yield results.time_ratio(f"layer_vs_torch.{save}", times, save, peer, against=f"{peer}, save={save!r}")


def torch_layers(images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same layer written plainly in torch: three convolutions, three norms; forward and backward.

    Raises:
      ImportError: if torch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError('this peer needs torch: pip install "jaxeff[bench]"') from error

    torch.set_num_threads(os.cpu_count() or 1)
    channels = images.shape[-1]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            convs = [torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(3)]
            self.convs = torch.nn.ModuleList(convs)
            self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(channels) for _ in range(3)])

        def forward(self, x):
            a, b, c = (norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True))
            return a * b + c

    def step_in(memory_format):
        layer = Layer().to(memory_format=memory_format)
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=memory_format)
        x.requires_grad_()

        def step():
            layer.zero_grad(set_to_none=True)
            x.grad = None
            y = layer(x)
            y.backward(y.detach())

        return step

    formats = {"torch NCHW": torch.contiguous_format, "torch channels_last": torch.channels_last}
    return {name: step_in(memory_format) for name, memory_format in formats.items()}


# --- the auto-builder -------------------------------------------------------------------------------------------------


def ri_vmapped(pairs: int) -> Iterator[dict[str, Any]]:
    """All RI scores of a VGG of nine quadratic convolutions in one call, beside masked evaluations one after another.

    Both compiled before, masks included; and, as a case of its own, with the compilation that a conversion pays once.
    """
    plan = (8, 8, 8, "M", 16, 16, 16, "M", 32, 32, 32)
    architecture = spec.quadratize(models.vgg(plan, input_shape=(28, 28, 1)), "quadralib", branch_norm="batch")
    module, masks, key = network(architecture, "all"), 4, jax.random.key(2)
    images = jax.random.normal(jax.random.key(0), (1000, 28, 28, 1))
    labels = jax.random.randint(jax.random.key(1), (len(images),), 0, 10)
    variables = jax.jit(module.init)(jax.random.key(3), images[:1])
    layers = [path for path, layer in spec.walk(architecture) if isinstance(layer, spec.Conv)]

    mask = jax.jit(convert.mask, static_argnums=1)

    @jax.jit
    def accuracy(variables):
        return jnp.mean(module.apply(variables, images).argmax(-1) == labels)

    def in_one_call():
        return convert.score(module, variables, architecture, images, labels, key, masks=masks).accuracy

    def layer_by_layer():
        clean, drops = accuracy(variables), {}
        for path, keys in zip(layers, jax.random.split(key, (len(layers), masks)), strict=True):
            masked = [accuracy(mask(variables, path, 0.5, k)) for k in keys]
            drops[path] = float(clean) - float(jnp.mean(jnp.stack(masked)))
        return drops

    def compiling(run):
        def cleared():
            jax.clear_caches()
            return run()

        return cleared

    forms = {"ours": in_one_call, "one by one": layer_by_layer}
    times = contest(forms, pairs=pairs)
    against = "masked evaluation layer by layer"
    yield results.time_ratio("ri_vmapped", times, "ours", "one by one", target=0.9, against=f"{against}, both compiled")
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    times = contest({name: compiling(run) for name, run in forms.items()}, pairs=min(pairs, 3))
    jax.config.update("jax_enable_compilation_cache", cached)
    yield results.time_ratio(
        "ri_vmapped.first", times, "ours", "one by one", against=f"{against}, both with their compilation"
    )


# --- training ---------------------------------------------------------------------------------------------------------


def gradient_depth(pairs: int) -> Iterator[dict[str, Any]]:
    """What happens at depth 13 without recipes: decades between the gradients of ends, and layers until overflow."""
    depth = 13
    images = jax.random.normal(jax.random.key(0), (16, 16, 16, 16))
    starts = [(kind, "kaiming") for kind in ("first_order", "t3", "t4", "quadralib")] + [("quadralib", "relinear")]
    for kind, start in starts:
        name = f"gradient_depth.{kind}" + ("_relinear" if start == "relinear" else "")
        for norm in ("batch", None):
            layer = quadratic.QuadraticConv(16, kind=kind, initialization=start, out_norm=norm, act="relu")
            grads, sizes = _gradients_by_depth(layer, depth, images)
            if norm:
                decades = float(np.log10(grads[0] / grads[-1]))
                larger = "first" if decades > 0 else "last"
                against = f"batch norm and ReLU after each of {depth} layers, {start} start; larger: the {larger}"
                decades = abs(decades)
                yield results.case(name, "decades, first to last gradient", decades, better="lower", against=against)
            else:
                finite = int(np.isfinite(sizes).sum())
                against = f"of {depth} layers without norms, {start} start"
                yield results.case(f"{name}_no_norm", "layers until overflow", finite, better="higher", against=against)


def _gradients_by_depth(layer, depth, images):
    """Gradient norms of the kernels and largest outputs of a stack of such layers, by layer."""
    stack = jax.vmap(layer.init, (0, None))(jax.random.split(jax.random.key(1), depth), images)

    def loss(params):
        def step(x, variables):
            x = layer.apply(variables, x, True, mutable=["batch_stats"])[0]
            return x, jnp.abs(x).max()

        x, sizes = lax.scan(step, images, {**stack, "params": params})
        return jnp.mean(x * x), sizes

    grads, sizes = jax.jit(jax.grad(loss, has_aux=True))(stack["params"])
    kernels = [np.asarray(v, np.float64) for name, v in grads.items() if "kernel" in name]
    return np.sqrt(sum(np.square(v).reshape(depth, -1).sum(1) for v in kernels)), np.asarray(sizes)


# --- GPU --------------------------------------------------------------------------------------------------------------


def gpu_fused(pairs: int) -> Iterator[dict[str, Any]]:
    """The fused kernel in bf16, forward and backward, beside three products and their combination."""
    rows, inputs, neurons = 65536, 512, 512
    x = jax.random.normal(jax.random.key(0), (rows, inputs), jnp.bfloat16)
    params = {
        f"kernel_{p}": (jax.random.normal(jax.random.key(i), (inputs, neurons)) / inputs**0.5).astype(jnp.bfloat16)
        for i, p in enumerate("abc")
    }
    contestants = {}
    for impl in ("fused", "separate", "stacked"):

        @jax.jit
        def step(params, x, impl=impl):
            y, pullback = jax.vjp(partial(quadratic.dense, impl=impl), params, x)
            return pullback(y)

        contestants[impl] = partial(step, params, x)
    times = contest(contestants, pairs=max(pairs, 15), warmup=3)
    peer = times.fastest("separate", "stacked")
    yield results.time_ratio("gpu_fused", times, "fused", peer, target=0.85, against=f"{peer} products, bf16")


def gpu_memory(pairs: int) -> Iterator[dict[str, Any]]:
    """Temporaries of the gradient of QVGG-7 in bf16 at batch 1024, save='x' in units of plain differentiation."""
    images = jax.ShapeDtypeStruct((1024, 32, 32, 3), jnp.float32)
    sizes = {}
    for save in ("x", "all"):
        module = network(qvgg7(), save, jnp.bfloat16)
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        sizes[save] = temporaries(gradient(module), variables, images)
    ratio = sizes["x"] / sizes["all"]
    yield results.case("gpu_memory", "memory ratio", ratio, better="lower", target=0.5, against="plain differentiation")


CASES: Mapping[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "memory_qvgg7": memory_qvgg7,
    "memory_unrolled": partial(memory_blocks, False),
    "memory_scan": partial(memory_blocks, True),
    "step_cost": step_cost,
    "layer_vs_torch": layer_vs_torch,
    "ri_vmapped": ri_vmapped,
    "gradient_depth": gradient_depth,
    "gpu_fused": gpu_fused,
    "gpu_memory": gpu_memory,
}
ON_GPU = ("gpu_fused", "gpu_memory", "step_cost")


def main(argv: list[str] | None = None) -> None:
    """Runs the chosen cases and writes what they measured."""
    suite.main("quadratic", __doc__, CASES, ON_GPU, argv)


if __name__ == "__main__":
    main()
