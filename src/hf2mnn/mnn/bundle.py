"""A bundle: the folder that `MNN.llm` loads as it is.

config.json          run time: file names, threads, precision, memory
llm_config.json      the model: sizes, ids, image mean and norm
llm.mnn(.weight)     decoder with lm_head
visual.mnn(.weight)  vision tower with projector, of a model that sees
embeddings_bf16.bin  little-endian bfloat16 [vocabulary, hidden]
tokenizer.mtok       tokenizer and chat template

Keys and names are those that `llmconfig.hpp`, `omni.cpp` and `diskembedding.cpp` of MNN 3.6.1 read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hf2mnn.checkpoint.facts import sees
from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.manifest import tool_versions
from hf2mnn.families import family_named
from hf2mnn.mnn import graph as proof
from hf2mnn.mnn.adapt import dress_decoder, dress_vision, save_dressed
from hf2mnn.mnn.convert import WeightFormat, convert_onnx
from hf2mnn.mnn.linear import hide_linear_layers, show_linear_layers
from hf2mnn.mnn.nc4hw4 import pack_decoder, runs_packed
from hf2mnn.mnn.tokenizer import departures, write_tokenizer
from hf2mnn.onnx.initializers import initializer_values, load_graph, stored_initializers

DECODER, VISION = "llm.mnn", "visual.mnn"
EMBEDDING, TOKENIZER = "embeddings_bf16.bin", "tokenizer.mtok"
PARTS = {"decoder": (DECODER, "decoder.onnx"), "vision": (VISION, "vision.onnx")}
"""Each graph of a bundle, and the ONNX graph that it is made of. A model of text alone has no vision tower."""
DRESS = {"decoder": dress_decoder, "vision": dress_vision}
CONFIG, MODEL_CONFIG = "config.json", "llm_config.json"
ROWS_AT_ONCE = 4096


def parts_in(onnx_folder: Path) -> list[str]:
    """Those of PARTS that a model has."""
    return [part for part, (_, source) in PARTS.items() if (onnx_folder / source).exists()]


@dataclass(frozen=True)
class EngineSettings:
    """Run-time settings of MNN's engine, as config.json names them.

    precision: "high" and "normal" compute in float32 on a CPU, "low" in half floats where the CPU has them.
    memory: "high" unpacks the weights; "low" keeps them packed and rounds activations to 8 bits.
    """

    precision: str = "high"
    memory: str = "high"
    threads: int = 4


def _finish(graph: proof.Graph, weights: Path, part: str, vectors: dict[str, np.ndarray]) -> None:
    show_linear_layers(graph, weights, vectors)
    if part == "decoder" and runs_packed(tool_versions("MNN")["MNN"]):
        pack_decoder(graph, vectors)


def _convert(part: str, onnx_folder: Path, folder: Path, weights: WeightFormat | None, fuse: bool) -> proof.Graph:
    """One graph of the `onnx` stage for the engine, with what can be seen in it proved; see `convert_decoder`."""
    name, source = PARTS[part]
    source, destination = onnx_folder / source, folder / name
    model = load_graph(source)
    DRESS[part](model)
    finish = None
    if weights is None:
        hide_linear_layers(model)
        finish = partial(_finish, part=part, vectors=initializer_values(source, 1))
    with tempfile.TemporaryDirectory(prefix="hf2mnn-", dir=folder) as private:
        dressed = save_dressed(model, source, Path(private))
        graph = convert_onnx(dressed, destination, weights or WeightFormat(), fuse, finish)
    proof.prove_supported(graph, name)
    proof.prove_size(graph, name, destination.with_name(f"{name}.weight").stat().st_size)
    if weights is not None:
        asked = (weights.bits, weights.block, weights.symmetric, weights.scale_bits)
        proof.prove_weights(graph, name, *asked)
    return graph


def convert_decoder(
    onnx_folder: Path, folder: Path, layers: int, weights: WeightFormat | None = None, fuse: bool = True
) -> str:
    """Returns the decoder's layout, "NC4HW4" or "NCHW". Without `weights` the converter sees no linear layer, and none has a weight in what is written. With them it does
    all that it can do alone, at its cost: that is what the tests and the benchmarks hold ours against.

    Raises:
        ConversionError: the result is not a fused decoder with `layers` cached attentions.
    """
    graph = _convert("decoder", onnx_folder, folder, weights, fuse)
    proof.prove_fused(graph, DECODER, layers)
    return "NC4HW4" if graph.nc4hw4 else "NCHW"


def convert_vision(onnx_folder: Path, folder: Path, weights: WeightFormat | None = None) -> None:
    """As `convert_decoder` does."""
    _convert("vision", onnx_folder, folder, weights, fuse=True)


def embedding_table(onnx_folder: Path) -> StoredTensor:
    """The embedding [vocabulary, hidden] of embedding.onnx, left where it is."""
    (table,) = stored_initializers(onnx_folder / "embedding.onnx").values()
    return table


def table_blocks(table: StoredTensor) -> Iterator[np.ndarray]:
    """float32 [rows, hidden], a block at a time."""
    for start in range(0, table.shape[0], ROWS_AT_ONCE):
        yield table.rows(start, min(start + ROWS_AT_ONCE, table.shape[0]))


def write_embedding(onnx_folder: Path, folder: Path) -> None:
    """The embedding table as bfloat16 (exact for a bfloat16 checkpoint), a block at a time."""
    with (folder / EMBEDDING).open("wb") as file:
        for rows in table_blocks(embedding_table(onnx_folder)):
            file.write(rows.astype(ml_dtypes.bfloat16).tobytes())


def model_settings(model: dict[str, Any], where: Path) -> dict[str, Any]:
    """llm_config.json as the engine reads it, from the facts in model.json."""
    return {
        "model_type": model["model_type"],
        "hidden_size": model["hidden_size"],
        "layer_nums": model["num_hidden_layers"],
        "key_value_shape": [2, 1, 0, model["num_key_value_heads"], model["head_dim"]],
        # The engine feeds integers where this is left out, and the logits are silently wrong.
        "attention_mask": "float",
        "attention_fused": True,
        **family_named(model["model_type"], where).engine_config(model),
    }


def write_configs(
    folder: Path, model: dict[str, Any], settings: EngineSettings, tied: dict[str, Any] | None = None
) -> None:
    """`model` is model.json; `tied` says where in the decoder's weights the embedding is, where it has no file of its
    own. The chat template is in the tokenizer's file.
    """
    runtime = {
        "llm_model": DECODER,
        "llm_weight": f"{DECODER}.weight",
        "tokenizer_file": TOKENIZER,
        "embedding_file": EMBEDDING,
        "llm_config": MODEL_CONFIG,
    }
    if sees(model):
        runtime["visual_model"] = VISION
    engine = {
        "backend_type": "cpu",
        "thread_num": settings.threads,
        "precision": settings.precision,
        "memory": settings.memory,
    }
    config = {
        **runtime,
        **engine,
        "mllm": engine,
        "sampler_type": "greedy",
        "reuse_kv": False,
        "max_new_tokens": 512,
    }
    # The last key is ours: the engine reads past it, and 'hf2mnn ask' needs nothing but the bundle.
    described = {**model_settings(model, folder), "hf2mnn": model}
    if tied:
        described["tie_embeddings"] = tied
        del config["embedding_file"]
    for name, content in ((CONFIG, config), (MODEL_CONFIG, described)):
        (folder / name).write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def make_base(onnx_folder: Path, folder: Path) -> dict[str, Any]:
    """Write what all bundles of a model share to `folder`: graphs whose linear layers have no weights yet, the
    embedding, the tokenizer.

    Returns:
        `decoder_layout`, "NC4HW4" or the slower "NCHW"; `layout_reason` says why it is the slower one.
    """
    model = json.loads((onnx_folder / "model.json").read_text())
    print("decoder: converting", flush=True)
    layout = convert_decoder(onnx_folder, folder, model["num_hidden_layers"])
    if "vision" in parts_in(onnx_folder):
        print("vision: converting", flush=True)
        convert_vision(onnx_folder, folder)
    write_embedding(onnx_folder, folder)
    write_tokenizer(onnx_folder, folder / TOKENIZER)
    for departure in departures(onnx_folder):
        print(f"tokenizer: {departure}", flush=True)
    if layout == "NC4HW4":
        return {"decoder_layout": layout}
    release = tool_versions("MNN")["MNN"]
    reason = "its operators are not those of a known decoder" if runs_packed(release) else f"MNN {release} lacks it"
    print(f"decoder: stays in the slower layout {layout}: {reason}", flush=True)
    return {"decoder_layout": layout, "layout_reason": reason}


def describe(decoder: WeightFormat, vision: WeightFormat, settings: EngineSettings) -> dict[str, Any]:
    """The settings as a manifest keeps them."""
    return {"decoder": asdict(decoder), "vision": asdict(vision), "engine": asdict(settings)}
