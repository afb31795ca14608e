"""Readers of the image data files in `$JAXEFF_DATA`: CIFAR-10, Fashion-MNIST, MNIST and USPS."""

import io
import lzma
import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from jaxeff.data.cache import cached_array, file_key
from jaxeff.data.dataset import Dataset, DatasetInfo, NotHere

_DIGITS = tuple("0123456789")

CIFAR10_INFO = DatasetInfo(
    task="classification",
    num_classes=10,
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    citation="Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images",
    licence="none stated by the authors; free research use with citation",
)
FASHION_MNIST_INFO = DatasetInfo(
    task="classification",
    num_classes=10,
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    citation="Xiao, Rasul and Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747",
    licence="MIT (Zalando SE)",
)
MNIST_INFO = DatasetInfo(
    task="classification",
    num_classes=10,
    class_names=_DIGITS,
    citation="LeCun, Cortes and Burges (2010), MNIST handwritten digit database",
    licence="CC BY-SA 3.0",
)
USPS_INFO = DatasetInfo(
    task="classification",
    num_classes=10,
    class_names=_DIGITS,
    citation="Hull (1994), A database for handwritten text recognition research, IEEE TPAMI 16(5)",
    licence="none stated; public research data (AT&T / CEDAR)",
    notes='The published split of "The Elements of Statistical Learning": 7,291 / 2,007 images of 16x16.',
)


def data_file(name: str) -> pathlib.Path:
    """Path of a file in `$JAXEFF_DATA`.

    Args:
      name: file name, for example "usps.npz".

    Returns:
      The existing path.

    Raises:
      NotHere: `JAXEFF_DATA` is not set, names no folder, or the folder lacks the file.
    """
    folder = os.environ.get("JAXEFF_DATA")
    if not folder:
        raise NotHere(f"files in $JAXEFF_DATA: JAXEFF_DATA is not set (it names the folder that holds {name})")
    path = pathlib.Path(folder).expanduser() / name
    if not path.parent.is_dir():
        raise NotHere(f"files in $JAXEFF_DATA: {folder} is not a folder")
    if not path.is_file():
        raise NotHere(f"files in $JAXEFF_DATA: {folder} has no file {name}")
    return path


def read_npz(path: pathlib.Path, *keys: str) -> list[Any]:
    """Arrays of an npz file.

    Args:
      path: the file.
      *keys: names of the arrays wanted.

    Returns:
      The arrays, in the order of `keys`.

    Raises:
      ValueError: the file is damaged or lacks one of the arrays.
    """
    # np.load leaves a file open that it cannot read, and takes anything that is no zip file for a pickle.
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is damaged or not an npz file; copy it again")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                absent = [key for key in keys if key not in archive.files]
                if absent:
                    raise ValueError(f"{path} has no array {', '.join(absent)}; it holds {', '.join(archive.files)}")
                return [archive[key] for key in keys]
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again") from error


def read_cifar10(split: str) -> Dataset:
    """Reads CIFAR-10 from `cifar10_jpeg.npz` (JPEG quality about 75), decoded once into the cache folder.

    Args:
      split: "train" (50,000 images) or "test" (10,000). Every prefix whose length is a multiple of 10 is balanced.

    Returns:
      Data set with `image` uint8 [N, 32, 32, 3] (memory-mapped) and `label` int32 [N].

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    path = data_file("cifar10_jpeg.npz")
    (label,) = read_npz(path, f"{split}_label")

    def decode(out: np.ndarray) -> None:
        header, body, offset = read_npz(path, "header", f"{split}_jpeg", f"{split}_offset")
        for row in range(len(out)):
            out[row] = decode_jpeg(header.tobytes() + body[offset[row] : offset[row + 1]].tobytes())

    image = cached_array(f"cifar10_jpeg-{split}", file_key(path), (len(label), 32, 32, 3), np.uint8, decode)
    notes = "Pixels went through JPEG (about 30 dB PSNR): compare numbers with each other, not with published ones."
    return _images("cifar10", split, image, label, CIFAR10_INFO, notes)


def read_cifar10_lossless1k(split: str) -> Dataset:
    """Reads the first 1,000 training images of CIFAR-10, exact pixels, from `cifar10_lossless1k.npz`.

    Args:
      split: "train", the only one.

    Returns:
      Data set with `image` uint8 [1000, 32, 32, 3], `label` int32 [1000] and `class_index` int32 [1000]: the image is
      the `class_index`-th of its class in the original order. Image `i` of `load("cifar10")` is the
      `(i // 10)`-th of its class, which pairs the two.

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    path = data_file("cifar10_lossless1k.npz")
    image, label, class_index = read_npz(path, "image", "label", "class_index")
    dataset = _images(
        "cifar10_lossless1k", split, image, label, CIFAR10_INFO, "The head of data_batch_1; no test split."
    )
    arrays = {**dataset.arrays, "class_index": class_index.astype(np.int32)}
    return Dataset(dataset.name, split, arrays, dataset.info)


