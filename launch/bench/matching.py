"""Benchmarks of neuron matching: permutations recovered at real widths, and matching within groups beside all of it."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import federated, models, quadratic, spec
from jaxeff.federated import fed2, symmetry
from jaxeff.federated.matching import weight_match
from launch.bench import results
from launch.bench.timing import contest

WIDTH, GROUPS = 512, 8


def matching(pairs: int) -> Iterator[dict[str, Any]]:
    """Permuted copies of real networks put back; and the time of a grouped network's matching at width 512."""
    for name, (module, shape) in _networks().items():
        yield from _recovery(name, module, shape)
    yield from _within_groups(pairs)


def _networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    squares = spec.quadratize(models.cnn((32, 64, 128), pools=3, norm="batch"), "t2", branch_norm="batch")
    quadratic_network = models.Network(squares, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    image = (32, 32, 3)
    return {
        "mlp": (models.Network(models.mlp((512, 256), input_shape=(784,))), (784,)),
        "vgg9": (models.Network(models.vgg9()), image),
        "resnet20": (models.Network(models.resnet(20)), image),
        "mobilenet": (models.Network(models.mobilenet()), image),
        "quadratic": (quadratic_network, image),
    }


def _recovery(name: str, module: nn.Module, shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A copy permuted at random, matched to the network that it was."""
    x = jnp.zeros((1, *shape))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    found = federated.derive(module.apply, variables, x)
    perms = federated.random_perms(found, jax.random.key(1))
    copy = federated.permute(found, variables, perms)
    back = jax.jit(lambda a, b: weight_match(found, a, b))(variables, copy)
    recovered = [bool((perm[back[part]] == jnp.arange(len(perm))).all()) for part, perm in perms.items()]
    widths = sorted(found.sizes.values())
    yield results.case(
        f"matching.recovered.{name}", "share of permutations recovered", float(np.mean(recovered)), better="higher",
        target=1.0, n=len(recovered), against=f"{len(widths)} permutations of {widths[0]} to {widths[-1]} units",
    )  # fmt: skip


def _within_groups(pairs: int) -> Iterator[dict[str, Any]]:
    """The matching of an MLP in eight groups beside that of the same one in none."""
    base = models.mlp((WIDTH,) * 3, input_shape=(784,))
    x = jnp.zeros((1, 784))
    grouped = fed2.GroupedNetwork(fed2.adapt(base, "dense2", groups=GROUPS))
    run: dict[str, Callable[[], Any]] = {}
    for name, module in {"within groups": grouped, "full": models.Network(base)}.items():
        first, second = (jax.jit(module.init)(jax.random.key(seed), x) for seed in (0, 1))
        found = (
            symmetry.within_groups(module, first, x)
            if isinstance(module, fed2.GroupedNetwork)
            else federated.derive(module.apply, first, x)
        )
        match = jax.jit(lambda a, b, found=found: weight_match(found, a, b))
        run[name] = lambda match=match, first=first, second=second: match(first, second)
    times = contest(run, pairs=pairs)
    yield results.time_ratio(
        "matching.within_groups", times, "within groups", "full", target=1 / GROUPS,
        against=f"matching of all of {WIDTH} units, {GROUPS} groups",
    )  # fmt: skip
