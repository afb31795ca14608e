"""Algorithms of federated learning, all in one frame."""

from jaxeff.federated.algorithms.averaging import adaptive, fed_avg, fed_opt, fed_prox, moon
from jaxeff.federated.algorithms.base import About, Algorithm, Local, LocalTraining, Upload, local_training
from jaxeff.federated.algorithms.drift import fed_nova, scaffold
from jaxeff.federated.algorithms.personal import fed_bn

__all__ = [
    "About",
    "Algorithm",
    "Local",
    "LocalTraining",
    "Upload",
    "adaptive",
    "fed_avg",
    "fed_bn",
    "fed_nova",
    "fed_opt",
    "fed_prox",
    "local_training",
    "moon",
    "scaffold",
]
