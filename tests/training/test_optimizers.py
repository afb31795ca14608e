import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.training import OPTIMIZERS, SCHEDULES, decays, optimizer, optimizer_from, schedule, schedule_from

RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)},
    "grouped": {"bias": RNG.normal(size=(2, 4))},
    "norm": {"scale": RNG.normal(size=2)},
}
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape), PARAMS) for _ in range(4)]
IN_FLOAT32 = lambda tree: jax.tree.map(lambda x: x.astype(np.float32), tree)


def run(tx, grads=GRADS):
    params = IN_FLOAT32(PARAMS)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for grad in grads:
        params, state = step(params, state, IN_FLOAT32(grad))
    return params


def leafwise(update):
    """Runs an update written in NumPy (float64) on every leaf: update(p, g, memory, t, decays) -> p."""

    def one(p, decay, *gs):
        memory = {}
        for t, g in enumerate(gs, 1):
            p = update(p, g, memory, t, decay)
        return p

    return jax.tree.map(one, PARAMS, decays(PARAMS), *GRADS)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


# ---- Against NumPy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_and_masked_decay(nesterov):
    def update(p, g, memory, t, decay):
        g = g + 0.1 * p * decay
        memory["v"] = 0.9 * memory.get("v", 0) + g
        return p - 0.05 * (g + 0.9 * memory["v"] if nesterov else memory["v"])

    assert_close(run(optimizer("sgd", 0.05, momentum=0.9, nesterov=nesterov, weight_decay=0.1)), leafwise(update))


def adam_direction(g, memory, t, eps=1e-8):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    return (memory["m"] / (1 - 0.9**t)) / (np.sqrt(memory["v"] / (1 - 0.999**t)) + eps)


def test_adam_decays_through_the_gradient():
    def update(p, g, memory, t, decay):
        return p - 0.05 * adam_direction(g + 0.1 * p * decay, memory, t)

    assert_close(run(optimizer("adam", 0.05, weight_decay=0.1)), leafwise(update))


def test_adamw_decays_apart_from_the_gradient():
    def update(p, g, memory, t, decay):
        return p - 0.05 * (adam_direction(g, memory, t) + 0.1 * p * decay)

    assert_close(run(optimizer("adamw", 0.05, weight_decay=0.1)), leafwise(update))


def test_lamb_scales_each_layer_by_its_trust_ratio():
    def update(p, g, memory, t, decay):
        direction = adam_direction(g, memory, t, eps=1e-6) + 0.1 * p * decay
        return p - 0.05 * direction * np.linalg.norm(p) / np.linalg.norm(direction)

    assert_close(run(optimizer("lamb", 0.05, weight_decay=0.1)), leafwise(update))


def test_lars_scales_weights_by_their_trust_ratio_and_biases_not():
    def update(p, g, memory, t, decay):
        g = g + 0.1 * p * decay
        ratio = 0.001 * np.linalg.norm(p) / np.linalg.norm(g) if decay else 1
        memory["v"] = 0.9 * memory.get("v", 0) + ratio * g
        return p - 0.05 * memory["v"]

    assert_close(run(optimizer("lars", 0.05, weight_decay=0.1)), leafwise(update))


def test_lion_moves_by_signs():
    def update(p, g, memory, t, decay):
        m = memory.get("m", 0)
        memory["m"] = 0.99 * m + 0.01 * g
        return p - 0.05 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p * decay)

    assert_close(run(optimizer("lion", 0.05, weight_decay=0.1)), leafwise(update))


def test_rmsprop_divides_by_the_running_root_mean_square():
    def update(p, g, memory, t, decay):
        g = g + 0.1 * p * decay
        memory["v"] = 0.8 * memory.get("v", 0) + 0.2 * g**2
        memory["u"] = 0.5 * memory.get("u", 0) + g / np.sqrt(memory["v"] + 1e-8)
        return p - 0.05 * memory["u"]

    assert_close(run(optimizer("rmsprop", 0.05, decay_rate=0.8, momentum=0.5, weight_decay=0.1)), leafwise(update))


def test_clipping_shortens_the_gradient_to_the_given_norm():
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(GRADS[0])))
    expected = jax.tree.map(lambda p, g: p - g * min(1, 0.5 / norm), PARAMS, GRADS[0])
    assert_close(run(optimizer("sgd", 1.0, clip_norm=0.5), GRADS[:1]), expected)
    assert_close(
        run(optimizer("sgd", 1.0, clip_norm=1e3), GRADS[:1]), jax.tree.map(lambda p, g: p - g, PARAMS, GRADS[0])
    )


