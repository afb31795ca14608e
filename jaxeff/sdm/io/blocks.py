"""From rows to reads and back: which blocks a call needs, each once, and where its rows lie in what was read.

A run is a maximal stretch of neighbouring blocks that rows need; a row that straddles blocks never divides one. A run
is one request, unless it is longer than a request may be. Runs lie one after the other in the staging buffer, which has
two halves: while rows are copied out of one, reads arrive in the other. A run longer than a half is cut, and a block at
such a cut may be read twice: one in thousands.

n rows, q requests, c fillings of a half; offsets, sizes and positions are in bytes.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

# Requests are no longer, and only the last of a run is shorter: larger ones hold up the rows behind them. [ours]
MAX_REQUEST = 128 * 1024
# Half of the staging buffer: 4 MiB, so that both halves may be pinned under the usual limit of 8 MiB (RLIMIT_MEMLOCK).
HALF = 4 * 1024 * 1024


class GatherStats(NamedTuple):
    """What a call read.

    Attributes:
      requests: reads handed to the system.
      bytes: asked for by them, in whole blocks.
      blocks: different blocks that hold the rows; `bytes / (blocks * block)` is the amplification of the reader's own.
    """

    requests: int
    bytes: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The reads of one call, in the order of their place on the device.

    Attributes:
      length: of a row.
      block: reads start and end at multiples of it.
      order: int64 [n], rows in the order of their place.
      row_position: int64 [n], where each of them (in that order) lies in the staging buffer.
      row_run: int64 [n], the run that holds it.
      file: int64 [q], file of each request.
      offset: int64 [q], where it starts in the file.
      size: int64 [q], of it.
      need: int64 [q], bytes of it that rows lie in: the rest may lie behind the end of the file.
      position: int64 [q], where it goes in the staging buffer.
      request_run: int64 [q], the run that it is of.
      row_border: int64 [c + 1], rows of filling k are row_border[k] to row_border[k + 1] of the order.
      request_border: int64 [c + 1], the same of requests.
      half: bytes of half the staging buffer.
      blocks: different blocks that hold the rows.
    """

    length: int
    block: int
    order: np.ndarray
    row_position: np.ndarray
    row_run: np.ndarray
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    need: np.ndarray
    position: np.ndarray
    request_run: np.ndarray
    row_border: np.ndarray
    request_border: np.ndarray
    half: int
    blocks: int

    @property
    def stats(self) -> GatherStats:
        """Requests, bytes and blocks of the call."""
        return GatherStats(len(self.size), int(self.size.sum()), self.blocks)

    def scatter(self, filling: int, staging: np.ndarray, out: np.ndarray) -> None:
        """Copies the rows of one filling from the staging buffer, uint8 [2 * half], to where the caller wants them."""
        rows = slice(self.row_border[filling], self.row_border[filling + 1])
        windows(out, self.length)[self.order[rows]] = windows(staging, self.length)[self.row_position[rows]]

    def arrived(self, finished: np.ndarray) -> int:
        """Rows all of whose requests are among the finished ones, bool [q]."""
        whole = np.ones(int(self.request_run[-1]) + 1, bool)
        whole[self.request_run[~finished]] = False
        return int(np.count_nonzero(whole[self.row_run]))


def windows(buffer: np.ndarray, length: int) -> np.ndarray:
    """A view whose items are rows of `length` bytes: those of a matrix, or all that start at a byte of a vector.

    Items are opaque (V), so that indexing with an array copies whole rows.

    >>> windows(np.arange(5, dtype=np.uint8), 2)[np.array([3, 0])].view(np.uint8).tolist()
    [3, 4, 0, 1]
    """
    count = len(buffer) - length + 1 if buffer.ndim == 1 else len(buffer)
    return np.ndarray((count,), f"V{length}", buffer, 0, (buffer.strides[0],))


