import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm.encoding import KINDS, RowFormat, check_rows, decode, decode_jax, encode, zero_row

# Made by torch 2.13.0 on x86: `torch.ops.quantized.embedding_bag_byte_prepack` and `embedding_bag_4bit_prepack`.
ROWS = np.array(
    [
        [0.5, -1.25, 3.0, 0.10000000149011612],
        [-0.30000001192092896, 0.699999988079071, 0.009999999776482582, 0.0010000000474974513],
        [9.999999717180685e-10, 1.999999943436137e-09, 0.0, 4.999999969612645e-09],
        [2.700000047683716, 2.700000047683716, 2.700000047683716, 2.700000047683716],
        [0.0, 0.0, 0.0, 0.0],
        [100.30000305175781, -250.6999969482422, 3.141590118408203, 65000.0],
    ],
    np.float32,
)
TORCH_INT8 = """
6900ff518988883c0000a0bf 00ff4f4d8180803b9a9999be 11220055f078ac2d00000000
0000000000000000cdcc2c40 000000000000000000000000 010001ff96e27f4333b37ac3
"""
TORCH_INT4 = "065f893400bd f055442ccdb4 0000003c0000 ffff6a036641 0000003c0000 00f0406cd6db"
TORCH_INT4_VALUES = [
    [0.45068359375, -1.25, 3.001708984375, 0.167236328125],
    [-0.300048828125, 0.69970703125, 0.033203125, 0.033203125],
    [0.0, 0.0, 0.0, 0.0],
    [2.700000286102295, 2.700000286102295, 2.700000286102295, 2.700000286102295],
    [0.0, 0.0, 0.0, 0.0],
    [-250.75, -250.75, -250.75, 65029.25],
]


def _normal(rows, dim, scale=1.0, seed=0):
    return (np.random.default_rng(seed).normal(size=(rows, dim)) * scale).astype(np.float32)


def _optimised(function, *arguments):
    # As a user's process compiles, which the tests' own setting does not: LLVM contracts multiply-adds.
    return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 3})(*arguments)


@pytest.mark.parametrize(("kind", "frozen"), [("int8", TORCH_INT8), ("int4", TORCH_INT4)])
def test_quantised_rows_are_the_bytes_of_torch(kind, frozen):
    assert encode(ROWS, RowFormat(kind, 4)).tobytes() == bytes.fromhex(frozen)


def test_int4_decodes_to_the_values_of_torch():
    fmt = RowFormat("int4", 4)
    np.testing.assert_array_equal(decode(encode(ROWS, fmt), fmt), np.array(TORCH_INT4_VALUES, np.float32))


@pytest.mark.parametrize(
    ("kind", "dim", "expected"),
    [("float32", 5, 20), ("float16", 5, 10), ("bfloat16", 5, 10), ("int8", 5, 13), ("int4", 5, 7), ("int4", 6, 7)],
)
def test_bytes_of_a_row(kind, dim, expected):
    fmt = RowFormat(kind, dim)
    assert fmt.row_bytes == expected
    assert encode(_normal(3, dim), fmt).shape == (3, expected)


