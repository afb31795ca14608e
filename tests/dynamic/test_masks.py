"""Masks against sorting in NumPy: exactly k, highest first, lower index first among equals, NaN last."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.dynamic import keep_count, mask_of, top_k_indices, top_k_mask
from jaxeff.ops import choice


@pytest.fixture(autouse=True, params=["compiled", "plain"], scope="module")
def code(request):
    """Both ways to choose: in compiled code and in XLA's."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(choice, "available", lambda array: False)
        elif reason := choice.unavailable():
            pytest.skip(reason)
        jax.clear_caches()
        yield


# Few distinct values, so that most examples have ties; few sizes, so that few programs are compiled.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.0, 0.5, np.inf, -np.inf, np.nan])
ROWS = st.sampled_from([1, 4, 9]).flatmap(lambda size: st.lists(VALUES, min_size=size, max_size=size))


def kept_by_sorting(row, k):
    """Indices of the k highest, by a stable sort of (NaN last, higher first)."""
    order = sorted(range(len(row)), key=lambda i: (np.isnan(row[i]), -row[i] if not np.isnan(row[i]) else 0, i))
    numbers = [i for i in order if not np.isnan(row[i]) and row[i] != -np.inf]
    rest = sorted(set(order) - set(numbers))  # -inf and NaN are all last
    return sorted((numbers + rest)[:k])


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([0.1, 0.5, 1.0]))
def test_exactly_the_k_highest_are_kept(row, share):
    k = max(1, round(share * len(row)))
    indices = top_k_indices(jnp.asarray(row), k)
    np.testing.assert_array_equal(indices, kept_by_sorting(row, k))
    mask = mask_of(indices, len(row))
    assert mask.sum() == k
    np.testing.assert_array_equal(top_k_mask(jnp.asarray(row), k), mask)


def test_one_compilation_serves_every_k():
    scores = jax.random.normal(jax.random.key(0), (3, 8))
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def masks(k):
        return top_k_mask(scores, k)

    for k in range(1, 9):
        np.testing.assert_array_equal(masks(k), mask_of(top_k_indices(scores, k), 8))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_every_row_may_keep_its_own_number_in_every_dtype(dtype):
    with jax.enable_x64(True):
        scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 33)) ** 3, dtype)
        counts = jnp.asarray([[1], [7], [32], [33]])
        masks = top_k_mask(scores, counts)
        for mask, row, k in zip(masks, scores, (1, 7, 32, 33), strict=True):
            np.testing.assert_array_equal(mask, mask_of(top_k_indices(row, k), 33))


def test_masks_have_no_gradient():
    gradient = jax.grad(lambda x: jnp.where(top_k_mask(x, 2), x, 0).sum())(jnp.arange(4.0))
    np.testing.assert_array_equal(gradient, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [
        (0.0, 7, 7),
        (0.5, 7, 4),  # half up
        (0.9, 15, 2),  # 1.5 in decimals, less in binary
        (0.99, 10, 1),
        (0.9, 512, 51),
    ],
)
def test_keep_count(ratio, size, expected):
    assert keep_count(ratio, size) == expected


def test_bad_counts_are_refused():
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"ratio is the share that is dropped, in \[0, 1\), got"):
            keep_count(ratio, 8)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        keep_count(0.5, 0)
    for k in (0, 9):
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.8, the number of scores, got {k}"):
            top_k_indices(jnp.zeros((2, 8)), k)
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.8, the number of scores, got {k}"):
            top_k_mask(jnp.zeros((2, 8)), k)


def test_numbers_with_a_fraction_are_refused():
    scores = jnp.arange(4.0)
    for k in (2.0, 2.5, np.float32(2)):
        for function in (top_k_indices, top_k_mask):
            with pytest.raises(TypeError, match="k must be a whole number"):
                function(scores, k)
    np.testing.assert_array_equal(top_k_indices(scores, np.int64(2)), [2, 3])
