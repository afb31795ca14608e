"""Gates in Flax: as the convolution of a layer, of `jaxeff.models.Network`, or of any network of one's own.

A gate has no parameters. How much it drops stands in its settings, so that engines have static shapes; while a network
learns, or in a sweep, the ratios may come as variables instead, traced, by masking: collection "ratios", at the path of
the layer, `{"gate": {"channels": ..., "columns": ...}}`.
"""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import spec
from jaxeff.dynamic import convolution, selection
from jaxeff.dynamic.engines import Geometry, convolve, geometry, out_size
from jaxeff.dynamic.settings import DynamicSpec

RATIOS = "ratios"
"""Name of the collection of traced ratios."""


class GatedConvolution(nn.Module):
    """A gated convolution with the signature of `lax.conv_general_dilated`, for `conv_general_dilated_cls` of layers.

        nn.Conv(64, (3, 3), conv_general_dilated_cls=dynamic.gated(DynamicSpec(channels=0.5)))

    Attributes:
      settings: what is dropped, and the engine. Where the collection "ratios" has variables of this module, they take
        the place of the settings' ratios for channels and columns, and the engine masks; within
        `engines_at_own_ratios` it does not where the ratios are those of the settings.
    """

    settings: DynamicSpec

    def function(self) -> Callable[..., jax.Array]:
        """The convolution as a pure function, with its ratios bound."""
        ratios: tuple[Any, Any] | None = None
        if self.has_ratios:
            ratios = (self.get_variable(RATIOS, "channels"), self.get_variable(RATIOS, "columns"))
        for seen in _SEEN:
            seen["/".join(_path(self))] = ratios is not None
        return functools.partial(_convolve, "/".join(_path(self)[:-1]), self.settings, ratios)

    @property
    def has_ratios(self) -> bool:
        """Whether its ratios come as variables."""
        return self.has_variable(RATIOS, "channels")

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Convolves lhs [N, H, W, C] with rhs [kh, kw, C, O]; arguments as of lax.

        Raises:
          TypeError, ValueError: as `jaxeff.dynamic.conv`; for other layouts, groups or a dilated input.
        """
        return self.function()(*args, **kwargs)


def gated(settings: DynamicSpec) -> Callable[[], GatedConvolution]:
    """What `conv_general_dilated_cls` of a layer takes: a factory of gated convolutions, called "gate" in the layer."""
    return functools.partial(GatedConvolution, settings, name="gate")


def gate_layer(layer: spec.Conv) -> Callable[[], GatedConvolution]:
    """Gate factory of `jaxeff.models.Network(gate=...)`, for architectures of `jaxeff.dynamic.gate`.

    Raises:
      TypeError: if the layer's gate is no `DynamicSpec`.
    """
    if not isinstance(layer.gate, DynamicSpec):
        raise TypeError(f"layer {layer.name!r} has the gate {layer.gate!r}; expected a jaxeff.dynamic.DynamicSpec")
    return gated(layer.gate)


class Gated(nn.Module):
    """A network of one's own with gates before some of its convolutions; its variables stay where they are.

    Attributes:
      network: any Linen module that uses `nn.Conv`, or other layers with an attribute `conv_general_dilated_cls`.
      gates: {path or glob of the convolutions that read what is gated, as in "block1/*/conv2": settings}; of several
        that match one, the last.

    Raises:
      TypeError: when it is called, for settings that are no `DynamicSpec`.
      ValueError: when it is called, for a name that matches no convolution, listing those there are, or a layer that
        has a `conv_general_dilated_cls` already.
    """

    network: nn.Module
    gates: Mapping[str, DynamicSpec]

    def setup(self):
        """Puts the network's variables where its own would be."""
        nn.share_scope(self, self.network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network."""
        if wrong := {name: value for name, value in self.gates.items() if not isinstance(value, DynamicSpec)}:
            raise TypeError(f"gates: expected a jaxeff.dynamic.DynamicSpec for each name, got {wrong}")
        seen: list[str] = []
        made: list[Any] = []
        inside: list[str] = []
        root = len(_path(self))

        def intercept(call, call_args, call_kwargs, context):
            module = context.module
            if context.method_name != "__call__" or not hasattr(module, "conv_general_dilated_cls"):
                return call(*call_args, **call_kwargs)
            path = "/".join(_path(module)[root:])
            if any(not outer or path.startswith(f"{outer}/") for outer in inside):
                return call(*call_args, **call_kwargs)
            seen.append(path)
            settings = next((s for name, s in reversed([*self.gates.items()]) if fnmatch.fnmatchcase(path, name)), None)
            own = module.conv_general_dilated_cls
            if settings is None or any(own is gate for gate in made):
                return call(*call_args, **call_kwargs)
            if own is not None:
                raise ValueError(f"gate before {path!r}: the layer has a conv_general_dilated_cls already, {own!r}")
            made.append(gated(settings))
            # The same module with another convolution, in the place of the one that was called. What is inside it, such
            # as the convolution of a boosted layer, has the gate already.
            gated_module = module.clone(parent=module.scope, conv_general_dilated_cls=made[-1])
            inside.append(path)
            try:
                return gated_module(*call_args, **call_kwargs)
            except ValueError as error:
                raise ValueError(f"gate before {path!r}: {error}") from error
            finally:
                inside.pop()

        with nn.intercept_methods(intercept):
            result = self.network(*args, **kwargs)
        if unused := [name for name in self.gates if not fnmatch.filter(seen, name)]:
            # Not those inside a layer, whose gate is that of the layer.
            inner = lambda path: any(path != outer and (not outer or path.startswith(f"{outer}/")) for outer in seen)
            known = ", ".join(repr(path) for path in dict.fromkeys(seen) if not inner(path))
            raise ValueError(f"gates name {unused}, but the convolutions are: {known}")
        return result


class GatedCall(NamedTuple):
    """One gated convolution as a network calls it: everything its speed depends on.

    Attributes:
      path: of the layer, "conv2/layer".
      settings: of its gate.
      x: shape and dtype [N, H, W, C] of what it reads.
      kernel: shape and dtype [kh, kw, C, O].
      window: geometry of the convolution.
      features: how many output channels of each sample are computed; None for all.
    """

    path: str
    settings: DynamicSpec
    x: jax.ShapeDtypeStruct
    kernel: jax.ShapeDtypeStruct
    window: Geometry
    features: int | None = None

    @property
    def signature(self) -> str:
        """Its name in the table of fastest engines."""
        return convolution.signature(self.settings, self.x, self.kernel, self.window, self.features)


def gated_calls(module: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None) -> tuple[GatedCall, ...]:
    """The gated convolutions of a network in the order in which they run, one for each projection of a neuron.

    Args:
      module: a Linen module, for example `jaxeff.models.Network` or `Gated`.
      *inputs: what it is called with: pytrees of arrays, `jax.ShapeDtypeStruct` and numbers.
      options: keyword arguments of its call, such as {"train": False}.
    """
    calls: list[GatedCall] = []
    _WATCHED.append(calls)
    try:
        _shapes_of_init(module, inputs, options)
    finally:
        _WATCHED.pop()
    return tuple(calls)


def parameter_bytes(module: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None) -> int:
    """Bytes of a network's parameters, called as of `gated_calls`: what one call reads besides its input."""
    made = _shapes_of_init(module, inputs, options)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made["params"]))


