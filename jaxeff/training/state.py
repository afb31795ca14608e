"""What a training run carries from one step to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxeff import parallel


class TrainState(NamedTuple):
    """Everything a step reads and writes, as one pytree of arrays that can be saved and restored.

    Attributes:
      step: int32 scalar, the number of finished steps.
      params: pytree of float arrays, what the optimiser changes.
      model_state: pytree of the model's other variables, `{"batch_stats": ...}` or `{}`.
      opt_state: state of the optax transformation.
      ema: exponential moving average of `params` (same tree), or None when none is kept.
      key: typed PRNG key, scalar; never changes. All randomness of a step is `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    key: jax.Array

    @classmethod
    def create(
        cls, params: Any, model_state: Any, tx: optax.GradientTransformation, key: jax.Array, *, ema: bool = False
    ) -> TrainState:
        """Returns the state before the first step.

        Args:
          params: pytree of float arrays.
          model_state: pytree of the model's other variables, `{}` when it has none.
          tx: the optimiser, whose state is initialised here.
          key: typed PRNG key, scalar.
          ema: keep a moving average of the parameters; it starts at their initial values.

        Returns:
          The state at step 0.
        """
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=tx.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            key=key,
        )

    @property
    def evaluation_params(self) -> Any:
        """The parameters to evaluate and to deploy: the moving average where one is kept, else `params`."""
        return self.params if self.ema is None else self.ema


def owned(state: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Returns a copy of a state that may be donated to a compiled step.

    The arrays that a method's `init` returns may still be held by the caller, or be one array in two places. The copy
    has no weak types either, so the second step meets the types that the first one was compiled for.

    Args:
      state: pytree of arrays.
      sharding: where to put every leaf; None for the default device. Over several hosts it is the first host's state.

    Returns:
      The same values in new buffers.
    """
    copy = _copy(state)
    return copy if sharding is None else parallel.put(copy, sharding)


@jax.jit
def _copy(state: Any) -> Any:
    def one(leaf: Any) -> jax.Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jnp.copy(leaf if is_key else jnp.asarray(leaf, leaf.dtype))

    return jax.tree.map(one, state)


def placed(like: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Returns an abstract state in which every leaf asks for a sharding.

    Args:
      like: pytree of `jax.ShapeDtypeStruct`.
      sharding: that of every leaf; None leaves the tree as it is.

    Returns:
      Pytree of `jax.ShapeDtypeStruct`.
    """
    if sharding is None:
        return like
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
