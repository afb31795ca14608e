"""Deep-learning recommendation models: the network, its features and traces, and training with sparse gradients."""

from jaxeff.dlrm.adagrad import SparseRows, SparseTransformation, apply_updates, rowwise_adagrad, sparse_gradient
from jaxeff.dlrm.click_files import read_clicks
from jaxeff.dlrm.features import Features, of_clicks, of_ratings
from jaxeff.dlrm.lookup import per_example, query_of, scorer, serve
from jaxeff.dlrm.model import DLRM, PRESETS, Architecture, Costs, WithTables, costs, init_tables, preset
from jaxeff.dlrm.popularity import PUBLISHED, Zipf, draw_counts, shares
from jaxeff.dlrm.recency import CoAccess, Recency, working_set
from jaxeff.dlrm.recorded import clicks_trace, ratings_trace
from jaxeff.dlrm.task import Evaluation, RecommenderState, auc, evaluation, predict, recommendation, score
from jaxeff.dlrm.traces import Feature, TableTrace, Trace, draw_rows, generate

__all__ = [
    "Architecture",
    "CoAccess",
    "Costs",
    "DLRM",
    "Evaluation",
    "Feature",
    "Features",
    "PRESETS",
    "PUBLISHED",
    "Recency",
    "RecommenderState",
    "SparseRows",
    "SparseTransformation",
    "TableTrace",
    "Trace",
    "WithTables",
    "Zipf",
    "apply_updates",
    "auc",
    "clicks_trace",
    "costs",
    "draw_counts",
    "draw_rows",
    "evaluation",
    "generate",
    "init_tables",
    "of_clicks",
    "of_ratings",
    "per_example",
    "predict",
    "preset",
    "query_of",
    "ratings_trace",
    "read_clicks",
    "recommendation",
    "rowwise_adagrad",
    "score",
    "scorer",
    "serve",
    "shares",
    "sparse_gradient",
    "working_set",
]
