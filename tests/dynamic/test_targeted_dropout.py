"""Ratio ascent, sandwich training and calibration: what the network sees at each step, compiled once."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import dynamic, models, training
from jaxeff.dynamic import DynamicSpec

PLAN = models.vgg((8, "M", 8, 8), num_classes=3, input_shape=(8, 8, 3))
GATED = dynamic.gate(PLAN, DynamicSpec(channels=0.5, columns=0.5))
NETWORK = models.Network(GATED, gate=dynamic.gate_layer)
PATHS = dynamic.block_paths(GATED)
X = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(NETWORK.init)(jax.random.key(0), X)


def static(table):
    return models.Network(dynamic.with_ratios(GATED, table), gate=dynamic.gate_layer)


def test_the_ascent_climbs_to_each_target_and_stays():
    schedule = dynamic.ratio_ascent([[0.3, 0.0], [0.12, 0.05]], start=0.1, increment=0.1, every=10)
    expected = {0: (0.1, 0, 0.1, 0.05), 9: (0.1, 0, 0.1, 0.05), 10: (0.2, 0, 0.12, 0.05), 25: (0.3, 0, 0.12, 0.05)}
    for step, ratios in expected.items():
        np.testing.assert_allclose(schedule(step).reshape(-1), ratios, rtol=1e-6)
    np.testing.assert_allclose(schedule(10_000), [[0.3, 0], [0.12, 0.05]], rtol=1e-6)


def test_the_ascent_ends_when_it_says():
    for target in (0.05, 0.1, 0.3, 0.33):
        arguments = dict(start=0.1, increment=0.1, every=7)
        steps, schedule = (
            dynamic.ascent_steps([[target, 0]], **arguments),
            dynamic.ratio_ascent([[target, 0]], **arguments),
        )
        assert float(schedule(steps)[0, 0]) == pytest.approx(target)
        assert not steps or float(schedule(steps - 1)[0, 0]) < target - 1e-6


def test_blocks_name_the_gates_of_the_variables():
    assert PATHS == (("conv2/layer/gate",), ("conv3/layer/gate",))
    residual = dynamic.gate(models.resnet(8), DynamicSpec(channels=0.5))
    assert dynamic.block_paths(residual)[1] == ("stage2_block1/conv2/layer/gate",)


def test_traced_ratios_do_what_static_ones_do(variables):
    table = [[0.5, 0.25], [0.25, 0.75]]
    traced = NETWORK.apply({**variables, "ratios": dynamic.ratio_variables(PATHS, table)}, X)
    np.testing.assert_allclose(traced, static(table).apply(variables, X), rtol=1e-5, atol=1e-6)


def test_where_ratios_stand_engines_compute_in_the_same_compilation(variables, monkeypatch):
    table, ran = [[0.5, 0.25], [0.25, 0.5]], []
    schedule = dynamic.ratio_ascent(table, start=0.0, increment=0.25, every=1)
    engine = dynamic.ENGINES["channels_and_columns"]

    def watched(*call):
        jax.debug.callback(lambda: ran.append(1))
        return engine.run(*call)

    monkeypatch.setitem(dynamic.ENGINES, "channels_and_columns", engine._replace(run=watched))

    def steps(engine):
        gates = [DynamicSpec(channels=c, columns=s, engine=engine) for c, s in table]
        network = models.Network(dynamic.gate(PLAN, gates), gate=dynamic.gate_layer)
        functions = dynamic.targeted_dropout(training.from_linen(network), PATHS, schedule)
        chex.clear_trace_counter()

        @jax.jit
        @chex.assert_max_traces(1)
        def step(state):
            def loss(params):
                outputs, rest = functions.apply({**state, "params": params}, X, True, jax.random.key(0))
                return (outputs**2).sum(), rest

            slope, rest = jax.grad(loss, has_aux=True)(state["params"])
            return {"params": jax.tree.map(lambda p, g: p - 1e-3 * g, state["params"], slope), **rest}

        state = {**variables, "ascent": {"step": jnp.zeros((), jnp.int32)}}
        for _ in range(4):
            state = step(state)
        return state, functions.apply(state, X, False, None)[0]

    found, expected = steps("channels_and_columns"), steps("mask")
    jax.effects_barrier()
    # Ratios climb in steps 0 and 1. In 2 and 3, and in the evaluation, both layers run their engine: forward, and
    # again, but for what nobody reads, backward.
    assert len(ran) >= 2 * 3 and found[0]["ascent"]["step"] == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_every_sample_may_have_its_own_ratios(variables):
    tables = np.random.default_rng(1).integers(0, 4, (len(X), 2, 2)) / 4
    together = NETWORK.apply({**variables, "ratios": dynamic.ratio_variables(PATHS, np.moveaxis(tables, 0, -1))}, X)
    for i, table in enumerate(tables):
        expected = static(table).apply(variables, X[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], expected, rtol=1e-5, atol=1e-6)


def test_one_compilation_trains_the_whole_ascent_and_its_step_is_part_of_the_state(variables):
    schedule = dynamic.ratio_ascent([[0.5, 0.0], [0.75, 0.5]], start=0.0, increment=0.25, every=1)
    functions = dynamic.targeted_dropout(training.from_linen(NETWORK), PATHS, schedule)
    state = functions.init(jax.random.key(0), X)
    assert state["ascent"] == {"step": 0}

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state):
        return functions.apply(state, X, True, jax.random.key(0))

    for i in range(5):
        outputs, kept = step(state)
        if i in (0, 2):  # what the network does at a step is what it does with that step's ratios as static ones
            expected, changed = static(schedule(i)).apply(
                {name: value for name, value in state.items() if name != "ascent"}, X, True, mutable=["batch_stats"]
            )
            np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
            chex.assert_trees_all_close(kept["batch_stats"], changed["batch_stats"], rtol=1e-4, atol=1e-5)
        state = {"params": state["params"], **kept}
        assert set(state) == {"params", "batch_stats", "ascent"} and int(state["ascent"]["step"]) == i + 1
    outputs, kept = functions.apply(state, X, False, None)
    assert int(kept["ascent"]["step"]) == 5  # evaluation does not climb


def test_the_training_loop_takes_it_as_it_is():
    schedule = dynamic.ratio_ascent([[0.5, 0.0]] * 2, every=1)
    functions = dynamic.targeted_dropout(training.from_linen(NETWORK), PATHS, schedule)
    method = training.classification(*functions, optax.sgd(0.1), num_classes=3)
    batch = {"image": jnp.asarray(X), "label": jnp.arange(8) % 3}
    state = method.init(jax.random.key(0), batch)
    step = jax.jit(method.step)
    for _ in range(3):
        state, metrics = step(state, batch)[:2]
    assert int(state.model_state["ascent"]["step"]) == 3


def test_every_quarter_of_the_sandwich_is_a_batch_of_its_own(variables):
    low, high = [[0.0, 0.0]] * 2, [[0.75, 0.5]] * 2
    functions = dynamic.sandwich(training.from_linen(NETWORK), PATHS, low, high)
    shares = np.concatenate([[0, 1], jax.random.uniform(jax.random.fold_in(jax.random.key(3), 1), (2,))])
    assert len(set(shares)) == 4
    outputs, state = jax.jit(functions.apply, static_argnums=2)(variables, X, True, jax.random.key(3))
    assert outputs.shape == (8, 3) and set(state) == {"batch_stats"}
    for quarter, share in enumerate(shares):
        ratios = dynamic.ratio_variables(PATHS, share * np.array(high))
        under = {**variables, "ratios": ratios}
        logits, after = training.from_linen(NETWORK).apply(under, X[quarter::4], True, jax.random.key(0))
        np.testing.assert_allclose(outputs[quarter::4], logits, rtol=1e-4, atol=1e-5)
        if quarter == 1:
            chex.assert_trees_all_close(state["batch_stats"], after["batch_stats"], rtol=1e-4, atol=1e-5)


def test_the_sandwich_is_evaluated_at_the_highest_ratios_and_needs_keys_and_quarters(variables):
    functions = dynamic.sandwich(training.from_linen(NETWORK), PATHS, [[0.0, 0.0]] * 2, [[0.75, 0.5]] * 2)
    expected = static([[0.75, 0.5]] * 2).apply(variables, X)
    np.testing.assert_allclose(functions.apply(variables, X, False, None)[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a PRNG key is needed when train=True"):
        functions.apply(variables, X, True, None)
    with pytest.raises(ValueError, match="trains on quarters, but the batch has 6 examples"):
        functions.apply(variables, X[:6], True, jax.random.key(0))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(not train, momentum=0.9)(x)


def test_calibrated_norms_have_the_statistics_of_the_batches():
    batches = [np.random.default_rng(i).normal(2, 3, size=(16, 4)).astype(np.float32) for i in range(3)]
    functions = training.from_linen(Normed())
    variables = functions.init(jax.random.key(0), batches[0])
    stats = dynamic.calibrate(functions, variables, batches)["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], np.mean([b.mean(0) for b in batches], 0), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], np.mean([b.var(0) for b in batches], 0), rtol=1e-4)


def test_calibration_is_for_the_given_ratios(variables):
    table = [[0.5, 0.25], [0.25, 0.5]]
    functions = training.from_linen(NETWORK)
    ours = dynamic.calibrate(functions, variables, [X, X[::-1]], paths=PATHS, table=table)
    expected = dynamic.calibrate(training.from_linen(static(table)), variables, [X, X[::-1]])
    chex.assert_trees_all_close(ours, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="batches is empty"):
        dynamic.calibrate(functions, variables, [])
    with pytest.raises(ValueError, match="batch 1 is empty"):
        dynamic.calibrate(functions, variables, [X, X[:0]])
    with pytest.raises(ValueError, match="paths and table belong together"):
        dynamic.calibrate(functions, variables, [X], table=table)
    with pytest.raises(ValueError, match="variables have no batch_stats"):
        dynamic.calibrate(functions, {"params": {}}, [X])


def test_paths_that_no_gate_has_are_found(variables):
    wrong, functions = [["conv2/layer/gate"], ["conv9/layer/gate"]], training.from_linen(NETWORK)
    message = r"no gate reads the ratios of \['conv9/layer/gate'\]; the gates are at \['conv2/layer/gate', 'conv3/"
    with pytest.raises(ValueError, match=message):
        dynamic.calibrate(functions, variables, [X], paths=wrong, table=np.zeros((2, 2)))
    dropped = dynamic.targeted_dropout(functions, wrong, lambda step: jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: dropped.apply({**variables, "ascent": {"step": 0}}, X, True, jax.random.key(0)))
    labels = np.zeros(len(X), int)
    with pytest.raises(ValueError, match=message):
        dynamic.sensitivity(NETWORK.apply, variables, X, labels, wrong)
    with pytest.raises(ValueError, match=r"names are of 2 blocks, got 1: \('first',\)"):
        dynamic.sensitivity(NETWORK.apply, variables, X, labels, PATHS, names=["first"])


def test_bad_schedules_and_tables_are_refused():
    with pytest.raises(ValueError, match=r"targets must be \[blocks, 2\] \(channels, columns\), got shape \(2,\)"):
        dynamic.ratio_ascent([0.5, 0.5], every=1)
    with pytest.raises(ValueError, match=r"ratios are shares that are dropped, in \[0, 1\)"):
        dynamic.ratio_ascent([[1.0, 0.0]], every=1)
    with pytest.raises(ValueError, match="increment must be above 0 and every at least 1, got 0.05 and 0"):
        dynamic.ratio_ascent([[0.5, 0.0]], every=0)
    with pytest.raises(ValueError, match=r"table must be \[2, 2\], a pair for each block, got shape \(3, 2\)"):
        dynamic.ratio_variables(PATHS, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="table must have 2 rows, one for each block, got 1"):
        dynamic.with_ratios(GATED, [[0.5, 0.5]])


def test_calibration_leaves_frozen_norms_as_they_are():
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
            return nn.BatchNorm(use_running_average=not train, name="other")(x)

    functions = training.from_linen(Frozen())
    variables = functions.init(jax.random.key(0), X)
    variables["batch_stats"]["frozen"] = jax.tree.map(lambda leaf: leaf + 3, variables["batch_stats"]["frozen"])
    found = dynamic.calibrate(functions, variables, [X])["batch_stats"]
    chex.assert_trees_all_equal(found["frozen"], variables["batch_stats"]["frozen"])
    frozen = (X - 3) / np.sqrt(4 + 1e-5)
    np.testing.assert_allclose(found["other"]["mean"], frozen.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)


def test_ratios_are_given_once_and_in_range(variables):
    functions = training.from_linen(NETWORK)
    schedule = dynamic.ratio_ascent([[0.5, 0.0]] * 2, every=10)
    trained = dynamic.targeted_dropout(functions, PATHS, schedule)
    state = {**variables, "ascent": {"step": jnp.zeros((), jnp.int32)}, "batch_stats": {"mean": jnp.zeros(1)}}
    with pytest.raises(ValueError, match="the ratios of the gates are given twice"):
        dynamic.calibrate(trained, state, [X], paths=PATHS, table=[[0.5, 0.0]] * 2)
    high = [[1.5, 0.0]] * 2
    for wrong in (
        lambda: dynamic.ratio_variables(PATHS, high),
        lambda: dynamic.sandwich(functions, PATHS, [[0.0, 0.0]] * 2, high),
        lambda: dynamic.calibrate(functions, variables | {"batch_stats": {"a": X}}, [X], paths=PATHS, table=high),
        lambda: dynamic.ascent_steps(high, every=10),
        lambda: dynamic.masked_by_ratio(X, 1.5, 0.0, DynamicSpec()),
        lambda: dynamic.masked_by_ratio(X, 0.5, np.nan, DynamicSpec()),
    ):
        with pytest.raises(ValueError, match=r"dropped, in \[0, 1\)"):
            wrong()
    with pytest.raises(ValueError, match="has no gates to give ratios to"):
        dynamic.with_ratios(PLAN, [[0.5, 0.0]] * 2)
