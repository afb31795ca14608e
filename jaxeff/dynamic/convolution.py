"""The gated convolution: what is kept is chosen from the input, and an engine computes the rest.

    y = M_out * conv(M_in * x)

M_in has zeros at the dropped channels and columns of each sample, M_out at the dropped output positions.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff import compat
from jaxeff.dynamic import engines, selection
from jaxeff.dynamic.engines import Geometry
from jaxeff.dynamic.masks import mask_of
from jaxeff.dynamic.selection import Kept, Reader
from jaxeff.dynamic.settings import RATIOS, DynamicSpec
from jaxeff.ops import autotune
from jaxeff.ops.conv import current_impl


class Engine(NamedTuple):
    """A way to compute a gated convolution.

    Attributes:
      saves: along which of "channels", "columns", "outputs" and "widths" it leaves out what is dropped; elsewhere it
        masks.
      run: function (window, settings, x, kernel, kept) -> y.
      exact: whether it equals masking; False for an approximation, which "auto" never takes.
      gpu: whether it is made for GPU; elsewhere "auto" never takes it.
      features: whether it leaves out output channels that are not to be computed; others make them zero.
      misfit: function (window, settings, x) -> why it cannot compute a convolution of x, of which it looks at shape and
        dtype; or None.
    """

    saves: tuple[str, ...]
    run: Callable[[Geometry, DynamicSpec, jax.Array, jax.Array, Kept], jax.Array]
    exact: bool = True
    gpu: bool = False
    features: bool = False
    misfit: Callable[[Geometry, DynamicSpec, Any], str | None] = lambda window, settings, x: None


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
      kept: indices of another gate (learned, or shared between layers) in the place of those of the attention: of each
        sample ascending and no two alike, which nobody can check before they are known. Their numbers may differ from
        the settings' ratios.

    Returns:
      [N, H', W', O]. Gradients pass what is kept, and only that; none pass through the choice.

    Raises:
      TypeError: if x is not floating point, indices are not integers, or padding is a number.
      ValueError: for an empty x, shapes or indices that do not fit, a group size or tile that does not divide, an
        unknown engine or one that does not fit or has nothing to save here.
    """
    _check_operands(x, kernel)
    if isinstance(padding, int):
        raise TypeError(f'padding is "SAME", "VALID" or two (low, high) pairs, got {padding}')
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    # Inside `shard_map`, a shared operand becomes one that may differ, so that its gradient is summed over devices.
    x, kernel = compat.vary(x, compat.varying_axes(kernel)), compat.vary(kernel, compat.varying_axes(x))
    window = engines.geometry(x.shape, kernel.shape, _two(strides), padding, _two(dilation), precision)
    if min(*window.padding[0], *window.padding[1]) < 0:
        raise ValueError(f"padding of a gated convolution must not be negative, got {window.padding}; crop x first")
    reader = Reader(window, (kernel.shape[0], kernel.shape[1]))
    own, out = kept is None, engines.out_size(window, x.shape[1:3], kernel.shape[:2])
    if kept is not None:
        _check_kept(kept, settings, x, (*out, kernel.shape[-1]))
    # The engine comes first: one in compiled code brings its own way to choose.
    planned = selection.planned(settings, x.shape, out) if kept is None else kept
    name = resolved(settings, planned, x, kernel, window)
    engine = ENGINES[name]
    if reason := engine.misfit(window, settings, x):
        raise ValueError(f"engine {name!r} does not fit: {reason}; take 'mask', or 'auto'")
    if kept is None:
        kept = selection.select(x, settings, reader)
    dropped = kept._replace(**dict.fromkeys(engine.saves))
    if engine.features:
        dropped = dropped._replace(features=None)
    if own:
        left = selection.masked_by_scores(x, kept, set(RATIOS) - set(engine.saves), settings)
    else:
        left = selection.masked(x, dropped, settings)
    y = engine.run(window, settings, left, kernel, kept)
    return selection.masked_outputs(y, dropped, settings)


def resolved(settings: DynamicSpec, kept: Kept, x: Any, kernel: Any, window: Geometry) -> str:
    """Name of the engine that runs: `settings.engine`, or for "auto" what `jaxeff.dynamic.tune` found, else "mask".

    On several hosts "auto" is "mask": name an engine there.

    Raises:
      ValueError: for an unknown engine, or one that has nothing to save here.
    """
    name: str = settings.engine
    if name == "auto":
        # Each of several hosts has a table of its own, and all must run one program.
        alone = jax.process_count() == 1
        features = None if kept.features is None else kept.features.shape[-1]
        name = (alone and autotune.lookup(signature(settings, x, kernel, window, features))) or "mask"
        if name not in ENGINES or ENGINES[name].misfit(window, settings, x):
            name = "mask"  # another version measured, or what it was compiled with is no longer there
    if name not in ENGINES:
        raise ValueError(f"engine must be 'auto' or one of {', '.join(map(repr, ENGINES))}, got {name!r}")
    missing = [axis for axis in ENGINES[name].saves if getattr(kept, axis) is None]
    asked = {axis: getattr(settings, axis) for axis in RATIOS}
    if missing and any(asked.values()) and not all(asked.get(axis) for axis in missing):
        raise ValueError(f"engine {name!r} leaves out {' and '.join(missing)}, but none are dropped: take another")
    return "mask" if missing else name


