"""What a loaded data set is: named arrays of equal length, what is known about them, and how a split is sliced."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

TASKS = ("classification", "detection", "clicks", "ratings")

_SPLIT = re.compile(r"(?P<base>[A-Za-z_][\w-]*)(?:\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?")
_BOUND = re.compile(r"(?P<number>-?\d+(?:\.\d+)?)\s*(?P<percent>%?)")


class NotHere(Exception):
    """Raised by a reader whose place does not hold the data set; the message is one line: "place: reason"."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set besides its arrays.

    Attributes:
      task: one of "classification", "detection", "clicks", "ratings".
      num_classes: number of classes, or 0 where the task has none.
      class_names: names of classes 0 .. num_classes - 1; empty where the task has none.
      source: where these arrays came from: "embedded", "local" or "tfds" (user data sets may say anything else).
      citation: what to cite.
      licence: licence or terms of use.
      notes: one or two sentences on what a user must know (lossy pixels, subset, split made by us).
      facts: further numbers by name, such as `table_sizes` of a click log or `degenerate_boxes` of a detection set.
    """

    task: str
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    source: str = "local"
    citation: str = ""
    licence: str = ""
    notes: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown; valid tasks: {', '.join(TASKS)}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} entries but num_classes={self.num_classes}")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set, in memory or memory-mapped.

    Attributes:
      name: name in the registry.
      split: the split as it was asked for, slice included, for example "train[:1000]".
      arrays: arrays that all share axis 0. Classification: `image` uint8 [N, H, W, C] and `label` int32 [N].
        Detection: `image` uint8 [N, H, W, C], `boxes` float32 [N, M, 4] (ymin, xmin, ymax, xmax in 0..1), `labels`
        int32 [N, M], `valid` bool [N, M]. Clicks: `dense` float32 [N, D], `cat` int32 [N, T] (row ids per table),
        `label` float32 [N]. Ratings: `user` int32 [N], `item` int32 [N], `rating` float32 [N], `timestamp` int64 [N].
        They may be read-only.
      info: what is known about the data set.
    """

    name: str
    split: str
    arrays: Mapping[str, np.ndarray]
    info: DatasetInfo

    def __post_init__(self):
        lengths = {key: len(value) for key, value in self.arrays.items()}
        if not lengths:
            raise ValueError(f"data set {self.name!r} has no arrays; expected at least one")
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the arrays of data set {self.name!r} must share axis 0, but their lengths are {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{key}: {value.dtype}{list(value.shape)}" for key, value in self.arrays.items())
        return f"Dataset({self.name!r}, {self.split!r}, {{{shapes}}}, source={self.info.source!r})"


class SplitSlice(NamedTuple):
    """A parsed split such as "train[10%:20%]": the split's name, and the text of both ends ("" where open)."""

    base: str
    start: str
    stop: str

    def bounds(self, length: int) -> tuple[int, int]:
        """Turns the two ends into row numbers.

        Args:
          length: number of rows of the whole split.

        Returns:
          `(first, end)`: rows `first .. end - 1`. Percentages are rounded to the closest row, as TFDS does, so
          neighbouring percentages neither overlap nor leave a gap.

        Raises:
          ValueError: an end lies outside the split, or no row is left.
        """
        first = _row(self.start, length, self) if self.start else 0
        end = _row(self.stop, length, self) if self.stop else length
        if first >= end:
            raise ValueError(f"split {str(self)!r} selects no row: it runs from row {first} to row {end} of {length}")
        return first, end

    def __str__(self) -> str:
        return f"{self.base}[{self.start}:{self.stop}]" if self.start or self.stop else self.base


def parse_split(split: str) -> SplitSlice:
    """Parses a split with an optional slice.

    Args:
      split: "train", "train[:1000]", "train[-1000:]", "train[10%:20%]", "train[:2.5%]".

    Returns:
      The parts.

    Raises:
      TypeError: `split` is not a string.
      ValueError: the text does not have that form.

    >>> parse_split("train[10%:20%]").bounds(1000)
    (100, 200)
    """
    if not isinstance(split, str):
        raise TypeError(f"split must be a string such as 'train' or 'train[:1000]', got {type(split).__name__}")
    match = _SPLIT.fullmatch(split.strip())
    start, stop = ((match["start"] or "").strip(), (match["stop"] or "").strip()) if match else ("", "")
    if match is None or any(bound and not _BOUND.fullmatch(bound) for bound in (start, stop)):
        raise ValueError(
            f"split={split!r} cannot be read; expected a name with an optional slice, "
            "such as 'train', 'test[:1000]', 'train[-500:]' or 'train[10%:20%]'"
        )
    return SplitSlice(match["base"], start, stop)


def _row(bound: str, length: int, split: SplitSlice) -> int:
    match = _BOUND.fullmatch(bound)
    assert match is not None, "parse_split admits nothing else"
    number, percent = float(match["number"]), bool(match["percent"])
    if not percent and not number.is_integer():
        raise ValueError(f"split {str(split)!r}: {bound!r} is not a whole number of rows; write a percentage with '%'")
    if abs(number) > (100 if percent else length):
        raise ValueError(f"split {str(split)!r}: {bound!r} lies outside '{split.base}', which has {length} rows")
    row = round(number * length / 100) if percent else int(number)
    return row + length if row < 0 else row
