"""Benchmark of the co-access layout: blocks that queries read in the optimised order beside the original one."""

from collections.abc import Iterator
from typing import Any

from jaxeff.dlrm.popularity import Zipf
from jaxeff.dlrm.recency import CoAccess
from jaxeff.dlrm.traces import Feature, generate
from jaxeff.sdm import layout
from launch.bench import results

ROWS, ROWS_PER_BLOCK, SEEDS = 2_000_000, 16, (0, 1, 2)
QUERIES, ITEMS = 4000, 20


def layout_blocks(pairs: int) -> Iterator[dict[str, Any]]:
    """Blocks per unique row on the held-out queries, rows of 256 bytes in blocks of 4 KiB.

    "coaccess" has groups of eight rows that are mostly read together, under hashed ids. "hashed" has rows that are read
    independently: with the published popularity, where hot rows can still share blocks, and with equal popularity,
    where nothing can be gained and the order must stay.
    """
    cases: dict[str, tuple[dict[str, Any], float]] = {
        "coaccess": ({"coaccess": CoAccess(size=8, share=0.9)}, 0.67),
        "hashed": ({}, 1.0),
        "hashed_uniform": ({"popularity": Zipf(0.0, rows=50_000), "recency": None}, 1.0),
    }
    for name, (settings, target) in cases.items():
        found = [_ratio(seed, **settings) for seed in SEEDS]
        ratios = sorted(ratio for ratio, _ in found)
        before, after = (sum(getattr(one, side) for _, one in found) / len(found) for side in ("before", "after"))
        methods = ", ".join(sorted({one.method for _, one in found}))
        yield results.case(
            f"layout.{name}", "blocks per unique row / original order", ratios[len(ratios) // 2], better="lower",
            target=target, spread=(ratios[0], ratios[-1]), n=len(ratios),
            against=f"the original order, {before:.3f} blocks per row (best order {after:.3f}; used: {methods})",
        )  # fmt: skip


def _ratio(seed: int, **settings: Any) -> tuple[float, layout.Layout]:
    """What the layout leaves of the blocks of an item table, and the layout."""
    trace = generate([Feature("rows", ROWS, pooling=4.0)], QUERIES, batch_items=ITEMS, seed=seed, **settings)
    found = layout.optimise(*trace.per_query(0), ROWS, ROWS_PER_BLOCK, seed=seed)
    return (1.0 if found.position is None else found.after / found.before), found


CASES = {"layout": layout_blocks}
