"""What is asked of a gate: how much it drops, in which units, ranked by what, computed how."""

import dataclasses
import numbers

from jaxeff.dynamic.attention import REDUCES, Reduce
from jaxeff.dynamic.masks import keep_count

RATIOS: tuple[str, ...] = ("channels", "columns", "outputs")
ORDERS: tuple[str, ...] = ("parallel", "channel_first")
RANKINGS: tuple[str, ...] = ("attention", "inverse", "random")


@dataclasses.dataclass(frozen=True)
class DynamicSpec:
    """A gate on the input of a convolution, static and hashable.

    Attributes:
      channels: share of the channels that is dropped, in [0, 1).
      columns: share of the columns (positions) that is dropped, in [0, 1).
      outputs: share of the output positions that is not computed but zero, in [0, 1); ranked by the mean attention of
        the columns that the kernel reads there (ours; DynConv learns the score).
      group_size: channels are ranked and dropped in groups of so many neighbours, by the mean of their attention.
      tile: columns and output positions are ranked and dropped in tiles of tile x tile, by the mean of their attention.
      order: "parallel" ranks columns by the whole map; "channel_first" by the channels that are kept.
      reduce: "mean", "abs_mean" or "l2", see `jaxeff.dynamic.channel_attention`.
      ranking: "attention" keeps the highest; "inverse" the lowest and "random" any, to compare with.
      engine: how the convolution is computed, a name of `jaxeff.dynamic.ENGINES` or "auto".

    Raises:
      TypeError: for a ratio that is no number, or an engine that is no name; traced ratios are for
        `jaxeff.dynamic.masked_by_ratio`.
      ValueError: for a ratio outside [0, 1), sizes below 1, or an unknown order, reduction or ranking.
    """

    channels: float = 0.0
    columns: float = 0.0
    outputs: float = 0.0
    group_size: int = 1
    tile: int = 1
    order: str = "parallel"
    reduce: Reduce = "mean"
    ranking: str = "attention"
    engine: str = "auto"

    def __post_init__(self):
        for name in RATIOS:
            value = getattr(self, name)
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name} is the share that is dropped, a number in [0, 1), got {value!r}")
            if not 0 <= float(value) < 1:
                raise ValueError(f"{name} is the share that is dropped, in [0, 1), got {value}")
        for name in ("group_size", "tile"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        if not isinstance(self.engine, str):
            raise TypeError(f"engine must be the name of one, or 'auto', got {self.engine!r}")
        for name, known in (("order", ORDERS), ("reduce", REDUCES), ("ranking", RANKINGS)):
            if getattr(self, name) not in known:
                valid = ", ".join(map(repr, known))
                raise ValueError(f"{name} must be one of {valid}, got {getattr(self, name)!r}")

    def groups_kept(self, channels: int) -> int:
        """How many channel groups are kept of so many channels.

        Raises:
          ValueError: if the group size does not divide them.
        """
        if channels % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide the {channels} channels")
        return keep_count(self.channels, channels // self.group_size)

    def tiles_kept(self, size: tuple[int, int], of: str = "columns") -> int:
        """How many tiles are kept of a map of this height and width.

        Args:
          size: (H, W).
          of: "columns" of the input or "outputs".

        Raises:
          ValueError: if something is dropped and the tile does not divide the map.
        """
        ratio: float = getattr(self, of)
        if not ratio:
            return -(-size[0] // self.tile) * -(-size[1] // self.tile)
        if size[0] % self.tile or size[1] % self.tile:
            raise ValueError(f"tile={self.tile} does not divide the {of} of {size[0]} x {size[1]} positions")
        return keep_count(ratio, size[0] * size[1] // self.tile**2)
