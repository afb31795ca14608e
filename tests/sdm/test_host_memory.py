"""Rows of tables in the host's memory, taken inside programs, and what happens where that cannot be done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.sdm import host_memory

TABLE = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
IDS = np.array([3, 49, 0, 3, 17], np.int32)
needs_pinned = pytest.mark.skipif(host_memory.unavailable() is not None, reason=str(host_memory.unavailable()))


@pytest.fixture
def fresh():
    """Forms are tried anew, now and after the test."""
    host_memory._working.cache_clear()
    yield
    host_memory._working.cache_clear()
    host_memory._take.clear_cache()


@needs_pinned
@pytest.mark.parametrize("form", ["auto", *host_memory.FORMS])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_pinned_rows_are_those_of_the_table(dtype, form):
    if form not in ("auto", *host_memory.forms()):
        pytest.skip(f"{form} does not work here")
    values = TABLE.view(dtype)
    table = host_memory.pinned(values)
    assert table.sharding.memory_kind == host_memory.PINNED
    rows = host_memory.take_rows(table, jnp.asarray(IDS), form)
    np.testing.assert_array_equal(rows, values[IDS])
    assert rows.sharding.memory_kind == "device"


@needs_pinned
def test_rows_are_taken_inside_a_program_that_computes_with_them():
    table = host_memory.pinned(TABLE)
    program = jax.jit(lambda table, ids: host_memory.take_rows(table, ids).sum(0))
    np.testing.assert_allclose(program(table, IDS), TABLE[IDS].sum(0), rtol=1e-6)


@needs_pinned
def test_forms_are_tried_while_a_program_is_traced(fresh):
    table = host_memory.pinned(TABLE)
    np.testing.assert_array_equal(jax.jit(host_memory.take_rows)(table, IDS), TABLE[IDS])


@needs_pinned
@pytest.mark.parametrize("form", host_memory.FORMS)
def test_it_lowers_for_a_gpu(form):
    table = host_memory.pinned(TABLE)
    text = host_memory._take.trace(table, jnp.asarray(IDS), form).lower(lowering_platforms=("cuda",)).as_text()
    assert '"stablehlo.gather"' in text and 'memory_kind = "pinned_host"' in text
    assert ('_xla_compute_type = "host"' in text) == (form == "host")


def test_numpy_tables_need_no_backend():
    np.testing.assert_array_equal(host_memory.take_rows(TABLE, jnp.asarray(IDS)), TABLE[IDS])
    with pytest.raises(TypeError, match="cannot be taken inside a program; pin it"):
        jax.jit(lambda ids: host_memory.take_rows(TABLE, ids))(IDS)


@needs_pinned
def test_a_form_that_gives_wrong_rows_or_none_is_not_used(fresh, monkeypatch):
    def refuse(_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    monkeypatch.setattr("jaxeff.compat.on_host", refuse)
    table = host_memory.pinned(TABLE)
    assert host_memory.forms() == ("device",)
    np.testing.assert_array_equal(host_memory.take_rows(table, IDS), TABLE[IDS])
    with pytest.raises(ValueError, match="form='host' does not work on .*, where device does; pass the table as a Num"):
        host_memory.take_rows(table, IDS, "host")
    host_memory._working.cache_clear()
    host_memory._take.clear_cache()
    monkeypatch.setattr(host_memory, "_rows", lambda table, indices: table[: len(indices)])
    assert host_memory.forms() == ()
    with pytest.raises(ValueError, match="form='auto' does not work on .*, where none does"):
        host_memory.take_rows(table, IDS)


def test_a_backend_without_pinned_memory_is_named(monkeypatch):
    class Memory:
        kind = "device"

    class Device:
        platform = "toaster"

        def addressable_memories(self):
            return [Memory()]

    monkeypatch.setattr(host_memory, "_device", Device)
    assert host_memory.forms() == ()
    with pytest.raises(ValueError, match="toaster has device, not pinned_host; keep it as a NumPy array"):
        host_memory.pinned(TABLE)
    with pytest.raises(ValueError, match="form='auto' does not work on toaster"):
        host_memory.take_rows(jnp.asarray(TABLE), IDS)


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="form='bus' is unknown; there are auto, host, device"):
        host_memory.take_rows(TABLE, IDS, "bus")
