"""Variants in config.yaml: formats of the weights, settings of the engine, and gates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, RootModel, create_model, model_validator

from hf2mnn.config.budget import parse_budget
from hf2mnn.config.messages import Block, Local, Name
from hf2mnn.figures import HIGHER, UNITS, Figure, gated

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16, 32]
BitsOrAuto = Literal[2, 3, 4, 5, 6, 7, 8, 16, 32, "auto"]
Method = Literal["rtn", "hqq", "mse", "awq", "gptq", "checkpoint"]


def _multiple_of_16(value: int) -> int:
    if value % 16:
        raise ValueError(f"block {value} is not a multiple of 16, which the engine requires; use 32, 64 or 128, or 0")
    return value


BlockSize = Annotated[int, Field(ge=0), AfterValidator(_multiple_of_16)]


def _gate(figure: Figure, default: float | None) -> tuple[Any, Any]:
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
    **{figure.name: _gate(figure, None) for figure in gated()},
)
GeneralGates = create_model(
    "GeneralGates",
    __base__=Gates,
    __doc__="Bounds for every variant. They have defaults, since a broken bundle would pass without; null removes one.",
    **{figure.name: _gate(figure, figure.gate.default) for figure in gated()},
)
ONNXRUNTIME_GATES = Gates(
    **{figure.name: figure.gate.onnxruntime for figure in gated() if figure.gate.onnxruntime is not None}
)
"""Default bounds for the ONNX graphs in ONNX Runtime."""


class Weights(Block):
    """Storage of the weights of linear layers."""

    bits: Bits = Field(description="Bits per weight: 32 and 16 are float, 2 to 8 integers with a scale per block.")
    block: BlockSize = Field(
        0, description="Input channels that share a scale, a multiple of 16 (group size); 0 for one per output channel."
    )
    symmetric: bool = Field(False, description="A scale without zero point: smaller and less exact.")
    scale_bits: Literal[16, 32] = Field(16, description="Float type of scales and zero points.")
    method: Method = Field(
        "mse",
        description="rtn rounds to nearest; hqq and mse search scales; awq and gptq use recorded activations;"
        " checkpoint keeps the quantized values of an AWQ or GPTQ checkpoint.",
    )

    @model_validator(mode="after")
    def _check_method(self) -> Weights:
        if self.method == "hqq" and self.symmetric:
            raise ValueError("hqq searches a zero point, and symmetric has no zero point; use mse")
        return self


class Engine(Block):
    """Settings of MNN's engine in the bundle's config.json; by default they follow from the decoder's bits."""

    precision: Literal["low", "normal", "high"] | None = Field(
        None, description="low computes in float16 where the CPU supports it."
    )
    memory: Literal["low", "high"] | None = Field(
        None, description="low keeps the weights quantized in memory and rounds activations to 8 bits."
    )
    threads: int = Field(4, ge=1, description="Threads of the bundle on the device.")


class Variant(Weights):
    """A bundle to make of each model."""

    bits: BitsOrAuto = Field(
        description="Bits per weight: 32 and 16 are float, 2 to 8 integers with a scale per block; auto chooses them"
        " for each operator of decoder and vision tower within the budget."
    )
    budget: float | str | None = Field(
        None, description="For bits: auto. Bits per weight with scales (4.25), or the bundle's size (850MB)."
    )
    plan: Local | None = Field(None, description="A plan.yaml: settings by operator, which override the variant's.")
    embedding: Literal["file", "lm_head"] = Field(
        "file",
        description="Where the engine reads the embedding: a bfloat16 file, or the quantized lm_head of a tied model.",
    )
    vision: Weights | None = Field(
        None, description="Weights of the vision tower; by default those of the decoder if they are float, else 8 bits."
    )
    engine: Engine = Field(Engine(), description="Settings of the engine.")
    required: bool = Field(False, description="Whether the run fails when this variant misses a gate.")
    gates: Gates = Field(Gates(), description="Bounds for this variant; each overrides the one in the top-level gates.")

    @model_validator(mode="after")
    def _check_budget(self) -> Variant:
        if self.auto != (self.budget is not None):
            raise ValueError("give bits: auto and a budget together, or neither")
        if self.auto:
            parse_budget(self.budget)
            for key in ("vision", "plan", "symmetric", "scale_bits", "block"):
                if key in self.model_fields_set:
                    raise ValueError(f"with bits: auto the formats of all operators are chosen: remove {key}")
            if self.method == "checkpoint":
                raise ValueError("bits: auto cannot keep the values of the checkpoint: use mse, awq or gptq")
        return self

    @property
    def auto(self) -> bool:
        """Whether the bits of each operator are chosen within a budget."""
        return self.bits == "auto"

    @property
    def floats(self) -> bool:
        """Whether the decoder's weights are float."""
        return not self.auto and self.bits >= 16


class OnnxRuntime(Block):
    """The ONNX graphs in ONNX Runtime, which the table shows beside the variants."""

    required: bool = Field(True, description="Whether the run fails when the ONNX graphs miss a gate.")
    gates: Gates = Field(ONNXRUNTIME_GATES, description="Bounds for the ONNX graphs.")


class ReportVariant(Block):
    """A variant, or `onnxruntime`, in the table of `hf2mnn report`."""

    name: Name
    required: bool
    gates: Gates


class ReportVariants(RootModel[list[ReportVariant]]):
    """The variants of the table in their order."""
