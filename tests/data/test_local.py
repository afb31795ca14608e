import io
import sys

import numpy as np
import pytest
from PIL import Image

from jaxeff import data
from jaxeff.data import cache, local

RANDOM = np.random.default_rng(0)


def _grey(folder, file, train=12, test=5):
    arrays = {}
    for split, rows in (("train", train), ("test", test)):
        arrays[f"{split}_image"] = RANDOM.integers(0, 256, (rows, 28, 28), np.uint8)
        arrays[f"{split}_label"] = RANDOM.integers(0, 10, rows, np.uint8)
    np.savez(folder / file, **arrays)
    return arrays


def _cifar(folder):
    """Three training and two test images as JPEG files that share a header, as in cifar10_jpeg.npz."""
    arrays, decoded = {}, {}
    for split, rows in (("train", 3), ("test", 2)):
        files = []
        for _ in range(rows):
            with io.BytesIO() as file:
                Image.fromarray(RANDOM.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG", quality=75)
                files.append(file.getvalue())
        decoded[split] = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        arrays["header"] = np.frombuffer(files[0][:600], np.uint8)
        assert all(file.startswith(arrays["header"].tobytes()) for file in files)
        bodies = [file[600:] for file in files]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(bodies), np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, bodies)]).astype(np.uint32)
        arrays[f"{split}_label"] = np.arange(rows, dtype=np.uint8)
        arrays[f"{split}_class_index"] = np.zeros(rows, np.uint16)
    np.savez(folder / "cifar10_jpeg.npz", **arrays)
    return decoded


@pytest.mark.parametrize(("name", "file"), [("fashion_mnist", "fashion_mnist.npz"), ("mnist", "mnist_20k.npz")])
def test_grey_images_get_a_channel_axis(data_folder, name, file):
    written = _grey(data_folder, file)
    loaded = data.load(name, "test")
    np.testing.assert_array_equal(loaded.arrays["image"], written["test_image"][:, :, :, None])
    np.testing.assert_array_equal(loaded.arrays["label"], written["test_label"])
    assert loaded.arrays["label"].dtype == np.int32
    assert loaded.info.source == "local"


def test_cifar10_is_decoded_from_jpeg(data_folder):
    decoded = _cifar(data_folder)
    for split in ("train", "test"):
        np.testing.assert_array_equal(data.load("cifar10", split).arrays["image"], decoded[split])


def test_cifar10_is_decoded_only_once(data_folder, monkeypatch):
    _cifar(data_folder)
    first = data.load("cifar10").arrays["image"]
    monkeypatch.setattr(local, "decode_jpeg", None)
    np.testing.assert_array_equal(data.load("cifar10").arrays["image"], first)


def test_changed_file_is_decoded_again(data_folder):
    _grey(data_folder, "mnist_20k.npz")
    data.load("mnist")
    written = _grey(data_folder, "mnist_20k.npz")
    np.testing.assert_array_equal(data.load("mnist").arrays["image"][..., 0], written["train_image"])
    assert len(list(cache.cache_folder().iterdir())) == 2


def test_missing_pillow_names_the_extra(data_folder, monkeypatch):
    _cifar(data_folder)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"jaxeff\[data\]"):
        data.load("cifar10")


def test_lossless_head_keeps_the_pairing_index(data_folder):
    image = RANDOM.integers(0, 256, (4, 32, 32, 3), np.uint8)
    label, index = np.array([6, 9, 9, 4], np.uint8), np.array([0, 0, 1, 0], np.uint16)
    np.savez(data_folder / "cifar10_lossless1k.npz", image=image, label=label, class_index=index)
    arrays = data.load("cifar10_lossless1k").arrays
    np.testing.assert_array_equal(arrays["image"], image)
    assert arrays["class_index"].tolist() == [0, 0, 1, 0]


def test_usps_levels_become_bytes(data_folder):
    levels = np.arange(-1000, 1001, dtype=np.int16)
    milli = np.resize(levels, (8, 16, 16))
    arrays = {"train_milli": milli, "train_label": np.zeros(8, np.uint8)}
    np.savez(data_folder / "usps.npz", **arrays)
    expected = np.floor(
        (milli.astype(np.float64) + 1000) / 2000 * 255 + 1e-9
    )  # 1e-9: whole numbers that float64 misses
    np.testing.assert_array_equal(data.load("usps").arrays["image"][..., 0], expected)


def test_data_folder_that_does_not_exist_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXEFF_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        data.load("usps")


@pytest.mark.parametrize("length", [100, 3000, -1])
def test_damaged_file_is_named(data_folder, length):
    path = data_folder / "usps.npz"
    np.savez_compressed(path, train_milli=RANDOM.integers(0, 999, (9, 16, 16)), train_label=np.zeros(9, np.uint8))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="usps.npz is damaged"):
        data.load("usps")


def test_file_with_flipped_bytes_is_named(data_folder):
    path = data_folder / "usps.npz"
    np.savez_compressed(path, train_milli=RANDOM.integers(0, 999, (9, 16, 16)), train_label=np.zeros(9, np.uint8))
    content = bytearray(path.read_bytes())
    content[500:520] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="usps.npz is damaged"):
        data.load("usps")


def test_file_that_is_no_archive_is_named(data_folder):
    (data_folder / "usps.npz").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="usps.npz is damaged"):
        data.load("usps")


def test_file_with_other_arrays_lists_what_it_holds(data_folder):
    np.savez(data_folder / "usps.npz", something=np.zeros(3))
    with pytest.raises(ValueError, match="has no array train_milli, train_label; it holds something"):
        data.load("usps")
