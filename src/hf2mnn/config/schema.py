"""config.yaml as data: what may stand in it, what it means, and what is refused before any job starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    ValidationError,
    model_validator,
)

from hf2mnn.config.budget import parse_budget
from hf2mnn.core.errors import ConfigError
from hf2mnn.core.untrusted import check_shape, read_bytes, read_json
from hf2mnn.families import FAMILIES

MOST_YAML, MOST_SETTINGS = 1 << 22, 1 << 16
"""Bytes, and lists and mappings, of a configuration or a plan."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
RESERVED = ("pytorch", "onnxruntime", "float", "base")
"""Names of rows of the table and of folders that are not variants."""


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a name: use letters, digits, '.', '_' and '-', a letter or digit first")
    return value


def _block(value: int) -> int:
    if value % 16:
        raise ValueError(f"block {value} is not a multiple of 16, which the engine needs; use 32, 64 or 128, or 0")
    return value


def _release(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError("this is a number, of which YAML drops zeros at the end: put the release in quotes")
    if not isinstance(value, str) or not RELEASE.fullmatch(value):
        raise ValueError(f"{value!r} is not one release: give it whole, like '3.5.0'")
    return value


Name = Annotated[str, AfterValidator(_name)]
Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16, 32]
BitsOrAuto = Literal[2, 3, 4, 5, 6, 7, 8, 16, 32, "auto"]
Method = Literal["rtn", "hqq", "mse", "awq", "gptq", "checkpoint"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Strict):
    """How the weights of the linear layers are stored."""

    bits: Bits = Field(description="Bits a weight: 32 and 16 are float, 2 to 8 integers with a scale a block.")
    block: Annotated[int, Field(ge=0), AfterValidator(_block)] = Field(
        0, description="Input channels that share a scale, a multiple of 16; 0 for one scale an output channel."
    )
    symmetric: bool = Field(False, description="A scale only, no zero point: smaller and less exact.")
    scale_bits: Literal[16, 32] = Field(16, description="Float type of scales and zero points.")
    method: Method = Field(
        "mse",
        description="rtn rounds to nearest; hqq and mse search scales; awq and gptq go by recorded activations;"
        " checkpoint takes over what an AWQ or GPTQ checkpoint holds.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Weights:
        if self.method == "hqq" and self.symmetric:
            raise ValueError("hqq searches a zero point, and symmetric has none; use mse")
        return self


class PlannedWeights(_Strict):
    """Settings of one operator in a plan; what is left out is the variant's."""

    bits: Bits | None = None
    block: Annotated[int, Field(ge=0), AfterValidator(_block)] | None = None
    symmetric: bool | None = None
    scale_bits: Literal[16, 32] | None = None
    method: Method | None = None


class Plan(_Strict):
    """plan.yaml: settings by operator (its module's name in transformers) of decoder and vision tower."""

    decoder: dict[str, PlannedWeights] = Field({}, description="Operators of the decoder, lm_head among them.")
    vision: dict[str, PlannedWeights] = Field({}, description="Operators of the vision tower.")


class Engine(_Strict):
    """Settings that the bundle's config.json gives MNN's engine. Left out, they follow from the decoder's bits."""

    precision: Literal["low", "normal", "high"] | None = Field(
        None, description="low computes in half floats where the CPU can."
    )
    memory: Literal["low", "high"] | None = Field(
        None, description="low keeps weights packed and rounds activations to 8 bits."
    )
    threads: int = Field(4, ge=1, description="Threads of the bundle on the device.")


class Gates(_Strict):
    """Bounds that a row of the table must keep; a bound left out is not checked."""

    top1_agreement: float | None = Field(
        None, ge=0, le=1, description="At least this share of positions choose PyTorch's token."
    )
    mean_kld: float | None = Field(None, ge=0, description="At most this mean KL divergence from PyTorch, in nats.")
    greedy_match: float | None = Field(
        None, ge=0, le=1, description="At least this share of answers equal PyTorch's token for token."
    )
    answers_lost: int | None = Field(None, ge=0, description="At most this many right answers fewer than PyTorch has.")
    accuracy_lost: float | None = Field(
        None, ge=0, le=1, description="At most this much task accuracy below PyTorch's."
    )
    vision_cosine: float | None = Field(None, ge=-1, le=1, description="At least this mean cosine of image embeddings.")
    cache_parity: float | None = Field(
        None, ge=0, description="At most this KL divergence, in nats, between two ways of filling the KV cache."
    )
    tokenizer_match: float | None = Field(
        None, ge=0, le=1, description="At least this share of prompts becomes the same tokens as in transformers."
    )
    template_match: float | None = Field(
        None, ge=0, le=1, description="At least this share of conversations becomes the checkpoint's own prompt."
    )
    findings: int | None = Field(None, ge=0, description="At most this many named causes of error in the diagnosis.")


class GeneralGates(Gates):
    """Bounds for every variant. Without any of them a bundle that talks nonsense would pass, so they have defaults;
    null takes one away.
    """

    top1_agreement: float | None = Field(0.95, ge=0, le=1, description=Gates.model_fields["top1_agreement"].description)
    mean_kld: float | None = Field(0.1, ge=0, description=Gates.model_fields["mean_kld"].description)
    accuracy_lost: float | None = Field(0.05, ge=0, le=1, description=Gates.model_fields["accuracy_lost"].description)
    vision_cosine: float | None = Field(0.99, ge=-1, le=1, description=Gates.model_fields["vision_cosine"].description)
    cache_parity: float | None = Field(0.05, ge=0, description=Gates.model_fields["cache_parity"].description)
    tokenizer_match: float | None = Field(
        1.0, ge=0, le=1, description=Gates.model_fields["tokenizer_match"].description
    )
    template_match: float | None = Field(1.0, ge=0, le=1, description=Gates.model_fields["template_match"].description)
    findings: int | None = Field(0, ge=0, description=Gates.model_fields["findings"].description)


class Variant(Weights):
    """A bundle to make of each model."""

    bits: BitsOrAuto = Field(
        description="Bits a weight: 32 and 16 are float, 2 to 8 integers with a scale a block; auto chooses for each"
        " operator of decoder and vision tower within the budget."
    )
    budget: float | str | None = Field(
        None, description="For bits: auto. Bits a weight with scales (4.25), or the bundle's size (850MB)."
    )
    plan: str | None = Field(None, description="A plan.yaml: settings by operator, over the variant's own.")
    embedding: Literal["file", "lm_head"] = Field(
        "file",
        description="Where the engine reads the embedding: a bfloat16 file, or the quantized lm_head of a tied model.",
    )
    vision: Weights | None = Field(
        None,
        description="The vision tower's weights; left out, the decoder's where it is float, else 8 bits a channel.",
    )
    engine: Engine = Field(Engine(), description="Run-time settings.")
    required: bool = Field(False, description="Whether the run fails where this variant misses a gate.")
    gates: Gates = Field(
        Gates(), description="Bounds for this variant; each overrides the one under the top-level gates."
    )

    @model_validator(mode="after")
    def _planned(self) -> Variant:
        if self.auto != (self.budget is not None):
            raise ValueError("bits: auto and budget go together: one says to choose, the other within what")
        if self.auto:
            parse_budget(self.budget)
            for key in ("vision", "plan", "symmetric", "scale_bits", "block"):
                if key in self.model_fields_set:
                    raise ValueError(f"with bits: auto the formats are chosen for all operators: take {key} out")
            if self.method == "checkpoint":
                raise ValueError("with bits: auto weights are quantized here: use mse, awq or gptq")
        return self

    @property
    def auto(self) -> bool:
        return self.bits == "auto"

    @property
    def floats(self) -> bool:
        """Whether the decoder's weights are float."""
        return not self.auto and self.bits >= 16


class Row(_Strict):
    """A row of the table that is not a variant."""

    required: bool = Field(True, description="Whether the run fails where this row misses a gate.")
    gates: Gates = Field(
        Gates(
            top1_agreement=0.999,
            mean_kld=1e-6,
            greedy_match=0.99,
            answers_lost=1,
            vision_cosine=0.9999,
            cache_parity=1e-6,
        ),
        description="Bounds for this row.",
    )


class TableRow(_Strict):
    """A row that `hf2mnn report` is to make."""

    name: Name
    required: bool
    gates: Gates


class TableRows(RootModel[list[TableRow]]):
    """The rows in their order."""


class AdapterRepository(_Strict):
    """A LoRA adapter on a hub."""

    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="The hub that has the repository.")
    repository: str = Field(description="owner/name on the hub.")
    revision: str | None = Field(
        None, description="Commit (best), tag or branch of the repository; left out, main, or master of modelscope."
    )


