"""Config: the top-level keys of config.yaml, and the settings of models and variants that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from hf2mnn.config.budget import parse_budget
from hf2mnn.config.messages import Block, Name
from hf2mnn.config.models import Instance, Model, Toolchain
from hf2mnn.config.plan import Plan, load_plan
from hf2mnn.config.variants import Engine, GeneralGates, OnnxRuntime, Variant, Weights
from hf2mnn.core.errors import suggest

RESERVED = ("pytorch", "onnxruntime", "float", "base")  # names in the table, and of folders, that are not variants


class Benchmark(Block):
    """Timing of a model's bundles."""

    repeats: int = Field(5, ge=1, description="Processes for each bundle, in interleaved runs.")
    prompt_tokens: int = Field(512, ge=1, description="Length of the prompt in tokens.")
    answer_tokens: int = Field(64, ge=1, description="Length of the answer in tokens.")
    image_side: int = Field(224, ge=1, description="Width and height of the image in pixels.")
    threads: int | None = Field(None, ge=1, description="Threads of the engine; by default all cores of the run.")


class Calibration(Block):
    """Recordings and measurements on a model's calibration set."""

    rows: int = Field(4096, ge=1, description="Tokens or patches to keep of the inputs of each layer.")
    examples: int = Field(32, ge=1, description="Examples to measure the sensitivity of an operator with.")
    bits: Annotated[list[Literal[2, 3, 4, 5, 6, 7, 8]], Field(min_length=1)] = Field(
        [2, 3, 4], description="Bits to measure with; other formats are estimated from their weight errors."
    )


