"""Known faults put into a sound bundle, each one that a real conversion has been seen to make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.adapt import dress_decoder, save_dressed
from hf2mnn.mnn.bundle import DECODER, EMBEDDING, MODEL_CONFIG
from hf2mnn.mnn.convert import WeightFormat, convert_onnx, read_graph, write_graph

LAYERS = "model.language_model.layers"


def _edit_graph(bundle: Path, edit: Callable[[list[dict], list[str]], None]) -> None:
    graph = read_graph(bundle / DECODER)
    edit(graph.ops, graph.content["tensorName"])
    write_graph(graph, bundle / DECODER)


def _op(ops: list[dict], name: str) -> dict:
    (found,) = [op for op in ops if op["name"] == name]
    return found


def unfused_attention(bundle: Path, onnx_folder: Path) -> None:
    """One layer's query goes through a sum with zero where MNN's converter looks for a transposition: the same result
    in ONNX, and an attention that is not fused, with "Converted Success!".
    """
    model = onnx.load(onnx_folder / "decoder.onnx", load_external_data=False)
    (scores,) = [node for node in model.graph.node if node.name == "attention_2/scores"]
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "attention_2/zero")
    model.graph.initializer.append(zero)
    plus = helper.make_node("Add", [scores.input[0], zero.name], ["attention_2/plus"], "attention_2/plus")
    scores.input[0] = "attention_2/plus"
    model.graph.node.insert(list(model.graph.node).index(scores), plus)
    dress_decoder(model)
    changed = bundle / "changed"
    changed.mkdir()
    dressed = save_dressed(model, onnx_folder / "decoder.onnx", changed)
    convert_onnx(dressed, bundle / DECODER, WeightFormat())
    shutil.rmtree(changed)


def swapped_weights(bundle: Path, onnx_folder: Path) -> None:
    """Two layers read each other's weights."""

    def edit(ops: list[dict], _: list[str]) -> None:
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            one, other = (_op(ops, f"{LAYERS}.{layer}.{module}__matmul_converted")["main"] for layer in (1, 2))
            for key in ("external", "quanParameter"):
                if key in one:
                    one[key], other[key] = other[key], one[key]

    _edit_graph(bundle, edit)


def zeroed_norm(bundle: Path, onnx_folder: Path) -> None:
    """The weight of one normalization is zero: what is read where an offset has gone stale."""
    norm = _op(read_graph(bundle / DECODER).ops, f"{LAYERS}.2.input_layernorm")
    offset, size, _ = norm["main"]["external"]
    with (bundle / f"{DECODER}.weight").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))


def wrong_mean(bundle: Path, onnx_folder: Path) -> None:
    """Images are normalized by another processor's mean and deviation."""
    config = json.loads((bundle / MODEL_CONFIG).read_text())
    config |= {"image_mean": [0.0, 0.0, 0.0], "image_norm": [1 / 255] * 3}
    (bundle / MODEL_CONFIG).write_text(json.dumps(config))


def shifted_ids(bundle: Path, onnx_folder: Path) -> None:
    """Row i of the embedding is token i + 1's: an id table that starts at 1."""
    hidden = json.loads((bundle / MODEL_CONFIG).read_text())["hidden_size"]
    rows = np.fromfile(bundle / EMBEDDING, np.uint16).reshape(-1, hidden)
    np.roll(rows, -1, axis=0).tofile(bundle / EMBEDDING)


def flipped_rope(bundle: Path, onnx_folder: Path) -> None:
    """One layer turns its queries and keys the wrong way round."""

    def edit(ops: list[dict], names: list[str]) -> None:
        (rope,) = [
            op
            for op in ops
            if op["type"] == "RoPE" and names.index(f"{LAYERS}.1.self_attn.query") in op["outputIndexes"]
        ]
        names.append("turned/sines")
        turned = {
            "type": "UnaryOp",
            "main_type": "UnaryOp",
            "main": {"opType": "NEG", "T": "DT_FLOAT"},
            "name": names[-1],
        }
        turned |= {"inputIndexes": [rope["inputIndexes"][3]], "outputIndexes": [len(names) - 1]}
        ops.insert(ops.index(rope), turned | {"defaultDimentionFormat": "NHWC"})
        rope["inputIndexes"][3] = len(names) - 1

    _edit_graph(bundle, edit)


FAULTS = (unfused_attention, swapped_weights, zeroed_norm, wrong_mean, shifted_ids, flipped_rope)


def break_bundle(sound: Path, destination: Path, onnx_folder: Path, fault: Callable[[Path, Path], None]) -> Path:
    """A copy of a bundle with a fault in it, and a manifest that vouches for it as for any other."""
    shutil.copytree(sound, destination)
    manifest = Manifest.load(destination)
    fault(destination, onnx_folder)
    manifest.save(destination)
    return destination