def _adapter_kind(value: Any) -> str:
    return "[repository]" if isinstance(value, dict | AdapterRepository) else "[folder]"


class PartialSource(_Strict):
    """Keys of a source: what one revision has otherwise than the others."""

    path: str | None = Field(None, description="Folder with config.json, relative to where Snakemake runs.")
    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="The hub that has the repository.")
    repository: str | None = Field(None, description="owner/name on the hub.")
    revision: str | None = Field(
        None, description="Commit (best), tag or branch of the repository; left out, main, or master of modelscope."
    )
    pin: str | None = Field(
        None, description="File that 'hf2mnn pin' has written: hub, repository, commit, and what its files must be."
    )
    files: str | None = Field(
        None, description="Folder with files put in place by hand: those that match are taken, not downloaded."
    )
    adapter: (
        Annotated[
            Annotated[str, Tag("[folder]")] | Annotated[AdapterRepository, Tag("[repository]")],
            Discriminator(_adapter_kind),
        ]
        | None
    ) = Field(
        None, description="LoRA adapter (PEFT) to merge into the checkpoint: a folder here, or a repository of a hub."
    )


class Source(PartialSource):
    """Where a checkpoint comes from: a folder here, a repository of a hub, or a pin of one."""

    @model_validator(mode="after")
    def _one(self) -> Source:
        if [self.path, self.repository, self.pin].count(None) != 2:
            raise ValueError(
                "give either path (a local folder) or repository (owner/name on the hub) or pin (a file), one of them"
            )
        for key in self.model_fields_set - {"path", "pin", "repository", "adapter"}:
            if self.path is not None or (self.pin is not None and key != "files"):
                raise ValueError(f"{key} goes with repository{' or pin' if key == 'files' else ''}: take it out")
        return self


