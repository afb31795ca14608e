"""What a network computes is what the simulator computes; and whatever strangers send, the round goes on without it."""

import io
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

flwr = pytest.importorskip("flwr", reason='needs flwr: pip install "jaxeff[flower]"')

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from jaxeff import federated, models, training, trees  # noqa: E402
from jaxeff.federated import aggregates, fed2, flower, records  # noqa: E402

MAP = (0, 2, 1, 0, 2, 2)
CLASSES, GROUPS, CLIENTS = 6, 3, 3
COUNTS = np.array([[5, 0, 3, 0, 0, 0], [0, 4, 0, 0, 0, 0], [0, 0, 0, 2, 0, 9]])
MODES = ("none", "full", "subset")
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "uint8", "bool", "complex64")


@pytest.fixture(scope="module", autouse=True)
def messages_are_those_of_a_run():
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


@pytest.fixture(scope="module")
def grouped():
    network = fed2.GroupedNetwork(
        fed2.adapt(models.mlp((9, 9), input_shape=(5,), num_classes=CLASSES), "dense2", class_to_group=MAP)
    )
    functions = training.from_linen(network)
    variables = jax.tree.map(np.asarray, dict(functions.init(jax.random.key(1), jnp.zeros((1, 5)))))
    return network.grouped, functions, variables


def layout_of(variables, mode):
    if mode == "none":
        return flower.Layout(variables, CLASSES)
    return flower.Layout(variables, CLASSES, fed2.group_axes(variables), MAP, mode)


def aggregate_of(grouped, variables, mode, **options):
    return aggregates.mean() if mode == "none" else fed2.aggregate(grouped, variables, COUNTS, **options)


def updates(variables, seed=0):
    rng = np.random.default_rng(seed)
    moved = lambda leaf: (leaf + rng.normal(size=leaf.shape)).astype(leaf.dtype)
    return [jax.tree.map(moved, variables) for _ in range(CLIENTS)]


def reply(node, content):
    return Message(content, reply_to=Message(RecordDict(), dst_node_id=node, message_type="train"))


def told(number, **changes):
    counts = COUNTS[number]
    metrics = {"num-examples": int(counts.sum()), "class-counts": counts.tolist(), "partition-id": number, "loss": 0.5}
    return MetricRecord({name: value for name, value in {**metrics, **changes}.items() if value is not None})


def upload(layout, number, variables, **changes):
    groups = layout.owned(COUNTS[number]) if layout.mode == "subset" else None
    return RecordDict({"arrays": layout.record(variables, groups), "metrics": told(number, **changes)})


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 2), (3,), (2, 3, 4)])
def test_arrays_come_back_exactly_as_they_were(dtype, shape):
    values = np.random.default_rng(0).normal(size=shape) * 5
    tree = {"params": {"a": np.asarray(jnp.asarray(values).astype(dtype)), "b": [np.float32(1.5)]}}
    layout = flower.Layout(tree, 2)
    record = layout.record(tree)
    assert tuple(record) == trees.paths(tree)
    found = layout.read(record)
    assert found["params"]["a"].dtype == tree["params"]["a"].dtype
    assert_equal(found, tree)


def test_transposed_leaves_and_groups_along_any_axis_come_back_exactly():
    tree = {"w": np.arange(12, dtype=np.float32).reshape(2, 2, 3).T, "shared": np.ones(2, np.float32)}
    layout = flower.Layout(tree, 3, {"w": 1, "shared": None}, (0, 1, 0), "subset")
    record = layout.record(tree)
    assert list(record) == ["shared", "g0/w", "g1/w"] and tuple(record["g1/w"].shape) == (3, 2)
    np.testing.assert_array_equal(record["g1/w"].numpy(), tree["w"][:, 1])
    assert_equal(layout.read(record), tree)


