"""Memory policies: what a layer of neurons keeps for its backward pass, and what it computes again.

A block is a layer with everything around it: projections, branch norms and activations, the combination, output norm
and activation. Differentiated as it stands (`save="all"`), it keeps several arrays of the size of its output; a policy
keeps the projections (`"ab"`) or nothing but the block's input and the statistics of its batch norms (`"x"`), in the
spirit of QuadraLib's hybrid back-propagation (Xu et al., MLSys 2022, arXiv 2204.01701, section on memory).

Two things make the saving real in the compiled program, where `jax.checkpoint` shows none on CPU:

* What is computed again depends on the cotangent. Otherwise XLA finds the same convolution in the forward pass,
  computes it once and keeps it; optimisation barriers do not stop it on CPU.
* Element-wise work runs over pieces of the batch in a loop, so that its many intermediate arrays are small. Batch
  statistics are of the whole batch all the same: a first pass over the pieces adds up the gradient of the output
  norm's statistics, a second one that of the branch norms', and the third has all it needs for the gradients.

Letters: M neurons, r projections of one name per neuron, O output channels.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import compat
from jaxeff.ops import Moments, activation, moments, normalise
from jaxeff.ops.norms import checked_norm
from jaxeff.quadratic.kinds import Kind

Save = Literal["all", "ab", "x"]
SAVES: tuple[str, ...] = ("all", "ab", "x")
OUT = "out"
# On CPU an array of one piece should stay in the second-level cache with its neighbours; measured on QVGG-7, where 1,
# 2, 4 and 8 MiB take 1.28, 1.23, 1.24 and 1.25 times the time of plain differentiation.
PIECE_BYTES = 2**21

Params = Mapping[str, Any]
Statistics = dict[str, Moments]


@dataclasses.dataclass(frozen=True)
class Form:
    """What a block computes, but for its parameters.

    Attributes:
      kind: the type of neuron.
      project: (params, x) -> the raw projections [..., M * r], without biases, in the kind's order.
      branch_norm: norm of every projection, or None; its parameters are params["norm_<projection>"].
      branch_act: activation of every projection after its norm, by name.
      branch: function (projection name, projection [..., M * r]) -> projection, applied last; policies other than "all"
        need one that treats examples separately.
      out_norm: norm of the combination, or None; its parameters are params["norm_out"].
      act: activation of the output, by name.
      axis_name: mapped axis over which batch norms share their statistics.

    Raises:
      ValueError: when made, for an unknown norm or activation.
    """

    kind: Kind
    project: Callable[[Params, jax.Array], tuple[jax.Array, ...]]
    branch_norm: str | None = None
    branch_act: str | None = None
    branch: Callable[[str, jax.Array], jax.Array] | None = None
    out_norm: str | None = None
    act: str | None = None
    axis_name: str | None = None

    def __post_init__(self):
        for norm in (self.branch_norm, self.out_norm):
            checked_norm(norm)
        for act in (self.branch_act, self.act):
            activation(act)


def block(
    form: Form,
    params: Params,
    x: jax.Array,
    statistics: Statistics | None = None,
    *,
    save: Save = "all",
    piece_bytes: int | None = None,
) -> tuple[jax.Array, Statistics]:
    """Runs a block under a memory policy.

    Args:
      form: what the block computes.
      params: "kernel_<p>", "bias_<p>", extras of the kind, and the parameters of the norms.
      x: the input; its first axis is the batch.
      statistics: running moments of the batch norms by projection name, the output norm's as "out", which are constants
        to differentiation; None for those of this batch.
      save: "all" (plain differentiation, of any order and mode), "ab" (input and projections) or "x" (input only).
        The last two have reverse mode only.
      piece_bytes: size of one projection of a piece of the batch in the backward pass; None for `PIECE_BYTES` on CPU
        and no pieces elsewhere, 0 for no pieces.

    Returns:
      The output in the dtype of x, and the statistics that batch norms used, through which no gradient flows.

    Raises:
      ValueError: for an unknown policy; in the backward pass, where `axis_name` is bound in the forward pass alone, as
        `jax.vmap` does outside of which the gradient is taken.
    """
    check_save(save)
    statistics = lax.stop_gradient(statistics)
    if save == "all":
        y, used, _ = _forward(form, params, x, statistics)
        return y, lax.stop_gradient(used)
    if piece_bytes is None:
        piece_bytes = PIECE_BYTES if jax.default_backend() == "cpu" else 0

    @jax.custom_vjp
    def run(params, x, statistics):
        return _forward(form, params, x, statistics)[:2]

    def forward(params, x, statistics):
        y, used, zs = _forward(form, params, x, statistics)
        return (y, used), (params, x, used, zs if save == "ab" else None)

    def backward(residuals, cotangents):
        params, x, used, zs = residuals
        fixed = statistics is not None
        grads, dx = _backward(form, piece_bytes, params, x, used, zs, cotangents[0], fixed)
        return grads, dx, jax.tree.map(jnp.zeros_like, statistics)

    run.defvjp(forward, backward)
    # Inside `shard_map` the gradients of shared parameters are summed over devices outside of our own rule.
    varying = compat.varying_axes(x).union(*map(compat.varying_axes, jax.tree.leaves(params)))
    y, used = run(compat.vary(dict(params), varying), compat.vary(x, varying), statistics)
    return y, lax.stop_gradient(used)


def check_save(save: str) -> None:
    """Raises ValueError, listing the policies, if this is none of them."""
    if save not in SAVES:
        raise ValueError(f"save must be one of {', '.join(map(repr, SAVES))}, got {save!r}")


# --- the block in its three stages ------------------------------------------------------------------------------------


def _forward(form, params, x, statistics=None):
    zs = form.project(params, x)
    # Widened once: plain differentiation keeps what it normalises and what it takes the moments of, two arrays or one.
    wide = [z.astype(jnp.promote_types(z.dtype, jnp.float32)) for z in zs]
    branch = out = None
    if form.branch_norm == "batch":
        branch = {p.name: _shifted(form, params, p, z) for p, z in zip(form.kind.projections, wide, strict=True)}
        branch = branch if statistics is None else {p.name: statistics[p.name] for p in form.kind.projections}
    y = _combined(form, params, wide, branch)
    if form.out_norm == "batch":
        out = moments(y, form.axis_name) if statistics is None else statistics[OUT]
    used = {**(branch or {}), **({} if out is None else {OUT: out})}
    return _finished(form, params, y, out, x.dtype), used, zs


def _shifted(form, params, projection, z) -> Moments:
    """Moments of a projection with its bias, which only moves the mean."""
    raw = moments(z, form.axis_name)
    bias = params.get(f"bias_{projection.name}")
    return raw if bias is None else Moments(raw.mean + bias, raw.var)


def _combined(form, params, zs, statistics):
    """The neuron's output [..., O] from its raw projections.

    In at least float32, as products double relative errors; the projections themselves are of the dtype of the input.
    """
    values = []
    for p, z in zip(form.kind.projections, zs, strict=True):
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        if (bias := params.get(f"bias_{p.name}")) is not None:
            z = z + bias
        if form.branch_norm is not None:
            z = normalise(form.branch_norm, z, params[f"norm_{p.name}"], statistics and statistics[p.name])
        z = activation(form.branch_act)(z)
        if form.branch is not None:
            z = form.branch(p.name, z)
        values.append(z if p.rank == 1 else z.reshape(*z.shape[:-1], -1, p.rank))
    extras = {extra.name: params.get(extra.name) for extra in form.kind.extras}
    y = form.kind.apply(*values, **extras)
    return y if form.kind.outputs == 1 else y.reshape(*y.shape[:-2], -1)


def _finished(form, params, y, statistics, dtype):
    if form.out_norm is not None:
        y = normalise(form.out_norm, y, params["norm_out"], statistics)
    return activation(form.act)(y).astype(dtype)


# --- the backward pass ------------------------------------------------------------------------------------------------


def _backward(form, piece_bytes, params, x, used, zs, g, fixed):
    """Gradients of parameters and input; `fixed` says that the statistics are not those of this batch."""
    params, x = _after(g, params, x)
    varying = compat.varying_axes(x)
    # Shared statistics are equal on all devices; their gradients are not before they are added up here.
    used = compat.vary(used, varying)
    kernels = {name: value for name, value in params.items() if name.startswith("kernel_")}
    # Wide, as their gradients are sums over all pieces and of terms that cancel.
    small = {name: value for name, value in params.items() if name not in kernels}
    small = jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)), small)
    branch = {p.name: used[p.name] for p in form.kind.projections} if form.branch_norm == "batch" else None
    out = used.get(OUT)
    of_branch, of_out = branch is not None and not fixed, out is not None and not fixed
    if zs is None and (of_branch or of_out):
        zs = form.project(params, x)  # once for all passes
    size = _piece_size(form, params, x, g, piece_bytes)

    def zeros(like):
        return compat.vary(jax.tree.map(lambda a: jnp.zeros(a.shape, _wide(a)), like), varying)

    def of_y(y, g, by_statistics):
        (dy,) = jax.vjp(lambda y: _finished(form, small, y, out, x.dtype), y)[1](g)
        return dy + _through_moments(y, out, by_statistics) if of_out else dy

    by_out: Any = None
    by_branch: Any = None
    own_by_branch: Any = None
    positions = math.prod(g.shape[:-1])
    if of_out:

        def first(total, piece):
            zs, g = piece
            y = _combined(form, small, zs, branch)
            _, pullback = jax.vjp(lambda out: _finished(form, small, y, out, x.dtype), out)
            return _add(total, pullback(g)[0])

        by_out = _per_position(_over_pieces(first, zeros(out), (zs, g), size), positions, form.axis_name)
    if of_branch:

        def second(total, piece):
            zs, g = piece
            y, pullback = jax.vjp(lambda branch: _combined(form, small, zs, branch), branch)
            return _add(total, pullback(of_y(y, g, by_out))[0])

        own_by_branch = _over_pieces(second, zeros(branch), (zs, g), size)
        by_branch = _per_position(own_by_branch, positions, form.axis_name)

    def third(total, piece):
        x, zs, g = piece
        projected, pull_project = jax.vjp(form.project, kernels, x)
        zs = projected if zs is None else zs
        y, pull_combined = jax.vjp(lambda small, zs: _combined(form, small, zs, branch), small, zs)
        (by_small,) = jax.vjp(lambda small: _finished(form, small, y, out, x.dtype), small)[1](g)
        more, dzs = pull_combined(of_y(y, g, by_out))
        if branch is not None and of_branch:
            dzs = tuple(
                (
                    dz
                    + _through_moments(
                        z.astype(_wide(z)) + small.get(f"bias_{p.name}", 0), branch[p.name], by_branch[p.name]
                    )
                ).astype(z.dtype)
                for p, z, dz in zip(form.kind.projections, zs, dzs, strict=True)
            )
        by_kernels, dx = pull_project(dzs)
        return _add(total, {**_add(by_small, more), **by_kernels}), dx

    grads, dx = _replaced_by_pieces(third, zeros({**small, **kernels}), x, (zs, g), size)
    for p in form.kind.projections:
        # A bias also moves the mean that its batch norm takes away again.
        if of_branch and f"bias_{p.name}" in grads:
            grads[f"bias_{p.name}"] += own_by_branch[p.name].mean
    return jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, dict(params)), dx


def _after(g, params, x):
    """The parameters or the input, unchanged, but in a way that XLA cannot compute before the cotangent is there."""
    # Never true, which XLA does not know; NaN compares false.
    never = (jnp.abs(lax.slice(g, (0,) * g.ndim, (1,) * g.ndim)).reshape(()) > jnp.inf) if g.size else jnp.bool_(False)
    if x.size < sum(leaf.size for leaf in jax.tree.leaves(params)):
        return params, x + never.astype(x.dtype)
    return jax.tree.map(lambda leaf: leaf + never.astype(leaf.dtype), params), x


def _through_moments(z, statistics, gradient):
    """What the mean and variance of all positions hand on to each of them."""
    return gradient.mean + 2 * gradient.var * (z.astype(_wide(z)) - statistics.mean)


def _per_position(gradient, positions: int, axis_name):
    if axis_name is not None:
        try:
            gradient = lax.pmean(gradient, axis_name)
        except NameError as error:
            raise ValueError(
                f"axis_name={axis_name!r} is not bound in the backward pass: jax.vmap binds its axis only where the "
                "gradient is taken inside of it; take it there, or use save='all'"
            ) from error
    return jax.tree.map(lambda leaf: leaf / positions, gradient)


def _piece_size(form, params, x, g, piece_bytes: int) -> int | None:
    """How many examples a piece has; None for all at once."""
    if not piece_bytes or x.ndim < 2 or not g.size:
        return None
    largest = max(p.rank for p in form.kind.projections) * math.prod(g.shape[1:]) * jnp.dtype(_wide(g)).itemsize
    return min(x.shape[0], max(1, piece_bytes // largest))


def _over_pieces(run, total, arrays, size: int | None):
    """Adds up (total, piece) -> total over pieces of that many examples, in a loop, and the rest at the end.

    Pieces are cut from the arrays as they are: an array reshaped for `lax.scan` would be a second copy of it, which XLA
    makes in the forward pass already, where the array is.
    """
    length = jax.tree.leaves(arrays)[0].shape[0]

    def step(total, start, count):
        return run(total, _cut(arrays, start, count))

    if size is None or length <= size:
        return run(total, arrays)
    whole = length // size
    total, _ = lax.scan(lambda total, start: (step(total, start, size), None), total, size * jnp.arange(whole))
    return step(total, whole * size, length % size) if length % size else total


def _replaced_by_pieces(run, total, x, arrays, size: int | None):
    """As `_over_pieces` of (total, (x, arrays)) -> (total, new x); piece by piece x gives way to the new one.

    So the gradient of the input needs no memory of its own.
    """
    length = x.shape[0]

    def step(carry, start, count):
        total, x = carry
        total, new = run(total, (_cut(x, start, count), *_cut(arrays, start, count)))
        return total, lax.dynamic_update_slice_in_dim(x, new, start, 0)

    if size is None or length <= size:
        return run(total, (x, *arrays))
    whole = length // size
    carry, _ = lax.scan(lambda carry, start: (step(carry, start, size), None), (total, x), size * jnp.arange(whole))
    return step(carry, whole * size, length % size) if length % size else carry


def _cut(tree, start, count: int):
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count, 0), tree)


def _add(total, more):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _wide(array):
    return jnp.promote_types(array.dtype, jnp.float32)
