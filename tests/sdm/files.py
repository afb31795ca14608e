"""Rows of files, for the tests of readers."""

import numpy as np


def rows_of(arrays, files, offsets, length):
    return np.array([arrays[f][o : o + length] for f, o in zip(files, offsets, strict=True)]).reshape(-1, length)
