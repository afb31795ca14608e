"""The fields that every classification experiment has, with their defaults; experiments change what they need."""

from typing import Any

from ml_collections import ConfigDict, config_dict


def base(dataset: str) -> ConfigDict:
    """All fields of `launch.train`.

    Zero for `steps`, `eval_every` and `checkpoint_every` means: from `epochs`, ten times a run, four times a run.
    """
    config = ConfigDict()
    config.dataset = dataset
    config.train_split = "train"
    config.test_split = "test"
    config.seeds = (0,)
    config.batch_size = 128
    config.eval_batch_size = 256
    config.epochs = 10
    config.steps = 0
    config.networks = ConfigDict()
    # Names of networks from cheap to dear that let easy images leave early, see jaxeff.dynamic.traverse; () for none.
    config.cascade = ()
    config.dtype = "float32"
    config.optimizer = ConfigDict()
    config.label_smoothing = 0.0
    config.ema_decay = config_dict.placeholder(float)
    config.augment = ConfigDict({"crop": 0, "flip": False, "cutout": 0, "mixup": 0.0})
    # Pace and shrinking of the quadratic parameters, see jaxeff.quadratic.restrain; 1 and 1 restrain nothing.
    config.restrain = ConfigDict({"gamma": 1.0, "shrink": 1.0})
    config.eval_every = 0
    config.log_every = 20
    config.checkpoint_every = 0
    config.keep = 3
    config.latency_batch = 64
    config.tensorboard = False
    config.distributed = ConfigDict(
        {
            "coordinator_address": config_dict.placeholder(str),
            "num_processes": config_dict.placeholder(int),
            "process_id": config_dict.placeholder(int),
        }
    )
    return config


def quadralib_cifar10(arg: str, *, epochs: int, end: float) -> ConfigDict:
    """QuadraLib's training on CIFAR-10 (github.com/zarekxu/QuadraLib): batch 256, cosine from 0.1 to `end`, clipping.

    With "smoke" for `arg`, two steps on 64 images.
    """
    config = base("cifar10")
    config.batch_size = 256
    config.epochs = epochs
    if arg == "smoke":
        config.train_split, config.test_split = "train[:64]", "test[:64]"
        config.batch_size, config.steps = 32, 2
    config.optimizer = sgd(0.1, end=end)
    config.augment.update({"crop": 4, "flip": True})
    config.log_every = 50
    return config


def network(
    model: str,
    *,
    kind: str = "first_order",
    branch_norm: str | None = None,
    save: str = "all",
    initialization: str = "kaiming",
    **options: Any,
) -> ConfigDict:
    """One network of an experiment: a name of `jaxeff.models.ZOO` with its options, and the kind of its neurons.

    `save` is the memory policy of its layers ("all", "ab" or "x"), `initialization` "kaiming" or "relinear".
    """
    section = ConfigDict({"model": model, "kind": kind, "options": ConfigDict(options)})
    section.update({"save": save, "initialization": initialization})
    section.branch_norm = config_dict.placeholder(str)
    section.branch_norm = branch_norm
    section.select = config_dict.placeholder(str)
    section.gates, section.learned = (config_dict.placeholder(ConfigDict) for _ in range(2))
    return section


def gates(
    channels: float | tuple[float, ...] | None,
    columns: float | tuple[float, ...] | None = 0.0,
    *,
    rule: str = "ascent",
    source: str | None = None,
    macs: float | None = None,
    seconds: float | None = None,
    **settings: Any,
) -> ConfigDict:
    """What `network(...).gates` is set to: dynamic pruning of a network, see `jaxeff.dynamic`.

    Shares of channels and columns that are dropped are one number, one for each block, or None: then they are chosen by
    the sensitivity of the source, on `sensitivity_split`, so that a share `macs` of the multiply-accumulates or a share
    `seconds` of the time of the gated convolutions is left.

    `rule` is how the network learns: "ascent" raises the ratios from `start` by `increment` until they are reached
    after `climb` of all steps; "sandwich" has four between none and these in every step, each for a quarter of the
    batch; "none" trains nothing. `source` is the network of the experiment, named before, whose weights it starts from.
    `epochs` is how long it learns, where that is not as long as the others. `calibrate` batches renew the norms in the
    end. With `snap`, ratios of channels are lowered as far as that costs no time on this machine, see
    `jaxeff.dynamic.snap_ratios`. `settings` are these and those of `jaxeff.dynamic.DynamicSpec`, of which group_size
    and tile may be one for each block.
    """
    section = ConfigDict({"rule": rule, "start": 0.1, "increment": 0.05, "climb": 0.5, "calibrate": 0, "snap": False})
    section.update({"order": "parallel", "reduce": "mean", "ranking": "attention", "engine": "auto"})
    for name in ("channels", "columns", "group_size", "tile"):
        section[name] = config_dict.placeholder(object)
    section.source, section.sensitivity_split = (config_dict.placeholder(str) for _ in range(2))
    section.epochs = config_dict.placeholder(int)
    section.macs, section.seconds = (config_dict.placeholder(float) for _ in range(2))
    section.update({"channels": channels, "columns": columns, "group_size": 1, "tile": 1})
    section.update({"source": source, "macs": macs, "seconds": seconds, **settings})
    return section


def learned(method: str, **settings: Any) -> ConfigDict:
    """What `network(...).learned` is set to: convolutions with gates that learn, in the place of all that are dense.

    `method` is "boosted" (feature boosting, FBS) or "channel_gated"; `settings` are the attributes of
    `jaxeff.dynamic.BoostedConv` or `ChannelGatedConv` that an architecture does not say.
    """
    return ConfigDict({"method": method, **settings})


def sgd(rate: float, *, warmup: int = 0, weight_decay: float = 5e-4, end: float = 0.0) -> ConfigDict:
    """SGD with momentum 0.9, a cosine schedule and global-norm clipping at 0.5, QuadraLib's recipe."""
    schedule = ConfigDict({"name": "cosine", "base": rate, "warmup": warmup, "end": end})
    return ConfigDict(
        {"name": "sgd", "momentum": 0.9, "weight_decay": weight_decay, "clip_norm": 0.5, "schedule": schedule}
    )