@contextlib.contextmanager
def reading_ratios(paths: Iterable[Iterable[str]]) -> Iterator[None]:
    """Within it, every gate of these paths must read its ratios, if any gate is traced at all.

    Raises:
      ValueError: at its end, for paths that no gate has; lists those of the network.
    """
    seen: dict[str, bool] = {}
    _SEEN.append(seen)
    try:
        yield
    finally:
        _SEEN.pop()
    if seen and (unread := [path for block in paths for path in block if not seen.get(path)]):
        raise ValueError(f"paths: no gate reads the ratios of {unread}; the gates are at {sorted(seen)}")


@contextlib.contextmanager
def engines_at_own_ratios() -> Iterator[None]:
    """Within it, gates whose traced ratios are those of their settings compute by their engine, at run time.

    Both ways are in the program, and one of them runs: not for ratios that `vmap` maps over, where both would.
    """
    _STANDING.append(True)
    try:
        yield
    finally:
        _STANDING.pop()


def _shapes_of_init(module: nn.Module, inputs: Any, options: Mapping[str, Any] | None) -> Any:
    leaves, structure = jax.tree.flatten(inputs)
    shaped = {i: jax.ShapeDtypeStruct(a.shape, a.dtype) for i, a in enumerate(leaves) if hasattr(a, "shape")}

    def init(arrays):
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return module.init(jax.random.key(0), *jax.tree.unflatten(structure, filled), **(options or {}))

    return jax.eval_shape(init, shaped)


def _path(module: nn.Module) -> tuple[str, ...]:
    """Where the variables of a module stand: `module.path` keeps the name of a scope that it shares no longer."""
    names: list[str] = []
    scope: Any = module.scope
    while scope.parent is not None:
        names.append(scope.name)
        scope = scope.parent
    return (*scope.path, *reversed(names))