def read_fashion_mnist(split: str) -> Dataset:
    """Reads Fashion-MNIST from `fashion_mnist.npz`, unpacked once into the cache folder.

    Args:
      split: "train" (60,000 images) or "test" (10,000), original order.

    Returns:
      Data set with `image` uint8 [N, 28, 28, 1] (memory-mapped) and `label` int32 [N].

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    return _read_grey("fashion_mnist", "fashion_mnist.npz", split, FASHION_MNIST_INFO, "")


def read_mnist(split: str) -> Dataset:
    """Reads MNIST from `mnist_20k.npz`, unpacked once into the cache folder.

    Args:
      split: "train" (the first 20,000 training images) or "test" (10,000), original order.

    Returns:
      Data set with `image` uint8 [N, 28, 28, 1] (memory-mapped) and `label` int32 [N].

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    notes = "Only the first 20,000 of the 60,000 training images."
    return _read_grey("mnist", "mnist_20k.npz", split, MNIST_INFO, notes)


def read_usps(split: str) -> Dataset:
    """Reads the USPS zip-code digits from `usps.npz`.

    Args:
      split: "train" (7,291 images) or "test" (2,007), the published split.

    Returns:
      Data set with `image` uint8 [N, 16, 16, 1] (ink 255, paper 0) and `label` int32 [N]. The file has 2,001 grey
      levels; they are scaled to 0..255 and the fraction is dropped.

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    milli, label = read_npz(data_file("usps.npz"), f"{split}_milli", f"{split}_label")
    # Dropped and not rounded: this keeps the reference accuracy of the exact levels (ridge classifier, 0.8759), where
    # rounding tips one test image that lies on the border between two classes (0.8764).
    image = ((milli.astype(np.int32) + 1000) * 255 // 2000).astype(np.uint8)
    return _images("usps", split, image[..., None], label, USPS_INFO, USPS_INFO.notes)


def decode_jpeg(content: bytes) -> np.ndarray:
    """Decodes an encoded image with Pillow.

    Args:
      content: a complete JPEG (or PNG) file.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError('decoding JPEG images needs Pillow; install it with pip install "jaxeff[data]"') from None
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _read_grey(name: str, file: str, split: str, info: DatasetInfo, notes: str) -> Dataset:
    path = data_file(file)
    (label,) = read_npz(path, f"{split}_label")

    def unpack(out: np.ndarray) -> None:
        (image,) = read_npz(path, f"{split}_image")
        out[:] = image[..., None]

    # Unpacking LZMA takes seconds for 60,000 images; mapping the cached array takes none.
    image = cached_array(f"{path.stem}-{split}", file_key(path), (len(label), 28, 28, 1), np.uint8, unpack)
    return _images(name, split, image, label, info, notes)


def _images(name: str, split: str, image: np.ndarray, label: np.ndarray, info: DatasetInfo, notes: str) -> Dataset:
    info = DatasetInfo(**{**vars(info), "source": "local", "notes": notes})
    return Dataset(name, split, {"image": image, "label": label.astype(np.int32)}, info)
