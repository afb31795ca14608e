"""What storage devices do: reads per second and latency by queue depth, smallest read, wear, watts and price.

`PRESETS` has one profile for each technology, to plan with before there is a device; `calibrate` measures the one that
is there, by the same readers that will read from it.

Origins. Idle latency, peak rate, smallest read and drive writes per day are orders of magnitude, recalled of
"Supporting Massive DLRM Inference Through Software Defined Memory" (arXiv 2110.11489) and in line with public data
sheets [recalled]; where those give a range, a value inside it. Watts, price and capacity of a drive are round figures
of drives as they were sold [ours], and so is the shape of the curve between idle and peak [ours]. Replace what matters
by what you measured or paid.
"""

import dataclasses
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np

from jaxeff.sdm.io.files import Direct
from jaxeff.sdm.io.reader import Backend, Reader, open_reader

# Sharpness of the knee of a preset's curve: latency = (idle^p + (depth / peak)^p)^(1/p). [ours]
KNEE = 3.0
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """A storage device as the planner sees it.

    Attributes:
      name: for people.
      depths: numbers of outstanding reads at which it is known, increasing.
      rates: reads per second at each of them. Latency follows: depth / rate (Little's law).
      granularity: bytes of the smallest read.
      dwpd: drive writes per day for which it is rated; infinite where writing does not wear it.
      watts: of one device that reads.
      dollars_per_gb: of its capacity, 1 GB = 1e9 bytes.
      capacity_bytes: of one device.
      origin: where the numbers are from.
    """

    name: str
    depths: tuple[float, ...]
    rates: tuple[float, ...]
    granularity: int
    dwpd: float
    watts: float
    dollars_per_gb: float
    capacity_bytes: float
    origin: str = "given"

    def __post_init__(self) -> None:
        if not self.depths or len(self.depths) != len(self.rates):
            raise ValueError(
                f"{self.name}: depths and rates must be equally many, got {len(self.depths)} and {len(self.rates)}"
            )
        if self.depths[0] <= 0 or np.any(np.diff(self.depths) <= 0):
            raise ValueError(f"{self.name}: depths must be above 0 and increase, got {self.depths}")
        positive = {
            "rates": min(self.rates),
            "granularity": self.granularity,
            "dwpd": self.dwpd,
            "capacity_bytes": self.capacity_bytes,
        }
        for field, value in positive.items():
            if not value > 0:
                raise ValueError(f"{self.name}: {field} must be above 0, got {value}")
        for field in ("watts", "dollars_per_gb"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{self.name}: {field} must not be negative, got {getattr(self, field)}")

    def iops(self, depth: float) -> float:
        """Reads per second with so many outstanding.

        Between known depths both are taken on logarithmic scales; below them latency stays, above them the rate.

        >>> PRESETS["nand"].iops(1) < PRESETS["nand"].iops(32) < PRESETS["nand"].peak
        True
        """
        if not depth > 0:
            raise ValueError(f"depth must be above 0 outstanding reads, got {depth}")
        if depth <= self.depths[0]:
            return self.rates[0] * depth / self.depths[0]
        return float(np.exp(np.interp(np.log(depth), np.log(self.depths), np.log(self.rates))))

    def latency(self, depth: float) -> float:
        """Seconds of one read among so many outstanding, on average."""
        return depth / self.iops(depth)

    @property
    def peak(self) -> float:
        """Reads per second at the best depth."""
        return max(self.rates)

    def knee(self, share: float = 0.9) -> float:
        """The least known depth that gives a share of the peak: more outstanding reads mostly wait for each other.

        Args:
          share: of the peak, above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        return next(depth for depth, rate in zip(self.depths, self.rates, strict=True) if rate >= share * self.peak)


def curve(idle_seconds: float, peak: float, depths: Sequence[float] = DEPTHS) -> tuple[float, ...]:
    """Reads per second at some depths of a device of which only two numbers are known.

    Args:
      idle_seconds: of a read alone.
      peak: reads per second with any number outstanding.
      depths: to know it at.

    >>> [round(rate) for rate in curve(1e-4, 1e5, (1, 1000))]
    [9997, 100000]
    """
    wait = [(idle_seconds**KNEE + (depth / peak) ** KNEE) ** (1 / KNEE) for depth in depths]
    return tuple(depth / seconds for depth, seconds in zip(depths, wait, strict=True))


_ORIGIN = "order of magnitude: recalled, and public data sheets; watts, price, capacity and curve are ours"


def _preset(
    name: str, idle: float, peak: float, granularity: int, dwpd: float, watts: float, dollars_per_gb: float, size: float
) -> DeviceProfile:
    rates = curve(idle, peak)
    return DeviceProfile(name, DEPTHS, rates, granularity, dwpd, watts, dollars_per_gb, size, _ORIGIN)


PRESETS: Mapping[str, DeviceProfile] = {
    # Latency of NAND has a fat tail that a mean does not show: ask for headroom.
    "nand": _preset("NAND flash NVMe", 90e-6, 0.75e6, 4096, 3, 12, 0.1, 4e12),
    "znand": _preset("Z-NAND", 20e-6, 0.85e6, 4096, 7, 10, 1.0, 0.8e12),
    # The rate is that of 512-byte reads; in 4 KiB it is a third of that.
    "optane": _preset("3DXP Optane SSD", 7e-6, 4.5e6, 512, 100, 18, 2.0, 1.6e12),
    "optane_dimm": _preset("3DXP DIMM", 0.3e-6, 10e6, 64, 300, 15, 5.0, 0.5e12),
    "cxl": _preset("CXL memory", 0.8e-6, 10e6, 64, math.inf, 12, 5.0, 0.25e12),
}


def calibrate(
    path: str | os.PathLike[str],
    *,
    depths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    block: int | None = None,
    seconds: float = 0.1,
    repeats: int = 3,
    size: int = 2**28,
    like: DeviceProfile = PRESETS["nand"],
    backend: Backend = "auto",
    direct: Direct = "auto",
    seed: int = 0,
) -> DeviceProfile:
    """Measures the device on which a file or folder lies, by random reads of single blocks.

    What is measured is what a reader of `jaxeff.sdm.io` gets, with the processor it has. Where reads go through the
    page cache the file is dropped from it before each measurement; another process that uses the file spoils this.

    Args:
      path: of a file of at least 128 blocks, better of gigabytes; or of a folder, where a file of `size` random bytes
        is made and removed again.
      depths: numbers of outstanding reads to measure, increasing; "pread" has as many threads.
      block: bytes of a read; None for the smallest that the reader makes.
      seconds: each measurement takes about so long.
      repeats: of each depth, in turn; the median counts.
      size: bytes of the file made in a folder.
      like: wear, watts, price and capacity are taken from it, as no measurement tells.
      backend: as of `open_reader`.
      direct: as of `open_reader`.
      seed: of the places read.

    Returns:
      The profile; `granularity` is the bytes of a read.

    Raises:
      ValueError: for depths that are none or do not increase, repeats below 1 or a file too small.
      OSError: as `open_reader`, or if the file cannot be made.
    """
    path = pathlib.Path(path)
    if not len(depths) or depths[0] < 1 or np.any(np.diff(depths) <= 0):
        raise ValueError(f"depths must be at least one, from 1 up and increasing, got {tuple(depths)}")
    if repeats < 1 or not seconds > 0:
        raise ValueError(f"repeats must be at least 1 and seconds above 0, got {repeats} and {seconds}")
    if path.is_dir():
        with tempfile.NamedTemporaryFile(dir=path, prefix="calibrate-") as file:
            rng = np.random.default_rng(seed)
            for start in range(0, size, 2**24):
                file.write(rng.bytes(min(2**24, size - start)))
            file.flush()
            os.fsync(file.fileno())
            found = _measure(pathlib.Path(file.name), depths, block, seconds, repeats, backend, direct, seed)
    else:
        found = _measure(path, depths, block, seconds, repeats, backend, direct, seed)
    rates, granularity, how = found
    return dataclasses.replace(
        like, name="measured", depths=tuple(map(float, depths)), rates=rates, granularity=granularity,
        origin=f"measured by {how}; wear, watts, price and capacity as of {like.name}",
    )  # fmt: skip


def _measure(
    path: pathlib.Path,
    depths: Sequence[int],
    block: int | None,
    seconds: float,
    repeats: int,
    backend: Backend,
    direct: Direct,
    seed: int,
) -> tuple[tuple[float, ...], int, str]:
    rng = np.random.default_rng(seed)
    rates: list[list[float]] = [[] for _ in depths]
    for _ in range(repeats):
        for depth, found in zip(depths, rates, strict=True):
            with open_reader(
                [path], backend=backend, direct=direct, queue_depth=depth, threads=min(depth, 1024), block=block
            ) as reader:
                found.append(_rate(reader, path, depth, seconds, rng))
                how = f"{reader.name}, {'directly' if reader.direct else 'through the page cache'}"
                granularity = reader.block
    return tuple(map(statistics.median, rates)), granularity, how


def _rate(reader: Reader, path: pathlib.Path, depth: int, seconds: float, rng: np.random.Generator) -> float:
    """Reads per second at a depth: of a first try, to know how many take the time, and then of those."""
    places = path.stat().st_size // reader.block // 2
    if places < 64:
        raise ValueError(
            f"path must be a file of at least {128 * reader.block} bytes to measure, got {path.stat().st_size}; "
            "give a larger one, or a folder"
        )
    count = min(places, max(8, 4 * depth))
    while True:
        # Every other block at most, as neighbours would be one read.
        offsets = rng.choice(places, count, replace=False) * (2 * reader.block)
        out = np.empty((count, 1), np.uint8)
        if not reader.direct and hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        reader.gather(np.zeros(count, np.int32), offsets, 1, out)
        took = time.perf_counter() - begun
        if took >= seconds / 2 or count == places:
            return count / took
        count = min(places, math.ceil(count * min(seconds / took, 16)))