def test_a_client_gets_and_sends_the_groups_that_it_owns(grouped):
    _, _, variables = grouped
    layout = layout_of(variables, "subset")
    assert [layout.owned(row) for row in COUNTS] == [(0, 1), (2,), (0, 2)]
    whole, part = layout.record(variables), layout.record(variables, (2,))
    decoupled = len(jax.tree.leaves(variables["params"]["groups"]))
    assert len(whole) - len(part) == (GROUPS - 1) * decoupled
    assert all(not name.startswith(("g0/", "g1/")) for name in part)
    found = layout.read(part, (2,), fill=jax.tree.map(lambda leaf: leaf + 1, variables))
    for before, after in zip(*(jax.tree.leaves(t["params"]["groups"]) for t in (variables, found)), strict=True):
        np.testing.assert_array_equal(after[2], before[2])
        np.testing.assert_array_equal(after[:2], before[:2] + 1)
    assert_equal(found["params"]["trunk"], variables["params"]["trunk"])


@pytest.mark.parametrize("mode", MODES)
def test_the_strategy_is_the_simulators_aggregate_bit_for_bit_in_any_order_of_replies(grouped, mode):
    grouped_, _, variables = grouped
    layout, trained = layout_of(variables, mode), updates(variables)
    aggregate = aggregate_of(grouped_, variables, mode)
    members = federated.Member(
        jnp.arange(CLIENTS), jnp.asarray(COUNTS.sum(1), jnp.float32), jnp.ones(CLIENTS), jnp.zeros(CLIENTS, jnp.int32)
    )
    expected = jax.jit(aggregate.combine)(trees.stack(trained), members, variables)
    # Nodes have other numbers than clients.
    replies = [reply(90 - i, upload(layout, i, trained[i])) for i in range(CLIENTS)]
    for order in itertools.permutations(replies):
        strategy = flower.Fed2Strategy(variables, layout)
        arrays, metrics = strategy.aggregate_train(1, list(order))
        assert_equal(strategy.variables, expected)
        assert_equal(layout.read(arrays), expected)
        assert dict(metrics) == {"counted": 3, "rejected": 0, "missing": 0, "loss": 0.5}


def test_means_are_those_of_float64(grouped):
    _, _, variables = grouped
    layout, trained = layout_of(variables, "full"), updates(variables)
    strategy = flower.Fed2Strategy(variables, layout)
    strategy.aggregate_train(1, [reply(i, upload(layout, i, trained[i])) for i in range(CLIENTS)])
    held = np.array([[5, 3, 0], [0, 0, 4], [2, 0, 9]])
    for name, by in (("trunk", None), ("groups", held)):
        stacked = trees.stack([one["params"][name] for one in trained])
        for found, all_ in zip(
            *map(jax.tree.leaves, (strategy.variables["params"][name], jax.tree.map(np.float64, stacked))), strict=True
        ):
            weights = COUNTS.sum(1) if by is None else by.reshape(3, 3, *[1] * (found.ndim - 1))
            weights = np.broadcast_to(weights if by is not None else weights.reshape(3, *[1] * found.ndim), all_.shape)
            np.testing.assert_allclose(found, (weights * all_).sum(0) / weights.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("by", "shared_by"), [("uniform", "uniform"), ("size", "size")])
def test_other_weights(grouped, by, shared_by):
    grouped_, _, variables = grouped
    layout, trained = layout_of(variables, "full"), updates(variables)
    aggregate = aggregate_of(grouped_, variables, "full", by=by, shared_by=shared_by)
    members = federated.Member(
        jnp.arange(CLIENTS), jnp.asarray(COUNTS.sum(1), jnp.float32), jnp.ones(CLIENTS), jnp.zeros(CLIENTS, jnp.int32)
    )
    strategy = flower.Fed2Strategy(variables, layout, by=by, shared_by=shared_by)
    strategy.aggregate_train(1, [reply(i, upload(layout, i, trained[i])) for i in range(CLIENTS)])
    assert_equal(strategy.variables, aggregate.combine(trees.stack(trained), members, variables))


def damaged(content, change):
    """The upload with one of its arrays changed."""
    arrays = dict(content["arrays"])
    key = "params/trunk/dense1/layer/kernel"
    assert key in arrays, list(arrays)
    arrays[key] = change(arrays[key])
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content["metrics"]})


def with_values(change):
    def changed(array):
        values = array.numpy().copy()
        change(values)
        return Array(values)

    return lambda content: damaged(content, changed)


def header_of(shape):
    def changed(array):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return Array(array.dtype, tuple(array.shape), array.stype, file.getvalue() + array.data[128:])

    return lambda content: damaged(content, changed)


