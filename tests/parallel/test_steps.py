import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import parallel

ROWS = 12


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(4, 3)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    batch = {"x": rng.normal(size=(ROWS, 4)).astype(np.float32), "y": rng.normal(size=(ROWS, 3)).astype(np.float32)}
    return params, batch


def loss(params, batch):
    error = jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error)), "by_output": jnp.mean(error, axis=0)}


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(st.sampled_from([1, 2, 3, 12]), st.booleans())
def test_accumulated_gradients_metrics_and_aux_equal_those_of_the_whole_batch(steps, compiled):
    params, batch = problem()

    def accumulated(params, batch):
        return parallel.accumulate_gradients(
            lambda rows: jax.value_and_grad(loss, has_aux=True)(params, rows), batch, steps
        )

    actual = (jax.jit(accumulated) if compiled else accumulated)(params, batch)
    expected = jax.value_and_grad(loss, has_aux=True)(params, batch)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6, rtol=0), actual, expected)


def test_microbatches_take_every_nth_row():
    seen = parallel.accumulate_gradients(lambda rows: rows["x"] * 1.0, {"x": jnp.arange(6.0)}, 3)
    # Microbatches (0, 3), (1, 4), (2, 5); their mean is (1, 4).
    np.testing.assert_array_equal(seen, [1.0, 4.0])


def test_bfloat16_gradients_are_accumulated_in_float32():
    values = jnp.ones(512, jnp.bfloat16)
    mean = parallel.accumulate_gradients(lambda rows: jnp.mean(rows), values, 512)
    assert mean.dtype == jnp.bfloat16 and mean == 1


def test_random_keys_travel_in_the_batch():
    keys = jax.random.split(jax.random.key(0), 4)
    mean = parallel.accumulate_gradients(lambda rows: jax.random.normal(rows["key"][0]), {"key": keys}, 4)
    np.testing.assert_allclose(mean, np.mean([jax.random.normal(key) for key in keys]), rtol=1e-6)


def test_the_gradient_passes_through_an_accumulation():
    x = jnp.arange(6.0)
    slope = jax.grad(lambda s: parallel.accumulate_gradients(lambda rows: jnp.mean((s * rows) ** 2), x, 3))(2.0)
    np.testing.assert_allclose(slope, 2 * 2.0 * np.mean(np.arange(6.0) ** 2), rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_integer_outputs_are_refused_by_name(steps):
    _, batch = problem()
    with pytest.raises(TypeError, match=r"output 'correct' of grad_fn is int32; it must return means"):
        parallel.accumulate_gradients(lambda rows: {"correct": jnp.sum(rows["x"] > 0)}, batch, steps)


def test_a_batch_that_does_not_divide_by_the_steps_is_refused():
    _, batch = problem()
    with pytest.raises(ValueError, match="batch of 12 does not divide by 5 accumulation steps"):
        parallel.accumulate_gradients(lambda rows: jnp.mean(rows["x"]), batch, 5)


def test_unknown_via_lists_the_ways():
    with pytest.raises(ValueError, match=r"via must be one of \['jit', 'shard_map'\], got 'pmap'"):
        parallel.data_parallel(lambda s, b: (s, {}), parallel.mesh(), via="pmap")


def test_unknown_axis_lists_those_of_the_mesh():
    with pytest.raises(ValueError, match="axis 'rows' is not an axis of the mesh"):
        parallel.data_parallel(lambda s, b: (s, {}), parallel.mesh(), axis="rows")


@pytest.mark.parametrize("wrap", [lambda step: parallel.data_parallel(step, parallel.mesh()), parallel.pmap_step])
def test_a_step_that_returns_no_pair_is_refused(wrap):
    with pytest.raises(TypeError, match=r"must return the pair \(state, metrics\), got dict"):
        wrap(lambda state, batch: {"w": jnp.zeros(())})({"w": np.zeros(())}, {"x": np.ones(jax.device_count())})


@pytest.mark.parametrize("way", ["jit", "shard_map", "pmap"])
def test_one_device_needs_no_special_case(way):
    def step(state, batch):
        mean = jnp.mean(batch["x"]) if way == "jit" else jax.lax.pmean(jnp.mean(batch["x"]), "data")
        return {"total": state["total"] + mean}, {"loss": mean}

    one = jax.devices()[:1]
    if way == "pmap":
        run = parallel.pmap_step(step, devices=one)
    else:
        run = parallel.data_parallel(step, parallel.mesh(devices=one), via=way)
    state = {"total": jnp.zeros(())}
    for _ in range(2):
        state, metrics = run(state, {"x": np.arange(4, dtype=np.float32)})
    assert float(state["total"]) == 3.0 and float(metrics["loss"]) == 1.5
    assert run.__name__ == "step"
