"""Artifacts that the doctor examines: untrusted bundles, MNN models and ONNX models, read lazily and once."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import BundleError, ConversionError, ExportError, ManifestError, QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.mnn.bundle_config import read_config
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.engine_facts import FILE_DEFAULTS, RUN_TIME_SETTINGS
from hf2mnn.mnn.graph import LINEAR, Graph
from hf2mnn.mnn.tokenizer_file import TokenizerFile, read_tokenizer
from hf2mnn.quant.embedding import TIED, embedding_in_weights, parse_tied
from hf2mnn.quant.formats import DENSE
from hf2mnn.quant.weights import Operator, WeightFile, operators

LAYER = re.compile(r"\blayers?[./_](\d+)\b")
"""Index of a decoder layer in an operator name, as transformers' modules and their exporters write it."""


def sampled_rows(count: int, most: int) -> np.ndarray:
    """Return at most `most` evenly spaced indices of `count` rows, rounded down."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


@dataclass
class MnnModel:
    """A graph of MNN with its weight file, by default the graph's path with ".weight" appended."""

    path: Path  # a .mnn file, or JSON of the convert stage
    part: str = ""  # "decoder", "vision", or "" for a file outside a bundle
    layers: int | None = None  # number of attentions that must keep a KV cache, if known
    complete: bool = True  # whether linear layers must have weights; graphs of the convert stage have none
    checkpoint: Checkpoint | None = None  # to compare the weights with
    weights: Path = None

    def __post_init__(self) -> None:
        self.weights = self.weights or self.path.with_name(f"{self.path.name}.weight")

    @cached_property
    def _read(self) -> Graph | ConversionError:
        try:
            return read_graph(self.path)
        except ConversionError as error:
            return error

    @property
    def graph(self) -> Graph:
        """The graph; raises a ConversionError if the file is not an MNN model."""
        if isinstance(self._read, ConversionError):
            raise self._read
        return self._read

    @cached_property
    def operators(self) -> list[Operator]:
        """Linear layers and patch embeddings whose weights are in the weight file."""
        convolutions = [op for op in self.graph.of_type("Convolution") if op["main"].get("external")]
        described = operators(Graph({"oplists": convolutions}))
        return [o for o in described if sum(size for _, size in (*o.parts[:2], *o.parts[3:]))]

    @cached_property
    def quantized(self) -> list[Operator]:
        """Operators with quantized weights in MNN's dense format, which has a header."""
        return [o for o in self.operators if o.stored and o.stored["type"] == DENSE]

    @cached_property
    def weight_file(self) -> WeightFile:
        """The weight file under the graph; raises a ConversionError if it is shorter than the graph reads."""
        return WeightFile(self.graph, self.weights)

    @cached_property
    def foreign(self) -> list[str]:
        """Names of quantized operators whose weight has no header of their shape."""
        names = []
        for operator in self.quantized:
            try:
                self.weight_file.header(operator)
            except QuantizationError:
                names.append(operator.name)
        return names

    @cached_property
    def layer_count(self) -> int:
        """Number of decoder layers by the operator names; 0 if the names hold no index."""
        matches = (LAYER.search(op["name"]) for op in self.graph.of_type("Convolution"))
        return max((int(match[1]) + 1 for match in matches if match), default=0)


@dataclass
class OnnxFile:
    """An ONNX file without external data."""

    path: Path
    part: str = ""  # "decoder", "vision", "embedding", or "" for a file outside a folder of graphs

    @cached_property
    def graph(self) -> onnx.GraphProto:
        """The graph; raises an ExportError if the file is not an ONNX model."""
        try:
            graph = onnx.load(self.path, load_external_data=False).graph
        except (OSError, DecodeError, ValueError) as error:
            raise ExportError(f"{self.path} is not an ONNX model ({error}); export it again") from None
        if not graph.node and not graph.initializer:
            raise ExportError(f"{self.path} holds no graph; export it again")
        return graph


class DecoderShape(NamedTuple):
    """Sizes in a decoder graph that the other files of a bundle must match; 0 or "" where the graph has none."""

    hidden: int = 0
    vocabulary: int = 0
    layers: int = 0
    keys: int = 0  # values of a token's key in the KV cache
    mask: str = ""  # data type of `attention_mask`
    positions: int = 0  # rows of `position_ids`


