"""Checks before any weight is read: files of a checkpoint that are not of the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.preflight import check_checkpoint
from hf2mnn.checkpoint.weight_files import INDEX
from hf2mnn.core.errors import CheckpointError
from prequantized_layers import write_prequantized
from support import SHAPES_VL

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, MLP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
EMBEDDING, VISION_BIAS = "model.embed_tokens.weight", "visual.blocks.0.norm1.bias"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def change(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return edit


def configure(**changes: Any) -> Callable[[Path], None]:
    """Return an edit that sets keys of the decoder's configuration."""

    def edit(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        change("config.json", text_config=text | changes)(folder)

    return edit


def remove_key(key: str) -> Callable[[Path], None]:
    """Return an edit that removes a key of the decoder's configuration."""

    def edit(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        change("config.json", text_config={name: value for name, value in text.items() if name != key})(folder)

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Return an edit of the weights that also removes the index."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / FIRST) | load_file(folder / SECOND)
        change(tensors)
        for name in (FIRST, SECOND, INDEX):
            (folder / name).unlink()
        save_file(tensors, folder / "model.safetensors")

    return edit


def spoil(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return an edit of one value of a tensor."""
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value) and None


def tokens(*added: tuple[int, str], remove: str | None = None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        stored = json.loads((folder / "tokenizer.json").read_text())
        kept = [token for token in stored["added_tokens"] if token["content"] != remove]
        kept += [stored["added_tokens"][0] | {"id": number, "content": text} for number, text in added]
        change("tokenizer.json", added_tokens=kept)(folder)

    return edit


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


REFUSED = {
    "weights are a pointer": (write(FIRST, POINTER), [FIRST, "Git LFS pointer", "git lfs pull"]),
    "the tokenizer is a pointer": (write("tokenizer.json", POINTER), ["tokenizer.json", "Git LFS pointer"]),
    "a shard is missing": (lambda folder: (folder / SECOND).unlink(), [SECOND, "is missing"]),
    "a shard is truncated": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1]),
        [SECOND],
    ),
    "config of another width": (configure(intermediate_size=512), ["mlp.down_proj", "[128, 256]", "[128, 512]"]),
    "config of another vocabulary": (configure(vocab_size=1024), ["embed_tokens", "[640, 128]", "[1024, 128]"]),
    "config of more layers": (configure(num_hidden_layers=2, layer_types=None), ["no weight for", "layers.1"]),
    "config of fewer layers": (
        edit_weights(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)})),
        ["layers.1.mlp.up_proj.weight", "the model of its config.json does not have"],
    ),
    "a weight is missing": (edit_weights(lambda t: t.pop(NORM)), ["no weight for", "norm.weight"]),
    "a weight has another shape": (edit_weights(lambda t: t.update({NORM: torch.ones(64)})), [NORM, "[64]", "[128]"]),
    "more tokens than rows": (
        tokens(*((number, f"<|more {number}|>") for number in range(563, 641))),
        ["'<|more 640|>'", "640", "vocabulary"],
    ),
    "another token for an image": (change("config.json", image_token_id=562), ["image_token_id 562", "<|video_pad|>"]),
    "no token for an image": (change("config.json", image_token_id=639), ["image_token_id 639", "no token"]),
    "a tokenizer without images": (
        tokens(remove="<|vision_start|>"),  # transformers then numbers the next tokens anew
        ["image_token_id 561", "<|video_pad|>"],
    ),
    "a stop id without a token": (change("generation_config.json", eos_token_id=[551, 630]), ["630", "eos_token_id"]),
    "an empty tokenizer": (write("tokenizer.json", "{}"), ["transformers cannot load the tokenizer"]),
    "a tokenizer without tokens": (
        write("tokenizer.json", '{"model": {"vocab": {}}}'),
        ["transformers cannot load the tokenizer"],
    ),
    # transformers uses 32 for the missing key, other programs the number of heads.
    "a config without a required count": (remove_key("num_key_value_heads"), ["k_proj", "[64]", "[256]"]),
    "a config without a vision tower": (change("config.json", vision_config=None), ["visual", "of the same model"]),
    "a sliding window": (
        configure(use_sliding_window=True, sliding_window=64, max_window_layers=0, layer_types=None),
        ["'sliding_atten"],
    ),
    "dynamic rotary positions": (
        configure(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ["'dynamic'"],
    ),
    "a quantization without its config": (
        edit_weights(lambda t: t.update({MLP: t[MLP].to(torch.float8_e4m3fn), f"{MLP}_scale_inv": torch.ones(1)})),
        [MLP, "dtype F8_E4M3", "no scales"],
    ),
    "8-bit weights without their config": (
        edit_weights(lambda t: t.update({MLP: t[MLP].to(torch.int8), MLP.replace("weight", "SCB"): torch.ones(256)})),
        [MLP, "dtype I8", "no scales"],
    ),
    "scales without their config": (
        edit_weights(lambda t: t.update({f"{MLP}_scale": torch.ones(1)})),
        [f"{MLP}_scale", "a quantization_config that belongs to them was removed"],
    ),
    "a bias that the model lacks": (
        edit_weights(lambda t: t.update({MLP.replace("weight", "bias"): torch.ones(256)})),
        ["mlp.up_proj.bias is not zero"],
    ),
    "NaN in the vision tower": (
        edit_weights(spoil("visual.blocks.0.norm1.bias", torch.nan)),
        ["visual.blocks.0.norm1.bias"],
    ),
    "infinity in a norm": (edit_weights(spoil(NORM, -torch.inf)), ["NaN or infinite", NORM]),
    "NaN in the embedding": (
        edit_weights(spoil("model.embed_tokens.weight", torch.nan)),
        ["model.embed_tokens.weight"],
    ),
    "patches of another size than the engine's": (
        change("preprocessor_config.json", patch_size=16),
        ["patch_size 16", "MNN's engine has 14 built in for qwen2_vl"],
    ),
    "a processor of another model": (
        change("preprocessor_config.json", merge_size=4),
        ["merge_size 4", "MNN's engine has 2 built in"],
    ),
    "no settings of images": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        ["has no processor_config.json or preprocessor_config.json"],
    ),
    "a config that transformers refuses": (configure(hidden_size="128"), ["hidden_size"]),
}


def check_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(Checkpoint(folder))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_error_names_the_inconsistent_files(case: str, checkpoint: Path) -> None:
    edit, parts = REFUSED[case]
    edit(checkpoint)
    message = check_error(checkpoint)
    assert [part for part in parts if part not in message] == [], message


def test_valid_checkpoints_pass(checkpoint: Path, bases: dict[bool, Path], tmp_path: Path) -> None:
    """Old and new names, tied or not, prequantized or not; with GPTQ's extra biases, with a stored but tied lm_head."""
    untied = bases[False]
    for kind in ("awq", "gptq"):
        write_prequantized(untied, tmp_path / kind, kind)
        write_prequantized(untied, tmp_path / f"{kind}-new", kind, old=False)
    edit_weights(lambda t: t.update({"lm_head.weight": torch.ones(640, 128)}))(checkpoint)
    for folder in (SHAPES_VL, untied, checkpoint, *sorted(tmp_path.glob("*q")), *sorted(tmp_path.glob("*-new"))):
        check_checkpoint(Checkpoint(folder))


def test_prequantized_layers_must_match_the_config(bases: dict[bool, Path], tmp_path: Path) -> None:
    write_prequantized(bases[True], tmp_path / "prequantized", "awq", old=False)
    configure(intermediate_size=512)(tmp_path / "prequantized")
    message = check_error(tmp_path / "prequantized")
    assert "qweight of shape [128, 256]" in message
    assert "[128, 512]" in message
