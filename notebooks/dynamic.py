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
# # Dynamic pruning: what each image keeps, and what that saves on the clock
#
# <!-- colab -->
#
# **The problem.** A network does the same work for every image, though most of its channels and positions say nothing
# about most images. Masks that drop them save multiply-accumulates on paper and nothing on the clock.
#
# **What is here.** Gates that keep the channels and columns of highest attention, a fixed number of them, anew for
# every image; training under rising ratios; how much each block can drop; and engines that compute only what is kept.

# %%
import importlib.util
import os
import pathlib
import tempfile

if importlib.util.find_spec("jaxeff") is None:
    raise ImportError("install jaxeff first: pip install -e '.[all]' in a clone")  # install line

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from jaxeff import costs, data, dynamic, models, training
from jaxeff.dynamic import DynamicSpec, figures

FAST = bool(os.environ.get("JAXEFF_NB_FAST"))  # fewer epochs and smaller layers, for automatic runs
FIGURES = pathlib.Path(tempfile.mkdtemp())
COLOURS = {"dense": "#4477aa", "pruned": "#cc6677"}

# %% [markdown]
# ## A gate
#
# Attention needs no parameters: a channel counts by its mean over positions, a column (a position with all of its
# channels) by its mean over channels. The gate stands before the convolution that reads the map, and the network's
# variables are those that it has without gates.

# %%
train, test = data.load("digits", "train"), data.load("digits", "test")
plan = models.vgg((16, 16, "M", 32, 32), num_classes=10, input_shape=(8, 8, 1))
half = DynamicSpec(channels=0.5, columns=0.5)
gated = models.Network(dynamic.gate(plan, half), gate=dynamic.gate_layer)
dense = models.Network(plan)
print("blocks that can have gates:", dynamic.blocks(plan))

# %% [markdown]
# ## How much each block can drop
#
# A network without gates learns first. Then it is measured with one block gated at a time, at every ratio, in both
# dimensions, without any training in between: one compiled program for the whole sweep.

# %%
epochs, batch = (8, 64) if FAST else (30, 64)
source = data.Batches(train.arrays, batch, seed=0)
steps = epochs * source.steps_per_epoch
results = {}


