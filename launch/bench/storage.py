"""Benchmarks of reading rows from storage: beside the device's own ceiling, memory maps and RocksDB, all of it cold.

The ceiling is what fio reads at the same queue depth; beside it stands a loop in C around io_uring, compiled when it is
needed. Contestants take turns, so that all of them see the device in the same minutes. Direct reads pass the page cache
by; before others the file is dropped from it (POSIX_FADV_DONTNEED). Times are seconds of one row.

The file lies where TMPDIR says, and takes 2 GiB.
"""

import contextlib
import json
import mmap
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxeff.sdm.io.reader import LADDER, Reader, open_reader
from launch.bench import results
from launch.bench.timing import Times

ROW = 256
SIZE = 2**31
DEPTH = 128
READS = 40_000
# So few that what read-ahead brings for one row holds hardly any other.
MAPPED_READS, DEFAULT_MAPPED_READS = 4_000, 60
ROCKS_ROWS, ROCKS_BATCH = 1_000_000, 1_000
C_LOOP = pathlib.Path(__file__).with_name("storage_loop.c")


class Turn(NamedTuple):
    """What one turn took: rows read, wall and CPU seconds."""

    rows: int
    wall: float
    cpu: float


def in_turn(contestants: Mapping[str, Callable[[], Turn]], pairs: int) -> Times:
    """Lets contestants take turns after one round that does not count; their times are seconds of a row."""
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(pairs + 1):
        for name, run in contestants.items():
            turn = run()
            if number:
                wall[name].append(turn.wall / turn.rows)
                cpu[name].append(max(turn.cpu, 1e-9) / turn.rows)
    return Times(wall, cpu)


