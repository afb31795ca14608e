"""Data sets under one schema whatever their source, and the pipeline that turns them into batches on devices."""

from jaxeff.data.augment import channel_statistics, cutout, mixup, random_crop, random_flip, standardise
from jaxeff.data.dataset import NotHere
from jaxeff.data.pipeline import Batches, padded_batches, prefetch
from jaxeff.data.registry import Dataset, DatasetInfo, load, names, register
from jaxeff.data.tfds import prepare
from jaxeff.data.traces import LocalityTrace, locality_traces

__all__ = [
    "Batches",
    "Dataset",
    "DatasetInfo",
    "LocalityTrace",
    "NotHere",
    "channel_statistics",
    "cutout",
    "load",
    "locality_traces",
    "mixup",
    "names",
    "padded_batches",
    "prefetch",
    "prepare",
    "random_crop",
    "random_flip",
    "register",
    "standardise",
]
