"""What may be permuted, against what is known of each kind of layer; and that the output does not change."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import federated, models, quadratic, spec
from jaxeff.federated import permutation
from jaxeff.federated.permutation import Fixed, Free, Product, Sum
from tests.federated.networks import Grouped, positive

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def started(module, x=X):
    """Variables of which no two units are alike, and no variance is negative."""
    variables = jax.jit(module.init)(jax.random.key(0), x)
    return positive(variables)


def checked(apply, params, *inputs):
    found = federated.derive(apply, params, *inputs)
    federated.verify(found, apply, params, *inputs, key=jax.random.key(2))
    return found


def test_a_plain_network_has_its_hidden_units():
    architecture = models.vgg9(input_shape=(8, 8, 3), width=0.1)
    network = models.Network(architecture)
    found = checked(network.apply, started(network), X)
    widths = [layer.features for _, layer in spec.walk(architecture) if hasattr(layer, "features")][:-1]
    assert list(found.sizes.values()) == widths
    # The first dense layer reads the last map, flattened: positions keep their order, channels need not.
    name = next(name for name in found.sizes if "conv6" in name)
    assert found.axes["params/dense1/layer/kernel"][0] == Free(26, name)  # the map has one position
    assert found.readers(name) == (
        ("params/conv6/layer/bias", 0),
        ("params/conv6/layer/kernel", 3),
        ("params/dense1/layer/kernel", 0),
    )
    assert found.fixed["params/conv1/layer/kernel[2]"] == "of the input"
    assert found.fixed["params/head/layer/kernel[1]"] == "of the output"
    assert found.fixed["params/conv2/layer/kernel[0]"] == "of space"


def test_a_flattened_map_is_a_product_of_positions_and_channels():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(nn.Conv(4, (3, 3), name="conv")(x).reshape(len(x), -1))

    found = checked(Flat().apply, started(Flat()), X)
    (channels,) = found.axes["params/conv/bias"]
    kernel = found.axes["params/Dense_0/kernel"][0]
    flat = permutation._leaves(kernel)
    assert [part.size for part in flat] == [8, 8, 4] and flat[-1] == channels
    assert all(isinstance(part, Fixed) for part in flat[:2])


def test_channels_that_a_shortcut_adds_move_together():
    network = models.Network(models.architecture("resnet", depth=8, num_classes=4, input_shape=(8, 8, 3), width=0.25))
    found = checked(network.apply, started(network), X)
    trunk = next(name for name in found.sizes if any("conv1/layer" in path for path, _ in found.readers(name)))
    assert any("stage1_block1/conv2/layer/kernel" in path for path, _ in found.readers(trunk))
    # A stage of more channels has those of the last in the middle, and zeros on both sides of them.
    (axis,) = found.axes["params/stage2_block1/conv2/norm/scale"]
    assert isinstance(axis, Sum) and [part.size for part in axis.parts] == [2, 4, 2] and axis.parts[1].name == trunk


@pytest.mark.parametrize("name", ["mobilenet", "mlp"])
def test_other_networks(name):
    options = {} if name == "mlp" else {"width": 0.25}
    network = models.Network(models.architecture(name, num_classes=4, input_shape=(8, 8, 3), **options))
    found = checked(network.apply, started(network), X)
    assert len(found.sizes) == (1 if name == "mlp" else 9)


def test_a_quadratic_network_has_those_of_its_factors():
    architecture = spec.quadratize(models.cnn((4, 6), pools=1, input_shape=(8, 8, 3)), "quadralib", branch_norm="batch")
    network = models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    found = checked(network.apply, started(network), X)
    assert sorted(found.sizes.values()) == [4, 6]
    assert len(found.readers(next(iter(found.sizes)))) > 5


def test_groups_change_places_and_channels_within_all_of_them_alike():
    found = checked(Grouped().apply, started(Grouped()), X)
    kernel = found.axes["params/grouped/kernel"]
    (first,) = found.axes["params/GroupNorm_0/scale"]
    assert isinstance(first, Product) and [part.size for part in first.parts] == [3, 4]
    assert isinstance(kernel[3], Product) and kernel[3].parts[0] == first.parts[0] and kernel[2] == first.parts[1]


def test_a_concatenation_has_several_one_after_the_other():
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (2, 3):
                x = jnp.concatenate([x, nn.relu(nn.Conv(width, (3, 3))(x))], -1)
            return nn.Conv(4, (1, 1), name="last")(x).mean((1, 2))

    found = checked(Dense().apply, started(Dense()), X)
    parts = permutation._leaves(found.axes["params/last/kernel"][2])
    assert [(type(part), part.size) for part in parts] == [(Fixed, 3), (Free, 2), (Free, 3)]


def test_a_convolution_as_one_product_of_patches_has_its_channels():
    def apply(params, x):
        hidden = jax.nn.relu(x @ params["first"])
        views = [jnp.pad(hidden, ((0, 0), (1, 1), (0, 0)))[:, i : i + x.shape[1]] for i in range(3)]
        return (jnp.concatenate(views, -1) @ params["second"].reshape(-1, 5)).mean(1)

    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    found = checked(apply, {"first": draw(0, 2, 4), "second": draw(1, 3, 4, 5)}, draw(2, 2, 6, 2))
    assert found.sizes == {"first[1]": 4}
    assert found.axes["second"][1] == found.axes["first"][1]
    assert found.fixed["second[0]"] == "of copies, one after the other"


def test_what_is_not_understood_is_left_alone_and_said():
    def apply(params, x):
        hidden = jnp.cumsum(x @ params["a"], 1) + jax.lax.scan(lambda c, w: (c + w, None), jnp.zeros(4), params["b"])[0]
        return hidden[:, :2] @ params["c"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((5, 4)), "c": jnp.ones((2, 2))}
    found = checked(apply, params, jnp.ones((2, 3)))
    assert not found.sizes
    assert found.fixed["a[1]"] == "of an operand of cumsum" and "scan" in found.fixed["b[0]"]
    assert "slice" in found.fixed["c[0]"] and found.fixed["a[0]"] == "of the input"


def test_constants_have_an_order_only_where_they_change():
    table = jnp.asarray([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    apply = lambda params, x: ((x @ params["a"]) * table[0] + jnp.asarray(np.full(3, 2.0))) @ params["b"]
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    assert list(checked(apply, params, jnp.ones((4, 2))).sizes.values()) == [3]
    steps = np.arange(3.0)
    found = checked(lambda params, x: ((x @ params["a"]) * steps) @ params["b"], params, jnp.ones((4, 2)))
    assert not found.sizes and found.fixed["a[1]"] == "of a constant"


def test_permuting_is_a_transform_that_maps_over_clients():
    network = models.Network(models.cnn((4, 6), pools=1, input_shape=(8, 8, 3)))
    variables = started(network)
    found = federated.derive(network.apply, variables, X)
    perms = jax.vmap(lambda key: federated.random_perms(found, key))(jax.random.split(jax.random.key(0), 3))
    clients = jax.jit(jax.vmap(lambda perms: federated.permute(found, variables, perms)))(perms)
    outputs = jax.vmap(network.apply, (0, None))(clients, X)
    np.testing.assert_allclose(outputs, jnp.broadcast_to(network.apply(variables, X), outputs.shape), rtol=1e-4)
    kernels = clients["params"]["conv2"]["layer"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])
    back = {name: jnp.argsort(perm[0]) for name, perm in perms.items()}
    first = jax.tree.map(lambda leaf: leaf[0], clients)
    jax.tree.map(np.testing.assert_array_equal, federated.permute(found, first, back), variables)


def test_what_is_no_symmetry_is_found_out_and_bad_permutations_are_refused():
    apply = lambda params, x: (x @ params["a"]) @ params["b"]
    params = {"a": jax.random.normal(jax.random.key(0), (2, 3)), "b": jax.random.normal(jax.random.key(1), (3, 2))}
    wrong = federated.Permutations({"a": 3}, {"a": (Fixed(2, ""), Free(3, "a")), "b": (Fixed(3, ""), Fixed(2, ""))})
    with pytest.raises(ValueError, match="they are no symmetry"):
        federated.verify(wrong, apply, params, jnp.ones((4, 2)), key=jax.random.key(3))
    found = checked(apply, params, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="'c' is none of a"):
        federated.permute(found, params, {"c": np.arange(3)})
    with pytest.raises(ValueError, match=r"must be of shape \(3,\), got \(2,\)"):
        federated.permute(found, params, {next(iter(found.sizes)): np.arange(2)})
