"""Architectures by name, for configs and command lines."""

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
      TypeError: for an option that the builder does not have.
    """
    if name not in ZOO:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(ZOO))}")
    return ZOO[name](**options)
