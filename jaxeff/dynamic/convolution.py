"""The gated convolution: what is kept is chosen from the input, and an engine computes the rest.

    y = M_out * conv(M_in * x)

M_in has zeros at the dropped channels and columns of each sample, M_out at the dropped output positions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.dynamic import engines, selection
from jaxeff.dynamic.engines import Geometry
from jaxeff.dynamic.masks import top_k_indices
from jaxeff.dynamic.selection import Kept, Reader
from jaxeff.dynamic.settings import RATIOS, DynamicSpec
from jaxeff.ops import autotune


class Engine(NamedTuple):
    """A way to compute a gated convolution.

    Attributes:
      saves: along which of "channels", "columns" and "outputs" it leaves out what is dropped; elsewhere it masks.
      run: function (window, settings, x, kernel, kept) -> y.
      exact: whether it equals masking; False for an approximation, which "auto" never takes.
      gpu: whether it is made for GPU; elsewhere "auto" never takes it.
      misfit: function (window, settings, dtype) -> why it cannot compute a convolution, or None.
    """

    saves: tuple[str, ...]
    run: Callable[[Geometry, DynamicSpec, jax.Array, jax.Array, Kept], jax.Array]
    exact: bool = True
    gpu: bool = False
    misfit: Callable[[Geometry, DynamicSpec, Any], str | None] = lambda window, settings, dtype: None


def conv(
    x: jax.Array,
    kernel: jax.Array,
    settings: DynamicSpec,
    *,
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: Any = None,
    kept: Kept | None = None,
) -> jax.Array:
    """Convolution of what a gate keeps of its input.

    Args:
      x: [N, H, W, C], floating point.
      kernel: [kh, kw, C, O], same dtype.
      settings: what is dropped, and the engine.
      strides: one for both axes or two.
      padding: "SAME", "VALID" or two (low, high) pairs.
      dilation: of the kernel, one for both axes or two.
      precision: as in lax.
      kept: indices of another gate (learned, or shared between layers) in the place of those of the attention; their
        numbers may differ from the settings' ratios.

    Returns:
      [N, H', W', O]. Gradients pass what is kept, and only that; none pass through the choice.

    Raises:
      TypeError: if x is not floating point.
      ValueError: for shapes that do not fit, a group size or tile that does not divide, an unknown engine or one that
        has nothing to save here.
    """
    _check_operands(x, kernel)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    window = engines.geometry(x.shape, kernel.shape, _two(strides), padding, _two(dilation), precision)
    if min(*window.padding[0], *window.padding[1]) < 0:
        raise ValueError(f"padding of a gated convolution must not be negative, got {window.padding}; crop x first")
    reader = Reader(window, (kernel.shape[0], kernel.shape[1]))
    own = kept is None
    if kept is None:
        kept = selection.select(x, settings, reader)
    name = resolved(settings, kept, x, kernel, window)
    engine = ENGINES[name]
    dropped = kept._replace(**dict.fromkeys(engine.saves))
    if own:
        left = selection.masked_by_scores(x, kept, set(RATIOS) - set(engine.saves), settings)
    else:
        left = selection.masked(x, dropped, settings)
    y = engine.run(window, settings, left, kernel, kept)
    return selection.masked_outputs(y, dropped, settings)


def resolved(settings: DynamicSpec, kept: Kept, x: Any, kernel: Any, window: Geometry) -> str:
    """Name of the engine that runs: `settings.engine`, or for "auto" what `jaxeff.dynamic.tune` found, else "mask".

    Raises:
      ValueError: for an unknown engine, or one that has nothing to save here.
    """
    name: str = settings.engine
    if name == "auto":
        name = autotune.lookup(signature(settings, x, kernel, window)) or "mask"
    if name not in ENGINES:
        raise ValueError(f"engine must be 'auto' or one of {', '.join(map(repr, ENGINES))}, got {name!r}")
    missing = [axis for axis in ENGINES[name].saves if getattr(kept, axis) is None]
    if missing and any(getattr(settings, axis) for axis in RATIOS) and not all(getattr(settings, a) for a in missing):
        raise ValueError(f"engine {name!r} leaves out {' and '.join(missing)}, but none are dropped: take another")
    return "mask" if missing else name


def candidates(settings: DynamicSpec, x: Any, window: Geometry) -> list[str]:
    """Names of the exact engines that can compute a convolution of x and save something there, and "mask"."""
    return [
        name
        for name, engine in ENGINES.items()
        if engine.exact
        and (jax.default_backend() == "gpu" or not engine.gpu)
        and all(getattr(settings, axis) for axis in engine.saves)
        and not engine.misfit(window, settings, x.dtype)
    ]


def signature(settings: DynamicSpec, x: Any, kernel: Any, window: Geometry) -> str:
    """The name of a gated convolution in the table of fastest engines."""
    drops = dataclasses.replace(settings, engine="auto")
    return autotune.signature("gated convolution", (x, kernel), tuple(window), drops)


def _mask(window, settings, x, kernel, kept):
    return engines.convolve(window, x, kernel)


def _channels(window, settings, x, kernel, kept):
    return engines.gathered_channels(window, x, kernel, _units(kept, settings))


def _shared(window, settings, x, kernel, kept):
    # The batch votes: mean attention of all samples decides for each of them.
    count = kept.channels.shape[-1]
    groups = top_k_indices(selection.group_scores(x, settings).mean(0), count)
    return engines.shared_channels(window, x, kernel, engines.of_groups(groups, settings.group_size))


def _grouped(window, settings, x, kernel, kept):
    return engines.grouped_channels(window, settings.group_size, x, kernel, kept.channels)


def _fused(window, settings, x, kernel, kept):
    return engines.fused_channels(window, x, kernel, _units(kept, settings)).y


def _slabs(window, settings, x, kernel, kept):
    if jax.default_backend() != "gpu":
        raise ValueError("engine 'slabs' needs a GPU; elsewhere take 'grouped', or 'auto'")
    return engines.group_slabs(window, settings.group_size, x, kernel, kept.channels).y


def _slab_misfit(window, settings, dtype):
    return engines.misfit(window, settings.group_size, dtype)


def _columns(window, settings, x, kernel, kept):
    size, flat = _flat(x)
    columns = selection.positions_of(kept.columns, settings.tile, size)
    return engines.gathered_columns(window, size, flat, kernel, columns)


def _both(window, settings, x, kernel, kept):
    size, flat = _flat(x)
    columns = selection.positions_of(kept.columns, settings.tile, size)
    return engines.gathered_both(window, size, flat, kernel, columns, _units(kept, settings))


def _output_columns(window, settings, x, kernel, kept):
    size, flat = _flat(x)
    out = engines.out_size(window, size, kernel.shape[:2])
    outputs = selection.positions_of(kept.outputs, settings.tile, out)
    return engines.output_columns(window, size, flat, kernel, outputs).reshape(len(x), *out, -1)


def _output_tiles(window, settings, x, kernel, kept):
    size, _ = _flat(x)
    return engines.output_tiles(window, size, settings.tile, x, kernel, kept.outputs)


ENGINES: dict[str, Engine] = {
    "mask": Engine((), _mask),
    "channels": Engine(("channels",), _channels),
    "shared_channels": Engine(("channels",), _shared, exact=False),
    "grouped": Engine(("channels",), _grouped),
    "fused": Engine(("channels",), _fused, gpu=True),
    "slabs": Engine(("channels",), _slabs, gpu=True, misfit=_slab_misfit),
    "columns": Engine(("columns",), _columns),
    "channels_and_columns": Engine(("channels", "columns"), _both),
    "output_columns": Engine(("outputs",), _output_columns),
    "output_tiles": Engine(("outputs",), _output_tiles),
}
"""The engines by name."""


def _units(kept, settings) -> jax.Array:
    return engines.of_groups(kept.channels, settings.group_size)


def _flat(x: jax.Array) -> tuple[tuple[int, int], jax.Array]:
    return (x.shape[1], x.shape[2]), x.reshape(len(x), -1, x.shape[-1])


def _two(value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"strides and dilation are one number or two, at least 1, got {value!r}")
    return pair[0], pair[1]


def _check_operands(x: jax.Array, kernel: jax.Array) -> None:
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2]:
        raise ValueError(f"x must be [N, H, W, C] and kernel [kh, kw, C, O], got {x.shape} and {kernel.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"a gated convolution needs floating-point maps, got {x.dtype}; convert and scale them first")
    if x.dtype != kernel.dtype:
        raise TypeError(f"x is {x.dtype}, but the kernel {kernel.dtype}; they must be the same")
