"""The model against torch's numbers, frozen here, and against what its parts must be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import costs as cost_reports
from jaxeff.dlrm import model
from jaxeff.dlrm.model import DLRM, Architecture, WithTables, pool, preset

SIZES = {"dense": 4, "rows": (7, 5, 9), "dim": 3, "bottom": (6, 3), "top": (5, 1), "lookups": (3, 1, 4)}
VARIANTS = {
    "dot": Architecture(**SIZES),
    "itself": Architecture(**SIZES, interact_itself=True),
    "cat": Architecture(**SIZES, interaction="cat"),
    "cross": Architecture(**SIZES, interaction="cross", cross_layers=2, cross_rank=4),
}
# Made by torch 2.13 with the parameters and inputs below; `test_torch_still_says_so` makes them again.
LOGITS = {
    "dot": [-0.13469318, 0.27788442, 0.25683427, -5.7710342],
    "itself": [-13.11174, -0.17514634, -1.1905265, -7.0410609],
    "cat": [1.6209166, 1.8686469, 2.0917253, 2.8911521],
    "cross": [-0.17355251, -0.0078303814, 0.59263945, 8.2557573],
}


def parameters(architecture):
    """Standard normal numbers in the place of every parameter, in the order of the tree."""
    shapes = jax.eval_shape(DLRM(architecture).init, jax.random.key(0), *blank(architecture))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape) / 2), shapes)


def blank(architecture, batch=1):
    return jnp.zeros((batch, architecture.dense)), jnp.zeros((batch, len(architecture.rows), architecture.dim))


def inputs(architecture, batch=4):
    rng = np.random.default_rng(1)
    count, longest = len(architecture.rows), max(architecture.bag_lengths)
    tables = {
        name: np.float32(rng.normal(size=(rows, architecture.dim)))
        for name, rows in zip(architecture.table_names, architecture.rows, strict=True)
    }
    ids = rng.integers(0, min(architecture.rows), (batch, count, longest)).astype(np.int32)
    lengths = rng.integers(0, np.array(architecture.bag_lengths) + 1, (batch, count)).astype(np.int32)
    weights = np.float32(rng.uniform(0.5, 1.5, ids.shape))
    return np.float32(rng.normal(size=(batch, architecture.dense))), tables, ids, lengths, weights


def torch_logits(torch, architecture):
    """The reference in torch: embedding_bag, tril_indices, linear layers."""
    functional = torch.nn.functional
    dense, tables, ids, lengths, weights = inputs(architecture)
    tensors = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf)), parameters(architecture))
    linear = lambda x, p: x @ p["kernel"] + p.get("bias", 0)
    mlp = lambda x, p, last: _mlp(torch, linear, x, p, last)
    vectors = [mlp(torch.tensor(dense), tensors["bottom"], True)]
    for t, table in enumerate(tables.values()):
        inside = np.arange(ids.shape[2]) < lengths[:, t, None]
        offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths[:, t])[:-1]]))
        picked = torch.tensor(ids[:, t][inside]).long(), torch.tensor(weights[:, t][inside])
        vectors.append(
            functional.embedding_bag(picked[0], torch.tensor(table), offsets, mode="sum", per_sample_weights=picked[1])
        )
    stack = torch.stack(vectors, 1)
    if architecture.interaction == "dot":
        rows, columns = torch.tril_indices(stack.shape[1], stack.shape[1], 0 if architecture.interact_itself else -1)
        products = torch.bmm(stack, stack.transpose(1, 2))[:, rows, columns]
        x = torch.cat([vectors[0], products], 1)
    else:
        x = stack.flatten(1)
    if architecture.interaction == "cross":
        first = x
        for number in range(architecture.cross_layers):
            low = linear(x, tensors["cross"][f"down_{number}"])
            x = first * linear(low, tensors["cross"][f"up_{number}"]) + x
    return mlp(x, tensors["top"], False)[:, 0].numpy()


def _mlp(torch, linear, x, layers, last):
    for number in range(len(layers)):
        x = linear(x, layers[f"layer_{number}"])
        x = torch.relu(x) if last or number < len(layers) - 1 else x
    return x


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_torch(name):
    architecture = VARIANTS[name]
    dense, tables, *bags = inputs(architecture)

    @jax.jit
    def run(params, dense, tables, bags):
        return DLRM(architecture).apply({"params": params}, dense, pool(architecture, tables, *bags))

    np.testing.assert_allclose(run(parameters(architecture), dense, tables, bags), LOGITS[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_still_says_so(name):
    torch = pytest.importorskip("torch")
    np.testing.assert_allclose(torch_logits(torch, VARIANTS[name]), LOGITS[name], rtol=1e-5, atol=1e-5)


def test_pairs_are_those_of_a_loop():
    vectors = np.random.default_rng(2).normal(size=(2, 4, 3)).astype(np.float32)
    for itself in (False, True):
        expected = [[x[i] @ x[j] for i in range(4) for j in range(i + itself)] for x in vectors]
        np.testing.assert_allclose(model.pairwise_products(vectors, itself), expected, rtol=1e-5, atol=1e-6)


def test_tables_among_the_parameters_give_the_same_logits():
    architecture = VARIANTS["dot"]
    dense, tables, *bags = inputs(architecture)
    params = parameters(architecture)
    whole = WithTables(architecture, "mean").apply({"params": {"core": params, "tables": tables}}, dense, *bags)
    pooled = pool(architecture, tables, *bags, "mean")
    np.testing.assert_array_equal(whole, DLRM(architecture).apply({"params": params}, dense, pooled))
    made = jax.eval_shape(WithTables(architecture).init, jax.random.key(0), dense, *bags)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, {"core": params, "tables": tables})


def test_bags_by_name_are_the_rectangle():
    architecture = VARIANTS["dot"]
    _, tables, ids, lengths, weights = inputs(architecture)
    of_table = lambda array: {name: array[:, t] for t, name in enumerate(architecture.table_names)}
    short = lambda array: {n: array[:, t, :most] for (t, n), most in zip(
        enumerate(architecture.table_names), architecture.bag_lengths, strict=True)}  # fmt: skip
    expected = pool(architecture, tables, ids, lengths, weights)
    found = pool(architecture, tables, short(ids), of_table(lengths), short(weights))
    np.testing.assert_array_equal(found, expected)
    full = np.array(architecture.bag_lengths)[None].repeat(4, 0)
    np.testing.assert_array_equal(
        pool(architecture, tables, short(ids)), pool(architecture, tables, ids, full.astype(np.int32))
    )


def test_single_ids_need_no_third_axis():
    architecture = dataclasses.replace(VARIANTS["dot"], lookups=())
    _, tables, ids, _, weights = inputs(architecture)
    expected = pool(architecture, tables, ids, np.ones(ids.shape[:2], np.int32), weights)
    np.testing.assert_array_equal(pool(architecture, tables, ids[..., 0], None, weights[..., 0]), expected)


def test_without_dense_features_there_is_no_bottom():
    architecture = preset("small", dense=0, rows=(5, 6), dim=4)
    params = parameters(architecture)
    assert set(params) == {"top"} and architecture.interacted == 1
    _, pooled = blank(architecture, 3)
    assert DLRM(architecture).apply({"params": params}, jnp.zeros((3, 0)), pooled).shape == (3,)


def test_first_numbers_are_those_of_the_reference():
    tables = model.init_tables(jax.random.key(0), preset("small", dense=0, rows=(4, 10_000), dim=8))
    for table in tables.values():
        bound = len(table) ** -0.5
        assert -bound <= table.min() < -0.8 * bound and 0.8 * bound < table.max() <= bound
    core = jax.jit(DLRM(preset("small")).init)(jax.random.key(1), *blank(preset("small")))["params"]
    kernel, bias = core["top"]["layer_0"]["kernel"], core["top"]["layer_0"]["bias"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / sum(kernel.shape)), rtol=0.05)
    np.testing.assert_allclose(bias.std(), np.sqrt(1 / len(bias)), rtol=0.25)


@pytest.mark.parametrize("name", VARIANTS)
def test_costs_are_those_of_the_program(name):
    architecture = VARIANTS[name]
    dense, pooled = blank(architecture)
    counted = model.costs(architecture)
    params = parameters(architecture)
    run = lambda params, dense, pooled: DLRM(architecture).apply({"params": params}, dense, pooled)
    report = cost_reports.analyze(run, params, dense, pooled)
    assert (counted.macs, counted.core_params) == (report.total.macs, report.total.params)
    assert counted.table_params == 3 * 21 and counted.lookups == 8


def test_presets_are_the_published_sizes():
    sizes = {name: model.costs(found) for name, found in model.PRESETS.items()}
    assert len(model.MLPERF_ROWS) == len(model.MLPERF_LOOKUPS) == len(model.KAGGLE_ROWS) == 26
    # The specification of the benchmark: 204.2 million rows of 512 bytes, 214 look-ups; Kaggle's top reads 367 numbers.
    np.testing.assert_allclose(sizes["mlperf_v1"].table_bytes(), 104.5e9, rtol=1e-3)
    assert sizes["mlperf_dcnv2"].lookups == 214 and sizes["mlperf_v1"].lookups == 26
    assert model.PRESETS["kaggle"].interacted == 367 and sum(model.KAGGLE_ROWS) == 33_762_577
    assert max(preset("mlperf_v1").scaled(10**6).rows) == 10**6


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bottom": (6, 4)}, "bottom: the last width must be dim=3"),
        ({"bottom": ()}, "bottom: 4 dense features need some widths"),
        ({"dense": 0}, "bottom: 0 dense features need no widths"),
        ({"top": (5, 2)}, "top: the last width must be 1"),
        ({"rows": ()}, "rows: expected the rows of at least one"),
        ({"rows": (7, 0, 9)}, "rows: expected positive"),
        ({"lookups": (1,)}, "lookups: expected one for each of 3"),
        ({"interaction": "sum"}, "interaction: expected one of dot, cat, cross, got 'sum'"),
        ({"dense": 0, "bottom": (), "rows": (3,), "lookups": ()}, 'interaction: "dot" needs two vectors'),
    ],
)
def test_what_makes_no_model_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        Architecture(**{**SIZES, **changes})


def test_inputs_that_do_not_fit_are_refused():
    architecture = VARIANTS["dot"]
    dense, tables, ids, lengths, _ = inputs(architecture)
    params = {"params": parameters(architecture)}
    with pytest.raises(ValueError, match=r"pooled: expected shape \[B, 3, 3\], got \(4, 2, 3\)"):
        DLRM(architecture).apply(params, dense, jnp.zeros((4, 2, 3)))
    with pytest.raises(ValueError, match=r"dense: expected shape \[4, 4\], got \(4, 5\)"):
        DLRM(architecture).apply(params, jnp.zeros((4, 5)), jnp.zeros((4, 3, 3)))
    with pytest.raises(ValueError, match=r"ids: expected shape \[B, 3, at least 4\], got \(4, 3, 2\)"):
        pool(architecture, tables, ids[..., :2], lengths)
    with pytest.raises(ValueError, match="lengths: needed, as bags have 1 to 4 of 4"):
        pool(architecture, tables, ids)
    with pytest.raises(ValueError, match="ids: nothing for table_1, table_2"):
        pool(architecture, tables, {"table_0": ids[:, 0]})
    with pytest.raises(ValueError, match="name: expected one of mlperf_v1"):
        preset("large")
