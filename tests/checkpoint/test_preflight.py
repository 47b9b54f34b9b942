"""What is refused before any weight is read: parts of a checkpoint that do not fit each other."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.preflight import check_checkpoint, tokens_of
from hf2mnn.checkpoint.room import check_disk
from hf2mnn.core.errors import CheckpointError
from prequantized_layers import write_packed
from support import SHAPES_VL, TEXT, VISION

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def change(name: str, **changes: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return harm


def configure(**changes: Any) -> Callable[[Path], None]:
    """Set keys of the decoder's configuration."""

    def harm(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        change("config.json", text_config=text | changes)(folder)

    return harm


def leave_out(key: str) -> Callable[[Path], None]:
    """Of the decoder's configuration."""

    def harm(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        change("config.json", text_config={name: value for name, value in text.items() if name != key})(folder)

    return harm


def place(name: str, file: str | None) -> Callable[[Path], None]:
    """Let the index say that a tensor is in `file`, or nothing of it."""

    def harm(folder: Path) -> None:
        places = json.loads((folder / INDEX).read_text())["weight_map"] | {name: file}
        change(INDEX, weight_map={key: value for key, value in places.items() if value})(folder)

    return harm


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the weights, with no index to disagree with them."""

    def harm(folder: Path) -> None:
        tensors = load_file(folder / FIRST) | load_file(folder / SECOND)
        change(tensors)
        for name in (FIRST, SECOND, INDEX):
            (folder / name).unlink()
        save_file(tensors, folder / "model.safetensors")

    return harm


def tokens(*added: tuple[int, str], remove: str | None = None) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        stored = json.loads((folder / "tokenizer.json").read_text())
        kept = [token for token in stored["added_tokens"] if token["content"] != remove]
        kept += [stored["added_tokens"][0] | {"id": number, "content": text} for number, text in added]
        change("tokenizer.json", added_tokens=kept)(folder)

    return harm


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


REFUSED = {
    "weights are a pointer": (write(FIRST, POINTER), [FIRST, "Git LFS pointer", "git lfs pull"]),
    "the tokenizer is a pointer": (write("tokenizer.json", POINTER), ["tokenizer.json", "Git LFS pointer"]),
    "a shard is missing": (lambda folder: (folder / SECOND).unlink(), [SECOND, "is missing"]),
    "a shard is cut": (lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1]), [SECOND]),
    "the index names another shard": (place(NORM, FIRST), [INDEX, f"{NORM} in {FIRST}", SECOND]),
    "the index names a tensor that is not there": (place("model.x.weight", FIRST), ["model.x.weight", FIRST]),
    "the index leaves a tensor out": (place(NORM, None), [SECOND, NORM, "does not name"]),
    "config of another width": (configure(intermediate_size=512), ["mlp.", "[256, 128]", "[512, 128]"]),
    "config of another vocabulary": (configure(vocab_size=1024), ["embed_tokens", "[640, 128]", "[1024, 128]"]),
    "config of more layers": (configure(num_hidden_layers=2, layer_types=None), ["no weight for", "layers.1"]),
    "config of fewer layers": (
        edit(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)})),
        ["model.layers.1.mlp.up_proj.weight", "no place"],
    ),
    "a weight is missing": (edit(lambda t: t.pop(NORM)), ["no weight for", "norm.weight"]),
    "a weight has another shape": (edit(lambda t: t.update({NORM: torch.ones(64)})), [NORM, "[64]", "[128]"]),
    "more tokens than rows": (tokens((640, "<|more|>")), ["'<|more|>'", "640", "vocabulary"]),
    "another token for an image": (change("config.json", image_token_id=562), ["image_token_id 562", "<|video_pad|>"]),
    "no token for an image": (change("config.json", image_token_id=639), ["image_token_id 639", "no token"]),
    "a tokenizer without images": (tokens(remove="<|vision_start|>"), ["vision_start_token_id", "no token"]),
    "an end that is no token": (change("generation_config.json", eos_token_id=[551, 630]), ["630", "eos_token_id"]),
    "a tokenizer that is none": (write("tokenizer.json", "{}"), ["tokenizer.json is not a tokenizer"]),
    "a tokenizer without tokens": (
        write("tokenizer.json", '{"model": {"vocab": {}}}'),
        ["tokenizer.json is not a tokenizer"],
    ),
    # transformers takes 32 for what is left out, and others the number of heads.
    "a config that leaves out what counts": (
        leave_out("num_key_value_heads"),
        ["does not say what its num_key_value_heads is"],
    ),
    "patches that the engine does not cut": (
        change("preprocessor_config.json", patch_size=16),
        ["patch_size of 16", "14 is built into MNN's engine for qwen2_vl"],
    ),
    "a processor of another model": (
        change("preprocessor_config.json", merge_size=4),
        ["merge_size of 4", "2 is built into MNN's engine"],
    ),
    "a config that makes no model": (configure(hidden_size="128"), ["hidden_size"]),
}


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_checkpoint(Checkpoint(folder))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_said(case: str, checkpoint: Path) -> None:
    harm, says = REFUSED[case]
    harm(checkpoint)
    sentence = refusal(checkpoint)
    assert [part for part in says if part not in sentence] == [], sentence


def test_whole_checkpoints_are_taken(checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Old names and new, tied or not, packed or not; with the biases that GPTQ adds, with an lm_head stored twice."""
    untied = make_checkpoint(text=TEXT, vision=VISION, tied=False)
    for kind in ("awq", "gptq"):
        write_packed(untied, tmp_path / kind, kind)
        write_packed(untied, tmp_path / f"{kind}-new", kind, old=False)
    edit(lambda t: t.update({"lm_head.weight": torch.ones(640, 128)}))(checkpoint)
    for folder in (SHAPES_VL, untied, checkpoint, *sorted(tmp_path.glob("*q")), *sorted(tmp_path.glob("*-new"))):
        check_checkpoint(Checkpoint(folder))


def test_packed_layers_are_held_to_the_config(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    write_packed(make_checkpoint(text=TEXT, vision=VISION), tmp_path / "packed", "awq", old=False)
    configure(intermediate_size=512)(tmp_path / "packed")
    sentence = refusal(tmp_path / "packed")
    assert "qweight as [256, 128]" in sentence
    assert "[512, 128]" in sentence


def test_no_weight_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))
    check_checkpoint(Checkpoint(checkpoint))


def test_vocabularies_that_are_lists() -> None:
    """As unigram tokenizers have them: pairs of text and score."""
    stored = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": [{"id": 2, "content": "<x>"}]}
    assert tokens_of(stored) == {0: "<unk>", 1: "a", 2: "<x>"}


def test_room_on_the_disk_of_a_folder_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = namedtuple("usage", "total used free"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(10**10, 9 * 10**9, 10**9))
    check_disk(tmp_path / "a" / "b", 990_000_000, "it")
    assert asked == [tmp_path]
    with pytest.raises(CheckpointError, match=r"it would take 1\.00 GB in .*/a/b, and its disk has 1\.00 GB free"):
        check_disk(tmp_path / "a" / "b", 991_000_000, "it")
