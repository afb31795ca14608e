"""Buffers are shared with JAX without a copy, and not used again while a program reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.sdm.staging import PAGE, Ring, aligned, shared


def test_buffers_start_on_pages_and_are_shared_without_a_copy():
    rows = aligned((100, 24), np.float32)
    assert rows.ctypes.data % PAGE == 0 and not rows.any()
    array = shared(rows)
    assert isinstance(array, jax.Array) and array.shape == rows.shape
    if jax.default_backend() == "cpu":
        assert array.unsafe_buffer_pointer() == rows.ctypes.data


def test_a_ring_hands_out_buffers_in_turn_and_makes_others_when_they_do_not_fit():
    ring = Ring(3, lambda size: np.zeros(size))
    places, buffers = zip(*(ring.take(4) for _ in range(4)), strict=True)
    assert places == ((0, 1), (1, 1), (2, 1), (0, 2))
    assert buffers[0] is buffers[3] and buffers[0] is not buffers[1]
    assert ring.take(8)[1].shape == (8,)


def test_a_buffer_is_handed_out_when_its_readers_are_done():
    ring = Ring(3, lambda size: np.zeros(size))
    place, _ = ring.take(4)
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.sin(y @ y), x))(jnp.ones((200, 200)))
    ring.read_by(place, work)
    for _ in range(3):
        ring.take(4)
    assert work.is_ready()


def test_all_readers_of_a_buffer_are_waited_for():
    ring = Ring(3, lambda size: np.zeros(size))
    place, _ = ring.take(4)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.sin(y @ y), x))(jnp.ones((200, 200)))
    ring.read_by(place, slow)
    ring.read_by(place, {"quick": jnp.ones(1)})
    for _ in range(3):
        ring.take(4)
    assert slow.is_ready()


def test_a_buffer_that_was_handed_out_again_cannot_be_read_any_more():
    ring = Ring(3, lambda size: np.zeros(size))
    late, _ = ring.take(4)
    for _ in range(3):
        ring.take(4)
    with pytest.raises(RuntimeError, match="read after 3 others were fetched, which took its buffer"):
        ring.read_by(late, None)


def test_a_buffer_that_is_read_while_it_is_handed_out_is_an_error():
    ring = Ring(3, lambda size: np.zeros(size))
    place, _ = ring.take(4)

    class Late:
        """Reads the buffer again while the ring waits for its reader."""

        def block_until_ready(self):
            with pytest.raises(RuntimeError, match="which took its buffer"):
                ring.read_by(place, None)
            self.seen = True

    ring.read_by(place, late := Late())
    for _ in range(3):
        ring.take(4)
    assert late.seen


def test_results_that_were_donated_say_nothing_of_when_the_buffer_was_read():
    ring = Ring(3, lambda size: np.zeros(size))
    place, _ = ring.take(4)
    results = jnp.ones(3)
    ring.read_by(place, results)
    results.delete()
    with pytest.raises(RuntimeError, match="was donated to another program; give read_by a result that is not"):
        for _ in range(3):
            ring.take(4)


def test_a_ring_of_two_is_refused():
    with pytest.raises(ValueError, match="needs 3 buffers or more, got 2"):
        Ring(2, np.zeros)
