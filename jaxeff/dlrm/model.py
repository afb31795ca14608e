"""The deep learning recommendation model: two MLPs around the interaction of pooled embeddings.

The core takes pooled embeddings as an input, so that they may come from tables in memory, from tiers, or from another
host; tables are always arguments, never constants of a program. The last sigmoid is left to the loss: what comes out
are logits.

Letters: B batch, n_d dense features, T tables, D numbers in a row, L entries of the longest bag of a table,
F = T + 1 vectors that interact (T where there are no dense features).

Sources: Naumov et al. 2019 (arXiv 1906.00091) for the model; Wang et al. 2021 (arXiv 2008.13535, section 3.3) for the
low-rank cross layers.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.ops.embedding_bag import pooled_lookup

INTERACTIONS: tuple[str, ...] = ("dot", "cat", "cross")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a model is made of.

    Attributes:
      dense: n_d, 0 for none; then there is no bottom MLP.
      rows: of each table.
      dim: D.
      bottom: widths of the bottom MLP, the last of which is D; () where there are no dense features.
      top: widths of the top MLP, the last of which is 1.
      interaction: "dot", products of all pairs behind the dense vector; "cat", all vectors as they are; "cross",
        low-rank cross layers (DCN-v2) over these.
      interact_itself: for "dot", whether the product of a vector with itself counts.
      cross_layers: for "cross", how many.
      cross_rank: for "cross", of each.
      lookups: entries of the longest bag of each table; () for one each.
    """

    dense: int
    rows: tuple[int, ...]
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    interaction: str = "dot"
    interact_itself: bool = False
    cross_layers: int = 3
    cross_rank: int = 512
    lookups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rows", "bottom", "top", "lookups"):
            object.__setattr__(self, name, tuple(int(number) for number in getattr(self, name)))
        if self.interaction not in INTERACTIONS:
            raise ValueError(f"interaction: expected one of {', '.join(INTERACTIONS)}, got {self.interaction!r}")
        positive = {"rows": self.rows, "bottom": self.bottom, "top": self.top, "lookups": self.lookups}
        positive |= {"dim": (self.dim,), "cross_layers": (self.cross_layers,), "cross_rank": (self.cross_rank,)}
        for name, numbers in positive.items():
            if any(number < 1 for number in numbers):
                raise ValueError(f"{name}: expected positive numbers, got {getattr(self, name)}")
        if not self.rows:
            raise ValueError("rows: expected the rows of at least one table, got ()")
        if self.dense < 0 or bool(self.dense) != bool(self.bottom):
            raise ValueError(f"bottom: {self.dense} dense features need {'some' if self.dense else 'no'} widths, got "
                             f"{self.bottom}")  # fmt: skip
        if self.bottom and self.bottom[-1] != self.dim:
            raise ValueError(f"bottom: the last width must be dim={self.dim}, to interact with rows, got {self.bottom}")
        if not self.top or self.top[-1] != 1:
            raise ValueError(f"top: the last width must be 1, the logit, got {self.top}")
        if self.lookups and len(self.lookups) != len(self.rows):
            raise ValueError(f"lookups: expected one for each of {len(self.rows)} tables, got {len(self.lookups)}")
        if self.interaction == "dot" and not self.interacted:
            raise ValueError('interaction: "dot" needs two vectors to interact, got one; take "cat" or interact_itself')

    @property
    def vectors(self) -> int:
        """F, the vectors that interact."""
        return len(self.rows) + bool(self.dense)

    @property
    def bag_lengths(self) -> tuple[int, ...]:
        """Entries of the longest bag of each table."""
        return self.lookups or (1,) * len(self.rows)

    @property
    def interacted(self) -> int:
        """Numbers that come out of the interaction."""
        if self.interaction != "dot":
            return self.vectors * self.dim
        pairs = self.vectors * (self.vectors - 1) // 2 + self.interact_itself * self.vectors
        return pairs + bool(self.dense) * self.dim

    @property
    def table_names(self) -> tuple[str, ...]:
        """Of the tables, in the order of `rows`, which is that of a sorted dictionary, too."""
        digits = len(str(len(self.rows) - 1))
        return tuple(f"table_{t:0{digits}d}" for t in range(len(self.rows)))

    def scaled(self, limit: int) -> "Architecture":
        """The same model with no table of more than `limit` rows, ids modulo its rows (`check_bags` policy "hash")."""
        return dataclasses.replace(self, rows=tuple(min(rows, limit) for rows in self.rows))


