"""The exported graphs in ONNX Runtime against transformers, for checkpoints that differ in every size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.onnx.export import embedding_graph
from hf2mnn.onnx.session import Image, OnnxModel
from hf2mnn.onnx.weights import attach_weights
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint

GRAPHS = ("decoder", "vision", "embedding")
CLOSE = 1e-4
"""Bound on logits whose deviation is about 0.6; what is measured is below 1e-5."""
VISION_START, VISION_END, IMAGE = 558, 559, 561


def full(layers: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}


def rope(*section: int, theta: float = 10000.0) -> dict[str, Any]:
    return {"rope_parameters": {"mrope_section": list(section), "rope_theta": theta, "rope_type": "default"}}


# One head of keys for each query, for two, and for eight.
SHAPES: dict[str, dict[str, Any]] = {
    "1to1": {
        "text": {
            **full(2),
            **rope(4, 6, 6),
            "hidden_size": 128,
            "intermediate_size": 208,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        "vision": {"depth": 1, "embed_dim": 96, "num_heads": 3},
        "tied": False,
    },
    "2to1": {
        "text": {
            **full(3),
            **rope(8, 12, 12, theta=1e6),
            "hidden_size": 384,
            "intermediate_size": 320,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
        },
        "vision": {"depth": 2, "embed_dim": 160, "num_heads": 5, "mlp_ratio": 2},
        "tied": True,
    },
    # A vocabulary that is larger than the tokenizer's, as the real one is.
    "8to1": {
        "text": {
            **full(2),
            **rope(4, 6, 6),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "vocab_size": 704,
        },
        "vision": {"depth": 1, "embed_dim": 64, "num_heads": 1},
        "tied": False,
    },
}
# Texts by their length, images by their grid: odd shapes, so that rows are not taken for columns.
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
    """Pieces of a prompt that may be fed one after the other: ids with their images."""

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


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its source and onnx folders, and the model in both runtimes."""

    checkpoint: Path
    source: Path
    onnx: Path
    torch: Qwen2VLForConditionalGeneration
    runtime: OnnxModel

    @torch.inference_mode()
    def logits(self, prompt: Prompt, **replaced: Any) -> np.ndarray:
        """Transformers' logits [tokens, vocabulary], the prompt fed as a user would, with nothing of ours."""
        out = self.torch(**torch_inputs(prompt), **replaced)
        return out.logits[0].numpy()

    def greedy(self, prompt: Prompt, count: int) -> list[int]:
        stop = self.runtime.facts["stop_ids"]
        settings = GenerationConfig(do_sample=False, max_new_tokens=count, eos_token_id=stop, pad_token_id=stop[0])
        made = self.torch.generate(**torch_inputs(prompt), generation_config=settings)
        return made[0, len(prompt.ids) :].tolist()


def torch_inputs(prompt: Prompt) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(prompt.ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([pixels for pixels, _ in prompt.images]))
        inputs["image_grid_thw"] = torch.from_numpy(np.stack([grid for _, grid in prompt.images]))
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def export(checkpoint: Path, folder: Path) -> Path:
    return export_onnx(fetch_checkpoint(folder / "checkpoint", checkpoint), folder / "onnx")


@pytest.fixture(scope="module")
def exports(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Exported]:
    """Each shape's checkpoint, exported once."""

    @cache
    def get(name: str) -> Exported:
        checkpoint, folder = make_checkpoint(**SHAPES[name]), tmp_path_factory.mktemp(name)
        exported = export(checkpoint, folder)
        reference = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return Exported(checkpoint, folder / "checkpoint", exported, reference, OnnxModel(exported, threads=1))

    return get


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_transformers_however_the_prompt_is_fed(model: Exported, name: str) -> None:
    """Whole, in pieces, and token by token: the cache, the mask and the positions after an image are all in it."""
    prompt = make_prompt(PROMPTS[name])
    wanted = model.logits(prompt)
    assert wanted.std() > 0.3
    whole = model.runtime.prefill(model.runtime.new_cache(), prompt.ids, prompt.images, all_logits=True)
    np.testing.assert_allclose(whole, wanted, atol=CLOSE, rtol=0)

    held, rows = model.runtime.new_cache(), []
    for ids, images in prompt.pieces:
        # The last tokens of every text one by one, what comes before them at once.
        cuts = [] if images else list(range(max(1, len(ids) - 4), len(ids)))
        for index, chunk in enumerate(np.split(ids, cuts)):
            fed = images if index == 0 else []
            rows.append(model.runtime.prefill(held, chunk, fed, all_logits=True))
    np.testing.assert_allclose(np.concatenate(rows), wanted, atol=CLOSE, rtol=0)
    assert len(held) == len(prompt.ids)


