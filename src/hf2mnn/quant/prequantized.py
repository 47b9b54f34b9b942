"""Take the levels and scales of an AWQ or GPTQ checkpoint over into MNN's format, bit for bit.

A packed weight is (level - zero) * scale with whole numbers from 0; MNN's is level * scale + zero with levels around 0,
so its zero is (2^(bits-1) - zero) * scale: a half float times a whole number below 2^8, which float32 always holds, and
half floats where all zeros are in the middle (then none is stored) or the product has few enough digits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.prequantized import PackedLinear
from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.quant.blob import Levels
from hf2mnn.quant.weights import Operator
from hf2mnn.quant.write import RoundRows


def _levels(packed: PackedLinear) -> Levels:
    middle = 1 << packed.bits - 1
    levels = (packed.levels.astype(np.int16) - middle).astype(np.int8)
    scales = packed.scales.astype(np.float32)
    zeros = None if packed.symmetric else (middle - packed.zeros.astype(np.float32)) * scales
    return Levels(levels, scales, zeros)


def packed_format(checkpoint: Checkpoint, operator: Operator, form: WeightFormat) -> WeightFormat:
    """The format that holds an operator's weight exactly; 16 bits for one that the checkpoint has not packed.

    Raises:
        QuantizationError: the checkpoint is not packed at all, or has other bits or blocks than were asked for.
    """
    quantization = checkpoint.quantization
    if quantization is None:
        raise QuantizationError(
            f"{checkpoint.folder} is no AWQ or GPTQ checkpoint, from which method 'checkpoint' takes levels; use mse"
        )
    packed = checkpoint.packed(f"{operator.name}.weight")
    if packed is None:
        return replace(form, bits=16, block=0)
    group = packed.group if packed.group < operator.inputs else 0
    if form.bits != packed.bits or form.block not in (0, group, packed.group):
        raise QuantizationError(
            f"{operator.name}: the checkpoint holds {packed.bits} bits in blocks of {packed.group}, {form.bits} in"
            f" blocks of {form.block} were asked for; set these to what there is, or choose another method"
        )
    zeros = _levels(packed).zeros
    with np.errstate(over="ignore"):
        exact = zeros is None or bool((zeros.astype(np.float16).astype(np.float32) == zeros).all())
    return replace(form, block=group, symmetric=zeros is None, scale_bits=16 if exact else 32)


def packed_levels(checkpoint: Checkpoint, operator: Operator) -> RoundRows:
    """Rounds by taking over what is there, which must be the float weight to the last bit."""
    whole = _levels(checkpoint.packed(f"{operator.name}.weight"))

    def take(first: int, rows: np.ndarray) -> Levels:
        span = slice(first, first + len(rows))
        zeros = None if whole.zeros is None else whole.zeros[span]
        taken = Levels(whole.levels[span], whole.scales[span], zeros)
        if not np.array_equal(taken.dequantize(), rows):
            raise QuantizationError(
                f"{operator.name}: the packed weight is not the float model's; make the onnx and mnn stages again from"
                " this checkpoint"
            )
        return taken

    return take
