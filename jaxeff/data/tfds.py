"""TFDS without TensorFlow: writes array_record directories, and reads those that were prepared anywhere."""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxeff.data import archives, digits, local
from jaxeff.data.cache import cached_array
from jaxeff.data.dataset import Dataset, DatasetInfo, NotHere

FILE_FORMAT = "array_record"
_NAME = re.compile(r"\w+(/[\w.-]+)?")
_PARQUET = (
    "tensorflow-datasets 4.9.10 silently loses rows when it writes parquet (1,000 examples in, 400 out, and the "
    "metadata still says 1,000), so jaxeff neither writes nor reads it"
)
_KMNIST_INFO = DatasetInfo(
    task="classification",
    num_classes=10,
    class_names=tuple("0123456789"),
    citation="Clanuwat et al. (2018), Deep Learning for Classical Japanese Literature, arXiv:1812.01718",
    licence="CC BY-SA 4.0",
)
# TFDS name: version of the official builder with the same features (ours for digits8x8), and what is known.
_BUILDERS: dict[str, tuple[str, DatasetInfo]] = {
    "digits8x8": ("1.0.0", digits.INFO),
    "mnist": ("3.0.1", local.MNIST_INFO),
    "fashion_mnist": ("3.0.1", local.FASHION_MNIST_INFO),
    "kmnist": ("3.0.1", _KMNIST_INFO),
    "cifar10": ("3.0.2", local.CIFAR10_INFO),
    "cifar100": ("3.0.2", DatasetInfo("classification", 100, citation=local.CIFAR10_INFO.citation)),
}


def data_folder() -> pathlib.Path:
    """Folder of prepared TFDS data sets: `$TFDS_DATA_DIR`, or TFDS's own default when that is not set."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepare(
    name: str,
    manual_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    *,
    file_format: str = FILE_FORMAT,
    answer_seconds: float = archives.ANSWER_SECONDS,
) -> pathlib.Path:
    """Writes a data set as a prepared TFDS directory, without TensorFlow and, given the archives, without a network.

    Rows keep their original order. The directory has the features of the official TFDS builder, so
    `tfds.data_source(name, data_dir=...)` reads it as well.

    Args:
      name: "digits8x8", "mnist", "fashion_mnist", "kmnist", "cifar10" or "cifar100".
      manual_dir: folder with the original archives under their original names (`archives.ARCHIVES` lists them); their
        sizes and SHA-256 checksums are checked. None downloads them to `<data_dir>/downloads/<name>`.
      data_dir: where to write; None means `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` when that is not set.
      file_format: "array_record", the only one that works.
      answer_seconds: how long the host may take to begin its first answer; more than the default suits a slow network.

    Returns:
      The prepared directory, `<data_dir>/<name>/<version>`. It is left as it is when it exists already.

    Raises:
      ValueError: unknown `name` or `file_format`, or an archive whose checksum is wrong.
      FileNotFoundError: `manual_dir` lacks an archive.
      ConnectionError: `manual_dir` is None and the host does not answer within `answer_seconds`, or stops in between.
      ImportError: tensorflow-datasets or array_record is not installed.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name={name!r} cannot be prepared; valid names: {', '.join(_BUILDERS)}")
    _check_format(file_format, "file_format")
    to = pathlib.Path(data_dir).expanduser() if data_dir is not None else data_folder()
    prepared = to / name / _BUILDERS[name][0]
    if (prepared / "dataset_info.json").is_file():
        _check_format(_format_of(prepared), str(prepared))
        return prepared
    _require_tfds()
    folder = pathlib.Path(manual_dir).expanduser() if manual_dir is not None else to / "downloads" / name
    if name in archives.ARCHIVES:
        if manual_dir is not None:
            archives.verify(name, folder)
        else:
            archives.download(name, folder, answer_seconds)
    # Imported only now: it takes most of a second, which a missing archive or network need not wait for.
    builder = _builder_class(_import_tfds(), name, folder)(data_dir=str(to), file_format=FILE_FORMAT)
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def prepared_reader(name: str, tfds_name: str | None = None) -> Callable[[str], Dataset]:
    """Makes the reader of a classification set that lies prepared in `$TFDS_DATA_DIR`.

    Args:
      name: name in the registry.
      tfds_name: name in TFDS, with the config when there is one ("mnist_corrupted/shot_noise"); None means `name`.

    Returns:
      Function from a split to the data set, which raises `NotHere` when there is no prepared directory.
    """
    return functools.partial(_read_prepared, name, tfds_name or name)