def bases(sizes: np.ndarray, block: int) -> np.ndarray:
    """Places files on one line, so that no block of one neighbours a block of another: int64 [files]."""
    room = (-(-sizes // block) + 2) * block
    return np.concatenate([[0], np.cumsum(room)[:-1]]).astype(np.int64)


def half_size(length: int, block: int, half: int = HALF) -> int:
    """Bytes of half a staging buffer that holds rows of this length."""
    return max(half, 4 * _row_blocks(length, block) * block) // block * block


def plan(files: np.ndarray, offsets: np.ndarray, length: int, start: np.ndarray, block: int, half: int) -> Plan:
    """Finds the reads of a call.

    Args:
      files: int [n], at least one row.
      offsets: int64 [n], where each row starts in its file.
      length: of a row, at least 1.
      start: int64 [files], of `bases`.
      block: reads start and end at multiples of it; a divisor of MAX_REQUEST.
      half: bytes of half the staging buffer, of `half_size`.
    """
    place = start[files] + offsets
    order = np.argsort(place)
    place = place[order]
    first, last = place // block, (place + (length - 1)) // block
    # Rows are equally long, so that their ends are in order, too, and the row before is all that matters.
    new = np.ones(len(place), bool)
    new[1:] = first[1:] > last[:-1] + 1
    heads, tails = _borders(new)
    blocks = int((last[tails] - first[heads] + 1).sum())
    longest = half // block - _row_blocks(length, block)
    if np.any(last[tails] - first[heads] >= longest):
        part = (first - np.repeat(first[heads], tails - heads + 1)) // longest
        new[1:] |= part[1:] != part[:-1]
        heads, tails = _borders(new)
    run_start = first[heads] * block
    run_size = (last[tails] + 1) * block - run_start
    run_need = place[tails] + length - run_start
    run_file = files[order[heads]].astype(np.int64)
    run_offset = run_start - start[run_file]

    # Fillings: as many whole runs as fit.
    total = np.zeros(len(heads) + 1, np.int64)
    np.cumsum(run_size, out=total[1:])
    border = [0]
    while border[-1] < len(heads):
        border.append(int(np.searchsorted(total, total[border[-1]] + half, side="right")) - 1)
    run_border = np.array(border)
    run_position = total[:-1]
    if len(border) > 2:
        filling = np.repeat(np.arange(len(border) - 1), np.diff(run_border))
        run_position = run_position - total[run_border[filling]] + filling % 2 * half

    row_run = np.cumsum(new) - 1
    row_position = place - run_start[row_run] + run_position[row_run]
    row_border = np.append(heads, len(place))[run_border]

    if run_size.max() <= MAX_REQUEST:  # as nearly always, each run is one request
        return Plan(
            length, block, order, row_position, row_run, run_file, run_offset, run_size, run_need, run_position,
            np.arange(len(heads)), row_border, run_border, half, blocks,
        )  # fmt: skip
    pieces = -(-run_size // MAX_REQUEST)
    request_run = np.repeat(np.arange(len(heads)), pieces)
    request_total = np.concatenate([[0], np.cumsum(pieces)])
    within = (np.arange(len(request_run)) - request_total[request_run]) * MAX_REQUEST
    size = np.minimum(run_size[request_run] - within, MAX_REQUEST)
    return Plan(
        length=length,
        block=block,
        order=order,
        row_position=row_position,
        row_run=row_run,
        file=run_file[request_run],
        offset=run_offset[request_run] + within,
        size=size,
        need=np.minimum(run_need[request_run] - within, size),
        position=run_position[request_run] + within,
        request_run=request_run,
        row_border=row_border,
        request_border=request_total[run_border],
        half=half,
        blocks=blocks,
    )


def _row_blocks(length: int, block: int) -> int:
    """Blocks that a row touches at most."""
    return (length - 1) // block + 2


def _borders(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last row of each run."""
    heads = np.flatnonzero(new)
    return heads, np.append(heads[1:], len(new)) - 1