def put(index, value):
    def change(values):
        values.flat[index] = value

    return with_values(change)


def without(key):
    def change(content):
        arrays = {name: array for name, array in content["arrays"].items() if name != key}
        return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content["metrics"]})

    return change


def metrics(**changes):
    return lambda content: RecordDict({"arrays": content["arrays"], "metrics": told(1, **changes)})


KERNEL = "params/trunk/dense1/layer/kernel"
RAW = lambda **changes: (
    lambda content: damaged(
        content,
        lambda array: Array(**{**{n: getattr(array, n) for n in ("dtype", "shape", "stype", "data")}, **changes}),
    )
)
BAD = {
    "shape": (lambda c: damaged(c, lambda a: Array(a.numpy().T)), "must be float32 (5, 9), got 'float32' (9, 5)"),
    "dtype": (lambda c: damaged(c, lambda a: Array(a.numpy().astype(np.float64))), "got 'float64' (5, 9)"),
    "nan": (put(3, np.nan), f"'{KERNEL}' must be finite and at most 1e+20, got nan among 1 such numbers"),
    "inf": (put(0, -np.inf), f"'{KERNEL}' must be finite and at most 1e+20, got -inf"),
    "huge": (put(0, 3e38), "e+38 among 1 such numbers"),
    "pickle": (RAW(stype="pickle"), "not of numpy"),
    "cut off": (RAW(data=b"\x93NUMPY"), "must have 180 bytes after its header, got 6 with it"),
    "too long": (RAW(data=b"x" * 10_000), "must have 180 bytes after its header, got 10000 with it"),
    "no header": (RAW(data=b"x" * 308), "must have a header of numpy"),
    "a header that lies": (header_of((10**7, 10**7)), "its header says ((10000000, 10000000), False"),
    "missing": (without(KERNEL), f"'{KERNEL}' must be there of the groups [2] and is missing"),
    "foreign": (
        lambda c: RecordDict(
            {"arrays": ArrayRecord({**c["arrays"], "x\n" * 99: Array(np.zeros(1))}), "metrics": c["metrics"]}
        ),
        "came and nothing of that name was expected",
    ),
    "no arrays": (lambda c: RecordDict({"metrics": c["metrics"]}), "one ArrayRecord was expected, 0 came"),
    "no metrics": (lambda c: RecordDict({"arrays": c["arrays"]}), "one MetricRecord was expected, 0 came"),
    "negative": (metrics(**{"class-counts": [-4, 8, 0, 0, 0, 0]}), "must be whole numbers in 0..1000000000, got -4"),
    "fractions": (metrics(**{"class-counts": [0.5, 3.5, 0.0, 0.0, 0.0, 0.0]}), "'class-counts' must be whole numbers"),
    "nan counts": (metrics(**{"class-counts": [float("nan")] * 6}), "must be whole numbers in 0..1000000000, got nan"),
    "too many": (metrics(**{"num-examples": 1e300, "class-counts": [1e300, 0.0, 0.0, 0.0, 0.0, 0.0]}), "got 1e+300"),
    "classes": (metrics(**{"class-counts": [4, 0]}), "'class-counts' must be a list of 6, one for each class, got 2"),
    "no list": (metrics(**{"class-counts": 4}), "'class-counts' must be a list of 6, one for each class, got 4"),
    "a list": (metrics(**{"num-examples": [4]}), "'num-examples' must be whole numbers"),
    "sum": (metrics(**{"num-examples": 400}), "'num-examples' must be the sum of its 'class-counts', 4, got 400"),
    "no counts": (metrics(**{"class-counts": None}), "'class-counts' must be in its metrics"),
    "client": (metrics(**{"partition-id": -1}), "'partition-id' must be whole numbers"),
    "loss": (metrics(loss=float("inf")), "'loss' must be a finite number of at most 1e+20, got inf"),
    "claims": (
        metrics(**{"num-examples": 5, "class-counts": [1, 4, 0, 0, 0, 0]}),
        "must be there of the groups [0, 2] and are missing",
    ),
    "less": (metrics(**{"num-examples": 0, "class-counts": [0] * 6}), "came and nothing of that name was expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_left_out_by_name_and_the_round_goes_on(grouped, caplog, name):
    _, _, variables = grouped
    layout, trained = layout_of(variables, "subset"), updates(variables)
    change, message = BAD[name]
    good = [reply(10 + i, upload(layout, i, trained[i])) for i in (0, 2)]
    expected = flower.Fed2Strategy(variables, layout)
    expected.aggregate_train(1, good)
    strategy = flower.Fed2Strategy(variables, layout)
    with caplog.at_level(logging.WARNING):
        _, found = strategy.aggregate_train(1, [good[0], reply(11, change(upload(layout, 1, trained[1]))), good[1]])
    assert (found["counted"], found["rejected"], found["missing"]) == (2, 1, 0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("rejected node 11: ") and message in said and len(said) < 400 and "\n" not in said
    assert_equal(strategy.variables, expected.variables)


def test_a_reply_that_breaks_every_reader_is_left_out(grouped, caplog):
    _, _, variables = grouped
    layout, trained = layout_of(variables, "none"), updates(variables)
    broken = reply(11, upload(layout, 1, trained[1]))
    broken.content["arrays"][KERNEL].__dict__["shape"] = None
    strategy = flower.Fed2Strategy(variables, layout)
    with caplog.at_level(logging.WARNING):
        _, found = strategy.aggregate_train(1, [broken, reply(10, upload(layout, 0, trained[0]))])
    assert (found["counted"], found["rejected"]) == (1, 1)
    assert "rejected node 11: its answer cannot be read: " in caplog.text and "TypeError" in caplog.text


def test_two_answers_of_a_node_and_two_nodes_of_a_client(grouped, caplog):
    _, _, variables = grouped
    layout, trained = layout_of(variables, "none"), updates(variables)
    twice = [reply(11, upload(layout, 1, trained[i])) for i in (1, 2)]
    same = [reply(node, upload(layout, 0, trained[0])) for node in (31, 30)]
    expected = flower.Fed2Strategy(variables, layout)
    expected.aggregate_train(1, [same[1]])
    for order in itertools.permutations([*twice, *same]):
        caplog.clear()
        strategy = flower.Fed2Strategy(variables, layout)
        with caplog.at_level(logging.WARNING):
            _, found = strategy.aggregate_train(1, list(order))
        assert (found["counted"], found["rejected"]) == (1, 3)
        assert caplog.text.count("rejected node 11: one answer was expected, 2 came") == 2
        assert "rejected node 31: 'partition-id': client 0 has answered already, as node 30" in caplog.text
        assert_equal(strategy.variables, expected.variables)


def test_clients_that_are_lost_are_counted_and_if_nobody_is_left_nothing_changes(grouped):
    _, _, variables = grouped
    layout, trained = layout_of(variables, "full"), updates(variables)
    lost = Message(Error(code=1, reason="killed"), reply_to=Message(RecordDict(), dst_node_id=5, message_type="train"))
    for optimizer in (None, optax.adam(0.1)):
        strategy = flower.Fed2Strategy(variables, layout, server_optimizer=optimizer)
        arrays, found = strategy.aggregate_train(1, [lost])
        assert dict(found) == {"counted": 0, "rejected": 0, "missing": 1}
        assert_equal(layout.read(arrays), variables)
        _, found = strategy.aggregate_train(1, [lost, reply(1, upload(layout, 1, trained[1]))])
        assert (found["counted"], found["missing"]) == (1, 1)


def test_updates_without_examples_weigh_nothing(grouped):
    _, _, variables = grouped
    layout, trained = layout_of(variables, "full"), updates(variables)
    nothing = {"num-examples": 0, "class-counts": [0] * CLASSES}
    for optimizer in (None, optax.sgd(1.0, momentum=0.9)):
        strategy = flower.Fed2Strategy(variables, layout, server_optimizer=optimizer)
        strategy.aggregate_train(1, [reply(1, upload(layout, 1, trained[1], **nothing))])
        assert_equal(strategy.variables, variables)


def test_a_server_optimiser_takes_the_step_of_fed_opt(grouped):
    _, functions, variables = grouped
    layout, optimizer = layout_of(variables, "none"), federated.adaptive("yogi", 0.1)
    task = federated.classification(functions.apply, CLASSES, preprocess=lambda x: x)
    algorithm = federated.fed_opt(task, optax.sgd(0.1), optimizer)
    state = algorithm.init(variables)
    strategy = flower.Fed2Strategy(variables, layout, server_optimizer=optimizer)
    for number in range(3):
        trained = updates(variables, number)
        mean_ = trees.weighted_mean(trees.stack(trained), jnp.asarray(COUNTS.sum(1), jnp.float32))
        state = algorithm.server(state, federated.Upload(mean_), None)
        strategy.aggregate_train(number + 1, [reply(i, upload(layout, i, trained[i])) for i in range(CLIENTS)])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), strategy.variables, state[0])


def data_of(seed=0):
    labels = np.concatenate([np.repeat(np.arange(CLASSES), row) for row in COUNTS])
    images = np.random.default_rng(seed).normal(size=(COUNTS.sum(), 5)).astype(np.float32)
    parts = np.split(np.arange(COUNTS.sum()), np.cumsum(COUNTS.sum(1))[:-1])
    return {"image": images, "label": labels}, parts


def task_of(functions):
    return federated.classification(functions.apply, CLASSES, preprocess=lambda x: x)


def client(grouped, mode, number, algorithm=None, **changes):
    _, functions, variables = grouped
    arrays, parts = data_of()
    task = task_of(functions)
    own = {name: array[parts[number]] for name, array in arrays.items()}
    settings = {"batch_size": 4, "epochs": 2, "key": jax.random.key(5), **changes}
    algorithm = algorithm or federated.fed_avg(task, optax.sgd(0.1, momentum=0.9))
    return flower.Client(task, algorithm, layout_of(variables, mode), own, number, CLIENTS, **settings)


class Loopback:
    """A grid whose nodes are ClientApps in this process."""

    def __init__(self, grouped, mode, algorithm=None, lost=(), **changes):
        self.apps, self.lost, self.sent = {}, set(lost), []
        for number in range(CLIENTS):
            one = client(grouped, mode, number, algorithm, **changes)
            self.apps[40 + (7 * number) % 5] = flower.client_app(lambda context, one=one: one)

    def get_node_ids(self):
        return list(self.apps)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.sent.append((node, message.metadata.message_type, set(message.content.get("arrays", {}))))
            if node not in self.lost:
                context = Context(1, node, {}, RecordDict(), {})
                replies.append(self.apps[node](message, context))
        return replies[::-1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [*(("fed_avg", mode) for mode in MODES), ("fed_prox", "subset")])
def test_rounds_over_a_network_are_those_of_the_simulator_bit_for_bit(grouped, name, mode):
    grouped_, functions, variables = grouped
    task, optimizer = task_of(functions), optax.sgd(0.1, momentum=0.9)
    options = (0.1,) if name == "fed_prox" else ()
    algorithm = getattr(federated, name)(task, optimizer, *options)
    own = fed2.brought(grouped_, COUNTS, mode) if mode != "none" else {}
    members = federated.clients_of(*data_of(), own)
    combined = algorithm._replace(aggregate=aggregate_of(grouped_, variables, mode))
    federation = federated.federate(combined, batch_size=4, epochs=2, backend="map")
    state = federation.init(jax.random.key(5), variables, members)
    reports = []
    for _ in range(2):
        state, report = federation.round(state, members)
        reports.append(report.metrics)
    strategy = flower.Fed2Strategy(variables, layout_of(variables, mode), min_available_nodes=3)
    result = strategy.start(Loopback(grouped, mode, algorithm), strategy.record(), num_rounds=2)
    assert_equal(strategy.variables, state.server)
    for number, expected in enumerate(reports, 1):
        found = result.train_metrics_clientapp[number]
        for metric in ("loss", "accuracy"):
            assert found[metric] == pytest.approx(float(expected[metric]), rel=1e-5)


def test_a_client_of_a_network_is_the_one_of_the_simulator_whatever_the_others_hold(grouped):
    """Also where its row of examples has another length than in the simulator."""
    _, functions, variables = grouped
    members = federated.clients_of(*data_of())
    algorithm = federated.fed_avg(task_of(functions), optax.sgd(0.1, momentum=0.9))
    kept = aggregates.Aggregate(lambda member: member.counted, lambda stacked, members, previous: stacked)
    for number in range(CLIENTS):
        picked = kept._replace(
            combine=lambda stacked, members, previous, i=number: jax.tree.map(lambda leaf: leaf[i], stacked)
        )
        federation = federated.federate(algorithm._replace(aggregate=picked), batch_size=4, epochs=2)
        state = federation.init(jax.random.key(5), variables, members)._replace(number=jnp.int32(7))
        expected, _ = federation.round(state, members)
        found, _ = flower.train(client(grouped, "none", number, algorithm), variables, 7)
        assert_equal(found, expected.server)


def test_in_subset_mode_nodes_are_asked_for_their_classes_once_and_sent_their_groups(grouped):
    _, _, variables = grouped
    layout = layout_of(variables, "subset")
    grid = Loopback(grouped, "subset")
    strategy = flower.Fed2Strategy(variables, layout, fraction_evaluate=1.0)
    result = strategy.start(grid, strategy.record(), num_rounds=2)
    kinds = [kind for _, kind, _ in grid.sent]
    assert kinds == ["query"] * 3 + ["train"] * 3 + ["evaluate"] * 3 + ["train"] * 3 + ["evaluate"] * 3
    numbers = {40 + (7 * number) % 5: number for number in range(CLIENTS)}
    for node, kind, keys in grid.sent:
        groups = {key.split("/")[0] for key in keys if key.startswith("g")}
        owned = layout.owned(COUNTS[numbers[node]]) if kind == "train" else range(GROUPS) if kind == "evaluate" else ()
        assert groups == {f"g{group}" for group in owned}
    assert result.evaluate_metrics_clientapp[2]["counted"] == 3


def test_tests_of_clients_are_means_over_all_their_examples(grouped):
    _, functions, variables = grouped
    strategy = flower.Fed2Strategy(variables, layout_of(variables, "none"), fraction_evaluate=1.0)
    arrays, _ = data_of()
    result = strategy.start(Loopback(grouped, "none"), strategy.record(), num_rounds=1)
    logits = np.asarray(functions.apply(strategy.variables, arrays["image"], False, None)[0], np.float64)
    found = result.evaluate_metrics_clientapp[1]
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == arrays["label"]).mean())
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), arrays["label"]]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("mode", ["full", "subset"])
def test_the_run_goes_on_without_a_client_that_is_lost(grouped, mode):
    _, _, variables = grouped
    strategy = flower.Fed2Strategy(variables, layout_of(variables, mode), patience=0.0)
    result = strategy.start(Loopback(grouped, mode, lost={40}), strategy.record(), num_rounds=2)
    assert [dict(result.train_metrics_clientapp[n])["missing"] for n in (1, 2)] == [1, 1]
    assert trees.all_finite(strategy.variables) and trees.first_mismatch(strategy.variables, variables) is None


