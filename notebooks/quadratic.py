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
# # Quadratic neurons: what they are, what they hold, what they see
#
# <!-- colab -->
#
# **The problem.** A neuron that multiplies projections of its input can bend by itself, but differentiated naively it
# keeps several arrays for every one that a first-order neuron keeps, and deep stacks of products explode.
#
# **What is here.** The neurons of the field as data; a backward pass that keeps only the input of a layer, in the
# *compiled* program; training that starts as a first-order network; and pictures of what the quadratic part sees.

# %%
import importlib.util
import os
from functools import partial

if importlib.util.find_spec("jaxeff") is None:
    raise ImportError("install jaxeff first: pip install -e '.[all]' in a clone")  # install line

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxeff import data, models, quadratic, spec, training
from jaxeff.quadratic import diagnose

FAST = bool(os.environ.get("JAXEFF_NB_FAST"))  # fewer epochs, for automatic runs
COLOURS = {"first order": "#4477aa", "quadratic": "#cc6677"}

# %% [markdown]
# ## The neurons
#
# A kind says which projections a neuron takes and how it combines them; layers, initialisation, costs and backward
# passes follow. For 64 inputs of each neuron:

# %%
print(f"{'kind':22}{'weights':>9}{'MACs':>9}   formula")
for name in (*quadratic.KINDS, *quadratic.FAMILIES):
    kind = quadratic.get(name)
    params, macs = quadratic.cost(kind, inputs=64, features=kind.outputs)
    print(f"{name:22}{params:9,}{macs:9,}   {kind.formula}")

# %% [markdown]
# ## What the backward pass keeps
#
# QuadraLib's block has three convolutions, three branch norms, a product, an output norm and an activation. Plain
# differentiation keeps about seven arrays of the size of its output (five in the compiled program). The policy
# `save="x"` keeps its input and computes the rest again. What counts is the compiled program, so that is what we ask:
# how much does its memory grow with every block, beside a first-order convolution with norm and activation?


# %%
def held(kind, save, depth, batch=64, size=32, channels=16):
    """Arrays of the size of one output that the compiled gradient of a stack of blocks holds."""
    blocks = [
        quadratic.QuadraticConv(
            channels,
            kind=kind,
            branch_norm=None if kind == "first_order" else "batch",
            out_norm="batch",
            act="relu",
            save=save,
        )
        for _ in range(depth)
    ]
    x = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    variables = [jax.eval_shape(block.init, jax.random.key(0), x) for block in blocks]

    def loss(variables, x):
        for block, own in zip(blocks, variables, strict=True):
            x = block.apply(own, x, train=True, mutable=["batch_stats"])[0]
        return x.sum()

    compiled = jax.jit(jax.grad(loss)).lower(variables, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * batch * size * size * channels)


blocks = [(kind, save) for kind in ("first_order", "quadralib") for save in ("all", "ab", "x")]
growth = {block: (held(*block, 4) - held(*block, 2)) / 2 for block in blocks}
for (kind, save), value in growth.items():
    print(f"{kind:12} save={save!r:6} {value:.2f} arrays per block")

# %% [markdown]
# ## Does it still learn?
#
# The same three-layer network on handwritten digits, first order and quadratic. The quadratic one is narrower, starts
# as a first-order network (ReLinear) and runs under `save="x"`.

# %%
train, test = data.load("digits", "train"), data.load("digits", "test")
shape = {"input_shape": (8, 8, 1), "pools": 1}
networks = {
    "first order": models.Network(
        models.cnn((16, 32, 32), **shape), conv=quadratic.conv_layer, dense=quadratic.dense_layer
    ),
    "quadratic": models.Network(
        spec.quadratize(models.cnn((9, 18, 18), **shape), "quadralib", branch_norm="batch"),
        conv=partial(quadratic.conv_layer, save="x", initialization="relinear"),
        dense=quadratic.dense_layer,
    ),
}
epochs, batch = (8, 64) if FAST else (25, 64)
source = data.Batches(train.arrays, batch, seed=0)
steps = epochs * source.steps_per_epoch
results, sizes = {}, {}
for name, network in networks.items():
    method = training.classification(
        *training.from_linen(network),
        training.optimizer(
            "adamw", training.schedule("cosine", 3e-3, steps, warmup=50), weight_decay=0.01, clip_norm=1.0
        ),
        num_classes=10,
        augment=lambda key, images: data.random_crop(key, images, padding=1),
    )
    results[name] = training.fit(
        method,
        source.starting_at,
        steps=steps,
        key=jax.random.key(0),
        evaluate_on=lambda: data.padded_batches(test.arrays, 360),
        eval_every=steps // 5,
        progress=False,
    )
    sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(results[name].state.params))
    print(f"{name}: test accuracy {results[name].evaluation['accuracy']:.3f} with {sizes[name]:,} parameters")

