"""Files that the tests of readers share."""

import numpy as np
import pytest


@pytest.fixture
def contents(tmp_path):
    """Three files of odd sizes: their paths and bytes."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in (100_003, 700, 8192)]
    paths = [tmp_path / f"table{number}" for number in range(3)]
    for path, array in zip(paths, arrays, strict=True):
        array.tofile(path)
    return paths, arrays
