"""The data sets by name, the order in which places are searched for them, and the error when none has them."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxeff.data import archives, click_logs, detection_sets, digits, local, tfds, traces
from jaxeff.data.dataset import Dataset, DatasetInfo, NotHere, parse_split

__all__ = ["Dataset", "DatasetInfo", "Reader", "load", "names", "register"]

# Returns one whole split, or raises NotHere with one line: the place that was searched and the reason.
Reader = Callable[[str], Dataset]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A data set: its splits, the places to search in order, and what a user can do when none has it."""

    splits: tuple[str, ...]
    readers: tuple[Reader, ...]
    ways: tuple[str, ...]


def load(name: str, split: str = "train") -> Dataset:
    """Loads one split of a data set from the first place that has it.

    Places, in this order: what is embedded (digits only), files in `$JAXEFF_DATA`, prepared TFDS data sets in
    `$TFDS_DATA_DIR`, TFDS download when the network answers. A classification set that lies prepared in
    `$TFDS_DATA_DIR` is also found by its TFDS name when it is not one of `names()`. The schema does not depend on the
    place; the number of rows may (`info.source` and `info.notes` say so).

    >>> load("digits", "train[:100]").arrays["image"].shape
    (100, 8, 8, 1)

    Args:
      name: one of `names()`, or the name of a prepared TFDS classification set.
      split: "train", "test" or "validation" where the data set has it, with an optional slice in rows or per cent:
        "train[:1000]", "train[-500:]", "train[10%:20%]". Where there is no published validation split, slice "train".

    Returns:
      The data set; its arrays may be memory-mapped and read-only.

    Raises:
      TypeError: `name` or `split` is not a string.
      ValueError: unknown name or split, a slice outside the split, or a damaged or unreadable file.
      FileNotFoundError: no place has the data set; names every place that was searched and how to get the data. It
        comes within a second when there is no network.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    wanted = parse_split(split)
    entry = _ENTRIES.get(name) or _prepared_entry(name)
    if wanted.base not in entry.splits:
        hint = "; it has no published validation split, slice 'train', for example 'train[90%:]'"
        raise ValueError(
            f"data set {name!r} has no split {wanted.base!r}; its splits: {', '.join(entry.splits)}"
            + (hint if wanted.base == "validation" else "")
        )
    reasons = []
    for read in entry.readers:
        try:
            whole = read(wanted.base)
        except NotHere as reason:
            reasons.append(str(reason))
            continue
        first, end = wanted.bounds(len(whole))
        arrays = {key: array[first:end] for key, array in whole.arrays.items()}
        return Dataset(name, str(wanted), arrays, whole.info)
    raise FileNotFoundError(_not_found(name, reasons, entry.ways))


def names() -> tuple[str, ...]:
    """Names that `load` knows, in alphabetical order; whether the data is on this machine is another matter."""
    return tuple(sorted(_ENTRIES))


def register(
    name: str,
    read: Reader,
    *,
    splits: Sequence[str] = ("train", "test"),
    how_to_get: str = "",
    overwrite: bool = False,
) -> None:
    """Adds a data set of your own, so that `load` and every job know it.

    Args:
      name: new name.
      read: function from a split ("train") to the whole split as a `Dataset`. It may raise `NotHere("place: reason")`;
        then `load` raises an error with that line.
      splits: names of the splits `read` can be asked for.
      how_to_get: what a user can do when the data is not there; shown in that error.
      overwrite: True replaces a data set of that name.

    Raises:
      TypeError: `name` is not a string or `read` cannot be called.
      ValueError: the name is taken, or there are no splits.
    """
    if not isinstance(name, str) or not callable(read):
        raise TypeError(f"register needs a string and a function, got name={name!r}, read={read!r}")
    if not splits or isinstance(splits, str):
        raise ValueError(f"splits={splits!r} must list at least one split name, such as ('train', 'test')")
    if name in _ENTRIES and not overwrite:
        raise ValueError(f"name={name!r} is taken; pass overwrite=True to replace it, or choose another name")
    _ENTRIES[name] = _Entry(tuple(splits), (read,), (how_to_get,) if how_to_get else ())


def _prepared_entry(name: str) -> _Entry:
    try:
        return _Entry(tfds.prepared_splits(name), (tfds.prepared_reader(name),), ())
    except NotHere:
        prepared = tfds.prepared_names()
        also = f"; prepared in {tfds.data_folder()}: {', '.join(prepared)}" if prepared else ""
        raise ValueError(f"name={name!r} is not a known data set; known: {', '.join(names())}{also}") from None


def _not_found(name: str, reasons: list[str], ways: tuple[str, ...]) -> str:
    lines = [f"data set {name!r} was not found. Searched, in this order:"]
    lines += [f"  {number}. {reason}" for number, reason in enumerate(reasons, 1)]
    if ways:
        lines += ["To get it, do one of:", *(f"  - {way}" for way in ways)]
    if name != "digits":
        lines.append('Always there: load("digits"), 1,797 real handwritten digits of 8x8 pixels.')
    return "\n".join(lines)


def _file_way(file: str) -> str:
    return f"put {file} into a folder and set JAXEFF_DATA to that folder"


def _archive_ways(name: str) -> tuple[str, ...]:
    files = ", ".join(file.name for file in archives.ARCHIVES[name])
    address = archives.ARCHIVES[name][0].url.rsplit("/", 1)[0]
    return (
        f'download {files} from {address} into a folder DIR and run jaxeff.data.prepare("{name}", "DIR")',
        f'run jaxeff.data.prepare("{name}") where there is a network (with answer_seconds=30 if it is slow); '
        "copied elsewhere, the folder it returns is found through TFDS_DATA_DIR",
    )


def _from_file(read: Reader, file: str, splits: tuple[str, ...] = ("train", "test")) -> _Entry:
    return _Entry(splits, (read,), (_file_way(file),))


def _from_archives(name: str, read: Reader | None = None, file: str = "") -> _Entry:
    readers: tuple[Reader, ...] = (tfds.prepared_reader(name), tfds.downloading_reader(name))
    ways = _archive_ways(name)
    if read is not None:
        readers, ways = (read, *readers), (_file_way(file), *ways)
    return _Entry(("train", "test"), readers, ways)


_THREE = ("train", "validation", "test")
_ENTRIES: dict[str, _Entry] = {
    "digits": _Entry(
        ("train", "test"),
        (digits.read_digits, tfds.prepared_reader("digits", "digits8x8")),
        ('install scikit-learn, which holds the images: pip install "jaxeff[data]"',),
    ),
    "mnist": _from_archives("mnist", local.read_mnist, "mnist_20k.npz"),
    "fashion_mnist": _from_archives("fashion_mnist", local.read_fashion_mnist, "fashion_mnist.npz"),
    "kmnist": _from_archives("kmnist"),
    "cifar10": _from_archives("cifar10", local.read_cifar10, "cifar10_jpeg.npz"),
    "cifar10_lossless1k": _from_file(local.read_cifar10_lossless1k, "cifar10_lossless1k.npz", ("train",)),
    "cifar100": _from_archives("cifar100"),
    "usps": _from_file(local.read_usps, "usps.npz"),
    "bccd": _from_file(detection_sets.read_bccd, "bccd.npz", _THREE),
    "criteo": _from_file(click_logs.read_criteo, "criteo_8k.npz", _THREE),
    "avazu": _from_file(click_logs.read_avazu, "avazu_9k.npz", _THREE),
    "movielens": _from_file(traces.read_movielens, "movielens_latest_small.npz", ("train",)),
}
