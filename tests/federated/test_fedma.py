"""Matched averaging: assignments against brute force, networks against closed forms, and what is matched stays."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxeff import federated, models, spec, training
from jaxeff.federated.fedma import fed_ma
from jaxeff.federated.nonparametric import match_units

CLASSES = 4
KEY = jax.random.key(0)


def lost(rows, others, assigned, how):
    """What an assignment of one of three clients costs given others: -2 log of its probability, by pmfs."""
    sigma, sigma_zero, gamma, clients = how["sigma"], how["sigma_zero"], how["gamma"], 3
    atoms = {}
    for mine, theirs in others:
        for row, atom in zip(mine, theirs, strict=True):
            atoms.setdefault(atom, []).append(row)
    used = {atom: len(members) for atom, members in atoms.items()}
    new = [atom for atom in assigned if atom not in used]
    total = -2 * (stats.poisson.logpmf(len(new), gamma / clients) + gamma / clients)
    for atom, count in used.items():
        total -= 2 * stats.bernoulli.logpmf(atom in assigned, count / clients)
    for row, atom in zip(rows, assigned, strict=True):
        atoms[atom] = [*atoms.get(atom, []), row]
    for members in atoms.values():
        centre = np.sum(members, 0) / sigma**2 / (len(members) / sigma**2 + 1 / sigma_zero**2)
        total += ((np.array(members) - centre) ** 2).sum() / sigma**2 + (centre**2).sum() / sigma_zero**2
    return total


def assert_best(rows, others, assigned, how):
    known = sorted({int(atom) for _, theirs in others for atom in theirs})
    choices = [*known, *(max(known) + 1 + k for k in range(len(rows)))]
    best = min(lost(rows, others, list(chosen), how) for chosen in itertools.permutations(choices, len(rows)))
    assert lost(rows, others, assigned, how) == pytest.approx(best, abs=1e-9)


# --- units ------------------------------------------------------------------------------------------------------------


def test_permuted_copies_are_matched_without_growth():
    rng = np.random.default_rng(0)
    base, perms = rng.normal(size=(7, 5)), [rng.permutation(7) for _ in range(4)]
    units = [base[perm] + 0.02 * rng.normal(size=base.shape) for perm in perms]
    found = match_units(units, sigma=0.5)
    assert found.atoms.shape == (7, 5) and found.counts.tolist() == [4] * 7
    # Atoms are those of the first client, in its order.
    for perm, assigned in zip(perms, found.assignments, strict=True):
        np.testing.assert_array_equal(perms[0][assigned], perm)
    restored = [mine[np.argsort(assigned)] for mine, assigned in zip(units, found.assignments, strict=True)]
    np.testing.assert_allclose(found.atoms, np.mean(restored, 0), rtol=1e-12)


def test_units_that_nobody_else_has_become_new_ones():
    units = [np.eye(9)[:3], np.eye(9)[3:7], np.eye(9)[7:]]
    found = match_units(units, sigma=0.1)
    assert found.counts.tolist() == [1] * 9
    np.testing.assert_array_equal(found.atoms, np.eye(9))
    assert [a.tolist() for a in found.assignments] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]


@pytest.mark.parametrize("seed", range(3))
def test_assignments_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    how = {"sigma": 0.8, "sigma_zero": 1.5, "gamma": 2.0}
    base = rng.normal(size=(4, 2))
    draw = lambda noise, *sizes: [base[rng.permutation(4)[:n]] + noise * rng.normal(size=(n, 2)) for n in sizes]
    units = draw(0.4, 3, 2, 2)
    found = match_units(units, iterations=0, **how)
    # The largest client is first, and each given those before it.
    for client in (1, 2):
        earlier = list(zip(units, found.assignments, strict=True))[:client]
        assert_best(units[client], earlier, found.assignments[client], how)
    # Of units that all have nobody has reason to change, and each is the best given all others.
    units = draw(0.1, 4, 4, 4)
    found = match_units(units, iterations=20, **how)
    for client in range(3):
        others = [(units[i], found.assignments[i]) for i in range(3) if i != client]
        assert_best(units[client], others, found.assignments[client], how)


def test_turns_undo_what_the_first_ones_got_wrong():
    # The second client's unit lies between two of the first's, until the others' show which of them it is.
    units = [np.array([[-1.0], [1.4]]), np.array([[0.3]]), *(np.array([[-0.3 - 0.1 * i]]) for i in range(4))]
    how = {"sigma": 1.0, "sigma_zero": 10.0, "gamma": 1e-3}
    assert match_units(units, iterations=0, **how).assignments[1].tolist() == [1]
    assert match_units(units, **how).assignments[1].tolist() == [0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 5), st.floats(0.05, 2), st.integers(0, 99))
def test_every_unit_has_an_atom_and_a_client_has_each_once(widths, room, sigma, seed):
    units = [np.random.default_rng(seed + i).normal(size=(width, 3)) for i, width in enumerate(widths)]
    limit = max(widths) + room
    found = match_units(units, sigma=sigma, limit=limit, seed=seed)
    flat = np.concatenate(found.assignments)
    assert all(len(set(mine)) == len(mine) == width for mine, width in zip(found.assignments, widths, strict=True))
    assert len(found.atoms) == len(found.counts) <= min(limit, sum(widths))
    np.testing.assert_array_equal(np.bincount(flat), found.counts)
    for atom, value in enumerate(found.atoms):
        members = [units[i][a == atom] for i, a in enumerate(found.assignments)]
        np.testing.assert_allclose(value, np.concatenate(members).mean(0), atol=1e-12)
    assert list(dict.fromkeys(flat)) == list(range(len(found.atoms)))


@pytest.mark.parametrize(
    ("units", "how", "message"),
    [
        ([], {}, r"units must be \[J_i, D\]"),
        ([np.ones((2, 3)), np.ones((2, 4))], {}, r"one D for all .* got \[\(2, 3\), \(2, 4\)\]"),
        ([np.ones((2, 3)), np.full((2, 3), np.nan)], {}, "units of client 1 are not finite"),
        ([np.ones((2, 3))], {"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ([np.ones((2, 3))], {"gamma": np.inf}, "gamma must be positive, got inf"),
        ([np.ones((2, 3))], {"iterations": -1}, "iterations must not be negative, got -1"),
        ([np.ones((2, 3))], {"limit": 1}, "limit must be at least 2, .* got 1"),
    ],
)
def test_units_that_do_not_fit_are_refused(units, how, message):
    with pytest.raises(ValueError, match=message):
        match_units(units, **how)


# --- networks ---------------------------------------------------------------------------------------------------------

SEPARABLE = spec.Architecture(
    "separable",
    (6, 6, 2),
    (
        spec.Conv("stem", 5, norm="batch"),
        spec.Conv("depthwise", 5, groups=spec.DEPTHWISE),
        spec.Conv("pointwise", 4, (1, 1), norm="layer"),
        spec.GlobalPool("mean"),
        spec.Dense("head", CLASSES),
    ),
)
PROJECTED = spec.Architecture(
    "projected",
    (6, 6, 2),
    (
        spec.Conv("stem", 3),
        spec.Residual("block", (spec.Conv("conv1", 4), spec.Conv("conv2", 5)), spec.Conv("short", 5, (1, 1))),
        spec.GlobalPool("mean"),
        spec.Dense("head", CLASSES),
    ),
)
NETWORKS = {
    "mlp": models.mlp((6, 5), input_shape=(3,), num_classes=CLASSES),
    "cnn": models.cnn((4, 5), pools=2, input_shape=(8, 8, 2), hidden=(6,), num_classes=CLASSES),
    "separable": SEPARABLE,
    "projected": PROJECTED,
}


def task_of(module):
    return federated.classification(training.from_linen(module).apply, CLASSES, preprocess=lambda x: x)


def population(architecture, sizes, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(sum(sizes), *architecture.input_shape)).astype(np.float32)
    arrays = {"image": images, "label": rng.integers(0, CLASSES, sum(sizes))}
    return federated.clients_of(arrays, np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))


def started(architecture, seed):
    """Variables of which no two units are alike, and no variance is negative."""
    module = models.Network(architecture)
    variables = training.from_linen(module).init(KEY, jnp.zeros((1, *architecture.input_shape)))
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return jax.tree.map(lambda leaf: jnp.abs(leaf) / 2 + jax.random.normal(next(keys), leaf.shape) ** 2, variables)


def stacked(*variables):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)


def outputs(architecture, variables):
    x = jax.random.normal(jax.random.key(5), (3, *architecture.input_shape))
    return np.asarray(jax.jit(models.Network(architecture).apply)(variables, x))


def merged(architecture, clients, start, **how):
    """The pass alone, of networks that have been trained."""
    how = {"epochs": 0, "batch_size": 4, "key": KEY, "start": start, **how}
    return fed_ma(architecture, task_of, optax.sgd(0.1), clients, **how)


@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_copies_are_one_network_again(name):
    architecture = NETWORKS[name]
    variables, module = started(architecture, 1), models.Network(architecture)
    found = federated.derive(module.apply, variables, jnp.zeros((2, *architecture.input_shape)))
    copies = [federated.permute(found, variables, federated.random_perms(found, jax.random.key(i))) for i in (2, 3)]
    # Whoever has no examples takes no part, whatever it holds.
    nobody = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), variables)
    result = merged(architecture, population(architecture, (2, 0, 3)), stacked(copies[0], nobody, copies[1]))
    assert result.architecture == architecture
    # Units are in the order of the first client's.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result.variables, copies[0])
    expected = outputs(architecture, variables)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs(architecture, result.variables), expected, atol=1e-5 * scale)
    for layer, assigned in result.assignments.items():
        assert (assigned[1] == -1).all() and (np.sort(assigned[2]) == np.arange(assigned.shape[1])).all(), layer
    assert all((traffic.down[1], traffic.up[1]) == (0, 0) for traffic in result.traffic)


@pytest.mark.parametrize(("name", "passes"), [("mlp", 2), ("cnn", 1), ("projected", 1)])
def test_where_nothing_is_alike_each_class_is_answered_by_who_has_it(name, passes):
    architecture = NETWORKS[name]
    apart = [started(architecture, seed) for seed in (1, 2)]
    counts = [[3, 0, 2, 0], [0, 4, 0, 1]]
    how = {"sigma": 0.01, "class_counts": counts, "passes": passes}
    result = merged(architecture, population(architecture, (5, 5)), stacked(*apart), **how)
    hidden = {path: layer.features for path, layer in spec.walk(architecture) if hasattr(layer, "features")}
    hidden.pop("head")
    assert result.sizes[-1] == {path: 2 * width for path, width in hidden.items()}
    grown = dict(spec.walk(result.architecture))
    assert {path: grown[path].features for path in hidden} == result.sizes[-1]
    # All units of both are there, and each reads its own alone.
    expected = np.where(np.array(counts[0]) > 0, *(outputs(architecture, variables) for variables in apart))
    np.testing.assert_allclose(outputs(result.architecture, result.variables), expected, rtol=1e-4)
    assert len(result.traffic) == passes * (len(set(map(str, result.assignments.values()))) + 1)


def test_growth_is_limited():
    architecture = NETWORKS["mlp"]
    start = stacked(*(started(architecture, seed) for seed in (1, 2, 3)))
    clients = population(architecture, (1, 1, 1))
    result = merged(architecture, clients, start, sigma=0.01, growth=1.5)
    assert result.sizes[-1] == {"dense1": 9, "dense2": 8}
    assert result.sizes[0] == {"dense1": 9, "dense2": 5}
    assert merged(architecture, clients, start, sigma=0.01, growth=1).architecture == architecture


def test_the_last_layer_is_averaged_by_class():
    architecture = spec.Architecture("linear", (3,), (spec.Dense("head", CLASSES),))
    start = stacked(*(started(architecture, seed) for seed in (1, 2, 3)))
    sizes, counts = (5, 3, 2), np.array([[5, 0, 0, 0], [1, 2, 0, 0], [1, 1, 0, 7]])
    clients = population(architecture, sizes)
    by_size = np.array(sizes) / 10
    # Of the third class nobody has any.
    by_class = np.stack([counts[:, 0] / 7, counts[:, 1] / 3, by_size, counts[:, 3] / 7])
    for weights, how in ((by_class, {"class_counts": counts}), (np.stack([by_size] * 4), {})):
        layer = merged(architecture, clients, start, **how).variables["params"]["head"]["layer"]
        own = start["params"]["head"]["layer"]
        np.testing.assert_allclose(layer["kernel"], np.einsum("nic,cn->ic", own["kernel"], weights), rtol=1e-6)
        np.testing.assert_allclose(layer["bias"], np.einsum("nc,cn->c", own["bias"], weights), rtol=1e-6)


def test_bytes_are_those_of_the_layer_that_is_matched():
    architecture = NETWORKS["mlp"]  # 3 -> 6 -> 5 -> 4
    start = stacked(*(started(architecture, seed) for seed in (1, 2)))
    result = merged(architecture, population(architecture, (1, 1)), start, sigma=0.01)
    up = [4 * (3 * 6 + 6), 4 * (12 * 5 + 5), 4 * (10 * 4 + 4)]
    # Beside its layer a client is told the places of its units.
    down = [4 * (3 * 12 + 12 + 6), 4 * (12 * 10 + 10 + 5), up[2]]
    assert [traffic.up.tolist() for traffic in result.traffic] == [[n, n] for n in up]
    assert [traffic.down.tolist() for traffic in result.traffic] == [[n, n] for n in down]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # four compilations
def test_layers_that_are_matched_stay_as_they_are():
    architecture = models.mlp((6, 5), input_shape=(3,), num_classes=CLASSES, norm="batch")
    clients = population(architecture, (9, 5))
    how = {"batch_size": 4, "key": KEY, "growth": 1}
    # Weight decay would move what has no gradient, and a step the statistics of norms.
    run = lambda retrain: fed_ma(
        architecture, task_of, optax.adamw(0.05, weight_decay=0.1), clients, epochs=2, retrain_epochs=retrain, **how
    )
    once, more = run(0), run(2)
    for collection in ("params", "batch_stats"):
        layers = [result.variables[collection] for result in (once, more)]
        jax.tree.map(np.testing.assert_array_equal, layers[0]["dense1"], layers[1]["dense1"])
        moved = lambda name, layers=layers: optax.tree.norm(optax.tree.sub(layers[0][name], layers[1][name]))
        assert moved("dense2") > 1e-2
    assert [report is None for report in once.reports] == [False, True, True]
    assert [report is None for report in more.reports] == [False] * 3


@pytest.mark.slow  # four compilations
def test_clients_of_any_size_train_alike_in_every_backend_and_who_diverges_is_said():
    architecture = models.mlp((5,), input_shape=(3,), num_classes=CLASSES)
    clients = population(architecture, (7, 0, 2, 3))
    images = clients.arrays["image"].at[-1].set(jnp.nan)
    clients = clients._replace(arrays={**clients.arrays, "image": images})
    run = lambda backend: fed_ma(
        architecture, task_of, optax.sgd(0.2), clients, key=KEY, batch_size=4, epochs=2, backend=backend
    )
    results = [run("vmap"), run("stream")]
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, *(result.variables for result in results))
    for report in results[0].reports:
        assert report.rejected() == [3]
        assert report.counted.tolist() == [True, False, True, False]
        assert report.steps.tolist() == [4, 0, 2, 2]
    assert (results[0].assignments["dense1"][3] >= 0).all() and (results[0].assignments["dense1"][1] == -1).all()


@pytest.mark.slow  # eight compilations
def test_clients_of_different_classes_learn_all_of_them_together():
    rng = np.random.default_rng(0)
    centres, labels = 1.2 * rng.normal(size=(CLASSES, 8)), rng.integers(0, CLASSES, 1400)
    images = (centres[labels] + rng.normal(size=(1400, 8))).astype(np.float32)
    parts = [np.flatnonzero(labels[:400] // 2 == i) for i in range(2)]
    counts = [np.bincount(labels[part], minlength=CLASSES) for part in parts]
    architecture = models.mlp((16,), input_shape=(8,), num_classes=CLASSES)
    # They begin apart, so that their features are in different places.
    init = training.from_linen(models.Network(architecture)).init
    start = stacked(*(init(jax.random.key(seed), jnp.zeros((1, 8))) for seed in (1, 2)))
    test = {"image": images[400:], "label": labels[400:], "mask": np.ones(1000)}

    def accuracy(parts, start, **how):
        clients = federated.clients_of({"image": images, "label": labels}, parts)
        how = {"key": KEY, "batch_size": 16, "epochs": 5, "start": start, "sigma": 0.3, **how}
        result = fed_ma(architecture, task_of, optax.sgd(0.1), clients, **how)
        sums = task_of(models.Network(result.architecture)).evaluate(result.variables, test)
        return float(sums["accuracy"] / sums["count"]), result

    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], start) for i in range(2))
    alone = [accuracy(parts[:1], first)[0], accuracy(parts[1:], second)[0]]
    together, result = accuracy(parts, start, class_counts=counts, passes=2)
    assert max(alone) < 0.55 and together > 0.75
    assert 16 < result.sizes[-1]["dense1"] <= 32


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            (spec.Conv("stem", 4), spec.Residual("block", (spec.Conv("conv1", 4), spec.Conv("conv2", 4)))),
            "layers block/conv1 read units that stem, block/conv2 share",
        ),
        ((spec.Conv("conv1", 16, norm="group"),), r"layer 'conv1': its 16 units are in groups"),
        ((spec.Conv("conv1", 4), spec.Conv("conv2", 4, groups=2)), r"layer 'conv1': its 4 units are in groups"),
        (
            (spec.Conv("conv1", 4), spec.Reshape("rows", (6, 4, 6)), spec.Conv("conv2", 4)),
            r"layer 'conv1': its units cannot be matched, as their order is one",
        ),
    ],
)
def test_networks_that_cannot_be_matched_are_refused_by_the_name_of_the_layer(layers, message):
    architecture = spec.Architecture("net", (6, 6, 2), (*layers, spec.GlobalPool("mean"), spec.Dense("head", CLASSES)))
    with pytest.raises(ValueError, match=message):
        merged(architecture, population(architecture, (1, 1)), None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"epochs": -1}, "epochs and retrain_epochs must not be negative, got -1 and None"),
        ({"growth": 0.5}, "growth must be at least 1, .* got 0.5"),
        ({"start": {"params": {}}}, r"start must be the variables of all clients, leaves \[2, ...\]"),
        ({"start": "nan"}, "start: client 1 begins with what is not finite"),
        ({"class_counts": np.ones((2, 3))}, r"class_counts must be \[2, C\], .* 4; got \(2, 3\)"),
        ({"class_counts": -np.ones((2, 4))}, "class_counts must be .* not negative"),
        ({"clients": (0, 0)}, "clients: none has any examples"),
        ({"sigma": -1.0, "epochs": 1}, "sigma must be positive, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(how, message):
    architecture = models.mlp((5,), input_shape=(3,), num_classes=CLASSES)
    clients = population(architecture, (1, 1))
    if how.get("start") == "nan":
        variables = started(architecture, 1)
        how = {"start": stacked(variables, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), variables))}
    if "clients" in how:
        how = {}
        clients = clients._replace(sizes=jnp.zeros_like(clients.sizes))
    untrained = lambda module: pytest.fail("a task was made, to be trained")
    with pytest.raises(ValueError, match=message):
        fed_ma(architecture, untrained, optax.sgd(0.1), clients, key=KEY, **{"epochs": 1, "batch_size": 4, **how})
