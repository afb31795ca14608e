"""The auto-builder: from a trained first-order network to a smaller quadratic one, as pure functions.

The steps of QuadraLib's auto-builder (Xu et al., MLSys 2022, arXiv 2204.01701): make the layers quadratic
(`quadratize`, `transplant`), train, find out what each layer is worth (`score`), take out what costs much and is worth
little (`reduce`), `transplant` what is left, and train again. Architectures say what a network is, so all of this works
for plain, residual and depthwise-separable networks alike.
"""

from jaxeff.quadratic.importance import LayerScore, Scores, check_masking, mask, score
from jaxeff.quadratic.reduction import ACTIONS, BUDGETS, Reduction, reduce, smallest
from jaxeff.quadratic.transplant import fresh_layers, transplant
from jaxeff.spec import quadratize

__all__ = [
    "ACTIONS",
    "BUDGETS",
    "LayerScore",
    "Reduction",
    "Scores",
    "check_masking",
    "fresh_layers",
    "mask",
    "quadratize",
    "reduce",
    "score",
    "smallest",
    "transplant",
]
