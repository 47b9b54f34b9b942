"""Format of quantized weights in a `.mnn.weight` file, which MNN calls IDST.

A weight is a matrix [rows, inputs]. Each row is cut into blocks of equal length; a block has a scale s, and a zero
point z unless the weight is symmetric. Scales and zero points are floats: a weight is q * s + z, where z is the weight
at q = 0, and q is an integer in [-2^(bits-1), 2^(bits-1)).

Dense weights (`quanParameter.type` 1), at `external` offset and sizes of the operator:

    header
        uint8           2, the number of dimensions
        uint16 or int32 rows * blocks; int32 if either dimension exceeds 65,535 (`shapeInt32`)
        uint16 or int32 inputs / blocks
        uint8           number of values of q, 0 for 256
        int8 ...        the values, ascending
    q
        bits each       q + 2^(bits-1), most significant bit first, row by row; the last byte is filled with zeros
    scales
        float16 or float32, row by row, block by block: s, or pairs (z, s)

The values are all of [-2^(bits-1), 2^(bits-1)), or, from older converters, only those in use. Then the table is sorted,
and q is an index into it.

Sparse weights (type 2, `--detectSparseSpeedUp` of the converter) store the values that are not zero:

    header
        uint8           2
        two of uint16 or int32: dimensions as above
        uint32          number of stored values
        uint8           bits of a step
    steps               distance of each value from the previous one, in bits as above
    table               number of values and values as above
    indices             index of each value in the table, in bits as above

Source: `IDSTEncoder.hpp` and `ConvolutionCommon::load` of MNN 3.6.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.formats import WeightFormat

MAX_HEADER = 1 + 2 * 4 + 1 + 256
"""Largest header of a dense weight in bytes."""
PLAUSIBLE_ZEROS = 1 << 24
"""Largest sparse weight that may consist of zeros alone."""
SCALE_TYPES = {16: np.float16, 32: np.float32}


@dataclass(frozen=True)
class Quantized:
    """Rows of a quantized weight, w = q * s + z."""

    q: np.ndarray  # int8 [rows, inputs]
    scales: np.ndarray  # float32 [rows, blocks], with values that the stored float type holds exactly
    zero_points: np.ndarray | None  # float32 [rows, blocks], likewise; None for a symmetric weight

    @property
    def alpha(self) -> np.ndarray:
        """Scales as they are stored: float32 [rows, blocks, 1], or [rows, blocks, 2] with zero points first."""
        parts = [self.scales] if self.zero_points is None else [self.zero_points, self.scales]
        return np.stack(parts, axis=-1)

    def dequantize(self) -> np.ndarray:
        """Return float32 [rows, inputs], rounded after the product and after the sum as in the engine."""
        rows, blocks = self.scales.shape
        block = self.q.shape[1] // blocks
        weights = self.q.reshape(rows, blocks, block).astype(np.float32) * self.scales[:, :, None]
        if self.zero_points is not None:
            weights += self.zero_points[:, :, None]
        return weights.reshape(self.q.shape)


def header(rows: int, inputs: int, blocks: int, bits: int) -> tuple[bytes, bool]:
    """Return the header of a dense weight, and whether its dimensions are int32."""
    dimensions = np.array([rows * blocks, inputs // blocks])
    wide = bool(dimensions.max() > np.iinfo(np.uint16).max)
    values = np.arange(-(1 << bits - 1), 1 << bits - 1).astype(np.int8)
    encoded = dimensions.astype("<i4" if wide else "<u2").tobytes()
    return b"\x02" + encoded + bytes([len(values) % 256]) + values.tobytes(), wide


def size(rows: int, inputs: int, form: WeightFormat) -> int:
    """Return the bytes of a float or dense weight [rows, inputs] with its scales."""
    if form.bits >= 16:
        return rows * inputs * form.bits // 8
    blocks = form.blocks(inputs)
    weight = len(header(rows, inputs, blocks, form.bits)[0]) + (rows * inputs * form.bits + 7) // 8
    return weight + rows * blocks * (1 if form.symmetric else 2) * form.scale_bits // 8


def scale_bytes(weight: Quantized, scale_bits: int) -> bytes:
    """Encode scales, or pairs of zero point and scale."""
    return weight.alpha.astype(SCALE_TYPES[scale_bits]).tobytes()


@njit(nogil=True, cache=True)
def _pack(q, bits, packed):
    offset = 1 << (bits - 1)
    if bits == 8:
        for i in range(len(q)):
            packed[i] = q[i] + offset
        return
    if bits == 4 and len(q) % 2 == 0:
        for i in range(len(packed)):
            packed[i] = (q[2 * i] + offset << 4) | (q[2 * i + 1] + offset)
        return
    buffer, count, end = 0, 0, 0
    for value in q:
        buffer = (buffer << bits) | (int(value) + offset)
        count += bits
        while count >= 8:
            count -= 8
            packed[end] = (buffer >> count) & 255
            end += 1
        buffer &= (1 << count) - 1
    if count:
        packed[end] = (buffer << (8 - count)) & 255


@njit(nogil=True, cache=True)
def _unpack(packed, bits, q):
    offset, mask = 1 << (bits - 1), (1 << bits) - 1
    buffer, count, begin = 0, 0, 0
    for i in range(len(q)):
        while count < bits:
            buffer = (buffer << 8) | packed[begin]
            count += 8
            begin += 1
        count -= bits
        q[i] = ((buffer >> count) & mask) - offset
        buffer &= (1 << count) - 1


def pack(q: np.ndarray, bits: int) -> bytes:
    """Encode int8 of any shape, with values in [-2^(bits-1), 2^(bits-1)), in `bits` each."""
    packed = np.empty((q.size * bits + 7) // 8, np.uint8)
    _pack(np.ascontiguousarray(q).reshape(-1), bits, packed)
    return packed.tobytes()


def unpack(packed: bytes, count: int, bits: int) -> np.ndarray:
    """Decode int8 [count]; the inverse of `pack`."""
    q = np.empty(count, np.int8)
    _unpack(np.frombuffer(packed, np.uint8), bits, q)
    return q


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def squares(values):
    """Return the sum of squares of float32 [rows, inputs]; NaN or infinite if a value is."""
    total = 0.0
    for row in range(values.shape[0]):
        for i in range(values.shape[1]):
            total += np.float64(values[row, i]) * values[row, i]
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _block_error(w, q, s, z):
    total = np.float32(0)
    for i in range(len(w)):
        error = w[i] - (q[i] * s + z)
        total += error * error
    return total


@njit(nogil=True, cache=True)
def _squared_error(weights, q, scales, zero_points):
    total, block = 0.0, weights.shape[1] // scales.shape[1]
    for row in range(weights.shape[0]):
        for index in range(scales.shape[1]):
            begin, end = index * block, (index + 1) * block
            s, z = scales[row, index], zero_points[row, index]
            total += _block_error(weights[row, begin:end], q[row, begin:end], s, z)
    return total


def squared_error(weights: np.ndarray, quantized: Quantized) -> float:
    """Return the sum of squared differences between float32 [rows, inputs] and their quantized form."""
    zero_points = np.zeros_like(quantized.scales) if quantized.zero_points is None else quantized.zero_points
    return _squared_error(weights, quantized.q, quantized.scales, zero_points)


# Reading; files are untrusted


def damaged(size: int, count: int, name: str) -> QuantizationError:
    """Return the error for `size` bytes that are not the `count` weights of the operator `name`."""
    return QuantizationError(
        f"{name}: its {size} bytes in the weight file are not {count} quantized weights; the file is truncated or of"
        " another model, make it again"
    )


def is_decompression_bomb(count: int, stored: int) -> bool:
    """Return True for a sparse weight whose dense size is implausible: many weights, and almost all of them zero."""
    return count > PLAUSIBLE_ZEROS and stored * 256 < count


def _dimensions(blob: bytes, wide: bool) -> tuple[int, int, int]:
    """Return the offset after the dimensions and the two dimensions, 0 where `blob` is truncated."""
    end = 1 + 2 * (4 if wide else 2)
    rows, inputs = np.frombuffer(blob[1:end].ljust(end - 1, b"\0"), "<u4" if wide else "<u2").tolist()
    return end, rows, inputs


@dataclass(frozen=True)
class Header:
    """Header of a dense weight."""

    size: int  # in bytes
    bits: int  # of q
    table: np.ndarray | None  # int8, values by index, ascending; None if they are [-2^(bits-1), 2^(bits-1))

    def decode(self, packed: bytes, count: int, name: str) -> np.ndarray:
        """Decode int8 [count] of the operator `name` from bytes that begin with a whole value."""
        q = unpack(packed, count, self.bits)
        if self.table is None:
            return q
        indices = q.astype(np.int16) + (1 << self.bits - 1)
        if indices.max(initial=0) >= len(self.table):
            raise QuantizationError(
                f"{name}: a weight has an index beyond the {len(self.table)} of its table; make the weight file again"
            )
        return self.table[indices]


def parse_header(blob: bytes, size: int, count: int, wide: bool, name: str) -> Header:
    """Parse the header of `count` dense weights in `size` bytes, of which `blob` has the first `MAX_HEADER`, or all.

    `wide` means int32 dimensions. Raise QuantizationError if the bytes are not these weights of the operator `name`.
    """
    start, rows, inputs = _dimensions(blob, wide)
    values = (blob[start] or 256) if len(blob) > start else 0
    bits = max(values - 1, 1).bit_length()
    end = start + 1 + values
    table = np.frombuffer(blob[start + 1 : end], np.int8)
    fitting = blob[:1] == b"\x02" and rows * inputs == count and size - end == (count * bits + 7) // 8
    if not fitting or len(table) < values:
        raise damaged(size, count, name)
    complete = (table == np.arange(values) - (1 << bits - 1)).all()
    return Header(end, bits, None if complete else np.sort(table))


def _zero_values(alpha: np.ndarray, bits: int) -> np.ndarray:
    """Return int8 [blocks], the q nearest to a weight of 0, from pairs of the weight at the lowest q and the scale.

    As in C, halves are rounded away from 0, and numbers that are no int8 lose their upper bits.
    """
    lowest = -(1 << bits - 1)
    (minima, scales), limit = alpha.reshape(-1, 2).T, 2.0**31
    with np.errstate(all="ignore"):
        exact = (-minima / scales).astype(np.float64)
        nearest = np.copysign(np.floor(np.abs(exact) + 0.5), exact).astype(np.float32) + np.float32(lowest)
    q = np.where(np.abs(nearest) < limit, nearest, 0).astype(np.int64).astype(np.int8)
    return np.where(scales > 1e-6, q, np.int8(lowest))


def parse_sparse(blob: bytes, alpha: np.ndarray, count: int, wide: bool, name: str) -> np.ndarray:
    """Decode int8 [count] from the bytes of a sparse weight; `wide` means int32 dimensions.

    `alpha` are its stored scales as float32. If they are pairs, they determine the q of zero; as float16 they may give
    another q than the converter used, but the engine decodes the same. Raise QuantizationError if the bytes are not
    `count` weights of the operator `name`.
    """
    start, blocks, inputs = _dimensions(blob, wide)
    stored = int.from_bytes(blob[start : start + 4], "little")
    step_bits = int.from_bytes(blob[start + 4 : start + 5], "little")
    table_start = start + 5 + (stored * step_bits + 7) // 8
    values = int.from_bytes(blob[table_start : table_start + 1], "little") or 256
    bits = max(values - 1, 1).bit_length()
    indices_start = table_start + 1 + values
    complete = len(blob) == indices_start + (stored * bits + 7) // 8
    fitting = blob[:1] == b"\x02" and blocks * inputs == count and not is_decompression_bomb(count, stored)
    if not fitting or not complete or not 1 <= step_bits <= 8:
        raise damaged(len(blob), count, name)
    steps = unpack(blob[start + 5 : table_start], stored, step_bits).astype(np.int64) + (1 << step_bits - 1)
    table = np.unique(np.frombuffer(blob[table_start + 1 : indices_start], np.int8))
    indices = unpack(blob[indices_start:], stored, bits).astype(np.int16) + (1 << bits - 1)
    if stored and (steps.sum() >= count or indices.max() >= len(table)):
        raise damaged(len(blob), count, name)
    pairs = alpha.size == 2 * blocks
    q = np.repeat(_zero_values(alpha, bits), inputs) if pairs else np.zeros(count, np.int8)
    q[np.cumsum(steps)] = table[indices]
    return q
