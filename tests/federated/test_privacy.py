"""Differential privacy: norms and noise as promised, refused where weights break it, spent as the theory says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special, stats

from jaxeff import federated, models
from jaxeff.federated import aggregates, compression, fed2, privacy
from tests.federated.quadratics import CENTRE, CURVATURE, START, clients, run, task, variables

RATE = 0.1


def uniform():
    return federated.fed_avg(task(), optax.sgd(RATE), aggregate=aggregates.mean("uniform"))


def sizes_of(clip):
    """The clients' updates after one epoch of gradient descent in batches of one, clipped; by hand."""
    steps = np.array([2, 4, 1, 3])
    w = CENTRE + (START - CENTRE) * (1 - RATE * CURVATURE) ** steps
    return np.clip(w - START, -clip, clip)


def drawn(algorithm, times=60):
    """Parameters after one round, with other random numbers each time."""
    federation = federated.federate(algorithm, batch_size=1)
    start = lambda i: federation.init(jax.random.key(i), variables(), clients())
    states = (federation.round(start(i), clients())[0] for i in range(times))
    return np.array([float(algorithm.variables(state.server)["params"]["w"]) for state in states])


@pytest.mark.parametrize("backend", ["stream", "map", "vmap"])
def test_the_server_moves_by_the_sum_of_clipped_updates_over_a_fixed_number(backend):
    private = privacy.central(uniform(), clip=0.2, noise=1e-9, expected=10)
    value, _, _ = run(private, 1, backend=backend)
    np.testing.assert_allclose(value, START + sizes_of(0.2).sum() / 10, rtol=1e-5)


def test_noise_has_the_deviation_that_was_asked_for():
    private = privacy.central(uniform(), clip=0.2, noise=3.0, expected=4)
    exact = START + sizes_of(0.2).sum() / 4
    assert stats.kstest(drawn(private) - exact, "norm", (0, 3.0 * 0.2 / 4)).pvalue > 1e-3


def test_noise_is_added_where_nobody_came_too():
    """Otherwise a round without noise would tell that."""
    private = privacy.central(uniform(), clip=0.2, noise=1.0, expected=1)
    value, _, report = run(private, 1, participation=federated.Participation(available=[1e-9] * 4))
    assert float(report.metrics["counted"]) == 0
    assert value != np.float32(START)


def test_the_norm_follows_the_quantile():
    """Without noise it ends between the second and the third largest of the norms, wherever it starts."""
    norms = np.sort(np.abs(sizes_of(np.inf)))
    for start in (0.01, 50.0):
        found = privacy.central(
            federated.fed_avg(task(), optax.sgd(RATE), aggregate=aggregates.mean("uniform"))._replace(
                server=lambda server, combined, about: server
            ),
            clip=privacy.Quantile(start, quantile=0.5, rate=0.3, noise=0.51),
            noise=1.0,
            expected=4,
        )
        _, state, _ = run(found, 150)
        assert norms[0] / 2 < float(state.server.norm) < norms[3] * 2


def test_groups_are_divided_by_their_own_numbers():
    counts = np.array([[4, 0], [0, 4], [4, 4]])
    architecture = models.mlp((4,), input_shape=(3,), num_classes=2, norm=None)
    module = fed2.GroupedNetwork(fed2.adapt(architecture, "head", groups=2))
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
    made = fed2.aggregate(module.grouped, variables, counts, by="uniform", shared_by="uniform")
    assert made.over is not None
    fixed = made.over(3, np.array([2.0, 5.0]))
    moved = jax.tree.map(lambda leaf: jnp.stack([leaf + 1, leaf + 2, leaf + 4]), variables)
    members = federated.Member(jnp.arange(3), jnp.ones(3), jnp.ones(3), jnp.zeros(3, jnp.int32))
    found = jax.tree.map(lambda a, b: a - b, fixed.combine(moved, members, variables), variables)["params"]
    for leaf in jax.tree.leaves(found["groups"]):
        np.testing.assert_allclose(leaf[0], 5 / 2, rtol=1e-5)
        np.testing.assert_allclose(leaf[1], 6 / 5, rtol=1e-5)
    for leaf in jax.tree.leaves(found["trunk"]):
        np.testing.assert_allclose(leaf, 7 / 3, rtol=1e-5)