@contextlib.contextmanager
def random_file(size: int = SIZE) -> Iterator[pathlib.Path]:
    """A file of random bytes, on the device and not in the page cache."""
    with tempfile.TemporaryDirectory(prefix="jaxeff-storage-") as folder:
        path = pathlib.Path(folder, "rows")
        rng = np.random.default_rng(0)
        with open(path, "wb") as file:
            for _ in range(size // 2**24):
                file.write(rng.bytes(2**24))
            file.flush()
            os.fsync(file.fileno())
        drop(path)
        yield path


def drop(path: pathlib.Path) -> None:
    """Drops what the page cache holds of a file; pages that are mapped stay."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Rows:
    """Draws rows of a file anew for each turn."""

    def __init__(self, path: pathlib.Path, row: int = ROW):
        self.path, self.row = path, row
        self.count = path.stat().st_size // row
        self.rng = np.random.default_rng(1)

    def draw(self, reads: int) -> np.ndarray:
        """Row numbers, int64 [reads]."""
        return self.rng.integers(0, self.count, reads)

    def by_reader(self, reader: Reader, reads: int = READS) -> Callable[[], Turn]:
        """Ours."""
        out, files = np.empty((reads, self.row), np.uint8), np.zeros(reads, np.int32)

        def run() -> Turn:
            offsets = self.draw(reads) * self.row
            if not reader.direct:
                drop(self.path)
            wall, cpu = time.perf_counter(), time.process_time()
            reader.gather(files, offsets, self.row, out)
            return Turn(reads, time.perf_counter() - wall, time.process_time() - cpu)

        return run

    def by_memmap(self, reads: int, advice: int | None) -> Callable[[], Turn]:
        """Indexing np.memmap with an array."""

        def run() -> Turn:
            rows = self.draw(reads)
            drop(self.path)
            mapped = np.memmap(self.path, np.uint8, "r", shape=(self.count, self.row))
            if advice is not None:
                mapped._mmap.madvise(advice)  # type: ignore[attr-defined]
            wall, cpu = time.perf_counter(), time.process_time()
            mapped[rows]
            return Turn(reads, time.perf_counter() - wall, time.process_time() - cpu)

        return run


def fio(path: pathlib.Path, block: int, depth: int, reads: int) -> Callable[[], Turn] | None:
    """Random direct reads by fio; None without it."""
    program = shutil.which("fio")
    if program is None:
        return None
    settings = {
        **{"name": "ceiling", "filename": path, "rw": "randread", "bs": block, "iodepth": depth, "direct": 1},
        **{"ioengine": "io_uring", "number_ios": reads, "norandommap": 1, "randrepeat": 0, "output-format": "json"},
        # As little work of its own as it can have.
        **{"gtod_reduce": 1, "fixedbufs": 1, "registerfiles": 1},
        **{"iodepth_batch_submit": depth // 4, "iodepth_batch_complete_min": depth // 4},
        **{"iodepth_batch_complete_max": depth},
    }
    command = [program, *(f"--{name}={value}" for name, value in settings.items())]

    def run() -> Turn:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        wall = reads / job["read"]["iops"]
        return Turn(reads, wall, wall * (job["usr_cpu"] + job["sys_cpu"]) / 100)

    return run


def c_loop(folder: pathlib.Path, path: pathlib.Path, block: int, depth: int, reads: int) -> Callable[[], Turn] | None:
    """Random direct reads by a loop in C; None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    program = folder / "loop"
    subprocess.run([compiler, "-O2", "-o", program, C_LOOP], check=True)
    seeds = iter(range(1, 1_000_000))

    def run() -> Turn:
        command = [program, path, depth, reads, block, next(seeds)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        wall, cpu = map(float, done.stdout.split())
        return Turn(reads, wall, cpu)

    return run


def cold_gather_ceiling(pairs: int, size: int = SIZE, reads: int = READS) -> Iterator[dict[str, Any]]:
    """Random rows beside the reads that the device gives to fio, and to C, at the same queue depth."""
    with random_file(size) as path, contextlib.ExitStack() as stack:
        rows = Rows(path)
        readers = {
            name: stack.enter_context(open_reader([path], queue_depth=DEPTH, block=block))
            for name, block in (("ours", None), ("ours.4096", 4096))
        }
        block = readers["ours"].block
        peers = {
            "fio": fio(path, 4096, DEPTH, reads),
            f"fio.{block}": fio(path, block, DEPTH, reads),
            "C": c_loop(path.parent, path, block, DEPTH, reads),
        }
        found = {name: run for name, run in peers.items() if run is not None}
        if not found:
            raise ImportError("there is neither fio nor a C compiler to find the device's ceiling with; install fio")
        runs = {name: rows.by_reader(reader, reads) for name, reader in readers.items()}
        times = in_turn({**runs, **found}, pairs)
        rate = lambda name: f"{1 / times.seconds(name):,.0f} reads/s"
        judged = ("ours", next(iter(found)))
        for ours in readers:
            for peer in found:
                this = (ours, peer) == judged
                peer_block = 4096 if peer == "fio" else block
                yield results.time_ratio(
                    "cold_gather_ceiling" if this else f"cold_gather_ceiling.{ours}_{peer}", times, peer, ours,
                    better="higher", target=0.75 if this else None,
                    against=f"{peer}, {peer_block} bytes, depth {DEPTH}: {rate(peer)}; ours {rate(ours)} by "
                    f"{readers[ours].name} in {readers[ours].block} bytes",
                )  # fmt: skip


def cold_gather_memmap(pairs: int, size: int = SIZE, reads: int = READS) -> Iterator[dict[str, Any]]:
    """Random rows beside np.memmap that is advised to be read at random."""
    mapped = min(MAPPED_READS, reads)
    yield from _beside_memmap("cold_gather_memmap", pairs, size, reads, mapped, mmap.MADV_RANDOM, 4)


def cold_gather_default_memmap(pairs: int, size: int = SIZE, reads: int = READS) -> Iterator[dict[str, Any]]:
    """Random rows beside np.memmap as it is."""
    yield from _beside_memmap("cold_gather_default_memmap", pairs, size, reads, DEFAULT_MAPPED_READS, None, 100)


def _beside_memmap(name, pairs, size, reads, mapped, advice, target) -> Iterator[dict[str, Any]]:
    with random_file(size) as path, open_reader([path], queue_depth=DEPTH) as reader:
        rows = Rows(path)
        times = in_turn({"memmap": rows.by_memmap(mapped, advice), "ours": rows.by_reader(reader, reads)}, pairs)
        advised = "np.memmap" if advice is None else "np.memmap with MADV_RANDOM"
        yield results.time_ratio(
            name, times, "memmap", "ours", better="higher", target=target,
            against=f"{advised}: {1 / times.seconds('memmap'):,.0f} rows/s; ours {1 / times.seconds('ours'):,.0f}",
        )  # fmt: skip


def cold_gather_rocksdb(pairs: int, count: int = ROCKS_ROWS, reads: int = READS) -> Iterator[dict[str, Any]]:
    """Random rows beside RocksDB's multiget of as many values of as many bytes, with default options."""
    try:
        import rocksdict
    except ImportError as error:
        raise ImportError("RocksDB is measured through rocksdict: pip install rocksdict") from error
    with random_file(count * ROW // 2**24 * 2**24) as path, open_reader([path], queue_depth=DEPTH) as reader:
        rows = Rows(path)
        folder = str(path.parent / "rocks")
        values = np.memmap(path, np.uint8, "r", shape=(rows.count, ROW))
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        database = rocksdict.Rdict(folder, options)
        for start in range(0, rows.count, 10_000):
            batch = rocksdict.WriteBatch(raw_mode=True)
            for row in range(start, min(start + 10_000, rows.count)):
                batch.put(row.to_bytes(8, "big"), values[row].tobytes())
            database.write(batch)
        database.flush()
        database.compact_range(None, None)
        database.close()
        del values

        def multiget() -> Turn:
            wanted = [row.to_bytes(8, "big") for row in rows.draw(10 * ROCKS_BATCH).tolist()]
            for part in pathlib.Path(folder).iterdir():
                drop(part)
            opened = rocksdict.Rdict(folder, rocksdict.Options(raw_mode=True))
            wall, cpu = time.perf_counter(), time.process_time()
            for start in range(0, len(wanted), ROCKS_BATCH):
                opened[wanted[start : start + ROCKS_BATCH]]
            turn = Turn(len(wanted), time.perf_counter() - wall, time.process_time() - cpu)
            opened.close()
            return turn

        times = in_turn({"rocksdb": multiget, "ours": rows.by_reader(reader, reads)}, pairs)
        yield results.time_ratio(
            "cold_gather_rocksdb", times, "rocksdb", "ours", better="higher", target=4,
            against=f"RocksDB multiget of {ROCKS_BATCH}: {1 / times.seconds('rocksdb'):,.0f} rows/s; "
            f"ours {1 / times.seconds('ours'):,.0f}",
        )  # fmt: skip


def cold_gather_cpu_us(pairs: int, size: int = SIZE, reads: int = READS) -> Iterator[dict[str, Any]]:
    """CPU time of a row by each way of reading, planning and copying included."""
    with random_file(size) as path, contextlib.ExitStack() as stack:
        rows = Rows(path)
        readers: dict[str, Reader] = {}
        for name in ("auto", *LADDER[1:]):
            with contextlib.suppress(OSError):  # what this machine does not allow is not measured
                readers[name] = stack.enter_context(open_reader([path], backend=name, queue_depth=DEPTH))
        times = in_turn({name: rows.by_reader(reader, reads) for name, reader in readers.items()}, pairs)
        for name, reader in readers.items():
            micro = np.array(times.cpu[name]) * 1e6
            low, middle, high = np.percentile(micro, (25, 50, 75)).tolist()
            yield results.case(
                "cold_gather_cpu_us" + ("" if name == "auto" else f".{name}"), "CPU microseconds per row", middle,
                better="lower", target=5 if name == "auto" else None, spread=(low, high), n=len(micro),
                against=f"{reader.name}, {'direct' if reader.direct else 'page cache'}, {reader.block} bytes, "
                f"{1 / times.seconds(name):,.0f} rows/s",
            )  # fmt: skip


def cold_gather_amplification(pairs: int, size: int = SIZE, reads: int = READS) -> Iterator[dict[str, Any]]:
    """Bytes read beside the blocks that hold the rows: rows that straddle blocks, repeat, and lie side by side."""
    with random_file(size) as path, open_reader([path], queue_depth=DEPTH) as reader:
        worst, dense = 0.0, 0
        for row in (72, ROW, 1100):
            rows = Rows(path, row)
            near = np.arange(rows.count // 2, rows.count // 2 + reads // 2)
            wanted = np.concatenate([rows.draw(reads // 2), near])
            out = np.empty((len(wanted), row), np.uint8)
            stats = reader.gather(np.zeros(len(wanted), np.int32), wanted * row, row, out)
            worst = max(worst, stats.bytes / (blocks_of(wanted * row, row, reader.block) * reader.block))
            dense += stats.requests
        yield results.case(
            "cold_gather_amplification", "bytes read / bytes of the blocks needed", worst, better="lower", target=1.1,
            against=f"the worst of rows of 72, {ROW} and 1100 bytes in blocks of {reader.block}; {dense:,} requests",
        )  # fmt: skip


def blocks_of(offsets: np.ndarray, length: int, block: int) -> int:
    """How many different blocks hold rows of one length that begin at some offsets, int64 [n]."""
    firsts, lasts = offsets // block, (offsets + length - 1) // block
    each = firsts[:, None] + np.arange((lasts - firsts).max() + 1)
    return len(np.unique(each[each <= lasts[:, None]]))


CASES = {
    "cold_gather_ceiling": cold_gather_ceiling,
    "cold_gather_memmap": cold_gather_memmap,
    "cold_gather_default_memmap": cold_gather_default_memmap,
    "cold_gather_rocksdb": cold_gather_rocksdb,
    "cold_gather_cpu_us": cold_gather_cpu_us,
    "cold_gather_amplification": cold_gather_amplification,
}
