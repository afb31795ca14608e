"""Quadratic neurons: the taxonomy as data, pure functions, Flax layers, and what makes and reads networks of them."""

from jaxeff.quadratic import taxonomy  # registers the kinds of the field
from jaxeff.quadratic.kinds import FAMILIES, KINDS, Extra, Kind, Projection, cost, get, register, register_family
from jaxeff.quadratic.layers import QuadraticConv, QuadraticDense, conv_layer, dense_layer
from jaxeff.quadratic.neurons import conv, conv_block, dense, dense_block
from jaxeff.quadratic.relinear import groups as parameter_groups
from jaxeff.quadratic.relinear import restrain
from jaxeff.quadratic.tune import tune

__all__ = [
    "FAMILIES",
    "KINDS",
    "Extra",
    "Kind",
    "Projection",
    "QuadraticConv",
    "QuadraticDense",
    "conv",
    "conv_block",
    "conv_layer",
    "cost",
    "dense",
    "dense_block",
    "dense_layer",
    "get",
    "parameter_groups",
    "register",
    "register_family",
    "restrain",
    "taxonomy",
    "tune",
]
