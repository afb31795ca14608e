"""The adversarial method on networks so small that NumPy can follow every update, and through the training loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import training

RNG = np.random.default_rng(0)
RATE = 0.1


def constant_generator(start):
    """Always the same image, which is its parameter: no randomness to follow."""
    return training.ModelFunctions(
        lambda key, latents: {"params": {"image": jnp.asarray(start, jnp.float32)}},
        lambda v, latents, train, key: (
            jnp.broadcast_to(v["params"]["image"], (latents.shape[0], *v["params"]["image"].shape)), {},
        ),
    )  # fmt: skip


def linear_discriminator(start):
    return training.ModelFunctions(
        lambda key, images: {"params": {"kernel": jnp.asarray(start, jnp.float32)}},
        lambda v, images, train, key: (images.reshape(images.shape[0], -1) @ v["params"]["kernel"], {}),
    )


def linear_method(image, kernel, **options):
    tx = optax.sgd(RATE)
    settings = {"latent": 2, "spectral": None, "preprocess": lambda images: images, **options}
    return training.adversarial(constant_generator(image), linear_discriminator(kernel), tx, tx, **settings)


def test_two_steps_are_those_worked_out_by_hand():
    image, kernel = RNG.normal(size=(2, 1, 1)), 0.3 * RNG.normal(size=(2, 1))
    batches = RNG.normal(size=(2, 6, 2, 1, 1)).astype(np.float32)
    method = linear_method(image, kernel, discriminator_steps=2, ema_decay=0.15)
    state = method.init(jax.random.key(0), {"image": batches[0]})
    fake, w = image.ravel(), kernel.ravel()
    average = fake.copy()
    for index, batch in enumerate(batches):
        state, metrics = jax.jit(method.step)(state, {"image": batch})
        losses, scores = [], []
        for real in batch.reshape(2, 3, 2):
            losses.append(np.maximum(0, 1 - real @ w).mean() + max(0, 1 + fake @ w))
            scores.append((real @ w).mean())
            slope = (-real * (1 - real @ w > 0)[:, None]).mean(0) + fake * (1 + fake @ w > 0)
            w = w - RATE * slope
        expected_loss = -fake @ w
        fake = fake + RATE * w
        # 1/10 at the first step; 2/11 at the second is above the decay that was asked for.
        decay = [0.1, 0.15][index]
        average = decay * average + (1 - decay) * fake
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert metrics["real_score"] == pytest.approx(np.mean(scores), rel=1e-5)
        assert metrics["generator_loss"] == pytest.approx(expected_loss, rel=1e-5)
        np.testing.assert_allclose(state.discriminator.params["kernel"].ravel(), w, rtol=1e-5)
        np.testing.assert_allclose(state.generator.params["image"].ravel(), fake, rtol=1e-5)
        np.testing.assert_allclose(state.average["params"]["image"].ravel(), average, rtol=1e-5)
    assert state.step == 2


def test_the_discriminator_judges_with_normalised_kernels():
    image, kernel = np.ones((2, 1, 1)), np.array([[3.0], [4.0]])
    real = RNG.normal(size=(4, 2, 1, 1)).astype(np.float32)
    method = linear_method(image, kernel, spectral="kernel")
    state = method.init(jax.random.key(0), {"image": real})
    _, metrics = jax.jit(method.step)(state, {"image": real})
    assert metrics["fake_score"] == pytest.approx(7 / 5, rel=1e-5)
    assert metrics["real_score"] == pytest.approx((real.reshape(4, 2) @ [0.6, 0.8]).mean(), rel=1e-4)
    sums = jax.jit(method.evaluate)(state, {"image": real, "mask": np.array([1, 1, 0, 0], np.float32)})
    expected = real.reshape(4, 2)[:2] @ [0.6, 0.8]
    assert sums["count"] == 2
    assert sums["fake_score"] == pytest.approx(2 * 7 / 5, rel=1e-5)
    assert sums["real_score"] == pytest.approx(expected.sum(), rel=1e-4)
    assert sums["loss"] == pytest.approx(np.maximum(0, 1 - expected).sum() + 2 * (1 + 7 / 5), rel=1e-4)


class Generator(nn.Module):
    """Batch norm, so that there are running statistics to average."""

    @nn.compact
    def __call__(self, latents, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(latents))
        return jnp.tanh(x).reshape(-1, 2, 2, 1)


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(1)(nn.relu(nn.Dense(5)(images.reshape(images.shape[0], -1))))[:, 0]


@pytest.fixture(scope="module")
def small():
    tx = training.optimizer("adam", 0.01, b1=0.0, b2=0.9)
    functions = training.from_linen(Generator()), training.from_linen(Discriminator())
    return training.adversarial(*functions, tx, tx, latent=3, discriminator_steps=2, ema_decay=0.9)


def batch(index):
    return {"image": np.random.default_rng(index).integers(0, 256, (8, 2, 2, 1)).astype(np.uint8)}


def batches_from(start):
    while True:
        yield batch(start)
        start += 1


def test_the_average_covers_the_running_statistics_and_generates_the_images(small):
    state = small.init(jax.random.key(0), batch(0))
    before = state.average["batch_stats"]["BatchNorm_0"]["mean"]
    state, _ = jax.jit(small.step)(state, batch(0))
    after = state.generator.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(
        state.average["batch_stats"]["BatchNorm_0"]["mean"], 0.1 * before + 0.9 * after, rtol=1e-5
    )
    latents = jax.random.normal(jax.random.key(1), (5, 3))
    images = training.generated(training.from_linen(Generator()), state, latents)
    np.testing.assert_array_equal(images, Generator().apply(state.average, latents))
    assert images.shape == (5, 2, 2, 1)


def test_every_step_draws_new_latents(small):
    state = small.init(jax.random.key(0), batch(0))
    step = jax.jit(small.step)
    one, two = (step(state._replace(step=jnp.int32(number)), batch(0))[1]["fake_score"] for number in (0, 1))
    assert one != two


@pytest.mark.slow
def test_a_run_in_two_parts_ends_where_one_in_one_part_does(small, tmp_path):
    settings = dict(key=jax.random.key(0), evaluate_on=lambda: [batch(99)], log_every=2, progress=False)
    whole = training.fit(small, batches_from, steps=6, **settings)
    training.fit(small, batches_from, steps=3, workdir=tmp_path, **settings)
    parts = training.fit(small, batches_from, steps=6, workdir=tmp_path, **settings)

    def leaves(state):
        return jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))

    for one, other in zip(leaves(whole.state), leaves(parts.state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert parts.evaluation == whole.evaluation and set(whole.evaluation) == {"loss", "real_score", "fake_score"}


def test_signed_range_is_that_of_tanh():
    np.testing.assert_allclose(training.signed_range(np.array([0, 51, 255], np.uint8)), [-1, -0.6, 1], rtol=1e-6)
    np.testing.assert_allclose(training.signed_range(np.array([0, 0.5])), [-1, 0])
    with pytest.raises(TypeError, match="uint8 or a floating point dtype, got int32"):
        training.signed_range(np.zeros(2, np.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 0}, "latent: expected a whole number of at least 1, got 0"),
        ({"discriminator_steps": 0}, "discriminator_steps: expected a whole number"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        linear_method(np.ones((2, 1, 1)), np.ones((2, 1)), **options)


@pytest.mark.parametrize(
    ("image", "kernel", "batch", "message"),
    [
        (
            (2, 1, 1),
            (2, 1),
            {"image": np.zeros((3, 2, 1, 1), np.float32)},
            "discriminator_steps=2 does not divide .* 3",
        ),
        ((2, 1, 1), (2, 1), {"label": np.zeros(4)}, "batch: has no image; its entries are label"),
        ((2, 2, 1), (4, 1), {"image": np.zeros((4, 4, 1, 1), np.float32)}, r"generator: makes images of shape \(2, 2"),
        ((2, 1, 1), (2, 3), {"image": np.zeros((4, 2, 1, 1), np.float32)}, r"discriminator: .* got \(4, 3\)"),
    ],
)
def test_networks_and_batches_that_do_not_fit_are_named(image, kernel, batch, message):
    method = linear_method(np.ones(image), np.ones(kernel), discriminator_steps=2)
    with pytest.raises(ValueError, match=message):
        method.init(jax.random.key(0), batch)
