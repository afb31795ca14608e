"""Small tables, queries of them, and what look-ups must give, for the tests of tiers and of resident rows."""

import numpy as np

from jaxeff.ops import embedding_bag
from jaxeff.ops.bags import Bags
from jaxeff.sdm import queries
from jaxeff.sdm.encoding import RowFormat, decode, encode
from jaxeff.sdm.table import TableSpec
from jaxeff.sdm.writer import Writer

DIM, ROWS = 6, (40, 90, 25)
FORMS = ["padded", *([] if embedding_bag.unavailable() else ["csr"])]


def values(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rows, DIM)).astype(np.float32) for rows in ROWS]


def write(folder, kinds, tables=None, remaps=(None, None, None), packing="dense"):
    tables = values() if tables is None else tables
    with Writer(folder, packing=packing) as writer:
        for index, (kind, table, remap) in enumerate(zip(kinds, tables, remaps, strict=True)):
            writer.add(TableSpec(f"table{index}", len(table), RowFormat(kind, DIM)), [table], remap=remap)
        writer.publish()
    return folder


def random_query(seed, bags=5, longest=8, weighted=False, rows=ROWS):
    rng = np.random.default_rng(seed)
    asked = []
    for count in rows:
        lengths = rng.integers(0, longest, bags)
        ids = np.minimum(rng.zipf(1.3, lengths.sum()) - 1, count - 1)
        weights = rng.normal(size=len(ids)).astype(np.float32) if weighted else None
        asked.append(Bags(ids, np.concatenate([[0], np.cumsum(lengths)]), weights))
    return queries.query(asked)


def expected(asked, tables, mode="sum"):
    """In float32, row by row in the order of the bags."""
    pooled = np.zeros((len(asked.tables), DIM), np.float32)
    for bag, table in enumerate(asked.tables):
        for at in range(asked.offsets[bag], asked.offsets[bag + 1]):
            row = tables[table][asked.indices[at]]
            pooled[bag] += row if asked.weights is None else row * asked.weights[at]
        if mode == "mean":
            pooled[bag] /= np.float32(max(1, asked.lengths[bag]))
    return pooled


def stored(kinds, tables=None):
    tables = values() if tables is None else tables
    return [decode(encode(t, RowFormat(k, DIM)), RowFormat(k, DIM)) for t, k in zip(tables, kinds, strict=True)]
