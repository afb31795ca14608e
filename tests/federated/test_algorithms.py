"""Algorithms on parabolas: against their formulas in float64, and their fixed points in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import federated, models, training
from tests.federated.quadratics import CENTRE, CURVATURE, SIZES, START, run, task

RATE = 0.1
STEPS = 2 * SIZES  # two epochs in batches of one
SHARES = SIZES / SIZES.sum()


def descend(w, i, steps, *, rate=RATE, momentum=0.0, extra=lambda w: 0.0):
    speed = 0.0
    for _ in range(steps):
        speed = momentum * speed + CURVATURE[i] * (w - CENTRE[i]) + extra(w)
        w -= rate * speed
    return w


def test_fed_avg_and_its_fixed_point():
    w = START
    for _ in range(3):
        w = sum(p * descend(w, i, STEPS[i]) for i, p in enumerate(SHARES))
    assert run(federated.fed_avg(task(), optax.sgd(RATE)), 3, epochs=2)[0] == pytest.approx(w, rel=1e-5)
    pull = SHARES * (1 - (1 - RATE * CURVATURE) ** STEPS)
    fixed = (pull * CENTRE).sum() / pull.sum()
    assert run(federated.fed_avg(task(), optax.sgd(RATE)), 40, epochs=2)[0] == pytest.approx(fixed, rel=1e-5)


def test_fed_prox():
    w = START
    for _ in range(2):
        w = sum(p * descend(w, i, STEPS[i], extra=lambda v, start=w: 0.7 * (v - start)) for i, p in enumerate(SHARES))
    assert run(federated.fed_prox(task(), optax.sgd(RATE), 0.7), 2, epochs=2)[0] == pytest.approx(w, rel=1e-5)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_servers(kind):
    w, first, second = START, 0.0, 1e-3**2
    for _ in range(3):
        gradient = w - sum(p * descend(w, i, STEPS[i]) for i, p in enumerate(SHARES))
        first, square = 0.9 * first + 0.1 * gradient, gradient**2
        if kind == "adam":
            second = 0.99 * second + 0.01 * square
        elif kind == "yogi":
            second -= 0.01 * square * np.sign(second - square)
        else:
            second += square
        w -= 0.05 * first / (np.sqrt(second) + 1e-3)
    algorithm = federated.fed_opt(task(), optax.sgd(RATE), federated.adaptive(kind, 0.05))
    assert run(algorithm, 3, epochs=2)[0] == pytest.approx(w, rel=1e-4)


def test_momentum_on_the_server():
    w, speed = START, 0.0
    for _ in range(3):
        speed = 0.9 * speed + w - sum(p * descend(w, i, STEPS[i]) for i, p in enumerate(SHARES))
        w -= speed
    algorithm = federated.fed_opt(task(), optax.sgd(RATE), optax.sgd(1.0, momentum=0.9))
    assert run(algorithm, 3, epochs=2)[0] == pytest.approx(w, rel=1e-5)


def test_scaffold_and_its_fixed_point_which_is_the_minimum_of_all():
    w, control, own = START, 0.0, np.zeros(4)
    for _ in range(3):
        found, before = [], own.copy()
        for i in range(4):
            found.append(descend(w, i, STEPS[i], extra=lambda v, pull=control - before[i]: pull))
            own[i] = before[i] - control + (w - found[-1]) / (STEPS[i] * RATE)
        control += (own - before).mean()
        w = np.mean(found)
    assert run(federated.scaffold(task(), RATE), 3, epochs=2)[0] == pytest.approx(w, rel=1e-5)
    best = (CURVATURE * CENTRE).sum() / CURVATURE.sum()
    assert run(federated.scaffold(task(), RATE), 60, epochs=2)[0] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fed_nova(momentum):
    w = START
    worth = (STEPS - momentum * (1 - momentum**STEPS) / (1 - momentum)) / (1 - momentum)
    for _ in range(3):
        moves = [(w - descend(w, i, STEPS[i], momentum=momentum)) / worth[i] for i in range(4)]
        w -= (SHARES * worth).sum() * (SHARES * moves).sum()
    assert run(federated.fed_nova(task(), RATE, momentum=momentum), 3, epochs=2)[0] == pytest.approx(w, rel=1e-5)


def test_fixed_point_of_fed_nova():
    pull = SHARES * (1 - (1 - RATE * CURVATURE) ** STEPS) / STEPS
    fixed = (pull * CENTRE).sum() / pull.sum()
    assert run(federated.fed_nova(task(), RATE), 60, epochs=2)[0] == pytest.approx(fixed, rel=1e-5)


def test_scaffold_remembers_only_what_is_counted():
    how = federated.Participation(fraction=0.5, dropout=0.5)
    _, state, _ = run(federated.scaffold(task(), RATE), 6, epochs=2, participation=how)
    # The server's control variate is the mean of the clients', whoever was lost.
    assert float(state.server.control["w"]) == pytest.approx(float(state.own["w"].mean()), abs=1e-5)


@pytest.fixture(scope="module")
def network():
    network = models.Network(models.mlp((4,), input_shape=(3,), num_classes=2, norm="batch"))
    return training.from_linen(network)


def images(count=12):
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(count, 3)).astype(np.float32), "label": rng.integers(0, 2, count)}


def test_moon_by_finite_differences_of_its_contrast(network):
    task = federated.classification(
        network.apply, 2, features=lambda variables, x: x @ variables["params"]["dense1"]["layer"]["kernel"]
    )
    batch = {**images(), "mask": np.ones(12, np.float32)}
    variables = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    own = network.init(jax.random.key(1), jnp.zeros((1, 3)))
    rate, mu = 0.5, 2.0
    steps = {}
    for name, algorithm in {
        "moon": federated.moon(task, optax.sgd(rate), mu),
        "plain": federated.fed_avg(task, optax.sgd(rate)),
    }.items():
        local = algorithm.client_init(variables, own)
        # One step earlier the local model is the global one, whose contrast has no gradient of its own cosine.
        local = local._replace(variables={**local.variables, "params": own["params"]})
        after, _ = algorithm.client_step(local, batch, jax.random.key(2))
        steps[name] = np.asarray(after.variables["params"]["dense1"]["layer"]["kernel"], np.float64)
    found = (steps["plain"] - steps["moon"]) / rate

    x = batch["image"].astype(np.float64)
    kernels = [np.asarray(v["params"]["dense1"]["layer"]["kernel"], np.float64) for v in (variables, own)]

    def contrast(kernel):
        here, near, far = x @ kernel, x @ kernels[0], x @ kernels[1]
        cosine = lambda a, b: (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        a, b = np.exp(cosine(here, near) / 0.5), np.exp(cosine(here, far) / 0.5)
        return mu * -np.log(a / (a + b)).mean()

    expected = np.zeros_like(kernels[1])
    for place in np.ndindex(*expected.shape):
        nudge = np.zeros_like(expected)
        nudge[place] = 1e-5
        expected[place] = (contrast(kernels[1] + nudge) - contrast(kernels[1] - nudge)) / 2e-5
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_fed_bn_keeps_norms_with_their_clients_and_averages_the_rest(network):
    task = federated.classification(network.apply, 2)
    clients = federated.clients_of(images(), [np.arange(5), np.arange(5, 12)])
    variables = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    algorithm = federated.fed_bn(task, optax.sgd(0.1))
    federation = federated.federate(algorithm, batch_size=4)
    state = federation.init(jax.random.key(1), variables, clients)
    for _ in range(2):
        state, _ = federation.round(state, clients)
    personal = [algorithm.personal(state.server, jax.tree.map(lambda leaf, i=i: leaf[i], state.own)) for i in (0, 1)]
    scale = lambda v: np.asarray(v["params"]["dense1"]["norm"]["scale"])
    mean = lambda v: np.asarray(v["batch_stats"]["dense1"]["norm"]["mean"])
    kernel = lambda v: np.asarray(v["params"]["dense1"]["layer"]["kernel"])
    for of in (scale, mean):
        assert np.abs(of(personal[0]) - of(personal[1])).max() > 1e-4
        np.testing.assert_array_equal(of(state.server), of(variables))
    np.testing.assert_array_equal(kernel(personal[0]), kernel(personal[1]))
    assert np.abs(kernel(state.server) - kernel(variables)).max() > 1e-4


def test_errors_name_what_is_wrong(network):
    task = federated.classification(network.apply, 2)
    with pytest.raises(ValueError, match="mu must not be negative, got -1"):
        federated.fed_prox(task, optax.sgd(0.1), -1.0)
    with pytest.raises(ValueError, match="give the task features"):
        federated.moon(task, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        federated.fed_nova(task, 0.1, momentum=1.0)
    with pytest.raises(ValueError, match="kind must be one of 'adam'"):
        federated.adaptive("adamw", 0.1)
