"""Tests that need eight devices; `test_multidevice.py` runs them in their own process, with forced host devices."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxeff import parallel, training

ROWS = 16


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def batches_from(start):
    while True:
        rng = np.random.default_rng(start)
        labels = rng.integers(0, 3, ROWS).astype(np.int32)
        yield {"image": rng.normal(size=(ROWS, 4)).astype(np.float32) + labels[:, None], "label": labels}
        start += 1


def method(axis_name=None):
    tx = training.optimizer("sgd", training.schedule("cosine", 0.2, 6), momentum=0.9)
    return training.classification(
        *training.from_linen(Network()), tx, num_classes=3, ema_decay=0.9, axis_name=axis_name
    )


def fit(axis_name=None, **options):
    return training.fit(
        method(axis_name), options.pop("batches_from", batches_from), steps=6, key=jax.random.key(0), log_every=2,
        progress=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()), ("data",))


def checked_shard_map(mesh):
    """shard_map that keeps track of what is replicated, in which gradients are summed by themselves."""
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
    return lambda step: jax.jit(jax.shard_map(step, mesh=mesh, **specs), donate_argnums=0)


@pytest.mark.parametrize(
    ("way", "placed"),
    # A bare shard_map leaves it to the caller to place the state on the mesh.
    [
        ("jit", False),
        ("jit", True),
        ("shard_map", False),
        ("shard_map", True),
        ("pmap", False),
        ("bare shard_map", True),
    ],
)
def test_every_way_to_use_eight_devices_trains_like_one(mesh, way, placed):
    transform = {
        "jit": lambda step: parallel.data_parallel(step, mesh, via="jit"),
        "shard_map": lambda step: parallel.data_parallel(step, mesh, via="shard_map"),
        "pmap": lambda step: parallel.pmap_step(step, "data"),
        "bare shard_map": checked_shard_map(mesh),
    }[way]
    result = fit(
        None if way == "jit" else "data",
        step_transform=transform,
        state_sharding=NamedSharding(mesh, PartitionSpec()) if placed else None,
    )
    alone = fit()
    for found, expected in zip(
        jax.tree.leaves((result.state.params, result.state.ema)),
        jax.tree.leaves((alone.state.params, alone.state.ema)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for row, expected in zip(result.history, alone.history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


def test_a_run_on_eight_devices_resumes_exactly(mesh, tmp_path):
    sharding = NamedSharding(mesh, PartitionSpec())
    options = dict(step_transform=lambda step: parallel.data_parallel(step, mesh), state_sharding=sharding)

    def broken(start):
        for number, batch in enumerate(batches_from(start), start + 1):
            if number == 5:
                raise InterruptedError
            yield batch

    with pytest.raises(InterruptedError):
        fit(workdir=tmp_path, batches_from=broken, checkpoint_every=2, **options)
    resumed = fit(workdir=tmp_path, checkpoint_every=2, **options)
    whole = fit(**options)
    assert jax.tree.leaves(resumed.state.params)[0].sharding == sharding
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.opt_state, whole.state.opt_state)


def test_a_batch_that_does_not_divide_by_the_devices_is_refused(mesh):
    def odd(start):
        for batch in batches_from(start):
            yield {name: value[:15] for name, value in batch.items()}

    with pytest.raises(ValueError, match="15.*8"):
        fit(batches_from=odd, step_transform=lambda step: parallel.data_parallel(step, mesh))