# Rows of the 26 tables of Criteo's terabyte in MLPerf, hashed to 40 million, and the entries of the bags that its
# DCN-v2 reads; the tables of the Kaggle challenge. facebookresearch/dlrm, as are the widths.
MLPERF_ROWS: tuple[int, ...] = (
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
MLPERF_LOOKUPS: tuple[int, ...] = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
KAGGLE_ROWS: tuple[int, ...] = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)

PRESETS: dict[str, Architecture] = {
    "mlperf_v1": Architecture(13, MLPERF_ROWS, 128, (512, 256, 128), (1024, 1024, 512, 256, 1)),
    "mlperf_dcnv2": Architecture(
        13, MLPERF_ROWS, 128, (512, 256, 128), (1024, 1024, 512, 256, 1), "cross", lookups=MLPERF_LOOKUPS
    ),
    "kaggle": Architecture(13, KAGGLE_ROWS, 16, (512, 256, 64, 16), (512, 256, 1)),
    "small": Architecture(13, (1000,) * 26, 16, (64, 16), (64, 32, 1)),
}


def preset(
    name: str,
    *,
    dense: int | None = None,
    rows: Sequence[int] | None = None,
    lookups: Sequence[int] | None = None,
    dim: int | None = None,
) -> Architecture:
    """A preset, fitted to features.

    Args:
      name: of `PRESETS`.
      dense: n_d; without any there is no bottom MLP.
      rows: of the tables; then the bags have one entry each unless `lookups` says otherwise.
      lookups: entries of the longest bag of each table.
      dim: D, also the last width of the bottom MLP.

    Raises:
      ValueError: for an unknown name, or numbers that make no model.

    >>> preset("small", dense=0, rows=(610, 9742)).interacted
    1
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
    found = PRESETS[name]
    changes: dict[str, Any] = {}
    if rows is not None:
        changes |= {"rows": tuple(rows), "lookups": ()}
    if lookups is not None:
        changes["lookups"] = tuple(lookups)
    if dim is not None:
        changes |= {"dim": dim, "bottom": (*found.bottom[:-1], dim)}
    if dense is not None:
        changes |= {"dense": dense, "bottom": changes.get("bottom", found.bottom) if dense else ()}
    return dataclasses.replace(found, **changes)


# --- what a model costs -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Costs:
    """Sizes of a model, and what a sample costs.

    Attributes:
      table_params: numbers in all tables.
      core_params: in the MLPs and cross layers.
      lookups: rows that a sample reads.
      macs: multiply-accumulates of a sample, those of the interaction as one product of all vectors with all.
    """

    table_params: int
    core_params: int
    lookups: int
    macs: int

    def table_bytes(self, bytes_per_number: float = 4.0) -> float:
        """Of all tables, 4 bytes a number in float32; quantised rows have a scale and a bias besides."""
        return self.table_params * bytes_per_number


def costs(architecture: Architecture) -> Costs:
    """Counts what a model holds and does, without making it."""
    a = architecture
    products = list(itertools.pairwise((a.dense, *a.bottom))) if a.dense else []
    products += itertools.pairwise((a.interacted, *a.top))
    params, macs = sum(m * n + n for m, n in products), sum(m * n for m, n in products)
    if a.interaction == "dot":
        macs += a.vectors**2 * a.dim
    if a.interaction == "cross":
        params += a.cross_layers * (2 * a.interacted * a.cross_rank + a.interacted)
        macs += a.cross_layers * 2 * a.interacted * a.cross_rank
    return Costs(sum(a.rows) * a.dim, params, sum(a.bag_lengths), macs)


# --- the core ---------------------------------------------------------------------------------------------------------


def pairwise_products(vectors: jax.Array, itself: bool = False) -> jax.Array:
    """Inner products of all pairs of vectors, in the order of the rows of a lower triangle.

    Args:
      vectors: [B, F, D].
      itself: whether the pairs of a vector with itself count.

    Returns:
      [B, F (F - 1) / 2], or [B, F (F + 1) / 2] with those.
    """
    products = jnp.einsum("bfd,bgd->bfg", vectors, vectors)
    count = vectors.shape[1]
    rows, columns = np.tril_indices(count, 0 if itself else -1)
    # One list of positions: two would be gathered number by number.
    return products.reshape(len(vectors), -1)[:, rows * count + columns]


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
      widths: of the layers.
      last: whether a ReLU follows the last one, too.
    """

    widths: tuple[int, ...]
    last: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, inputs] to [B, last width]."""
        for number, width in enumerate(self.widths):
            x = _dense(width, f"layer_{number}")(x)
            if self.last or number < len(self.widths) - 1:
                x = nn.relu(x)
        return x


class LowRankCross(nn.Module):
    """Cross layers of low rank: x becomes x_0 * (U (V x) + b) + x.

    Attributes:
      layers: how many.
      rank: of each.
    """

    layers: int
    rank: int

    @nn.compact
    def __call__(self, first: jax.Array) -> jax.Array:
        """Maps [B, N] to [B, N]."""
        x, xavier = first, nn.initializers.xavier_normal()
        for number in range(self.layers):
            low = nn.Dense(self.rank, use_bias=False, kernel_init=xavier, name=f"down_{number}")(x)
            x = first * nn.Dense(first.shape[-1], kernel_init=xavier, name=f"up_{number}")(low) + x
        return x


class DLRM(nn.Module):
    """The model between pooled embeddings and the logit.

    Attributes:
      architecture: what it is made of; its rows are not looked at.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, dense: jax.Array, pooled: jax.Array) -> jax.Array:
        """Logits of clicks.

        Args:
          dense: float32 [B, n_d]; not read where n_d is 0.
          pooled: float32 [B, T, D], the pooled embeddings.

        Returns:
          float32 [B].

        Raises:
          ValueError: for shapes that are not those of the architecture.
        """
        a = self.architecture
        if pooled.ndim != 3 or pooled.shape[1:] != (len(a.rows), a.dim):
            raise ValueError(f"pooled: expected shape [B, {len(a.rows)}, {a.dim}], got {pooled.shape}")
        if a.dense and dense.shape != (len(pooled), a.dense):
            raise ValueError(f"dense: expected shape [{len(pooled)}, {a.dense}], got {dense.shape}")
        vectors, beside = pooled, []
        if a.dense:
            bottom = MLP(a.bottom, last=True, name="bottom")(dense)
            vectors, beside = jnp.concatenate([bottom[:, None], pooled], 1), [bottom]
        if a.interaction == "dot":
            x = jnp.concatenate([*beside, pairwise_products(vectors, a.interact_itself)], 1)
        else:
            x = vectors.reshape(len(pooled), -1)
        if a.interaction == "cross":
            x = LowRankCross(a.cross_layers, a.cross_rank, name="cross")(x)
        return MLP(a.top, last=False, name="top")(x)[:, 0]