class LabelledSet(_Strict):
    """Questions of a labelled data set, drawn into an evaluation set."""

    dataset: Literal["textvqa", "docvqa", "chartqa", "ai2d", "mmbench", "mmmu"] = Field(description="Which data set.")
    samples: int = Field(100, ge=1, description="Questions to draw.")
    path: str | None = Field(None, description="Folder with a local copy; left out, the hub's is downloaded.")
    revision: str = Field("main", description="Commit (best), tag or branch of the data set on the hub.")
    seed: int = Field(0, description="Which questions are drawn.")


def _evaluation_kind(value: Any) -> str:
    return "[labelled]" if isinstance(value, dict | LabelledSet) else "[folder]"


class Model(_Strict):
    """A checkpoint to convert."""

    source: Source | None = Field(
        None, description="Where the checkpoint comes from; with revisions, what they have in common."
    )
    revisions: Annotated[dict[Name, PartialSource], Field(min_length=1)] | None = Field(
        None,
        description="Several checkpoints of the model, the oldest first, by the name each will have: the keys of source"
        " that are its own.",
    )
    evaluation: Annotated[
        Annotated[str, Tag("[folder]")] | Annotated[LabelledSet, Tag("[labelled]")], Discriminator(_evaluation_kind)
    ] = Field(
        "evaluation/general",
        description="Folder with examples.jsonl and its images, or a labelled data set to draw one from.",
    )
    calibration: str = Field(
        "evaluation/calibration",
        description="Folder like that of evaluation, with other examples: for awq, gptq and bits: auto.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest greedy answer in the evaluation.")
    variants: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="Variants to make of this model; left out, all."
    )
    toolchains: list[Name] | None = Field(
        None, description="Toolchains to try with this model beside the pinned one; left out, all."
    )

    def source_of(self, revision: str | None) -> Source:
        """Raises pydantic's ValidationError where the keys of both places are no source together."""
        own = self.revisions[revision] if revision else PartialSource()
        shared = self.source or PartialSource()
        return Source(**shared.model_dump(exclude_unset=True) | own.model_dump(exclude_unset=True))