# What is written to while a network is traced: calls for `gated_calls`, and by path whether a gate has read ratios.
_WATCHED: list[list[GatedCall]] = []
_SEEN: list[dict[str, bool]] = []
# Not empty within `engines_at_own_ratios`.
_STANDING: list[bool] = []


def _convolve(
    path, settings, ratios, lhs, rhs, window_strides, padding, lhs_dilation=None, rhs_dilation=None,
    dimension_numbers=None, feature_group_count=1, batch_group_count=1, precision=None, preferred_element_type=None,
    features=None,
):  # fmt: skip
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    if lhs.ndim != 4 or layout != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)):
        raise ValueError(f"gates are for 2D convolutions of [N, H, W, C] with [kh, kw, C, O], got {dimension_numbers}")
    if feature_group_count != 1 or batch_group_count != 1:
        raise ValueError(
            f"a gate saves nothing before a grouped convolution (groups={feature_group_count}): each output needs its "
            "own channels; put it before the dense convolution that follows"
        )
    if any(d != 1 for d in lhs_dilation or ()):
        raise ValueError(f"a gate takes no dilated input, got lhs_dilation={tuple(lhs_dilation)}")
    if preferred_element_type not in (None, lhs.dtype):
        raise ValueError(f"a gated convolution gives the dtype of its input, not {preferred_element_type}")
    window = geometry(lhs.shape, rhs.shape, window_strides, padding, rhs_dilation or (1, 1), precision)
    for calls in _WATCHED:
        x, kernel = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (lhs, rhs))
        calls.append(GatedCall(path, settings, x, kernel, window, None if features is None else features.shape[-1]))
    if ratios is None:
        kept = None
        if features is not None:
            reader = selection.Reader(window, (rhs.shape[0], rhs.shape[1]))
            kept = selection.select(lhs, settings, reader)._replace(features=features)
        return convolution.conv(lhs, rhs, settings, **window._asdict(), kept=kept)
    channels, columns = ratios
    if _STANDING and jnp.ndim(channels) == jnp.ndim(columns) == 0:
        out = out_size(window, lhs.shape[1:3], rhs.shape[:2])
        kept = selection.planned(settings, lhs.shape, out)
        if convolution.resolved(settings, kept, lhs, rhs, window) != "mask":
            return _by_engine_at_own_ratios(window, settings, jnp.asarray(channels), jnp.asarray(columns), lhs, rhs)
    return _masked_by_ratio(window, settings, channels, columns, lhs, rhs)


def _masked_by_ratio(window, settings, channels, columns, lhs, rhs):
    reader = selection.Reader(window, (rhs.shape[0], rhs.shape[1]))
    y = convolve(window, selection.masked_by_ratio(lhs, channels, columns, settings), rhs)
    return selection.masked_outputs(y, selection.outputs_by_ratio(lhs, channels, settings, reader), settings)


# Forward and backward pass branch each on its own: differentiated by JAX, a branch would keep for its backward pass
# what every other branch needs for its own, as arrays of zeros.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_engine_at_own_ratios(window, settings, channels, columns, lhs, rhs):
    own, masked = _two_ways(window, settings, channels, columns)
    return lax.cond(_stand(settings, channels, columns), own, masked, lhs, rhs)


def _either_forward(window, settings, *operands):
    return _by_engine_at_own_ratios(window, settings, *operands), operands


def _either_backward(window, settings, operands, g):
    channels, columns, lhs, rhs = operands
    ways = (
        lambda *args, way=way: jax.vjp(way, *args[:2])[1](args[2]) for way in _two_ways(window, settings, *operands[:2])
    )
    by_lhs, by_rhs = lax.cond(_stand(settings, channels, columns), *ways, lhs, rhs, g)
    return jnp.zeros_like(channels), jnp.zeros_like(columns), by_lhs, by_rhs


_by_engine_at_own_ratios.defvjp(_either_forward, _either_backward)


def _two_ways(window, settings, channels, columns):
    own = lambda lhs, rhs: convolution.conv(lhs, rhs, settings, **window._asdict())
    return own, functools.partial(_masked_by_ratio, window, settings, channels, columns)


def _stand(settings, channels, columns) -> jax.Array:
    """Whether traced ratios are those of the settings."""
    near = [abs(ratio - own) < 1e-6 for ratio, own in ((channels, settings.channels), (columns, settings.columns))]
    return near[0] & near[1]
