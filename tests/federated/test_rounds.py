"""Rounds: every backend gives the same, whoever takes part, however much the clients hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import federated, models, training
from jaxeff.federated import aggregates, robust
from jaxeff.federated.backends import BACKENDS
from jaxeff.federated.participation import planned
from tests.federated.quadratics import CENTRE, CURVATURE, SIZES, START, clients, run, task, variables

CLASSES = 3


@pytest.fixture(scope="module")
def network():
    architecture = models.mlp((6,), input_shape=(4,), num_classes=CLASSES, norm="batch")
    functions = training.from_linen(models.Network(architecture))
    return functions, functions.init(jax.random.key(0), jnp.zeros((1, 4)))


def population(sizes, seed=0):
    rng = np.random.default_rng(seed)
    count = max(1, sum(sizes))
    arrays = {"image": rng.normal(size=(count, 4)).astype(np.float32), "label": rng.integers(0, CLASSES, count)}
    return federated.clients_of(arrays, np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))


def after(network, algorithm, members, rounds=2, **settings_):
    functions, start = network
    federation = federated.federate(algorithm, batch_size=4, **settings_)
    state = federation.init(jax.random.key(7), start, members)
    for _ in range(rounds):
        state, report = federation.round(state, members)
    return state, report


def of_task(network, name):
    made = federated.classification(network[0].apply, CLASSES)
    return {
        "fed_avg": lambda: federated.fed_avg(made, optax.sgd(0.1, momentum=0.9)),
        "scaffold": lambda: federated.scaffold(made, 0.1),
        "median": lambda: federated.fed_avg(made, optax.sgd(0.1), aggregate=aggregates.robust(robust.median, least=1)),
    }[name]()


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module")
def federations(network):
    """Compiled once for all sizes: these are data."""
    how = federated.Participation(0.8, stragglers=0.3, dropout=0.2)
    common = {"batch_size": 4, "epochs": [1, 2, 0, 2, 1], "participation": how, "chunk": 2}
    return {
        (name, backend): federated.federate(of_task(network, name), backend=backend, **common)
        for name in ("fed_avg", "scaffold", "median")
        for backend in BACKENDS
    }


@pytest.mark.parametrize("name", ["fed_avg", "scaffold", "median"])
@settings(max_examples=5, deadline=None)
@given(sizes=st.lists(st.integers(0, 11), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_backends_agree(network, federations, name, sizes, seed):
    whole = population([11] * 5)
    members = whole._replace(sizes=jnp.array(sizes, jnp.int32))
    found = {}
    for backend in BACKENDS:
        federation = federations[name, backend]
        state = federation.init(jax.random.key(seed), network[1], members)
        for _ in range(2):
            state, report = federation.round(state, members)
        found[backend] = state._replace(key=0), report
    expected, expected_report = found["loop"]
    for state, report in found.values():
        assert_close(state, expected, rtol=2e-4, atol=2e-5)
        for field in ("client", "steps", "counted"):
            np.testing.assert_array_equal(getattr(report, field), getattr(expected_report, field))


def test_a_client_is_the_same_whoever_else_takes_part(network):
    """Random numbers belong to a client and a round."""
    functions, start = network
    algorithm = of_task(network, "fed_avg")
    members = population([9, 6, 11])
    alone = federated.Clients(members.arrays, members.rows, jnp.array([9, 0, 0]), {})
    lost, _ = after(network, algorithm, alone, rounds=1)
    all_, _ = after(network, algorithm._replace(aggregate=aggregates.paired(None, np.eye(3, 1), "uniform")), alone, 1)
    assert_close(lost.server, all_.server, rtol=1e-6)


def test_a_round_gives_up_its_state_and_nothing_of_the_caller():
    key, start = jax.random.key(0), variables()
    federation = federated.federate(federated.fed_avg(task(), optax.sgd(0.1)), batch_size=1)
    federation.round(federation.init(key, start, clients()), clients())
    assert jax.random.bits(key) is not None and float(start["params"]["w"]) == np.float32(START)


def test_sizes_and_shares_are_those_of_loops():
    """Two epochs in batches of one; absent clients do nothing."""
    _, _, report = run(federated.fed_avg(task(), optax.sgd(0.1)), 1, epochs=2)
    np.testing.assert_array_equal(report.steps, 2 * SIZES)
    assert float(report.metrics["counted"]) == 4
    _, _, report = run(federated.fed_avg(task(), optax.sgd(0.1)), 1, epochs=[1, 0, 3, 1])
    np.testing.assert_array_equal(report.steps, SIZES * [1, 0, 3, 1])
    np.testing.assert_array_equal(report.counted, [True, False, True, True])


def test_every_example_is_seen_once_an_epoch_and_in_another_order_each_time():
    seen = []

    def loss(given, batch, key):
        jax.debug.callback(lambda b, m: seen.append(b[m > 0].tolist()), batch["b"], batch["mask"])
        return (given["params"]["w"] * batch["mask"]).sum(), ({}, {})

    arrays = {"b": np.arange(23, dtype=np.float32)}
    members = federated.clients_of(arrays, [np.arange(3, 20)])
    federation = federated.federate(
        federated.fed_avg(federated.Task(loss, None), optax.sgd(0.1)), batch_size=5, epochs=2
    )
    state = federation.init(jax.random.key(0), variables(), members)
    jax.block_until_ready(federation.round(state, members))
    jax.effects_barrier()
    assert [len(batch) for batch in seen] == [5, 5, 5, 2, 5, 5, 5, 2]
    epochs = [sum(seen[:4], []), sum(seen[4:], [])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(3, 20))
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_sampled_clients_change_and_unsampled_ones_keep_what_they_remember():
    how = federated.Participation(fraction=0.5)
    asked = []
    federation = federated.federate(federated.scaffold(task(), 0.1), batch_size=1, participation=how)
    state = federation.init(jax.random.key(1), variables(), clients())
    before = np.zeros(4)
    for _ in range(8):
        state, report = federation.round(state, clients())
        now, number = np.asarray(state.own["w"]), np.asarray(report.client)
        assert len(number) == 2 and (np.diff(number) > 0).all()
        rest = np.setdiff1d(np.arange(4), number)
        np.testing.assert_array_equal(now[rest], before[rest])
        before = now
        asked.append(tuple(number))
    assert set(np.concatenate(asked)) == {0, 1, 2, 3} and len(set(asked)) > 2


def test_nobody_reports_and_nothing_changes():
    how = federated.Participation(available=[0.0, 0.0, 0.0, 1e-6])
    w, state, report = run(federated.fed_opt(task(), optax.sgd(0.1), optax.adam(0.1)), 1, participation=how)
    assert w == pytest.approx(START) and int(state.number) == 1 and float(report.metrics["counted"]) == 0
    assert not np.asarray(report.steps).any()


def test_dropouts_train_and_are_lost_and_late_ones_are_dropped_or_do_a_part():
    plain = federated.fed_avg(task(), optax.sgd(0.1))
    counts = {}
    for name, how in {
        "dropout": federated.Participation(dropout=0.5),
        "late": federated.Participation(stragglers=0.5, late="drop"),
    }.items():
        federation = federated.federate(plain, batch_size=1, participation=how)
        state, counts[name] = federation.init(jax.random.key(0), variables(), clients()), 0
        for _ in range(25):
            state, report = federation.round(state, clients())
            np.testing.assert_array_equal(report.steps, SIZES)
            counts[name] += int(report.metrics["counted"])
    # Of 100; four standard deviations are 20.
    assert all(30 <= count <= 70 for count in counts.values()), counts
    how = federated.Participation(stragglers=0.999, late="partial")
    _, _, part = run(plain, 1, epochs=6, participation=how)
    assert (np.asarray(part.steps) < 6 * SIZES).any() and (np.asarray(part.steps) > 0).all()
    assert np.asarray(part.counted).all()


def test_stale_updates_are_those_of_old_models_and_count_less():
    how = federated.Participation(stragglers=0.5, late="stale", staleness=3, decay=0.5)
    algorithm = federated.fed_avg(task(), optax.sgd(0.1))
    federation = federated.federate(algorithm, batch_size=1, participation=how)
    state = federation.init(jax.random.key(3), variables(), clients())
    models_, w, old = [START], START, 0
    for number in range(6):
        plan = planned(how, jax.random.fold_in(jax.random.key(3), number), jnp.int32(number), 4)
        age = np.asarray(plan.age)
        assert (age <= min(number, 3)).all()
        old += (age > 0).sum()
        weight = SIZES * (1.0 + age) ** -0.5
        found = []
        for i in range(4):
            base = models_[number - age[i]]
            local = CENTRE[i] + (1 - 0.1 * CURVATURE[i]) ** SIZES[i] * (base - CENTRE[i])
            found.append(w + local - base)
        w = (weight * found).sum() / weight.sum()
        models_.append(w)
        state, _ = federation.round(state, clients())
        assert float(state.server["params"]["w"]) == pytest.approx(w, rel=1e-5)
    assert old > 3


@pytest.mark.parametrize("backend", ["stream", "vmap"])
def test_a_client_that_sends_nan_is_named_and_left_out(backend):
    arrays = dict(clients().arrays)
    arrays["b"] = arrays["b"].at[2].set(jnp.nan)  # of client 1
    members = clients()._replace(arrays=arrays)
    algorithm = federated.scaffold(task(), 0.1)
    federation = federated.federate(algorithm, batch_size=1, backend=backend)
    state = federation.init(jax.random.key(0), variables(), members)
    state, report = federation.round(state, members)
    assert report.rejected() == [1] and float(report.metrics["counted"]) == 3
    assert np.isfinite(state.server.variables["params"]["w"]) and np.isfinite(np.asarray(state.own["w"])).all()
    assert float(state.own["w"][1]) == 0


def test_a_group_that_nobody_owns_stays_as_it_was():
    algorithm = federated.fed_avg(task(), optax.sgd(0.1))
    omega = np.array([[1, 0, 0]] * 4, np.float32)

    def loss(given, batch, key):
        values = batch["a"] / 2 * ((given["params"]["w"] - batch["b"][:, None]) ** 2).sum(-1)
        return (values * batch["mask"]).sum(), ({}, {})

    algorithm = federated.fed_avg(
        federated.Task(loss, None), optax.sgd(0.1), aggregate=aggregates.paired(0, omega, "uniform")
    )
    start = {"params": {"w": jnp.array([0.7, 0.8, 0.9])}}
    for backend in ("stream", "map"):
        federation = federated.federate(algorithm, batch_size=1, backend=backend)
        state, _ = federation.round(federation.init(jax.random.key(0), start, clients()), clients())
        w = np.asarray(state.server["params"]["w"])
        assert abs(w[0] - 0.7) > 0.01
        np.testing.assert_array_equal(w[1:], np.float32([0.8, 0.9]))


def test_krum_with_too_many_byzantine_clients_is_refused():
    rule = lambda stacked, counted: robust.krum(stacked, counted, 2)
    algorithm = federated.fed_avg(task(), optax.sgd(0.1), aggregate=aggregates.robust(rule, least=1))
    with pytest.raises(ValueError, match="2 byzantine clients need at least 2 \\* 2 \\+ 3 counted ones"):
        run(algorithm, 1)


def test_one_compilation_for_all_rounds(network):
    count = []

    def counted(given, batch, key):
        count.append(1)
        return federated.classification(network[0].apply, CLASSES).loss(given, batch, key)

    algorithm = federated.fed_avg(federated.Task(counted, None), optax.sgd(0.1))
    after(network, algorithm, population([3, 9, 5]), rounds=1)
    once = len(count)
    count.clear()
    after(network, algorithm, population([3, 9, 5]), rounds=4)
    assert len(count) == once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "pmap2"}, "backend must be one of 'loop'"),
        ({"epochs": 0}, "epochs must be"),
        ({"participation": federated.Participation(fraction=0.0)}, "someone has to take part, got 0.0"),
        ({"participation": federated.Participation(dropout=1.0)}, "dropout must be in"),
        ({"participation": federated.Participation(late="never")}, "late must be one of 'partial'"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        federated.federate(federated.fed_avg(task(), optax.sgd(0.1)), **{"batch_size": 1, **change})


def test_settings_that_do_not_fit_the_clients():
    with pytest.raises(ValueError, match="epochs must be one for each of the 4 clients, got 2"):
        run(federated.fed_avg(task(), optax.sgd(0.1)), 1, epochs=[1, 2])
    with pytest.raises(ValueError, match="one for each of the 4 clients"):
        run(federated.fed_avg(task(), optax.sgd(0.1)), 1, participation=federated.Participation(available=[0.5]))
    with pytest.raises(ValueError, match="variables must have 'params'"):
        federation = federated.federate(federated.fed_avg(task(), optax.sgd(0.1)), batch_size=1)
        federation.init(jax.random.key(0), {"w": 1.0}, clients())
    with pytest.raises(ValueError, match="client 1 must hold numbers of examples in 0..4"):
        federated.clients_of({"a": np.zeros(5)}, [[0], [5]])
    with pytest.raises(ValueError, match="own must have names that batches do not have already, got mask"):
        federated.clients_of({"a": np.zeros(5)}, [[0]], {"mask": np.zeros(1)})


@pytest.mark.parametrize("backend", ["stream", "vmap", "map"])
def test_a_client_reads_nothing_of_another(network, backend):
    """Batches are filled up by the client's own examples: neither NaN of others nor batch norm tells of them."""
    members = population([3, 5, 4, 7])
    algorithm = of_task(network, "fed_avg")
    clean, _ = after(network, algorithm, members, rounds=1, backend=backend, epochs=[0, 1, 1, 1])
    image = members.arrays["image"].at[0].set(jnp.nan)
    dirty = members._replace(arrays={**members.arrays, "image": image})
    state, report = after(network, algorithm, dirty, rounds=1, backend=backend, epochs=[0, 1, 1, 1])
    assert_close(state.server, clean.server, rtol=1e-6)
    _, report = after(network, algorithm, dirty, rounds=1, backend=backend)
    assert report.rejected() == [0]