class Toolchain(_Strict):
    """Other releases of the tools, in an environment of their own."""

    pins: dict[Name, Annotated[str, BeforeValidator(_release)]] = Field(
        {}, description="Release by package, in place of that of requirements.txt."
    )
    others: Literal["pinned", "newest"] = Field(
        "pinned",
        description="All other packages: pinned, as in requirements.txt, or the newest that pip finds and that fit.",
    )

    def release(self, package: str) -> str | None:
        """Which release of a package is asked for; None for that of requirements.txt."""
        pins = {canonical(name): release for name, release in self.pins.items()}
        return pins.get(canonical(package), None if self.others == "pinned" else self.others)


class Instance(Model):
    """One of a model's versions in a run: a revision, made by a toolchain (None: the pinned one). Its results are
    compared with those of the instance `before`.
    """

    source: Source
    toolchain: str | None = None
    before: str | None = None


def canonical(package: str) -> str:
    """A package's name as an index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


class Speed(_Strict):
    """How the bundles of a model are timed against each other."""

    repeats: int = Field(5, ge=1, description="Processes to time each bundle with, in turns.")
    prompt_tokens: int = Field(512, ge=1, description="Length of the prompt.")
    answer_tokens: int = Field(64, ge=1, description="Length of the answer.")
    image_side: int = Field(224, ge=1, description="Sides of the image in pixels.")
    threads: int | None = Field(None, ge=1, description="Threads of the engine; left out, all cores of the run.")


class Calibration(_Strict):
    """What is recorded and measured on a model's calibration set."""

    rows: int = Field(4096, ge=1, description="Tokens or patches of which a layer's inputs are kept.")
    examples: int = Field(32, ge=1, description="Examples by which the sensitivity of an operator is measured.")
    bits: Annotated[list[Literal[2, 3, 4, 5, 6, 7, 8]], Field(min_length=1)] = Field(
        [2, 3, 4], description="Bits with which it is measured; other formats are judged by their weight errors."
    )


