"""From a feature map to what of it is kept.

Letters: N batch, H and W space, C channels, G channel groups, T tiles of positions in row-major order; of each sample
k_c groups, k_s tiles of the input and k_o tiles of the output are kept.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.dynamic.attention import column_attention, group_attention
from jaxeff.dynamic.engines import Geometry, out_size
from jaxeff.dynamic.engines.geometry import read_positions
from jaxeff.dynamic.masks import mask_of, top_k_indices, top_k_mask
from jaxeff.dynamic.settings import DynamicSpec
from jaxeff.ops import choice
from jaxeff.ops.conv import current_impl


class Kept(NamedTuple):
    """Indices of what is kept, ascending; None where everything is.

    Attributes:
      channels: int32 [N, k_c], of channel groups.
      columns: int32 [N, k_s], of tiles of the input.
      outputs: int32 [N, k_o], of tiles of the output.
      widths: int32 [N], in the place of `channels`: how many channel groups a sample keeps, from the first, 0..G. Never
        chosen by attention; for slimmable networks, whose samples differ in width.
      features: int32 [N, L], output channels that are computed, the others being zero. Never chosen by attention; for
        gates that learn, such as those of `jaxeff.dynamic.BoostedConv`.
    """

    channels: jax.Array | None = None
    columns: jax.Array | None = None
    outputs: jax.Array | None = None
    widths: jax.Array | None = None
    features: jax.Array | None = None


class Reader(NamedTuple):
    """The convolution that reads a map, as far as its output positions are concerned."""

    window: Geometry
    kernel: tuple[int, int]


def select(x: jax.Array, settings: DynamicSpec, reader: Reader | None = None) -> Kept:
    """Ranks the channels and columns of a map, and the outputs of who reads it, and keeps the highest.

    A channel that holds a NaN comes last; where it is dropped, columns and outputs are ranked without it. A column that
    holds one in a channel that is kept comes last, too.

    Args:
      x: [N, H, W, C], floating point.
      settings: ratios, group size, tile, order and reduction.
      reader: window of the convolution; needed where `settings.outputs` is not 0.

    Returns:
      The indices, without gradient; None where the ratio drops nothing.

    Raises:
      TypeError: if x is not floating point.
      ValueError: for another rank, or a group size or tile that does not divide.
    """
    size, channels = _checked_shape(x)
    groups, tiles = settings.groups_kept(channels), settings.tiles_kept(size)
    kept_channels = kept_columns = kept_outputs = scores = None
    if groups < channels // settings.group_size:
        scores = group_scores(x, settings)
        kept_channels = top_k_indices(scores, groups)
    if settings.columns and tiles < size[0] * size[1] // settings.tile**2:
        kept_columns = top_k_indices(tile_scores(x, settings, scores, groups), tiles)
    if settings.outputs:
        if reader is None:
            raise ValueError("outputs of a convolution are to be dropped, which is not known: pass reader")
        kept_outputs = _kept_outputs(x, settings, reader, scores, groups)
    return Kept(kept_channels, kept_columns, kept_outputs)


def planned(settings: DynamicSpec, shape: tuple[int, ...], out: tuple[int, int]) -> Kept:
    """What `select` will choose of a map of this shape for outputs of this size: something, or None where all is kept.

    Raises:
      ValueError: for a group size or tile that does not divide.
    """
    size, channels, there = (shape[1], shape[2]), shape[3], jnp.zeros((shape[0], 1), jnp.int32)
    few_channels = settings.groups_kept(channels) < channels // settings.group_size
    few_columns = settings.columns and settings.tiles_kept(size) < size[0] * size[1] // settings.tile**2
    if settings.outputs:
        settings.tiles_kept(out, "outputs")
    return Kept(there if few_channels else None, there if few_columns else None, there if settings.outputs else None)


def masked(x: jax.Array, kept: Kept, settings: DynamicSpec) -> jax.Array:
    """The map with zeros in the place of the channels and columns that are dropped; NaN there becomes zero too."""
    channels = columns = None
    groups = x.shape[-1] // settings.group_size
    if kept.channels is not None:
        channels = mask_of(kept.channels, groups)
    if kept.widths is not None:
        channels = jnp.arange(groups) < kept.widths[:, None]
    if kept.columns is not None:
        columns = mask_of(kept.columns, x.shape[1] * x.shape[2] // settings.tile**2)
    return _masked(x, channels, columns, settings)


def masked_by_scores(x: jax.Array, kept: Kept, axes: Collection[str], settings: DynamicSpec) -> jax.Array:
    """As `masked` along some of "channels" and "columns", for what `select` kept of x itself.

    The masks come from the scores again, not from the indices: those are then not computed where nobody gathers.
    """
    groups = columns = 0
    by_group = by_column = None
    if kept.channels is not None:
        by_group, groups = group_scores(x, settings), kept.channels.shape[-1]
    if kept.columns is not None:
        by_column, columns = tile_scores(x, settings, by_group, groups), kept.columns.shape[-1]
    # Their scores were needed to rank what is masked here, if at all.
    by_group = by_group if "channels" in axes else None
    by_column = by_column if "columns" in axes else None
    if by_group is None and by_column is None:
        return x
    if _in_compiled_code(x) and (by_column is None or settings.tile == 1):
        flat = x.reshape(len(x), -1, x.shape[-1])
        scores = [jnp.zeros((len(x), 0)) if scores is None else scores for scores in (by_group, by_column)]
        return choice.keep_highest(flat, *map(lax.stop_gradient, scores), (groups, columns)).reshape(x.shape)
    channels = None if by_group is None else top_k_mask(by_group, groups)
    return _masked(x, channels, None if by_column is None else top_k_mask(by_column, columns), settings)


def masked_outputs(y: jax.Array, kept: Kept, settings: DynamicSpec) -> jax.Array:
    """The output [N, H', W', O] of a convolution with zeros at positions and channels that are not to be computed."""
    if kept.features is not None and _in_compiled_code(y):
        flat = y.reshape(len(y), -1, y.shape[-1])
        y = choice.keep_channels(flat, kept.features.astype(jnp.int32)).reshape(y.shape)
    elif kept.features is not None:
        y = jnp.where(mask_of(kept.features, y.shape[-1])[:, None, None], y, 0)
    if kept.outputs is None:
        return y
    return _masked(y, None, mask_of(kept.outputs, y.shape[1] * y.shape[2] // settings.tile**2), settings)


def masked_by_ratio(
    x: jax.Array, channels: float | jax.Array, columns: float | jax.Array, settings: DynamicSpec
) -> jax.Array:
    """The map as `masked` makes it of `select`, for ratios that may be traced: one compilation for all of them.

    Args:
      x: [N, H, W, C], floating point.
      channels: share of the channels that is dropped, in [0, 1): one number, or [N], one for each sample.
      columns: share of the columns that is dropped, likewise.
      settings: everything but the ratios. Where its ratio of columns is 0 and the tile does not divide the map, no
        columns are dropped, whatever `columns` is.

    Returns:
      [N, H, W, C].

    Raises:
      TypeError, ValueError: as `select`; for ratios that are not traced, outside [0, 1).
    """
    size, width = _checked_shape(x)
    for name, ratio in (("channels", channels), ("columns", columns)):
        if not isinstance(ratio, jax.core.Tracer) and not ((np.asarray(ratio) >= 0) & (np.asarray(ratio) < 1)).all():
            raise ValueError(f"{name} is the share that is dropped, in [0, 1), got {ratio}")
    settings.groups_kept(width)
    scores, groups = group_scores(x, settings), _traced_count(channels, width // settings.group_size)
    by_channel = top_k_mask(scores, groups)
    if not settings.columns and (size[0] % settings.tile or size[1] % settings.tile):
        return _masked(x, by_channel, None, settings)
    tiles = _traced_count(columns, size[0] * size[1] // settings.tile**2)
    by_column = top_k_mask(tile_scores(x, settings, scores, groups), tiles)
    return _masked(x, by_channel, by_column, settings)


def outputs_by_ratio(x: jax.Array, channels: float | jax.Array, settings: DynamicSpec, reader: Reader) -> Kept:
    """The outputs that `select` keeps where the ratio of channels may be traced; that of the outputs is not."""
    if not settings.outputs:
        return Kept()
    groups = _traced_count(channels, x.shape[-1] // settings.group_size)
    return Kept(outputs=_kept_outputs(x, settings, reader, group_scores(x, settings), groups))


def group_scores(x: jax.Array, settings: DynamicSpec) -> jax.Array:
    """What channel groups are ranked by, [N, G]."""
    return _ranked_by(settings, group_attention(x, settings.reduce, settings.group_size))


def tile_scores(
    x: jax.Array, settings: DynamicSpec, by_group: jax.Array | None = None, groups: int | jax.Array = 0
) -> jax.Array:
    """What tiles are ranked by, in row-major order, [N, T].

    Args:
      x: the map.
      settings: with order "channel_first", dropped channels count as zero.
      by_group: scores of channel groups, [N, G], where some are dropped. In any order, one that is dropped for a NaN
        does not make every column NaN.
      groups: how many of these are kept, traced or not.

    Raises:
      ValueError: if the tile does not divide the map.
    """
    return _ranked_by(settings, _by_tile(_columns_of_kept(x, settings, by_group, groups), settings.tile))


def _columns_of_kept(x, settings, by_group, groups) -> jax.Array:
    """Attention of the columns [N, H, W], as far as channels are kept."""
    if by_group is None:
        return column_attention(x, settings.reduce)
    only_nan = settings.order != "channel_first"
    if choice.available(x) and isinstance(groups, int):
        flat = x.reshape(len(x), -1, x.shape[-1])
        means = choice.means_of_kept(flat, by_group, groups, settings.reduce, only_nan=only_nan)
        return means.reshape(x.shape[:3])
    keeps = top_k_mask(by_group, groups)
    if not only_nan:
        return column_attention(_masked(x, keeps, None, settings), settings.reduce)
    sound = lambda: _masked(x, keeps | ~jnp.isnan(by_group), None, settings)
    return column_attention(lax.cond(jnp.isnan(by_group).any(), sound, lambda: x), settings.reduce)


def _in_compiled_code(x: jax.Array) -> bool:
    """Whether zeros are put in by compiled code, which has no forward-mode derivatives: who wants those says "lax"."""
    return choice.available(x) and current_impl() != "lax"


def _ranked_by(settings, scores):
    if settings.ranking == "random":  # the same for every call, so that all engines keep the same
        return jax.random.uniform(jax.random.key(0), scores.shape)
    return -scores if settings.ranking == "inverse" else scores


def _kept_outputs(x, settings, reader: Reader, by_group, groups) -> jax.Array:
    size = (x.shape[1], x.shape[2])
    out = out_size(reader.window, size, reader.kernel)
    kept = settings.tiles_kept(out, "outputs")
    reads = read_positions(reader.window, size, reader.kernel)
    # Whatever reads a NaN has the score NaN, and comes last.
    columns = _columns_of_kept(x, settings, by_group, groups)
    padded = jnp.pad(columns.reshape(len(x), -1), ((0, 0), (0, 1)))
    scores = padded[:, reads].mean(1).reshape(len(x), *out)
    return top_k_indices(_ranked_by(settings, _by_tile(scores, settings.tile)), kept)


def _by_tile(scores, tile):
    count, height, width = scores.shape
    if height % tile or width % tile:
        raise ValueError(f"tile={tile} does not divide the map of {height} x {width} positions")
    if tile == 1:
        return scores.reshape(count, -1)
    return scores.reshape(count, height // tile, tile, width // tile, tile).mean((2, 4)).reshape(count, -1)


def _masked(x, channels, columns, settings):
    if channels is not None:
        x = jnp.where(jnp.repeat(channels, settings.group_size, axis=1)[:, None, None], x, 0)
    if columns is not None:
        t = settings.tile
        grid = columns.reshape(len(x), x.shape[1] // t, x.shape[2] // t)
        x = jnp.where(grid.repeat(t, 1).repeat(t, 2)[..., None], x, 0)
    return x


def _traced_count(ratio, size):
    """`keep_count` of traced ratios, to be compared with ranks [N, size].

    float32 has seven digits, so what lies that close to a half is rounded up.
    """
    ratios = jnp.asarray(ratio, jnp.float32)
    counts = jnp.clip(jnp.floor((1 - ratios) * size + 0.5 + 1e-4), 1, size)
    return counts[:, None] if counts.ndim else counts


def positions_of(tiles: jax.Array, tile: int, size: tuple[int, int]) -> jax.Array:
    """Positions in row-major order of the members of tiles: int32 [N, k * tile**2] from [N, k]."""
    if tile == 1:
        return tiles
    numbers = np.arange(size[0] * size[1], dtype=np.int32).reshape(size[0] // tile, tile, size[1] // tile, tile)
    members = jnp.asarray(numbers.swapaxes(1, 2).reshape(-1, tile**2))
    return members[tiles].reshape(len(tiles), -1)


def _checked_shape(x) -> tuple[tuple[int, int], int]:
    if x.ndim != 4:
        raise ValueError(f"a gate works on feature maps [N, H, W, C], got shape {x.shape}")
    return (x.shape[1], x.shape[2]), x.shape[3]