def test_the_comparison_would_see_a_wrong_position_and_a_wrong_image(model: Exported) -> None:
    """The bound above means something only if such mistakes move the logits by more."""
    prompt = make_prompt(PROMPTS["tall image"])
    right = model.logits(prompt)
    plain = torch.arange(len(prompt.ids)).expand(3, 1, -1)
    assert np.abs(model.logits(prompt, position_ids=plain) - right).max() > 100 * CLOSE
    ids, ((pixels, grid),) = prompt.pieces[1]
    prompt.pieces[1] = (ids, [(pixels[::-1].copy(), grid)])
    assert np.abs(model.logits(prompt) - right).max() > 100 * CLOSE


def test_a_image_is_embedded_as_transformers_does(model: Exported) -> None:
    for grid in PROMPTS["two images"][1], (1, 2, 2), (1, 30, 4):
        ((_, ((pixels, shape),)),) = make_prompt([grid], seed=3).pieces
        with torch.inference_mode():
            seen = model.torch.model.get_image_features(torch.from_numpy(pixels), torch.from_numpy(shape)[None])
        (ours,) = model.runtime.see((pixels, shape))
        np.testing.assert_allclose(ours, seen.pooler_output[0].numpy(), atol=CLOSE, rtol=0)


def test_answers_are_those_of_generate_and_can_be_taken_back(model: Exported) -> None:
    """A second answer after `truncate` is the answer of a cache that never held the first."""
    runtime, prompt = model.runtime, make_prompt(PROMPTS["two images"])
    held = runtime.new_cache()
    first = runtime.prefill(held, prompt.ids, prompt.images)
    answer = runtime.greedy(held, first[-1], 8)
    assert answer == model.greedy(prompt, 8)

    # Another question about the same images, after the first has been answered and forgotten.
    kept = sum(len(ids) for ids, _ in prompt.pieces[:-1])
    held.truncate(kept)
    other = Prompt([*prompt.pieces[:-1], (np.array([5, 99, 300]), [])])
    second = runtime.prefill(held, other.pieces[-1][0], all_logits=True)
    np.testing.assert_allclose(second, model.logits(other)[kept:], atol=CLOSE, rtol=0)
    assert runtime.greedy(held, second[-1], 8) == model.greedy(other, 8)


def test_only_the_wanted_logits_are_computed(model: Exported) -> None:
    """`logits_index` -1 is the last row of 0, and one row: at 150000 tokens of vocabulary all rows are a lot."""
    prompt = make_prompt(PROMPTS["text"])
    every = model.runtime.prefill(model.runtime.new_cache(), prompt.ids, all_logits=True)
    last = model.runtime.prefill(model.runtime.new_cache(), prompt.ids)
    assert last.shape == (1, model.runtime.facts["vocab_size"])
    np.testing.assert_allclose(last[0], every[-1], atol=1e-5, rtol=0)


def test_prompts_that_do_not_fit_their_images_are_refused(model: Exported) -> None:
    """A wrong number of image tokens would fill in the embeddings of another image."""
    prompt = make_prompt(PROMPTS["two images"])
    for images in ([], prompt.images[:1], prompt.images[:1] * 2):
        with pytest.raises((ValueError, StopIteration)):
            model.runtime.prefill(model.runtime.new_cache(), prompt.ids, images)