def candidates(settings: DynamicSpec, x: Any, window: Geometry, features: int | None = None) -> list[str]:
    """Names of the exact engines that can compute a convolution of x and save something there, and those that mask.

    Args:
      settings, x, window: of the convolution.
      features: how many output channels are computed; None for all.
    """
    return [
        name
        for name, engine in ENGINES.items()
        if engine.exact
        and (features is not None or engine.saves or not engine.features)
        and (jax.default_backend() == "gpu" or not engine.gpu)
        and all(getattr(settings, axis, 0.0) for axis in engine.saves)
        and not engine.misfit(window, settings, x)
    ]


def signature(settings: DynamicSpec, x: Any, kernel: Any, window: Geometry, features: int | None = None) -> str:
    """The name of a gated convolution, with so many output channels computed, in the table of fastest engines."""
    drops = dataclasses.replace(settings, engine="auto")
    few = () if features is None else (f"{features} features",)
    return autotune.signature(
        "gated convolution", (x, kernel), tuple(window), drops, *few, f"conv_impl {current_impl()}"
    )


def _mask(window, settings, x, kernel, kept):
    return engines.convolve(window, x, kernel)


def _channels(window, settings, x, kernel, kept):
    return engines.gathered_channels(window, x, kernel, _units(kept, settings))


def _shared(window, settings, x, kernel, kept):
    # The batch votes: what most samples keep is kept of all; among equals, what the mean of their attention is higher
    # of, NaN last.
    votes = mask_of(kept.channels, x.shape[-1] // settings.group_size).sum(0)
    order = jnp.lexsort((-selection.group_scores(x, settings).mean(0), -votes))
    groups = jnp.sort(order[: kept.channels.shape[-1]])
    return engines.shared_channels(window, x, kernel, engines.of_groups(groups, settings.group_size))


def _grouped(window, settings, x, kernel, kept):
    return engines.grouped_channels(window, settings.group_size, x, kernel, kept.channels)


def _fused(window, settings, x, kernel, kept):
    return engines.fused_channels(window, x, kernel, _units(kept, settings)).y


def _fused_columns(window, settings, x, kernel, kept):
    columns = _columns_of(kept, settings, x)
    return engines.fused_columns(window, x, kernel, engines.Columns(columns)).y


def _fused_both(window, settings, x, kernel, kept):
    columns = _columns_of(kept, settings, x)
    return engines.fused_columns(window, x, kernel, engines.Columns(columns, _units(kept, settings))).y


def _fused_outputs(window, settings, x, kernel, kept):
    out = engines.out_size(window, (x.shape[1], x.shape[2]), kernel.shape[:2])
    outputs = selection.positions_of(kept.outputs, settings.tile, out)
    return engines.fused_columns(window, x, kernel, engines.Columns(outputs=outputs)).y


def _slabs(window, settings, x, kernel, kept):
    if jax.default_backend() != "gpu":
        raise ValueError("engine 'slabs' needs a GPU; elsewhere take 'grouped', or 'auto'")
    return engines.group_slabs(window, settings.group_size, x, kernel, kept.channels).y


def _tile_slabs(window, settings, x, kernel, kept):
    if jax.default_backend() != "gpu":
        raise ValueError("engine 'tile_slabs' needs a GPU; elsewhere take 'output_tiles', or 'auto'")
    size, _ = _flat(x)
    form = lambda window, parts, kernel: engines.tile_slabs(window, parts, kernel).y
    return engines.output_tiles(window, size, settings.tile, x, kernel, kept.outputs, form)


def _fused_misfit(window, settings, x):
    return None if jnp.dtype(x.dtype).itemsize <= 4 else f"{jnp.dtype(x.dtype)}, where the kernel sums in float32"


def _slab_misfit(window, settings, x):
    return _hopper_misfit() or engines.misfit(window, settings.group_size, x.dtype)


def _tile_slab_misfit(window, settings, x):
    return _hopper_misfit() or engines.tile_misfit(window, x.shape[-1], x.dtype)


def _hopper_misfit():
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if not str(capability).startswith("9."):
        return f"a GPU of compute capability {capability}, where slabs need 9.0"
    return None


def _width_slices(window, settings, x, kernel, kept):
    return engines.width_slices(window, settings.group_size, x, kernel, kept.widths)


def _columns(window, settings, x, kernel, kept):
    size, flat = _flat(x)
    columns = _columns_of(kept, settings, x)
    return engines.gathered_columns(window, size, flat, kernel, columns)


def _both(window, settings, x, kernel, kept):
    size, flat = _flat(x)
    columns = _columns_of(kept, settings, x)
    return engines.gathered_both(window, size, flat, kernel, columns, _units(kept, settings))


def _native_mask(window, settings, x, kernel, kept):
    return engines.native_conv(window, x, kernel)


def _native_features(window, settings, x, kernel, kept):
    return engines.native_conv(window, x, kernel, features=kept.features)


def _native_channels(window, settings, x, kernel, kept):
    return engines.native_conv(window, x, kernel, _units(kept, settings), features=kept.features)


def _native_columns(window, settings, x, kernel, kept):
    columns = _columns_of(kept, settings, x)
    return engines.native_conv(window, x, kernel, columns=columns, features=kept.features)


def _native_both(window, settings, x, kernel, kept):
    columns = _columns_of(kept, settings, x)
    return engines.native_conv(window, x, kernel, _units(kept, settings), columns, kept.features)


def _native_misfit(window, settings, x):
    return engines.native_misfit(x.dtype)


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
    "fused": Engine(("channels",), _fused, gpu=True, misfit=_fused_misfit),
    "fused_columns": Engine(("columns",), _fused_columns, gpu=True, misfit=_fused_misfit),
    "fused_channels_and_columns": Engine(("channels", "columns"), _fused_both, gpu=True, misfit=_fused_misfit),
    "fused_outputs": Engine(("outputs",), _fused_outputs, gpu=True, misfit=_fused_misfit),
    "slabs": Engine(("channels",), _slabs, gpu=True, misfit=_slab_misfit),
    "width_slices": Engine(("widths",), _width_slices),
    "columns": Engine(("columns",), _columns),
    "channels_and_columns": Engine(("channels", "columns"), _both),
    "native_mask": Engine((), _native_mask, misfit=_native_misfit),
    "native_features": Engine((), _native_features, features=True, misfit=_native_misfit),
    "native_channels": Engine(("channels",), _native_channels, features=True, misfit=_native_misfit),
    "native_columns": Engine(("columns",), _native_columns, features=True, misfit=_native_misfit),
    "native_channels_and_columns": Engine(("channels", "columns"), _native_both, features=True, misfit=_native_misfit),
    "output_columns": Engine(("outputs",), _output_columns),
    "output_tiles": Engine(("outputs",), _output_tiles),
    "tile_slabs": Engine(("outputs",), _tile_slabs, gpu=True, misfit=_tile_slab_misfit),
}
"""The engines by name."""


