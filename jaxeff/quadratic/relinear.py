"""ReLinear training: a quadratic network starts as its first-order twin and leaves it only as fast as it is let.

After Fan et al. 2023 (arXiv 2110.06081): the quadratic parameters start switched off (`initialization="relinear"` of
the layers, or `jaxeff.quadratic.convert.transplant` for a trained twin), and training restrains them, either by smaller
steps (`gamma`) or by shrinking them after every step (`shrink`).

>>> import jax.numpy as jnp, optax
>>> params = {"kernel_a": jnp.ones(2), "kernel_b": jnp.ones(2), "kernel_c": jnp.ones(2)}
>>> groups(params, "quadralib")
{'kernel_a': 'quadratic', 'kernel_b': 'quadratic', 'kernel_c': 'twin'}
>>> tx = optax.chain(optax.sgd(0.1), restrain(groups(params, "quadralib"), gamma=0.01))
"""

from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff import spec, trees
from jaxeff.quadratic import kinds
from jaxeff.quadratic.layers import STARTS

Group = Literal["twin", "quadratic", "quadratic_at_one", "quadratic_at_identity", "rest"]
Schedule = Callable[[Any], Any]


def groups(params: Any, kind: str | spec.Architecture, only: str | Collection[str] | None = None) -> Any:
    """Says of every parameter what it belongs to.

    Args:
      params: parameters of one layer, of a network, or any tree with quadratic layers in it.
      kind: the kind of all its quadratic layers, or the architecture whose network has these parameters.
      only: one or several projections and extras whose parameters count as quadratic, the others' being "rest"; None
        for all. So that transformations with paces of their own can be chained.

    Returns:
      A tree of the same structure: "twin" for what the first-order twin has as well (weights, bias and branch norm of
      the projection that starts as it); "quadratic" for the other projections and the extras of the kind, which are
      switched off at zero, or "quadratic_at_one" and "quadratic_at_identity" for those that are there; "rest" for
      everything outside of quadratic layers and for output norms. Of a kind without a twin all parameters are
      "quadratic".

    Raises:
      ValueError: for an unknown kind, or a name in `only` that no projection or extra has.
    """
    if isinstance(kind, str):
        everywhere = kinds.get(kind)
        own = {f"{part}_{p.name}" for p in everywhere.projections for part in ("kernel", "bias")}
        names = (name.rpartition("/") for name in trees.paths(params))
        homes = {home: everywhere for home, _, name in names if name in own}
    else:
        layers = ((path, layer) for path, layer in spec.walk(kind) if isinstance(layer, spec.Conv | spec.Dense))
        # Parameters of the layer at "block/conv1" are called "block/conv1/layer/...".
        homes = {f"{path}/layer": kinds.get(layer.kind) for path, layer in layers}

    used = [everywhere] if isinstance(kind, str) else homes.values()
    there = {part.name for layer in used for part in layer.parts}
    only = {only} if isinstance(only, str) else only
    if only is not None and not set(only) <= there:
        raise ValueError(f"only={sorted(only)} must be some of the projections and extras {sorted(there)}")

    def group(name, _):
        home, _, parameter = name.rpartition("/")
        if home in homes:
            return _group(parameter, homes[home], only)
        layer, _, norm = home.rpartition("/")
        return _group_of_norm(norm, parameter, homes[layer], only) if layer in homes else "rest"

    return trees.map_named(group, params)


class RestrainState(NamedTuple):
    """State of `restrain`.

    Attributes:
      step: number of updates so far; int32.
    """

    step: jax.Array


def restrain(
    labels: Any, *, gamma: float | Schedule = 1.0, shrink: float | Schedule = 1.0
) -> optax.GradientTransformation:
    """Restrains the quadratic parameters; to be chained after the optimiser.

    With gamma=0 and a ReLinear start, training is that of the first-order twin, unless gradients are clipped by their
    global norm, in which the quadratic ones have a share. Fan et al. train a ResNet with 1e-4.

    Args:
      labels: tree of groups as `groups` makes it.
      gamma: factor on the updates of quadratic parameters, or a schedule of the step: their learning rate in units of
        the others'. May be traced. The factor is on the update and not on the gradient, which Adam would undo.
      shrink: factor on what separates the quadratic parameters from being switched off, after each step; or a
        schedule. May be traced.

    Returns:
      The transformation; with `shrink` its update needs the parameters.

    Raises:
      ValueError: for a negative gamma, or a shrink outside of [0, 1].
    """
    if _known(gamma) and not np.asarray(gamma) >= 0:
        raise ValueError(f"gamma must be at least 0 (0 freezes the quadratic parameters), got {gamma}")
    if _known(shrink) and not 0 <= np.asarray(shrink) <= 1:
        raise ValueError(f"shrink must be in [0, 1] (1 leaves the quadratic parameters as they are), got {shrink}")
    shrinks = not _known(shrink) or np.asarray(shrink) < 1

    def init(params):
        return RestrainState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if shrinks and params is None:
            raise ValueError("restrain with shrink needs the parameters: tx.update(grads, state, params)")
        pace = gamma(state.step) if callable(gamma) else gamma
        keep = shrink(state.step) if callable(shrink) else shrink

        def one(label, step, param):
            if not label.startswith("quadratic"):
                return step
            step = step * jnp.asarray(pace, step.dtype)
            if param is None:
                return step
            off = _OFF[label](None, param.shape, param.dtype)
            return off + keep * (param + step - off) - param

        if shrinks:
            updates = jax.tree.map(one, labels, updates, params)
        else:
            updates = jax.tree.map(lambda label, step: one(label, step, None), labels, updates)
        return updates, RestrainState(state.step + 1)

    return optax.GradientTransformation(init, update)


def _known(value: float | Schedule) -> TypeGuard[float]:
    """Whether it is a number to be checked now: neither a schedule nor traced."""
    return not callable(value) and not isinstance(value, jax.core.Tracer)


def _group(parameter: str, kind: kinds.Kind, only: Collection[str] | None) -> Group:
    """The group of a kernel, a bias or an extra of a layer."""
    starts = {part.name: part.relinear for part in kind.parts}
    if parameter in {extra.name for extra in kind.extras}:
        return _group_of(parameter, starts[parameter], True, only)
    part, _, projection = parameter.partition("_")
    if part not in ("kernel", "bias") or projection not in starts:
        return "rest"
    return _group_of(projection, starts[projection], part == "bias", only)


def _group_of_norm(norm: str, parameter: str, kind: kinds.Kind, only: Collection[str] | None) -> Group:
    """The group of "scale" or "bias" of a norm of a layer."""
    projection = next((p for p in kind.projections if norm == f"norm_{p.name}"), None)
    return _group_of(projection.name, projection.relinear, parameter == "bias", only) if projection else "rest"


def _group_of(name: str, start: kinds.Start | None, offset: bool, only: Collection[str] | None) -> Group:
    if start == "twin" or (only is not None and name not in only):
        return "twin" if start == "twin" else "rest"
    if start == "identity":
        return "quadratic_at_identity"
    # A projection is one through its offset, its own or its norm's.
    return "quadratic_at_one" if start == "one" and offset else "quadratic"


_OFF = {"quadratic": STARTS["zero"], "quadratic_at_one": STARTS["one"], "quadratic_at_identity": STARTS["identity"]}
