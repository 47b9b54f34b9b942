"""What is examined: a bundle, an MNN model with its weight file, an ONNX graph. Read once, and only what is asked for;
nothing here trusts what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from hf2mnn.checkpoint.facts import model_facts
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import ConversionError, ExportError, ManifestError, QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.core.untrusted import read_json
from hf2mnn.mnn.bundle import CONFIG, DECODER, MODEL_CONFIG, VISION
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.graph import Graph
from hf2mnn.mnn.tokenizer_file import TokenizerFile, read_tokenizer
from hf2mnn.quant.weights import LEVELS, Operator, WeightFile, operators

DEFAULTS = {
    "llm_config": MODEL_CONFIG,
    "llm_model": DECODER,
    "llm_weight": f"{DECODER}.weight",
    "visual_model": VISION,
    "embedding_file": "embeddings_bf16.bin",
    "tokenizer_file": "tokenizer.txt",
    "context_file": "context.json",
}
"""What the engine takes where config.json has no such key (`llmconfig.hpp` of MNN 3.6.1)."""


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def external(graph: Graph) -> list[dict[str, Any]]:
    """Operators that read something from the weight file."""
    return [op for op in graph.ops if isinstance(op.get("main"), dict) and op["main"].get("external")]


@dataclass
class Model:
    """A .mnn file and the weight file that goes with it. part: "decoder", "vision", or "" for a file by itself.
    layers: attentions that must keep a KV cache, None where it is not known. whole: whether its linear layers must have
    weights; those of the `mnn` stage have none yet. checkpoint: as `Bundle` has it.
    """

    path: Path
    weights: Path
    part: str = ""
    layers: int | None = None
    whole: bool = True
    checkpoint: Checkpoint | None = None

    @cached_property
    def _read(self) -> Graph | ConversionError:
        try:
            graph = read_graph(self.path)
        except ConversionError as error:
            return error
        # The converter reads on behind the end of a file that was cut short, and most of the time finds zeros there.
        if not graph.ops or not all({"type", "outputIndexes"} <= set(op) for op in graph.ops):
            return ConversionError(f"{self.path} holds operators without a type or an output; it was cut short")
        return graph

    @property
    def graph(self) -> Graph:
        """Raises ConversionError where it is no MNN model."""
        if isinstance(self._read, ConversionError):
            raise self._read
        return self._read

    @cached_property
    def operators(self) -> list[Operator]:
        """Linear layers and patch embeddings whose weights are in the weight file."""
        here = [op for op in self.graph.of_type("Convolution") if op["main"].get("external")]
        found = operators(Graph({"oplists": here}))
        return [operator for operator in found if sum(size for _, size in (*operator.parts[:2], *operator.parts[3:]))]

    @cached_property
    def file(self) -> WeightFile:
        """Raises ConversionError where it is shorter than the graph reads, or the graph reads before its beginning."""
        places = [op["main"]["external"] for op in external(self.graph)]
        if any(part < 0 for place in places for part in place):
            raise ConversionError(f"{self.path} reads its weights from a place that no file has; make it again")
        return WeightFile(self.graph, self.weights)

    @cached_property
    def foreign(self) -> list[str]:
        """Operators whose bytes in the weight file are no weights of their shape."""
        found = []
        for operator in self.operators:
            try:
                if operator.stored and operator.stored["type"] == LEVELS:
                    self.file.header(operator)
            except QuantizationError:
                found.append(operator.name)
        return found


@dataclass
class OnnxPatient:
    """An ONNX file. part: "decoder", "vision", "embedding", or "" where its name does not say."""

    path: Path
    part: str = ""

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The graph, without external data. Raises ExportError where it is none."""
        try:
            found = onnx.load(self.path, load_external_data=False)
        except (OSError, DecodeError, ValueError) as error:
            raise ExportError(f"{self.path} is no ONNX model ({error}); export it again") from None
        if not found.graph.node and not found.graph.initializer:
            raise ExportError(f"{self.path} holds no graph; export it again")
        return found


@dataclass
class Bundle:
    """A folder that `MNN.llm` loads, whoever made it. checkpoint: the one that it was made of, where it is known;
    reference: that stage's folder, where there is one.
    """

    folder: Path
    checkpoint: Checkpoint | None = None
    reference: Path | None = None
    models: dict[str, Model] = field(default_factory=dict)
    """By part, of those whose .mnn file is there."""

    def __post_init__(self) -> None:
        vision = self.file("visual_model")
        places = {
            "decoder": (self.file("llm_model"), self.file("llm_weight")),
            "vision": (vision, vision.with_name(f"{vision.name}.weight")),
        }
        for part, (path, weights) in places.items():
            if part not in self.models and path.is_file() and self._inside(path) and self._inside(weights):
                layers = self.model.get("layer_nums") if part == "decoder" else None
                known = layers if isinstance(layers, int) and not isinstance(layers, bool) else None
                self.models[part] = Model(path, weights, part, known, checkpoint=self.checkpoint)

    def _inside(self, path: Path) -> bool:
        """By name; a hub's cache consists of links."""
        return ".." not in PurePosixPath(path.relative_to(self.folder)).parts

    @cached_property
    def runtime(self) -> dict[str, Any]:
        """config.json, {} where it is not there; checks.config says so."""
        return _object(self.folder / CONFIG)

    @cached_property
    def model(self) -> dict[str, Any]:
        """llm_config.json over config.json, as the engine merges them."""
        return self.runtime | _object(self.file("llm_config"))

    @cached_property
    def facts(self) -> dict[str, Any] | None:
        """What hf2mnn knows of the checkpoint (`hf2mnn.checkpoint.facts.model_facts`): of `checkpoint`, else of what the
        bundle says of itself under "hf2mnn".
        """
        if self.checkpoint:
            return model_facts(self.checkpoint)
        own = self.model.get("hf2mnn")
        return own if isinstance(own, dict) else None

    @cached_property
    def tokenizer(self) -> TokenizerFile:
        """Raises BundleError where its file is not there, or is none."""
        return read_tokenizer(self.file("tokenizer_file"))

    @cached_property
    def manifest(self) -> Manifest | None:
        """None where there is none, or what is there is none."""
        try:
            return Manifest.load(self.folder)
        except ManifestError:
            return None

    def file(self, key: str) -> Path:
        """The path that a key of config.json names, or the engine's default for it (llm.mnn, tokenizer.txt, ...).

        llm_config.json may name files too, but for itself: the engine reads paths after it has merged the two.
        """
        named = (self.runtime if key == "llm_config" else self.model).get(key, DEFAULTS[key])
        # As the engine does it: an absolute path is one below the folder, too.
        return Path(f"{self.folder}/{named if isinstance(named, str) and named else DEFAULTS[key]}")
