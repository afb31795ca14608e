# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Software-defined memory: tables larger than the memory they may use
#
# <!-- colab -->
#
# **The problem.** The embedding tables of a recommendation model take terabytes, and few of their rows are read often.
# Kept in DRAM, the others cost power for nothing; read from files one by one, they cost more time than the model.
#
# **What is here.** Tables in files, a tenth of them in memory, and look-ups with the bits of a table in memory: how
# much a cache can hit, what reading ahead hides, a new version published while the old one is served, and what it
# saves.

# %%
import importlib.util
import os
import pathlib
import tempfile
import time

if importlib.util.find_spec("jaxeff") is None:
    raise ImportError("install jaxeff first: pip install -e '.[all]' in a clone")  # install line

import jax
import numpy as np
from IPython.display import Image, display

from jaxeff import dlrm, sdm
from jaxeff.dlrm import lookup
from jaxeff.sdm import figures, power

FAST = bool(os.environ.get("JAXEFF_NB_FAST"))  # fewer queries, for automatic runs
FOLDER = tempfile.TemporaryDirectory()
FIGURES, STORE = pathlib.Path(FOLDER.name) / "figures", pathlib.Path(FOLDER.name) / "store"
QUERIES, ROWS = (120, 4_000) if FAST else (1_500, 24_000)
ITEMS, DIM = 32, 32

# %% [markdown]
# ## Look-ups with the reuse of production
#
# Six tables of the user's side, with one bag of about 15 rows in a query, and two of the items', with a bag for each of
# 32 items. How often rows are read again follows the published embedding traces of Meta (Naumov et al., dlrm_datasets).

