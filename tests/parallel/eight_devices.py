"""Tests that need eight devices; `test_multidevice.py` runs them in their own process, with forced host devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxeff import parallel, trees

STEPS, ROWS, LEARNING_RATE, MOMENTUM = 4, 32, 0.1, 0.9
WAYS = ["jit", "shard_map", "pmap"]


def assert_close(actual, expected, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=atol, rtol=0), actual, expected)


def initial_state():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0])
    params = {"w1": draw(5, 8), "scale": np.ones(8, np.float32), "shift": np.zeros(8, np.float32), "w2": draw(8, 3)}
    return {
        "params": params,
        "velocity": jax.tree.map(np.zeros_like, params),
        "stats": {"mean": np.zeros(8, np.float32), "var": np.ones(8, np.float32)},
        "key": jax.random.key(7),
        "step": np.int32(0),
    }


def batches(rows=ROWS):
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        yield {
            "x": rng.normal(size=(rows, 5)).astype(np.float32),
            "y": rng.integers(0, 3, size=rows).astype(np.int32),
        }


def training_step(state, batch, axis=None):
    """MLP with batch norm, SGD with momentum; reduces over `axis` when it sees only one device's rows."""
    mean = (lambda x: x) if axis is None else (lambda x: jax.lax.pmean(x, axis))

    def loss(params):
        hidden = batch["x"] @ params["w1"]
        center = mean(jnp.mean(hidden, axis=0))
        variance = mean(jnp.mean(jnp.square(hidden - center), axis=0))
        hidden = (hidden - center) * jax.lax.rsqrt(variance + 1e-3) * params["scale"] + params["shift"]
        logits = jnp.tanh(hidden) @ params["w2"]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)
        return jnp.mean(losses), {"mean": center, "var": variance}

    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
    gradient = mean(gradient)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, state["velocity"], gradient)
    return {
        "params": jax.tree.map(lambda p, v: p - LEARNING_RATE * v, state["params"], velocity),
        "velocity": velocity,
        "stats": jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state["stats"], stats),
        "key": jax.random.fold_in(state["key"], state["step"]),
        "step": state["step"] + 1,
    }, {"loss": mean(value)}


def per_device_step(state, batch):
    return training_step(state, batch, "data")


def parallel_step(way, **kwargs):
    if way == "pmap":
        return parallel.pmap_step(kwargs.pop("step", per_device_step))
    step = kwargs.pop("step", training_step if way == "jit" else per_device_step)
    return parallel.data_parallel(step, parallel.mesh(), via=way, **kwargs)


def train(step, data):
    state, losses = initial_state(), []
    for batch in data:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    key = jax.random.key_data(state.pop("key"))
    return state, key, losses


@pytest.fixture(scope="module")
def single_device():
    return train(jax.jit(training_step), batches())


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize("way", WAYS)
def test_training_equals_the_single_device_run(way, single_device):
    state, key, losses = train(parallel_step(way), batches())
    expected_state, expected_key, expected_losses = single_device
    assert_close(state, expected_state)
    assert key.tolist() == expected_key.tolist()
    np.testing.assert_allclose(losses, expected_losses, atol=1e-6)
    assert losses[-1] < losses[0]
    assert int(state["step"]) == STEPS


@pytest.mark.parametrize("way", WAYS)
def test_training_takes_sharded_batches_and_replicated_states(way, single_device):
    everywhere = parallel.mesh()
    step = parallel_step(way)
    first_batch, *others = (parallel.shard_batch(batch, everywhere) for batch in batches())
    state, _ = step(parallel.replicate(initial_state(), everywhere), first_batch)
    for batch in others:
        state, _ = step(state, batch)
    assert_close(state["params"], single_device[0]["params"])


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_one_replicated_copy(way):
    state, metrics = parallel_step(way)(initial_state(), next(batches()))
    assert state["params"]["w1"].shape == (5, 8) and metrics["loss"].shape == ()
    assert state["params"]["w1"].sharding.is_fully_replicated
    assert len(state["params"]["w1"].sharding.device_set) == 8


