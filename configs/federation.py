"""The fields that every federated experiment has, with their defaults; experiments change what they need."""

from typing import Any

from ml_collections import ConfigDict, config_dict

from configs.classification import network


def base(dataset: str) -> ConfigDict:
    """All fields of `launch.federate`."""
    config = ConfigDict()
    config.dataset = dataset
    config.train_split = "train"
    config.test_split = "test"
    config.seeds = (0,)
    config.clients = 10
    # Who holds what, by name: sections of `partition`. Every method learns under each of them.
    config.partitions = ConfigDict()
    # What is compared, by name: sections of `method`.
    config.methods = ConfigDict()
    # Whose best accuracy the rounds of the others are counted to; the first method where none is called so.
    config.baseline = "fed_avg"
    config.rounds = 20
    config.epochs = 1
    config.batch_size = 32
    config.eval_batch_size = 256
    # Of the clients' gradient descent.
    config.learning_rate = 0.05
    config.momentum = 0.0
    config.participation = ConfigDict(
        {"fraction": 1.0, "available": 1.0, "dropout": 0.0, "stragglers": 0.0, "late": "partial", "staleness": 1}
    )
    # One of jaxeff.federated.backends.BACKENDS, or "auto" for the fastest of some, measured once.
    config.backend = "stream"
    config.chunk = 8
    config.augment = ConfigDict({"crop": 0, "flip": False})
    config.eval_every = 1
    config.checkpoint_every = 0
    config.keep = 2
    config.tensorboard = False
    return config


def partition(kind: str, **options: Any) -> ConfigDict:
    """Who holds what: "iid", "by_classes" (classes_per_client=2), "dirichlet" or "quantity" (alpha=0.5)."""
    return ConfigDict({"kind": kind, "options": ConfigDict(options)})


def method(
    model: str,
    algorithm: str = "fed_avg",
    *,
    groups: int = 0,
    first: str | None = None,
    mode: str = "full",
    entry: str = "split",
    by: str = "class_counts",
    psi_net: bool = False,
    options: dict[str, Any] | None = None,
    robust: dict[str, Any] | None = None,
    compression: dict[str, Any] | None = None,
    privacy: dict[str, Any] | None = None,
    **architecture: Any,
) -> ConfigDict:
    """One method of an experiment: a network, an algorithm with its options, and groups of features where it has some.

    Args:
      model: a name of `jaxeff.models.ZOO`, with `architecture` for its options.
      algorithm: "fed_avg", "fed_prox", "fed_opt", "scaffold", "fed_nova", "moon", "fed_bn".
      groups: of Fed2; 0 for a network without.
      first: the layer with which the groups begin.
      mode: "full" or "subset".
      entry: "split" or "all".
      by: weights of a group's owners: "class_counts", "uniform" or "size".
      psi_net: Psi-Net's groups in the place of Fed2's.
      options: of the algorithm, such as {"mu": 0.01}.
      robust: {"rule": "median", "trimmed_mean", "krum" or "bulyan"}, with "share" or "byzantine", "clip", and for
        MultiKrum "select".
      compression: {"bits": 8} and, or, {"share": 0.01} of the largest numbers; "feedback".
      privacy: {"kind": "central" or "local"}, with "clip", "noise", and for the norm that is found "quantile".
      **architecture: options of the model.
    """
    section = ConfigDict({"network": network(model, **architecture), "algorithm": algorithm})
    section.options = ConfigDict(options or {})
    section.groups = ConfigDict({"number": groups, "mode": mode, "entry": entry, "by": by, "psi_net": psi_net})
    section.groups.first = config_dict.placeholder(str)
    section.groups.first = first
    section.robust = _changed({"rule": "", "byzantine": 0, "select": 1, "share": 0.1, "clip": 0.0}, robust)
    section.compression = _changed({"bits": 0, "share": 0.0, "feedback": True}, compression)
    section.privacy = _changed({"kind": "", "clip": 1.0, "noise": 1.0, "quantile": 0.0, "delta": 1e-5}, privacy)
    return section


def _changed(defaults: dict[str, Any], given: dict[str, Any] | None) -> ConfigDict:
    if unknown := sorted(set(given or {}) - set(defaults)):
        raise ValueError(f"unknown fields {', '.join(unknown)}; there are {', '.join(defaults)}")
    return ConfigDict({**defaults, **(given or {})})