def test_clients_that_add_noise_themselves_differ_in_it_and_from_round_to_round():
    noisy = privacy.local(uniform(), clip=0.2, noise=1e-9)
    np.testing.assert_allclose(run(noisy, 1)[0], START + sizes_of(0.2).mean(), rtol=1e-5)
    noisy = privacy.local(uniform(), clip=0.2, noise=2.0)
    exact = START + sizes_of(0.2).mean()
    # The mean of four noises of their own.
    assert stats.kstest(drawn(noisy) - exact, "norm", (0, 2.0 * 0.2 / 2)).pvalue > 1e-3


@pytest.mark.parametrize("backend", ["loop", "chunk", "map"])
def test_noise_is_the_same_in_every_backend(backend):
    for made in (
        privacy.local(uniform(), clip=0.2, noise=1.0),
        privacy.central(uniform(), clip=privacy.Quantile(0.2, noise=3.0), noise=1.0, expected=4),
    ):
        np.testing.assert_allclose(run(made, 2, backend=backend)[0], run(made, 2)[0], rtol=1e-5)


def test_weights_that_break_the_sensitivity_are_refused():
    by_size = federated.fed_avg(task(), optax.sgd(RATE))
    with pytest.raises(ValueError, match="has no bound"):
        privacy.central(by_size, clip=1.0, noise=1.0, expected=4)
    classes = aggregates.paired(None, np.array([[3.0], [5.0]]), "uniform")
    with pytest.raises(ValueError, match="has no bound"):
        privacy.central(by_size._replace(aggregate=classes), clip=1.0, noise=1.0, expected=4)