def learned(init, apply):
    """A training run of these functions."""
    schedule = training.schedule("cosine", 3e-3, steps, warmup=50)
    method = training.classification(
        init,
        apply,
        training.optimizer("adamw", schedule, weight_decay=0.01, clip_norm=1.0),
        num_classes=10,
        augment=lambda key, images: data.random_crop(key, images, padding=1),
    )
    return training.fit(
        method,
        source.starting_at,
        steps=steps,
        key=jax.random.key(0),
        evaluate_on=lambda: data.padded_batches(test.arrays, 360),
        eval_every=max(1, steps // 10),
        progress=False,
    )


results["dense"] = learned(*training.from_linen(dense))
print(f"dense: test accuracy {results['dense'].evaluation['accuracy']:.3f}")

# %%
standing = results["dense"].state
trained = {"params": standing.evaluation_params, **standing.model_state}
held_out, answers = jnp.asarray(train.arrays["image"][:512], jnp.float32) / 255, train.arrays["label"][:512]
paths = dynamic.block_paths(gated.architecture)
names = [" and ".join(block) for block in dynamic.blocks(plan)]
found = dynamic.sensitivity(gated.apply, trained, held_out, answers, paths, names=names)
Image(figures.draw_sensitivity(found, FIGURES / "sensitivity.png"), width=750)

# %% [markdown]
# Ratios under a budget follow: the least loss of accuracy with half of the multiply-accumulates.

# %%
shape = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
report = costs.analyze(dense.apply, jax.eval_shape(dense.init, jax.random.key(0), shape), shape)
chosen = dynamic.ratios_within_macs(gated.architecture, report, found, 0.5, dimensions=("channels", "columns"))
for name, (by_channel, by_column) in zip(names, chosen, strict=True):
    print(f"{name:20} drops {by_channel:.0%} of the channels, {by_column:.0%} of the columns")
left = dynamic.counted_macs(dynamic.with_ratios(gated.architecture, chosen), report)["total"]
print(f"multiply-accumulates left: {left.counted / left.dense:.2f}")

# %% [markdown]
# ## Training under rising ratios
#
# Targeted dropout drops what has the least attention, nothing at random, and more of it as training goes on, until the
# chosen ratios are reached after half of the steps. The ratios are traced, so the whole ascent is one compilation.

# %%
pace = {"start": 0.0, "increment": 0.1}
every = max(1, steps // 2 // max(1, dynamic.ascent_steps(chosen, **pace, every=1)))
schedule = dynamic.ratio_ascent(chosen, **pace, every=every)
results["pruned"] = learned(*dynamic.targeted_dropout(training.from_linen(gated), paths, schedule))
for name, result in results.items():
    print(f"{name}: test accuracy {result.evaluation['accuracy']:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
at = np.arange(steps)
climb = np.asarray(jax.vmap(schedule)(at))
for block, colour in enumerate(("#228833", "#aa3377")):
    for index, (dimension, line) in enumerate((("channels", "-"), ("columns", "--"))):
        axes[0].plot(at, 100 * climb[:, block, index], line, color=colour, label=f"{names[block]}, {dimension}")
axes[0].set(title="share that is dropped, %", xlabel="step", ylim=(-3, 100))
axes[0].legend(frameon=False, loc="upper left", fontsize=8, ncols=2)
for name, result in results.items():
    curve = [(row["step"], 100 * row["eval/accuracy"]) for row in result.history if "eval/accuracy" in row]
    axes[1].plot(*zip(*curve, strict=True), marker="o", markersize=4, color=COLOURS[name], label=name)
axes[1].set(title="accuracy on 360 test digits, %", xlabel="step", ylim=(70, 100.5))
axes[1].legend(frameon=False, loc="lower right", fontsize=9)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What is kept
#
# The map after the first convolution, on eight digits, with half of its channels and of its columns kept. They are not
# the same for every digit: the columns that stay follow the strokes.

# %%
pruned = models.Network(dynamic.with_ratios(gated.architecture, chosen), gate=dynamic.gate_layer)
state = results["pruned"].state
variables = {"params": state.evaluation_params, "batch_stats": state.model_state["batch_stats"]}
pictures = jnp.asarray(test.arrays["image"][:8], jnp.float32) / 255
maps = {}


def watch(call, args, kwargs, context):
    """Keeps what the second convolution reads."""
    if context.module.name == "layer" and context.module.path == ("conv2", "layer"):
        maps["conv2"] = args[0]
    return call(*args, **kwargs)


with nn.intercept_methods(watch):
    pruned.apply(variables, pictures)
kept = dynamic.select(maps["conv2"], DynamicSpec(channels=0.5, columns=0.5))
channels = dynamic.mask_of(kept.channels, maps["conv2"].shape[-1])
columns = dynamic.mask_of(kept.columns, 64).reshape(-1, 8, 8)
attention = dynamic.column_attention(maps["conv2"])
figure, axes = plt.subplots(4, 8, figsize=(9.5, 4.1), gridspec_kw={"height_ratios": [6, 6, 6, 1], "hspace": 0.06})
titles = ("digit", "column attention", "half of the columns", "half of 16 channels")
for n in range(8):
    shown = (pictures[n, ..., 0], attention[n], np.where(columns[n], pictures[n, ..., 0], np.nan), channels[n][None])
    for axis, picture, colours in zip(axes[:, n], shown, ("gray", "viridis", "gray", "Blues"), strict=True):
        axis.set_facecolor("#e8c4c4")  # what is dropped
        axis.imshow(picture, cmap=colours, interpolation="nearest", vmin=0, aspect="equal")
        axis.set(xticks=[], yticks=[])
for axis, title in zip(axes[:, 0], titles, strict=True):
    axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
figure.subplots_adjust(left=0.17, right=0.99, top=0.99, bottom=0.02)
plt.show()

# %% [markdown]
# ## What the clock says
#
# Counted is not real. `tune` measures the engines of every layer and remembers the fastest; `speed_report` puts them
# beside the *fastest* dense form of the layer. VGG-16 on 32x32 images, one image, half of the channels dropped:

# %%
wide = models.vgg((64, "M", 64, 64)) if FAST else models.vgg("D")
network = models.Network(dynamic.gate(wide, DynamicSpec(channels=0.5)), gate=dynamic.gate_layer)
one = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
with tempfile.TemporaryDirectory() as cache:  # leave the table of this machine alone
    os.environ["JAXEFF_CACHE_DIR"] = cache
    dynamic.tune(network, one)
    speed = dynamic.speed_report(network, one, rounds=3 if FAST else 15)
    del os.environ["JAXEFF_CACHE_DIR"]
Image(figures.draw_speed(speed, FIGURES / "speed.png"), width=800)

# %%
assert results["pruned"].evaluation["accuracy"] > (0.6 if FAST else 0.93)
assert left.counted <= 0.5 * left.dense and found.accuracy.shape == (2, len(paths), 10)
assert (np.asarray(channels).sum(-1) == 8).all() and (np.asarray(columns).sum((1, 2)) == 32).all()
assert len(speed.rows) == (2 if FAST else 12)
