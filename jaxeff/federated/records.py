"""How variables travel between machines: an array of Flower for each leaf, or for each group that is exchanged.

Everything that comes is somebody else's: it is compared with what was expected before it is read.

Letters: C classes, G groups.
"""

import dataclasses
import io
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import trees
from jaxeff.federated.fed2 import MODES
from jaxeff.federated.paired import LIMIT, SHARED, group_weights, spread_axes

try:
    from flwr.app import Array, ArrayRecord
except ImportError as error:
    MISSING: ImportError | None = error
else:
    MISSING = None

Tree = Any
# Names of records in messages, of what clients tell, and of what the server says of a round.
ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"
EXAMPLES, COUNTS, PARTITION = "num-examples", "class-counts", "partition-id"
ROUND, FINGERPRINT = "server-round", "fingerprint"
STORED = "numpy.ndarray"
HEADER = 4096
"""More bytes than the header of any array of numpy has."""


class Refused(ValueError):
    """What a client sent does not fit; says which key, what was expected and what came."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How variables travel: which arrays, under which names.

    Attributes:
      like: leaves with the shapes and dtypes of the variables.
      classes: C.
      group_axes: of Fed2, as of `jaxeff.federated.paired_average`; None for a network without groups.
      class_to_group: the group of each class, [C]; with `group_axes`.
      mode: "full", every client gets and sends all groups; "subset", those of its classes: a leaf of groups then
        travels as an array for each of them, "g3/params/groups/...".

    Raises:
      ValueError: for an unknown mode, or groups that do not fit.
    """

    like: Tree
    classes: int
    group_axes: Tree = None
    class_to_group: tuple[int, ...] | None = None
    mode: str = "full"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {self.mode!r}")
        if (self.group_axes is None) != (self.class_to_group is None):
            raise ValueError("group_axes and class_to_group belong together: give both, or neither without groups")
        if self.mode == "subset" and self.class_to_group is None:
            raise ValueError("mode='subset' leaves out groups: give group_axes and class_to_group")
        if self.class_to_group is not None:
            group_weights(np.zeros((1, self.classes), int), self.class_to_group, self.groups)
        for name, leaf in trees.flatten_names(self.like).items():
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ValueError(f"like: {name!r} is a key of random numbers; these stay where they are")
        self.arrays()

    @property
    def groups(self) -> int:
        """G; 1 without groups."""
        return 1 if self.class_to_group is None else max(self.class_to_group) + 1

    def owned(self, class_counts: Any) -> tuple[int, ...]:
        """The groups of which a client with these examples, [C], owns a class."""
        if self.class_to_group is None:
            return ()
        counts = np.asarray(class_counts)[None]
        return tuple(np.flatnonzero(group_weights(counts, self.class_to_group, self.groups, "uniform")[0]).tolist())

    def arrays(self, groups: Iterable[int] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of all that travels; in subset mode of these groups, or of all of them."""
        return {key: jax.ShapeDtypeStruct(shape, dtype) for key, _, _, _, shape, dtype in self._parts(groups)}

    def record(self, variables: Tree, groups: Iterable[int] | None = None) -> "ArrayRecord":
        """Variables as what Flower sends; exact, whatever their dtypes.

        Args:
          variables: leaves of the shapes and dtypes of `like`.
          groups: of the subset mode, those that are sent; None for all.

        Raises:
          ImportError: without flwr.
          ValueError: for variables that are not as `like`.
        """
        need_flwr()
        leaves = trees.flatten_names(variables)
        found = {}
        for key, name, axis, group, shape, dtype in self._parts(groups):
            if name not in leaves:
                raise ValueError(f"variables have no {name!r}; they must be as `like` is")
            value = np.asarray(leaves[name])
            value = value if axis == SHARED else np.take(value, group, axis)
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"variables: {key!r} must be {dtype} {shape}, got {value.dtype} {value.shape}")
            found[key] = _encoded(value)
        return ArrayRecord(found)

    def read(self, record: Any, groups: Iterable[int] | None = None, fill: Tree = None) -> Tree:
        """Variables from what was sent, every array of which is checked before it is read.

        Args:
          record: of `record`, from whoever it is.
          groups: of the subset mode, those that must be there and no others; None for all.
          fill: variables of which groups that are not sent are taken; None for zeros.

        Returns:
          Arrays of numpy [...], of the structure of `like`.

        Raises:
          Refused: for names that are missing or foreign, other shapes or dtypes, damaged arrays, and numbers that are
            not finite or larger than `LIMIT`.
        """
        groups = None if groups is None else tuple(groups)
        wanted = self.arrays(groups)
        of = "" if groups is None else f" of the groups {list(groups)}"
        if missing := [key for key in wanted if key not in record]:
            raise Refused(f"{listed(missing)} must be there{of} and {'is' if len(missing) == 1 else 'are'} missing")
        if foreign := [key for key in record if key not in wanted]:
            raise Refused(f"{listed(foreign)} came and nothing of that name was expected{of}")
        start = None if fill is None else trees.flatten_names(fill)
        leaves: dict[str, np.ndarray] = {}
        for name, leaf in trees.flatten_names(self.like).items():
            leaves[name] = np.zeros(leaf.shape, leaf.dtype) if start is None else np.array(start[name])
        for key, name, axis, group, shape, dtype in self._parts(groups):
            value = _decoded(key, record[key], shape, np.dtype(dtype))
            where = () if axis == SHARED else (slice(None),) * axis + (group,)
            leaves[name][where] = value
        return trees.unflatten_names(leaves, self.like)

    def _parts(self, groups: Iterable[int] | None):
        """Every array: (key, name of the leaf, axis of its groups or SHARED, group, shape, dtype)."""
        axes = jax.tree.leaves(spread_axes(self.group_axes, self.like))
        leaves = trees.flatten_names(self.like)
        split = self.mode == "subset"
        found = []
        for (name, leaf), axis in zip(leaves.items(), axes, strict=True):
            shape = tuple(leaf.shape)
            if axis != SHARED and not (axis < len(shape) and shape[axis] == self.groups):
                raise ValueError(f"group_axes: {name!r} {shape} must have {self.groups} groups along axis {axis}")
            if not split or axis == SHARED:
                found.append((name, name, SHARED, 0, shape, leaf.dtype))
                continue
            part = shape[:axis] + shape[axis + 1 :]
            for group in range(self.groups) if groups is None else groups:
                found.append((f"g{group}/{name}", name, axis, group, part, leaf.dtype))
        if len({key for key, *_ in found}) != len(found):
            raise ValueError("like: a leaf has the name of one of a group, such as 'g0/...'; call it something else")
        return found


def need_flwr() -> None:
    """Raises ImportError, with what to install, where flwr is missing."""
    if MISSING is not None:
        raise ImportError(f'federation between machines needs flwr ({MISSING}): pip install "jaxeff[flower]"')


def short(value: Any) -> str:
    """A stranger's word, as it may stand in a log."""
    said = repr(value[:80] if isinstance(value, str | list | tuple) else value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def listed(names: Iterable[str]) -> str:
    """The first of a stranger's names."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(short(name) for name in names[:3]) + more


def _stored(dtype: np.dtype) -> np.dtype:
    """What an array is written as: numpy's format has no bfloat16 and the like, their bits are written."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype


def _encoded(value: np.ndarray) -> "Array":
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(value).reshape(value.shape).view(_stored(value.dtype)), allow_pickle=False)
    return Array(dtype=str(value.dtype), shape=tuple(value.shape), stype=STORED, data=file.getvalue())


def _decoded(key: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of somebody else; nothing is allocated before all that it says of itself is found to be as expected."""
    if array.dtype != str(dtype) or tuple(array.shape) != shape or array.stype != STORED:
        came = f"{short(array.dtype)} {short(tuple(array.shape))}"
        raise Refused(f"{key!r} must be {dtype} {shape}, got {came}{'' if array.stype == STORED else ', not of numpy'}")
    stored, bytes_ = _stored(dtype), math.prod(shape) * dtype.itemsize
    if not bytes_ <= len(array.data) <= bytes_ + HEADER:
        raise Refused(f"{key!r} must have {bytes_} bytes after its header, got {len(array.data)} with it")
    file = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("an unknown version")
        header = np.lib.format.read_array_header_1_0(file)
    except Exception as reason:
        raise Refused(f"{key!r} must have a header of numpy, got {short(str(reason))}") from None
    if header != (shape, False, stored) or len(array.data) - file.tell() != bytes_:
        raise Refused(f"{key!r} must hold {stored} {shape}, its header says {short(header)}")
    value = np.frombuffer(array.data, stored, offset=file.tell()).reshape(shape).view(dtype)
    if dtype.kind == "b":
        return value.view(np.uint8) != 0
    if jnp.issubdtype(dtype, jnp.inexact):
        # Sizes of narrow floats are compared in float32, as they have no number as large as the limit.
        wide = value.astype(np.float32) if dtype.itemsize < 4 else value
        if not (np.abs(wide) <= LIMIT).all():
            raise Refused(f"{key!r} must be finite and at most {LIMIT:g}, got {_worst(wide)}")
    return value


def _worst(values: np.ndarray) -> str:
    sizes = np.abs(values)
    bad = values[~(sizes <= LIMIT)].reshape(-1)
    return f"{short(bad[0].item())} among {bad.size} such numbers"
