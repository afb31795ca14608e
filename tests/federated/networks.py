"""Networks that several tests of permutations take, and variables for them.

Random numbers are NumPy's, and what permutes is compiled as one: a program for every shape takes longer than the test.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import federated


class Grouped(nn.Module):
    """A group norm and a grouped convolution: groups change places, and channels within all of them alike."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(3)(nn.Conv(12, (1, 1), name="first")(x)))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(x))
        return nn.Conv(4, (1, 1), name="last")(x).mean((1, 2))


def disturbed(variables, by=0.1, seed=1):
    """Variables of which no two units are alike."""
    rng = np.random.default_rng(seed)
    noise = lambda leaf: np.float32(by) * rng.normal(size=leaf.shape).astype(np.float32)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + noise(leaf)), variables)


def positive(variables, by=1.0, seed=1):
    """The same, and no variance is negative."""
    rng = np.random.default_rng(seed)
    noise = lambda leaf: np.float32(by) * rng.random(leaf.shape, np.float32)
    return jax.tree.map(lambda leaf: jnp.asarray(np.abs(leaf) + noise(leaf)), variables)


def permuted(found, params, perms):
    """`permute`, compiled."""
    return jax.jit(lambda params, perms: federated.permute(found, params, perms))(params, perms)
