"""A checkpoint as three ONNX graphs that any runtime can run, with an explicit KV cache.

decoder.onnx
    inputs_embeds    float32 [1, tokens, hidden]
    attention_mask   float32 [1, 1, tokens, past + tokens]   added to the scores: 0 may be seen, a large negative not
    position_ids     int32   [3, tokens] with M-RoPE, else [1, tokens]
    logits_index     int32   [1]   first row of which logits are wanted: 0 for all, -1 for the last
    past_key_values  float32 [layers, 2, 1, past, kv heads, head size]   past may be 0
    deepstack_embeds float32 [layers, tokens or 1, hidden]   of a model with deepstack; zeros for text
    logits           float32 [1, rows, vocabulary]
    presents         float32 [layers, 2, 1, past + tokens, kv heads, head size]
vision.onnx, of a model that sees
    inputs of the family (`VisionFamily.vision_inputs`), one image a call
    image_embeds      float32 [image tokens, hidden]
    deepstack_feature float32 [layers, image tokens, hidden]   of a model with deepstack
embedding.onnx
    input_ids int64 [1, tokens]; inputs_embeds float32 [1, tokens, hidden]
model.json
    the facts about the model that a caller of the graphs needs (sizes, ids, image mean and std)
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

from hf2mnn.checkpoint.facts import model_facts
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import ExportError
from hf2mnn.families import VisionFamily
from hf2mnn.onnx.deepstack import add_deepstack
from hf2mnn.onnx.tap_points import name_points
from hf2mnn.onnx.trace import OPSET, build_fake, trace_decoder, trace_vision
from hf2mnn.onnx.weights import attach_weights, link_shards, save
from hf2mnn.reference.model import load_config, refused_as_source

# An image of odd shape, so that no dimension is taken for another while tracing.
SAMPLE_GRID = np.array([1, 4, 6])


def embedding_graph(name: str, vocabulary: int, hidden: int) -> ir.Model:
    """A Gather over the embedding matrix, its initializer called `name` and without a value."""
    ids = ir.Value(name="input_ids", shape=ir.Shape([1, "tokens"]), type=ir.TensorType(ir.DataType.INT64))
    table = ir.Value(name=name, shape=ir.Shape([vocabulary, hidden]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Gather", [table, ids], {"axis": 0}, name="embedding")
    embeds = node.outputs[0]
    embeds.name, embeds.type, embeds.shape = "inputs_embeds", table.type, ir.Shape([1, "tokens", hidden])
    graph = ir.Graph([ids], [embeds], nodes=[node], initializers=[table], opset_imports={"": OPSET}, name="embedding")
    return ir.Model(graph, ir_version=10)


def _with_weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The checker takes a hard link for an attack, so it is not shown where the weights are."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.initializer[:]
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            shown.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            shown.graph.initializer.append(tensor)
    return shown


def check_graph(path: Path) -> None:
    """Raises ExportError where `onnx.checker` objects or the graph uses an op outside the ONNX standard."""
    model = onnx.load(str(path), load_external_data=False)
    try:
        onnx.checker.check_model(_with_weights_as_inputs(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    )
    if foreign:
        raise ExportError(f"{path.name} uses ops outside the ONNX standard: {', '.join(foreign)}")


def sample_inputs(family: VisionFamily, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inputs of the vision graph for an empty image."""
    patch = 3 * facts["temporal_patch_size"] * facts["patch_size"] ** 2
    return family.vision_inputs(np.zeros((int(SAMPLE_GRID.prod()), patch), np.float32), SAMPLE_GRID, facts)


def export_graphs(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the graphs, model.json and the tokenizer's files to `folder`.

    Raises:
        CheckpointError: Weights and configuration are not of one model.
        ExportError: A graph came out other than it must be.
    """
    checkpoint.check()
    config = load_config(checkpoint)
    family, facts = checkpoint.family, model_facts(checkpoint)
    with refused_as_source(checkpoint):
        build_fake(config, family)
    graphs = {
        "decoder": lambda: trace_decoder(config, family),
        "embedding": lambda: embedding_graph(family.embedding, facts["vocab_size"], facts["hidden_size"]),
    }
    if isinstance(family, VisionFamily):
        graphs["vision"] = lambda: trace_vision(config, family, sample_inputs(family, facts))
    for name, trace in graphs.items():
        print(f"{name}: tracing", flush=True)
        model = trace()
        attach_weights(model, checkpoint)
        name_points(model)
        if name == "decoder" and family.deepstack:
            add_deepstack(model, f"{family.decoder}.layers", family.deepstack, facts["hidden_size"])
        link_shards(model, checkpoint, folder)
        save(model, folder / f"{name}.onnx")
        check_graph(folder / f"{name}.onnx")
    (folder / "model.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    for path in sorted(checkpoint.folder.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.name not in (
            "manifest.json",
            "model.safetensors.index.json",
        ):
            shutil.copyfile(path, folder / path.name)