class WithTables(nn.Module):
    """The model with its tables among its parameters, for those that fit: `params["tables"]` and `params["core"]`.

    Attributes:
      architecture: what it is made of.
      mode: how bags are pooled, "sum" or "mean".
    """

    architecture: Architecture
    mode: str = "sum"

    @nn.compact
    def __call__(self, dense: jax.Array, ids: Any, lengths: Any = None, weights: Any = None) -> jax.Array:
        """Logits [B] of dense features [B, n_d] and bags in the form of `pool`."""
        tables = self.param("tables", lambda key: init_tables(key, self.architecture))
        pooled = pool(self.architecture, tables, ids, lengths, weights, self.mode)
        return DLRM(self.architecture, name="core")(dense, pooled)


def _dense(width: int, name: str) -> nn.Dense:
    # The standard deviations of the reference: sqrt(2 / (inputs + outputs)), and sqrt(1 / outputs) of biases.
    kernel = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
    return nn.Dense(width, kernel_init=kernel, bias_init=nn.initializers.normal(math.sqrt(1 / width)), name=name)


# --- tables -----------------------------------------------------------------------------------------------------------


def init_tables(key: jax.Array, architecture: Architecture) -> dict[str, jax.Array]:
    """Makes tables, uniform between -1 / sqrt(rows) and 1 / sqrt(rows) as in the reference.

    Args:
      key: typed PRNG key.
      architecture: what they are for.

    Returns:
      float32 [rows, D] by `architecture.table_names`.
    """

    def one(key: jax.Array, rows: int) -> jax.Array:
        bound = rows**-0.5
        return jax.random.uniform(key, (rows, architecture.dim), minval=-bound, maxval=bound)

    keys = jax.random.split(key, len(architecture.rows))
    return {name: one(*each) for name, *each in zip(architecture.table_names, keys, architecture.rows, strict=True)}


