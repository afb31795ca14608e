"""What happens inside a network of quadratic neurons: parts of activations, statistics, gradients, and where it looks.

Every function takes a Linen module (a `jaxeff.models.Network`, or one of the user's own with quadratic layers inside),
its variables and images, and returns arrays; `jaxeff.quadratic.figures` draws each of them. Layers are named by their
path: "conv1", "stage1_block1/conv2".

    parts = diagnose.activation_parts(network, variables, images, "conv2")
    figures.draw_activation_parts(images, parts, "parts.png")

Letters: N images of H x W pixels, L layers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxeff.ops import Moments
from jaxeff.quadratic import kinds
from jaxeff.quadratic.backward import OUT
from jaxeff.quadratic.layers import QuadraticConv, QuadraticDense
from jaxeff.quadratic.neurons import conv_block, dense_block


class ActivationParts(NamedTuple):
    """Channel means of what a layer's neurons give before output norm and activation; float32 [N, H, W].

    Attributes:
      second: the part of even order in the projections; for (a.x) * (b.x) + c.x it is the product.
      first: the part of odd order; there it is c.x.
      total: their sum.
    """

    second: jax.Array
    first: jax.Array
    total: jax.Array


class LayerStatistics(NamedTuple):
    """Numbers of one layer over a batch.

    Attributes:
      rms: root mean square of every projection after its norm and activation, by name.
      kurtosis: fourth standardised moment of every projection, by name; 3 for normally distributed values.
      quad_ratio: rms of the even part over rms of the odd part, see `ActivationParts`; infinite without an odd part.
    """

    rms: dict[str, float]
    kurtosis: dict[str, float]
    quad_ratio: float


class Histogram(NamedTuple):
    """Counts [bins] between edges [bins + 1], and root mean square and kurtosis of all values."""

    edges: np.ndarray
    counts: np.ndarray
    rms: float
    kurtosis: float


class GradientNorms(NamedTuple):
    """Norm of the gradient of every layer's kernels, in the order of the forward pass.

    Attributes:
      layers: names of the L layers.
      norms: Euclidean norms [L].
      ratio: last over first; far above 1 where gradients vanish on their way back.
    """

    layers: tuple[str, ...]
    norms: np.ndarray
    ratio: float


def activation_parts(
    network: nn.Module, variables: Mapping[str, Any], images: jax.Array, layer: str
) -> ActivationParts:
    """Splits the activation of a convolution into its second-order and first-order part.

    Any kind of neuron is split by order: the even part stays when the projections of x change sign, the odd part
    changes its own. Branch norms and biases belong to the projections, with running statistics.

    Args:
      network: a module with quadratic layers (kind "first_order" included).
      variables: its variables.
      images: [N, H, W, C], floating point.
      layer: a convolution's path.

    Returns:
      Channel means, resized (cubic) to the images' H x W.

    Raises:
      ValueError: for a layer that is not one of the quadratic convolutions, which are listed.
    """

    @jax.jit
    def run(variables, images):
        def split(module, x):
            even, odd, _ = _neurons(module, x)
            return (even.mean(-1), odd.mean(-1)) if isinstance(module, QuadraticConv) else None

        maps = {name: found for name, found in _watched(network, variables, images, split).items() if found is not None}
        if layer not in maps:
            raise ValueError(f"layer must be a quadratic convolution, got {layer!r}; there are: {', '.join(maps)}")
        second, first = (_resized(part, images) for part in maps[layer])
        return ActivationParts(second, first, second + first)

    return run(variables, images)


def layer_statistics(network: nn.Module, variables: Mapping[str, Any], images: jax.Array) -> dict[str, LayerStatistics]:
    """Measures the projections of every quadratic layer, in one forward pass with running statistics.

    Args:
      network, variables, images: as in `activation_parts`.

    Returns:
      The numbers of every layer by its path, in the order of the forward pass.

    Raises:
      ValueError: if the network has no quadratic layer.
    """
    names: list[str] = []

    @jax.jit
    def run(variables, images):
        def measure(module, x):
            even, odd, projections = _neurons(module, x)
            numbers = {name: (_rms(z), _kurtosis(z)) for name, z in projections.items()}
            return numbers, (_rms(even), _rms(odd))

        found = _watched(network, variables, images, measure)
        names.extend(found)  # dictionaries leave jit in alphabetical order
        return found

    found = jax.device_get(run(variables, images))
    if not found:
        raise ValueError(f"{type(network).__name__} has no quadratic layer, so there is nothing to measure")
    statistics = {}
    for name in names:
        numbers, (even, odd) = found[name]
        statistics[name] = LayerStatistics(
            {p: float(rms) for p, (rms, _) in numbers.items()},
            {p: float(kurtosis) for p, (_, kurtosis) in numbers.items()},
            float(even / odd) if odd else math.inf,
        )
    return statistics


def kernel_histograms(tree: Mapping[str, Any], bins: int = 41) -> dict[str, dict[str, Histogram]]:
    """Histograms of the kernels of every layer, or of their gradients.

    Args:
      tree: `variables["params"]`, or gradients by them.
      bins: number of equal intervals around zero, the same for all projections of a layer.

    Returns:
      For every layer's path the histogram of each projection ("kernel" for layers that are not quadratic).

    Raises:
      ValueError: for `bins` below 1, or a kernel that holds a number that is not finite.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    layers: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in traverse_util.flatten_dict(dict(tree)).items():
        if path[-1].startswith("kernel"):
            values = np.asarray(leaf, np.float64).ravel()
            if not np.isfinite(values).all():
                raise ValueError(f"{'/'.join(path)} holds numbers that are not finite; training has diverged there")
            layers.setdefault(_name(path[:-1]), {})[path[-1].removeprefix("kernel_")] = values
    histograms: dict[str, dict[str, Histogram]] = {}
    for name, kernels in layers.items():
        limit = max(float(np.abs(values).max(initial=0.0)) for values in kernels.values()) or 1.0
        edges = np.linspace(-limit, limit, bins + 1)
        histograms[name] = {
            p: Histogram(edges, np.histogram(values, edges)[0], float(_rms(values, np)), float(_kurtosis(values, np)))
            for p, values in kernels.items()
        }
    return histograms