def test_decay_of_all_parameters_and_of_chosen_ones():
    none = jax.tree.map(np.zeros_like, PARAMS)
    everything = run(optimizer("sgd", 1.0, weight_decay=0.1, decay="all"), [none])
    assert_close(everything, jax.tree.map(lambda p: 0.9 * p, PARAMS))
    chosen = lambda params: jax.tree.map(lambda p: p.ndim == 1, params)
    some = run(optimizer("sgd", 1.0, weight_decay=0.1, decay=chosen), [none])
    assert_close(some, jax.tree.map(lambda p: (0.9 if p.ndim == 1 else 1) * p, PARAMS))


def test_biases_and_scales_do_not_decay_by_default():
    assert decays(PARAMS) == {
        "dense": {"kernel": True, "bias": False}, "grouped": {"bias": False}, "norm": {"scale": False},
    }  # fmt: skip


# ---- Schedules ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    step=st.integers(0, 120), warmup=st.sampled_from([0, 1, 10]), base=st.sampled_from([0.0, 1e-3, 0.5]),
    end=st.sampled_from([0.0, 1e-3]),
)  # fmt: skip
def test_cosine_and_linear_follow_their_closed_forms(step, warmup, base, end):
    part = min(max((step - warmup) / (100 - warmup), 0), 1)
    rising = base * step / warmup if step < warmup else None
    cosine = end + (base - end) * (1 + np.cos(np.pi * part)) / 2 if rising is None else rising
    linear = base + (end - base) * part if rising is None else rising
    for name, expected in (("cosine", cosine), ("linear", linear)):
        np.testing.assert_allclose(schedule(name, base, 100, warmup, end=end)(step), expected, rtol=1e-4, atol=1e-8)


def test_constant_and_steps():
    assert float(schedule("constant", 0.3)(1000)) == pytest.approx(0.3)
    steps = schedule("step", 1.0, 100, 5, boundaries=(50, 75), factor=0.1)
    np.testing.assert_allclose([steps(s) for s in (5, 49, 51, 74, 76)], [1, 1, 0.1, 0.1, 0.01], rtol=1e-5)
    fractions = schedule("step", 1.0, 100, 5, boundaries=(0.5, 0.75), factor=0.1)
    np.testing.assert_allclose(
        [fractions(s) for s in (0, 5, 49, 51, 74, 76)], [steps(s) for s in (0, 5, 49, 51, 74, 76)]
    )


def test_warmup_cosine_insists_on_a_warmup():
    with pytest.raises(ValueError, match="warmup: expected a whole number of at least 1, got 0"):
        schedule("warmup_cosine", 0.1, 100)
    same = schedule("cosine", 0.1, 100, 10)
    for s in (0, 5, 10, 50):
        assert float(schedule("warmup_cosine", 0.1, 100, 10)(s)) == pytest.approx(float(same(s)))


def test_a_schedule_is_traced_so_a_step_compiles_once():
    traces = []
    rate = schedule("cosine", 0.1, 50, 5)

    @jax.jit
    def value(count):
        traces.append(count)
        return rate(count)

    assert len({float(value(count)) for count in range(20)}) == 20
    assert len(traces) == 1


def test_a_learning_rate_may_be_swept_under_vmap():
    def after_one_step(rate):
        tx = optimizer("sgd", rate)
        params = {"w": jnp.ones(2)}
        return optax.apply_updates(params, tx.update(params, tx.init(params), params)[0])["w"]

    np.testing.assert_allclose(jax.vmap(after_one_step)(jnp.array([0.0, 0.5]))[:, 0], [1, 0.5])


# ---- From configs ---------------------------------------------------------------------------------------------------


def test_a_section_of_a_config_makes_the_same_optimiser():
    section = {
        "name": "sgd", "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 1.0,
        "schedule": {"name": "cosine", "base": 0.1, "warmup": 2},
    }  # fmt: skip
    direct = optimizer("sgd", schedule("cosine", 0.1, 20, 2), momentum=0.9, weight_decay=0.1, clip_norm=1.0)
    jax.tree.map(np.testing.assert_array_equal, run(optimizer_from(section, 20)), run(direct))
    assert section["name"] == "sgd"  # the config is left as it was


