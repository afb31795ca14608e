"""A tiny run with everything that could spoil exact resume; as a program it is what signal tests stop and restart."""

import argparse
import functools
import os
import signal
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import training

STEPS = 16
BATCH = 8


class Network(nn.Module):
    """BatchNorm and dropout: other variables than parameters, and randomness in the step."""

    width: int = 6

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(self.width)(images.reshape(images.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.7)(x)
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


def noise(key, images):
    return images + 0.1 * jax.random.normal(key, images.shape)


@functools.cache  # one compilation for all tests
def method(width=6):
    tx = training.optimizer(
        "sgd", training.schedule("cosine", 0.1, STEPS, warmup=3), momentum=0.9, weight_decay=1e-3, clip_norm=1.0
    )
    functions = training.from_linen(Network(width))
    return training.classification(*functions, tx, num_classes=3, label_smoothing=0.1, ema_decay=0.8, augment=noise)


def batch(index):
    rng = np.random.default_rng(index)
    labels = rng.integers(0, 3, BATCH).astype(np.int32)
    images = rng.integers(0, 100, (BATCH, 2, 2, 1)) + 70 * labels[:, None, None, None]
    return {"image": images.astype(np.uint8), "label": labels}


def batches_from(start):
    while True:
        yield batch(start)
        start += 1


def test_batches():
    for index in (1000, 1001):
        yield batch(index)


def fit(workdir=None, source=batches_from, **options):
    defaults = dict(
        steps=STEPS, key=jax.random.key(3), evaluate_on=test_batches, eval_every=5, log_every=4, checkpoint_every=6,
        config={"width": 6, "optimizer": {"name": "sgd", "rate": 0.1}}, progress=False,
    )  # fmt: skip
    chosen = {**defaults, **options}
    width = chosen["config"]["width"]
    return training.fit(method(width), source, workdir=workdir, **chosen)


def leaves(state):
    """Every array of a state as NumPy, keys as their data."""
    flat = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]
    return [np.asarray(leaf) for leaf in flat]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--wait-at", type=int, help="say so while this step is prepared and wait for a line")
    parser.add_argument("--kill-at", type=int, help="die without warning while this step is prepared")
    arguments = parser.parse_args()

    def source(start):
        for number, data in enumerate(batches_from(start), start + 1):
            if arguments.kill_at and number == arguments.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if arguments.wait_at and number == arguments.wait_at:
                print(f"step {number}", flush=True)
                sys.stdin.readline()
            yield data

    result = fit(arguments.workdir, source)
    np.savez(os.path.join(arguments.workdir, "final.npz"), *leaves(result.state))


if __name__ == "__main__":
    sys.exit(main())