@dataclass
class Bundle:
    """A folder that `MNN.llm` loads, of hf2mnn or of another converter."""

    folder: Path
    checkpoint: Checkpoint | None = None
    reference: Path | None = None  # folder of the reference stage
    config_errors: dict[Path, BundleError] = field(init=False, default_factory=dict)
    """Configuration files that cannot be read; with one, all its settings are the engine's defaults."""
    runtime: dict[str, Any] = field(init=False)  # config.json, or {}
    model: dict[str, Any] = field(init=False)  # llm_config.json over config.json, merged as the engine does
    models: dict[str, MnnModel] = field(init=False)  # "decoder" and "vision", if their files exist in the folder

    def __post_init__(self) -> None:
        self.runtime = self._read(self.folder / CONFIG)
        self.model = self.runtime | self._read(self.file("llm_config"))
        number = self.model.get("layer_nums")
        layers = number if type(number) is int else None
        decoder, weights = self.file("llm_model"), self.file("llm_weight")
        self.models = {}
        for model in (
            MnnModel(decoder, "decoder", layers, checkpoint=self.checkpoint, weights=weights),
            MnnModel(self.file("visual_model"), "vision", checkpoint=self.checkpoint),
        ):
            # Names only: the files of a hub's cache are links.
            names = [path.relative_to(self.folder).parts for path in (model.path, model.weights)]
            if model.path.is_file() and not any(".." in parts for parts in names):
                self.models[model.part] = model

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return read_config(path.parent, path.name)
        except BundleError as error:
            self.config_errors[path] = error
            return {}

    @cached_property
    def info(self) -> dict[str, Any] | None:
        """Contents of model.json: of the checkpoint, else of the bundle's key "hf2mnn"."""
        if self.checkpoint:
            return model_info(self.checkpoint)
        own = self.model.get("hf2mnn")
        return own if isinstance(own, dict) else None

    @property
    def tied(self) -> dict[str, Any] | None:
        """Settings of a quantized embedding, or None; raises a BundleError if they are invalid."""
        return parse_tied(self.model.get(TIED))

    @property
    def embedding(self) -> Path:
        """File of the embedding, which may be the decoder's weights; raises a BundleError if `tied` does."""
        return self.file("llm_weight" if embedding_in_weights(self.model) else "embedding_file")

    @cached_property
    def tokenizer(self) -> TokenizerFile:
        """The tokenizer file; raises a BundleError if it is missing or not a tokenizer."""
        return read_tokenizer(self.file("tokenizer_file"))

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest, if there is a valid one."""
        with suppress(ManifestError):
            return Manifest.load(self.folder)
        return None

    @cached_property
    def decoder_shape(self) -> DecoderShape:
        """Sizes of the decoder graph, if there is a decoder; raises a ConversionError if it is not an MNN model."""
        if "decoder" not in self.models:
            return DecoderShape()
        model = self.models["decoder"]
        weights = model.graph.weights()
        inputs = {op["name"]: op["main"] for op in reversed(model.graph.of_type("Input"))}
        dims = {name: inputs.get(name, {}).get("dims") or [0] for name in ("input_ids", "position_ids")}
        return DecoderShape(
            hidden=max(dims["input_ids"][-1], 0) or (weights[-1].inputs if weights else 0),
            vocabulary=weights[-1].outputs if weights else 0,
            layers=model.layer_count,
            keys=next((weight.outputs for weight in weights if "k_proj" in weight.name.removesuffix(LINEAR)), 0),
            mask=inputs.get("attention_mask", {}).get("dtype", ""),
            positions=max(dims["position_ids"][0], 0) if len(dims["position_ids"]) == 2 else 0,
        )

    def file(self, key: str) -> Path:
        """Return the path that a key of either file names, or the default; only config.json names llm_config.json."""
        name = (self.runtime if key == "llm_config" else self.model).get(key)
        # Like the engine: an absolute path is taken as one below the folder.
        return Path(f"{self.folder}/{name if isinstance(name, str) and name else FILE_DEFAULTS[key]}")

    def locate(self, key: str) -> str:
        """Return the configuration file in which a key is, or belongs, and the key."""
        runtime = key in self.runtime or key in FILE_DEFAULTS or key in RUN_TIME_SETTINGS
        return f"{CONFIG if runtime else self.file('llm_config').name}: {key}"
