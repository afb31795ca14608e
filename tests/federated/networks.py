"""Networks that several tests of permutations take."""

import flax.linen as nn


class Grouped(nn.Module):
    """A group norm and a grouped convolution: groups change places, and channels within all of them alike."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(3)(nn.Conv(12, (1, 1), name="first")(x)))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(x))
        return nn.Conv(4, (1, 1), name="last")(x).mean((1, 2))