def test_rounds_are_counted_on_and_nodes_are_drawn_anew(grouped):
    _, _, variables = grouped
    grid = Loopback(grouped, "none")
    drawn = []
    for before in range(6):
        strategy = flower.Fed2Strategy(
            variables, layout_of(variables, "none"), fraction_train=0.4, rounds_before=before
        )
        config = ConfigRecord()
        (message,) = strategy.configure_train(1, strategy.record(), config, grid)
        assert config["server-round"] == before + 1
        drawn.append(message.metadata.dst_node_id)
    assert len(set(drawn)) > 1


def test_too_few_nodes(grouped):
    _, _, variables = grouped
    strategy = flower.Fed2Strategy(variables, layout_of(variables, "none"), min_available_nodes=4, patience=0.0)
    with pytest.raises(TimeoutError, match="3 nodes are connected after 0 seconds, 4 are needed: start clients"):
        strategy.configure_train(1, strategy.record(), ConfigRecord(), Loopback(grouped, "none"))


def test_a_client_refuses_another_experiment_and_what_it_cannot_send(grouped):
    _, functions, variables = grouped
    layout = layout_of(variables, "none")
    strategy = flower.Fed2Strategy(variables, layout)
    ask = lambda one, **config: flower.client_app(lambda context: one)(
        Message(
            RecordDict({"arrays": strategy.record(), "config": ConfigRecord({"server-round": 1, **config})}),
            dst_node_id=1,
            message_type="train",
        ),
        Context(1, 1, {}, RecordDict(), {}),
    )
    with pytest.raises(ValueError, match=r"the server runs another experiment \(b\) than this client \(a\)"):
        ask(client(grouped, "none", 0, fingerprint="a"), fingerprint="b")
    task = task_of(functions)
    for algorithm in (federated.scaffold(task, 0.1), federated.fed_opt(task, optax.sgd(0.1), optax.sgd(1.0))):
        with pytest.raises(ValueError, match="clients of a network remember nothing"):
            flower.train(client(grouped, "none", 0, algorithm), variables, 0)
    with pytest.raises(FloatingPointError, match="client 0, round 3: what it has learned is not finite"):
        flower.train(client(grouped, "none", 0, federated.fed_avg(task, optax.sgd(1e38))), variables, 3)
    with pytest.raises(ValueError, match=r"number must be in 0\.\.2, got 3"):
        flower.train(client(grouped, "none", 0)._replace(number=3), variables, 0)
    empty = {name: array[:0] for name, array in client(grouped, "none", 0).arrays.items()}
    found, metrics_ = flower.train(client(grouped, "none", 0)._replace(arrays=empty), variables, 0)
    assert metrics_ == {} and found is variables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "some"}, "mode must be one of 'full', 'subset', got 'some'"),
        ({"class_to_group": None}, "group_axes and class_to_group belong together"),
        ({"class_to_group": None, "group_axes": None, "mode": "subset"}, "mode='subset' leaves out groups"),
        ({"class_to_group": (0, 1)}, "class_to_group must have one group for each of the classes"),
        ({"group_axes": {"w": 0}}, r"group_axes: 'w' \(3, 2\) must have 2 groups along axis 0"),
        ({"like": {"w": jax.random.key(0)}}, "'w' is a key of random numbers"),
        ({"like": {"g0": {"w": np.zeros(1)}, "w": np.zeros(2)}, "group_axes": {"g0": None, "w": 0}}, "'g0/...'"),
    ],
)
def test_layouts_that_do_not_fit(change, message):
    like = {"w": np.zeros((3, 2), np.float32)}
    given = {"like": like, "classes": 3, "group_axes": {"w": 1}, "class_to_group": (0, 1, 1), "mode": "subset"}
    with pytest.raises(ValueError, match=message):
        flower.Layout(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "luck"}, "by must be one of 'class_counts'"),
        ({"shared_by": "class_counts"}, "shared_by must be 'size' or 'uniform'"),
        ({"fraction_train": 0.0}, r"fraction_train must be in \(0, 1\]"),
        ({"min_available_nodes": 0}, "min_available_nodes must be at least 1"),
    ],
)
def test_settings_out_of_range(grouped, change, message):
    _, _, variables = grouped
    with pytest.raises(ValueError, match=message):
        flower.Fed2Strategy(variables, layout_of(variables, "full"), **change)


def test_variables_that_are_not_as_the_layout(grouped):
    _, _, variables = grouped
    with pytest.raises(ValueError, match=r"'params/groups/dense2/layer/bias' must be float32 \(3, 3\), got float16"):
        other = jax.tree.map(lambda leaf: leaf.astype(np.float16), variables)
        layout_of(variables, "full").record(other)
    with pytest.raises(ValueError, match="variables have no 'params/groups/"):
        layout_of(variables, "full").record({"params": {}})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_in_every_dtype(dtype, value):
    tree = {"w": np.array([1.0, value]).astype(jnp.dtype(dtype))}
    layout = flower.Layout(tree, 2)
    with pytest.raises(flower.Refused, match="'w' must be finite"):
        layout.read(layout.record(tree))


def test_without_flwr_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(records, "MISSING", ImportError("No module named 'flwr'"))
    tree = {"w": np.zeros(1, np.float32)}
    layout = flower.Layout(tree, 2)
    for call in (
        lambda: layout.record(tree),
        lambda: flower.Fed2Strategy(tree, layout),
        lambda: flower.client_app(None),
    ):
        with pytest.raises(ImportError, match=r'pip install "jaxeff\[flower\]"'):
            call()
