# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quadratic neurons on handwritten digits
#
# <!-- colab -->
#
# **The problem.** A first-order neuron computes $w \cdot x$: a plane. To bend it, a network stacks layers, and every
# layer costs parameters and multiply-accumulates.
#
# **The equation.** QuadraLib's neuron multiplies two planes and adds a third,
# $$ y = (a \cdot x)\,(b \cdot x) + c \cdot x, $$
# so one neuron bends by itself, at the price of three planes. Does the trade pay? We measure.

# %%
import importlib.util
import os

if importlib.util.find_spec("jaxeff") is None:
    raise ImportError("install jaxeff first: pip install -e '.[all]' in a clone")  # install line

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from jaxeff import costs, data, models, quadratic, spec, training

FAST = bool(os.environ.get("JAXEFF_NB_FAST"))  # fewer epochs, for automatic runs

# %% [markdown]
# ## One neuron solves XOR
#
# No first-order neuron can. A quadratic one needs nothing but gradient descent on four points.

# %%
points = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
target = jnp.array([0.0, 1.0, 1.0, 0.0])
neuron = quadratic.QuadraticDense(1, kind="quadralib")
params = neuron.init(jax.random.key(3), points)


def xor_loss(params):
    return jnp.mean((neuron.apply(params, points)[:, 0] - target) ** 2)


@jax.jit
def descend(params, _):
    value, gradient = jax.value_and_grad(xor_loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value


params, losses = jax.lax.scan(descend, params, None, length=1000)
print("XOR by one neuron:", np.round(neuron.apply(params, points)[:, 0], 3))

# %% [markdown]
# ## Two networks, one description
#
# An architecture is data. `spec.quadratize` returns the same network with other neurons; nothing is written twice.
# The quadratic one gets half the width.

# %%
train, test = data.load("digits", "train"), data.load("digits", "test")
wide = models.cnn((16, 32, 64), input_shape=(8, 8, 1), pools=2)
narrow = spec.quadratize(models.cnn((8, 16, 32), input_shape=(8, 8, 1), pools=2), branch_norm="batch")
networks = {
    name: models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    for name, architecture in {"first order": wide, "quadratic": narrow}.items()
}

# %% [markdown]
# ## What each layer costs
#
# `costs.analyze` reads the program that JAX would run, so it needs no list of layers and misses none.


# %%
def cost_of(network):
    image = jnp.zeros((1, 8, 8, 1))
    variables = network.init(jax.random.key(0), image)

    def forward(params, image):
        return network.apply({**variables, "params": params}, image, True, mutable=["batch_stats"])[0]

    return costs.analyze(forward, variables["params"], image, depth=2)


reports = {name: cost_of(network) for name, network in networks.items()}
print(reports["quadratic"])

# %% [markdown]
# ## Train both
#
# One loop trains every method of the library: a method supplies `init`, `step` and `evaluate`.

# %%
epochs, batch = (12, 64) if FAST else (40, 64)
source = data.Batches(train.arrays, batch, seed=0)
steps = epochs * source.steps_per_epoch
results = {}
for name, network in networks.items():
    rate = training.schedule("cosine", 3e-3, steps, warmup=50)
    method = training.classification(
        *training.from_linen(network),
        training.optimizer("adamw", rate, weight_decay=0.01, clip_norm=1.0),
        num_classes=10,
        augment=lambda key, images: data.random_crop(key, images, padding=1),
    )
    results[name] = training.fit(
        method,
        source.starting_at,
        steps=steps,
        key=jax.random.key(0),
        evaluate_on=lambda: data.padded_batches(test.arrays, 360),
        eval_every=steps // 8,
        progress=False,
    )
    print(f"{name}: test accuracy {results[name].evaluation['accuracy']:.3f}")

# %% [markdown]
# ## The result
#
# Left: both learn the task. Right: what each pays for it. The quadratic network has fewer parameters and MACs, but
# training keeps more activations, because each neuron keeps its projections for the backward pass.

# %%
colours = {"first order": "#4477aa", "quadratic": "#cc6677"}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), gridspec_kw={"width_ratios": [3, 2]})
for name, result in results.items():
    curve = [(row["step"], row["eval/accuracy"]) for row in result.history if "eval/accuracy" in row]
    axes[0].plot(*zip(*curve, strict=True), marker="o", markersize=4, color=colours[name], label=name)
axes[0].set(title="accuracy on 360 test digits", xlabel="step", ylim=(0.85, 1.0))
axes[0].legend(frameon=False, loc="lower right")
base = reports["first order"].total
quantities = {"parameters": "params", "MACs": "macs", "kept for backward": "residual_bytes"}
ratios = [getattr(reports["quadratic"].total, field) / getattr(base, field) for field in quantities.values()]
bars = axes[1].barh(list(quantities), ratios, color=colours["quadratic"], height=0.55)
axes[1].bar_label(bars, fmt="%.2f", padding=-34, color="white", weight="bold")
axes[1].axvline(1.0, color=colours["first order"], linewidth=2)
axes[1].set(title="quadratic / first order", xlabel="line: equal to first order", xlim=(0, 1.1 * max(ratios)))
axes[1].invert_yaxis()
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## In your own JAX code
#
# A layer is a pure function on a dictionary of arrays, so `vmap`, `grad` and `jit` apply to it directly: here a
# quadratic layer for each of five clients, and the gradient of each client's loss, in one call.

# %%
keys = jax.random.split(jax.random.key(1), 5)
layer = quadratic.QuadraticConv(4, kind="quadralib")
images = jnp.asarray(train.arrays["image"][:40].reshape(5, 8, 8, 8, 1), jnp.float32) / 255
labels = jnp.asarray(train.arrays["label"][:40].reshape(5, 8))
clients = jax.vmap(layer.init, in_axes=(0, 0))(keys, images)


def client_loss(variables, images, labels):
    logits = layer.apply(variables, images).reshape(images.shape[0], -1)[:, :10]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


gradients = jax.jit(jax.vmap(jax.grad(client_loss)))(clients, images, labels)
print({name: value.shape for name, value in gradients["params"].items()})

# %% [markdown]
# NNX users take the same layer through Flax's bridge.

# %%
bridged = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(images[0])
print("from NNX:", bridged(images[0]).shape)

# %%
assert float(losses[-1]) < 1e-3
assert all(result.evaluation["accuracy"] > (0.9 if FAST else 0.96) for result in results.values())
assert reports["quadratic"].total.params < reports["first order"].total.params
assert all(bool(jnp.isfinite(value).all()) for value in jax.tree.leaves(gradients))
