"""Architectures by name, for configs and command lines."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxeff.models.cnn import cnn, mlp
from jaxeff.models.mobilenet import mobilenet
from jaxeff.models.resnet import resnet
from jaxeff.models.vgg import vgg, vgg9
from jaxeff.spec import Architecture

ZOO: dict[str, Callable[..., Architecture]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg9": vgg9,
    "vgg11": partial(vgg, "A"),
    "vgg13": partial(vgg, "B"),
    "vgg16": partial(vgg, "D"),
    "vgg7": partial(vgg, "Q7"),
    "vgg": vgg,
    "resnet14": partial(resnet, 14),
    "resnet20": partial(resnet, 20),
    "resnet32": partial(resnet, 32),
    "resnet56": partial(resnet, 56),
    "resnet": resnet,
    "mobilenet": mobilenet,
}


def architecture(name: str, **options: Any) -> Architecture:
    """Builds an architecture by name.

    Args:
      name: a key of `ZOO`.
      **options: keyword arguments of its builder.

    Returns:
      The architecture.

    Raises:
      ValueError: for an unknown name, listing the valid ones.
      ValueError: for an option that the builder does not have, listing those it has.
    """
    if name not in ZOO:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(ZOO))}")
    build = ZOO[name]
    valid = [p for p in inspect.signature(build).parameters if p not in _fixed(build)]
    if unknown := sorted(set(options) - set(valid)):
        raise ValueError(f"model {name!r} has no option {', '.join(unknown)}; it has: {', '.join(valid)}")
    return build(**options)


def _fixed(build: Callable[..., Architecture]) -> tuple[str, ...]:
    """Positional arguments that the name has chosen already: the plan of vgg16, the depth of resnet20."""
    if not isinstance(build, partial):
        return ()
    return tuple(inspect.signature(build.func).parameters)[: len(build.args)]
