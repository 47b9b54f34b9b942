"""Artifacts that the doctor examines: bundles, MNN models and ONNX models.

Files are read lazily and once. Their contents are untrusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import BundleError, ConversionError, ExportError, ManifestError, QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.mnn.bundle_config import read_config
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.engine_facts import BACKENDS, FILE_DEFAULTS, PRECISIONS, SAMPLERS
from hf2mnn.mnn.graph import LINEAR, Graph
from hf2mnn.mnn.tokenizer_file import TokenizerFile, read_tokenizer
from hf2mnn.quant.weights import DENSE, Operator, WeightFile, operators

SETTING_VALUES = {
    "backend_type": BACKENDS,
    "precision": PRECISIONS,
    "memory": PRECISIONS,
    "power": PRECISIONS,
    "sampler_type": SAMPLERS,
}
"""Values of run-time settings that the engine knows; it takes a default for any other without an error."""
LAYER = re.compile(r"\blayers?[./_](\d+)\b")
"""Index of a decoder layer in an operator name, as transformers' modules and their exporters write it."""


def external_operators(graph: Graph) -> list[dict[str, Any]]:
    """Return the operators that read from the weight file."""
    return [op for op in graph.ops if isinstance(op.get("main"), dict) and op["main"].get("external")]


@dataclass
class MnnModel:
    """A graph of MNN with its weight file.

    Attributes:
        path: The .mnn file, or a graph of the convert stage (JSON).
        part: "decoder", "vision", or "" for a file outside a bundle.
        layers: Number of attentions that must keep a KV cache; None if unknown.
        complete: Whether linear layers must have weights; graphs of the convert stage have none.
        checkpoint: Checkpoint to compare the weights with.
        weights: The weight file; `path` with ".weight" appended, unless a configuration names another.
    """

    path: Path
    part: str = ""
    layers: int | None = None
    complete: bool = True
    checkpoint: Checkpoint | None = None
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
        """The graph.

        Raises:
            ConversionError: The file is not an MNN model.
        """
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
        """The weight file under the graph.

        Raises:
            ConversionError: It is shorter than the graph reads.
        """
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
    """An ONNX file without external data.

    Attributes:
        path: The .onnx file.
        part: "decoder", "vision", "embedding", or "" for a file outside a folder of graphs.
    """

    path: Path
    part: str = ""

    @cached_property
    def graph(self) -> onnx.GraphProto:
        """The graph.

        Raises:
            ExportError: The file is not an ONNX model.
        """
        try:
            graph = onnx.load(self.path, load_external_data=False).graph
        except (OSError, DecodeError, ValueError) as error:
            raise ExportError(f"{self.path} is not an ONNX model ({error}); export it again") from None
        if not graph.node and not graph.initializer:
            raise ExportError(f"{self.path} holds no graph; export it again")
        return graph


@dataclass(frozen=True)
class DecoderShape:
    """Sizes in a decoder graph that the other files of a bundle must match; 0 or "" where the graph has none.

    Attributes:
        hidden: Values of an embedding.
        vocabulary: Values of the logits.
        layers: Number of layers.
        keys: Values of a token's key in the KV cache.
        mask: Data type of `attention_mask`.
        positions: Rows of `position_ids`.
    """

    hidden: int
    vocabulary: int
    layers: int
    keys: int
    mask: str
    positions: int


def _decoder_shape(model: MnnModel) -> DecoderShape:
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


@dataclass
class Bundle:
    """A folder that `MNN.llm` loads, of hf2mnn or of another converter.

    Attributes:
        folder: The folder.
        checkpoint: Checkpoint that it was converted from, where it is known.
        reference: Folder of the reference stage, where it is known.
        models: "decoder" and "vision", those whose file exists in the folder.
    """

    folder: Path
    checkpoint: Checkpoint | None = None
    reference: Path | None = None
    models: dict[str, MnnModel] = field(init=False)

    def __post_init__(self) -> None:
        vision = self.file("visual_model")
        files = {
            "decoder": (self.file("llm_model"), self.file("llm_weight")),
            "vision": (vision, vision.with_name(f"{vision.name}.weight")),
        }
        layers = self.model.get("layer_nums")
        counts = {"decoder": layers if type(layers) is int else None}
        self.models = {
            part: MnnModel(path, part, counts.get(part), checkpoint=self.checkpoint, weights=weights)
            for part, (path, weights) in files.items()
            if path.is_file() and self._inside(path) and self._inside(weights)
        }

    def _inside(self, path: Path) -> bool:
        """Compare names only: the files of a hub's cache are links."""
        return ".." not in PurePosixPath(path.relative_to(self.folder)).parts

    def _read(self, path: Path) -> dict[str, Any] | BundleError:
        try:
            return read_config(path.parent, path.name)
        except BundleError as error:
            return error

    @cached_property
    def _configs(self) -> dict[Path, dict[str, Any] | BundleError]:
        """config.json and the file that it names as llm_config: contents, or why they cannot be read."""
        first = self._read(self.folder / CONFIG)
        second = self._path({} if isinstance(first, BundleError) else first, "llm_config")
        return {self.folder / CONFIG: first, second: self._read(second)}

    @property
    def config_errors(self) -> dict[Path, BundleError]:
        """Configuration files that cannot be read; with one, all its settings are the engine's defaults."""
        return {path: error for path, error in self._configs.items() if isinstance(error, BundleError)}

    @property
    def runtime(self) -> dict[str, Any]:
        """config.json, or {}."""
        content = next(iter(self._configs.values()))
        return {} if isinstance(content, BundleError) else content

    @cached_property
    def model(self) -> dict[str, Any]:
        """llm_config.json over config.json, merged as the engine does."""
        contents = [content for content in self._configs.values() if isinstance(content, dict)]
        return {key: value for content in contents for key, value in content.items()}

    @cached_property
    def info(self) -> dict[str, Any] | None:
        """Contents of model.json: of the checkpoint, else of the bundle's key "hf2mnn"."""
        if self.checkpoint:
            return model_info(self.checkpoint)
        own = self.model.get("hf2mnn")
        return own if isinstance(own, dict) else None

    @cached_property
    def tokenizer(self) -> TokenizerFile:
        """The tokenizer file.

        Raises:
            BundleError: It is missing or not a tokenizer.
        """
        return read_tokenizer(self.file("tokenizer_file"))

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest, if there is a valid one."""
        try:
            return Manifest.load(self.folder)
        except ManifestError:
            return None

    @cached_property
    def decoder_shape(self) -> DecoderShape | None:
        """Sizes of the decoder graph; None without a decoder.

        Raises:
            ConversionError: The decoder is not an MNN model.
        """
        return _decoder_shape(self.models["decoder"]) if "decoder" in self.models else None

    def _path(self, config: dict[str, Any], key: str) -> Path:
        name = config.get(key)
        # Like the engine: an absolute path is taken as one below the folder.
        return Path(f"{self.folder}/{name if isinstance(name, str) and name else FILE_DEFAULTS[key]}")

    def file(self, key: str) -> Path:
        """Return the path that a key names, or the engine's default for it.

        llm_config.json may name files too, except itself: the engine resolves paths after it has merged both files.
        """
        return self._path(self.runtime if key == "llm_config" else self.model, key)

    def locate(self, key: str) -> str:
        """Return the configuration file in which a key is, or belongs, and the key."""
        runtime = key in self.runtime or key in FILE_DEFAULTS or key in SETTING_VALUES
        return f"{CONFIG if runtime else self.file('llm_config').name}: {key}"