@pytest.mark.parametrize("way", WAYS)
def test_the_step_is_not_traced_again_after_its_first_call(way):
    traced = []

    def counted(state, batch):
        traced.append(1)
        return (training_step if way == "jit" else per_device_step)(state, batch)

    step = parallel_step(way, step=counted)
    state, _ = step(parallel.replicate(initial_state(), parallel.mesh()), next(batches()))
    after_first = len(traced)
    for batch in batches():
        state, _ = step(state, batch)
    assert len(traced) == after_first >= 1


@pytest.mark.parametrize("via", ["jit", "shard_map"])
def test_donation_takes_the_old_state_and_can_be_turned_off(via):
    state = parallel.replicate(initial_state(), parallel.mesh())
    parallel_step(via, donate=False)(state, next(batches()))
    assert not state["params"]["w1"].is_deleted()
    parallel_step(via)(state, next(batches()))
    assert state["params"]["w1"].is_deleted()


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_30_is_refused_before_anything_is_traced(way):
    def untouchable(state, batch):
        raise AssertionError("traced")

    with pytest.raises(ValueError, match=r"batch of 30 does not divide by 8 devices.*for example 24 or 32"):
        parallel_step(way, step=untouchable)(initial_state(), next(batches(rows=30)))


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
@pytest.mark.parametrize(
    ("forgotten", "message"),
    [("state", r"different values of state 'w'"), ("metrics", r"different values of metrics 'loss'")],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_a_forgotten_reduction_is_named(way, forgotten, message, dtype):
    def step(state, batch):
        local = jnp.sum(batch["x"]).astype(dtype)
        reduced = jax.lax.pmax(local, "data")
        state = {"w": state["w"] + (local if forgotten == "state" else reduced)}
        return state, {"loss": local if forgotten == "metrics" else reduced}

    with pytest.raises(ValueError, match=message + r".*jax\.lax\.pmean\(x, 'data'\)"):
        parallel_step(way, step=step)({"w": jnp.zeros(2, dtype)}, {"x": np.arange(16, dtype=np.float32)})


@pytest.mark.parametrize("way", WAYS)
def test_a_parallel_step_runs_inside_an_outer_scan(way):
    step = parallel_step(way)
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *batches())
    state, metrics = jax.jit(lambda state: jax.lax.scan(step, state, stacked))(
        parallel.replicate(initial_state(), parallel.mesh())
    )
    expected, _, losses = train(jax.jit(training_step), batches())
    assert_close(state["params"], expected["params"])
    np.testing.assert_allclose(metrics["loss"], losses, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_inside_a_parallel_step_equals_the_whole_batch(way):
    def loss(params, rows):
        return jnp.mean(jnp.square(jnp.tanh(rows["x"] @ params["w1"]) @ params["w2"]))

    def step(params, batch, steps=2):
        gradient_of_rows = lambda rows: jax.value_and_grad(loss)(params, rows)
        value, gradient = parallel.accumulate_gradients(gradient_of_rows, batch, steps)
        if way != "jit":
            value, gradient = jax.lax.pmean((value, gradient), "data")
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradient), {"loss": value}

    params, batch = initial_state()["params"], next(batches())
    value, gradient = jax.value_and_grad(loss)(params, batch)
    new, metrics = parallel_step(way, step=step)(params, batch)
    assert_close(new, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradient))
    np.testing.assert_allclose(metrics["loss"], value, atol=1e-6)


def test_accumulation_of_a_sharded_batch_moves_no_rows_between_devices():
    everywhere = parallel.mesh()
    batch = parallel.shard_batch({"x": np.ones((32, 4), np.float32)}, everywhere)
    accumulated = jax.jit(lambda b: parallel.accumulate_gradients(lambda rows: jnp.mean(rows["x"], axis=0), b, 4))
    compiled = accumulated.lower(batch).compile().as_text()
    assert "all-to-all" not in compiled and "all-gather" not in compiled and "collective-permute" not in compiled


