"""Plans of reads against plain loops over bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm.io import blocks

BLOCK = 512


def planned(files, offsets, length, sizes, block=BLOCK, half=None):
    files, offsets = np.array(files), np.array(offsets, np.int64)
    start = blocks.bases(np.array(sizes), block)
    return blocks.plan(files, offsets, length, start, block, half or blocks.half_size(length, block))


def blocks_of_rows(files, offsets, length, block=BLOCK):
    touched = set()
    for file, offset in zip(files, offsets, strict=True):
        touched |= {(file, number) for number in range(offset // block, (offset + length - 1) // block + 1)}
    return touched


def blocks_read(plan):
    found = []
    for file, offset, size in zip(plan.file.tolist(), plan.offset.tolist(), plan.size.tolist(), strict=True):
        assert offset % plan.block == 0 and size % plan.block == 0 and 0 < size <= blocks.MAX_REQUEST
        found += [(file, number) for number in range(offset // plan.block, (offset + size) // plan.block)]
    return found


def execute(plan, contents, out):
    """Reads a plan from arrays in memory, filling by filling; bytes behind `need` are left unread."""
    staging = np.full(2 * plan.half, 0xEE, np.uint8)
    for filling in range(len(plan.row_border) - 1):
        for request in range(plan.request_border[filling], plan.request_border[filling + 1]):
            at, need, offset = plan.position[request], plan.need[request], plan.offset[request]
            assert filling % 2 * plan.half <= at and at + plan.size[request] <= (filling % 2 + 1) * plan.half
            staging[at : at + need] = contents[plan.file[request]][offset : offset + need]
        plan.scatter(filling, staging, out)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 1500), st.sampled_from([512, 4096]), st.integers(0, 2**32 - 1))
def test_a_plan_reads_every_needed_block_once_and_nothing_else(data, length, block, seed):
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(length, 60_000), min_size=1, max_size=3))
    files = rng.integers(0, len(sizes), data.draw(st.integers(1, 60)))
    offsets = rng.integers(0, np.array(sizes)[files] - length + 1)
    plan = planned(files, offsets, length, sizes, block)
    touched = blocks_of_rows(files.tolist(), offsets.tolist(), length, block)
    assert sorted(blocks_read(plan)) == sorted(touched)
    assert plan.stats == (len(plan.size), len(touched) * block, len(touched))
    contents = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    out = np.zeros((len(files), length + 3), np.uint8)
    execute(plan, contents, out)
    for row, (file, offset) in enumerate(zip(files, offsets, strict=True)):
        np.testing.assert_array_equal(out[row, :length], contents[file][offset : offset + length])
    assert not out[:, length:].any()


def test_neighbours_are_one_request_and_files_never_are():
    assert planned([0, 0], [0, 512], 256, [4096]).stats == (1, 1024, 2)
    assert planned([0, 0], [0, 1024], 256, [4096]).stats == (2, 1024, 2)
    assert planned([0], [400], 256, [4096]).stats == (1, 1024, 2)
    # The end of one file and the begin of the next.
    assert planned([0, 1], [768, 0], 256, [1024, 1024]).stats == (2, 1024, 2)


def test_a_long_run_is_divided_into_requests_without_reading_more():
    rows = 3 * blocks.MAX_REQUEST // 200
    plan = planned([0] * rows, np.arange(rows) * 200, 200, [rows * 200])
    assert plan.stats == (3, -(-rows * 200 // 512) * 512, -(-rows * 200 // 512))
    assert plan.size[:-1].tolist() == [blocks.MAX_REQUEST] * 2


def test_a_run_longer_than_half_the_staging_buffer_is_cut():
    rng = np.random.default_rng(0)
    rows, length, half = 4000, 100, 16 * BLOCK
    contents = [rng.integers(0, 256, rows * length, dtype=np.uint8)]
    order = rng.permutation(rows)
    plan = planned([0] * rows, order * length, length, [rows * length], half=half)
    out = np.zeros((rows, length), np.uint8)
    execute(plan, contents, out)
    np.testing.assert_array_equal(out, contents[0].reshape(rows, length)[order])
    assert len(plan.row_border) - 1 > 40
    assert plan.stats.blocks == -(-rows * length // BLOCK)
    # At each cut a block may be read twice.
    assert plan.stats.bytes <= (plan.stats.blocks + len(plan.row_border)) * BLOCK


def test_rows_count_as_arrived_when_all_their_requests_have():
    plan = planned([0, 0, 0, 0], [5120, 0, 40, 2048], 64, [8192])
    assert plan.order.tolist() == [1, 2, 3, 0]
    assert plan.arrived(np.array([True, False, False])) == 2
    assert plan.arrived(np.array([False, True, True])) == 2
    assert plan.arrived(np.array([True, True, True])) == 4


@pytest.mark.parametrize("length", [1, 7, 512, 513, 5_000_000])
def test_half_a_staging_buffer_holds_any_row(length):
    half = blocks.half_size(length, BLOCK)
    assert half % BLOCK == 0
    plan = planned([0], [511], length, [length + 511], half=half)
    assert plan.position[-1] + plan.size[-1] <= half
