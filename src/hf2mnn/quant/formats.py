"""Formats of weights, and names that several modules share."""

from __future__ import annotations

from dataclasses import dataclass

LM_HEAD = "lm_head"
EMBEDDING = "embedding"
"""Name of the embedding among the operators of the sensitivity stage."""
MEASURED, CANDIDATES = "measured.csv", "candidates.csv"
"""Tables of the sensitivity stage."""


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
