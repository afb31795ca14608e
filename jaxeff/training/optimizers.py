"""Optimisers and learning-rate schedules by name, built on optax; from Python or from a section of a config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxeff import trees

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def schedule(
    name: str,
    base: float,
    steps: int | None = None,
    warmup: int = 0,
    *,
    end: float = 0.0,
    boundaries: Sequence[float] = (),
    factor: float = 0.1,
) -> Schedule:
    """Returns the learning rate as a function of the number of finished steps.

    Every schedule may begin with a warm-up, in which the rate grows linearly from 0 to `base`; the shape then covers
    the steps that are left.

    Args:
      name: "constant"; "cosine" (half a cosine from `base` to `end`); "linear" (from `base` to `end`); "step"
        (multiplied by `factor` at each boundary); "warmup_cosine" (cosine that insists on a warm-up).
      base: learning rate after the warm-up; finite and not negative.
      steps: length of the whole run in steps, warm-up included; needed by cosine, linear and fractional boundaries.
      warmup: length of the warm-up in steps.
      end: learning rate at the end of cosine and linear.
      boundaries: for "step", the steps at which the rate drops, increasing: whole numbers of steps, or fractions of
        `steps` in (0, 1).
      factor: for "step", what the rate is multiplied by at each boundary.

    Returns:
      `count -> rate`, float32 scalar; a traced count is fine, so a schedule never makes a step compile again.

    Raises:
      ValueError: for an unknown name (lists the valid ones) or an argument out of range (names it).

    Example:
      >>> rate = schedule("cosine", 0.1, steps=100, warmup=10)
      >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 55, 100)]
      [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    _check_name("schedule", name, SCHEDULES)
    _check_rate("base", base)
    _check_rate("end", end)
    _check_count("warmup", warmup, least=1 if name == "warmup_cosine" else 0)
    if steps is not None:
        _check_count("steps", steps, least=1)
        if warmup >= steps:
            raise ValueError(f"warmup: must be shorter than the run, got warmup={warmup} and steps={steps}")
    elif name in ("cosine", "linear", "warmup_cosine"):
        raise ValueError(f"steps: the schedule {name!r} needs the number of steps of the run, got None")
    shape = SCHEDULES[name](base, steps, warmup, end, boundaries, factor)
    if not warmup:
        return shape
    return optax.join_schedules([optax.linear_schedule(0.0, base, warmup), shape], [warmup])


def optimizer(
    name: str,
    schedule: float | Schedule,
    *,
    weight_decay: float = 0.0,
    decay: str | Callable[[Any], Any] = "weights",
    clip_norm: float | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Returns an optimiser whose state shows the learning rate of the last step.

    The order of its links: clipping; the optimiser's scaling; the learning rate. Weight decay is added to the gradient
    before the scaling in sgd, adam and rmsprop (L2 regularisation), and after it in adamw, lamb, lars and lion
    (decoupled decay).

    Args:
      name: "sgd" (momentum=0.0, nesterov=False), "adam", "adamw", "lamb" (b1=0.9, b2=0.999, eps=1e-8; lamb 1e-6),
        "lars" (momentum=0.9, nesterov=False, trust_coefficient=0.001), "lion" (b1=0.9, b2=0.99) or "rmsprop"
        (decay_rate=0.9, eps=1e-8, momentum=0.0).
      schedule: learning rate, a number or a function of the number of finished steps.
      weight_decay: coefficient, not negative.
      decay: which parameters decay: "weights" leaves out biases, norm scales and everything of fewer than two axes;
        "all"; or a function from the parameters to a tree of bools.
      clip_norm: largest global L2 norm of the gradient; None does not clip.
      **options: the options of this optimiser, listed above.

    Returns:
      The optax transformation. Somewhere in its state is a float32 scalar called `learning_rate`.

    Raises:
      ValueError: for an unknown name or option (lists the valid ones) or a value out of range (names it).
    """
    _check_name("optimizer", name, OPTIMIZERS)
    build, coupled = OPTIMIZERS[name]
    _check_options(name, build, options)
    if not callable(schedule):
        _check_rate("learning rate (schedule)", schedule)
    _check_rate("weight_decay", weight_decay)
    if clip_norm is not None and not (_finite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm: expected a finite number above 0 or None, got {clip_norm}")
    mask = _decay_mask(decay)
    scaling, after = build(**options)
    decayed = optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        *((decayed, scaling) if coupled else (scaling, decayed)),
        after,
        _scale_by_shown_rate(schedule),
    )


def optimizer_from(config: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """Returns the optimiser that a section of a config describes.

    Args:
      config: `{"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "schedule": {"name": "cosine", "base": 0.1,
        "warmup": 100}}`: the arguments of `optimizer`, with `schedule` a number or the arguments of `schedule`.
      steps: number of steps of the run, used where the schedule does not say its own.

    Returns:
      The optax transformation.

    Raises:
      ValueError: for a missing or unknown field; lists the valid ones.

    Example:
      >>> tx = optimizer_from({"name": "adam", "schedule": {"name": "linear", "base": 1e-3}}, steps=100)
    """
    fields = _section("optimizer", config, ("name", "schedule"))
    rate = fields.pop("schedule")
    if not isinstance(rate, int | float):
        rate = schedule_from(rate, steps)
    return optimizer(fields.pop("name"), rate, **fields)


def schedule_from(config: Mapping[str, Any], steps: int) -> Schedule:
    """Returns the schedule that a section of a config describes.

    Args:
      config: the arguments of `schedule`, `{"name": "cosine", "base": 0.1, "warmup": 100}`.
      steps: number of steps of the run, used where the section does not say its own.

    Returns:
      `count -> rate`.

    Raises:
      ValueError: for a missing or unknown field; lists the valid ones.
    """
    fields = _section("schedule", config, ("name", "base"))
    valid = tuple(inspect.signature(schedule).parameters)
    unknown = sorted(set(fields) - set(valid))
    if unknown:
        raise ValueError(f"schedule: unknown field {', '.join(unknown)}; the valid ones are {', '.join(valid)}")
    if fields.get("steps") is None:
        fields["steps"] = steps
    return schedule(**fields)


def decays(params: Any) -> Any:
    """Returns which parameters take weight decay by default: not biases, norm scales, or anything below two axes.

    Args:
      params: pytree of arrays.

    Returns:
      Tree of bools.
    """

    def one(name: str, leaf: Any) -> bool:
        last = name.rsplit("/", 1)[-1]
        # By name as well: group-major and stacked layers give a bias a second axis.
        return jnp.ndim(leaf) >= 2 and not last.endswith(("bias", "scale"))

    return trees.map_named(one, params)


# ---- Schedules ------------------------------------------------------------------------------------------------------


def _constant(base, steps, warmup, end, boundaries, factor) -> Schedule:
    return optax.constant_schedule(base)


def _cosine(base, steps, warmup, end, boundaries, factor) -> Schedule:
    # Written out because optax's takes the end as a fraction of the base, which a base of 0 does not have.
    left = steps - warmup
    return lambda count: end + (base - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(count / left, 0, 1)))


def _linear(base, steps, warmup, end, boundaries, factor) -> Schedule:
    return optax.linear_schedule(base, end, steps - warmup)


def _step(base, steps, warmup, end, boundaries, factor) -> Schedule:
    if not boundaries:
        raise ValueError("boundaries: the schedule 'step' needs the steps at which the rate drops, got none")
    _check_rate("factor", factor)
    if any(0 < b < 1 for b in boundaries) and steps is None:
        raise ValueError(f"steps: fractional boundaries {tuple(boundaries)} need the number of steps, got None")
    drops = [round(b * steps) if 0 < b < 1 else b for b in boundaries]
    if any(b != int(b) or b <= warmup for b in drops) or sorted(set(drops)) != drops:
        raise ValueError(
            f"boundaries: expected increasing whole steps after the warm-up of {warmup}, or fractions in (0, 1), "
            f"got {tuple(boundaries)}"
        )
    return optax.piecewise_constant_schedule(base, {int(b) - warmup: factor for b in drops})


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "step": _step,
    "warmup_cosine": _cosine,
}


# ---- Optimisers: options -> (scaling, what follows the decoupled decay) ---------------------------------------------

_Parts = tuple[optax.GradientTransformation, optax.GradientTransformation]


def _sgd(momentum: float = 0.0, nesterov: bool = False) -> _Parts:
    _check_fraction("momentum", momentum)
    if nesterov and not momentum:
        raise ValueError("nesterov: needs a momentum above 0, got momentum=0")
    return (optax.trace(momentum, nesterov) if momentum else optax.identity()), optax.identity()


def _adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> _Parts:
    _check_adam(b1, b2, eps)
    return optax.scale_by_adam(b1, b2, eps), optax.identity()


def _lamb(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> _Parts:
    _check_adam(b1, b2, eps)
    return optax.scale_by_adam(b1, b2, eps), optax.scale_by_trust_ratio()


def _lars(momentum: float = 0.9, nesterov: bool = False, trust_coefficient: float = 0.001) -> _Parts:
    _check_fraction("momentum", momentum)
    # As in optax.lars, biases and scales keep their plain gradient: their norms say nothing about a good step.
    ratio = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), decays)
    return optax.identity(), optax.chain(ratio, optax.trace(momentum, nesterov) if momentum else optax.identity())


def _lion(b1: float = 0.9, b2: float = 0.99) -> _Parts:
    _check_adam(b1, b2, 1.0)
    return optax.scale_by_lion(b1, b2), optax.identity()


def _rmsprop(decay_rate: float = 0.9, eps: float = 1e-8, momentum: float = 0.0) -> _Parts:
    _check_fraction("decay_rate", decay_rate)
    _check_fraction("momentum", momentum)
    follow = optax.trace(momentum) if momentum else optax.identity()
    return optax.chain(optax.scale_by_rms(decay_rate, eps), follow), optax.identity()


# name -> (builder, whether weight decay is part of the gradient)
OPTIMIZERS: dict[str, tuple[Callable[..., _Parts], bool]] = {
    "sgd": (_sgd, True),
    "adam": (_adam, True),
    "adamw": (_adam, False),
    "lamb": (_lamb, False),
    "lars": (_lars, False),
    "lion": (_lion, False),
    "rmsprop": (_rmsprop, True),
}


class ShownRateState(NamedTuple):
    """State of the last link of every optimiser here.

    Attributes:
      updates: int32 scalar, number of finished updates.
      learning_rate: float32 scalar, the rate of the last update (of the first one before it).
    """

    updates: jax.Array
    learning_rate: jax.Array


def _scale_by_shown_rate(rate: float | Schedule) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate and keeps the rate in its state, where a step finds it for the metrics."""

    def at(count: jax.Array) -> jax.Array:
        return jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)

    def init(params: Any) -> ShownRateState:
        count = jnp.zeros((), jnp.int32)
        return ShownRateState(count, at(count))

    def update(updates: Any, state: ShownRateState, params: Any = None) -> tuple[Any, ShownRateState]:
        now = at(state.updates)
        scaled = jax.tree.map(lambda leaf: (-now * leaf).astype(leaf.dtype), updates)
        return scaled, ShownRateState(optax.safe_increment(state.updates), now)

    return optax.GradientTransformation(init, update)


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _decay_mask(decay: str | Callable[[Any], Any]) -> Callable[[Any], Any] | None:
    if callable(decay):
        return decay
    masks = {"weights": decays, "all": None}
    _check_name("decay", decay, masks)
    return masks[decay]


def _check_name(argument: str, name: Any, valid: Mapping[str, Any]) -> None:
    if name not in valid:
        raise ValueError(f"{argument}: unknown name {name!r}; the valid ones are {', '.join(sorted(valid))}")


def _check_options(name: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    own = tuple(inspect.signature(build).parameters)
    unknown = sorted(set(options) - set(own))
    if unknown:
        valid = (*own, "weight_decay", "decay", "clip_norm")
        raise ValueError(
            f"optimizer {name!r}: unknown option {', '.join(unknown)}; the valid ones are {', '.join(valid)}"
        )


def _section(kind: str, config: Any, required: tuple[str, ...]) -> dict[str, Any]:
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        raise ValueError(f"{kind}: expected a mapping with {', '.join(required)}, got {config!r}")
    missing = [field for field in required if field not in config]
    if missing:
        raise ValueError(f"{kind}: the section has no {' and no '.join(missing)}; it has {', '.join(map(str, config))}")
    return dict(config)


def _finite(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer) or math.isfinite(value)


def _check_rate(argument: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        return  # a sweep under jit or vmap
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{argument}: expected a number, got {value!r}") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{argument}: expected a finite number that is not negative, got {value}")


def _check_count(argument: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}: expected a whole number of at least {least}, got {value!r}")


def _check_fraction(argument: str, value: Any) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0 <= value < 1:
        raise ValueError(f"{argument}: expected a number in [0, 1), got {value}")


def _check_adam(b1: Any, b2: Any, eps: Any) -> None:
    _check_fraction("b1", b1)
    _check_fraction("b2", b2)
    if not isinstance(eps, jax.core.Tracer) and not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
