"""How much each block of a network can drop: accuracy by block, ratio and dimension.

Nothing is trained again; norms have their running statistics. The whole grid is one compiled program, as the ratios are
traced (`jaxeff.dynamic.masked_by_ratio`).

Letters: B blocks, R ratios of the grid, N images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.dynamic.linen import RATIOS, reading_ratios
from jaxeff.dynamic.targeted_dropout import ratio_variables

DIMENSIONS: tuple[str, ...] = ("channels", "columns")
GRID: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Accuracy with one block gated at a time.

    Attributes:
      grid: the R ratios.
      accuracy: float [2, B, R], by dimension ("channels", "columns"), block and ratio.
      names: of the blocks.
    """

    grid: tuple[float, ...]
    accuracy: np.ndarray
    names: tuple[str, ...]

    def bounds(self, tolerance: float) -> np.ndarray:
        """The highest ratio of each block up to which accuracy falls by no more than `tolerance`: [B, 2].

        A ratio counts only if all lower ones of the grid are within the tolerance, too.
        """
        dense = self.accuracy[..., :1]
        fine = np.logical_and.accumulate(self.accuracy >= dense - tolerance, axis=-1)
        return np.asarray(self.grid)[fine.sum(-1) - 1].T

    @property
    def losses(self) -> np.ndarray:
        """How far accuracy falls below that of the network without gates, never below 0: [2, B, R]."""
        return np.maximum(self.accuracy[..., :1] - self.accuracy, 0)


def sensitivity(
    apply: Callable[[Mapping[str, Any], Any], jax.Array],
    variables: Mapping[str, Any],
    images: Any,
    labels: Any,
    paths: Sequence[Sequence[str]],
    *,
    grid: Sequence[float] = GRID,
    batch_size: int = 256,
    names: Sequence[str] = (),
) -> Sensitivity:
    """Evaluates a gated network with one block gated at a time, for every ratio and both dimensions.

    Args:
      apply: (variables, images) -> logits [N, classes], `network.apply` of a gated network.
      variables: of the trained network, without ratios.
      images: [N, H, W, C], floating point; not the test set.
      labels: int [N].
      paths: of the gates of each block, as of `jaxeff.dynamic.block_paths`.
      grid: ascending ratios in [0, 1), the first of them 0.
      batch_size: how many images are evaluated together; N is cut to a multiple of it where it is larger.
      names: of the blocks; by default "block 1" and so on.

    Raises:
      ValueError: for a grid that does not ascend from 0 to below 1, images and labels that do not fit, paths that no
        gate has, another number of names than of blocks, or a batch size below 1.
    """
    ratios = np.asarray(grid, np.float32)
    if not len(ratios) or ratios[0] != 0 or np.any(np.diff(ratios) <= 0) or ratios[-1] >= 1:
        raise ValueError(f"grid must ascend from 0 to below 1, got {tuple(grid)}")
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
        raise ValueError(f"images and labels must be [N, H, W, C] and [N], got {images.shape} and {labels.shape}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if names and len(names) != len(paths):
        raise ValueError(f"names are of {len(paths)} blocks, got {len(names)}: {tuple(names)}")
    size = min(batch_size, len(images))
    count = len(images) // size * size
    batches = tuple(a[:count].reshape(-1, size, *a.shape[1:]) for a in (images, labels))
    table = np.zeros((2, len(paths), len(ratios), len(paths), 2), np.float32)
    for dimension, block in np.ndindex(2, len(paths)):
        table[dimension, block, :, block, dimension] = ratios
    right = _right(apply, tuple(map(tuple, paths)), variables, batches, table.reshape(-1, len(paths), 2))
    accuracy = np.asarray(right, np.float64).reshape(table.shape[:3]) / count
    blocks = tuple(names) or tuple(f"block {i + 1}" for i in range(len(paths)))
    return Sensitivity(tuple(float(r) for r in grid), accuracy, blocks)


def _right(apply, paths, variables, batches, tables):
    @jax.jit
    def run(variables, batches, tables):
        def of_table(table):
            ratios = ratio_variables(paths, table)

            def of_batch(batch):
                images, labels = batch
                with reading_ratios(paths):
                    logits = apply({**variables, RATIOS: ratios}, images)
                return jnp.sum(logits.argmax(-1) == labels)

            return lax.map(of_batch, batches).sum()

        return lax.map(of_table, tables)

    return run(variables, batches, tables)
