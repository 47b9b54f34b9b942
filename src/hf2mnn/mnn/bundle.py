"""A bundle: the folder that `MNN.llm` loads as it is.

config.json          run time: file names, threads, precision, memory
llm_config.json      the model: sizes, ids, image mean and norm
llm.mnn(.weight)     decoder with lm_head
visual.mnn(.weight)  vision tower with projector
embeddings_bf16.bin  little-endian bfloat16 [vocabulary, hidden]
tokenizer.mtok       tokenizer and chat template

Keys and names are those that `llmconfig.hpp`, `omni.cpp` and `diskembedding.cpp` of MNN 3.6.1 read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from hf2mnn.families import family_named
from hf2mnn.mnn import graph as proof
from hf2mnn.mnn.convert import WeightFormat, convert_onnx
from hf2mnn.mnn.dress import dress_decoder, dress_vision
from hf2mnn.mnn.tokenizer import write_tokenizer

DECODER, VISION = "llm.mnn", "visual.mnn"
EMBEDDING, TOKENIZER = "embeddings_bf16.bin", "tokenizer.mtok"
PARTS = {"decoder": (DECODER, "decoder.onnx"), "vision": (VISION, "vision.onnx")}
"""Each graph of a bundle, and the ONNX graph that it is made of."""
CONFIG, MODEL_CONFIG = "config.json", "llm_config.json"
TOOLS = ("MNN", "onnx")
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class EngineSettings:
    """Run-time settings of MNN's engine, as config.json names them.

    precision: "high" and "normal" compute in float32 on a CPU, "low" in half floats where the CPU has them.
    memory: "high" unpacks the weights; "low" keeps them packed and rounds activations to 8 bits.
    """

    precision: str = "high"
    memory: str = "high"
    threads: int = 4


def dress_and_convert(
    source: Path, destination: Path, dress: Callable[[Path, Path], None], weights: WeightFormat, fuse: bool = True
) -> proof.Graph:
    """Convert one ONNX graph of the `onnx` stage for the engine, and prove what can be seen in the graph."""
    with tempfile.TemporaryDirectory(prefix="hf2mnn-", dir=destination.parent) as private:
        dressed = Path(private, source.name)
        dress(source, dressed)
        graph = convert_onnx(dressed, destination, weights, fuse)
    name = destination.name
    proof.prove_supported(graph, name)
    proof.prove_size(graph, name, destination.with_name(f"{name}.weight").stat().st_size)
    proof.prove_weights(graph, name, weights.bits, weights.block, weights.symmetric, weights.scale_bits)
    return graph


def convert_decoder(onnx_folder: Path, folder: Path, layers: int, weights: WeightFormat, fuse: bool = True) -> None:
    """Raises ConversionError where the result is not a fused decoder with `layers` cached attentions."""
    graph = dress_and_convert(onnx_folder / "decoder.onnx", folder / DECODER, dress_decoder, weights, fuse)
    proof.prove_fused(graph, DECODER, layers)


def convert_vision(onnx_folder: Path, folder: Path, weights: WeightFormat) -> None:
    dress_and_convert(onnx_folder / "vision.onnx", folder / VISION, dress_vision, weights)


def embedding_table(onnx_folder: Path) -> np.ndarray:
    """The embedding of embedding.onnx, float32 [vocabulary, hidden], left on disk."""
    model = onnx.load(onnx_folder / "embedding.onnx", load_external_data=False)
    (table,) = model.graph.initializer
    info = ExternalDataInfo(table)
    return np.memmap(
        onnx_folder / info.location, np.float32, mode="r", offset=info.offset or 0, shape=tuple(table.dims)
    )


def write_embedding(onnx_folder: Path, folder: Path) -> None:
    """The embedding table as bfloat16 (exact for a bfloat16 checkpoint), a block at a time."""
    rows = embedding_table(onnx_folder)
    with (folder / EMBEDDING).open("wb") as file:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            file.write(rows[start : start + ROWS_AT_ONCE].astype(ml_dtypes.bfloat16).tobytes())


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
    own. The chat template is in the tokenizer's file."""
    runtime = {
        "llm_model": DECODER,
        "llm_weight": f"{DECODER}.weight",
        "tokenizer_file": TOKENIZER,
        "embedding_file": EMBEDDING,
        "visual_model": VISION,
        "llm_config": MODEL_CONFIG,
    }
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


def make_float_bundle(onnx_folder: Path, folder: Path, settings: EngineSettings) -> None:
    """Everything of a bundle, weights as float32, into `folder`."""
    model = json.loads((onnx_folder / "model.json").read_text())
    print("decoder: converting", flush=True)
    convert_decoder(onnx_folder, folder, model["num_hidden_layers"], WeightFormat())
    print("vision: converting", flush=True)
    convert_vision(onnx_folder, folder, WeightFormat())
    write_embedding(onnx_folder, folder)
    write_tokenizer(onnx_folder, folder / TOKENIZER)
    write_configs(folder, model, settings)


def describe(decoder: WeightFormat, vision: WeightFormat, settings: EngineSettings) -> dict[str, Any]:
    """The settings as a manifest keeps them."""
    return {"decoder": asdict(decoder), "vision": asdict(vision), "engine": asdict(settings)}
