"""The table of fastest forms: what is measured is remembered, and damage is forgotten."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.ops import autotune


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path))


def test_the_faster_form_wins():
    def slow(x):
        return jax.pure_callback(lambda x: time.sleep(0.02) or x, x, x)

    assert autotune.fastest({"slow": slow, "fast": lambda x: x}, [np.ones(3, np.float32)], rounds=2) == "fast"


def test_a_standard_is_left_for_a_tenth_of_its_time_only(monkeypatch):
    times = {"mask": [1.0, 2.0, 1.0], "near": [0.95, 0.95, 0.95], "fast": [0.8, 0.8, 9.0]}
    monkeypatch.setattr(autotune, "seconds", lambda forms, *_: {name: times[name] for name in forms})
    for names, expected in ((("mask", "near"), "mask"), (("mask", "near", "fast"), "fast")):
        assert autotune.fastest(dict.fromkeys(names), (), standard="mask") == expected
    assert autotune.fastest(dict.fromkeys(("mask", "near")), ()) == "near"


def test_forms_that_do_not_compile_are_left_out_where_they_are_optional():
    def broken(x):
        raise NotImplementedError("no such instruction")

    forms, arguments = {"broken": broken, "fine": lambda x: x}, [np.ones(3, np.float32)]
    with pytest.warns(UserWarning, match="'broken' is left out, as it does not compile here: no such instruction"):
        assert autotune.fastest(forms, arguments, standard="fine") == "fine"
    with pytest.raises(NotImplementedError, match="no such instruction"):
        autotune.fastest(forms, arguments)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        autotune.seconds(forms, arguments, 0)


def test_operands_come_from_as_many_copies_as_the_footprint_needs(monkeypatch):
    made, copy = [], jnp.copy
    monkeypatch.setattr(jnp, "copy", lambda array: made.append(1) or copy(array))
    for footprint, copies in ((0, 1), (4096, 4), (10**9, autotune.MOST_COPIES)):
        made.clear()
        times = autotune.seconds({"form": lambda x: x + 1}, [np.ones(256, np.float32)], footprint=footprint)
        assert len(made) == copies - 1 and len(times["form"]) >= 5


def test_a_missing_or_damaged_table_is_an_empty_one():
    assert autotune.lookup("anything") is None
    autotune.remember({"layer": "stacked"})
    assert autotune.lookup("layer") == "stacked"
    autotune.table_path().write_text("{broken")
    assert autotune.lookup("layer") is None


def test_signatures_differ_in_whatever_matters():
    x, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3), (3, 4)))
    half = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    names = [
        autotune.signature("layer", (x, k), (1, 1)),
        autotune.signature("other", (x, k), (1, 1)),
        autotune.signature("layer", (half, k), (1, 1)),
        autotune.signature("layer", (x, x), (1, 1)),
        autotune.signature("layer", (x, k), (2, 2)),
    ]
    assert len(set(names)) == len(names)