def test_int8_is_a_multiplication_and_an_addition_each_rounded_once():
    fmt = RowFormat("int8", 7)
    rows = encode(_normal(50, 7), fmt)
    scale = np.frombuffer(rows[:, 7:11].tobytes(), "<f4")
    bias = np.frombuffer(rows[:, 11:15].tobytes(), "<f4")
    # A product of float32 is exact in float64, so each cast is the one rounding.
    expected = [
        [np.float32(np.float64(np.float32(np.float64(q) * np.float64(s))) + np.float64(b)) for q in row]
        for row, s, b in zip(rows[:, :7], scale, bias, strict=True)
    ]
    np.testing.assert_array_equal(decode(rows, fmt), np.array(expected, np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_the_form_in_a_program_has_the_same_bits(kind, dim):
    fmt = RowFormat(kind, dim)
    rows = encode(np.concatenate([_normal(200, dim), _normal(200, dim, 1e-3), _normal(200, dim, 1e3)]), fmt)
    expected = decode(rows, fmt)
    for found in (
        _optimised(lambda rows: decode_jax(rows, fmt), rows),
        jax.jit(jax.vmap(lambda row: decode_jax(row, fmt)))(rows),
        jax.jit(lambda rows: decode_jax(rows.reshape(30, 20, -1), fmt))(rows).reshape(600, dim),
    ):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_half_precision_number_decodes_to_itself(kind):
    numbers = np.arange(1 << 16, dtype=np.uint16)
    dtype = jnp.dtype(kind)
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}[kind]
    numbers = numbers[(numbers & exponent) != exponent]
    fmt, rows = RowFormat(kind, 1), numbers.view(np.uint8).reshape(-1, 2)
    expected = np.array([float(number) for number in numbers.view(dtype)], np.float32)
    np.testing.assert_array_equal(decode(rows, fmt)[:, 0], expected)
    # XLA on CPU takes a subnormal bfloat16, which is a subnormal float32, for zero or for itself.
    normal = np.abs(expected) >= np.finfo(np.float32).tiny
    found = np.asarray(jax.jit(lambda rows: decode_jax(rows, fmt))(rows))[:, 0]
    np.testing.assert_array_equal(found[normal], expected[normal])
    np.testing.assert_array_equal(encode(expected[:, None], fmt), rows)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int8", "int4"]),
    st.integers(1, 33),
    st.integers(1, 20),
    st.floats(1e-4, 1e4),
    st.integers(0, 2**31),
)
def test_a_quantised_value_is_within_half_a_step(kind, dim, rows, size, seed):
    values = _normal(rows, dim, size, seed)
    fmt = RowFormat(kind, dim)
    found = decode(encode(values, fmt), fmt).astype(np.float64)
    low, high = values.min(1, keepdims=True).astype(np.float64), values.max(1, keepdims=True)
    steps, half = (255, 0.0) if kind == "int8" else (15, 2.0**-10)
    # Half precision of scale and bias costs int4 up to 2^-11 of each, wherever in the row the value lies.
    slack = (
        half * (np.abs(low) + (high - low))
        + 2.0**-20 * (np.abs(low) + np.abs(high))
        + 1e-8
        + 1.2e-7 * steps * (half > 0)
    )
    assert (np.abs(found - values) <= (high - low) / steps / 2 + slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_row_is_zeros_everywhere(kind):
    fmt = RowFormat(kind, 5)
    row = zero_row(fmt)
    assert row.shape == (fmt.row_bytes,)
    for values in (decode(row, fmt), np.asarray(decode_jax(jnp.asarray(row), fmt))):
        np.testing.assert_array_equal(values.view(np.uint32), np.zeros(5, np.uint32))
    with pytest.raises(ValueError, match="read-only"):
        row[0] = 1


def test_a_minimum_of_negative_zero_is_stored_positive():
    rows = encode(np.array([[-0.0, 0.0], [0.0, -0.0]], np.float32), RowFormat("int8", 2))
    assert not rows.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_row_and_column(kind, bad):
    values = _normal(4, 3)
    values[2, 1] = bad
    with pytest.raises(ValueError, match=r"row 102, column 1 is .*not finite"):
        encode(values, RowFormat(kind, 3), first_row=100)


@pytest.mark.parametrize(("kind", "size"), [("float16", 7e4), ("bfloat16", 3.4e38), ("int8", 3e38), ("int4", 7e4)])
def test_values_beyond_the_format_are_refused(kind, size):
    values = np.array([[0, 1], [-size, size]], np.float32)
    with pytest.raises(ValueError, match=f"row 1 spans .* beyond what {kind} can hold"):
        encode(values, RowFormat(kind, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_rows_are_checked(kind):
    fmt = RowFormat(kind, 4)
    rows = encode(_normal(3, 4), fmt)
    check_rows(rows, fmt)
    rows[1, fmt.row_bytes - 2 :] = 0xFF
    with pytest.raises(ValueError, match="row 8 has a (value|scale or bias) that is not finite"):
        check_rows(rows, fmt, first_row=7)


def test_wrong_arguments_are_named():
    fmt = RowFormat("int8", 4)
    with pytest.raises(ValueError, match=r"kind: 'int3'.*float32, float16"):
        RowFormat("int3", 4)
    for dim in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="dim: expected a positive integer"):
            RowFormat("int8", dim)
    with pytest.raises(TypeError, match="values: expected float32, got float64"):
        encode(np.zeros((2, 4)), fmt)
    with pytest.raises(ValueError, match=r"values: expected shape \[n, 4\]"):
        encode(np.zeros((2, 5), np.float32), fmt)
    for reading in (decode, decode_jax, check_rows):
        with pytest.raises(TypeError, match="rows: expected uint8"):
            reading(np.zeros((2, 12), np.int8), fmt)
        with pytest.raises(ValueError, match=r"rows: expected shape \[..., 12\]"):
            reading(np.zeros((2, 4), np.uint8), fmt)
