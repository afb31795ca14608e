"""A cascade of the networks of a training job: cheap ones look first, dear ones at what is still in doubt."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxeff import dynamic, models, training
from jaxeff.dynamic import figures
from launch import classifier


def check(names: Sequence[str], networks: Sequence[str]) -> None:
    """Raises ValueError unless a cascade is empty, or has two or more different networks of the experiment."""
    if names and (len(names) < 2 or len(set(names)) < len(names) or not set(names) <= set(networks)):
        raise ValueError(
            f"cascade={tuple(names)} must name two or more different networks, from cheap to dear, out of "
            f"{', '.join(networks)}"
        )


def measured(
    steps: Mapping[str, tuple[models.Network, training.TrainState]],
    images: jax.Array,
    labels: np.ndarray,
    batch: int,
    path: pathlib.Path,
) -> dict[str, Any]:
    """Measures and draws the accuracy and the latency of a cascade by threshold.

    Args:
      steps: networks and states by name, from cheap to dear.
      images: standardised, [N, H, W, C].
      labels: int [N].
      batch: images that arrive together.
      path: of the figure.

    Returns:
      The steps and the points of the curve, for summary.json.
    """
    device = jax.local_devices()[0]

    def step(module, state):
        variables = jax.device_put(jax.device_get(classifier.variables_of(state)), device)
        predict = jax.jit(module.apply)
        return lambda images: predict(variables, images)

    curve = dynamic.exit_curve([step(*pair) for pair in steps.values()], images, labels, batch_size=batch)
    figures.draw_exit_curve(curve, path)
    points = [
        {"name": point.name, "accuracy": point.accuracy, "milliseconds": point.milliseconds, "left": point.left}
        for point in curve.points
    ]
    return {"steps": list(steps), "points": points, "table": str(curve)}
