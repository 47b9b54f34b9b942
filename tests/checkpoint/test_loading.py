"""Every reading of a checkpoint is transformers': for each parameter, the bytes of the model of `from_pretrained`.

Readings: `Checkpoint`, the reference with resident and with mapped weights, and an exported graph.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import SHAPES, make_small
from hf2mnn.checkpoint.architecture import model_class
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.loading import parameter_names
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.checkpoint.weight_files import INDEX, SINGLE
from hf2mnn.core.errors import CheckpointError
from hf2mnn.onnx.initializers import float_values, stored_initializers
from hf2mnn.onnx.weights import attach_weights, link_shards, save
from hf2mnn.reference.model import load_model
from hf2mnn.stages.fetch import run as fetch_checkpoint

HEAD = "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def values(model: torch.nn.Module, names: list[str]) -> Tensors:
    """Return parameters by name, also those that are mapped."""
    parts = {name: name.rpartition(".") for name in names}
    return {name: getattr(model.get_submodule(module), leaf) for name, (module, _, leaf) in parts.items()}


def exported(checkpoint: Checkpoint, shapes: dict[str, torch.Size], folder: Path) -> Tensors:
    """Return the values of a graph's initializers that are attached as those of an exported one."""
    x = ir.val("x", ir.DataType.FLOAT, [1])
    weights = {name: ir.val(name, ir.DataType.FLOAT, list(shape)) for name, shape in shapes.items()}
    nodes = [
        ir.node("MatMul" if len(shapes[name]) == 2 else "Add", [x, value], outputs=[ir.val(f"{name}.out")])
        for name, value in weights.items()
    ]
    graph = ir.Graph([x], [], nodes=nodes, initializers=list(weights.values()), opset_imports={"": 18}, name="all")
    model = ir.Model(graph, ir_version=10)
    attach_weights(model, checkpoint)
    folder.mkdir()
    link_shards(model, checkpoint, folder)
    save(model, folder / "all.onnx")
    stored = stored_initializers(folder / "all.onnx")
    read = {name: tensor.rows(0, tensor.shape[0]) for name, tensor in stored.items()} | float_values(
        folder / "all.onnx"
    )
    return {name: torch.from_numpy(np.array(read[name])).reshape(shape) for name, shape in shapes.items()}


def check_readings(folder: Path, scratch: Path) -> dict[str, str]:
    """Compare all readings of a folder with `from_pretrained`; return the names of the stored tensors."""
    source = fetch_checkpoint(scratch / "checkpoint", folder)
    checkpoint = Checkpoint(source)
    loaded = model_class(Checkpoint(folder)).from_pretrained(folder, dtype=torch.float32)
    expected = loaded.state_dict()
    readings = {
        "checkpoint": {name: checkpoint.tensor(name).float() for name in expected},
        "resident": values(load_model(checkpoint), list(expected)),
        "mapped": values(load_model(checkpoint, "mapped"), list(expected)),
        "exported": exported(checkpoint, {name: value.shape for name, value in expected.items()}, scratch / "onnx"),
    }
    for reading, tensors in readings.items():
        assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == [], reading
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert model_info(checkpoint)["tie_word_embeddings"] == checkpoint.tied == tied
    mapped = load_model(checkpoint, "mapped")
    assert (mapped.lm_head.stored.data_ptr() == mapped.get_input_embeddings().stored.data_ptr()) == tied
    return checkpoint.names


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / SINGLE).items()}
    tensors = change(tensors) or tensors
    (folder / SINGLE).unlink()
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="500KB")
    assert len(list(folder.glob("model-*"))) > 1


