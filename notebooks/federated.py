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
# # Federated learning: the same feature in the same place
#
# <!-- colab -->
#
# **The problem.** Clients train one network on examples that they do not show, and the server averages what they have
# learned, number by number. But the units of a layer have no order: what unit 7 is for at one client, unit 12 is for at
# another, and their mean is for nothing.
#
# **What is here.** A round as one compiled program; who holds what; a network whose features have owners before
# training (Fed2); what each unit is for, at every client, before and after; and matching, for networks that learned
# apart.

# %%
import importlib.util
import os
import pathlib
import tempfile

if importlib.util.find_spec("jaxeff") is None:
    raise ImportError("install jaxeff first: pip install -e '.[all]' in a clone")  # install line

import jax
import jax.numpy as jnp
import optax
from IPython.display import Image, display

from jaxeff import data, federated, models, training
from jaxeff.federated import fed2, figures

FAST = bool(os.environ.get("JAXEFF_NB_FAST"))  # fewer rounds, for automatic runs
FIGURES = pathlib.Path(tempfile.mkdtemp())
ROUNDS = 6 if FAST else 30

# %% [markdown]
# ## Who holds what
#
# Ten clients of two classes each: every class has two owners, and no client sees the other eight.

# %%
train, test = data.load("digits", "train"), data.load("digits", "test")
parts = federated.by_classes(train.arrays["label"], 10, classes_per_client=2, seed=0)
display(Image(figures.draw_partition(parts, FIGURES / "partition.png"), width=560))

# %% [markdown]
# ## Two networks of one width
#
# `fed2.adapt` divides a network: what comes before `first` is shared, what follows becomes ten narrow networks side by
# side, one for each class. Each reads what is shared, and answers with the logit of its own class; so a class trains
# its own group, and nothing of another client's class is mixed into it. There are no norms: in groups so narrow they
# would forget how strong a feature is.

# %%
plan = models.cnn((16, 32), pools=2, hidden=(80,), norm=None, num_classes=10, input_shape=(8, 8, 1))
grouped = fed2.adapt(plan, "dense1", groups=10, entry="all")
networks = {"FedAvg": models.Network(plan), "Fed2": fed2.GroupedNetwork(grouped)}


def learn(name, rounds):
    """The federation, its state after the last round, and the test accuracy after each."""
    functions = training.from_linen(networks[name])
    task = federated.classification(functions.apply, 10)
    variables = functions.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    aggregate = fed2.aggregate(grouped, variables, parts.class_counts) if name == "Fed2" else None
    algorithm = federated.fed_avg(task, optax.sgd(0.03), aggregate=aggregate)
    federation = federated.federate(algorithm, batch_size=16, epochs=2)
    clients = federated.clients_of(train.arrays, parts)
    state = federation.init(jax.random.key(1), variables, clients)
    (batch,) = data.padded_batches(test.arrays, len(test))
    evaluate, curve = jax.jit(task.evaluate), []
    for number in range(rounds):
        state, _ = federation.round(state, clients)
        sums = evaluate(algorithm.variables(state.server), batch)
        curve.append((number + 1, float(sums["accuracy"] / sums["count"])))
    return task, algorithm.variables(state.server), curve


learned = {name: learn(name, ROUNDS) for name in networks}
{name: f"{100 * curve[-1][1]:.1f} %" for name, (_, _, curve) in learned.items()}

# %% [markdown]
# ## What each unit is for, at every client
#
# Every client trains on from the global network, on what it holds. Then one backward pass says for each unit which
# class it does most for. A row is a client, a column a unit of the hidden dense layer; units that are for none are
# white.

# %%
images, labels = jnp.asarray(test.arrays["image"]) / 255.0, jnp.asarray(test.arrays["label"])


def at_clients(name):
    """Class preferences of the units of dense1 after each client has trained on by itself: ten of [80, 10]."""
    task, variables, _ = learned[name]
    alone = federated.fed_avg(task, optax.sgd(0.03))
    # A client that keeps what it has learned, and a server that ignores it.
    keeping = alone._replace(
        own_init=lambda variables: variables,
        client_final=lambda state, server, own: (federated.Upload(server), state.variables),
    )
    federation = federated.federate(keeping, batch_size=16, epochs=3)
    clients = federated.clients_of(train.arrays, parts)
    state, _ = federation.round(federation.init(jax.random.key(2), variables, clients), clients)
    layer = "groups/dense1" if name == "Fed2" else "dense1"

    def preference(own):
        return federated.class_preference(networks[name], own, images, labels, 10)[layer]

    return [preference(jax.tree.map(lambda leaf, i=i: leaf[i], state.own)) for i in range(10)]


preferences = {name: at_clients(name) for name in networks}
same = {name: federated.agreement(several) for name, several in preferences.items()}
titles = {
    f"{name}: units agree between clients in {100 * same[name]:.0f} %": [federated.primary_classes(p) for p in several]
    for name, several in preferences.items()
}
display(Image(figures.draw_features(titles, FIGURES / "features.png"), width=760))

# %% [markdown]
# ## Rounds to an accuracy

# %%
size = {name: 2 * 10 * sum(leaf.nbytes for leaf in jax.tree.leaves(learned[name][1])) for name in networks}
curves = {name: [{"accuracy": learned[name][2], "bytes_per_round": size[name]}] for name in networks}
display(Image(figures.draw_rounds(curves, 2, FIGURES / "rounds.png"), width=900))

# %% [markdown]
# ## Networks that learned apart
#
# Where features had no owners, they can be matched afterwards. What may be permuted in a network is found in its traced
# program: nothing is written by hand, and nothing is permuted that was not checked.

# %%
network, (_, variables, _) = networks["FedAvg"], learned["FedAvg"]
apply = lambda params, x: network.apply({**variables, "params": params}, x)
found = federated.derive(apply, variables["params"], images[:1])
federated.verify(found, apply, variables["params"], images[:4], key=jax.random.key(0))

secret = federated.random_perms(found, jax.random.key(4))
shuffled = federated.permute(found, variables["params"], secret)
matched = federated.permute(found, shuffled, federated.weight_match(found, variables["params"], shuffled))


def accuracy(params):
    return float((apply(params, images).argmax(-1) == labels).mean())


def mean(a, b):
    return jax.tree.map(lambda x, y: (x + y) / 2, a, b)


table = {
    "the network": accuracy(variables["params"]),
    "its shuffled copy": accuracy(shuffled),
    "mean of both": accuracy(mean(variables["params"], shuffled)),
    "mean after matching": accuracy(mean(variables["params"], matched)),
}
for name, value in table.items():
    print(f"{name:22s} {100 * value:5.1f} %")

# %%
assert same["Fed2"] > same["FedAvg"]
assert abs(table["mean after matching"] - table["the network"]) < 1e-6