class Config(Block):
    """Models to convert, variants to make of them, and the gates that these must pass."""

    models: dict[Name, Model] = Field(min_length=1, description="Checkpoints by name, which their results have too.")
    variants: dict[Name, Variant] = Field(min_length=1, description="Bundles to make, by name.")
    gates: GeneralGates = Field(GeneralGates(), description="Bounds for every variant.")
    onnxruntime: OnnxRuntime = Field(OnnxRuntime(), description="The ONNX graphs in ONNX Runtime.")
    benchmark: Benchmark = Field(Benchmark(), description="Timing of the bundles.")
    calibration: Calibration = Field(Calibration(), description="For awq, gptq and bits: auto.")
    toolchains: dict[Name, Toolchain] = Field(
        {}, description="Other releases of the tools, by name, to compare with the pinned ones."
    )
    threads: int = Field(2, ge=1, description="Threads of a job that computes; Snakemake lowers it to --cores.")
    time_limit: int = Field(7200, ge=1, description="Seconds after which an evaluation in the engine is stopped.")

    @model_validator(mode="after")
    def _check_names(self) -> Config:
        for name in self.variants:
            if name in RESERVED:
                raise ValueError(f"variants.{name}: this name is reserved; use another")
        for model, described in self.models.items():
            key = f"models.{model}"
            if described.source is None and described.revisions is None:
                raise ValueError(f"{key}.source: this key is missing")
            for revision in described.revisions or []:
                try:
                    described.source_of(revision)
                except ValidationError as error:
                    problem = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"{key}.revisions.{revision}: {problem}") from None
            for name in described.toolchains or []:
                if name not in self.toolchains:
                    hint = suggest(name, list(self.toolchains)) or "; there are none"
                    raise ValueError(f"{key}.toolchains: there is no toolchain {name}{hint}")
            for name in described.variants or []:
                if described.variants.count(name) > 1:
                    raise ValueError(f"{key}.variants: {name} is listed twice")
                if name not in self.variants:
                    raise ValueError(f"{key}.variants: there is no variant {name}{suggest(name, list(self.variants))}")
        return self

    def expanded(self) -> Config:
        """Return the configuration with an instance for each revision and toolchain of a model.

        They are named MODEL@REVISION+TOOLCHAIN, without the parts that a model does not have. A revision is compared
        with the one before it, and a toolchain with the pinned tools.
        """
        instances: dict[str, Instance] = {}
        for model, described in self.models.items():
            before, toolchains = None, list(self.toolchains) if described.toolchains is None else described.toolchains
            for revision in described.revisions or [None]:
                name = f"{model}@{revision}" if revision else model
                common = dict(described) | {"source": described.source_of(revision)}
                instances[name] = Instance.model_construct(**common, before=before)
                for tools in toolchains:
                    instances[f"{name}+{tools}"] = Instance.model_construct(**common, toolchain=tools, before=name)
                before = name
        return self.model_copy(update={"models": instances})

    def toolchain_of(self, model: str) -> Toolchain:
        """Return the toolchain of an instance; an empty one for the pinned tools."""
        return self.toolchains.get(self.models[model].toolchain, Toolchain())

    def variants_of(self, model: str) -> list[str]:
        """Return the names of the variants to make of a model."""
        return self.models[model].variants or list(self.variants)

    def baseline(self, model: str) -> str:
        """Return the variant that speeds are compared with: the first of 16 bits, or the first."""
        variants = self.variants_of(model)
        return next((name for name in variants if self.variants[name].bits == 16), variants[0])

    def decoder_weights(self, variant: str) -> Weights:
        """Return the format of the decoder; for bits: auto a default that the plan overrides for every operator."""
        chosen = self.variants[variant]
        if chosen.auto:
            return Weights(bits=8, method=chosen.method)
        return Weights(**chosen.model_dump(include=set(Weights.model_fields)))

    def vision_weights(self, variant: str) -> Weights:
        """Return the format of the vision tower.

        The default is the decoder's if that is float, else 8 bits with a scale per channel, by the decoder's method if
        that is possible.
        """
        chosen = self.variants[variant]
        if chosen.vision:
            return chosen.vision
        if chosen.auto:
            return self.decoder_weights(variant)
        method = "mse" if chosen.method == "checkpoint" else chosen.method
        return Weights(bits=chosen.bits if chosen.floats else 8, method=method)

    def bits_of(self, variant: str) -> float:
        """Return the approximate bits per weight of a variant, scales included, for its size on disk."""
        chosen = self.variants[variant]
        if chosen.auto:
            return parse_budget(chosen.budget).bits_per_weight or 8.0
        return chosen.bits + (32 / chosen.block if chosen.bits < 16 and chosen.block else 0)

    def methods(self, variant: str) -> set[str]:
        """Return the methods that may quantize some operator of a variant; ConfigError: its plan cannot be read."""
        path = self.variants[variant].plan
        plan = load_plan(Path(path)) if path else Plan()
        planned = {weights.method for part in (plan.decoder, plan.vision) for weights in part.values()} - {None}
        return planned | {weights.method for weights in (self.decoder_weights(variant), self.vision_weights(variant))}

    def calibrated(self, variant: str) -> bool:
        """Return whether a variant needs recorded activations."""
        return bool(self.methods(variant) & {"awq", "gptq"})

    def engine(self, variant: str) -> Engine:
        """Return the engine's settings: float32 computation for float weights, those of a phone for quantized ones."""
        chosen = self.variants[variant]
        setting = "high" if chosen.floats else "low"
        engine = chosen.engine
        return Engine(precision=engine.precision or setting, memory=engine.memory or setting, threads=engine.threads)

    def gates_of(self, name: str) -> dict[str, float]:
        """Return the bounds of a variant: the general ones, overridden by its own; `onnxruntime` has its own only."""
        if name == "onnxruntime":
            return self.onnxruntime.gates.model_dump(exclude_none=True)
        # An explicit null of the variant removes a general bound.
        bounds = self.gates.model_dump() | self.variants[name].gates.model_dump(exclude_unset=True)
        return {figure: bound for figure, bound in bounds.items() if bound is not None}

    def required(self, name: str) -> bool:
        """Return whether the run fails when a variant, or `onnxruntime`, misses a gate."""
        return self.onnxruntime.required if name == "onnxruntime" else self.variants[name].required
