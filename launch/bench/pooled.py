"""Benchmarks of pooled look-ups on one core: the pure form, compiled code, and compiled code on quantised rows.

    python -c "from launch.bench import pooled; print(*pooled.CASES)"

Peers: take and segment_sum in JAX; torch's embedding_bag; FBGEMM's look-up of int8 rows, where it can be had beside
this torch (pip install --no-deps --target FOLDER fbgemm-gpu-cpu==1.8.0, and FOLDER in PYTHONPATH), and torch's own.

Each case runs in a process of its own that is bound to one core before XLA and torch count them. All read the same
memory: rows at the beginning of lines of the cache, in pages as large as the system gives.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.ops import embedding_bag, native
from launch.bench import results
from launch.bench.timing import Times, contest

ROWS, DIM, BAGS, ENTRIES = 1_000_000, 64, 2048, 32
# Together they touch more rows than a last-level cache holds, so that a look-up meets memory as it does in service.
SETS = 4
_PAGE = 1 << 21


class Problem:
    """Random bags of equal length over one table, in the forms that every contestant takes."""

    def __init__(self, rows: int = ROWS, dim: int = DIM, bags: int = BAGS, entries: int = ENTRIES):
        rng = np.random.default_rng(0)
        self.rows, self.dim, self.bags, self.entries = rows, dim, bags, entries
        self.values = _aligned(rng.standard_normal((rows, dim), np.float32))
        self.ids = [rng.integers(0, rows, (bags, entries)).astype(np.int32) for _ in range(SETS)]
        self.offsets = np.arange(bags + 1, dtype=np.int32) * entries

    def ours(self, table: np.ndarray, look_up: Callable[..., jax.Array]) -> Callable[[], list[jax.Array]]:
        """look_up(table, ids [nnz], offsets), compiled."""
        run = jax.jit(look_up)
        shared = jax.device_put(table, may_alias=True)
        inputs = [(jnp.asarray(ids.reshape(-1)), jnp.asarray(self.offsets)) for ids in self.ids]
        return lambda: [run(shared, *each) for each in inputs]

    def quantised(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bytes [rows, dim], scale and bias float16 [rows, 2], fused rows with these in float32)."""
        low, high = self.values.min(1, keepdims=True), self.values.max(1, keepdims=True)
        factors = np.concatenate([(high - low) / 255, low], 1).astype(np.float16)
        scale, bias = np.split(factors.astype(np.float32), 2, 1)
        whole = np.clip(np.rint((self.values - bias) / scale), 0, 255).astype(np.uint8)
        return whole, factors, _aligned(np.concatenate([whole, factors.astype(np.float32).view(np.uint8)], 1))


def jax_form(pairs: int, **sizes: int) -> Iterator[dict[str, Any]]:
    """The scan form beside take and segment_sum, both in JAX."""
    problem = Problem(**sizes)
    shape = problem.bags, problem.entries

    def scan(table, ids, offsets):
        return embedding_bag.pooled_lookup(table, ids.reshape(shape), jnp.diff(offsets))

    def textbook(table, ids, offsets):
        bag = jnp.repeat(jnp.arange(problem.bags), jnp.diff(offsets), total_repeat_length=len(ids))
        return jax.ops.segment_sum(jnp.take(table, ids, 0), bag, problem.bags, indices_are_sorted=True)

    contestants = {
        "ours": problem.ours(problem.values, scan),
        "textbook": problem.ours(problem.values, textbook),
    }
    _agree(contestants)
    times = contest(contestants, pairs=pairs, warmup=2)
    yield results.time_ratio(
        "pooled.jax", times, "ours", "textbook", target=1 / 4, against=_words(problem, "take and segment_sum in JAX")
    )


def native_form(pairs: int, **sizes: int) -> Iterator[dict[str, Any]]:
    """Compiled code beside torch, float32."""
    torch = _torch()
    native.register(embedding_bag.SOURCE, embedding_bag.SYMBOL)
    problem = Problem(**sizes)
    table = torch.from_numpy(problem.values)
    contestants: dict[str, Callable[[], Any]] = {"ours": problem.ours(problem.values, embedding_bag.embedding_bag_csr)}
    for dtype in (torch.int32, torch.int64):
        ids = [torch.from_numpy(each.reshape(-1)).to(dtype) for each in problem.ids]
        offsets = torch.from_numpy(problem.offsets).to(dtype)
        look_up = partial(torch.nn.functional.embedding_bag, mode="sum", include_last_offset=True)
        contestants[f"torch {dtype}"] = _each(lambda i, look_up=look_up, o=offsets: look_up(i, table, o), ids)
    _agree(contestants)
    times = contest(contestants, pairs=pairs, warmup=2)
    peer = times.fastest(*(name for name in contestants if name != "ours"))
    yield results.time_ratio(
        "pooled.native", times, "ours", peer, target=1 / 1.2, against=_words(problem, "embedding_bag of torch")
    )


