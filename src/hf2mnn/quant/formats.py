"""Formats of weights, and the choice of a format for each operator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf2mnn.core.errors import QuantizationError

if TYPE_CHECKING:
    from hf2mnn.quant.weights import Operator

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


def check_format(operator: Operator, form: WeightFormat) -> WeightFormat:
    """Return the format in which MNN stores an operator: one scale per channel for a convolution, which has no blocks.

    Raise QuantizationError if the block does not divide the inputs, or if the method is hqq without zero points.
    """
    if form.bits >= 16:
        return form
    if form.method == "hqq" and form.symmetric:
        raise QuantizationError(
            f"{operator.name}: hqq searches a zero point, and a symmetric format has none; use method: mse"
        )
    if operator.kernel > 1 or form.block == operator.inputs:
        return replace(form, block=0)
    if form.block and operator.inputs % form.block:
        fitting = [str(block) for block in (128, 64, 32, 16) if operator.inputs % block == 0]
        raise QuantizationError(
            f"{operator.name}: block {form.block} does not divide its {operator.inputs} inputs; use"
            f" {', '.join(fitting) + ' or ' if fitting else ''}0 (one scale per channel)"
        )
    return form


def choose_formats(
    operators: Iterable[Operator], base: WeightFormat, overrides: dict[str, dict[str, Any]], part: str
) -> dict[str, WeightFormat]:
    """Return the format of every operator of a part: `base`, with a plan's `overrides` by operator.

    Raise QuantizationError if the plan has an unknown operator, or if an operator cannot have its format.
    """
    known = {operator.name: operator for operator in operators}
    if unknown := sorted(set(overrides) - set(known)):
        raise QuantizationError(
            f"{unknown[0]}: the plan names this operator, but the {part} does not have it; it has"
            f" {', '.join(list(known)[:3])}, ..."
        )
    return {name: check_format(known[name], replace(base, **overrides.get(name, {}))) for name in known}
