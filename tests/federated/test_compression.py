"""Compressed updates: without bias, of the bytes that are counted, and what is lost comes later."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import federated, trees
from jaxeff.federated import compression, privacy
from jaxeff.federated.compression import compressed, quantised, top_k
from tests.federated.quadratics import run, task

KEY = jax.random.key(0)


def through(codec, leaf, key=KEY):
    return np.asarray(codec.decode(codec.encode(key, jnp.asarray(leaf, jnp.float32)), np.shape(leaf)))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5)])
def test_quantised_numbers_are_neighbouring_steps(bits, shape):
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    step = np.abs(leaf).max() / (2 ** (bits - 1) - 1)
    got = through(quantised(bits), leaf)
    assert (np.abs(got - leaf) <= step * (1 + 1e-5)).all()
    np.testing.assert_allclose(got / step, np.round(got / step), atol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_has_no_bias(bits):
    leaf = np.linspace(-1, 1, 13).astype(np.float32)
    got = jax.vmap(lambda k: quantised(bits).decode(quantised(bits).encode(k, jnp.asarray(leaf)), leaf.shape))(
        jax.random.split(KEY, 4000)
    )
    step = 1 / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(got.mean(0), leaf, atol=4 * step / np.sqrt(4000))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 7, 40]), st.sampled_from([0.01, 0.3, 0.5, 1.0]), st.integers(0, 99))
def test_the_largest_numbers_are_kept(size, share, seed):
    leaf = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    kept = min(size, max(1, int(np.ceil(share * size))))
    expected = np.where(np.argsort(np.argsort(-np.abs(leaf))) < kept, leaf, 0)
    np.testing.assert_array_equal(through(top_k(share), leaf), expected)


def test_messages_have_the_bytes_that_travel():
    leaf = jax.ShapeDtypeStruct((10, 10), jnp.float32)
    message = lambda codec: trees.nbytes(jax.eval_shape(codec.encode, KEY, leaf))
    assert message(quantised(8)) == 4 + 100
    assert message(quantised(4)) == 4 + 50
    assert message(quantised(2)) == 4 + 25
    assert message(top_k(0.1)) == 10 * (4 + 4)
    assert message(top_k(0.1, quantised(8))) == 10 * (4 + 1) + 4


def test_traffic_counts_what_is_sent():
    batch = {"a": jnp.zeros(1), "mask": jnp.ones(1)}
    start = {"params": {"w": jnp.zeros((100,))}}
    task_ = federated.Task(lambda v, b, k: ((v["params"]["w"] * b["a"]).sum(), ({}, {})), task().evaluate)
    plain = federated.fed_avg(task_, optax.sgd(0.1))
    found = federated.traffic(compressed(plain, quantised(8)), start, batch, 3)
    np.testing.assert_array_equal(found.up, [104] * 3)
    np.testing.assert_array_equal(found.down, [400] * 3)


@pytest.mark.parametrize("codec", [quantised(8), top_k(0.5), top_k(0.5, quantised(16))])
def test_what_is_not_finite_stays_so(codec):
    """So that the client is left out by name, and nothing of it averaged."""
    for bad in (np.nan, np.inf):
        assert not np.isfinite(through(codec, [1.0, bad, 2.0])).all()


def test_what_was_lost_comes_with_the_next_update():
    """The sum of what arrived is the sum of what was to be sent, but for what is still remembered."""
    rng = np.random.default_rng(1)
    updates = rng.normal(size=(12, 9)).astype(np.float32)

    def loss(v, batch, key):  # its gradient is minus the update of the round
        return -(v["params"]["w"] * batch["u"][0]).sum(), ({}, {})

    made = compressed(federated.fed_avg(federated.Task(loss, task().evaluate), optax.sgd(1.0)), top_k(0.2))
    federation = federated.federate(made, batch_size=1)
    members = lambda update: federated.clients_of({"u": update[None]}, [np.array([0])])
    state = federation.init(KEY, {"params": {"w": jnp.zeros(9)}}, members(updates[0]))
    for update in updates:
        state, _ = federation.round(state, members(update))
    remembered = state.own[1]["params"]["w"][0]
    assert np.abs(remembered).max() > 0
    np.testing.assert_allclose(state.server["params"]["w"] + remembered, updates.sum(0), rtol=1e-4, atol=1e-5)


def test_feedback_reaches_the_optimum_that_bias_keeps_away_from():
    algorithm = federated.fed_avg(task(), optax.sgd(0.05))
    exact = run(algorithm, 80)[0]
    np.testing.assert_allclose(run(compressed(algorithm, quantised(8)), 80)[0], exact, atol=0.02)
    assert run(compressed(algorithm, quantised(8), feedback=False), 1)[1].own[1] == ()


def test_it_composes_with_algorithms_that_remember():
    found = run(compressed(federated.scaffold(task(), 0.05), quantised(16)), 20)[0]
    np.testing.assert_allclose(found, run(federated.scaffold(task(), 0.05), 20)[0], atol=5e-3)


def test_a_private_algorithm_is_not_compressed_afterwards():
    uniform = federated.fed_avg(task(), optax.sgd(0.1), aggregate=federated.aggregates.mean("uniform"))
    with pytest.raises(ValueError, match="compress first"):
        run(compressed(privacy.central(uniform, clip=1.0, noise=1.0, expected=4), quantised(8)), 1)
    private = privacy.central(compressed(uniform, quantised(16)), clip=100.0, noise=1e-6, expected=4)
    np.testing.assert_allclose(run(private, 3)[0], run(uniform, 3)[0], atol=1e-3)


def test_share_that_is_lost():
    tree = {"a": jnp.array([3.0, 4.0, 0.0]), "count": jnp.array(3)}
    np.testing.assert_allclose(compression.loss_of(top_k(0.3), KEY, tree), 9 / 25, rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="bits must be one of"):
        quantised(3)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        top_k(0.0)
