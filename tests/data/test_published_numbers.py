"""A ridge classifier on every image set gives the accuracies that the data's own description states."""

import numpy as np
import pytest

from jaxeff import data

pytestmark = [pytest.mark.data, pytest.mark.slow]


def _ridge_accuracy(train, test):
    """Pixels / 255 minus the training mean, one-hot minus 0.1 as targets, lambda 10, float64."""
    x = train.arrays["image"].reshape(len(train), -1).astype(np.float64) / 255
    mean = x.mean(axis=0)
    x -= mean
    y = np.eye(10)[train.arrays["label"]] - 0.1
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    scores = (test.arrays["image"].reshape(len(test), -1) / 255 - mean) @ weights
    return np.mean(np.argmax(scores, axis=1) == test.arrays["label"])


@pytest.mark.parametrize(
    ("name", "split", "accuracy"),
    [
        ("cifar10", "train[:20000]", 0.3681),
        ("fashion_mnist", "train", 0.8112),
        ("mnist", "train", 0.8573),
        ("usps", "train", 0.8759),
    ],
)
def test_ridge_accuracy(name, split, accuracy):
    assert round(_ridge_accuracy(data.load(name, split), data.load(name, "test")), 4) == accuracy


def test_lossless_head_pairs_with_the_jpeg_images():
    lossless = data.load("cifar10_lossless1k").arrays
    lossy = data.load("cifar10").arrays
    of_class = {number: np.flatnonzero(lossy["label"] == number) for number in range(10)}
    rows = [of_class[k][index] for k, index in zip(lossless["label"], lossless["class_index"], strict=True)]
    error = lossless["image"].astype(np.float64) - lossy["image"][rows]
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 27  # dB; unrelated images have about 10


def test_cifar10_prefixes_are_balanced():
    label = data.load("cifar10", "train[:130]").arrays["label"]
    assert np.bincount(label).tolist() == [13] * 10