class Config(_Strict):
    """hf2mnn: which models become which bundles, and what those must keep."""

    models: dict[Name, Model] = Field(min_length=1, description="Checkpoints by the name their results will have.")
    variants: dict[Name, Variant] = Field(min_length=1, description="Bundles to make, by the name they will have.")
    gates: GeneralGates = Field(GeneralGates(), description="Bounds for every variant.")
    onnxruntime: Row = Field(Row(), description="The ONNX graphs in ONNX Runtime, a row of the table as well.")
    speed: Speed = Field(Speed(), description="How bundles are timed against each other.")
    calibration: Calibration = Field(Calibration(), description="For awq, gptq and bits: auto.")
    toolchains: dict[Name, Toolchain] = Field(
        {}, description="Other releases of the tools, by the name each will have, to compare with the pinned ones."
    )
    threads: int = Field(2, ge=1, description="Threads of a job that computes; Snakemake lowers it to --cores.")
    time_limit: int = Field(7200, ge=1, description="Seconds after which an evaluation in the engine is stopped.")

    @model_validator(mode="after")
    def _known(self) -> Config:
        for name in self.variants:
            if name in RESERVED:
                raise ValueError(f"variants.{name}: this name is taken by a row of the table; choose another")
        for model, described in self.models.items():
            self._check_sources(model, described)
            for name in described.toolchains or []:
                if name not in self.toolchains:
                    raise ValueError(
                        f"models.{model}.toolchains: there is no toolchain {name}; there are"
                        f" {', '.join(self.toolchains) or 'none'}"
                    )
            for name in described.variants or []:
                if described.variants.count(name) > 1:
                    raise ValueError(f"models.{model}.variants: {name} is named twice")
                if name not in self.variants:
                    raise ValueError(
                        f"models.{model}.variants: there is no variant {name}; there are {', '.join(self.variants)}"
                    )
        return self

    @staticmethod
    def _check_sources(model: str, described: Model) -> None:
        if described.source is None and described.revisions is None:
            raise ValueError(f"models.{model}.source: this key is missing")
        for revision in described.revisions or []:
            try:
                described.source_of(revision)
            except ValidationError as error:
                what = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"models.{model}.revisions.{revision}: {what}") from None

    def expanded(self) -> Config:
        """The same with an instance for each revision of a model and each toolchain, by its name:
        MODEL@REVISION+TOOLCHAIN, without what there is only one of.

        A revision is compared with the one before it, and what another toolchain makes with what the pinned one makes.
        """
        instances = {}
        for model, described in self.models.items():
            chosen = self.toolchains if described.toolchains is None else dict.fromkeys(described.toolchains)
            before = None
            for revision in described.revisions or [None]:
                name = f"{model}@{revision}" if revision else model
                shared = dict(described) | {"source": described.source_of(revision)}
                instances[name] = Instance.model_construct(**shared, before=before)
                for toolchain in chosen:
                    instances[f"{name}+{toolchain}"] = Instance.model_construct(
                        **shared, toolchain=toolchain, before=name
                    )
                before = name
        return self.model_copy(update={"models": instances})

    def toolchain_of(self, model: str) -> Toolchain:
        """The releases that an instance asks for; none where it has the pinned ones."""
        return self.toolchains.get(self.models[model].toolchain, Toolchain())

    def variants_of(self, model: str) -> list[str]:
        return self.models[model].variants or list(self.variants)

    def baseline(self, model: str) -> str:
        """The variant with which the others' speed is compared: the first of 16 bits, or the first."""
        variants = self.variants_of(model)
        return next((name for name in variants if self.variants[name].bits == 16), variants[0])

    def decoder_weights(self, variant: str) -> Weights:
        chosen = self.variants[variant]
        if chosen.auto:
            return Weights(bits=8, method=chosen.method)  # the plan has every operator's bits
        return Weights(**chosen.model_dump(include=set(Weights.model_fields)))

    def vision_weights(self, variant: str) -> Weights:
        """Left out: as float as the decoder, else 8 bits a channel, by the decoder's method where that can be."""
        chosen = self.variants[variant]
        if chosen.vision:
            return chosen.vision
        if chosen.auto:
            return self.decoder_weights(variant)
        method = "mse" if chosen.method == "checkpoint" else chosen.method
        return Weights(bits=chosen.bits if chosen.floats else 8, method=method)

    def bits_of(self, variant: str) -> float:
        """About how many bits a weight of a variant takes, scales included; for its disk."""
        chosen = self.variants[variant]
        if chosen.auto:
            return parse_budget(chosen.budget).bits_per_weight or 8.0
        return chosen.bits + (32 / chosen.block if chosen.bits < 16 and chosen.block else 0)

    def plan_of(self, variant: str) -> Plan:
        """The plan that a variant pins; an empty one where it pins none. Raises ConfigError as `load_plan` does."""
        pinned = self.variants[variant].plan
        return load_plan(Path(pinned)) if pinned else Plan()

    def methods(self, variant: str) -> set[str]:
        """Every method by which some operator of a variant may be quantized."""
        plan = self.plan_of(variant)
        planned = {weights.method for part in (plan.decoder, plan.vision) for weights in part.values()} - {None}
        return planned | {weights.method for weights in (self.decoder_weights(variant), self.vision_weights(variant))}

    def calibrated(self, variant: str) -> bool:
        """Whether a variant needs recorded activations."""
        return bool(self.methods(variant) & {"awq", "gptq"})

    def engine(self, variant: str) -> Engine:
        """Float weights: computed in float32, as exact as the engine can. Packed weights: computed as on a phone."""
        chosen = self.variants[variant]
        setting = "high" if chosen.floats else "low"
        engine = chosen.engine
        return Engine(precision=engine.precision or setting, memory=engine.memory or setting, threads=engine.threads)

    def row_gates(self, row: str) -> dict[str, float]:
        """Bounds of a row of the table: its own over the general ones."""
        if row == "onnxruntime":
            return self.onnxruntime.gates.model_dump(exclude_none=True)
        own = self.variants[row].gates.model_dump(exclude_none=True)
        return {**self.gates.model_dump(exclude_none=True), **own}

    def required(self, row: str) -> bool:
        return self.onnxruntime.required if row == "onnxruntime" else self.variants[row].required


