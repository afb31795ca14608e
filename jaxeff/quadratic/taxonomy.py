"""The quadratic neurons of the field.

Formulas of the types follow the neuron-type figure of QuadraLib (Xu et al., MLSys 2022, arXiv 2204.01701); the other
neurons name their own source. x is the input (of a convolution: one patch), a.x a projection with its bias, `*` a
product of numbers, x^2 the square of every input.

Gains make the output variance one where inputs are rectified standard normals: then projections of unit gain have unit
variance, Var(a.x * b.x) = 1, Var((a.x)^2) = 2, x^2 has mean square 3/2 against the 1/2 of x.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.quadratic.kinds import Extra, Kind, Projection, register, register_family

TYPES = "taxonomy of arXiv 2204.01701"
# Shares of the output variance: a product beside a linear term, a square of inputs beside another term.
_PRODUCT, _LINEAR, _SQUARE = 2**-0.25, 2**-0.5, 6**-0.5
# Of x^T A x: n^2 pairs of mean square 1/4 where Kaiming expects 1/2, and twice that weight for symmetric pairs.
_PAIRS = 2**0.5


def t1_low_rank(rank: int = 2) -> Kind:
    """T1 with a matrix of that rank: sum_k (a_k.x) * (b_k.x)."""
    gain = _positive("rank", rank) ** -0.25
    return Kind(
        "t1_low_rank",
        f"sum over {rank} of (a_k.x) * (b_k.x)",
        (Projection("a", rank=rank, gain=gain), Projection("b", rank=rank, gain=gain)),
        lambda a, b: _over_rank(a * b, rank),
        TYPES,
        slopes=lambda a, b: (b, a),
        operations=rank,
    )


def bergstra(rank: int = 2, root: bool = False) -> Kind:
    """Bergstra's neuron of that rank: sum_k (a_k.x)^2 + c.x, or with `root` the square root of the sum."""
    if root:
        # sqrt of a sum of r squares is chi-distributed.
        mean = math.sqrt(2) * math.gamma((_positive("rank", rank) + 1) / 2) / math.gamma(rank / 2)
        gain = (2 * (rank - mean**2)) ** -0.5
    else:
        gain = (4 * _positive("rank", rank)) ** -0.25

    def combine(a, c):
        energy = _over_rank(a * a, rank)
        # The constant keeps the slope of the root finite at zero.
        return (jnp.sqrt(energy + 1e-6) if root else energy) + c

    return Kind(
        "bergstra",
        f"{'sqrt of ' if root else ''}sum over {rank} of (a_k.x)^2 + c.x",
        # No ReLinear start: the slope of a square is zero at zero, so that a would stay there.
        (Projection("a", rank=rank, gain=gain), Projection("c", gain=_LINEAR)),
        combine,
        "Bergstra, Desjardins, Lamblin, Bengio 2009, technical report 1337, Montreal",
        operations=rank + 1,
    )


def emitting(rank: int = 2) -> Kind:
    """The low-rank neuron whose projections are outputs too: c.x + sum_k scale_k (q_k.x)^2, q_1.x, ..., q_rank.x."""
    size = 0.5 * _positive("rank", rank) ** -0.5

    def alternating(key, shape, dtype=jnp.float32):
        return jnp.broadcast_to(size * (-1.0) ** jnp.arange(shape[-1]), shape).astype(dtype)

    def combine(c, q, *, scale):
        q = q if rank > 1 else q[..., None]
        return jnp.concatenate([(c + jnp.sum(scale.astype(q.dtype) * q * q, -1))[..., None], q], -1)

    return Kind(
        "emitting",
        f"[c.x + sum over {rank} of scale_k (q_k.x)^2, q_1.x, ..., q_{rank}.x]",
        (
            Projection("c", gain=_LINEAR, relinear="twin"),
            Projection("q", rank=rank, bias=False, relinear="twin"),
        ),
        combine,
        "low-rank quadratic neuron with vector output, arXiv 2306.07294 (form inferred from its abstract)",
        extras=(Extra("scale", lambda neurons, groups: (neurons, rank), alternating, relinear="zero"),),
        outputs=rank + 1,
        operations=2 * rank,
    )