def stale_index(folder: Path) -> None:
    shards(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert (folder / INDEX).exists()


def single_beside_shards(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(folder, max_shard_size="500KB")
    assert (folder / SINGLE).exists()


def beside(name: str, tensor: str) -> Callable[[Path], None]:
    return lambda folder: save_file({tensor: torch.ones(2, 2)}, folder / name)


def other_name(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "weights.safetensors")
    configure(folder, transformers_weights="weights.safetensors")


def head(factor: float) -> Callable[[Path], None]:
    """Store an lm_head, the embedding times `factor`, beside a tied embedding."""

    def edit(folder: Path) -> None:
        rewrite(folder, lambda t: {**t, HEAD: t["model.embed_tokens.weight"] * factor})

    return edit


def head_alone(folder: Path) -> None:
    rewrite(folder, lambda t: {HEAD: t.pop("model.embed_tokens.weight"), **t})


def untied(folder: Path) -> None:
    head(1)(folder)
    configure(folder, tie_word_embeddings=False)


FOLDERS = {  # of a tied Qwen2; those that transformers loads without a word
    "shards": shards,
    "stale index": stale_index,
    "single file beside shards": single_beside_shards,
    "consolidated beside": beside("consolidated.safetensors", "tok_embeddings.weight"),
    "adapter beside": beside("adapter_model.safetensors", "base_model.model.x.lora_A.weight"),
    "value head beside": beside("value_head.safetensors", "v_head.summary.weight"),
    "file of another name": other_name,
    "saved without the head": lambda f: rewrite(f, lambda t: {n.removeprefix("model."): v for n, v in t.items()}),
    "rotary tables of old releases": lambda f: rewrite(
        f, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    ),
    "float64": lambda f: rewrite(f, lambda t: {n: v.double() for n, v in t.items()}),
    "torch_dtype": lambda f: configure(f, torch_dtype="float16", dtype=None),
    "a window in no layer": lambda f: configure(
        f, use_sliding_window=True, sliding_window=64, max_window_layers=9, layer_types=None
    ),
    "tied, another lm_head stored": head(1.5),
    "tied, the same lm_head stored": head(1),
    "tied, lm_head stored alone": head_alone,
    "untied, with equal values": untied,
}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(SHAPES["qwen2"], tmp_path_factory.mktemp("qwen2") / "saved")


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_transformers_loads_are_read_as_it_does(case: str, qwen2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2, tmp_path / "folder")
    FOLDERS[case](folder)
    names = check_readings(folder, tmp_path)
    assert (names[HEAD] == names["model.embed_tokens.weight"]) == (
        case not in ("tied, another lm_head stored", "untied, with equal values")
    )


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_names_of_all_releases_are_read(family: str, tmp_path: Path) -> None:
    """As `save_pretrained` writes them, and the names of the parameters themselves."""
    folder = make_small(SHAPES[family], tmp_path / "saved")
    old = check_readings(folder, tmp_path)
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    rewrite(renamed, lambda tensors: {next(p for p in old if old[p] == name): tensors[name] for name in tensors})
    (tmp_path / "new").mkdir()
    new = check_readings(renamed, tmp_path / "new")
    assert new.keys() == old.keys()
    changed = {name for name in new if new[name] != old[name]}
    assert bool(changed) == (family in ("qwen2-vl", "qwen2.5-vl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "embed" not in n}, "no weight for lm_head.weight"),
        (lambda t: {**t, "score.weight": torch.ones(2, 160)}, "holds score.weight"),
        (lambda t: {**t, "model.layers.4.mlp.up_proj.weight": torch.ones(288, 160)}, "holds model.layers.4"),
    ],
    ids=["nothing tied is stored", "another head", "another layer"],
)
def test_weights_that_transformers_would_draw_or_drop_are_refused(
    change: Callable[[Tensors], Tensors], message: str, qwen2: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(qwen2, tmp_path / "folder")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint(folder).names


def test_a_name_of_any_release_is_that_of_its_parameter() -> None:
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig())
    names = {
        "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
        "model.language_model.norm.weight": "model.language_model.norm.weight",
        "visual.merger.mlp.2.bias": "model.visual.merger.mlp.2.bias",
        "x.weight": "x.weight",
    }
    assert parameter_names(model, names) == names
