"""Faults of real conversions, put into right bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from faulty_bundles import convert_part, edit_graph
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import DECODER, EMBEDDING, MODEL_CONFIG
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.graph import Graph

LAYERS = "model.language_model.layers"

Fault = Callable[[Path, Path], None]
"""Function that changes a bundle; the second folder is that of the export stage."""


def _op(graph: Graph, name: str) -> dict:
    (op,) = [op for op in graph.ops if op["name"] == name]
    return op


def unfused_attention(bundle: Path, onnx_folder: Path) -> None:
    """Add zero to one layer's query where MNN's converter expects a transposition.

    The result is the same in ONNX; the converter does not fuse the attention, and prints "Converted Success!".
    """
    model = onnx.load(onnx_folder / "decoder.onnx", load_external_data=False)
    (scores,) = [node for node in model.graph.node if node.name == "attention_2/scores"]
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "attention_2/zero")
    model.graph.initializer.append(zero)
    plus = helper.make_node("Add", [scores.input[0], zero.name], ["attention_2/plus"], "attention_2/plus")
    scores.input[0] = "attention_2/plus"
    model.graph.node.insert(list(model.graph.node).index(scores), plus)
    convert_part(model, "decoder", onnx_folder, bundle)


def swapped_weights(bundle: Path, onnx_folder: Path) -> None:
    """Swap the weights of two layers."""

    def edit(graph: Graph) -> None:
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            one, other = (_op(graph, f"{LAYERS}.{layer}.{module}__matmul_converted")["main"] for layer in (1, 2))
            for key in ("external", "quanParameter"):
                if key in one:
                    one[key], other[key] = other[key], one[key]

    edit_graph(bundle, edit)


def zeroed_norm(bundle: Path, onnx_folder: Path) -> None:
    """Set the weight of one normalization to zero, as a wrong offset does."""
    norm = _op(read_graph(bundle / DECODER), f"{LAYERS}.2.input_layernorm")
    offset, size, _ = norm["main"]["external"]
    with (bundle / f"{DECODER}.weight").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))


def wrong_mean(bundle: Path, onnx_folder: Path) -> None:
    """Set mean and deviation of the image normalization to those of another processor."""
    config = json.loads((bundle / MODEL_CONFIG).read_text())
    config |= {"image_mean": [0.0, 0.0, 0.0], "image_norm": [1 / 255] * 3}
    (bundle / MODEL_CONFIG).write_text(json.dumps(config))


def shifted_ids(bundle: Path, onnx_folder: Path) -> None:
    """Shift the embedding by one row, as an id table that starts at 1 does."""
    hidden = json.loads((bundle / MODEL_CONFIG).read_text())["hidden_size"]
    rows = np.fromfile(bundle / EMBEDDING, np.uint16).reshape(-1, hidden)
    np.roll(rows, -1, axis=0).tofile(bundle / EMBEDDING)


def flipped_rope(bundle: Path, onnx_folder: Path) -> None:
    """Rotate queries and keys of one layer in the opposite direction."""

    def edit(graph: Graph) -> None:
        ops, names = graph.ops, graph.content["tensorName"]
        query = names.index(f"{LAYERS}.1.self_attn.query")
        (rope,) = [op for op in ops if op["type"] == "RoPE" and query in op["outputIndexes"]]
        names.append("negated/sines")
        negated = {
            "type": "UnaryOp",
            "main_type": "UnaryOp",
            "main": {"opType": "NEG", "T": "DT_FLOAT"},
            "name": names[-1],
            "inputIndexes": [rope["inputIndexes"][3]],
            "outputIndexes": [len(names) - 1],
            "defaultDimentionFormat": "NHWC",
        }
        ops.insert(ops.index(rope), negated)
        rope["inputIndexes"][3] = len(names) - 1

    edit_graph(bundle, edit)


FAULTS = (unfused_attention, swapped_weights, zeroed_norm, wrong_mean, shifted_ids, flipped_rope)


def break_bundle(right: Path, destination: Path, onnx_folder: Path, fault: Fault) -> Path:
    """Copy a bundle, put a fault into it, and write the manifest of the result."""
    shutil.copytree(right, destination)
    manifest = Manifest.load(destination)
    fault(destination, onnx_folder)
    manifest.save(destination)
    return destination