TAGS = ("[key]", "[folder]", "[labelled]", "[repository]")
"""Parts of a place in pydantic's words that no person has written."""


def _sentence(error: ValidationError) -> str:
    """The first error as one sentence with the path of its key."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in TAGS)
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "there is no such key; see docs/configuration.md for those there are"
    elif first["type"] == "missing":
        what = "this key is missing"
    elif first["type"] == "literal_error":
        what = f"{first['input']!r} is not one of {first['ctx']['expected']}"
    elif (
        "input" in first and isinstance(first["input"], str | int | float) and not what.startswith(repr(first["input"]))
    ):
        what = f"{what[0].lower()}{what[1:]}, not {first['input']!r}"
    return " ".join(f"config: {where + ': ' if where else ''}{what}".split())


def parse_config(content: Any) -> Config:
    """Check a mapping against the schema and against what can be seen of local checkpoints; gives it `expanded`.

    Raises:
        ConfigError: one sentence with the path of the key.
    """
    try:
        config = Config.model_validate(content).expanded()
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None
    for model, described in config.models.items():
        _check_blocks(config, model, described)
    return config


def _check_blocks(config: Config, model: str, described: Model) -> None:
    """A block must divide the inputs of every linear layer; a local checkpoint says now what those are."""
    path = Path(described.source.path or "", "config.json")
    if described.source.path is None or not path.is_file():
        return
    try:
        stored = read_json(path)
        text, vision = stored.get("text_config") or stored, stored.get("vision_config") or {}
        inputs = FAMILIES[stored.get("model_type")].linear_inputs(text, vision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # the source stage says so, in its own words
    for variant in config.variants_of(model):
        for part, weights in (("decoder", config.decoder_weights(variant)), ("vision", config.vision_weights(variant))):
            for size in inputs.get(part, []):
                if config.variants[variant].plan or weights.method == "checkpoint":
                    continue
                if weights.bits < 16 and weights.block and size % weights.block:
                    key = f"variants.{variant}.{'vision.' if part == 'vision' else ''}block"
                    raise ConfigError(
                        f"config: {key}: {weights.block} does not divide the {size} inputs of a {part} layer of"
                        f" {model}; use one that does, or 0 for one scale a channel"
                    )


def load_config(path: Path) -> Config:
    """Raises ConfigError where the file is missing, is no YAML, or is refused by `parse_config`."""
    return parse_config(_read_yaml("config", path))


def _read_yaml(kind: str, path: Path) -> Any:
    """What a YAML file holds; `kind` is what it should be."""
    try:
        content = yaml.safe_load(read_bytes(Path(path), MOST_YAML).decode())
        check_shape(content, MOST_SETTINGS)
    except OSError as error:
        raise ConfigError(f"{kind}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{kind}: {path} is not UTF-8") from None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:  # also of days that no month has
        raise ConfigError(f"{kind}: {path} is not YAML: {' '.join(str(error).split())}") from None
    return content


def load_plan(path: Path) -> Plan:
    """Raises ConfigError where the file is missing or is no plan."""
    try:
        return Plan.model_validate(_read_yaml("plan", path) or {})
    except ValidationError as error:
        raise ConfigError(_sentence(error).replace("config:", f"plan: {path}:", 1)) from None


def parse_json(kind: type[BaseModel], text: str, option: str) -> Any:
    """A command line option that holds one of the blocks above as JSON, with its defaults filled in; what is left to
    be derived is left out.

    Raises:
        ConfigError: naming the option and the key.
    """
    try:
        return kind.model_validate_json(text).model_dump(exclude_none=True)
    except ValidationError as error:
        raise ConfigError(_sentence(error).replace("config:", f"{option}:", 1)) from None


def config_schema() -> dict[str, Any]:
    """JSON schema of config.yaml, for editors and for docs."""
    return Config.model_json_schema()
