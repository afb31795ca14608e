"""What gates save on the clock: every gated convolution of a network beside the fastest dense form of it."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxeff.dynamic import convolution
from jaxeff.dynamic.accounting import density
from jaxeff.dynamic.engines import Geometry, convolve, native_conv, out_size
from jaxeff.dynamic.linen import GatedCall, gated_calls, parameter_bytes
from jaxeff.dynamic.selection import planned
from jaxeff.dynamic.tune import with_engine
from jaxeff.ops import autotune, conv_impl, gathered_conv


@dataclasses.dataclass(frozen=True)
class LayerSpeed:
    """One gated convolution on the clock.

    Attributes:
      path: of the layer.
      shapes: "[N, H, W, C] x [kh, kw, C, O]".
      dense_form: name of the fastest dense form, see `dense_forms`; "mask" where even masking was faster.
      engine: name of the engine that its gate resolves to.
      seconds: median time of "dense" (the fastest form), "mask" and "engine".
      counted: how many times fewer multiply-accumulates are left, at least 1.
      real: how many times faster than dense the engine is, the median over the rounds.
    """

    path: str
    shapes: str
    dense_form: str
    engine: str
    seconds: dict[str, float]
    counted: float
    real: float

    @property
    def efficiency(self) -> float:
        """Share of the counted speed-up that is real."""
        return self.real / self.counted


@dataclasses.dataclass(frozen=True)
class SpeedReport:
    """What `speed_report` found: the layers in the order in which they run."""

    rows: tuple[LayerSpeed, ...]

    @property
    def efficiency(self) -> float:
        """Geometric mean over the layers."""
        return math.exp(statistics.fmean(math.log(row.efficiency) for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and numbers, ready for JSON."""
        rows = [{**dataclasses.asdict(row), "efficiency": row.efficiency} for row in self.rows]
        return {"layers": rows, "efficiency": self.efficiency}

    def __str__(self) -> str:
        from jaxeff.costs.report import aligned

        header = ("layer", "shapes", "dense", "mask", "engine", "counted", "real", "efficiency")
        cells = [
            (
                row.path,
                row.shapes,
                f"{row.dense_form} {1e3 * row.seconds['dense']:.2f} ms",
                f"{1e3 * row.seconds['mask']:.2f} ms",
                f"{row.engine} {1e3 * row.seconds['engine']:.2f} ms",
                f"{row.counted:.2f}x",
                f"{row.real:.2f}x",
                f"{row.efficiency:.2f}",
            )
            for row in self.rows
        ]
        return "\n".join([*aligned([header, *cells]), f"efficiency, geometric mean: {self.efficiency:.2f}"])


def speed_report(
    module: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, rounds: int = 15
) -> SpeedReport:
    """Measures every gated convolution of a network: dense in its fastest form, masked, and with its engine.

    Kernels are as far from the processor as the size of the network leaves them, see `jaxeff.ops.autotune.seconds`.

    Args:
      module: a Linen module with gates, for example `jaxeff.models.Network` or `jaxeff.dynamic.Gated`; run
        `jaxeff.dynamic.tune` before, or engines that are "auto" are "mask".
      *inputs: what it is called with: pytrees of arrays, `jax.ShapeDtypeStruct` and numbers; speeds depend on the size
        of the batch.
      options: keyword arguments of its call.
      rounds: how often everything is timed, in turn.

    Raises:
      ValueError: if the network has no gates.
    """
    calls = gated_calls(module, *inputs, options=options)
    if not calls:
        raise ValueError("the network has no gated convolutions; jaxeff.dynamic.gate or Gated puts gates into it")
    measured: dict[str, LayerSpeed] = {}
    footprint, rows = parameter_bytes(module, *inputs, options=options), []
    for call in calls:
        name = call.signature + call.settings.engine
        if name not in measured:
            measured[name] = _measure(call, rounds, footprint)
        rows.append(dataclasses.replace(measured[name], path=call.path))
    return SpeedReport(tuple(rows))


def dense_forms(window: Geometry, dtype: Any = jnp.float32) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Forms of the convolution of x [N, H, W, C] with a kernel [kh, kw, C, O], without a gate.

    "ops" is the library's own convolution, "lax" XLA's, "patches" one matrix product of patches, which
    "patches_barrier" keeps from being fused with their making. "native", where there is a compiler for it, is the
    compiled code of the engines with nothing left out.
    """
    native = {} if gathered_conv.unavailable(dtype) else {"native": partial(native_conv, window)}
    return {
        "ops": partial(convolve, window),
        "lax": partial(_stock, window),
        "patches": partial(_product_of_patches, window, False),
        "patches_barrier": partial(_product_of_patches, window, True),
        **native,
    }


def _measure(call: GatedCall, rounds: int, footprint: int) -> LayerSpeed:
    shown = f"{list(call.x.shape)} x {list(call.kernel.shape)}"
    out = out_size(call.window, call.x.shape[1:3], call.kernel.shape[:2])
    kept = planned(call.settings, call.x.shape, out)
    few = call.kernel.shape[-1] if call.features is None else call.features
    if call.features is not None:
        kept = kept._replace(features=jnp.zeros((call.x.shape[0], few), jnp.int32))
    engine = convolution.resolved(call.settings, kept, call.x, call.kernel, call.window)
    forms: dict[str, Callable[..., Any]] = {**dense_forms(call.window, call.x.dtype), "mask": with_engine(call, "mask")}
    contestants = {**forms, "engine": with_engine(call, engine)}
    times = autotune.seconds(contestants, (call.x, call.kernel), rounds, footprint=footprint)
    median = {name: statistics.median(values) for name, values in times.items()}
    dense = min(forms, key=median.__getitem__)
    real = statistics.median(a / b for a, b in zip(times[dense], times["engine"], strict=True))
    seconds = {"dense": median[dense], "mask": median["mask"], "engine": median["engine"]}
    counted = call.kernel.shape[-1] / few / density(call.settings, call.x.shape[1:], out)
    return LayerSpeed(call.path, shown, dense, engine, seconds, counted, real)


def _stock(window: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    with conv_impl("lax"):
        return convolve(window, x, kernel)


def _product_of_patches(window: Geometry, barrier: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    height, width = out_size(window, x.shape[1:3], kernel.shape[:2])
    (down, across), views = window.strides, []
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            top, left = i * window.dilation[0], j * window.dilation[1]
            rows = slice(top, top + (height - 1) * down + 1, down)
            views.append(padded[:, rows, left : left + (width - 1) * across + 1 : across])
    patches = jnp.concatenate(views, -1)
    if barrier:
        patches = lax.optimization_barrier(patches)
    return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), precision=window.precision)
