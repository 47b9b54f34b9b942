"""The bytes of a quantized weight in a `.mnn.weight` file ("IDST" in MNN's source).

    header   number of dimensions (uint8, 2), the two dimensions (uint16, or int32 where one needs it), number of values
             (uint8, 0 for 256), the values (int8, ascending from -2^(bits-1))
    levels   one a weight, `bits` wide, most significant bit first, stored with 2^(bits-1) added
    scales   a scale a block, or pairs (zero, scale), float16 or float32, rows of the weight first, then blocks

A weight is level * scale, or level * scale + zero. Where the converter looks for weights that are mostly zero
(`--detectSparseSpeedUp`) it may store only the others, which here stand apart, in `parse_sparse`:

    header   the dimensions as above, number of levels that follow (uint32), bits of a step (uint8)
    steps    how far each of those levels is from the one before
    table    number of values and the values as above
    places   of each level in the table

Source: `IDSTEncoder.hpp` and `ConvolutionCommon::load` of MNN 3.6.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from hf2mnn.core.errors import QuantizationError

MOST_ZEROS = 1 << 24
SCALE_TYPES = {16: np.float16, 32: np.float32}


@dataclass(frozen=True)
class Levels:
    """Rows of a quantized weight.

    levels int8 [rows, inputs]; scales float32 [rows, blocks]; zeros float32 [rows, blocks], None where symmetric.
    Scales and zeros hold values that the stored float type can hold.
    """

    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    def dequantize(self) -> np.ndarray:
        """float32 [rows, inputs], rounded after the product and after the sum, as the engine computes it."""
        rows, blocks = self.scales.shape
        block = self.levels.shape[1] // blocks
        grouped = self.levels.reshape(rows, blocks, block).astype(np.float32) * self.scales[:, :, None]
        if self.zeros is not None:
            grouped += self.zeros[:, :, None]
        return grouped.reshape(self.levels.shape)


def header(rows: int, inputs: int, blocks: int, bits: int) -> tuple[bytes, bool]:
    """What stands before the levels, and whether its dimensions are int32."""
    dimensions = np.array([rows * blocks, inputs // blocks])
    wide = bool(dimensions.max() > np.iinfo(np.uint16).max)
    values = np.arange(-(1 << bits - 1), 1 << bits - 1).astype(np.int8)
    sized = dimensions.astype("<i4" if wide else "<u2").tobytes()
    return b"\x02" + sized + bytes([len(values) % 256]) + values.tobytes(), wide


def size(rows: int, inputs: int, bits: int, block: int, symmetric: bool, scale_bits: int) -> int:
    """Bytes of a weight with its scales; `block` 0 is one block a row; 16 and 32 bits are floats."""
    if bits >= 16:
        return rows * inputs * bits // 8
    blocks = inputs // block if block else 1
    stored = len(header(rows, inputs, blocks, bits)[0]) + (rows * inputs * bits + 7) // 8
    return stored + rows * blocks * (1 if symmetric else 2) * scale_bits // 8


def scale_bytes(levels: Levels, scale_bits: int) -> bytes:
    kind = SCALE_TYPES[scale_bits]
    pairs = [levels.scales] if levels.zeros is None else [levels.zeros, levels.scales]
    return np.stack(pairs, axis=-1).astype(kind).tobytes()


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def squares(values: np.ndarray) -> float:
    """Sum of squares of float32 [rows, inputs]; no number where one of them is none."""
    total = 0.0
    for row in range(values.shape[0]):
        for i in range(values.shape[1]):
            total += np.float64(values[row, i]) * values[row, i]
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _block_error(values: np.ndarray, levels: np.ndarray, scale: float, zero: float) -> float:
    total = np.float32(0)
    for i in range(len(values)):
        error = values[i] - (levels[i] * scale + zero)
        total += error * error
    return total


@njit(nogil=True, cache=True)
def _squared_error(values: np.ndarray, levels: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> float:
    total, block = 0.0, values.shape[1] // scales.shape[1]
    for row in range(values.shape[0]):
        for place in range(scales.shape[1]):
            begin, end = place * block, (place + 1) * block
            total += _block_error(values[row, begin:end], levels[row, begin:end], scales[row, place], zeros[row, place])
    return total


def squared_error(values: np.ndarray, levels: Levels) -> float:
    """Sum over what `levels` stand for less the weights, float32 [rows, inputs]."""
    zeros = np.zeros_like(levels.scales) if levels.zeros is None else levels.zeros
    return _squared_error(values, levels.levels, levels.scales, zeros)


@njit(nogil=True, cache=True)
def _pack(levels: np.ndarray, bits: int, packed: np.ndarray) -> None:
    offset = 1 << (bits - 1)
    if bits == 8:
        for i in range(len(levels)):
            packed[i] = levels[i] + offset
        return
    if bits == 4 and len(levels) % 2 == 0:
        for i in range(len(packed)):
            packed[i] = (levels[2 * i] + offset << 4) | (levels[2 * i + 1] + offset)
        return
    kept, count, place = 0, 0, 0
    for level in levels:
        kept = (kept << bits) | (int(level) + offset)
        count += bits
        while count >= 8:
            count -= 8
            packed[place] = (kept >> count) & 255
            place += 1
        kept &= (1 << count) - 1
    if count:
        packed[place] = (kept << (8 - count)) & 255


@njit(nogil=True, cache=True)
def _unpack(packed: np.ndarray, bits: int, levels: np.ndarray) -> None:
    offset, mask = 1 << (bits - 1), (1 << bits) - 1
    kept, count, place = 0, 0, 0
    for i in range(len(levels)):
        while count < bits:
            kept = (kept << 8) | packed[place]
            count += 8
            place += 1
        count -= bits
        levels[i] = ((kept >> count) & mask) - offset
        kept &= (1 << count) - 1


def pack(levels: np.ndarray, bits: int) -> bytes:
    """Levels int8 of any shape, each in [-2^(bits-1), 2^(bits-1)), to `bits` each; the last byte is filled with 0."""
    packed = np.empty((levels.size * bits + 7) // 8, np.uint8)
    _pack(np.ascontiguousarray(levels).reshape(-1), bits, packed)
    return packed.tobytes()


def unpack(packed: bytes, count: int, bits: int) -> np.ndarray:
    """int8 [count]. The inverse of `pack`."""
    levels = np.empty(count, np.int8)
    _unpack(np.frombuffer(packed, np.uint8), bits, levels)
    return levels


def _dimensions(stored: bytes, wide: bool) -> tuple[int, int, int]:
    """Where they end, and the two of them: 0 where they are cut off."""
    end = 1 + 2 * (4 if wide else 2)
    rows, inputs = np.frombuffer(stored[1:end].ljust(end - 1, b"\0"), "<u4" if wide else "<u2").tolist()
    return end, rows, inputs


def hollow(count: int, kept: int) -> bool:
    """Whether a few bytes ask for a weight of nothing but zeros that fills the memory; no network has such a one."""
    return count > MOST_ZEROS and kept * 256 < count


def damaged(size: int, count: int, name: str) -> QuantizationError:
    """Why `size` bytes are not the `count` weights of the operator `name`."""
    return QuantizationError(
        f"{name}: its {size} bytes in the weight file are not {count} quantized weights; the file was cut"
        " short or is another model's, make it again"
    )


HEADER = 1 + 2 * 4 + 1 + 256
"""Bytes that a header has at most."""


@dataclass(frozen=True)
class Header:
    """What stands before the levels: `size` in bytes; `table` int8, the values that the levels stand for, ascending,
    or None where that is [-2^(bits-1), 2^(bits-1)).
    """

    size: int
    bits: int
    table: np.ndarray | None

    def levels(self, packed: bytes, count: int, name: str) -> np.ndarray:
        """int8 [count] of bytes that begin with a whole level. Raises QuantizationError where one is not in the
        table.
        """
        levels = unpack(packed, count, self.bits)
        if self.table is None:
            return levels
        places = levels.astype(np.int16) + (1 << self.bits - 1)
        if places.max(initial=0) >= len(self.table):
            raise QuantizationError(
                f"{name}: a weight has a level beyond the {len(self.table)} of its table; make it again"
            )
        return self.table[places]


def parse_header(stored: bytes, size: int, count: int, wide: bool, name: str) -> Header:
    """The header of a weight of `size` bytes, of which `stored` has the first `HEADER`, or all.

    Raises:
        QuantizationError: they are not such bytes, or not of `count` weights, with `name` of the operator.
    """
    start, rows, inputs = _dimensions(stored, wide)
    values = (stored[start] or 256) if len(stored) > start else 0
    bits = max(values - 1, 1).bit_length()
    table = np.frombuffer(stored[start + 1 : start + 1 + values], np.int8)
    packed = size - (start + 1 + values)
    if stored[:1] != b"\x02" or rows * inputs != count or len(table) < values or packed != (count * bits + 7) // 8:
        raise damaged(size, count, name)
    # A table of its own: older converters wrote only the levels that are in use.
    usual = (table == np.arange(values) - (1 << bits - 1)).all()
    return Header(start + 1 + values, bits, None if usual else np.sort(table))


def _zero_levels(alpha: np.ndarray, bits: int) -> np.ndarray:
    """int8 [blocks]: the level that comes nearest to a weight of 0, of pairs (weight at the lowest level, scale).

    Halves are rounded away from 0, and what is no int8 loses its upper bits, as in C.
    """
    lowest = -(1 << bits - 1)
    (zeros, scales), limit = alpha.reshape(-1, 2).T, 2.0**31
    with np.errstate(all="ignore"):
        exact = (-zeros / scales).astype(np.float64)
        nearest = np.copysign(np.floor(np.abs(exact) + 0.5), exact).astype(np.float32) + np.float32(lowest)
    found = np.where(np.abs(nearest) < limit, nearest, 0).astype(np.int64).astype(np.int8)
    return np.where(scales > 1e-6, found, np.int8(lowest))


def parse_sparse(stored: bytes, alpha: np.ndarray, count: int, wide: bool, name: str) -> np.ndarray:
    """Levels int8 [count] of a weight of which only what is not zero is stored.

    `alpha` are its scales as they stand in the file, float32: of pairs, they say which level is zero. Rounded to half
    floats they may say another than the converter meant; the engine reads it so.

    Raises:
        QuantizationError: as `parse_header` does.
    """
    start, blocks, inputs = _dimensions(stored, wide)
    kept = int.from_bytes(stored[start : start + 4], "little")
    step_bits = int.from_bytes(stored[start + 4 : start + 5], "little")
    table_start = start + 5 + (kept * step_bits + 7) // 8
    values = int.from_bytes(stored[table_start : table_start + 1], "little") or 256
    bits = max(values - 1, 1).bit_length()
    places_start = table_start + 1 + values
    whole = len(stored) == places_start + (kept * bits + 7) // 8
    shaped = stored[:1] == b"\x02" and blocks * inputs == count and not hollow(count, kept)
    if not shaped or not whole or not 1 <= step_bits <= 8:
        raise damaged(len(stored), count, name)
    steps = unpack(stored[start + 5 : table_start], kept, step_bits).astype(np.int64) + (1 << step_bits - 1)
    table = np.unique(np.frombuffer(stored[table_start + 1 : places_start], np.int8))
    places = unpack(stored[places_start:], kept, bits).astype(np.int16) + (1 << bits - 1)
    if kept and (steps.sum() >= count or places.max() >= len(table)):
        raise damaged(len(stored), count, name)
    pairs = alpha.size == 2 * blocks
    levels = np.repeat(_zero_levels(alpha, bits), inputs) if pairs else np.zeros(count, np.int8)
    levels[np.cumsum(steps)] = table[places]
    return levels