def test_clients_that_send_more_are_refused():
    sending = federated.scaffold(task(), RATE, aggregate=aggregates.mean("uniform"))
    for made in (
        privacy.central(sending, clip=1.0, noise=1.0, expected=4),
        privacy.local(sending, clip=1.0, noise=1.0),
    ):
        with pytest.raises(ValueError, match="control variates"):
            run(made, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip must be positive"),
        ({"noise": -1.0}, "noise must be positive"),
        ({"expected": 0}, "expected and owners"),
        ({"clip": privacy.Quantile(1.0, quantile=1.0)}, "quantile"),
        ({"clip": privacy.Quantile(1.0, noise=0.5)}, "must be above 0.5"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        privacy.central(uniform(), **{"clip": 1.0, "noise": 1.0, "expected": 4, **settings})


def test_narrow_numbers_that_undo_the_clipping_are_refused():
    half = {"params": {"w": jnp.ones(3, jnp.bfloat16)}}
    loss = lambda v, batch, key: ((v["params"]["w"].sum() * batch["a"]).sum().astype(jnp.float32), ({}, {}))
    made = federated.fed_avg(
        federated.Task(loss, task().evaluate), optax.sgd(RATE), aggregate=aggregates.mean("uniform")
    )
    federation = federated.federate(privacy.central(made, clip=1.0, noise=1.0, expected=4), batch_size=1)
    with pytest.raises(ValueError, match="privacy needs float32 variables, got bfloat16"):
        federation.round(federation.init(jax.random.key(0), half, clients()), clients())


def test_a_norm_that_changes_and_old_models_exclude_each_other():
    private = privacy.central(uniform(), clip=privacy.Quantile(1.0), noise=1.0, expected=4)
    stale = federated.Participation(stragglers=0.5, late="stale")
    with pytest.raises(ValueError, match="late='stale'"):
        run(private, 1, participation=stale)
    run(privacy.central(uniform(), clip=1.0, noise=1.0, expected=4), 2, participation=stale)


def test_what_is_drawn_twice_is_drawn_anew():
    """Noise on top of random rounding, and what the model draws, are of different keys."""
    seen = []
    base = uniform()._replace(
        client_step=lambda state, batch, key: (seen.append(jax.random.key_data(key)) or state, {})
    )
    both = privacy.local(compression.compressed(base, compression.quantised(2)), clip=1.0, noise=1.0)
    start = (jax.tree.map(jnp.zeros_like, variables()), ((), jax.tree.map(jnp.zeros_like, variables())))
    state, _ = both.client_step(both.client_init(*start), {}, jax.random.key(5))
    key = jax.random.wrap_key_data(seen[0])
    drawn = [state.bits, state.inner.bits, seen[0], *(jax.random.key_data(k) for k in jax.random.split(key, 3))]
    assert len({tuple(np.asarray(bits).tolist()) for bits in drawn}) == len(drawn)


# --- what is spent ----------------------------------------------------------------------------------------------------


def gaussian_epsilon(noise, delta):
    """Of the Gaussian mechanism, exact (Balle and Wang, ICML 2018)."""
    tail = stats.norm.cdf
    gap = lambda e: tail(0.5 / noise - e * noise) - np.exp(e) * tail(-0.5 / noise - e * noise) - delta
    return optimize.brentq(gap, 0, 100)


def sampled_epsilon(noise, probability, rounds, delta):
    """Of the Poisson-sampled Gaussian mechanism, by Renyi divergences of whole orders in closed form."""
    best = np.inf
    for order in range(2, 200):
        k = np.arange(order + 1)
        logs = np.log(special.comb(order, k)) + (order - k) * np.log1p(-probability) + k * np.log(probability)
        rdp = rounds * special.logsumexp(logs + k * (k - 1) / (2 * noise**2)) / (order - 1)
        best = min(best, rdp - (np.log(delta) + np.log(order)) / (order - 1) + np.log1p(-1 / order))
    return best


def test_epsilon_of_everyone_is_that_of_gaussian_noise():
    pytest.importorskip("dp_accounting")
    spent = privacy.epsilon(4.0, rounds=9, delta=1e-5, clients=100, accountant="pld")
    np.testing.assert_allclose(spent, gaussian_epsilon(4.0 / 3, 1e-5), rtol=1e-2)
    assert privacy.epsilon(4.0, rounds=9, delta=1e-5, clients=100) >= spent * 0.999
    spent = privacy.local_epsilon(4.0, rounds=1, delta=1e-5, accountant="pld")
    np.testing.assert_allclose(spent, gaussian_epsilon(2.0, 1e-5), rtol=1e-2)


def test_epsilon_of_a_poisson_sample():
    pytest.importorskip("dp_accounting")
    how = federated.Participation(available=0.05)
    spent = privacy.epsilon(1.1, rounds=50, delta=1e-5, clients=1000, participation=how)
    expected = sampled_epsilon(1.1, 0.05, 50, 1e-5)
    assert 0.95 * expected <= spent <= expected * (1 + 1e-6)


def test_a_sample_of_fixed_size_costs_more_as_neighbours_replace():
    pytest.importorskip("dp_accounting")
    fixed, poisson = federated.Participation(fraction=0.05), federated.Participation(available=0.05)
    spent = [privacy.epsilon(2.0, rounds=50, delta=1e-5, clients=1000, participation=how) for how in (poisson, fixed)]
    assert spent[0] < spent[1] < 10 * spent[0]


def test_noise_for_an_epsilon_spends_it():
    pytest.importorskip("dp_accounting")
    settings = {"rounds": 20, "delta": 1e-5, "clients": 100, "participation": federated.Participation(available=0.2)}
    noise = privacy.noise_for(3.0, **settings)
    np.testing.assert_allclose(privacy.epsilon(noise, **settings), 3.0, rtol=1e-3)


def test_participation_that_nothing_is_known_of_is_refused():
    pytest.importorskip("dp_accounting")
    for how in (federated.Participation(0.5, available=0.5), federated.Participation(available=[0.5] * 10)):
        with pytest.raises(ValueError, match="nothing is known"):
            privacy.epsilon(1.0, rounds=1, delta=1e-5, clients=10, participation=how)
    with pytest.raises(ValueError, match="no samples of fixed size"):
        privacy.epsilon(
            1.0, rounds=1, delta=1e-5, clients=10, participation=federated.Participation(0.5), accountant="pld"
        )
    with pytest.raises(ValueError, match="rounds must be"):
        privacy.epsilon(1.0, rounds=0, delta=1e-5, clients=10)