def test_graphs_have_the_documented_inputs_and_outputs(model: Exported) -> None:
    """The names, types and free axes in `hf2mnn.onnx.export` are an interface that others write code for."""
    facts = model.runtime.facts
    layers, kv, size = facts["num_hidden_layers"], facts["num_key_value_heads"], facts["head_dim"]
    hidden, vocabulary = facts["hidden_size"], facts["vocab_size"]
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
        found = [*session.get_inputs(), *session.get_outputs()]
        assert {value.name: (value.type, value.shape) for value in found} == values


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_are_standard_and_keep_nothing_of_the_machine(model: Exported, graph: str, tmp_path: Path) -> None:
    """Standard ops only, valid for onnx's own checker once copied, and no stack trace that shows where it was made."""
    path = Path(shutil.copytree(model.onnx, tmp_path / "copy"), f"{graph}.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    content = onnx.load(str(path), load_external_data=False)
    assert {node.domain for node in content.graph.node} == {""}
    assert [opset.domain for opset in content.opset_import] == [""]
    assert not content.functions
    data = path.read_bytes()
    for trace in ("site-packages", "torch/", ".py", str(Path.home()), str(Path.cwd()), str(model.checkpoint.parent)):
        assert trace.encode() not in data, trace
    # Weights are outside, each once: the file is as large as the tensors.
    inside = sum(len(tensor.raw_data) for tensor in content.graph.initializer)
    assert inside < 100_000
    stored = {name.name for name in content.graph.initializer}
    assert len(stored) == len(content.graph.initializer)


def written(folder: Path) -> dict[str, bytes]:
    """The graphs' own files, without the places in the checkpoint's files that they point to."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.onnx.data")}
    for graph in GRAPHS:
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if not ExternalDataInfo(tensor).location.endswith(".onnx.data"):
                tensor.ClearField("external_data")
        found[graph] = model.SerializeToString()
    return found


def newer_name(name: str) -> str:
    """As transformers 4.52 to 4.57 call the parts; 5 saves the hub's older names again."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"


def as_on_the_hub(config: dict[str, Any]) -> dict[str, Any]:
    """The layout of Qwen/Qwen2-VL-2B-Instruct's config.json, in which everything of the decoder is at the top."""
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


def test_the_same_model_gives_the_same_bytes_from_another_layout_and_process(
    exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    """The hub's flat config.json, and the tensor names that transformers saves no more; other hashes, other folders.

    Only where the graphs point to differs: a checkpoint is one model however it was saved.
    """
    model = exports("2to1")
    other = shutil.copytree(model.checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(as_on_the_hub(config)))
    (other / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 3136, "max_pixels": 200704, "patch_size": 14, "merge_size": 2})
    )
    renamed = {newer_name(name): tensor for name, tensor in load_file(other / "model.safetensors").items()}
    assert not renamed.keys() & load_file(model.checkpoint / "model.safetensors").keys()
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    source = fetch_checkpoint(tmp_path / "checkpoint", other)
    code = "import sys, pathlib, hf2mnn.onnx.export as e; e.export_onnx(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, source, tmp_path / "onnx"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "77"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert written(tmp_path / "onnx") == written(model.onnx)
    assert OnnxModel(tmp_path / "onnx").facts == model.runtime.facts


def test_weights_of_another_shape_are_refused(exports: Callable[[str], Exported]) -> None:
    """The values of another model would fit into the file, and answer nonsense."""
    checkpoint = Checkpoint(exports("2to1").checkpoint)
    sentence = r"embed_tokens\.weight as \[640, 384\], its config\.json asks for \[700, 384\]: .* not of one model"
    with pytest.raises(CheckpointError, match=sentence):
        attach_weights(embedding_graph(checkpoint.family.embedding, 700, 384), checkpoint)


def test_a_weight_that_is_not_there_is_named_and_nothing_is_left_behind(
    exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    """An untied lm_head that is missing: transformers would fill in random numbers with a warning."""
    checkpoint = shutil.copytree(exports("1to1").checkpoint, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds no weight for lm_head\.weight"):
        export(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
