"""Reading rows from files: io_uring without a compiler, a pool of threads, prefetched maps; the same bytes from all."""

from jaxeff.sdm.io.blocks import GatherStats
from jaxeff.sdm.io.errors import DeadlineExceeded, ReadError, ShortRead
from jaxeff.sdm.io.reader import Reader, open_reader

__all__ = ["DeadlineExceeded", "GatherStats", "ReadError", "Reader", "ShortRead", "open_reader"]
