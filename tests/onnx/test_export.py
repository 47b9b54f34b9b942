"""Exported graphs in ONNX Runtime against transformers, for checkpoints that differ in every size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from exported import SHAPES, Exported
from hf2mnn.core.errors import CheckpointError
from hf2mnn.onnx.session import Image, OnnxModel
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint

GRAPHS = ("decoder", "vision", "embedding")
CLOSE = 1e-4
"""Tolerance of logits whose standard deviation is about 0.6; measured differences are below 1e-5."""
VISION_START, VISION_END, IMAGE = 558, 559, 561


# Texts by their length, images by their grid: not square, so that rows and columns cannot be mixed up.
PROMPTS: dict[str, list[Any]] = {
    "one token": [1],
    "text": [9],
    "long text": [230],
    "wide image": [3, (1, 4, 14), 6],
    "tall image": [2, (1, 18, 2), 6],
    "two images": [3, (1, 2, 12), 1, (1, 10, 4), 5],
}


@dataclass
class Prompt:
    """Pieces of a prompt that can be fed one after another: ids with their images."""

    pieces: list[tuple[np.ndarray, list[Image]]] = field(default_factory=list)

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([ids for ids, _ in self.pieces])

    @property
    def images(self) -> list[Image]:
        return [image for _, images in self.pieces for image in images]


def make_prompt(parts: list[Any], seed: int = 0) -> Prompt:
    random, prompt = np.random.default_rng(seed), Prompt()
    for part in parts:
        if isinstance(part, int):
            prompt.pieces.append((random.integers(0, 540, part), []))
            continue
        count = int(np.prod(part))
        ids = np.array([VISION_START, *[IMAGE] * (count // 4), VISION_END])
        image = (random.standard_normal((count, 1176)).astype(np.float32), np.array(part))
        prompt.pieces.append((ids, [image]))
    return prompt


@torch.inference_mode()
def logits(model: Exported, prompt: Prompt, **options: Any) -> np.ndarray:
    """Return the logits of transformers [tokens, vocabulary], for inputs as a user would write them."""
    return model.torch(**torch_inputs(prompt), **options).logits[0].numpy()


def greedy(model: Exported, prompt: Prompt, count: int) -> list[int]:
    stop = model.runtime.info["stop_ids"]
    settings = GenerationConfig(do_sample=False, max_new_tokens=count, eos_token_id=stop, pad_token_id=stop[0])
    output = model.torch.generate(**torch_inputs(prompt), generation_config=settings)
    return output[0, len(prompt.ids) :].tolist()


def torch_inputs(prompt: Prompt) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(prompt.ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([pixels for pixels, _ in prompt.images]))
        inputs["image_grid_thw"] = torch.from_numpy(np.stack([grid for _, grid in prompt.images]))
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_those_of_transformers_for_any_split_of_the_prompt(model: Exported, name: str) -> None:
    """In one call, in pieces, and token by token: covers the cache, the mask and the positions after an image."""
    prompt = make_prompt(PROMPTS[name])
    expected = logits(model, prompt)
    assert expected.std() > 0.3
    whole = model.runtime.prefill(model.runtime.new_cache(), prompt.ids, prompt.images, all_logits=True)
    np.testing.assert_allclose(whole, expected, atol=CLOSE, rtol=0)

    cache, rows = model.runtime.new_cache(), []
    for ids, images in prompt.pieces:
        # The last tokens of every text one by one, those before them in one call.
        cuts = [] if images else list(range(max(1, len(ids) - 4), len(ids)))
        for index, chunk in enumerate(np.split(ids, cuts)):
            rows.append(model.runtime.prefill(cache, chunk, images if index == 0 else [], all_logits=True))
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=CLOSE, rtol=0)
    assert len(cache) == len(prompt.ids)


def test_tolerance_detects_a_wrong_position_and_a_wrong_image(model: Exported) -> None:
    """Such faults change the logits by more than the tolerance above."""
    prompt = make_prompt(PROMPTS["tall image"])
    expected = logits(model, prompt)
    plain = torch.arange(len(prompt.ids)).expand(3, 1, -1)
    assert np.abs(logits(model, prompt, position_ids=plain) - expected).max() > 100 * CLOSE
    ids, ((pixels, grid),) = prompt.pieces[1]
    prompt.pieces[1] = (ids, [(pixels[::-1].copy(), grid)])
    assert np.abs(logits(model, prompt) - expected).max() > 100 * CLOSE


def test_image_embeddings_equal_those_of_transformers(model: Exported) -> None:
    for grid in PROMPTS["two images"][1], (1, 2, 2), (1, 30, 4):
        ((_, ((pixels, shape),)),) = make_prompt([grid], seed=3).pieces
        with torch.inference_mode():
            output = model.torch.model.get_image_features(torch.from_numpy(pixels), torch.from_numpy(shape)[None])
        (embeds,) = model.runtime.embed_image((pixels, shape))
        np.testing.assert_allclose(embeds, output.pooler_output[0].numpy(), atol=CLOSE, rtol=0)


def test_answers_equal_those_of_generate_also_after_truncation(model: Exported) -> None:
    """A second answer after `truncate` is the answer of a cache that never held the first."""
    runtime, prompt = model.runtime, make_prompt(PROMPTS["two images"])
    cache = runtime.new_cache()
    first = runtime.prefill(cache, prompt.ids, prompt.images)
    assert runtime.greedy(cache, first[-1], 8) == greedy(model, prompt, 8)

    # Another question about the same images, after the first answer is removed.
    kept = sum(len(ids) for ids, _ in prompt.pieces[:-1])
    cache.truncate(kept)
    other = Prompt([*prompt.pieces[:-1], (np.array([5, 99, 300]), [])])
    second = runtime.prefill(cache, other.pieces[-1][0], all_logits=True)
    np.testing.assert_allclose(second, logits(model, other)[kept:], atol=CLOSE, rtol=0)
    assert runtime.greedy(cache, second[-1], 8) == greedy(model, other, 8)


def test_logits_of_the_last_token_alone(model: Exported) -> None:
    """`logits_index` -1 gives the last row of `logits_index` 0; with a vocabulary of 150,000, all rows are large."""
    prompt = make_prompt(PROMPTS["text"])
    every = model.runtime.prefill(model.runtime.new_cache(), prompt.ids, all_logits=True)
    last = model.runtime.prefill(model.runtime.new_cache(), prompt.ids)
    assert last.shape == (1, model.runtime.info["vocab_size"])
    np.testing.assert_allclose(last[0], every[-1], atol=1e-5, rtol=0)


def test_prompts_that_do_not_match_their_images_are_refused(model: Exported) -> None:
    """A wrong number of image tokens would get the embeddings of another image."""
    prompt = make_prompt(PROMPTS["two images"])
    for images in ([], prompt.images[:1], prompt.images[:1] * 2):
        with pytest.raises((ValueError, StopIteration)):
            model.runtime.prefill(model.runtime.new_cache(), prompt.ids, images)


def test_graphs_have_the_documented_inputs_and_outputs(model: Exported) -> None:
    """The names, types and dynamic axes in `hf2mnn.onnx.export` are a public interface."""
    info = model.runtime.info
    layers, kv, size = info["num_hidden_layers"], info["num_key_value_heads"], info["head_dim"]
    hidden, vocabulary = info["hidden_size"], info["vocab_size"]
    documented = {
        "decoder": {
            "inputs_embeds": ("tensor(float)", [1, "tokens", hidden]),
            "attention_mask": ("tensor(float)", [1, 1, "tokens", "past + tokens"]),
            "position_ids": ("tensor(int32)", [3, "tokens"]),
            "logits_index": ("tensor(int32)", [1]),
            "past_key_values": ("tensor(float)", [layers, 2, 1, "past", kv, size]),
            "logits": ("tensor(float)", [1, "rows", vocabulary]),
            "presents": ("tensor(float)", [layers, 2, 1, "past + tokens", kv, size]),
        },
        "vision": {
            "patches": ("tensor(float)", ["patches", 1176]),
            "position_ids": ("tensor(int32)", [2, "patches"]),
            "attention_mask": ("tensor(float)", [1, "patches", "patches"]),
            "image_embeds": ("tensor(float)", ["image tokens", hidden]),
        },
        "embedding": {
            "input_ids": ("tensor(int64)", [1, "tokens"]),
            "inputs_embeds": ("tensor(float)", [1, "tokens", hidden]),
        },
    }
    for name, values in documented.items():
        session = onnxruntime.InferenceSession(model.onnx / f"{name}.onnx", providers=["CPUExecutionProvider"])
        interface = [*session.get_inputs(), *session.get_outputs()]
        assert {value.name: (value.type, value.shape) for value in interface} == values


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_are_standard_and_hold_no_local_paths(model: Exported, graph: str, tmp_path: Path) -> None:
    """Standard operators only, valid for onnx's own checker once copied, and no stack traces of the exporter."""
    path = Path(shutil.copytree(model.onnx, tmp_path / "copy"), f"{graph}.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    content = onnx.load(str(path), load_external_data=False)
    assert {node.domain for node in content.graph.node} == {""}
    assert [opset.domain for opset in content.opset_import] == [""]
    assert not content.functions
    data = path.read_bytes()
    for trace in ("site-packages", "torch/", ".py", str(Path.home()), str(Path.cwd()), str(model.checkpoint.parent)):
        assert trace.encode() not in data, trace
    # Weights are external, each once.
    inside = sum(len(tensor.raw_data) for tensor in content.graph.initializer)
    assert inside < 100_000
    stored = {name.name for name in content.graph.initializer}
    assert len(stored) == len(content.graph.initializer)


def written(folder: Path) -> dict[str, bytes]:
    """Return the graphs' own files, without the offsets in the checkpoint's files."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.onnx.data")}
    for graph in GRAPHS:
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if not ExternalDataInfo(tensor).location.endswith(".onnx.data"):
                tensor.ClearField("external_data")
        files[graph] = model.SerializeToString()
    return files


def newer_name(name: str) -> str:
    """Return a parameter's name in transformers 4.52 to 4.57; release 5 saves the older names of the hub again."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def as_on_the_hub(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in the layout of Qwen/Qwen2-VL-2B-Instruct, with the decoder's settings at the top level."""
    text, vision = dict(config["text_config"]), config["vision_config"]
    section = text.pop("rope_parameters")
    text = {key: value for key, value in text.items() if key not in ("layer_types", "model_type", "pad_token_id")}
    kept = ("architectures", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        **{key: config[key] for key in kept},
        **text,
        "model_type": "qwen2_vl",
        "rope_theta": section["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": section["mrope_section"]},
        "sliding_window": 32768,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "vision_config": {
            **{key: vision[key] for key in ("depth", "embed_dim", "mlp_ratio", "num_heads", "hidden_size")},
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


def test_a_model_gives_the_same_bytes_from_another_layout_and_process(
    exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    """Flat config.json, tensor names of other releases of transformers, another hash seed and folder.

    Only the offsets in the checkpoint's files differ.
    """
    model = exports("1to1")
    other = shutil.copytree(model.checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(as_on_the_hub(config)))
    (other / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 3136, "max_pixels": 200704, "patch_size": 14, "merge_size": 2})
    )
    renamed = {newer_name(name): tensor for name, tensor in load_file(other / "model.safetensors").items()}
    assert renamed.keys() & load_file(model.checkpoint / "model.safetensors").keys() == {"lm_head.weight"}
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    source = fetch_checkpoint(tmp_path / "checkpoint", other)
    code = "import sys, pathlib, hf2mnn.stages.export as e; e.run(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, source, tmp_path / "onnx"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "77"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert written(tmp_path / "onnx") == written(model.onnx)
    assert OnnxModel(tmp_path / "onnx").info == model.runtime.info


def test_a_missing_weight_is_named_and_no_folder_remains(exports: Callable[[str], Exported], tmp_path: Path) -> None:
    """For a missing untied lm_head, transformers would only warn and initialize it at random."""
    checkpoint = shutil.copytree(exports("1to1").checkpoint, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weight for lm_head\.weight"):
        export_onnx(fetch_checkpoint(tmp_path / "fetched", checkpoint), tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
