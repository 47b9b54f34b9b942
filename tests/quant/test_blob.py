"""Bytes of quantized weights: encoded as by MNN's encoder, and refused if they are anything else."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.blob import Quantized, header, pack, parse_header, scale_bytes, size, unpack
from hf2mnn.quant.formats import WeightFormat
from hostile import cases
from one_layer import convert

BITS = st.integers(2, 8)


@st.composite
def quantized_values(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Any number of values of 2 to 8 bits, and their bits."""
    bits = draw(BITS)
    half = 1 << bits - 1
    count = draw(st.integers(0, 70))
    return draw(hnp.arrays(np.int8, count, elements=st.integers(-half, half - 1))), bits


def naive_pack(values: np.ndarray, bits: int) -> bytes:
    """Encode by a string of binary digits, most significant first, cut into eights."""
    digits = "".join(format(int(value) + (1 << bits - 1), f"0{bits}b") for value in values)
    digits += "0" * (-len(digits) % 8)
    return bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))


def blob(values: np.ndarray, bits: int, rows: int = 1) -> bytes:
    return header(rows, values.size // rows, 1, bits)[0] + pack(values, bits)


def decode(stored: bytes, count: int, wide: bool, name: str) -> tuple[np.ndarray, int]:
    """Return values and bits of the bytes of a weight."""
    head = parse_header(stored, len(stored), count, wide, name)
    return head.decode(stored[head.size :], count, name), head.bits


# Packing


@given(quantized_values())
def test_packing_is_that_of_a_string_of_digits(drawn: tuple[np.ndarray, int]) -> None:
    assert pack(*drawn) == naive_pack(*drawn)


@given(quantized_values())
def test_unpack_inverts_pack(drawn: tuple[np.ndarray, int]) -> None:
    values, bits = drawn
    assert np.array_equal(unpack(pack(values, bits), values.size, bits), values)
    decoded, decoded_bits = decode(blob(values, bits), values.size, False, "layer")
    assert decoded_bits == bits
    assert np.array_equal(decoded, values)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_any_length_have_no_gaps(bits: int) -> None:
    random = np.random.default_rng(bits)
    values = random.integers(-(1 << bits - 1), 1 << bits - 1, (17, 33)).astype(np.int8)
    assert pack(values, bits) == naive_pack(values.reshape(-1), bits)
    assert pack(values[:, ::2], bits) == naive_pack(values[:, ::2].reshape(-1), bits)


# Bytes of the converter


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_has_the_bytes_that_the_converter_writes(bits: int, tmp_path: Path) -> None:
    """Header, q, scales; reading and writing again gives the same file."""
    weight = np.random.default_rng(bits).standard_normal((13, 64)).astype(np.float32)
    both = [(0, False, 16), (16, True, 16)], [(32, False, 32), (0, True, 32)]
    for block, symmetric, scale_bits in both[bits % 2]:
        folder = tmp_path / f"{block}-{symmetric}-{scale_bits}"
        model = convert(folder, {"layer": weight}, WeightFormat(bits, block, symmetric, scale_bits))
        (operator,) = model.layers
        stored, alpha = (model.weights.raw(*part) for part in operator.parts[:2])
        weights = model.weights.quantized(operator)
        head, wide = header(13, 64, WeightFormat(bits, block).blocks(64), bits)
        assert stored == head + pack(weights.q, bits)
        assert wide == operator.stored["shapeInt32"]
        assert len(stored) + len(alpha) == size(13, 64, WeightFormat(bits, block, symmetric, scale_bits))
        # The converter stores the weight at the lowest q, hf2mnn that at q = 0.
        minima = None if symmetric else np.frombuffer(alpha, f"f{scale_bits // 8}")[::2].reshape(weights.scales.shape)
        assert scale_bytes(Quantized(weights.q, weights.scales, minima), scale_bits) == alpha


@pytest.mark.parametrize(("rows", "blocks", "wide"), [(65_535, 1, False), (65_536, 1, True), (16_384, 4, True)])
def test_dimensions_of_more_than_16_bits_are_int32(rows: int, blocks: int, wide: bool) -> None:
    """For a layer with many blocks as for one with many rows."""
    stored, is_wide = header(rows, 128, blocks, 4)
    assert is_wide == wide
    assert stored[:1] == b"\x02"
    dimensions = np.frombuffer(stored[1 : 9 if wide else 5], "<i4" if wide else "<u2")
    assert dimensions.tolist() == [rows * blocks, 128 // blocks]
    assert stored[9 if wide else 5 :] == bytes([16, *range(248, 256), *range(8)])


@given(st.integers(1, 40), st.sampled_from([16, 32, 48, 64]), BITS, st.booleans(), st.sampled_from([16, 32]), st.data())
def test_size_is_that_of_the_bytes(
    rows: int, inputs: int, bits: int, symmetric: bool, scale_bits: int, data: st.DataObject
) -> None:
    block = data.draw(st.sampled_from([0, *(block for block in (16, 32, 64) if inputs % block == 0)]))
    blocks = inputs // block if block else 1
    scales = np.ones((rows, blocks), np.float32)
    weights = Quantized(np.zeros((rows, inputs), np.int8), scales, None if symmetric else scales)
    written = header(rows, inputs, blocks, bits)[0] + pack(weights.q, bits) + scale_bytes(weights, scale_bits)
    assert size(rows, inputs, WeightFormat(bits, block, symmetric, scale_bits)) == len(written)


def test_size_of_floats() -> None:
    assert size(3, 5, WeightFormat(16)) == 30
    assert size(3, 5, WeightFormat(32)) == 60


def test_pairs_are_stored_zero_point_first_row_by_row() -> None:
    scales, zero_points = np.array([[1, 2], [3, 4]], np.float32), np.array([[5, 6], [7, 8]], np.float32)
    weights = Quantized(np.zeros((2, 4), np.int8), scales, zero_points)
    assert np.frombuffer(scale_bytes(weights, 16), np.float16).tolist() == [5, 1, 6, 2, 7, 3, 8, 4]
    assert np.frombuffer(scale_bytes(weights, 32), np.float32).tolist() == [5, 1, 6, 2, 7, 3, 8, 4]
    assert np.frombuffer(scale_bytes(Quantized(weights.q, scales, None), 16), np.float16).tolist() == [1, 2, 3, 4]


# Invalid bytes


def refused(stored: bytes, count: int, wide: bool = False) -> str:
    with pytest.raises(QuantizationError) as error:
        decode(stored, count, wide, "some.layer")
    assert str(error.value).startswith("some.layer: ")
    return str(error.value)


@pytest.mark.parametrize("bits", range(2, 9))
def test_truncated_bytes_and_those_of_another_weight_are_refused(bits: int) -> None:
    values = np.zeros(40, np.int8)
    whole = blob(values, bits, rows=4)
    for end in range(len(whole)):
        assert f"{end} bytes" in refused(whole[:end], 40)
    refused(whole + b"\0", 40)
    refused(whole, 41)
    refused(whole, 40, wide=True)
    refused(b"\x01" + whole[1:], 40)
    refused(header(4, 11, 1, bits)[0] + pack(values, bits), 40)


@cases(short=60)
@given(quantized_values(), st.data(), st.booleans())
def test_any_bytes_are_weights_or_refused(drawn: tuple[np.ndarray, int], data: st.DataObject, wide: bool) -> None:
    """Without another exception or another number of weights."""
    values, bits = drawn
    stored = bytearray(blob(values, bits))
    changes = st.tuples(st.integers(0, len(stored) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, max_size=3)):
        stored[position] = value
    stored = bytes(stored[: data.draw(st.integers(0, len(stored)))]) + data.draw(st.binary(max_size=3))
    try:
        decoded, _ = decode(stored, values.size, wide, "some.layer")
    except QuantizationError as error:
        assert str(error).startswith("some.layer: ")
    else:
        assert decoded.dtype == np.int8 and decoded.shape == (values.size,)


@given(st.binary(max_size=40), st.integers(0, 40), st.booleans())
def test_noise_is_weights_or_refused(stored: bytes, count: int, wide: bool) -> None:
    with contextlib.suppress(QuantizationError):
        assert len(decode(stored, count, wide, "some.layer")[0]) == count


# Tables with a part of the values


@pytest.mark.parametrize(
    ("table", "bits"), [([-3, 0, 5], 2), ([5, -3, 0], 2), ([7, 9], 1), ([4], 1), ([-128, -1, 0, 1, 127], 3)]
)
def test_a_table_of_the_used_values(table: list[int], bits: int) -> None:
    """Older converters wrote them. The engine sorts the table, and reads the bits of the largest index.

    Source: `ReadQuanInfo`, `atLestBitsCnt`.
    """
    indices = np.arange(11) % len(table)
    digits = "".join(format(index, f"0{bits}b") for index in indices)
    digits += "0" * (-len(digits) % 8)
    packed = bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
    head = b"\x02" + np.array([1, 11], "<u2").tobytes() + bytes([len(table)]) + np.array(table, np.int8).tobytes()
    decoded, decoded_bits = decode(head + packed, 11, False, "layer")
    assert decoded_bits == bits
    assert decoded.tolist() == np.sort(table)[indices].tolist()


def test_an_index_beyond_the_table_is_refused() -> None:
    head = b"\x02" + np.array([1, 4], "<u2").tobytes() + bytes([3, 0, 1, 2])
    assert "beyond the 3 of its table" in refused(head + bytes([0b00011011]), 4)