# %% [markdown]
# ## Memory and accuracy

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.3))
labels = {"all": "keep everything\n(plain)", "ab": "keep projections\n'ab'", "x": "keep the input\n'x'"}
for offset, (name, kind) in enumerate([("first order", "first_order"), ("quadratic", "quadralib")]):
    heights = [row + 0.38 * offset for row in range(len(labels))]
    values = [growth[kind, save] for save in labels]
    bars = axes[0].barh(heights, values, color=COLOURS[name], height=0.36, label=name)
    axes[0].bar_label(bars, fmt="%.1f", padding=4)
axes[0].set_yticks([row + 0.19 for row in range(len(labels))], list(labels.values()))
axes[0].legend(frameon=False, loc="lower right", fontsize=9)
axes[0].invert_yaxis()
axes[0].set(
    title="memory of the compiled gradient",
    xlabel="output-sized arrays per block",
    xlim=(0, 1.15 * max(growth.values())),
)
for name, result in results.items():
    curve = [(row["step"], row["eval/accuracy"]) for row in result.history if "eval/accuracy" in row]
    label = f"{name}, {sizes[name]:,} parameters"
    axes[1].plot(*zip(*curve, strict=True), marker="o", markersize=4, color=COLOURS[name], label=label)
axes[1].set(title="accuracy on 360 test digits", xlabel="step", ylim=(0.85, 1.0))
axes[1].legend(frameon=False, loc="lower right", fontsize=9)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What each part sees
#
# A layer's output before its norm is a product, `(a.x) * (b.x)`, plus a first-order part, `c.x`. Their channel means
# on four digits, beside the only part that the first-order network has:

# %%
pictures = jnp.asarray(test.arrays["image"][:4], jnp.float32) / 255
parts = {
    name: diagnose.activation_parts(
        network, {"params": results[name].state.params, **results[name].state.model_state}, pictures, "conv2"
    )
    for name, network in networks.items()
}
columns = [
    ("input", pictures[..., 0], "gray"),
    ("first-order network", parts["first order"].total, "viridis"),
    ("quadratic: first-order part", parts["quadratic"].first, "viridis"),
    ("quadratic: product", parts["quadratic"].second, "viridis"),
]
figure, axes = plt.subplots(len(pictures), len(columns), figsize=(9.5, 8))
for row, line in enumerate(axes):
    for axis, (title, maps, colours) in zip(line, columns, strict=True):
        axis.imshow(maps[row], cmap=colours, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        if row == 0:
            axis.set_title(title, fontsize=10)
figure.suptitle("channel means of the second convolution", fontsize=12)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Why the start matters
#
# Thirteen layers without any norm: products of products leave the range of float32 after a few layers. A network that
# starts as its first-order twin does not, and its quadratic part grows as fast as training wants it to
# (`quadratic.restrain` slows it down further).


# %%
def spread_by_depth(kind, start, depth=13):
    """The largest output of every layer."""
    layer = quadratic.QuadraticConv(16, kind=kind, initialization=start, act="relu")
    x, sizes = jax.random.normal(jax.random.key(0), (8, 8, 8, 16)), []
    for key in jax.random.split(jax.random.key(1), depth):
        x = layer.apply(layer.init(key, x), x)
        sizes.append(float(jnp.abs(x).max()))
    return sizes


spreads = {
    f"{kind}, {start} start": spread_by_depth(kind, start)
    for kind, start in [("t3", "kaiming"), ("t4", "kaiming"), ("quadralib", "kaiming"), ("quadralib", "relinear")]
}
figure, axis = plt.subplots(figsize=(6.5, 3.2))
for (name, spread), colour in zip(spreads.items(), ("#aa3377", "#ccbb44", "#66ccee", "#228833"), strict=True):
    finite = [value for value in spread if np.isfinite(value)]
    axis.semilogy(range(1, len(finite) + 1), finite, marker="o", markersize=4, color=colour, label=name)
axis.set(xlabel="layer", title="largest activation, no norms", xlim=(0.5, 13.5))
axis.legend(frameon=False, fontsize=9)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %%
assert growth["quadralib", "x"] < 0.4 * growth["quadralib", "all"]
assert all(result.evaluation["accuracy"] > (0.85 if FAST else 0.95) for result in results.values())
assert sizes["quadratic"] < 1.02 * sizes["first order"]
assert np.isfinite(spreads["quadralib, relinear start"]).all() and not np.isfinite(spreads["t3, kaiming start"]).all()
