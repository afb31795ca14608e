"""Software-defined memory: embedding rows in tiers of fast memory, host memory and files on SCM or NVMe.

A `Writer` makes a store, `open_store` opens it, and `Tiers` looks its tables up; `place` and `predict` say beforehand
which table belongs where and what a host then gives.
"""

from jaxeff.sdm.callback import callback_lookup
from jaxeff.sdm.convert import tables_of, write_tables
from jaxeff.sdm.demand import HitCurve, TableNeed
from jaxeff.sdm.device import PRESETS, DeviceProfile, calibrate
from jaxeff.sdm.encoding import KINDS, RowFormat, decode, decode_jax, encode, zero_row
from jaxeff.sdm.forecast import forecast_lru, forecast_warm_up, measure, trace_hit_rates
from jaxeff.sdm.io.errors import DeadlineExceeded, ReadError, ShortRead
from jaxeff.sdm.io.reader import Reader, open_reader
from jaxeff.sdm.knapsack import OverBudget
from jaxeff.sdm.layout import Layout, blocks_per_row, optimise
from jaxeff.sdm.lookahead import LookAhead
from jaxeff.sdm.lookups import Counters, Failed, Plan, Staged
from jaxeff.sdm.pipeline import stream
from jaxeff.sdm.placement import TIERS, Placement, RowSplit, place, split_rows
from jaxeff.sdm.planner import Prediction, predict, with_hit_rates
from jaxeff.sdm.pooled_cache import PooledCache
from jaxeff.sdm.pooling import Arrays, pool
from jaxeff.sdm.power import Host, Scenario, compare, scenario_table
from jaxeff.sdm.queries import Query, query
from jaxeff.sdm.renewal import renewed
from jaxeff.sdm.resident import Resident, Traffic
from jaxeff.sdm.reuse import belady_hits, lru_curve, reuse_distances
from jaxeff.sdm.row_cache import RowCache, row_keys
from jaxeff.sdm.sharded import sharded_lookup
from jaxeff.sdm.stored_file import (
    CorruptTable,
    DiskFull,
    NoStore,
    StoreBusy,
    StoreError,
    TruncatedTable,
    UnknownFormat,
    WriteError,
)
from jaxeff.sdm.table import Store, TableSpec, open_store
from jaxeff.sdm.tiers import Tiers
from jaxeff.sdm.transforms import deprune, dequantise, pad_rows, preview, reencode, reorder, rewrite
from jaxeff.sdm.unified_cache import UnifiedCache
from jaxeff.sdm.writer import Writer, roll_back

__all__ = [
    "Arrays",
    "CorruptTable",
    "Counters",
    "DeadlineExceeded",
    "DeviceProfile",
    "DiskFull",
    "Failed",
    "HitCurve",
    "Host",
    "KINDS",
    "Layout",
    "LookAhead",
    "NoStore",
    "OverBudget",
    "PRESETS",
    "Placement",
    "Plan",
    "PooledCache",
    "Prediction",
    "Query",
    "ReadError",
    "Reader",
    "Resident",
    "RowCache",
    "RowFormat",
    "RowSplit",
    "Scenario",
    "ShortRead",
    "Staged",
    "Store",
    "StoreBusy",
    "StoreError",
    "TIERS",
    "TableNeed",
    "TableSpec",
    "Tiers",
    "TruncatedTable",
    "Traffic",
    "UnifiedCache",
    "UnknownFormat",
    "WriteError",
    "Writer",
    "belady_hits",
    "blocks_per_row",
    "calibrate",
    "callback_lookup",
    "compare",
    "decode",
    "decode_jax",
    "deprune",
    "dequantise",
    "encode",
    "forecast_lru",
    "forecast_warm_up",
    "lru_curve",
    "measure",
    "open_reader",
    "open_store",
    "optimise",
    "pad_rows",
    "place",
    "pool",
    "predict",
    "preview",
    "query",
    "reencode",
    "renewed",
    "reorder",
    "reuse_distances",
    "rewrite",
    "roll_back",
    "row_keys",
    "scenario_table",
    "sharded_lookup",
    "split_rows",
    "stream",
    "tables_of",
    "trace_hit_rates",
    "with_hit_rates",
    "write_tables",
    "zero_row",
]
