"""Class preference: exact on linear heads, equal to loops of removals to first order, and the same in any order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import federated, models
from jaxeff.federated import analysis, fed2


class Plain(nn.Module):
    """A network of one's own."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), name="conv")(x))
        x = nn.tanh(nn.Dense(5, name="hidden")(x.mean((1, 2))))
        return nn.Dense(3, name="head")(x)


X = jax.random.normal(jax.random.key(0), (7, 5, 5, 2))
LABELS = np.array([0, 1, 2, 0, 1, 0, 1])


@pytest.fixture(scope="module")
def variables():
    return Plain().init(jax.random.key(1), X)


def test_preferences_are_activation_times_gradient_by_loops(variables):
    found = analysis.class_preference(Plain(), variables, X, LABELS, 3, normalise=None)
    assert list(found) == ["conv", "hidden", "head"] and found["conv"].shape == (4, 3)
    params = variables["params"]
    conv = lambda x: nn.Conv(4, (3, 3)).apply({"params": params["conv"]}, x)

    def rest(maps):
        hidden = nn.tanh(maps).mean((1, 2)) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        return nn.tanh(hidden) @ params["head"]["kernel"] + params["head"]["bias"]

    expected = np.zeros((4, 3))
    for c in range(3):
        for x in np.asarray(X)[LABELS == c]:
            maps = conv(x[None])
            slope = jax.grad(lambda maps, c=c: rest(maps)[0, c])(maps)
            expected[:, c] += np.asarray(maps * slope).sum((0, 1, 2)) / (LABELS == c).sum()
    np.testing.assert_allclose(found["conv"], expected, rtol=1e-4, atol=1e-6)


def test_what_reads_the_last_layer_adds_up_to_the_logits():
    network = models.Network(models.cnn((4, 6), num_classes=3, input_shape=(5, 5, 2), norm=None))
    variables = network.init(jax.random.key(0), X)
    found = analysis.class_preference(network, variables, X, LABELS, 3, normalise=None)
    logits = network.apply(variables, X) - variables["params"]["head"]["layer"]["bias"]
    expected = [logits[LABELS == c, c].mean() for c in range(3)]
    np.testing.assert_allclose(found["conv2"].sum(0), expected, rtol=1e-5, atol=1e-6)


def test_groups_are_for_their_own_classes():
    grouped = fed2.adapt(models.cnn((4, 6, 6), num_classes=3, input_shape=(5, 5, 2), norm=None), "conv3", groups=3)
    network = fed2.GroupedNetwork(grouped)
    variables = network.init(jax.random.key(0), X)
    found = analysis.class_preference(network, variables, X, LABELS, 3, normalise=None)
    assert list(found) == ["conv1", "conv2", "groups/conv3", "groups/head"]
    vectors = np.asarray(found["groups/conv3"])
    others = ~np.eye(3, dtype=bool).repeat(2, 0)
    assert not vectors[others].any()
    logits = network.apply(variables, X) - variables["params"]["groups"]["head"]["layer"]["bias"][:, 0]
    np.testing.assert_allclose(vectors.sum(0), [logits[LABELS == c, c].mean() for c in range(3)], rtol=1e-5, atol=1e-6)


def test_vectors_have_length_one_and_absent_classes_nothing(variables):
    labels = np.zeros(7, int)
    for name, order in (("l2", 2), ("l1", 1)):
        found = analysis.class_preference(Plain(), variables, X, labels, 3, normalise=name)
        np.testing.assert_allclose(np.linalg.norm(found["hidden"], order, axis=1), 1, rtol=1e-5)
        assert not np.asarray(found["hidden"])[:, 1:].any()


def test_variance_depth_and_agreement():
    alike, apart = jnp.ones((4, 2)), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    variances = analysis.total_variance({"shallow": alike, "deep": apart})
    assert variances == {"shallow": 0.0, "deep": pytest.approx(np.sqrt(0.5))}
    assert analysis.choose_depth(variances) == "deep"
    assert analysis.choose_depth({"a": 0.9, "b": 0.2, "c": 0.6, "d": 1.0}) == "c"
    assert analysis.choose_depth({"a": 0.9, "b": 0.6, "c": 0.1}) == "c"
    assert analysis.agreement([apart, apart]) == 1 and analysis.agreement([apart, apart[::-1]]) == 0
    with pytest.raises(ValueError, match="share in"):
        analysis.choose_depth(variances, 0.0)
    with pytest.raises(ValueError, match="compared in pairs, got 1"):
        analysis.agreement([apart])


def test_bad_input_is_refused(variables):
    with pytest.raises(ValueError, match="normalise must be one of 'l2'"):
        analysis.class_preference(Plain(), variables, X, LABELS, 3, normalise="max")
    with pytest.raises(ValueError, match="labels must be one for each image"):
        federated.class_preference(Plain(), variables, X, LABELS[:2], 3)


def test_units_that_are_for_no_class_have_none():
    """They do nothing, or speak against the one class that they see; neither makes them the first class's."""
    preferences = jnp.array([[0.0, 0.0, 0.0], [0.0, -2.0, 0.0], [0.0, -2.0, 0.5], [0.1, 0.0, 0.0]])
    np.testing.assert_array_equal(analysis.primary_classes(preferences), [-1, -1, 2, 0])
    assert analysis.agreement([preferences, preferences.at[3].set(0.0)]) == 1