def ccp(order: int = 3) -> Kind:
    """Pi-net of that order, coupled CP: h_1 = u1.x, h_m = (um.x) * h_(m-1) + h_(m-1), output mix h_order."""
    names = [f"u{m}" for m in range(1, _positive("order", order) + 1)]

    def combine(*projections, mix, offset):
        hidden = projections[0]
        for u in projections[1:]:
            hidden = u * hidden + hidden
        return _mixed(hidden, mix, offset)

    return Kind(
        "ccp",
        f"mix.h_{order}, h_1 = u1.x, h_m = (um.x) * h_(m-1) + h_(m-1)",
        tuple(Projection(u, bias=False, relinear="zero" if m else "twin") for m, u in enumerate(names)),
        combine,
        "Pi-nets, Chrysos et al. 2020, arXiv 2003.03828",
        # Every step doubles the variance of the hidden features.
        extras=(_mix("mix", gain=2.0 ** (-(order - 1) / 2)), _OFFSET),
        operations=2 * (order - 1),
    )


def ncp(order: int = 3) -> Kind:
    """Pi-net of that order, nested CP: h_1 = (u1.x) * v1, h_m = (um.x) * (s_m h_(m-1) + vm), output mix h_order."""
    names = [f"u{m}" for m in range(1, _positive("order", order) + 1)]

    def combine(*projections, mix, offset, v1, **inner):
        hidden = projections[0] * v1
        for m, u in enumerate(projections[1:], start=2):
            hidden = u * _mixed(hidden, inner[f"s{m}"], inner[f"v{m}"])
        return _mixed(hidden, mix, offset)

    extras = [_constant("v1", 1.0)]
    for m in range(2, order + 1):
        extras += [_mix(f"s{m}", gain=2**-0.5, relinear="zero"), _constant(f"v{m}", 2**-0.5)]
    return Kind(
        "ncp",
        f"mix.h_{order}, h_1 = (u1.x) * v1, h_m = (um.x) * (s_m.h_(m-1) + vm)",
        tuple(Projection(u, bias=False, relinear="twin" if m == order else "free") for m, u in enumerate(names, 1)),
        combine,
        "Pi-nets, Chrysos et al. 2020, arXiv 2003.03828",
        extras=(*extras, _mix("mix"), _OFFSET),
        operations=2 * order - 1,
    )


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _over_rank(products: jax.Array, rank: int) -> jax.Array:
    return products.sum(-1) if rank > 1 else products