def test_mesh_shapes_and_wildcards():
    assert dict(parallel.mesh().shape) == {"data": 8}
    assert dict(parallel.mesh({"data": -1, "model": 2}).shape) == {"data": 4, "model": 2}
    assert dict(parallel.mesh({"data": 3}, devices=jax.devices()[:3]).shape) == {"data": 3}
    with pytest.raises(ValueError, match=r"needs a multiple of 3 devices, but there are 8"):
        parallel.mesh({"data": -1, "model": 3})
    with pytest.raises(ValueError, match=r"needs 4 devices, but there are 8"):
        parallel.mesh({"data": 4})


def test_shard_batch_places_rows_in_order():
    placed = parallel.shard_batch({"x": np.arange(16)}, parallel.mesh())["x"]
    assert placed.sharding.spec == PartitionSpec("data")
    assert [np.asarray(shard.data).tolist() for shard in placed.addressable_shards] == [
        [2 * i, 2 * i + 1] for i in range(8)
    ]


def test_shard_batch_on_a_two_axis_mesh_copies_along_the_other_axis():
    placed = parallel.shard_batch(np.arange(8), parallel.mesh({"data": 4, "model": 2}))
    assert sorted(np.asarray(shard.data).tolist() for shard in placed.addressable_shards) == sorted(
        [[2 * i, 2 * i + 1] for i in range(4)] * 2
    )


@pytest.mark.parametrize("via", ["jit", "shard_map"])
def test_training_on_a_two_axis_mesh_equals_the_single_device_run(via, single_device):
    step = training_step if via == "jit" else per_device_step
    state, _, _ = train(parallel.data_parallel(step, parallel.mesh({"data": 4, "model": 2}), via=via), batches())
    assert_close(state, single_device[0])


def test_shard_batch_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"batch of 30 does not divide by 8 devices on axis 'data'"):
        parallel.shard_batch({"x": np.ones(30)}, parallel.mesh())


def test_replicate_puts_a_copy_on_every_device():
    placed = parallel.replicate({"w": np.arange(3), "key": jax.random.key(0)}, parallel.mesh())
    assert placed["w"].sharding.is_fully_replicated and len(placed["w"].addressable_shards) == 8
    assert len(placed["key"].sharding.device_set) == 8


def test_pmap_step_on_some_of_the_devices(single_device):
    state, _, _ = train(parallel.pmap_step(per_device_step, devices=jax.devices()[:4]), batches())
    assert_close(state, single_device[0])


def test_global_batch_on_one_host_is_shard_batch():
    everywhere = parallel.mesh()
    batch = {"x": np.arange(32).reshape(16, 2)}
    one, other = parallel.global_batch(batch, everywhere)["x"], parallel.shard_batch(batch, everywhere)["x"]
    assert one.sharding == other.sharding
    np.testing.assert_array_equal(one, other)


def test_process_slice_on_one_host_is_the_whole_batch():
    assert parallel.process_slice(16) == slice(0, 16)
    assert parallel.process_slice(16, parallel.mesh()) == slice(0, 16)
    with pytest.raises(ValueError, match="batch of 30 does not divide by 8 devices on axis 'data'"):
        parallel.process_slice(30, parallel.mesh())


def test_weighted_mean_runs_inside_shard_map():
    stacked = np.arange(48, dtype=np.float32).reshape(3, 16)
    split, whole = PartitionSpec(None, "data"), PartitionSpec()
    averaged = jax.shard_map(
        trees.weighted_mean, mesh=parallel.mesh(), in_specs=(split, whole), out_specs=PartitionSpec("data")
    )(stacked, np.array([1.0, 0.0, 3.0], np.float32))
    np.testing.assert_allclose(averaged, (stacked[0] + 3 * stacked[2]) / 4)
