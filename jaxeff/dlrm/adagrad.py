"""Row-wise Adagrad on the rows that were looked up: a step costs what it reads, not what the table holds.

A pair of functions as in optax, on gradients that list their rows. Rows that occur several times in a batch are one
entry, whose gradient is the sum; that is what makes the update that of a dense gradient, exactly.

Letters: R rows of a table, D numbers in each, B bags, L entries of each, K = B L entries of a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SparseRows(NamedTuple):
    """Rows of a table with a vector each, as many as there could be.

    Attributes:
      rows: int32 [K], distinct and ascending; what is left over is R and more, and reaches no row.
      values: float32 [K, D].
    """

    rows: jax.Array
    values: jax.Array


class RowwiseState(NamedTuple):
    """What row-wise Adagrad remembers.

    Attributes:
      steps: int32 scalar, how many are finished.
      sums: float32 [R] of each table, the sum over steps of the mean square of the row's gradient.
    """

    steps: jax.Array
    sums: Any


class SparseTransformation(NamedTuple):
    """An optimiser of tables, as `optax.GradientTransformation` is one of dense parameters.

    Attributes:
      init: `tables -> state`.
      update: `(gradients, state) -> (updates, state)`, both trees of `SparseRows` in the place of tables.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], tuple[Any, Any]]


def sparse_gradient(
    gradient: jax.Array,
    rows: int,
    indices: jax.Array,
    lengths: jax.Array | None = None,
    weights: jax.Array | None = None,
    mode: str = "sum",
) -> SparseRows:
    """The gradient of a table from that of its pooled bags; works inside jit.

    Args:
      gradient: float32 [B, D], of a loss by the result of `jaxeff.ops.embedding_bag.pooled_lookup`.
      rows: R.
      indices: integers [B, L], as for the look-up; those out of range have no gradient.
      lengths: integers [B], or None.
      weights: float32 [B, L], or None.
      mode: "sum" or "mean".

    Returns:
      The rows of the bags, each once.

    Raises:
      ValueError: if there could be more distinct numbers than int32 has.
    """
    bags, longest = indices.shape
    count = bags * longest
    if rows + count >= 2**31:
        raise ValueError(f"rows: {rows} and {count} entries of a batch do not fit int32; split the table")
    if mode == "mean":
        entries = jnp.full(bags, longest) if lengths is None else lengths
        gradient = gradient / jnp.maximum(entries, 1).astype(gradient.dtype)[:, None]
    inside = (indices >= 0) & (indices < rows)
    if lengths is not None:
        inside &= jnp.arange(longest) < lengths[:, None]
    flat = jnp.where(inside, indices, rows).astype(jnp.int32).reshape(-1)
    order = jnp.argsort(flat)  # stable: the entries of a row are added in the order of the batch
    ordered = flat[order]
    first = jnp.concatenate([jnp.ones(min(count, 1), bool), ordered[1:] != ordered[:-1]])
    slot = jnp.cumsum(first) - 1
    each = gradient[order // max(longest, 1)]
    if weights is not None:
        each = each * weights.reshape(-1)[order][:, None]
    values = jax.ops.segment_sum(each, slot, count, indices_are_sorted=True)
    # Distinct also where nothing is left, as the scatter of an update is promised.
    rest = rows + jnp.arange(count, dtype=jnp.int32)
    found = rest.at[slot].set(jnp.where(ordered < rows, ordered, rest[slot]), indices_are_sorted=True)
    return SparseRows(found, values)


def apply_updates(tables: Any, updates: Any) -> Any:
    """Adds to the rows that are listed, in place where the tables are donated.

    Args:
      tables: tree of [R, D].
      updates: the same tree with `SparseRows`.

    Returns:
      The tables.
    """
    return _by_table(lambda update, table: _add(table, update.rows, update.values.astype(table.dtype)), updates, tables)


def rowwise_adagrad(
    learning_rate: float | Callable[[jax.Array], jax.Array], *, eps: float = 1e-8, initial: float = 0.0
) -> SparseTransformation:
    """Adagrad with one accumulator for a row: `s += mean(g^2)`, `row -= rate g / (sqrt(s) + eps)`.

    Args:
      learning_rate: a number, or a function of the number of finished steps such as an optax schedule.
      eps: added to the root.
      initial: of the accumulators.

    Returns:
      The optimiser. Gradients are `SparseRows`, of `sparse_gradient`.

    Raises:
      ValueError: for a negative rate, `eps` that is not positive, or a negative `initial`.

    Source: the exact row-wise Adagrad of FBGEMM and torchrec; Gupta et al. 2014 (Training highly multiclass
    classifiers, section 4.3) for one step size for a row.
    """
    for name, value, low in (("eps", eps, "positive"), ("initial", initial, "not negative")):
        if not (value > 0 if low == "positive" else value >= 0):
            raise ValueError(f"{name}: expected a number that is {low}, got {value}")
    if not callable(learning_rate) and not learning_rate >= 0:
        raise ValueError(f"learning_rate: expected a number that is not negative, got {learning_rate}")

    def init(tables: Any) -> RowwiseState:
        sums = jax.tree.map(lambda table: jnp.full(table.shape[0], initial, jnp.float32), tables)
        return RowwiseState(jnp.zeros((), jnp.int32), sums)

    def update(gradients: Any, state: RowwiseState) -> tuple[Any, RowwiseState]:
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        sums = _by_table(lambda g, s: _add(s, g.rows, jnp.square(g.values).mean(1)), gradients, state.sums)

        def step(gradient: SparseRows, sums: jax.Array) -> SparseRows:
            of_row = sums.at[gradient.rows].get(mode="fill", fill_value=1.0)
            return SparseRows(gradient.rows, -rate * gradient.values / (jnp.sqrt(of_row) + eps)[:, None])

        return _by_table(step, gradients, sums), RowwiseState(state.steps + 1, sums)

    return SparseTransformation(init, update)


def _add(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    return array.at[rows].add(values, mode="drop", unique_indices=True, indices_are_sorted=True)


def _by_table(function: Callable[..., Any], sparse: Any, *trees: Any) -> Any:
    return jax.tree.map(function, sparse, *trees, is_leaf=lambda leaf: isinstance(leaf, SparseRows))
