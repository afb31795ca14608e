"""Which of several forms of a computation is fastest on this machine: measured once, remembered in a file.

Nothing is ever measured behind the user's back: functions called `tune` measure, and layers whose form is "auto" look
up what they found.
"""

import functools
import itertools
import json
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of its time that a form must save to be taken in the place of a standard.
MARGIN = 0.1
# Forms are timed for so many seconds on average, in as many turns at most, as the median of a few short ones depends
# on what else the machine does.
LEAST, MOST = 0.05, 50
MOST_COPIES = 32


def cache_folder() -> pathlib.Path:
    """Where what was found out about this machine is kept: $JAXEFF_CACHE_DIR, or jaxeff in the user's cache folder."""
    if named := os.environ.get("JAXEFF_CACHE_DIR"):
        return pathlib.Path(named)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxeff"


def table_path() -> pathlib.Path:
    """The file: autotune.json in `cache_folder`."""
    return cache_folder() / "autotune.json"


def signature(what: str, arrays: Sequence[Any], *settings: Any) -> str:
    """Names a computation by everything its speed depends on: device, jax, shapes, dtypes, settings.

    Args:
      what: the kind of computation.
      arrays: its operands, arrays or `jax.ShapeDtypeStruct`.
      *settings: whatever else its speed depends on, by its `str`.
    """
    shapes = "+".join(f"{a.dtype.name}{list(a.shape)}" for a in arrays)
    device = jax.devices()[0].device_kind
    if device == "cpu":  # a home folder may be that of several machines
        device = f"cpu {processor()[0]}"
    return "|".join([what, device, str(os.cpu_count()), f"jax {jax.__version__}", shapes, *map(str, settings)])


@functools.cache
def processor() -> tuple[str, str]:
    """The name of the processor, and all that code compiled for it alone may depend on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor(), platform.platform()
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    names = [line.partition(":")[2].strip() for line in told if line.startswith(("model name", "CPU part"))]
    return "".join(names[:1]), "\n".join(told)


def lookup(name: str) -> str | None:
    """The form that was fastest for this signature, or None where nobody measured."""
    return _table(table_path(), _changed(table_path())).get(name)


def remember(found: dict[str, str]) -> None:
    """Adds entries to the table; the file is at every moment whole."""
    path = table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({**_table(path, _changed(path)), **found}, indent=1, sort_keys=True))
    temporary.replace(path)


def fastest(
    forms: Mapping[str, Callable[..., Any]],
    arguments: Iterable[Any],
    rounds: int = 5,
    standard: str | None = None,
    footprint: int = 0,
) -> str:
    """Name of the form with the lowest time, of which a quarter of its runs were faster.

    Args:
      forms, arguments, rounds, footprint: as of `seconds`.
      standard: the form that is taken unless another takes a tenth less time, so that no accident of a busy machine is
        remembered; the others may fail to compile.
    """
    optional = () if standard is None else set(forms) - {standard}
    times = seconds(forms, arguments, rounds, optional, footprint)
    # What else the machine does makes runs slower, never faster: the lower half says more.
    took = {name: float(np.quantile(values, 0.25)) for name, values in times.items()}
    best = min(took, key=took.__getitem__)
    return best if standard is None or took[best] < (1 - MARGIN) * took[standard] else standard


def seconds(
    forms: Mapping[str, Callable[..., Any]],
    arguments: Iterable[Any],
    rounds: int = 5,
    optional: Collection[str] = (),
    footprint: int = 0,
) -> dict[str, list[float]]:
    """Wall time of every form, compiled, taking turns in random order: neither drift nor what ran before favours one.

    Args:
      forms: functions of the arguments.
      arguments: pytrees of arrays or shapes; random numbers of these shapes are used.
      rounds: how often each of them runs, after a first time that does not count; more often where that is short.
      optional: forms that are left out, with a warning, where they do not compile.
      footprint: bytes that are read between two calls where the computation is used, for example by the other layers of
        a network. Calls take turns with as many copies of the arguments, so that these are as far from the processor.

    Returns:
      The times of each form in the order of the rounds.

    Raises:
      ValueError: if rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    rng = np.random.default_rng(0)  # jax.random would compile a program for every shape
    values = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype), tuple(arguments))
    compiled = {}
    for name, form in forms.items():
        try:
            compiled[name] = jax.jit(form).lower(*values).compile()
        except Exception as error:  # compilers fail in ways of their own
            if name not in optional:
                raise
            warnings.warn(f"{name!r} is left out, as it does not compile here: {error}", stacklevel=2)

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(values))
    number = min(MOST_COPIES, max(1, -(-footprint // max(size, 1))))
    copies = itertools.cycle([values, *(jax.tree.map(jnp.copy, values) for _ in range(number - 1))])

    def turn() -> dict[str, float]:
        took = {}
        # In another order every time, or the operands would always be in the cache for whoever follows a quick one.
        for i in rng.permutation(len(compiled)):
            (name, run), operands = contestants[i], next(copies)
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            took[name] = time.perf_counter() - start
        return took

    contestants = list(compiled.items())
    turn()
    more = int(LEAST * len(compiled) / (sum(turn().values()) or 1.0))
    turns = [turn() for _ in range(max(rounds, min(MOST, more)))]
    return {name: [took[name] for took in turns] for name in compiled}


@functools.lru_cache(maxsize=4)
def _table(path: pathlib.Path, changed: float) -> dict[str, str]:
    try:
        return json.loads(path.read_text()) if changed else {}
    except ValueError:
        return {}  # a damaged cache is an empty one


def _changed(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
