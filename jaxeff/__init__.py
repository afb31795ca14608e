"""jaxeff: efficient deep learning in JAX, from the neuron to the fleet.

Rooms are imported on first use, so `import jaxeff` stays light:

>>> import jaxeff
>>> jaxeff.ops.conv_general_dilated.__name__
'conv_general_dilated'
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = (
    *("compat", "costs", "data", "dlrm", "dynamic", "federated", "models", "ops", "parallel", "quadratic", "sdm"),
    *("spec", "training", "trees"),
)

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"jaxeff.{name}")
    raise AttributeError(f"module 'jaxeff' has no attribute {name!r}; its rooms are: {', '.join(_ROOMS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
