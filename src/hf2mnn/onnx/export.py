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

import numpy as np
import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data

from hf2mnn.checkpoint.architecture import transformers_errors
from hf2mnn.checkpoint.folder import Checkpoint, checkpoint_files
from hf2mnn.checkpoint.loading import resolved_config
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import ExportError
from hf2mnn.families import VisionFamily
from hf2mnn.onnx.deepstack import add_deepstack
from hf2mnn.onnx.tap_points import name_tap_points
from hf2mnn.onnx.trace import OPSET, build_fake, trace_decoder, trace_vision
from hf2mnn.onnx.weights import attach_weights, link_shards, save

SAMPLE_GRID = np.array([1, 4, 6])  # all sizes differ, so that tracing cannot mistake one for another
COPIED_SUFFIXES = (".json", ".txt", ".jinja")


def embedding_graph(name: str, vocabulary: int, hidden: int) -> ir.Model:
    """Return a graph of one Gather from an initializer `name` without values, float32 [vocabulary, hidden]."""
    ids = ir.val("input_ids", ir.DataType.INT64, [1, "tokens"])
    table = ir.val(name, ir.DataType.FLOAT, [vocabulary, hidden])
    embeds = ir.val("inputs_embeds", ir.DataType.FLOAT, [1, "tokens", hidden])
    node = ir.node("Gather", [table, ids], {"axis": 0}, outputs=[embeds], name="embedding")
    graph = ir.Graph([ids], [embeds], nodes=[node], initializers=[table], opset_imports={"": OPSET}, name="embedding")
    return ir.Model(graph, ir_version=10)


def check_graph(path: Path) -> None:
    """Check a graph with `onnx.checker`, and that it has standard operators alone; else raise ExportError."""
    model = onnx.load(str(path), load_external_data=False)
    # External initializers become inputs: the checker refuses hard links as a security risk.
    for tensor in filter(uses_external_data, list(model.graph.initializer)):
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    foreign = {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise ExportError(f"{path.name} has operators outside of the ONNX standard: {', '.join(sorted(foreign))}")


def export_graphs(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the graphs, model.json, and the checkpoint's configuration and tokenizer files."""
    checkpoint.check()
    config = resolved_config(checkpoint)
    family, info = checkpoint.family, model_info(checkpoint)
    with transformers_errors(checkpoint):
        build_fake(config, family)
    graphs = {
        "decoder": lambda: trace_decoder(config, family),
        "embedding": lambda: embedding_graph(family.embedding, info["vocab_size"], info["hidden_size"]),
    }
    if isinstance(family, VisionFamily):
        patches = np.zeros((SAMPLE_GRID.prod(), 3 * info["temporal_patch_size"] * info["patch_size"] ** 2), np.float32)
        sample = family.vision_inputs(patches, SAMPLE_GRID, info)
        graphs["vision"] = lambda: trace_vision(config, family, sample)
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
    for path in map(Path, checkpoint_files(checkpoint.folder)):
        if path.suffix in COPIED_SUFFIXES and not path.name.endswith(".index.json"):
            copy = folder / path.relative_to(checkpoint.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
