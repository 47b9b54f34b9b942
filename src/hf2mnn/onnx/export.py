"""Export a checkpoint as ONNX graphs with an explicit KV cache, for any ONNX runtime.

decoder.onnx
    inputs_embeds    float32 [1, tokens, hidden]
    attention_mask   float32 [1, 1, tokens, past + tokens]   added to the scores: 0, or a large negative if masked
    position_ids     int32   [3, tokens] with M-RoPE, else [1, tokens]
    logits_index     int32   [1]   first token with logits: 0 for all, -1 for the last
    past_key_values  float32 [layers, 2, 1, past, kv heads, head_dim]   past may be 0
    deepstack_embeds float32 [layers, tokens or 1, hidden]   with deepstack only; zeros for text
    logits           float32 [1, rows, vocabulary]
    presents         float32 [layers, 2, 1, past + tokens, kv heads, head_dim]
vision.onnx, with image input only; one image for each call
    inputs as in `VisionFamily.vision_inputs`
    image_embeds      float32 [image tokens, hidden]
    deepstack_feature float32 [layers, image tokens, hidden]   with deepstack only
embedding.onnx
    input_ids int64 [1, tokens]; inputs_embeds float32 [1, tokens, hidden]
model.json
    sizes, token ids, image mean and std, and what else a caller of the graphs needs
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data

from hf2mnn.checkpoint.architecture import load_config, transformers_errors
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import ExportError
from hf2mnn.families import VisionFamily
from hf2mnn.onnx.deepstack import add_deepstack
from hf2mnn.onnx.tap_points import name_tap_points
from hf2mnn.onnx.trace import OPSET, build_fake, trace_decoder, trace_vision
from hf2mnn.onnx.weights import attach_weights, link_shards, save

# All sizes differ, so that tracing cannot mistake one for another.
SAMPLE_GRID = np.array([1, 4, 6])
COPIED_SUFFIXES = (".json", ".txt", ".jinja")
NOT_COPIED = ("manifest.json", "model.safetensors.index.json")


def embedding_graph(name: str, vocabulary: int, hidden: int) -> ir.Model:
    """Return a graph of one Gather from an initializer `name` without values, float32 [vocabulary, hidden]."""
    ids = ir.Value(name="input_ids", shape=ir.Shape([1, "tokens"]), type=ir.TensorType(ir.DataType.INT64))
    table = ir.Value(name=name, shape=ir.Shape([vocabulary, hidden]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Gather", [table, ids], {"axis": 0}, name="embedding")
    embeds = node.outputs[0]
    embeds.name, embeds.type, embeds.shape = "inputs_embeds", table.type, ir.Shape([1, "tokens", hidden])
    graph = ir.Graph([ids], [embeds], nodes=[node], initializers=[table], opset_imports={"": OPSET}, name="embedding")
    return ir.Model(graph, ir_version=10)


def _with_weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace external initializers by graph inputs: the checker refuses hard links as a security risk."""
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    del checked.graph.initializer[:]
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            checked.graph.input.append(info)
        else:
            checked.graph.initializer.append(tensor)
    return checked


def check_graph(path: Path) -> None:
    """Check a graph with `onnx.checker`, and that it has standard operators alone.

    Raises:
        ExportError: The graph is invalid, or uses an operator of another domain.
    """
    model = onnx.load(str(path), load_external_data=False)
    try:
        onnx.checker.check_model(_with_weights_as_inputs(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    foreign = {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise ExportError(f"{path.name} has operators outside of the ONNX standard: {', '.join(sorted(foreign))}")


def sample_inputs(family: VisionFamily, info: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return inputs of the vision graph for a black image of SAMPLE_GRID patches."""
    patch = 3 * info["temporal_patch_size"] * info["patch_size"] ** 2
    return family.vision_inputs(np.zeros((int(SAMPLE_GRID.prod()), patch), np.float32), SAMPLE_GRID, info)


def export_graphs(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the graphs, model.json, and the checkpoint's configuration and tokenizer files.

    Raises:
        CheckpointError: Weights and configuration are not of the same model.
        ExportError: An exported graph is invalid.
    """
    checkpoint.check()
    config = load_config(checkpoint)
    family, info = checkpoint.family, model_info(checkpoint)
    with transformers_errors(checkpoint):
        build_fake(config, family)
    graphs = {
        "decoder": lambda: trace_decoder(config, family),
        "embedding": lambda: embedding_graph(family.embedding, info["vocab_size"], info["hidden_size"]),
    }
    if isinstance(family, VisionFamily):
        graphs["vision"] = lambda: trace_vision(config, family, sample_inputs(family, info))
    for name, trace in graphs.items():
        print(f"tracing {name}", flush=True)
        model = trace()
        attach_weights(model, checkpoint)
        name_tap_points(model)
        if name == "decoder" and family.deepstack_layers:
            add_deepstack(model, f"{family.decoder}.layers", family.deepstack_layers, info["hidden_size"])
        link_shards(model, checkpoint, folder)
        save(model, folder / f"{name}.onnx")
        check_graph(folder / f"{name}.onnx")
    (folder / "model.json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
    for path in sorted(checkpoint.folder.iterdir()):
        if path.suffix in COPIED_SUFFIXES and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