def int8_form(pairs: int, **sizes: int) -> Iterator[dict[str, Any]]:
    """Compiled code on rows of bytes beside FBGEMM and torch."""
    torch = _torch()
    native.register(embedding_bag.SOURCE, embedding_bag.SYMBOL)
    problem = Problem(**sizes)
    whole, factors, fused = problem.quantised()
    table, offsets = torch.from_numpy(fused), torch.from_numpy(problem.offsets)
    ids = [torch.from_numpy(each.reshape(-1)) for each in problem.ids]
    look_up = partial(torch.ops.quantized.embedding_bag_byte_rowwise_offsets, include_last_offset=True)
    contestants: dict[str, Callable[[], Any]] = {
        "ours": problem.ours(fused, partial(embedding_bag.embedding_bag_csr, kind="int8", dim=problem.dim)),
        "torch": _each(lambda i: look_up(table, i, offsets), ids),
    }
    peer = _fbgemm(torch, whole, factors)
    if peer is not None:
        contestants["fbgemm"] = _each(lambda i: peer(i, offsets), ids)
    _agree(contestants)
    times = contest(contestants, pairs=pairs, warmup=2)
    if peer is not None:
        yield _int8_case("pooled.int8", times, "fbgemm", problem, "int8 look-up of FBGEMM 1.8", 1 / 2)
    yield _int8_case("pooled.int8_torch", times, "torch", problem, "int8 look-up of torch", None)


def _int8_case(name: str, times: Times, peer: str, problem: Problem, words: str, target: float | None):
    return results.time_ratio(name, times, "ours", peer, target=target, against=_words(problem, words))


def _fbgemm(torch: Any, whole: np.ndarray, factors: np.ndarray) -> Callable[[Any, Any], Any] | None:
    """FBGEMM's table of these rows, or None where it cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fbgemm_gpu.split_embedding_configs import SparseType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
            from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
    except (ImportError, OSError, RuntimeError) as error:  # or made for another torch
        print(f"no FBGEMM: {error}", file=sys.stderr)
        return None
    of = ("", *whole.shape, SparseType.INT8, EmbeddingLocation.HOST)
    table = IntNBitTableBatchedEmbeddingBagsCodegen([of], output_dtype=SparseType.FP32, device="cpu")
    table.fill_random_weights()
    ((rows, scales),) = table.split_embedding_weights()
    rows.copy_(torch.from_numpy(whole))
    scales.copy_(torch.from_numpy(factors.view(np.uint8)))
    return table


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError('this peer needs torch: pip install "jaxeff[bench]"') from error
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return torch


def _each(run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], list[Any]]:
    return lambda: [run(one) for one in inputs]


def _agree(contestants: Mapping[str, Callable[[], list[Any]]]) -> None:
    """A contest of different sums would be none."""
    ours = contestants["ours"]()
    for name, run in contestants.items():
        for one, other in zip(ours, run(), strict=True):
            np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-3, atol=1e-3, err_msg=name)


def _aligned(array: np.ndarray) -> np.ndarray:
    """The same numbers, from the beginning of a large page on."""
    room = np.empty(array.nbytes + _PAGE, np.uint8)
    begin = -room.ctypes.data % _PAGE
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def _words(problem: Problem, peer: str) -> str:
    size = f"{problem.rows:,} rows of {problem.dim}, {problem.bags} bags of {problem.entries}"
    return f"{peer}, one core, {size}"


def alone(form: str, pairs: int) -> None:
    """Binds this process to one core, and prints the cases of a form as JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for item in FORMS[form](pairs):
        print(json.dumps(item), flush=True)


def _in_its_own_process(form: str, pairs: int) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-c", f"from launch.bench import pooled; pooled.alone({form!r}, {pairs})"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        raise ImportError(last) if last.startswith("ImportError") else RuntimeError(last)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


FORMS = {"jax": jax_form, "native": native_form, "int8": int8_form}
CASES = {f"pooled.{form}": partial(_in_its_own_process, form) for form in FORMS}
