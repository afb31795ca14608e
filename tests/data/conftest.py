"""Every test has folders of its own and no network; tests marked `data` keep the real data and the real cache."""

import gzip
import hashlib
import io
import tarfile
import urllib.parse

import numpy as np
import pytest

from jaxeff.data import archives


@pytest.fixture(autouse=True)
def folders(request, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(archives, "opened", _silence)
    if request.node.get_closest_marker("data"):
        return
    monkeypatch.setenv("JAXEFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXEFF_DATA", raising=False)


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty folder that $JAXEFF_DATA names."""
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.setenv("JAXEFF_DATA", str(folder))
    return folder


@pytest.fixture
def manual(tmp_path):
    """An empty folder for original archives."""
    folder = tmp_path / "manual"
    folder.mkdir()
    return folder


@pytest.fixture
def write_archives(manual, monkeypatch):
    """Writes small archives under the real file names, makes their checksums the expected ones, returns the rows."""

    def write(name):
        rows = _write_cifar(name, manual) if name.startswith("cifar") else _write_idx(manual)
        files = []
        for file in archives.ARCHIVES[name]:
            content = (manual / file.name).read_bytes()
            files.append(file._replace(size=len(content), sha256=hashlib.sha256(content).hexdigest()))
        monkeypatch.setitem(archives.ARCHIVES, name, tuple(files))
        return rows

    return write


def _silence(url, seconds):
    raise ConnectionError(f"no network: {urllib.parse.urlsplit(url).hostname} did not answer within {seconds} s")


def _write_idx(folder):
    """The idx format as its description states it: magic number, big-endian lengths, bytes."""
    random = np.random.default_rng(0)
    rows = {}
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 12)):
        image = random.integers(0, 256, (count, 28, 28), np.uint8)
        label = random.integers(0, 10, count, np.uint8)
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write((0x00000803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in image.shape))
            file.write(image.tobytes())
        with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write((0x00000801).to_bytes(4, "big") + count.to_bytes(4, "big") + label.tobytes())
        rows[split] = (image[..., None], label)
    return rows


def _write_cifar(name, folder):
    """A record is the label byte(s), then 1024 red, 1024 green and 1024 blue bytes, row by row."""
    random = np.random.default_rng(0)
    inside = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    batches = {
        "cifar10": {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
        "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
    }[name]
    classes = {"cifar10": 10, "cifar100": 100}[name]
    members, rows = {}, {}
    for split, files in batches.items():
        images, labels = [], []
        for file in files:
            image = random.integers(0, 256, (4, 32, 32, 3), np.uint8)
            label = random.integers(0, classes, 4)
            coarse = [bytes([value // 5]) if name == "cifar100" else b"" for value in label]
            members[file] = b"".join(
                first + bytes([value]) + b"".join(one[:, :, channel].tobytes() for channel in range(3))
                for first, value, one in zip(coarse, label.tolist(), image, strict=True)
            )
            images.append(image)
            labels.append(label)
        rows[split] = (np.concatenate(images), np.concatenate(labels))
    names = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}[name]
    members[names] = "\n".join([*(f"class_{number}" for number in range(classes)), ""]).encode()
    with tarfile.open(folder / f"{name[:5]}-{name[5:]}-binary.tar.gz", "w:gz") as archive:
        for file, content in members.items():
            member = tarfile.TarInfo(f"{inside}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return rows
