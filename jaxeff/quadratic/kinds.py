"""What a type of neuron is, as data, and the registry of types.

A kind says which linear projections of the input a neuron takes and how it combines them. Dense and convolutional
layers, their parameters, initialisation, backward passes and costs are all derived from that, so adding a kind is
adding one `Kind`. The kinds of the field are in `jaxeff.quadratic.taxonomy`.

Letters: n inputs of a neuron (of a convolution: the numbers in one patch), M neurons of a layer, O its output
channels, r projections of one name per neuron.
"""

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax

Start = Literal["twin", "free", "zero", "one", "identity"]
Of = Literal["x", "square", "pairs", "symmetric_pairs"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """One linear map of a neuron.

    Attributes:
      name: parameters are called kernel_<name> and bias_<name>.
      of: what is projected: "x", "square" (x * x, element by element), "pairs" (all n^2 products of two inputs) or
        "symmetric_pairs" (the n (n + 1) / 2 different ones).
      rank: r, how many of these maps each neuron has.
      kernel: name of the projection whose kernel this one uses as well; None for a kernel of its own.
      bias: whether it takes a bias where the layer has biases.
      gain: factor on the Kaiming standard deviation that gives the neuron unit output variance.
      relinear: how the projection starts so that the network starts as its first-order twin, after ReLinear (Fan et
        al. 2023, arXiv 2110.06081): "twin" (the twin's own weights), "free" (any, because it is multiplied by zero),
        "zero" (off) or "one" (constant one). None if the kind has no such start.
    """

    name: str
    of: Of = "x"
    rank: int = 1
    kernel: str | None = None
    bias: bool = True
    gain: float = 1.0
    relinear: Start | None = None


@dataclasses.dataclass(frozen=True)
class Extra:
    """A parameter of a kind that is not a projection of the input: a coefficient, or a map between its features.

    Attributes:
      name: what the parameter is called, and the keyword under which `combine` takes it.
      shape: (M, groups) -> its shape.
      init: initialiser (key, shape, dtype) -> array.
      relinear: how it starts where the network is to start as its first-order twin: "zero", "one" or "identity".
      bias: whether it exists only where the layer has biases; `combine` then gets None without.
      macs: (M, groups) -> multiply-accumulates that it takes per neuron.
    """

    name: str
    shape: Callable[[int, int], tuple[int, ...]]
    init: Callable[..., jax.Array]
    relinear: Start | None = None
    bias: bool = False
    macs: Callable[[int, int], int] = lambda neurons, groups: 0


Part = Projection | Extra


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of neuron.

    Attributes:
      name: how users call it.
      formula: for people.
      projections: its linear maps, in the order `combine` takes them.
      combine: maps the projections, arrays [..., M], or [..., M, r] where r > 1, to the output [..., M], or
        [..., M, outputs] where a neuron has several; extras are keywords.
      source: where it comes from.
      slopes: closed form of the derivative of the output [..., M] by each projection, from the projections; for kinds
        without extras and with one output. None has JAX differentiate `combine`.
      extras: further parameters.
      outputs: output channels of one neuron.
      operations: operations per neuron after the projections, as the field counts them: products, and of QuadraLib's
        neuron and those alike the sum too; the sum with a square or a full form is not counted.
    """

    name: str
    formula: str
    projections: tuple[Projection, ...]
    combine: Callable[..., jax.Array]
    source: str
    slopes: Callable[..., tuple[Any, ...]] | None = None
    extras: tuple[Extra, ...] = ()
    outputs: int = 1
    operations: int = 0

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its projections and extras."""
        return (*self.projections, *self.extras)

    def apply(self, *values: jax.Array, **extras: Any) -> jax.Array:
        """`combine`, differentiated by `slopes` where the kind has them: in any mode and of any order."""
        if self.slopes is None:
            return self.combine(*values, **extras)
        slopes = self.slopes

        @jax.custom_jvp
        def combine(*values):
            return self.combine(*values)

        @combine.defjvp
        def rule(values, tangents):
            y, terms, factors = combine(*values), [], slopes(*values)
            if not isinstance(factors, tuple) or len(factors) != len(values):
                raise ValueError(
                    f"kind {self.name!r}: slopes must be a tuple of {len(values)}, one for each projection"
                )
            for p, slope, tangent in zip(self.projections, factors, tangents, strict=True):
                term = slope * tangent
                terms.append(term if p.rank == 1 else term.sum(-1))
            return y, sum(terms[1:], terms[0]).astype(y.dtype)

        return combine(*values)

    def neurons(self, features: int) -> int:
        """M, the number of neurons that give so many output channels.

        Raises:
          ValueError: if there are none, or the channels of one neuron do not divide them.
        """
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        if features % self.outputs:
            raise ValueError(
                f"kind {self.name!r} gives {self.outputs} channels per neuron, which do not divide {features} features"
            )
        return features // self.outputs


class NeuronCost(NamedTuple):
    """Parameters and multiply-accumulates of one layer; of a convolution the latter are per output position."""

    params: int
    macs: int


KINDS: dict[str, Kind] = {}
FAMILIES: dict[str, Callable[..., Kind]] = {}


def register(kind: Kind, *, overwrite: bool = False) -> Kind:
    """Adds a kind of the user's own, and returns it; `overwrite` replaces one of the same name.

    Raises:
      ValueError: if the name is taken by another kind, names repeat, refer to nothing or are those of other parameters
        of a layer, or slopes are of a form that has none.
    """
    _check_parts(kind)
    if kind.name in FAMILIES:
        raise ValueError(f"kind {kind.name!r} would hide the family of that name; choose another name")
    if kind.name in KINDS and KINDS[kind.name] != kind and not overwrite:
        raise ValueError(
            f"kind {kind.name!r} exists already: {KINDS[kind.name].formula}; choose another name or pass overwrite=True"
        )
    KINDS[kind.name] = kind
    return kind


def _check_parts(kind: Kind) -> None:
    """Raises ValueError if no layer could be made of a kind."""
    names = [part.name for part in kind.parts]
    if not kind.projections or len(set(names)) != len(names):
        raise ValueError(f"kind {kind.name!r} needs projections with different names, got {names}")
    own = {p.name: p for p in kind.projections if p.kernel is None}
    if missing := sorted({p.kernel for p in kind.projections if p.kernel} - own.keys()):
        raise ValueError(f"kind {kind.name!r} shares the kernels of {missing}, but its own are those of {sorted(own)}")
    if odd := [part.name for part in kind.parts if not part.name.isidentifier()]:
        raise ValueError(f"kind {kind.name!r}: names must be identifiers, got {odd}")
    if odd := [part.name for part in kind.parts if part.relinear not in (None, *get_args(Start))]:
        raise ValueError(f"kind {kind.name!r}: relinear of {odd} must be None or one of {', '.join(get_args(Start))}")
    if _has_twin(kind) and (odd := [extra.name for extra in kind.extras if extra.relinear is None]):
        raise ValueError(f"kind {kind.name!r}: its projections start as a first-order twin, so {odd} need relinear too")
    for p in kind.projections:
        if p.of not in get_args(Of) or not isinstance(p.rank, int) or p.rank < 1:
            raise ValueError(
                f"kind {kind.name!r}: projection {p.name!r} must be of one of {', '.join(map(repr, get_args(Of)))} and "
                f"have a rank that is an integer from 1, got of={p.of!r}, rank={p.rank}"
            )
        other = own[p.kernel or p.name]
        if p.rank != other.rank or weights_of(p.of, 2) != weights_of(other.of, 2):
            raise ValueError(
                f"kind {kind.name!r}: {p.name!r} cannot share the kernel of {other.name!r}, which has another shape: "
                f"rank {p.rank} of {p.of!r} and rank {other.rank} of {other.of!r}"
            )
    taken = [p.name for p in kind.projections if p.name == "out"]
    biases = {f"bias_{p.name}" for p in kind.projections}
    taken += [e.name for e in kind.extras if e.name.startswith(("kernel_", "norm_")) or e.name in biases]
    if taken:
        raise ValueError(
            f"kind {kind.name!r}: {taken} would be taken for other parameters of a layer (norm_out is its output norm, "
            "and kernel_ and norm_ begin those of projections); choose other names"
        )
    if kind.slopes is not None and (kind.extras or kind.outputs > 1):
        raise ValueError(f"kind {kind.name!r}: slopes are for kinds without extras and with one output; leave them out")


def register_family(name: str, build: Callable[..., Kind]) -> None:
    """Adds a family of kinds: `get("name(option=value)")` calls `build(option=value)`, `get("name")` its defaults.

    Raises:
      ValueError: if the name is taken.
    """
    if FAMILIES.get(name, build) is not build or name in KINDS:
        raise ValueError(f"kind {name!r} exists already; choose another name")
    FAMILIES[name] = build


def get(name: str) -> Kind:
    """The kind of that name: "quadralib", or one of a family with options, "bergstra(rank=4)".

    Raises:
      ValueError: listing the known kinds; for an option that the family does not have.
    """
    if not isinstance(name, str):
        raise ValueError(f"kind must be the name of one, such as 'quadralib', got {name!r}; register your own first")
    if name in KINDS:
        return KINDS[name]
    family, options = _parsed(name)
    if family not in FAMILIES:
        raise ValueError(
            f"unknown kind {name!r}; known: {', '.join((*KINDS, *FAMILIES))}. jaxeff.quadratic.register adds one"
        )
    try:
        kind = FAMILIES[family](**options)
    except TypeError as error:
        raise ValueError(f"kind {name!r}: {error}") from None
    kind = dataclasses.replace(kind, name=name)
    _check_parts(kind)
    return kind


def cost(kind: Kind | str, inputs: int, features: int, *, groups: int = 1, bias: bool = False) -> NeuronCost:
    """Parameters and multiply-accumulates of a layer, by the formulas of the taxonomy.

    Args:
      kind: the type of neuron.
      inputs: n; of a convolution kernel height * width * input channels / groups.
      features: O, output channels.
      groups: channel groups.
      bias: whether the projections have biases.

    Returns:
      Both counts; `operations` of the kind count as multiply-accumulates, as they do in the literature.
    """
    kind = get(kind) if isinstance(kind, str) else kind
    neurons = kind.neurons(features)
    params = macs = 0
    for p in kind.projections:
        if p.kernel is None:
            params += neurons * p.rank * weights_of(p.of, inputs)
        macs += neurons * p.rank * (weights_of(p.of, inputs) + (inputs if p.of == "pairs" else 0))
        params += neurons * p.rank * (bias and p.bias)
    for extra in kind.extras:
        if bias or not extra.bias:
            params += math.prod(extra.shape(neurons, groups))
        macs += neurons * extra.macs(neurons, groups)
    return NeuronCost(params, macs + neurons * kind.operations)


def weights_of(of: Of, inputs: int) -> int:
    """Weights of one projection of n inputs."""
    return {"pairs": inputs**2, "symmetric_pairs": inputs * (inputs + 1) // 2}.get(of, inputs)


def relinear_starts(kind: Kind) -> Mapping[str, Start]:
    """How each projection and extra starts under ReLinear initialisation.

    Raises:
      ValueError: if the kind has no first-order twin.
    """
    if not _has_twin(kind):
        able = [name for name in (*KINDS, *FAMILIES) if _has_twin(get(name))]
        raise ValueError(
            f"kind {kind.name!r} ({kind.formula}) cannot start as a first-order layer, so it has no ReLinear "
            f"initialisation; kinds that have one: {', '.join(able)}"
        )
    return {part.name: part.relinear for part in kind.parts if part.relinear}


def _has_twin(kind: Kind) -> bool:
    return all(p.relinear for p in kind.projections)


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"(\w+)\((.*)\)", name)
    if match is None:
        return name, {}
    try:
        call = ast.parse(f"f({match[2]})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return match[1], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(f"kind {name!r}: expected name(option=value, ...), for example 'bergstra(rank=4)'") from None
