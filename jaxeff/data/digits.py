"""The embedded data set: 1,797 real handwritten digits of 8x8 pixels that ship with scikit-learn."""

import functools
import importlib.util
import pathlib

import numpy as np

from jaxeff.data.dataset import Dataset, DatasetInfo, NotHere

TEST_SIZE = 360
_SPLIT_SEED = 8  # Any number does; it is part of the data set's definition and may never change.

INFO = DatasetInfo(
    task="classification",
    num_classes=10,
    class_names=tuple("0123456789"),
    source="embedded",
    citation="Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI, doi 10.24432/C50P49",
    licence="CC BY 4.0",
    notes="No published split for this subset: a fixed stratified split of 1,437 / 360 images made by jaxeff.",
)


def read_digits(split: str) -> Dataset:
    """Reads the digits that ship with scikit-learn.

    Grey levels 0..16 are scaled to 0..255. The 1,797 images have no published split, so there is a fixed one: an order
    is drawn from the raw 64-bit stream of NumPy's Philox generator (a stream NumPy promises never to change), and the
    first images of each class in that order are the test images. The 360 test images are shared out among the classes
    in proportion to the class sizes by the method of largest remainders. Rows keep the drawn order, so a prefix such as
    "train[:200]" is a random sample. Images of one writer may fall on both sides.

    Args:
      split: "train" (1,437 images) or "test" (360).

    Returns:
      Data set with `image` uint8 [N, 8, 8, 1] and `label` int32 [N].

    Raises:
      NotHere: scikit-learn is not installed.
    """
    image, label = _digits()
    train, test = split_rows(label, TEST_SIZE)
    rows = train if split == "train" else test
    return Dataset("digits", split, {"image": image[rows], "label": label[rows]}, INFO)


def split_rows(label: np.ndarray, test_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows into train and test, stratified by class and always in the same way.

    Args:
      label: int [N], classes 0 .. K - 1.
      test_size: number of test rows, 0 < test_size < N.

    Returns:
      `(train, test)`: int64 row numbers in the drawn order.
    """
    order = np.argsort(np.random.Philox(_SPLIT_SEED).random_raw(len(label)), kind="stable")
    sizes = np.bincount(label)
    # Largest remainders, in whole numbers: quota = size * test_size / N.
    counts, remainders = np.divmod(sizes * test_size, len(label))
    counts[np.argsort(-remainders, kind="stable")[: test_size - counts.sum()]] += 1
    is_test = np.zeros(len(label), bool)
    for number, count in enumerate(counts):
        of_class = order[label[order] == number]
        is_test[of_class[:count]] = True
    return order[~is_test[order]], order[is_test[order]]


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise NotHere(
            'the digits that ship with scikit-learn: scikit-learn is not installed (pip install "jaxeff[data]")'
        )
    # The file itself, as importing scikit-learn takes seconds.
    path = pathlib.Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        table = np.loadtxt(path, np.int32, delimiter=",")
        sixteenths, label = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    else:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        sixteenths, label = bunch.images.astype(np.int32), bunch.target.astype(np.int32)
    image = ((sixteenths * 255 + 8) // 16).astype(np.uint8)[..., None]
    return image, label