def bags_of(
    architecture: Architecture, ids: Any, lengths: Any = None, weights: Any = None
) -> list[tuple[jax.Array, jax.Array | None, jax.Array | None]]:
    """The bags of each table out of those of all.

    Args:
      architecture: whose tables they are of.
      ids: integers [B, T, L] for all tables, of which a table reads as many as its longest bag has; [B, T] for one
        each; or [B, L of the table] by name.
      lengths: integers [B, T], or [B] by name; None where every bag is full.
      weights: float32 as `ids`, or None.

    Returns:
      For each table ids [B, L], lengths [B] or None, and weights [B, L] or None.

    Raises:
      ValueError: for shapes that are not those of the architecture, or names that are missing.
    """
    names, longest = architecture.table_names, architecture.bag_lengths
    if isinstance(ids, Mapping):
        for what, arrays in (("ids", ids), ("lengths", lengths), ("weights", weights)):
            missing = [] if arrays is None else [name for name in names if name not in arrays]
            if missing:
                raise ValueError(f"{what}: nothing for {', '.join(missing)}; there is {', '.join(sorted(arrays))}")
        return [(ids[n], lengths and lengths[n], weights and weights[n]) for n in names]
    if ids.ndim == 2:
        ids, weights = ids[..., None], None if weights is None else weights[..., None]
    if ids.ndim != 3 or ids.shape[1] != len(names) or ids.shape[2] < max(longest):
        raise ValueError(f"ids: expected shape [B, {len(names)}, at least {max(longest)}], got {ids.shape}")
    if lengths is None and ids.shape[2] > min(longest):
        raise ValueError(f"lengths: needed, as bags have {min(longest)} to {max(longest)} of {ids.shape[2]} entries")
    return [
        (
            ids[:, t, :most],
            None if lengths is None else lengths[:, t],
            None if weights is None else weights[:, t, :most],
        )
        for t, most in enumerate(longest)
    ]


def pool(
    architecture: Architecture,
    tables: Mapping[str, jax.Array],
    ids: Any,
    lengths: Any = None,
    weights: Any = None,
    mode: str = "sum",
) -> jax.Array:
    """Pools the bags of tables in memory.

    Args:
      architecture: whose tables they are.
      tables: float [rows, D] by name.
      ids: as in `bags_of`; ids in range, see `jaxeff.ops.bags.check_bags`.
      lengths: as in `bags_of`.
      weights: as in `bags_of`.
      mode: "sum" or "mean".

    Returns:
      float32 [B, T, D].
    """
    bags = bags_of(architecture, ids, lengths, weights)
    pairs = zip(architecture.table_names, bags, strict=True)
    return jnp.stack([pooled_lookup(tables[name], *bag, mode=mode) for name, bag in pairs], 1)
