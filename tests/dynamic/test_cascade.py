"""Cascades against a loop over single images in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import dynamic, models
from jaxeff.dynamic import figures


def steps_of(rng, count=3, features=5, classes=4):
    """Linear steps that are surer and surer, compiled; and their weights."""
    weights = [rng.normal(size=(features, classes)).astype(np.float32) * (i + 1) for i in range(count)]
    return [jax.jit(lambda x, w=w: x @ w) for w in weights], weights


def one_by_one(weights, images, threshold):
    logits, exits = [], []
    for image in images.astype(np.float64):
        for number, w in enumerate(weights):  # noqa: B007
            out = image @ w.astype(np.float64)
            p = np.exp(out - out.max()) / np.exp(out - out.max()).sum()
            if p.max() > threshold:
                break
        exits.append(number)
        logits.append(out)
    return np.array(logits), np.array(exits)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("count", [1, 7, 23])
def test_every_image_leaves_where_it_would_alone(threshold, count):
    rng = np.random.default_rng(count)
    steps, weights = steps_of(rng)
    images = rng.normal(size=(count, 5)).astype(np.float32)
    found = dynamic.traverse(steps, images, threshold, buckets=(1, 2, 4, 8))
    logits, exits = one_by_one(weights, images, threshold)
    np.testing.assert_array_equal(found.exits, exits)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
    if threshold in (0.0, 1.0):
        assert set(found.exits) == {0 if threshold == 0 else 2}


def test_steps_are_called_with_bucket_sizes_only_and_not_for_those_that_left():
    rng, calls = np.random.default_rng(0), []
    steps, _ = steps_of(rng)

    def watched(number):
        def step(images):
            calls.append((number, len(images)))
            return steps[number](images)

        return step

    images = rng.normal(size=(23, 5)).astype(np.float32)
    found = dynamic.traverse([watched(i) for i in range(3)], images, 0.9, buckets=(2, 8))
    assert {size for _, size in calls} <= {2, 8}
    for number in range(3):
        needed = int((found.exits >= number).sum())
        assert needed <= sum(size for n, size in calls if n == number) < needed + 8


def test_nan_is_never_sure():
    steps = [lambda x: jnp.where(x[:, :1] > 0, jnp.nan, x), lambda x: 5 * x]
    images = np.array([[1.0, 2.0, 9.0], [-1.0, 2.0, 9.0]], np.float32)
    found = dynamic.traverse(steps, images, 0.5)
    np.testing.assert_array_equal(found.exits, [1, 0])
    np.testing.assert_array_equal(found.logits[0], 5 * images[0])


def test_a_step_at_another_resolution_sees_resized_images():
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    step = dynamic.at_resolution(lambda x: x.reshape(len(x), -1), (4, 4))
    # Linear with anti-aliasing to half the size: weights 1/8, 3/8, 3/8, 1/8 along each axis, renewed at the border.
    rows = np.zeros((4, 8))
    for i in range(4):
        for j, weight in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= j < 8:
                rows[i, j] = weight
    rows /= rows.sum(1, keepdims=True)
    expected = np.einsum("ai,bj,nijc->nabc", rows, rows, images).reshape(2, -1)
    np.testing.assert_allclose(step(images), expected, rtol=1e-5, atol=1e-6)


def test_the_curve_has_every_step_and_threshold(tmp_path):
    rng = np.random.default_rng(1)
    steps, weights = steps_of(rng)
    images = rng.normal(size=(40, 5)).astype(np.float32)
    labels = (images @ weights[-1]).argmax(-1)
    curve = dynamic.exit_curve(steps, images, labels, (0.5, 1.0), batch_size=16, rounds=1)
    assert [p.name for p in curve.points] == [
        "step 1 alone",
        "step 2 alone",
        "step 3 alone",
        "threshold 0.5",
        "threshold 1",
    ]
    for number, point in enumerate(curve.points[:3]):
        assert point.left == (1.0,) and point.threshold is None
        assert point.accuracy == pytest.approx(((images @ weights[number]).argmax(-1) == labels).mean())
    middle, last = curve.points[3:]
    logits, exits = one_by_one(weights, images, 0.5)
    assert middle.accuracy == pytest.approx((logits.argmax(-1) == labels).mean())
    assert middle.left == pytest.approx(np.bincount(exits, minlength=3) / 40)
    assert last.accuracy == 1.0 and last.left == (0, 0, 1) and last.milliseconds > 0
    path = figures.draw_exit_curve(curve, tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "threshold 0.5" in str(curve) and "100.00 %" in str(curve)


def test_bad_input_is_refused():
    step, images = (lambda x: x), np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match="got 0 steps and 3 images"):
        dynamic.traverse([], images, 0.5)
    with pytest.raises(ValueError, match="got 1 steps and 0 images"):
        dynamic.traverse([step], images[:0], 0.5)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold is a probability"):
            dynamic.traverse([step], images, threshold)
    for buckets in ((), (0, 1), (2, 2), (4, 2)):
        with pytest.raises(ValueError, match="buckets are batch sizes that ascend"):
            dynamic.traverse([step], images, 0.5, buckets=buckets)
    with pytest.raises(ValueError, match=r"images and labels must be \[N, ...\] and \[N\]"):
        dynamic.exit_curve([step], images, np.zeros(2))


def test_one_network_is_every_resolution_and_every_tile_ratio_of_a_cascade():
    plan = models.vgg((4, "M", 8, 8), num_classes=3, input_shape=(16, 16, 1))
    variables = models.Network(plan).init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    images = np.random.default_rng(0).normal(size=(9, 16, 16, 1)).astype(np.float32)
    small = models.Network(dataclasses.replace(plan, input_shape=(8, 8, 1)))
    tiles = dynamic.gate(plan, dynamic.DynamicSpec(columns=0.5, tile=2))
    by_tiles = models.Network(tiles, gate=dynamic.gate_layer)
    steps = [
        dynamic.at_resolution(lambda x: small.apply(variables, x), (8, 8)),
        jax.jit(lambda x: by_tiles.apply(variables, x)),
        jax.jit(lambda x: models.Network(plan).apply(variables, x)),
    ]
    alone = [np.asarray(step(images)) for step in steps]
    confident = [np.exp(x - x.max(1, keepdims=True)) for x in alone]
    confident = [(e / e.sum(1, keepdims=True)).max(1) for e in confident]
    threshold = float(np.median(np.concatenate(confident[:2])))
    found = dynamic.traverse(steps, images, threshold, buckets=(1, 4))
    expected = [next((i for i in (0, 1) if confident[i][n] > threshold), 2) for n in range(9)]
    np.testing.assert_array_equal(found.exits, expected)
    rows = np.array([alone[step][n] for n, step in enumerate(expected)])
    np.testing.assert_allclose(found.logits, rows, rtol=1e-4, atol=1e-5)
