"""Quantized values of an AWQ or GPTQ checkpoint in MNN's format, with bit-identical weights.

A weight of the checkpoint is (q - zero_point) * s with integers from 0; one of MNN is q * s + z with integers around 0.
So z = (2^(bits-1) - zero_point) * s: a float16 times an integer below 2^8, which float32 always holds. float16 holds it
if every zero point is 2^(bits-1), when z is not stored at all, or if the product has few enough digits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.prequantized import PrequantizedLinear
from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.blob import Quantized
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.rounding import Method, RoundRows
from hf2mnn.quant.weights import Operator


def _to_mnn(layer: PrequantizedLinear, rows: slice = slice(None)) -> Quantized:
    middle = 1 << layer.bits - 1
    q = (layer.q[rows].astype(np.int16) - middle).astype(np.int8)
    scales = layer.scales[rows].astype(np.float32)
    zero_points = None if layer.symmetric else (middle - layer.zero_points[rows].astype(np.float32)) * scales
    return Quantized(q, scales, zero_points)


class Prequantized(Method):
    """The method "checkpoint": quantized values of an AWQ or GPTQ checkpoint."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.checkpoint = checkpoint

    def resolve(self, operator: Operator, form: WeightFormat) -> WeightFormat:
        """Return the format that holds the weight exactly; float16 for one that the checkpoint does not quantize.

        Raise QuantizationError if `form` or the checkpoint does not fit, CheckpointError if a layer has no exact form.
        """
        if self.checkpoint is None:
            raise QuantizationError(
                f"{operator.name}: method checkpoint takes quantized values from the checkpoint; give its folder by"
                " --checkpoint"
            )
        if self.checkpoint.quantization is None:
            raise QuantizationError(
                f"{self.checkpoint.folder} is not an AWQ or GPTQ checkpoint, which method checkpoint needs; use"
                " method: mse"
            )
        layer = self.checkpoint.prequantized(f"{operator.name}.weight")
        if layer is None:
            return replace(form, bits=16, block=0)
        group = layer.group if layer.group < operator.inputs else 0
        if form.bits != layer.bits or form.block not in (0, group, layer.group):
            raise QuantizationError(
                f"{operator.name}: the checkpoint has {layer.bits} bits in blocks of {layer.group}, but the format has"
                f" {form.bits} bits in blocks of {form.block}; set these to the checkpoint's, or use another method"
            )
        zero_points = _to_mnn(layer).zero_points
        with np.errstate(over="ignore"):
            exact = zero_points is None or (zero_points.astype(np.float16) == zero_points).all()
        return replace(form, block=group, symmetric=zero_points is None, scale_bits=16 if exact else 32)

    def prepare(self, operator: Operator, form: WeightFormat) -> RoundRows:
        """Return the function that takes rows of an operator from the checkpoint, with the float model's values."""
        layer = self.checkpoint.prequantized(f"{operator.name}.weight")

        def take(first: int, rows: np.ndarray) -> Quantized:
            quantized = _to_mnn(layer, slice(first, first + len(rows)))
            if not np.array_equal(quantized.dequantize(), rows):
                raise QuantizationError(
                    f"{operator.name}: the quantized weight of the checkpoint is not that of the float model; run"
                    " 'hf2mnn export' and 'hf2mnn convert' again with this checkpoint"
                )
            return quantized

        return take
