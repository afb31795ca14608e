"""The original archives of MNIST-like sets and CIFAR: names, checksums, download, and readers in plain NumPy."""

import gzip
import hashlib
import http.client
import os
import pathlib
import queue
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any, NamedTuple

import numpy as np

ANSWER_SECONDS = 0.9  # Leaves room for the rest within the second that a missing data set may take.
STALL_SECONDS = 30.0
_CHUNK = 1 << 20


class ArchiveFile(NamedTuple):
    """A published file: its original name, address, size in bytes, and SHA-256 in hexadecimal."""

    name: str
    url: str
    size: int
    sha256: str


def _idx_files(address: str, *table: tuple[str, int, str]) -> tuple[ArchiveFile, ...]:
    return tuple(ArchiveFile(name, f"{address}/{name}", size, sha256) for name, size, sha256 in table)


# Addresses, sizes and digests are those that tensorflow-datasets 4.9.10 registers for its builders of the same name.
ARCHIVES: dict[str, tuple[ArchiveFile, ...]] = {
    "mnist": _idx_files(
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        ("train-images-idx3-ubyte.gz", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1-ubyte.gz", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images-idx3-ubyte.gz", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels-idx1-ubyte.gz", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
    "fashion_mnist": _idx_files(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        ("train-images-idx3-ubyte.gz", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        ("train-labels-idx1-ubyte.gz", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        ("t10k-images-idx3-ubyte.gz", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        ("t10k-labels-idx1-ubyte.gz", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
    "kmnist": _idx_files(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist",
        ("train-images-idx3-ubyte.gz", 18165135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
        ("train-labels-idx1-ubyte.gz", 29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
        ("t10k-images-idx3-ubyte.gz", 3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
        ("t10k-labels-idx1-ubyte.gz", 5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
    ),
    "cifar10": (
        ArchiveFile(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170052171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    "cifar100": (
        ArchiveFile(
            "cifar-100-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            168513733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
}


class _CifarLayout(NamedTuple):
    folder: str  # inside the archive
    files: dict[str, tuple[str, ...]]  # of each split
    label_bytes: int  # before the pixels of each record
    names: str  # file with the class names


_CIFAR = {
    "cifar10": _CifarLayout(
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
        1,
        "batches.meta.txt",
    ),
    "cifar100": _CifarLayout(
        "cifar-100-binary", {"train": ("train.bin",), "test": ("test.bin",)}, 2, "fine_label_names.txt"
    ),
}


def verify(name: str, folder: pathlib.Path) -> None:
    """Checks that a folder holds the archives of a data set, unchanged.

    Args:
      name: key of `ARCHIVES`.
      folder: where the files lie under their original names.

    Raises:
      FileNotFoundError: files are missing; names each one and its address.
      ValueError: a file's size or SHA-256 is not the published one.
    """
    absent = [file for file in ARCHIVES[name] if not (folder / file.name).is_file()]
    if absent:
        wanted = "\n".join(f"  {file.name} from {file.url}" for file in absent)
        raise FileNotFoundError(f"{folder} lacks {len(absent)} file(s) of data set {name!r}:\n{wanted}")
    for file in ARCHIVES[name]:
        _check(folder / file.name, file, str(folder / file.name))


def opened(url: str, seconds: float) -> Any:
    """Opens an address whose answer has to begin in time.

    Args:
      url: http or https address; proxies are taken from the environment.
      seconds: the longest this call may take until the head of the answer is there: name resolution, connection (to
        the proxy where there is one), TLS handshake and request together.

    Returns:
      The answer, a binary file to read and close. A read that gets nothing for 30 s fails.

    Raises:
      ConnectionError: the host cannot be reached, its answer did not begin in time, or it does not give the file.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
    late = threading.Event()

    def ask() -> None:
        try:
            # An opener of its own, because the one that urlopen shares keeps the proxies of its first call.
            outcome.put(urllib.request.build_opener().open(url, timeout=STALL_SECONDS))
        except Exception as error:
            outcome.put(error)
        if late.is_set():
            _close_left(outcome)

    # A thread, because no time-out of a socket bounds the whole: name resolution has none, and each step starts anew.
    threading.Thread(target=ask, name="jaxeff-download", daemon=True).start()
    host = urllib.parse.urlsplit(url).hostname
    try:
        answer = outcome.get(timeout=seconds)
    except queue.Empty:
        late.set()
        _close_left(outcome)
        raise ConnectionError(f"no network: {host} did not answer within {seconds:g} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()
        raise ConnectionError(f"{url} cannot be downloaded: {answer}") from answer
    if isinstance(answer, Exception):
        reason = getattr(answer, "reason", answer)
        raise ConnectionError(f"no network: {host} cannot be reached: {reason}") from answer
    return answer


def download(name: str, folder: pathlib.Path, answer_seconds: float = ANSWER_SECONDS) -> None:
    """Downloads the archives of a data set that are not in `folder` yet, and checks all of them.

    Args:
      name: key of `ARCHIVES`.
      folder: where to put them; made when it does not exist and the host answers.
      answer_seconds: how long the host may take to begin its first answer; a later one may take 30 s.

    Raises:
      ConnectionError: the host does not answer in time, or the transfer broke off.
      ValueError: what arrived is not the published file.
    """
    seconds = answer_seconds
    for file in ARCHIVES[name]:
        path = folder / file.name
        if path.is_file():
            continue
        answer = opened(file.url, seconds)
        seconds = STALL_SECONDS  # There is a network: what is slow now is worth waiting for.
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{file.name}-{uuid.uuid4().hex}"
        try:
            with answer, temporary.open("wb") as out:
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
            # Before it gets its name, so that a login page of the network, say, is not found there the next time.
            _check(temporary, file, file.url)
            os.replace(temporary, path)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"the download of {file.url} broke off: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
    verify(name, folder)


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a gzip-compressed idx file of unsigned bytes (the format of MNIST).

    Args:
      path: for example `train-images-idx3-ubyte.gz`.

    Returns:
      uint8 array of the shape in the header.

    Raises:
      ValueError: the content is not an idx file of unsigned bytes.
    """
    with gzip.open(path, "rb") as file:
        content = file.read()
    # Header: two zero bytes, 0x08 for unsigned bytes, the rank, then one big-endian 32-bit length per axis.
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it begins with {content[:4]!r}")
    rank = content[3]
    shape = tuple(np.frombuffer(content, ">u4", rank, 4).tolist())
    values = np.frombuffer(content, np.uint8, -1, 4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} holds {values.size} values, but its header says {shape}")
    return values.reshape(shape)


def read_idx_split(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 1] and labels uint8 [N] of the "train" or "test" split, from the original files."""
    prefix = {"train": "train", "test": "t10k"}[split]
    image = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    label = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    if len(image) != len(label):
        raise ValueError(f"{folder}: split {split!r} has {len(image)} images but {len(label)} labels")
    return image[..., None], label


def read_cifar_split(name: str, folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split of a CIFAR binary archive without unpacking it to disk.

    Args:
      name: "cifar10" or "cifar100".
      folder: where the archive lies under its original name.
      split: "train" or "test".

    Returns:
      Images uint8 [N, 32, 32, 3], and labels uint8 [N, L]: L is 1, or 2 for cifar100 (coarse, then fine).
    """
    layout = _CIFAR[name]
    label_bytes = layout.label_bytes
    parts = []
    for file in layout.files[split]:
        content = _member(name, folder, f"{layout.folder}/{file}")
        if len(content) % (label_bytes + 3072):
            raise ValueError(f"{file} of {name} has {len(content)} bytes, not whole records of {label_bytes + 3072}")
        parts.append(np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3072))
    records = np.concatenate(parts)
    image = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(image), records[:, :label_bytes]


def read_cifar_names(name: str, folder: pathlib.Path) -> tuple[str, ...]:
    """Class names of a CIFAR binary archive, in the order of the labels."""
    layout = _CIFAR[name]
    return tuple(_member(name, folder, f"{layout.folder}/{layout.names}").decode().split())


def _check(path: pathlib.Path, file: ArchiveFile, what: str) -> None:
    """Raises ValueError, saying `what` it is about, if the content of a path is not the published file's."""
    size = path.stat().st_size
    if size != file.size:
        raise ValueError(
            f"{what} has {size} bytes, expected {file.size}: it is damaged or another file; get {file.url}"
        )
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.sha256:
        raise ValueError(
            f"{what} has SHA-256 checksum {digest}, expected {file.sha256}: "
            f"it is damaged or another file; get {file.url}"
        )


def _close_left(outcome: queue.SimpleQueue[Any]) -> None:
    """Closes an answer that came after its caller had gone."""
    try:
        answer = outcome.get_nowait()
    except queue.Empty:
        return
    if hasattr(answer, "close"):
        answer.close()


def _member(name: str, folder: pathlib.Path, member: str) -> bytes:
    path = folder / ARCHIVES[name][0].name
    with tarfile.open(path, "r:gz") as archive:
        try:
            content = archive.extractfile(member)
        except KeyError:
            content = None
        if content is None:
            raise ValueError(f"{path} has no file {member}")
        return content.read()
