"""Bundles: the folder that `MNN.llm` loads (docs/bundle.md), and the graphs that all bundles of a model share.

Names and keys are those that `llmconfig.hpp`, `omni.cpp` and `diskembedding.cpp` of MNN 3.6.1 read. The convert stage
writes embedding and tokenizer as in a bundle, and each graph as JSON (`hf2mnn.mnn.graph`) with its weight file. Linear
layers have no weights yet; the quantize stage adds them and builds the .mnn files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hf2mnn.checkpoint.model_info import has_vision
from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.manifest import tool_versions
from hf2mnn.families import get_family
from hf2mnn.mnn.adapt import adapt_decoder, adapt_vision, restore_linear_layers, strip_linear_layers
from hf2mnn.mnn.bundle_config import (
    CONFIG,
    DECODER,
    EMBEDDING,
    MODEL_CONFIG,
    TOKENIZER,
    VISION,
    EngineSettings,
    written_config,
)
from hf2mnn.mnn.convert import CUSTOM_OPERATORS, FUSE, convert_onnx
from hf2mnn.mnn.graph import Graph, check_fused, check_size, check_supported
from hf2mnn.mnn.nc4hw4 import Layout, to_nc4hw4
from hf2mnn.mnn.tokenizer import template_differences, write_tokenizer
from hf2mnn.onnx.initializers import load_graph, small_constants, stored_initializers

PARTS = {"decoder": (DECODER, "decoder.onnx"), "vision": (VISION, "vision.onnx")}
"""Graphs of a bundle, and the ONNX graphs that they are converted from."""
GRAPHS = {"decoder": ("llm.json", "llm.weight"), "vision": ("visual.json", "visual.weight")}
"""Graphs of the convert stage: JSON and weight file of each part."""
ADAPT = {"decoder": adapt_decoder, "vision": adapt_vision}
ROWS_AT_ONCE = 4096


def parts_in(onnx_folder: Path) -> list[str]:
    """Return the parts of a model: "decoder", and "vision" if it has a vision tower."""
    return [part for part, (_, source) in PARTS.items() if (onnx_folder / source).exists()]


def _convert(part: str, onnx_folder: Path, folder: Path) -> tuple[Graph, dict[str, np.ndarray]]:
    """Convert a graph without the weights of its linear layers; return it and the ONNX graph's small constants."""
    source, weights = onnx_folder / PARTS[part][1], folder / GRAPHS[part][1]
    model, vectors = load_graph(source), small_constants(source)
    ADAPT[part](model)
    strip_linear_layers(model)
    graph = convert_onnx(source, weights, (FUSE, CUSTOM_OPERATORS), model)
    restore_linear_layers(graph, weights, vectors)
    return graph, vectors


def _save(graph: Graph, part: str, folder: Path) -> None:
    name, weights = GRAPHS[part]
    check_supported(graph, name)
    check_size(graph, weights, (folder / weights).stat().st_size)
    graph.save(folder / name)


def convert_decoder(onnx_folder: Path, folder: Path, layers: int) -> Layout:
    """Convert the decoder to llm.json and llm.weight in `folder`, in the NC4HW4 layout if possible.

    Raise ConversionError if not all of its `layers` attentions are fused with a KV cache, or an operator is unknown.
    """
    graph, vectors = _convert("decoder", onnx_folder, folder)
    layout = to_nc4hw4(graph, vectors, tool_versions("MNN")["MNN"])
    check_fused(graph, GRAPHS["decoder"][0], layers)
    _save(graph, "decoder", folder)
    return layout


def convert_vision(onnx_folder: Path, folder: Path) -> None:
    """Convert the vision tower to visual.json and visual.weight in `folder`, or raise ConversionError."""
    _save(_convert("vision", onnx_folder, folder)[0], "vision", folder)


def convert_model(onnx_folder: Path, folder: Path) -> dict[str, Any]:
    """Write the graphs, the embedding and the tokenizer of a model to `folder`.

    Return `decoder_layout`: "NC4HW4", or the slower "NCHW" with `layout_reason`. Raise ConversionError if the converter
    failed, or its result is not what the engine requires.
    """
    model = json.loads((onnx_folder / "model.json").read_text())
    print("decoder: convert", flush=True)
    layout = convert_decoder(onnx_folder, folder, model["num_hidden_layers"])
    if "vision" in parts_in(onnx_folder):
        print("vision: convert", flush=True)
        convert_vision(onnx_folder, folder)
    write_embedding(onnx_folder, folder)
    write_tokenizer(onnx_folder, folder / TOKENIZER)
    for difference in template_differences(onnx_folder):
        print(f"tokenizer: {difference}", flush=True)
    if not layout.reason:
        return {"decoder_layout": layout.name}
    print(f"decoder: uses the slower layout {layout.name}: {layout.reason}", flush=True)
    return {"decoder_layout": layout.name, "layout_reason": layout.reason}


def embedding_table(onnx_folder: Path) -> StoredTensor:
    """Return the embedding [vocabulary, hidden] of embedding.onnx without reading it."""
    (table,) = stored_initializers(onnx_folder / "embedding.onnx").values()
    return table


def table_blocks(table: StoredTensor) -> Iterator[np.ndarray]:
    """Yield float32 [rows, hidden], at most `ROWS_AT_ONCE` rows at a time."""
    for start in range(0, table.shape[0], ROWS_AT_ONCE):
        yield table.rows(start, min(start + ROWS_AT_ONCE, table.shape[0]))


def write_embedding(onnx_folder: Path, folder: Path) -> None:
    """Write the embedding as little-endian bfloat16 [vocabulary, hidden], which is exact for a bfloat16 checkpoint."""
    with (folder / EMBEDDING).open("wb") as file:
        for rows in table_blocks(embedding_table(onnx_folder)):
            file.write(rows.astype(ml_dtypes.bfloat16).tobytes())


def model_settings(model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return llm_config.json for a model.json; `folder` is for error messages."""
    return {
        "model_type": model["model_type"],
        "hidden_size": model["hidden_size"],
        "layer_nums": model["num_hidden_layers"],
        "key_value_shape": [2, 1, 0, model["num_key_value_heads"], model["head_dim"]],
        # Without this key the engine feeds an integer mask, and the logits are wrong without an error.
        "attention_mask": "float",
        "attention_fused": True,
        **get_family(model["model_type"], folder).engine_config(model),
    }


def write_configs(
    folder: Path, model: dict[str, Any], settings: EngineSettings, tied: dict[str, Any] | None = None
) -> None:
    """Write config.json and llm_config.json; `model` is model.json, and the chat template is in the tokenizer's file.

    `tied` is the position of the embedding in the decoder's weight file (`quant.embedding.tied_settings`).
    """
    config = written_config(settings, has_vision(model), not tied)
    # The engine ignores the key "hf2mnn"; 'hf2mnn ask' reads it.
    described = {**model_settings(model, folder), "hf2mnn": model}
    if tied:
        described["tie_embeddings"] = tied
    for name, content in ((CONFIG, config), (MODEL_CONFIG, described)):
        (folder / name).write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
