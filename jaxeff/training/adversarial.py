"""The training method for generative adversarial networks: hinge loss, spectral norm, moving average of the generator.

The defaults that the paper of spectral normalisation gives (Miyato et al. 2018, arXiv 1802.05957) are Adam with a rate
of 2e-4, b1 = 0 and b2 = 0.9 for both networks, and a few steps of the discriminator for each one of the generator:

    tx = training.optimizer("adam", 2e-4, b1=0.0, b2=0.9)
    method = training.adversarial(
        training.from_linen(generator), training.from_linen(discriminator), tx, tx, latent=64, discriminator_steps=2
    )
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxeff.training.linen import ModelFunctions
from jaxeff.training.spectral import KERNELS, spectral_normalise, spectral_vectors
from jaxeff.training.step import Batch, Method, Metrics, unit_range
from jaxeff.trees.parts import Pattern

# A random start of the power iteration is far off for the first steps; this many bring it near.
_FIRST_ITERATIONS = 20


class Player(NamedTuple):
    """One of the two networks as it is trained.

    Attributes:
      params: pytree of float arrays; the discriminator's are those before spectral normalisation.
      model_state: the model's other variables, `{"batch_stats": ...}` or `{}`.
      opt_state: state of its optimiser.
    """

    params: Any
    model_state: Any
    opt_state: Any


class AdversarialState(NamedTuple):
    """What a step of `adversarial` reads and writes.

    Attributes:
      step: int32 scalar, the number of finished steps of the generator.
      generator: the generator in training.
      discriminator: the discriminator in training.
      vectors: power-iteration vectors of the discriminator's kernels by name; {} without spectral norm.
      average: variables of the generator to evaluate and to deploy, `{"params": ..., "batch_stats": ...}`: the moving
        average of parameters and running statistics alike.
      key: typed PRNG key, scalar; never changes.
    """

    step: jax.Array
    generator: Player
    discriminator: Player
    vectors: dict[str, jax.Array]
    average: Any
    key: jax.Array


def signed_range(images: jax.Array) -> jax.Array:
    """Returns images as float32 in -1..1, the range of tanh: uint8 from 0..255, floating point values from 0..1.

    Raises:
      TypeError: for other dtypes, whose range is not known.
    """
    return 2 * unit_range(images) - 1


def adversarial(
    generator: ModelFunctions,
    discriminator: ModelFunctions,
    generator_tx: optax.GradientTransformation,
    discriminator_tx: optax.GradientTransformation,
    *,
    latent: int,
    discriminator_steps: int = 1,
    ema_decay: float = 0.999,
    spectral: Pattern | None = KERNELS,
    preprocess: Callable[[jax.Array], jax.Array] = signed_range,
) -> Method:
    """Returns the method that trains a generator against a discriminator on batches {"image": [B, H, W, C]}.

    One step is `discriminator_steps` updates of the discriminator, each on its own part of the batch and as many new
    images, then one update of the generator. The losses are hinge losses (Lim and Ye 2017, arXiv 1705.02894): the
    discriminator's is the mean of max(0, 1 - D(x)) + max(0, 1 + D(G(z))), the generator's the mean of -D(G(z)).

    Args:
      generator: `(init, apply)` of `from_linen`, from latent vectors [B, latent] to images [B, H, W, C].
      discriminator: `(init, apply)`, from images to scores [B] or [B, 1].
      generator_tx: optimiser of the generator.
      discriminator_tx: optimiser of the discriminator.
      latent: size of the latent vectors, which are standard normal.
      discriminator_steps: updates of the discriminator per step; must divide the batch.
      ema_decay: decay in (0, 1) of the generator's moving average; early on it is (1 + step) / (10 + step), so that
        short runs forget their start.
      spectral: which of the discriminator's parameters are divided by their spectral norm, as in
        `spectral_normalise`; None for none.
      preprocess: `images -> images` in the generator's range; the default scales uint8 and 0..1 to -1..1.

    Returns:
      The method. Its state is an `AdversarialState`; step reports "loss" (of the discriminator, mean over its
      updates), "generator_loss", and the mean scores "real_score" and "fake_score" of the discriminator's updates.
      evaluate sums the discriminator's "loss" and both scores over the batch and as many images of the averaged
      generator, the same ones for every batch of a step.

    Raises:
      ValueError: for numbers out of range; from `init` when the networks, the images and `latent` do not fit together,
        or `discriminator_steps` does not divide the batch.
    """
    _check_settings(latent, discriminator_steps, ema_decay)

    def normalised(params: Any, vectors: dict[str, jax.Array]) -> tuple[Any, Any]:
        return (params, vectors) if spectral is None else spectral_normalise(params, vectors, spectral)

    def scores(params: Any, model_state: Any, images: jax.Array, train: bool, key: Any) -> tuple[jax.Array, Any]:
        values, model_state = discriminator.apply({"params": params, **model_state}, images, train, key)
        return values.reshape(images.shape[0]).astype(jnp.float32), model_state

    def draw(params: Any, model_state: Any, count: int, key: jax.Array) -> tuple[jax.Array, Any]:
        latent_key, model_key = jax.random.split(key)
        latents = jax.random.normal(latent_key, (count, latent))
        return generator.apply({"params": params, **model_state}, latents, True, model_key)

    def init(key: jax.Array, batch: Batch) -> AdversarialState:
        images = _checked_images(batch, preprocess, discriminator_steps)
        generator_key, discriminator_key, vector_key, step_key = jax.random.split(key, 4)
        made = dict(generator.init(generator_key, jnp.zeros((1, latent))))
        judged = dict(discriminator.init(discriminator_key, jnp.zeros((1, *images.shape[1:]), images.dtype)))
        _check_networks(generator, discriminator, made, judged, images, latent)

        @jax.jit  # as in `classification`, one compilation for all moments
        def create(made: Any, judged: Any, vector_key: jax.Array, step_key: jax.Array) -> AdversarialState:
            made, judged = dict(made), dict(judged)
            average = jax.tree.map(jnp.copy, made)
            params, judge = made.pop("params"), judged.pop("params")
            vectors: dict[str, jax.Array] = {}
            if spectral is not None:
                vectors = spectral_vectors(vector_key, judge, spectral)
                vectors = spectral_normalise(judge, vectors, spectral, iterations=_FIRST_ITERATIONS)[1]
            return AdversarialState(
                step=jnp.zeros((), jnp.int32),
                generator=Player(params, made, generator_tx.init(params)),
                discriminator=Player(judge, judged, discriminator_tx.init(judge)),
                vectors=vectors,
                average=average,
                key=step_key,
            )

        return create(made, judged, vector_key, step_key)

    def discriminator_update(state: AdversarialState, carry: Any, part: Any) -> tuple[Any, Metrics]:
        player, vectors = carry
        real, key = part
        draw_key, model_key = jax.random.split(key)
        fake, _ = draw(state.generator.params, state.generator.model_state, real.shape[0], draw_key)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            weights, moved = normalised(params, vectors)
            values, model_state = scores(
                weights, player.model_state, jnp.concatenate([real, fake.astype(real.dtype)]), True, model_key
            )
            on_real, on_fake = jnp.split(values, 2)
            means = {"real_score": on_real.mean(), "fake_score": on_fake.mean()}
            return _hinge(on_real, on_fake).mean(), (model_state, moved, means)

        (value, (model_state, vectors, means)), grads = jax.value_and_grad(loss, has_aux=True)(player.params)
        updates, opt_state = discriminator_tx.update(grads, player.opt_state, player.params)
        player = Player(optax.apply_updates(player.params, updates), model_state, opt_state)
        return (player, vectors), {"loss": value, **means}

    def generator_update(state: AdversarialState, count: int, key: jax.Array) -> tuple[Player, jax.Array]:
        player, judge = state.generator, state.discriminator
        weights, _ = normalised(judge.params, state.vectors)
        draw_key, model_key = jax.random.split(key)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            fake, model_state = draw(params, player.model_state, count, draw_key)
            return -scores(weights, judge.model_state, fake, True, model_key)[0].mean(), model_state

        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(player.params)
        updates, opt_state = generator_tx.update(grads, player.opt_state, player.params)
        return Player(optax.apply_updates(player.params, updates), model_state, opt_state), value

    def step(state: AdversarialState, batch: Batch) -> tuple[AdversarialState, Metrics]:
        images = preprocess(batch["image"])
        parts = images.reshape(discriminator_steps, -1, *images.shape[1:])
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), discriminator_steps + 1)
        (judge, vectors), rows = lax.scan(
            lambda carry, part: discriminator_update(state, carry, part),
            (state.discriminator, state.vectors),
            (parts, keys[1:]),
        )
        state = state._replace(discriminator=judge, vectors=vectors)
        player, generator_loss = generator_update(state, parts.shape[1], keys[0])
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update({"params": player.params, **player.model_state}, state.average, 1 - decay)
        metrics = {**{name: row.mean() for name, row in rows.items()}, "generator_loss": generator_loss}
        return state._replace(step=state.step + 1, generator=player, average=average), metrics

    def evaluate(state: AdversarialState, batch: Batch) -> Metrics:
        images = preprocess(batch["image"])
        latents = jax.random.normal(jax.random.fold_in(state.key, state.step), (images.shape[0], latent))
        fake = generated(generator, state, latents)
        weights, _ = normalised(state.discriminator.params, state.vectors)
        values, _ = scores(
            weights, state.discriminator.model_state, jnp.concatenate([images, fake.astype(images.dtype)]), False, None
        )
        on_real, on_fake = jnp.split(values, 2)
        mask = jnp.asarray(batch.get("mask", jnp.ones(images.shape[0])), jnp.float32)

        def total(value: jax.Array) -> jax.Array:
            # where, not a product: a padded example may give NaN, which a zero weight would not silence.
            return jnp.where(mask > 0, value * mask, 0).sum()

        loss = total(_hinge(on_real, on_fake))
        return {"loss": loss, "real_score": total(on_real), "fake_score": total(on_fake), "count": mask.sum()}

    return Method(init, step, evaluate)


def generated(generator: ModelFunctions, state: AdversarialState, latents: jax.Array) -> jax.Array:
    """Images of the averaged generator.

    Args:
      generator: the functions that the state was trained with.
      state: state of `adversarial`.
      latents: float [B, latent], standard normal.

    Returns:
      [B, H, W, C] in the generator's range.
    """
    return generator.apply(state.average, latents, False, None)[0]


def _hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    return jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)


def _check_settings(latent: int, discriminator_steps: int, ema_decay: float) -> None:
    for name, value in (("latent", latent), ("discriminator_steps", discriminator_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay: expected a number in (0, 1), got {ema_decay}")


def _checked_images(
    batch: Batch, preprocess: Callable[[jax.Array], jax.Array], discriminator_steps: int
) -> jax.ShapeDtypeStruct:
    if "image" not in batch:
        raise ValueError(f"batch: has no image; its entries are {', '.join(sorted(batch))}")
    images = jax.eval_shape(preprocess, batch["image"])
    if images.shape[0] % discriminator_steps:
        raise ValueError(
            f"discriminator_steps={discriminator_steps} does not divide the batch of {images.shape[0]} images; each "
            f"update takes its own part of it, so use a multiple of {discriminator_steps}"
        )
    return images


def _check_networks(
    generator: ModelFunctions, discriminator: ModelFunctions, made: Any, judged: Any, images: Any, latent: int
) -> None:
    size = images.shape[0]
    fake, _ = jax.eval_shape(lambda v, z: generator.apply(v, z, False, None), made, jnp.zeros((size, latent)))
    if fake.shape != images.shape:
        raise ValueError(
            f"generator: makes images of shape {fake.shape[1:]}, but those of the batch are {images.shape[1:]}; "
            "make its output shape that of the data"
        )
    values, _ = jax.eval_shape(lambda v, x: discriminator.apply(v, x, False, None), judged, images)
    if values.shape not in ((size,), (size, 1)):
        raise ValueError(f"discriminator: expected scores of shape ({size},) or ({size}, 1), got {values.shape}")