def test_padding_is_the_same_however_long_the_rows_are(network):
    members = population([6, 3])
    alone = members._replace(rows=members.rows[:, :6], sizes=jnp.array([0, 3], jnp.int32))
    longer = members._replace(rows=jnp.pad(members.rows, ((0, 0), (0, 9)), mode="edge"), sizes=alone.sizes)
    algorithm = of_task(network, "fed_avg")
    a, b = (after(network, algorithm, some, rounds=1)[0] for some in (alone, longer))
    for x, y in zip(jax.tree.leaves(a.server["batch_stats"]), jax.tree.leaves(b.server["batch_stats"]), strict=True):
        assert np.isfinite(x).all() and x.shape == y.shape


def test_numbers_too_large_to_be_summed_are_left_out():
    huge = federated.fed_avg(task(), optax.sgd(0.1))

    def final(state, server, own):
        upload, own = huge.client_final(state, server, own)
        w = upload.variables["params"]["w"]
        return upload._replace(variables={"params": {"w": jnp.where(jnp.abs(w - CENTRE[0]) < 0.25, 1e38, w)}}), own

    value, _, report = run(huge._replace(client_final=final), 1, epochs=30)
    assert np.isfinite(value) and report.rejected() == [0]


def test_what_does_not_fit_the_clients_is_said():
    algorithm = federated.fed_avg(task(), optax.sgd(0.1))
    two = aggregates.paired({"params": {"w": None}}, np.ones((2, 3)))
    with pytest.raises(ValueError, match="weights of 2 clients, but there are 4"):
        run(algorithm._replace(aggregate=two), 1)
    with pytest.raises(ValueError, match="needs 5 clients, but there are 4"):
        run(algorithm._replace(aggregate=aggregates.robust(robust.median, least=5)), 1)
    for epochs in (0.5, [1.0, 1.5, 1.0, 1.0]):
        with pytest.raises(ValueError, match="epochs must be whole numbers"):
            run(algorithm, 1, epochs=epochs)


def test_a_model_that_is_partly_its_clients_own_is_tested_as_theirs(network):
    """FedBN's global model has norms that nobody trained."""
    made = federated.classification(network[0].apply, CLASSES)
    members = population([8, 6])
    state, _ = after(network, federated.fed_bn(made, optax.sgd(0.1)), members, rounds=3)
    algorithm = federated.fed_bn(made, optax.sgd(0.1))
    batch = {**{name: a[:8] for name, a in members.arrays.items()}, "mask": jnp.ones(8)}
    found = federated.tested(algorithm, made, state, batch)
    own = [jax.tree.map(lambda leaf, i=i: leaf[i], state.own) for i in range(2)]
    each = [float(made.evaluate(algorithm.personal(state.server, one), batch)["loss"]) for one in own]
    np.testing.assert_allclose(found["loss"], np.mean(each), rtol=1e-5)
    assert abs(float(made.evaluate(state.server, batch)["loss"]) - np.mean(each)) > 1e-4
