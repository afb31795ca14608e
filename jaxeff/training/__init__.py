"""Training: one loop for every method, optimisers from config, checkpoints with exact resume, metrics, reports."""

from jaxeff.training.adversarial import AdversarialState, Player, adversarial, generated, signed_range
from jaxeff.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    CorruptCheckpoint,
    ForeignCheckpoint,
    NoCheckpoint,
    SaveFailed,
)
from jaxeff.training.finite import NonFiniteLoss
from jaxeff.training.frechet import FeatureMoments, feature_moments, features, frechet_distance
from jaxeff.training.interrupt import Interrupted
from jaxeff.training.linen import ModelFunctions, from_linen
from jaxeff.training.loop import FitResult, fit
from jaxeff.training.metrics import EvaluationSums, MetricsWriter, mean_of, read_metrics
from jaxeff.training.optimizers import OPTIMIZERS, SCHEDULES, decays, optimizer, optimizer_from, schedule, schedule_from
from jaxeff.training.progress import Progress
from jaxeff.training.report import (
    comparison_figure,
    comparison_markdown,
    comparison_table,
    learning_curves,
    write_summary,
)
from jaxeff.training.spectral import spectral_normalise, spectral_vectors
from jaxeff.training.state import TrainState
from jaxeff.training.step import Method, classification, unit_range
from jaxeff.training.workdir import ForeignWorkdir, prepare_workdir

__all__ = [
    "AdversarialState",
    "CheckpointError",
    "Checkpoints",
    "CorruptCheckpoint",
    "EvaluationSums",
    "FeatureMoments",
    "FitResult",
    "ForeignCheckpoint",
    "ForeignWorkdir",
    "Interrupted",
    "Method",
    "MetricsWriter",
    "ModelFunctions",
    "NoCheckpoint",
    "NonFiniteLoss",
    "OPTIMIZERS",
    "Player",
    "Progress",
    "SCHEDULES",
    "SaveFailed",
    "TrainState",
    "adversarial",
    "classification",
    "comparison_figure",
    "comparison_markdown",
    "comparison_table",
    "decays",
    "feature_moments",
    "features",
    "fit",
    "frechet_distance",
    "from_linen",
    "generated",
    "learning_curves",
    "mean_of",
    "optimizer",
    "optimizer_from",
    "prepare_workdir",
    "read_metrics",
    "schedule",
    "schedule_from",
    "signed_range",
    "spectral_normalise",
    "spectral_vectors",
    "unit_range",
    "write_summary",
]