def _units(kept, settings) -> jax.Array:
    return engines.of_groups(kept.channels, settings.group_size)


def _columns_of(kept, settings, x) -> jax.Array:
    return selection.positions_of(kept.columns, settings.tile, (x.shape[1], x.shape[2]))


def _flat(x: jax.Array) -> tuple[tuple[int, int], jax.Array]:
    return (x.shape[1], x.shape[2]), x.reshape(len(x), -1, x.shape[-1])


def _two(value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, numbers.Integral) else tuple(value)  # type: ignore[arg-type]
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"strides and dilation are one number or two, at least 1, got {value!r}")
    return int(pair[0]), int(pair[1])


def _check_operands(x: jax.Array, kernel: jax.Array) -> None:
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2]:
        raise ValueError(f"x must be [N, H, W, C] and kernel [kh, kw, C, O], got {x.shape} and {kernel.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"a gated convolution needs floating-point maps, got {x.dtype}; convert and scale them first")
    if x.dtype != kernel.dtype:
        raise TypeError(f"x is {x.dtype}, but the kernel {kernel.dtype}; they must be the same")
    if not x.size:
        raise ValueError(f"x is empty, of shape {x.shape}; a gate has nothing to rank")


def _check_kept(kept: Kept, settings: DynamicSpec, x: jax.Array, out: tuple[int, int, int]) -> None:
    if kept.channels is not None and kept.widths is not None:
        raise ValueError("kept: channels and widths both say which channels are kept; give one of them")
    if (kept.channels is not None or kept.widths is not None) and x.shape[-1] % settings.group_size:
        raise ValueError(f"group_size={settings.group_size} does not divide the {x.shape[-1]} channels")
    limits = {"channels": x.shape[-1] // settings.group_size, "features": out[2]}
    for axis, size in (("columns", x.shape[1:3]), ("outputs", out)):
        if getattr(kept, axis) is not None and (size[0] % settings.tile or size[1] % settings.tile):
            raise ValueError(f"tile={settings.tile} does not divide the {axis} of {size[0]} x {size[1]} positions")
        limits[axis] = size[0] * size[1] // settings.tile**2
    for axis, indices in kept._asdict().items():
        if indices is None:
            continue
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"kept.{axis} must be integers, got {indices.dtype}")
        expected = f"[{len(x)}]" if axis == "widths" else f"[{len(x)}, 1..{limits[axis]}]"
        fits = indices.shape[:1] == x.shape[:1] and indices.ndim == (1 if axis == "widths" else 2)
        if not fits or (axis != "widths" and not 1 <= indices.shape[1] <= limits[axis]):
            raise ValueError(f"kept.{axis} must be of shape {expected}, got {indices.shape}")