def downloading_reader(name: str) -> Callable[[str], Dataset]:
    """Makes the reader that downloads and prepares a data set of `archives.ARCHIVES` when the network answers.

    Args:
      name: name in the registry and in TFDS.

    Returns:
      Function from a split to the data set, which raises `NotHere` within a second when there is no network.
    """
    return functools.partial(_read_downloaded, name)


def prepared_names() -> tuple[str, ...]:
    """TFDS names (with configs) that lie prepared in `$TFDS_DATA_DIR`, in alphabetical order."""
    root = data_folder()
    found = {path.parent.parent.relative_to(root).as_posix() for path in _information_files(root, "*")}
    found |= {path.parent.parent.relative_to(root).as_posix() for path in _information_files(root, "*/*")}
    return tuple(sorted(found - {"."}))


def prepared_splits(tfds_name: str) -> tuple[str, ...]:
    """Splits of a prepared data set; raises `NotHere` when it is not prepared."""
    information = json.loads((_directory(tfds_name) / "dataset_info.json").read_text())
    return tuple(split["name"] for split in information["splits"])


def _read_downloaded(name: str, split: str) -> Dataset:
    try:
        _require_tfds()
    except ImportError as error:
        raise NotHere(f"TFDS download: {error}") from error
    try:
        prepare(name)
    except ConnectionError as error:
        raise NotHere(f"TFDS download: {error}") from error
    return _read_prepared(name, name, split)


def _read_prepared(name: str, tfds_name: str, split: str) -> Dataset:
    directory = _directory(tfds_name)
    builder = _import_tfds().builder_from_directory(str(directory))
    features = builder.info.features
    if split not in builder.info.splits:
        raise ValueError(f"{directory} has no split {split!r}; its splits: {', '.join(builder.info.splits)}")
    shape = features["image"].shape if "image" in features else ()
    if "label" not in features or len(shape) != 3 or None in shape:
        raise ValueError(
            f"{directory} cannot be read as a classification set: it needs the features 'image' of a fixed shape "
            f"[H, W, C] and 'label', but has {dict(features.items())}"
        )
    length = builder.info.splits[split].num_examples

    @functools.cache
    def decoded() -> tuple[np.ndarray, np.ndarray]:
        image, label = np.empty((length, *shape), np.uint8), np.empty(length, np.int32)
        for row, example in enumerate(builder.as_data_source(split)):
            image[row], label[row] = example["image"], example["label"]
        return image, label

    # Decoding 60,000 PNG images takes 15 to 30 s on two cores; mapping the decoded array takes none.
    cache_name, key = f"tfds-{tfds_name.replace('/', '-')}-{split}", _directory_key(directory)
    image = cached_array(
        f"{cache_name}-image", key, (length, *shape), np.uint8, lambda out: np.copyto(out, decoded()[0])
    )
    label = cached_array(f"{cache_name}-label", key, (length,), np.int32, lambda out: np.copyto(out, decoded()[1]))
    known = _BUILDERS[tfds_name][1] if tfds_name in _BUILDERS else None
    info = DatasetInfo(
        task="classification",
        num_classes=features["label"].num_classes,
        class_names=tuple(features["label"].names),
        source="tfds",
        citation=known.citation if known else builder.info.citation,
        licence=known.licence if known else "",
        notes=f"Prepared by TFDS in {directory}; rows in the order of that directory.",
    )
    return Dataset(name, split, {"image": image, "label": label}, info)


