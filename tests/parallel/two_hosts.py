"""One of two processes that start together, train on one mesh, and print what they found as JSON.

Run as `python two_hosts.py COORDINATOR NUM_PROCESSES PROCESS_ID`, with two forced host devices each; `test_hosts.py`
starts both.
"""

import json
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import parallel

ROWS = 16


def main(coordinator: str, num_processes: str, process_id: str) -> dict:
    config = types.SimpleNamespace(
        coordinator_address=coordinator, num_processes=int(num_processes), process_id=int(process_id), learning_rate=0.1
    )
    found = {"started": parallel.initialize_distributed(config, timeout=60)}
    found["started_again"] = parallel.initialize_distributed(config)
    try:
        parallel.initialize_distributed(config, num_processes=3)
    except ValueError as error:
        found["other_fields"] = str(error)
    found["processes"], found["devices"] = jax.process_count(), jax.device_count()

    everywhere = parallel.mesh()
    rows = parallel.process_slice(ROWS, everywhere)
    assert rows == parallel.process_slice(ROWS)
    found["rows"] = [rows.start, rows.stop]
    whole = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
    batch = parallel.global_batch({"x": whole[rows]}, everywhere)
    found["global_shape"] = list(batch["x"].shape)

    # An axis across the hosts along which batches are copied: each host loads all rows.
    copied = parallel.mesh({"model": 2, "data": 2})
    found["rows_when_copied"] = [parallel.process_slice(ROWS, copied).start, parallel.process_slice(ROWS, copied).stop]
    found["copied_shape"] = list(parallel.global_batch(whole, copied).shape)

    mixed = parallel.mesh({"data": 4}, devices=[jax.devices()[i] for i in (0, 2, 1, 3)])
    try:
        parallel.process_slice(ROWS, mixed)
    except ValueError as error:
        found["mixed"] = str(error)

    try:
        found["gathered"] = parallel.gather({"host": jax.process_index(), "text": "x" * 300 * jax.process_index()})
        found["first"] = parallel.is_first(), parallel.on_first(lambda: [jax.process_index(), "done"])
        try:
            parallel.on_first(refuse)
        except (OSError, RuntimeError) as error:
            found["refused"] = [type(error).__name__, str(error)]
        mine = {"w": np.full(3, 1.0 + jax.process_index(), np.float32), "key": jax.random.key(jax.process_index())}
        everybodys = parallel.replicate(mine, everywhere)
        found["key"] = jax.random.key_data(everybodys["key"]).tolist()
        state = {"w": everybodys["w"]}
        for via, step in {"jit": training_step, "shard_map": per_device_step}.items():
            run = parallel.data_parallel(step, everywhere, via=via, donate=False)
            after, metrics = run(*run(state, batch)[:1], batch)
            found[via] = {"w": np.asarray(after["w"]).tolist(), "loss": float(metrics["loss"])}
    except jax.errors.JaxRuntimeError as error:
        # A CPU backend built without cross-process collectives can start and assemble batches, but not reduce.
        if "implemented" not in str(error):
            raise
        found["collectives"] = False
    else:
        found["collectives"] = True
    return found


def refuse():
    raise FileNotFoundError("no such file here")


def training_step(state, batch, mean=lambda x: x):
    loss = lambda w: jnp.mean(jnp.square(batch["x"] @ w))
    value, gradient = mean(jax.value_and_grad(loss)(state["w"]))
    return {"w": state["w"] - 0.1 * gradient}, {"loss": value}


def per_device_step(state, batch):
    return training_step(state, batch, lambda x: jax.lax.pmean(x, "data"))


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps(main(*sys.argv[1:])), flush=True)
