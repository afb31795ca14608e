"""The taxonomy of quadratic neurons as data.

A kind says which linear projections of the input a neuron takes and how it combines them. Dense and convolutional
layers, parameter counts and initialisation are all derived from that, so adding a kind is adding one `Kind`.

Formulas follow the neuron-type figure of QuadraLib (Xu et al., MLSys 2022, arXiv 2204.01701); x is the input (of a
convolution: one patch), w.x a projection with its bias, `*` a product of numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax

Start = Literal["kaiming", "zero", "one"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """One linear map of a neuron.

    Attributes:
      name: single letter; parameters are called kernel_<name> and bias_<name>.
      power: the projection is of x ** power, element by element.
      gain: factor on the Kaiming standard deviation that gives the neuron unit output variance for unit projections.
      relinear: how the projection starts so that the network starts as its first-order twin: "kaiming" (the twin's own
        weights), "zero" (off) or "one" (constant one), after ReLinear (Fan et al. 2023, arXiv 2110.06081).
    """

    name: str
    power: int = 1
    gain: float = 1.0
    relinear: Start | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of neuron.

    Attributes:
      name: how users call it.
      formula: for people.
      projections: its linear maps, in the order `combine` takes them.
      combine: maps the projections, arrays of one shape, to the output of that shape.
      source: where it comes from.
    """

    name: str
    formula: str
    projections: tuple[Projection, ...]
    combine: Callable[..., jax.Array]
    source: str


# Gains: for independent projections of unit variance, Var(ab) = 1, Var(a^2) = 2, and x^2 has variance 2 + mean 1.
KINDS: dict[str, Kind] = {}


def register(kind: Kind, *, overwrite: bool = False) -> Kind:
    """Adds a kind of the user's own, and returns it; `overwrite` replaces one of the same name.

    Raises:
      ValueError: if the name is taken by another kind, or projection names repeat.
    """
    names = [projection.name for projection in kind.projections]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"kind {kind.name!r} needs projections with different names, got {names}")
    if kind.name in KINDS and KINDS[kind.name] != kind and not overwrite:
        raise ValueError(
            f"kind {kind.name!r} exists already: {KINDS[kind.name].formula}; choose another name or pass overwrite=True"
        )
    KINDS[kind.name] = kind
    return kind


def get(name: str) -> Kind:
    """The kind of that name.

    Raises:
      ValueError: listing the known kinds.
    """
    if name not in KINDS:
        raise ValueError(f"unknown kind {name!r}; known: {', '.join(KINDS)}. jaxeff.quadratic.register adds one")
    return KINDS[name]


def relinear_starts(kind: Kind) -> Mapping[str, Start]:
    """How each projection starts under ReLinear initialisation.

    Raises:
      ValueError: if the kind has no first-order twin.
    """
    starts = {p.name: p.relinear for p in kind.projections if p.relinear is not None}
    if len(starts) != len(kind.projections):
        able = [name for name, other in KINDS.items() if all(p.relinear for p in other.projections)]
        raise ValueError(
            f"kind {kind.name!r} ({kind.formula}) cannot start as a first-order layer, so it has no ReLinear "
            f"initialisation; kinds that have one: {', '.join(able)}"
        )
    return starts


register(Kind("first_order", "w.x", (Projection("c", relinear="kaiming"),), lambda c: c, "Rosenblatt 1958"))
register(Kind("t2", "a.(x^2)", (Projection("a", power=2, gain=3**-0.5),), lambda a: a, "taxonomy of arXiv 2204.01701"))
register(Kind("t3", "(a.x)^2", (Projection("a", gain=2**-0.25),), lambda a: a * a, "taxonomy of arXiv 2204.01701"))
register(
    Kind(
        "t4",
        "(a.x) * (b.x)",
        (Projection("a", relinear="one"), Projection("b", relinear="kaiming")),
        lambda a, b: a * b,
        "taxonomy of arXiv 2204.01701",
    )
)
register(
    Kind(
        "quadralib",
        "(a.x) * (b.x) + c.x",
        (
            Projection("a", gain=2**-0.25, relinear="zero"),
            Projection("b", gain=2**-0.25, relinear="kaiming"),
            Projection("c", gain=2**-0.5, relinear="kaiming"),
        ),
        lambda a, b, c: a * b + c,
        "QuadraLib, Xu et al., MLSys 2022, arXiv 2204.01701",
    )
)