def _builder_class(tfds: Any, name: str, folder: pathlib.Path) -> type:
    """A TFDS builder that needs no TensorFlow: archives are read with NumPy, images are encoded by Pillow."""
    version, known = _BUILDERS[name]
    class_names = archives.read_cifar_names(name, folder) if name.startswith("cifar") else known.class_names
    features: dict[str, Any]
    if name == "digits8x8":
        # Raw tensors: for 64 bytes an image codec costs more than it saves.
        features = {"image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)}
    else:
        shape = (32, 32, 3) if name.startswith("cifar") else (28, 28, 1)
        features = {"image": tfds.features.Image(shape=shape, encoding_format="png")}
    if name.startswith("cifar"):
        features["id"] = tfds.features.Text()
    if name == "cifar100":
        features["coarse_label"] = tfds.features.ClassLabel(num_classes=20)
    features["label"] = tfds.features.ClassLabel(names=class_names)

    # Not registered with TFDS: the official builder of the same name may be imported too.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=known.notes or name,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                citation=known.citation,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split):
            yield from enumerate(_examples(name, folder, split))

    Builder.name = name
    return Builder


def _examples(name: str, folder: pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    if name == "digits8x8":
        arrays = digits.read_digits(split).arrays
        yield from (
            {"image": image, "label": label} for image, label in zip(arrays["image"], arrays["label"], strict=True)
        )
        return
    from PIL import Image  # With a NumPy array TFDS would call TensorFlow's encoder; with a Pillow image it does not.

    if not name.startswith("cifar"):
        image, label = archives.read_idx_split(folder, split)
        for row in range(len(image)):
            yield {"image": Image.fromarray(image[row, ..., 0]), "label": int(label[row])}
        return
    image, labels = archives.read_cifar_split(name, folder, split)
    for row in range(len(image)):
        example = {"id": f"{split}_{row:05d}", "image": Image.fromarray(image[row]), "label": int(labels[row, -1])}
        if name == "cifar100":
            example["coarse_label"] = int(labels[row, 0])
        yield example


def _directory(tfds_name: str) -> pathlib.Path:
    """The newest readable prepared version of a data set."""
    root = data_folder()
    where = "prepared TFDS data sets in $TFDS_DATA_DIR"
    if not os.environ.get("TFDS_DATA_DIR"):
        where += f" (not set, so {root})"
    if not root.is_dir():
        raise NotHere(f"{where}: {root} is not a folder")
    if not _NAME.fullmatch(tfds_name):  # It becomes part of a file pattern below.
        raise NotHere(f"{where}: {tfds_name!r} is not a TFDS name")
    found = [path.parent for path in _information_files(root, tfds_name)]
    if not found:
        raise NotHere(f"{where}: {root} has no prepared {tfds_name}")
    found.sort(key=lambda path: [int(part) for part in path.name.split(".")])
    for directory in reversed(found):
        if _format_of(directory) == FILE_FORMAT:
            return directory
    _check_format(_format_of(found[-1]), str(found[-1]))
    raise AssertionError("a format other than array_record was refused above")


def _information_files(root: pathlib.Path, tfds_name: str) -> list[pathlib.Path]:
    versions = root.glob(f"{tfds_name}/*/dataset_info.json")
    return [path for path in versions if all(part.isdigit() for part in path.parent.name.split("."))]


def _format_of(directory: pathlib.Path) -> str:
    # A directory whose information names no format was written as tfrecord, TFDS's default.
    return json.loads((directory / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")


def _check_format(file_format: str, what: str) -> None:
    if file_format == "parquet":
        raise ValueError(f"{what} has the format 'parquet': {_PARQUET}. Prepare it as file_format='{FILE_FORMAT}'.")
    if file_format != FILE_FORMAT:
        raise ValueError(
            f"{what} has the format {file_format!r}, which cannot be read at random without TensorFlow; "
            f"prepare it as file_format='{FILE_FORMAT}' (jaxeff.data.prepare does)"
        )


def _directory_key(directory: pathlib.Path) -> str:
    # Sizes and time stamps, because a prepared directory may hold many gigabytes.
    files = sorted(path for path in directory.iterdir() if path.is_file())
    text = "\n".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
    return hashlib.sha256(f"{directory}\n{text}".encode()).hexdigest()[:16]


def _require_tfds() -> None:
    absent = [name for name in ("tensorflow_datasets", "array_record") if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f'{" and ".join(absent)} is not installed; TFDS data sets need pip install "jaxeff[data]"')


def _import_tfds() -> Any:
    _require_tfds()
    import tensorflow_datasets

    return tensorflow_datasets
