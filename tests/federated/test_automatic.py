"""Backend "auto": measured once, remembered, never another result."""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import federated
from jaxeff.federated import automatic, backends
from tests.federated.quadratics import SIZES, clients, run, task, variables


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path))
    return tmp_path / "autotune.json"


def federation(**settings):
    return federated.federate(federated.fed_avg(task(), optax.sgd(0.1)), batch_size=1, backend="auto", **settings)


def start(of):
    return of.init(jax.random.key(0), variables(), clients())


def pretended(of, seconds):
    """Rounds of one federation under several names, that take so long."""

    def one(name, wait):
        def run(state, members):
            if not isinstance(state.number, jax.core.Tracer):
                time.sleep(wait)
                if wait > 0.1:
                    raise RuntimeError("out of memory")
            return of.round(state, members)

        return run

    return {name: one(name, wait) for name, wait in seconds.items()}


def test_rounds_are_those_of_any_other_backend(table):
    plain, _, _ = run(federated.fed_avg(task(), optax.sgd(0.1)), 3)
    found, _, _ = run(federated.fed_avg(task(), optax.sgd(0.1)), 3, backend="auto")
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    assert table.exists()


def test_the_fastest_is_taken_and_remembered(table):
    of = federated.federate(federated.fed_avg(task(), optax.sgd(0.1)), batch_size=1)
    state = start(of)
    rounds = pretended(of, {"slow": 0.03, "quick": 0.0, "middling": 0.02})
    assert automatic.fastest(rounds, state, clients(), 1) == "quick"
    # Now the table answers, whatever they take.
    rounds = pretended(of, {"slow": 0.0, "quick": 0.03, "middling": 0.02})
    assert automatic.fastest(rounds, state, clients(), 1) == "quick"
    assert float(state.server["params"]["w"]) == np.float32(variables()["params"]["w"])


def test_the_first_one_stays_where_little_is_to_be_gained():
    of = federated.federate(federated.fed_avg(task(), optax.sgd(0.1)), batch_size=1)
    rounds = pretended(of, {"first": 0.0305, "other": 0.03})
    assert automatic.fastest(rounds, start(of), clients(), 1) == "first"


def test_a_backend_that_fails_is_left_out():
    of = federated.federate(federated.fed_avg(task(), optax.sgd(0.1)), batch_size=1)
    rounds = pretended(of, {"first": 0.01, "broken": 0.11})
    with pytest.warns(UserWarning, match="'broken' is left out"):
        assert automatic.fastest(rounds, start(of), clients(), 1) == "first"


def test_nothing_is_measured_under_jit():
    of = federation()
    with pytest.raises(ValueError, match="call federation.tune"):
        jax.jit(lambda members: of.round(start(of), members))(clients())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of.tune(start(of), clients()) in automatic.candidates()
    state, _ = jax.jit(of.round)(start(of), clients())
    assert int(state.number) == 1


def test_clients_are_shortened_in_proportion():
    members = clients()._replace(sizes=jnp.array([100, 40, 0, 20]))
    np.testing.assert_array_equal(automatic._shortened(members, 5).sizes, [25, 10, 0, 5])
    np.testing.assert_array_equal(automatic._shortened(clients(), 5).sizes, SIZES)


def test_waste_of_padding():
    steps = [4, 1, 3, 2]
    assert backends.padding_waste(steps, "stream") == 0
    np.testing.assert_allclose(backends.padding_waste(steps, "vmap"), 1 - 10 / 16)
    np.testing.assert_allclose(backends.padding_waste(steps, "chunk", 2), 1 - 10 / 12)
    assert backends.padding_waste([0, 0], "vmap") == 0


def test_another_word_for_shard():
    plain, _, _ = run(federated.fed_avg(task(), optax.sgd(0.1)), 2)
    np.testing.assert_allclose(run(federated.fed_avg(task(), optax.sgd(0.1)), 2, backend="pmap")[0], plain, rtol=1e-6)