def test_a_config_dict_is_a_section_too():
    ml_collections = pytest.importorskip("ml_collections")
    section = ml_collections.ConfigDict({"name": "adamw", "b1": 0.8, "schedule": {"name": "constant", "base": 0.1}})
    jax.tree.map(np.testing.assert_array_equal, run(optimizer_from(section, 5)), run(optimizer("adamw", 0.1, b1=0.8)))


def test_every_name_can_be_built_with_its_defaults():
    for name in OPTIMIZERS:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(optimizer(name, 0.01))))
    for name in SCHEDULES:
        options = {"boundaries": (0.5,)} if name == "step" else {}
        assert np.isfinite(schedule(name, 0.1, 10, 2, **options)(5))


# ---- Mistakes -------------------------------------------------------------------------------------------------------

ALL_OPTIMIZERS = "adam, adamw, lamb, lars, lion, rmsprop, sgd"
ALL_SCHEDULES = "constant, cosine, linear, step, warmup_cosine"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimizer("sdg", 0.1), f"optimizer: unknown name 'sdg'; the valid ones are {ALL_OPTIMIZERS}"),
        (lambda: schedule("cos", 0.1, 5), f"schedule: unknown name 'cos'; the valid ones are {ALL_SCHEDULES}"),
        (lambda: optimizer("sgd", 0.1, b1=0.9), "'sgd': unknown option b1; the valid ones are momentum, nesterov"),
        (lambda: optimizer("sgd", -0.1), r"learning rate \(schedule\): expected a finite number .* got -0.1"),
        (lambda: optimizer("sgd", float("nan")), r"learning rate \(schedule\): .* got nan"),
        (lambda: optimizer("sgd", "fast"), r"learning rate \(schedule\): expected a number, got 'fast'"),
        (lambda: schedule("constant", -1.0), "base: expected a finite number that is not negative, got -1.0"),
        (lambda: schedule("cosine", float("nan"), 5), "base: .* got nan"),
        (lambda: schedule("cosine", float("inf"), 5), "base: .* got inf"),
        (lambda: schedule("cosine", 0.1, 5, end=-1), "end: .* got -1"),
        (lambda: schedule("cosine", 0.1), "steps: the schedule 'cosine' needs the number of steps"),
        (lambda: schedule("cosine", 0.1, 5, 5), "warmup: must be shorter than the run, got warmup=5 and steps=5"),
        (lambda: schedule("cosine", 0.1, 5, -1), "warmup: expected a whole number of at least 0, got -1"),
        (lambda: schedule("step", 0.1, 5), "boundaries: the schedule 'step' needs"),
        (lambda: schedule("step", 0.1, 50, boundaries=(30, 20)), "boundaries: expected increasing whole steps"),
        (lambda: schedule("step", 0.1, 50, 9, boundaries=(5,)), "boundaries: .* after the warm-up of 9"),
        (lambda: schedule("step", 0.1, boundaries=(0.5,)), "steps: fractional boundaries"),
        (lambda: optimizer("sgd", 0.1, weight_decay=-1), "weight_decay: expected a finite number"),
        (lambda: optimizer("sgd", 0.1, decay="kernels"), "decay: unknown name 'kernels'; .* are all, weights"),
        (lambda: optimizer("sgd", 0.1, clip_norm=0), "clip_norm: expected a finite number above 0 or None, got 0"),
        (lambda: optimizer("sgd", 0.1, momentum=1.0), r"momentum: expected a number in \[0, 1\), got 1.0"),
        (lambda: optimizer("sgd", 0.1, nesterov=True), "nesterov: needs a momentum above 0"),
        (lambda: optimizer("adam", 0.1, b2=1.5), r"b2: expected a number in \[0, 1\), got 1.5"),
        (lambda: optimizer("adam", 0.1, eps=0.0), "eps: expected a number above 0, got 0.0"),
        (lambda: optimizer_from({"name": "sgd"}, 5), "optimizer: the section has no schedule; it has name"),
        (lambda: optimizer_from("sgd", 5), "optimizer: expected a mapping with name, schedule, got 'sgd'"),
        (
            lambda: schedule_from({"name": "cosine", "base": 0.1, "warm": 3}, 5),
            "schedule: unknown field warm; the valid ones are name, base, steps, warmup, end, boundaries, factor",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