# %%
tables = [dlrm.Feature(f"user_{i}", ROWS, 15, "user", "geometric") for i in range(6)]
tables += [dlrm.Feature(f"item_{i}", ROWS // 40, 2, "item", "geometric") for i in range(2)]
trace = dlrm.generate(tables, QUERIES, batch_items=ITEMS, seed=0)
queries = [sdm.query(bags) for bags in trace]
found = trace.statistics()
print(f"{found.accesses:,} look-ups of {found.distinct_rows:,} rows: {found.mean_reuse:.1f} times each")

# %% [markdown]
# ## How much a cache can hit
#
# One pass over the trace gives the exact hit rate of an LRU cache of every size (Mattson's stack distances). The cache
# that is used is CLOCK in sets of 31 or 15 rows, for 20 ns a look-up; no cache beats Belady's, which knows the future.

# %%
accesses = trace.accesses()
users = accesses.tables < 6
per_query = np.unique(np.stack([accesses.queries, accesses.tables, accesses.rows])[:, users], axis=1)  # once a query
keys, row_bytes = sdm.row_keys(per_query[1], per_query[2]), 4 * DIM
sizes = np.geomspace(100, 6 * ROWS, 30).astype(int)
curves = {"LRU, exact": (sizes * row_bytes, sdm.lru_curve(keys, sizes))}


def clock(size):
    """Hit rate of the cache that is used."""
    cache = sdm.RowCache(int(size) * (row_bytes + 9), row_bytes, bounds=(8, ROWS))
    for one in np.split(keys, np.flatnonzero(np.diff(per_query[0])) + 1):
        slots = cache.lookup(one)
        cache.insert(one[slots < 0], np.zeros((np.count_nonzero(slots < 0), row_bytes), np.uint8))
    return cache.hits / len(keys)


few = sizes[4::5]
curves["CLOCK"] = (few * row_bytes, [clock(size) for size in few])
belady = [sdm.belady_hits(keys, int(size)) / len(keys) for size in few]
curves["Belady, who knows the future"] = (few * row_bytes, belady)
bounds = {"rows that were read before": 1 - len(np.unique(keys)) / len(keys)}
total = 6 * ROWS * row_bytes
display(Image(figures.draw_hit_rates(curves, FIGURES / "hit_rates.png", bounds=bounds, total_bytes=total), width=620))

# %% [markdown]
# ## Tables in files
#
# A store is written once, checksummed, and published at one instant. A tenth of its bytes may be in memory: the tables
# of items, which every query reads 32 times, and a cache for the rest.

# %%
rng = np.random.default_rng(0)
values = {one.name: rng.normal(size=(one.rows, DIM)).astype(np.float32) for one in tables}
sdm.write_tables(STORE, values, "float32", packing="block")
store = sdm.open_store(STORE)
table_bytes = sum(table.spec.rows * table.spec.format.row_bytes for table in store.tables)
allowed = table_bytes // 10

placement = {one.name: "memory" if one.side == "item" else "cached" for one in tables}
items = sum(one.rows for one in tables if one.side == "item") * row_bytes
tiers = sdm.Tiers(store, placement, cache_bytes=allowed - items - row_bytes)
memory = sdm.Tiers(store, "memory")
print(f"tables {table_bytes:,} bytes, allowed {allowed:,}, used {tiers.fast_bytes:,}; reads by {tiers.reader.name}")

# %% [markdown]
# ## Queries, fetched ahead
#
# A thread reads the rows of the next queries while the model computes this one. The scores have the bits of a model
# whose tables are all in memory.

# %%
architecture = dlrm.preset("kaggle", rows=[one.rows for one in tables], dim=DIM)
model = dlrm.DLRM(architecture)
dense = rng.normal(size=(ITEMS, architecture.dense)).astype(np.float32)
params = model.init(jax.random.key(0), dense, np.zeros((ITEMS, 8, DIM), np.float32))["params"]
score = lookup.scorer(architecture, [trace.bags(table) for table in trace.tables], ITEMS)


def serve(tiers, asked):
    """The scores, seconds of the second half, and spans for the figure."""
    scores, stages = [], []
    for staged, logits in lookup.serve(tiers, score, params, ((query, dense) for query in asked)):
        scores.append(np.asarray(logits))
        stages.append((staged.started, staged.started + staged.fetched, time.perf_counter()))
    half = len(stages) // 2
    return np.stack(scores), stages[-1][-1] - stages[half - 1][-1], stages[-10:]


in_memory, memory_seconds, _ = serve(memory, queries)
scores, seconds, stages = serve(tiers, queries)
counted = tiers.counters
print(f"hit rate {100 * counted.hit_rate:.0f} %, {counted.requests / counted.queries:.1f} reads a query")
print(f"queries a second: {QUERIES / 2 / seconds:.0f}, all in memory {QUERIES / 2 / memory_seconds:.0f}")

# %%
timeline = {"rows from files": figures.spans(stages)}
display(Image(figures.draw_timeline(timeline, FIGURES / "timeline.png"), width=760))

# %% [markdown]
# ## A new version, while the old one is served
#
# The next version goes to a folder beside the old one, and counts from the moment that it is whole. New tiers take the
# settings of the old ones, and read what their cache has, so that the first query finds it warm.

# %%
changed = {name: array + 1 for name, array in values.items()}
sdm.write_tables(STORE, changed, "float32", packing="block")
fresh = sdm.renewed(tiers)
old, new = (np.asarray(one.lookup(queries[-1])) for one in (tiers, fresh))
print(f"{tiers.store.version}, {fresh.store.version}; hit rate of the first query {fresh.counters.hit_rate:.2f}")

# %% [markdown]
# ## What it saves
#
# Three fleets, as far as they are recalled of the paper (arXiv 2110.11489): read them as examples of the calculation,
# and put your own in.

# %%
savings = [power.compare(scenario) for scenario in power.PUBLISHED]
display(Image(figures.draw_savings(savings, FIGURES / "power.png"), width=640))

# %%
lengths = queries[-1].lengths
assert tiers.fast_bytes <= allowed < table_bytes
assert np.array_equal(scores, in_memory)
assert np.allclose(new - old, lengths[:, None], atol=1e-3)
assert fresh.counters.reads == 0
for one in (fresh, tiers, memory):
    one.close()
    one.store.close()
FOLDER.cleanup()
