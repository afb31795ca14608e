"""A Flax Linen module as the two functions that a training method takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

# Compiling the initialiser of a VGG at full optimisation costs more than compiling its train step, because of the
# random number code; at level 1 it is three times faster and the values are the same.
_INIT_OPTIONS = {"xla_backend_optimization_level": "1"}


class ModelFunctions(NamedTuple):
    """A network as two pure functions.

    Attributes:
      init: `(key, inputs) -> variables`, a dictionary with "params" and whatever else the model keeps.
      apply: `(variables, inputs, train, key) -> (outputs, model_state)`, where model_state holds every collection
        but "params", updated when `train` is True. `key` may be None when `train` is False.
    """

    init: Callable[[jax.Array, Any], dict[str, Any]]
    apply: Callable[[Mapping[str, Any], Any, bool, jax.Array | None], tuple[Any, dict[str, Any]]]


def from_linen(module: nn.Module, *, rngs: tuple[str, ...] = ("dropout",)) -> ModelFunctions:
    """Returns the functions of a Linen module called as `module(inputs, train)`.

    Every collection that initialisation makes besides "params" (BatchNorm's "batch_stats", for example) is mutable
    while training and constant otherwise.

    Args:
      module: the module; its `__call__` takes `(inputs, train: bool)`, or only `inputs` when it behaves the same in
        both modes.
      rngs: names of the random streams that the module draws from while training.

    Returns:
      The pair `(init, apply)`, to be passed to `classification(*from_linen(module), ...)`.

    Raises:
      TypeError: if `module` is not a Linen module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module: expected an instance of flax.linen.Module, got {type(module).__name__}. An NNX module is turned "
            "into a Linen one by flax.nnx.bridge.to_linen; for plain functions write (init, apply) directly"
        )
    call = _call_with_mode(module)

    def plain_init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        return dict(call(module.init, key, inputs, train=False))

    cheap_init = jax.jit(plain_init, compiler_options=_INIT_OPTIONS)
    usual_init = jax.jit(plain_init)

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, inputs))):
            return plain_init(key, inputs)  # compiler options are only allowed on the outermost jit
        if jax.default_backend() == "cpu":
            try:
                return cheap_init(key, inputs)
            except jax.errors.JaxRuntimeError as error:
                if "compile option" not in str(error):  # an XLA without this option
                    raise
        return usual_init(key, inputs)

    def apply(
        variables: Mapping[str, Any], inputs: Any, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        state = {name: value for name, value in variables.items() if name != "params"}
        if not train:
            return call(module.apply, variables, inputs, train=False), state
        if key is None:
            raise ValueError("key: a PRNG key is needed when train=True, got None")
        streams = {name: jax.random.fold_in(key, index) for index, name in enumerate(rngs)}
        outputs, updated = call(module.apply, variables, inputs, train=True, mutable=list(state), rngs=streams)
        return outputs, {**state, **updated}

    return ModelFunctions(init, apply)


def _call_with_mode(module: nn.Module) -> Callable[..., Any]:
    """Returns a caller that hands `train` on only to modules whose `__call__` takes it."""
    import inspect

    parameters = inspect.signature(type(module).__call__).parameters
    takes_train = "train" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def call(function: Callable[..., Any], variables_or_key: Any, inputs: Any, *, train: bool, **options: Any) -> Any:
        if takes_train:
            return function(variables_or_key, inputs, train=train, **options)
        return function(variables_or_key, inputs, **options)

    return call
