"""Frechet distance between two sets of images, on the features of a classifier of one's own.

With the features of Inception-v3 this is the FID of Heusel et al. 2017 (arXiv 1706.08500). Distances on other features
compare with one another, but not with published FIDs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxeff.training.step import unit_range


class FeatureMoments(NamedTuple):
    """Mean and covariance of features.

    Attributes:
      mean: float64 [F].
      covariance: float64 [F, F], with N - 1 in the denominator.
    """

    mean: np.ndarray
    covariance: np.ndarray


def feature_moments(features: Any) -> FeatureMoments:
    """Mean and covariance of features, in float64.

    Args:
      features: [N, F], N at least 2. With N <= F the covariance is singular and the distance biased upwards.

    Returns:
      The moments.

    Raises:
      ValueError: for another rank, fewer than two examples, or values that are not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: expected [N, F] with N of at least 2, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"features: {int((~np.isfinite(features)).any(1).sum())} rows hold NaN or infinite values")
    mean = features.mean(0)
    centred = features - mean
    return FeatureMoments(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Squared Frechet distance of two Gaussians, |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982).

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric, so two eigenvalue decompositions
    give it, also where a covariance is singular.

    Args:
      a: moments of one set, for example `feature_moments(features)`.
      b: those of the other.

    Returns:
      The distance, not negative; the "FID" of the literature is this square.

    Raises:
      ValueError: if the sets have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"a has {a.mean.size} features and b {b.mean.size}; take both from the same network")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    gap = a.mean - b.mean
    distance = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(0.0, float(distance))


def features(
    network: nn.Module,
    variables: Mapping[str, Any],
    images: Any,
    *,
    preprocess: Callable[[jax.Array], jax.Array] = unit_range,
    batch_size: int = 500,
) -> np.ndarray:
    """What the last layer of a classifier is given: its penultimate activations, in evaluation mode.

    Args:
      network: a `jaxeff.models.Network`, or another module with an `architecture` that `clone` can replace.
      variables: its variables, those of the last layer included.
      images: [N, H, W, C].
      preprocess: what the classifier was trained with.
      batch_size: images per call; where it does not divide N there is a second compilation.

    Returns:
      float32 [N, F].

    Raises:
      ValueError: if what comes before the last layer is not flat, or `batch_size` < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    architecture = network.architecture
    headless = network.clone(architecture=dataclasses.replace(architecture, layers=architecture.layers[:-1]))

    @jax.jit
    def penultimate(variables: Any, images: jax.Array) -> Any:
        return headless.apply(variables, preprocess(images), False)

    parts = [penultimate(variables, images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    if parts[0].ndim != 2:
        raise ValueError(
            f"network: what its last layer {architecture.layers[-1].name!r} is given has shape {parts[0].shape}; "
            "expected [N, F]"
        )
    return np.concatenate(jax.device_get(parts))
