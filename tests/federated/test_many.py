"""Many clients: matched to one reference or to one another, and averaged by any algorithm in any backend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import federated, models, training
from jaxeff.federated import aggregates, fed2, many, symmetry
from jaxeff.federated.aggregates import Member
from jaxeff.federated.backends import BACKENDS

X = jax.random.normal(jax.random.key(0), (2, 4))


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def reference(width=6, seed=0):
    draw = lambda key, *shape: jax.random.normal(jax.random.fold_in(jax.random.key(seed), key), shape)
    return {"a": draw(0, 4, width), "b": draw(1, width, 2)}


def shuffled(found, tree, count, noise=0.02, seed=5):
    """Copies, each in an order of its own and a little off; and the same in the order of the original."""
    keys = jax.random.split(jax.random.key(seed), count)

    def one(key):
        own = jax.tree.map(lambda leaf: leaf + noise * jax.random.normal(key, leaf.shape), tree)
        order = found.random(key) if isinstance(found, symmetry.WithinGroups) else federated.random_perms(found, key)
        return symmetry.permuted(found, own, order), own

    return jax.vmap(one)(keys)


def members(count, sizes=None, counted=None):
    return Member(
        jnp.arange(count),
        jnp.ones(count) if sizes is None else jnp.asarray(sizes, jnp.float32),
        jnp.ones(count) if counted is None else jnp.asarray(counted, jnp.float32),
        jnp.zeros(count, jnp.int32),
    )


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module")
def found():
    return federated.derive(mlp, reference(), X)


def test_clients_are_put_in_the_order_of_the_reference(found):
    moved, own = shuffled(found, reference(), 4)
    assert_close(jax.jit(lambda stacked: many.match_to(found, reference(), stacked))(moved), own)


def total(stacked):
    """Sum of the scalar products of all pairs."""
    rows = np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(stacked)], 1)
    return (rows @ rows.T).sum()


def test_clients_without_a_reference_agree_on_an_order(found):
    moved, own = shuffled(found, reference(), 4)
    merged = jax.jit(lambda stacked: many.merge_many(found, stacked))(moved)
    # Up to one order for all.
    perms = federated.weight_match(found, reference(), jax.tree.map(lambda leaf: leaf[0], merged))
    assert_close(jax.vmap(lambda tree: federated.permute(found, tree, perms))(merged), own)


def test_merging_strangers_comes_to_rest_and_gains(found):
    stacked = jax.vmap(lambda seed: {"a": reference()["a"] * jnp.cos(seed), "b": reference()["b"] * jnp.sin(seed)})(
        jnp.arange(3.0)
    )
    stacked = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), stacked)
    merged = many.merge_many(found, stacked)
    assert total(merged) > total(stacked)
    assert_close(many.merge_many(found, merged), merged)


def test_who_counts_nothing_or_is_not_finite_stays_and_moves_nobody(found):
    moved, _ = shuffled(found, reference(), 4)
    merge = jax.jit(lambda stacked, weights: many.merge_many(found, stacked, weights=weights))
    alone = many.merge_many(found, jax.tree.map(lambda leaf: leaf[:2], moved))
    spoiled = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), moved)
    merged = merge(spoiled, jnp.array([1.0, 1.0, 1.0, 0.0]))
    assert_close(jax.tree.map(lambda leaf: leaf[:2], merged), alone)
    assert_close(jax.tree.map(lambda leaf: leaf[2:], merged), jax.tree.map(lambda leaf: leaf[2:], spoiled))
    lone = merge(moved, jnp.array([0.0, 1.0, 0.0, 0.0]))
    assert_close(lone, moved)


@pytest.mark.parametrize("to", many.REFERENCES)
def test_the_aggregate_is_the_mean_of_the_matched(found, to):
    moved, own = shuffled(found, reference(), 4)
    moved = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), moved)
    who = members(4, [1, 2, 5, 9], [1, 1, 1, 0])
    expected = jax.tree.map(lambda leaf: np.tensordot([1 / 8, 2 / 8, 5 / 8], leaf[:3], 1), own)
    aggregate = federated.aggregates.mean()
    matched = many.matched(found, aggregate, to=to)
    assert_close(jax.jit(matched.combine)(moved, who, reference()), expected, rtol=1e-5, atol=1e-6)
    assert matched.term is None
    np.testing.assert_array_equal(matched.weight(who), aggregate.weight(who))


def test_a_round_without_anyone_keeps_what_was(found):
    moved, _ = shuffled(found, reference(), 2)
    for to in many.REFERENCES:
        kept = many.matched(found, to=to).combine(moved, members(2, counted=[0, 0]), reference())
        assert_close(kept, reference())


def in_groups():
    base = models.mlp((8, 12, 12), input_shape=(4,), num_classes=6)
    module = fed2.GroupedNetwork(fed2.adapt(base, "dense3", class_to_group=(0, 2, 1, 0, 2, 2)))
    variables = jax.jit(module.init)(jax.random.key(1), X)
    keys = iter(jax.random.split(jax.random.key(2), 50))
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), variables)
    return module, variables, symmetry.within_groups(module, variables, X)


def test_alignments_of_a_network_in_groups():
    module, variables, symmetries = in_groups()
    counts = np.array([[3, 0, 2, 1, 0, 0], [1, 1, 0, 0, 4, 0], [0, 2, 2, 2, 0, 1]])
    base = fed2.aggregate(module.grouped, variables, counts)
    who = members(3, counts.sum(1))
    moved, own = shuffled(symmetries, variables, 3)
    run = lambda align, stacked: jax.jit(many.matched(symmetries, base, align=align).combine)(stacked, who, variables)
    expected = base.combine(own, who, variables)
    assert_close(run("full", moved), expected, rtol=1e-5, atol=1e-6)
    assert many.matched(symmetries, base, align="none") is base
    # Permuted in the groups alone, these are all that has to be put back; and the trunk of its own is left alone.
    inside = {name for name in symmetries.shapes if name in symmetries.own}
    own_order = jax.vmap(lambda key: symmetries.random(key))(jax.random.split(jax.random.key(3), 3))
    partly = jax.vmap(lambda tree, perms: symmetries.permute(tree, {n: perms[n] for n in inside}))(own, own_order)
    assert_close(run("within_group", partly), expected, rtol=1e-5, atol=1e-6)
    outside = set(symmetries.shapes) - inside
    assert outside
    trunk = jax.vmap(lambda tree, perms: symmetries.permute(tree, {n: perms[n] for n in outside}))(own, own_order)
    got, plain = run("within_group", trunk), base.combine(trunk, who, variables)
    first = lambda tree: tree["params"]["trunk"]["dense1"]
    assert_close(first(got), first(plain), rtol=1e-5, atol=1e-6)
    assert not np.allclose(first(plain)["layer"]["bias"], first(expected)["layer"]["bias"])


def test_every_backend_gives_the_same_and_a_round_of_small_steps_is_that_of_fed_avg():
    network = models.Network(models.mlp((6,), input_shape=(4,), num_classes=3))
    functions = training.from_linen(network)
    start = functions.init(jax.random.key(0), X)
    rng = np.random.default_rng(0)
    arrays = {"image": rng.normal(size=(30, 4)).astype(np.float32), "label": rng.integers(0, 3, 30)}
    clients = federated.clients_of(arrays, np.split(np.arange(30), [6, 17]))
    task = federated.classification(functions.apply, 3)
    symmetries = federated.derive(network.apply, start, X)
    results = {}
    aggregate = many.matched(symmetries, aggregates.mean())
    for backend in (*BACKENDS, "plain"):
        algorithm = federated.fed_avg(task, optax.sgd(0.01), **({} if backend == "plain" else {"aggregate": aggregate}))
        kind = "stream" if backend == "plain" else backend
        federation = federated.federate(algorithm, batch_size=5, backend=kind, chunk=2)
        state = federation.init(jax.random.key(1), start, clients)
        for _ in range(2):
            state, _ = federation.round(state, clients)
        results[backend] = state.server
    for found_ in results.values():
        assert_close(found_, results["loop"], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused(found):
    with pytest.raises(ValueError, match="align must be one of 'none', 'within_group', 'full', got 'all'"):
        many.matched(found, align="all")
    with pytest.raises(ValueError, match="to must be one of 'previous', 'others', got 'mean'"):
        many.matched(found, to="mean")
    with pytest.raises(ValueError, match="align='within_group' needs a network in groups"):
        many.matched(found, align="within_group")
    with pytest.raises(ValueError, match="solver must be one of"):
        many.matched(found, solver="greedy")
    with pytest.raises(ValueError, match="sweeps must be at least 1, got 0"):
        many.matched(found, sweeps=0)
    stacked, _ = shuffled(found, reference(), 3)
    with pytest.raises(ValueError, match=r"weights must be of shape \(3,\), got \(2,\)"):
        many.merge_many(found, stacked, weights=[1, 1])
    with pytest.raises(ValueError, match="cycles must be at least 1, got 0"):
        many.merge_many(found, stacked, cycles=0)
    with pytest.raises(ValueError, match=r"leaves \[N, ...\] of one N, got \[2, 3\]"):
        many.merge_many(found, {**stacked, "a": stacked["a"][:2]})
    with pytest.raises(ValueError, match=r"previous: paths are not those of `found`: \['b'\]"):
        many.matched(found).combine(stacked, members(3), {"a": reference()["a"]})
