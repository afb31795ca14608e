"""Sums of maps and choices in compiled code, against NumPy in float64 and a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.ops import choice

missing = choice.unavailable()
pytestmark = pytest.mark.skipif(bool(missing), reason=str(missing))

TERMS = {"mean": lambda x: x, "abs_mean": np.abs, "l2": np.square}


@pytest.mark.parametrize("term", choice.TERMS)
@pytest.mark.parametrize(("over", "axis"), [("positions", -2), ("channels", -1)])
@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 3, 67), (3, 2, 9, 40), (3, 1030, 70), (0, 4, 3), (2, 0, 3)])
def test_sums_equal_numpy(term, over, axis, shape):
    x = np.random.default_rng(0).normal(size=shape)
    sums = jax.jit(lambda x: choice.map_sums(x, over, term))(x.astype(np.float32))
    expected = TERMS[term](x).sum(axis)
    assert sums.shape == expected.shape
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-5 * max(1, *shape))


@pytest.mark.parametrize("term", choice.TERMS)
@pytest.mark.parametrize("over", ["positions", "channels"])
def test_sums_have_gradients_and_are_mapped(term, over):
    x = np.random.default_rng(1).normal(size=(3, 2, 4, 5)).astype(np.float32)
    axis = -2 if over == "positions" else -1
    plain = {"mean": lambda x: x, "abs_mean": jnp.abs, "l2": jnp.square}[term]

    def squared(sums):
        return lambda x: (sums(x) ** 2).sum()

    ours = jax.vmap(jax.grad(squared(lambda x: choice.map_sums(x, over, term))))(x)
    np.testing.assert_allclose(ours, jax.grad(squared(lambda x: plain(x).sum(axis)))(x), rtol=1e-4, atol=1e-5)


def test_sums_of_large_maps_keep_their_digits():
    x = np.full((1, 512 * 512, 3), 0.1, np.float32)
    np.testing.assert_allclose(choice.map_sums(x, "positions", "mean"), 512 * 512 * np.float64(x[:, 0]), rtol=1e-6)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.0, 0.5, np.inf, -np.inf, np.nan])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 5, 33]).flatmap(lambda n: st.lists(VALUES, min_size=n, max_size=n)), st.floats(0, 1))
def test_the_highest_come_first_and_the_lower_index_among_equals(row, share):
    k = max(1, round(share * len(row)))
    lowest = [-np.inf if np.isnan(value) else value for value in row]
    expected = sorted(sorted(range(len(row)), key=lambda i: (-lowest[i], i))[:k])
    np.testing.assert_array_equal(choice.highest(jnp.asarray(row, jnp.float32), k), expected)


def test_every_row_has_its_own():
    scores = np.random.default_rng(2).normal(size=(2, 3, 40)).astype(np.float32)
    chosen = jax.vmap(lambda rows: choice.highest(rows, 7))(scores)
    assert chosen.shape == (2, 3, 7) and chosen.dtype == jnp.int32
    np.testing.assert_array_equal(chosen, np.sort(np.argsort(-scores, axis=-1)[..., :7]))


def test_it_is_had_for_float32_on_cpu_alone(monkeypatch):
    assert choice.available(jnp.ones(3)) and not choice.available(jnp.ones(3, jnp.bfloat16))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not choice.available(jnp.ones(3))
