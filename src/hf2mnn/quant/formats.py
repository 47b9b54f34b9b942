"""Formats of weights, and their description in MNN's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf2mnn.mnn.graph import FLOAT16

LM_HEAD = "lm_head"
EMBEDDING = "embedding"
"""Name of the embedding among the operators of the sensitivity stage."""
MEASURED, CANDIDATES = "measured.csv", "candidates.csv"
"""Tables of the sensitivity stage."""
DENSE, SPARSE, INT8 = 1, 2, 4
"""`quanParameter.type` of quantized weights: see `hf2mnn.quant.blob`, or an int8 for each weight."""
FLOAT16_PARAMETERS = {"type": FLOAT16, "useInt32": False, "quantScale": 0.0, "scaleIn": 0.0, "scaleOut": 0.0}
FLOAT16_PARAMETERS |= {"aMaxOrBits": 0, "aMin": 0, "readType": 0, "has_scaleInt": False, "shapeInt32": False}
FLOAT16_PARAMETERS |= {"weightSize": 0, "scaleStorage": "FP32"}
"""`quanParameter` of a float16 weight."""


@dataclass(frozen=True)
class WeightFormat:
    """Storage of the weight of a linear layer."""

    bits: int = 32  # 32 and 16 for floats, 2 to 8 for integers with a scale per block
    block: int = 0  # inputs that share a scale, which others call group size; 0 for one scale per output channel
    symmetric: bool = False  # whether there are no zero points
    scale_bits: int = 16  # 16 or 32, size of the scales and zero points, which are floats
    method: str = "rtn"  # "rtn", "hqq", "mse", "awq", "gptq" or "checkpoint"

    def blocks(self, inputs: int) -> int:
        """Return the number of blocks in a row of `inputs` weights."""
        return inputs // self.block if self.block else 1

    def parameters(self, outputs: int, inputs: int, wide: bool) -> dict[str, Any]:
        """Return `quanParameter` of a weight [outputs, inputs] of at most 16 bits; `wide` means int32 dimensions."""
        parameters = dict(FLOAT16_PARAMETERS)
        if self.bits < 16:
            scales = "FP16" if self.scale_bits == 16 else "FP32"
            parameters |= {"type": DENSE, "quantScale": 1.0, "shapeInt32": wide, "scaleStorage": scales}
            parameters["aMaxOrBits"] = self.bits
            if not self.symmetric:
                # aMin 1: the stored zero point is the weight at q = 0. It is smaller than the weight at the lowest q,
                # so its float16 is closer, and the engine reads embeddings from no other form.
                parameters |= {"aMin": 1, "readType": outputs * self.blocks(inputs)}
        return parameters
