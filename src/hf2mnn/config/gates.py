"""Gates of config.yaml: bounds of figures, built from the registry `hf2mnn.figures`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model

from hf2mnn.config.messages import Block
from hf2mnn.figures import HIGHER, UNITS, Figure, gated


def _field(figure: Figure, default: float | None) -> tuple[Any, Any]:
    unit = UNITS[figure.unit]
    kind = int if unit.integer else float
    bound = "Lower" if figure.better == HIGHER else "Upper"
    return kind | None, Field(
        None if default is None else kind(default),
        ge=unit.lowest,
        le=unit.highest,
        description=f"{bound} bound, {figure.unit}. {figure.meaning}",
    )


Gates = create_model(
    "Gates",
    __base__=Block,
    __doc__="Bounds that a variant must keep; a bound that is left out is not checked.",
    **{figure.name: _field(figure, None) for figure in gated()},
)
GeneralGates = create_model(
    "GeneralGates",
    __base__=Gates,
    __doc__="Bounds for every variant. They have defaults, since a broken bundle would pass without; null removes one.",
    **{figure.name: _field(figure, figure.gate.default) for figure in gated()},
)
ONNXRUNTIME_GATES = Gates(
    **{figure.name: figure.gate.onnxruntime for figure in gated() if figure.gate.onnxruntime is not None}
)
"""Default bounds for the ONNX graphs in ONNX Runtime."""
