"""Quadratic neurons: the taxonomy as data, pure functions, and Flax layers."""

from jaxeff.quadratic.kinds import KINDS, Kind, Projection, get, register
from jaxeff.quadratic.layers import QuadraticConv, QuadraticDense, conv, conv_layer, dense, dense_layer

__all__ = [
    "KINDS",
    "Kind",
    "Projection",
    "QuadraticConv",
    "QuadraticDense",
    "conv",
    "conv_layer",
    "dense",
    "dense_layer",
    "get",
    "register",
]
