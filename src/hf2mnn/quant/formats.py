"""Which format each operator of a model gets: one for all of a part, and a plan's over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.quant.blob import size
from hf2mnn.quant.weights import Operator


def check_format(operator: Operator, form: WeightFormat) -> WeightFormat:
    """The format as an operator can have it: one scale a channel where it is a convolution, as MNN has no blocks there.

    Raises:
        QuantizationError: the block does not divide the inputs; hqq without zero points.
    """
    if form.bits >= 16:
        return form
    if form.method == "hqq" and form.symmetric:
        raise QuantizationError(f"{operator.name}: hqq searches a zero point, and symmetric has none; use mse")
    if operator.kernel > 1 or form.block == operator.inputs:
        return replace(form, block=0)
    if form.block and operator.inputs % form.block:
        fitting = [str(block) for block in (128, 64, 32, 16) if operator.inputs % block == 0]
        raise QuantizationError(
            f"{operator.name}: block {form.block} does not divide its {operator.inputs} inputs; use"
            f" {', '.join(fitting) + ' or ' if fitting else ''}0 (one scale a channel)"
        )
    return form


def choose_formats(
    operators: Iterable[Operator], base: WeightFormat, overrides: dict[str, dict[str, Any]], part: str
) -> dict[str, WeightFormat]:
    """The format of every operator by name; `overrides` holds a plan's settings by operator.

    Raises:
        QuantizationError: the plan names an operator that is not there; a block does not divide an operator's inputs.
    """
    known = {operator.name: operator for operator in operators}
    strangers = sorted(set(overrides) - set(known))
    if strangers:
        raise QuantizationError(
            f"the plan names {strangers[0]}, which the {part} does not have; it has {', '.join(list(known)[:3])}, ..."
        )
    chosen = {name: replace(base, **overrides.get(name, {})) for name in known}
    return {name: check_format(operator, chosen[name]) for name, operator in known.items()}


def stored_size(operator: Operator, form: WeightFormat) -> int:
    """Bytes of an operator's weight with its scales in the weight file."""
    return size(operator.outputs, operator.inputs, form.bits, form.block, form.symmetric, form.scale_bits)
