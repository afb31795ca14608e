"""Rounds whose clients are spread over eight devices; run as tests/parallel/eight_devices.py is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import federated, models, training


@pytest.mark.parametrize("clients", [8, 11])
def test_clients_on_eight_devices_give_what_one_gives(clients):
    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    arrays = {"image": rng.normal(size=(60, 5, 5, 1)).astype(np.float32), "label": rng.integers(0, 3, 60)}
    members = federated.clients_of(arrays, np.split(np.arange(60), np.sort(rng.integers(0, 60, clients - 1))))
    architecture = models.cnn((4, 6), input_shape=(5, 5, 1), num_classes=3, norm="group")
    functions = training.from_linen(models.Network(architecture))
    start = functions.init(jax.random.key(0), jnp.zeros((1, 5, 5, 1)))
    task = federated.classification(functions.apply, 3)
    found = []
    for backend in ("stream", "shard"):
        federation = federated.federate(federated.scaffold(task, 0.1), batch_size=4, backend=backend)
        state = federation.init(jax.random.key(1), start, members)
        for _ in range(2):
            state, report = federation.round(state, members)
        found.append((state._replace(key=0), report))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
