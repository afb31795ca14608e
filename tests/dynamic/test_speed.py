"""What is measured is used, and what is reported adds up; nothing here asserts how long anything takes."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import dynamic, models
from jaxeff.dynamic import DynamicSpec, convolution, engines, speed
from jaxeff.dynamic.convolution import candidates
from jaxeff.ops import autotune

NATIVE = set() if engines.native_misfit(jnp.float32) else {"native_mask", "native_channels"}
X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
PLAN = models.vgg((8, "M", 8, 8), num_classes=3, input_shape=(8, 8, 3))


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path))


def network(**settings):
    return models.Network(dynamic.gate(PLAN, DynamicSpec(**settings)), gate=dynamic.gate_layer)


def test_gated_calls_are_the_layers_as_they_run():
    conv2, conv3 = dynamic.gated_calls(network(channels=0.5), X)
    assert (conv2.path, conv2.x.shape, conv2.kernel.shape) == ("conv2/layer", (2, 4, 4, 8), (3, 3, 8, 8))
    assert conv3.path == "conv3/layer" and conv3.window == conv2.window == engines.geometry((2, 4, 4, 8), (3, 3, 8, 8))
    assert dynamic.gated_calls(models.Network(PLAN), X) == ()


@pytest.mark.parametrize("train", [False, True])
def test_tuned_layers_run_the_engine_that_was_fastest(monkeypatch, train):
    seen = {}

    def fastest(forms, arguments, rounds, standard, footprint):
        assert standard == "mask" and footprint == 4 * (9 * (3 * 8 + 8 * 8 + 8 * 8) + 3 * 16 + 8 * 3 + 3)
        seen.update({engine: form(*(jnp.ones(a.shape) for a in arguments)) for engine, form in forms.items()})
        return "grouped"

    monkeypatch.setattr(autotune, "fastest", fastest)
    net = network(channels=0.5, group_size=2)
    found = dynamic.tune(net, X, train=train)
    assert list(found.values()) == ["grouped"]  # both layers are the same
    assert set(seen) == {"mask", "channels", "grouped", *NATIVE}
    ran, engine = [], dynamic.ENGINES["grouped"]
    watched = engine._replace(run=lambda *args: ran.append(1) or engine.run(*args))
    monkeypatch.setitem(dynamic.ENGINES, "grouped", watched)
    jax.eval_shape(net.init, jax.random.key(0), X)
    assert len(ran) == 2
    ran.clear()
    jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((3, 8, 8, 3), jnp.float32))
    assert not ran  # another batch was not measured


class Two(nn.Module):
    """A network of two inputs and an option."""

    @nn.compact
    def __call__(self, x, scale, *, doubled):
        conv = nn.Conv(8, (3, 3), conv_general_dilated_cls=dynamic.gated(DynamicSpec(channels=0.5)))
        return conv(x * scale["by"]) * (2 if doubled else 1)


def test_networks_of_several_inputs_and_options_are_measured():
    inputs = X, {"by": jax.ShapeDtypeStruct((), jnp.float32)}
    (call,) = dynamic.gated_calls(Two(), *inputs, options={"doubled": True})
    assert (call.path, call.x.shape) == ("Conv_0", X.shape)
    assert len(dynamic.tune(Two(), *inputs, options={"doubled": True})) == 1
    assert len(dynamic.speed_report(Two(), *inputs, options={"doubled": False}, rounds=1).rows) == 1


def test_a_gate_that_keeps_everything_is_reported_as_masking():
    report = dynamic.speed_report(network(channels=0.01, engine="channels"), X, rounds=1)
    assert {row.engine for row in report.rows} == {"mask"}


def test_candidates_save_what_is_dropped():
    names = {
        "channels": {"mask", "channels", "grouped", *NATIVE},
        "columns": {"mask", "columns", *(name.replace("channels", "columns") for name in NATIVE)},
        "outputs": {"mask", "output_columns", "output_tiles", *(NATIVE - {"native_channels"})},
    }
    window = engines.geometry(X.shape, (3, 3, 3, 8))
    for axis, expected in names.items():
        assert set(candidates(DynamicSpec(**{axis: 0.5}), X, window)) == expected
    both = candidates(DynamicSpec(channels=0.5, columns=0.5), X, window)
    assert {"mask", "channels", "grouped", "columns", "channels_and_columns"} <= set(both)
    assert ("native_channels_and_columns" in both) is bool(NATIVE)


def test_engines_that_do_not_fit_are_no_candidates_and_auto_masks_in_their_place(monkeypatch):
    monkeypatch.setattr(convolution.engines, "native_misfit", lambda dtype: "there is no C++ compiler")
    settings = DynamicSpec(channels=0.5)
    window = engines.geometry(X.shape, (3, 3, 4, 8))
    x, k = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 8))
    assert not any(name.startswith("native") for name in candidates(settings, x, window))
    kept = dynamic.Kept(channels=jnp.zeros((2, 2), int))
    for remembered in ("native_channels", "of another version"):
        autotune.remember({convolution.signature(settings, x, k, window): remembered})
        assert convolution.resolved(settings, kept, x, k, window) == "mask"
    with pytest.raises(
        ValueError, match="engine 'native_channels' does not fit: there is no C.. compiler; take 'mask'"
    ):
        dynamic.conv(x, k, DynamicSpec(channels=0.5, engine="native_channels"))


def test_dense_forms_are_one_convolution():
    rng = np.random.default_rng(0)
    x, k = jnp.asarray(rng.normal(size=(2, 7, 6, 4))), jnp.asarray(rng.normal(size=(3, 3, 4, 5)))
    for window in (
        engines.geometry(x.shape, k.shape),
        engines.geometry(x.shape, k.shape, (2, 1), ((1, 0), (2, 1)), (1, 2)),
    ):
        expected = jax.lax.conv_general_dilated(
            x, k, window.strides, window.padding, None, window.dilation, ("NHWC", "HWIO", "NHWC")
        )
        for name, form in dynamic.dense_forms(window).items():
            np.testing.assert_allclose(form(x, k), expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_report_adds_up(monkeypatch):
    times = {
        "ops": [3.0, 4.0],
        "lax": [9.0, 9.0],
        "patches": [5.0, 5.0],
        "patches_barrier": [5.0, 5.0],
        "native": [6.0, 6.0],
    }
    times |= {"mask": [4.0, 4.0], "engine": [1.5, 2.0]}
    monkeypatch.setattr(speed.autotune, "seconds", lambda forms, *_, **__: {name: times[name] for name in forms})
    report = dynamic.speed_report(network(channels=0.5, engine="channels"), X)
    first, second = report.rows
    assert (first.path, second.path) == ("conv2/layer", "conv3/layer")
    assert first.dense_form == "ops" and first.engine == "channels"
    assert first.seconds == {"dense": 3.5, "mask": 4.0, "engine": 1.75}
    assert (first.counted, first.real, first.efficiency) == (2.0, 2.0, 1.0)
    assert report.efficiency == pytest.approx(1.0)
    assert "ops 3500.00 ms" in str(report) and "efficiency, geometric mean: 1.00" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["counted"] == 2.0


def test_real_measurements_are_positive():
    report = dynamic.speed_report(network(channels=0.5, columns=0.5, engine="channels_and_columns"), X, rounds=2)
    assert len(report.rows) == 2 and report.rows[0].counted == 4
    assert all(value > 0 for value in report.rows[0].seconds.values())


def test_a_network_without_gates_has_no_report():
    with pytest.raises(ValueError, match=r"no gated convolutions; jaxeff\.dynamic\.gate or Gated puts gates into it"):
        dynamic.speed_report(models.Network(PLAN), X)


def test_auto_masks_on_several_hosts_as_their_tables_may_differ(monkeypatch):
    settings, x, k = DynamicSpec(channels=0.5), jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 8))
    window, kept = engines.geometry(x.shape, k.shape), dynamic.Kept(channels=jnp.zeros((2, 2), int))
    autotune.remember({convolution.signature(settings, x, k, window): "channels"})
    assert convolution.resolved(settings, kept, x, k, window) == "channels"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert convolution.resolved(settings, kept, x, k, window) == "mask"