def gradient_norms(
    network: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    *,
    train: bool = True,
    rngs: dict[str, jax.Array] | None = None,
) -> GradientNorms:
    """Norm of the gradient by depth, which shows gradients that vanish or explode.

    Args:
      network: a module, called as network(images, train).
      variables: its variables.
      images: [N, H, W, C], floating point.
      loss: from the network's output to a number: `lambda logits: cross_entropy(logits, labels).mean()`.
      train: whether batch norms use the statistics of these images.
      rngs: keys by name, where the network needs them (dropout).

    Returns:
      The norms of all layers with kernels, quadratic or not.
    """
    order: list[str] = []
    rest = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def run(params, images):
        def watch(next_function, args, kwargs, context):
            own = context.module.variables.get("params", {}) if context.method_name == "__call__" else {}
            if any(key.startswith("kernel") for key in own):
                order.append(_name(context.module.path))
            return next_function(*args, **kwargs)

        def objective(params):
            with nn.intercept_methods(watch):
                y, _ = network.apply({"params": params, **rest}, images, train, mutable=list(rest), rngs=rngs)
            return loss(y)

        squares: dict[str, jax.Array] = {}
        for path, leaf in traverse_util.flatten_dict(jax.grad(objective)(params)).items():
            if path[-1].startswith("kernel"):
                name = _name(path[:-1])
                squares[name] = squares.get(name, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        return jax.tree.map(jnp.sqrt, squares)

    norms = jax.device_get(run(variables["params"], images))
    layers = tuple(dict.fromkeys(order))
    values = np.array([norms[name] for name in layers])
    return GradientNorms(layers, values, float(values[-1] / values[0]) if values[0] else math.inf)


def attention_map(network: nn.Module, variables: Mapping[str, Any], images: jax.Array, layer: str) -> jax.Array:
    """Where a layer is active: the sum over channels of its squared output (Zagoruyko and Komodakis 2017, 1612.03928).

    Args:
      network, variables, images: as in `activation_parts`; any network of convolutions will do.
      layer: path of any module with an output [N, h, w, C]: a layer with its norm and activation, or a block.

    Returns:
      Float32 [N, H, W]: maps of Euclidean norm one, resized (cubic, no value below zero) to the images.

    Raises:
      ValueError: for a module that is not there or gives no map; those that do are listed.
    """

    @jax.jit
    def run(variables, images):
        maps = jnp.sum(jnp.square(_output(network, variables, images, layer)[1].astype(jnp.float32)), -1)
        return jnp.maximum(_resized(_unit(maps, jnp.linalg.norm(maps, axis=(1, 2))), images), 0)

    return run(variables, images)


def grad_cam(
    network: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    layer: str,
    classes: jax.Array | None = None,
) -> jax.Array:
    """Where a layer speaks for a class: Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391).

    Args:
      network, variables, images, layer: as in `attention_map`; the network gives logits [N, classes].
      classes: int [N]; None for the class that the network predicts.

    Returns:
      Float32 [N, H, W] in 0..1: the layer's channels, weighted by the mean gradient of the class's logit, summed and
      rectified; the largest value of each map is one before it is resized (cubic), all are zero where nothing speaks
      for the class.

    Raises:
      ValueError: as `attention_map`; for classes that the network does not have.
    """
    if classes is not None:
        count = jax.eval_shape(network.apply, variables, images).shape[-1]
        known = not isinstance(classes, jax.core.Tracer)
        if known:
            classes = cast(jax.Array, np.asarray(classes))
        right = classes.shape == images.shape[:1] and jnp.issubdtype(classes.dtype, jnp.integer)
        if not right or (known and not np.all((0 <= classes) & (classes < count))):
            raise ValueError(f"classes must be integers [{len(images)}] of 0..{count - 1}, got {classes}")

    @jax.jit
    def run(variables, images, classes):
        shape = jax.eval_shape(lambda v, x: _output(network, v, x, layer)[1], variables, images)

        def score(change):
            logits, activation = _output(network, variables, images, layer, change)
            chosen = logits.max(-1) if classes is None else jnp.take_along_axis(logits, classes[:, None], -1)
            return chosen.sum(), activation

        gradient, activation = jax.grad(score, has_aux=True)(jnp.zeros(shape.shape, shape.dtype))
        weights = gradient.astype(jnp.float32).mean((1, 2), keepdims=True)
        maps = jax.nn.relu(jnp.sum(weights * activation.astype(jnp.float32), -1))
        return jnp.clip(_resized(_unit(maps, maps.max((1, 2))), images), 0, 1)

    return run(variables, images, classes)


# --- looking inside ---------------------------------------------------------------------------------------------------


def _watched(network, variables, images, use) -> dict[str, Any]:
    """use(module, its input) of every quadratic layer, by path, in the order of the forward pass."""
    found: dict[str, Any] = {}

    def watch(next_function, args, kwargs, context):
        module = context.module
        if isinstance(module, QuadraticConv | QuadraticDense) and context.method_name == "__call__":
            found[_name(module.path)] = use(module, args[0])
        return next_function(*args, **kwargs)

    with nn.intercept_methods(watch):
        network.apply(variables, images)
    return found


def _neurons(module, x) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Even and odd part of what the neurons of a bound layer give, and their projections, in float32."""
    of = {p.name: p.of for p in kinds.get(module.kind).projections}
    norms = module.variables.get("batch_stats", {})
    statistics = {name.removeprefix("norm_"): Moments(**values) for name, values in norms.items()}
    settings = dict(kind=module.kind, branch_norm=module.branch_norm, branch_act=module.branch_act)
    settings |= dict(precision=module.precision, impl="separate")
    block: Callable[..., Any] = dense_block
    if isinstance(module, QuadraticConv):
        block = conv_block
        settings |= module.window._asdict()
        settings |= dict(conv_general_dilated=module.conv_general_dilated)
    projections: dict[str, jax.Array] = {}

    def kept(name, z):
        projections[name] = z
        return z

    def flipped(name, z):
        return -z if of[name] == "x" else z

    params = {name: value for name, value in module.variables["params"].items() if name != f"norm_{OUT}"}
    x = x.astype(jnp.float32)
    y, mirrored = (block(params, x, statistics or None, branch=b, **settings)[0] for b in (kept, flipped))
    return (y + mirrored) / 2, (y - mirrored) / 2, projections


def _output(network, variables, images, layer: str, change: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The network's output and that of a module in it, to which a change is added first."""
    outputs: dict[str, jax.Array] = {}

    def watch(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        name = "/".join(context.module.path)
        if context.method_name == "__call__" and getattr(y, "ndim", 0) == 4:
            outputs[name] = y
            if name == layer and change is not None:
                y = y + change
        return y

    with nn.intercept_methods(watch):
        result = network.apply(variables, images)
    if layer not in outputs:
        raise ValueError(f"layer must be a module with an output [N, h, w, C], got {layer!r}; {', '.join(outputs)} are")
    return result, outputs[layer]


def _name(path: tuple[str, ...]) -> str:
    """A layer's path; `jaxeff.models.Network` calls the module inside of every layer "layer"."""
    return "/".join(path[:-1] if path[-1:] == ("layer",) else path)


def _resized(maps: jax.Array, images: jax.Array) -> jax.Array:
    return jax.image.resize(maps.astype(jnp.float32), images.shape[:3], "cubic")


def _unit(maps: jax.Array, size: jax.Array) -> jax.Array:
    return maps / jnp.where(size > 0, size, 1)[:, None, None]


def _rms(values: Any, numpy: Any = jnp) -> Any:
    return numpy.sqrt(numpy.mean(values * values))


def _kurtosis(values: Any, numpy: Any = jnp) -> Any:
    centred = values - values.mean()
    variance = numpy.mean(centred**2)
    return numpy.mean(centred**4) / numpy.where(variance > 0, variance, 1) ** 2