def _mixed(hidden: jax.Array, kernel: jax.Array, offset: jax.Array | None) -> jax.Array:
    """A linear map between features [..., M], within each of M / rows groups of channels; kernel [rows, M]."""
    rows, columns = kernel.shape
    groups = hidden.shape[-1] // rows
    split = hidden.reshape(*hidden.shape[:-1], groups, rows)
    by_group = kernel.astype(hidden.dtype).reshape(rows, groups, columns // groups)
    mixed = jnp.einsum("...gi,igo->...go", split, by_group).reshape(*hidden.shape[:-1], columns)
    return mixed if offset is None else mixed + offset.astype(hidden.dtype)


def _mix(name: str, gain: float = 1.0, relinear="identity") -> Extra:
    return Extra(
        name,
        lambda neurons, groups: (neurons // groups, neurons),
        nn.initializers.variance_scaling(gain**2, "fan_in", "normal"),
        relinear=relinear,
        macs=lambda neurons, groups: neurons // groups,
    )


def _constant(name: str, value: float) -> Extra:
    return Extra(name, lambda neurons, groups: (neurons,), nn.initializers.constant(value), relinear="one")


_OFFSET = Extra("offset", lambda neurons, groups: (neurons,), nn.initializers.zeros, relinear="zero", bias=True)

register(
    Kind("first_order", "c.x", (Projection("c", relinear="twin"),), lambda c: c, "Rosenblatt 1958", lambda c: (1,))
)
register(Kind("t1", "x^T A x", (Projection("a", "pairs", gain=_PAIRS),), lambda a: a, TYPES, lambda a: (1,)))
register(
    Kind(
        "t1_symmetric",
        "x^T A x, A symmetric",
        (Projection("a", "symmetric_pairs", gain=_PAIRS),),
        lambda a: a,
        "Noel et al. 2023, arXiv 2310.02901",
        lambda a: (1,),
    )
)
register(
    Kind(
        "t1_linear",
        "x^T A x + c.x",
        (Projection("a", "pairs", bias=False, relinear="zero"), Projection("c", gain=_LINEAR, relinear="twin")),
        lambda a, c: a + c,
        TYPES,
        lambda a, c: (1, 1),
    )
)
register(
    Kind(
        "t1_t2",
        "x^T A x + b.(x^2)",
        (Projection("a", "pairs", bias=False), Projection("b", "square", gain=_SQUARE)),
        lambda a, b: a + b,
        TYPES,
        lambda a, b: (1, 1),
    )
)
register(Kind("t2", "a.(x^2)", (Projection("a", "square", gain=3**-0.5),), lambda a: a, TYPES, lambda a: (1,)))
register(
    Kind("t3", "(a.x)^2", (Projection("a", gain=2**-0.25),), lambda a: a * a, TYPES, lambda a: (2 * a,), operations=1)
)
register(
    Kind(
        "t4",
        "(a.x) * (b.x)",
        (Projection("a", relinear="one"), Projection("b", relinear="twin")),
        lambda a, b: a * b,
        TYPES,
        lambda a, b: (b, a),
        operations=1,
    )
)
register(
    Kind(
        "t2_t4",
        "(a.x) * (b.x) + b.(x^2)",
        # The share of the product is a's to adjust, as b is in both terms.
        (
            Projection("a", gain=3**0.5),
            Projection("b", gain=_SQUARE),
            Projection("s", "square", kernel="b", bias=False),
        ),
        lambda a, b, s: a * b + s,
        TYPES,
        lambda a, b, s: (b, a, 1),
        operations=1,
    )
)
register(
    Kind(
        "fan",
        "(a.x) * (b.x) + s.(x^2)",
        (
            Projection("a", gain=_PRODUCT, relinear="twin"),
            Projection("b", gain=_PRODUCT, relinear="one"),
            Projection("s", "square", gain=_SQUARE, relinear="zero"),
        ),
        lambda a, b, s: a * b + s,
        "Fan et al. 2023, arXiv 2110.06081",
        lambda a, b, s: (b, a, 1),
        operations=1,
    )
)
register(
    Kind(
        "quadralib",
        "(a.x) * (b.x) + c.x",
        (
            Projection("a", gain=_PRODUCT, relinear="zero"),
            Projection("b", gain=_PRODUCT, relinear="free"),
            Projection("c", gain=_LINEAR, relinear="twin"),
        ),
        lambda a, b, c: a * b + c,
        "QuadraLib, Xu et al., MLSys 2022, arXiv 2204.01701",
        lambda a, b, c: (b, a, 1),
        operations=2,
    )
)
register(
    Kind(
        "qres",
        "(a.x) * (b.x) + a.x",
        (Projection("a", gain=_LINEAR, relinear="twin"), Projection("b", relinear="zero")),
        lambda a, b: a * b + a,
        "QRes, Bu and Karpatne 2021, arXiv 2101.08366 (form inferred from its abstract)",
        lambda a, b: (b + 1, a),
        operations=2,
    )
)
register(
    Kind(
        "reduced",
        "c.x + s.(x^2)",
        (Projection("c", gain=_LINEAR, relinear="twin"), Projection("s", "square", gain=_SQUARE, relinear="zero")),
        lambda c, s: c + s,
        "Noel et al. 2023, arXiv 2310.02901",
        lambda c, s: (1, 1),
    )
)
for _name, _build in {
    "t1_low_rank": t1_low_rank,
    "bergstra": bergstra,
    "emitting": emitting,
    "ccp": ccp,
    "ncp": ncp,
}.items():
    register_family(_name, _build)
