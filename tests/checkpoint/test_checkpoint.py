"""Checkpoint folders read without loading the model: missing, unsupported and truncated files are one-line errors.

An interrupted download is the usual case, and must not surface hours later as a wrong answer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf2mnn.checkpoint.folder import Checkpoint, checkpoint_files
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.checkpoint.weight_files import INDEX
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families import FAMILIES
from support import SHAPES_VL

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def check_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder).check()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def change(folder: Path, name: str, **changes: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    stored = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def remove_weights(folder: Path) -> None:
    for path in [folder / INDEX, *folder.glob("*.safetensors")]:
        path.unlink()


def truncate(folder: Path) -> None:
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:-1])


def write_pointer(folder: Path) -> None:
    (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def test_complete_checkpoint_passes(checkpoint: Path) -> None:
    Checkpoint(checkpoint).check()
    Checkpoint(SHAPES_VL).check()


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), ["config.json", "JSON", "again"]),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "JSON", "again"]),
        (lambda folder: (folder / "config.json").write_text("[]"), ["config.json is not a JSON object"]),
        (lambda folder: change(folder, "config.json", model_type="gemma"), ["'gemma'", *FAMILIES]),
        (lambda folder: change(folder, "config.json", model_type=None), ["model_type None", *FAMILIES]),
        (lambda folder: change(folder, "config.json", model_type=["qwen2_vl"]), ["config.json", *FAMILIES]),
        (remove_weights, ["has no *.safetensors", "save_pretrained"]),
        (write_pointer, [FIRST, "Git LFS pointer", "git lfs pull"]),
        (truncate, [FIRST, "not a complete safetensors file"]),
        (lambda folder: (folder / FIRST).write_bytes(b""), [FIRST, "not a complete safetensors file"]),
        (lambda folder: (folder / FIRST).unlink(), [FIRST, "is missing, but", INDEX]),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), [INDEX]),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"one": 1}}'), [INDEX]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["no tokenizer.json"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer.json", "JSON"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_names_file_and_fault(edit: Callable[[Path], object], parts: list[str], checkpoint: Path) -> None:
    edit(checkpoint)
    message = check_error(checkpoint)
    assert [part for part in parts if part not in message] == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in check_error(tmp_path / "nowhere")


def test_index_cannot_lead_out_of_the_folder(checkpoint: Path) -> None:
    """The index is untrusted: a path in it must not make a stage read, link or publish another file."""
    shutil.copyfile(checkpoint / FIRST, checkpoint.parent / "outside.safetensors")
    for name in ("../outside.safetensors", str(checkpoint.parent / "outside.safetensors")):
        (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"one": name}}))
        assert "not a safetensors file of its folder" in check_error(checkpoint)


def test_headers_of_the_files_override_the_index(checkpoint: Path) -> None:
    """An index may name the right files and assign tensors to the wrong ones."""
    index = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    swapped = {FIRST: SECOND, SECOND: FIRST}
    change(checkpoint, INDEX, weight_map={name: swapped[file] for name, file in index.items()})
    headers = Checkpoint(checkpoint).headers
    assert {name: tensor.path for name, tensor in headers.items()} == {
        n: checkpoint / file for n, file in index.items()
    }


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("eos", [7, [7, 8]], ids=["one", "two"])
def test_stop_ids_of_both_layouts(flat: bool, eos: int | list[int], checkpoint: Path) -> None:
    """Transformers 5 nests the decoder's settings; older checkpoints on hubs are flat."""
    stored = json.loads((checkpoint / "config.json").read_text())
    text = stored.pop("text_config") | {"eos_token_id": eos}
    stored = {**text, **stored} if flat else {**stored, "text_config": text}
    (checkpoint / "config.json").write_text(json.dumps(stored))
    (checkpoint / "generation_config.json").unlink()
    info = model_info(Checkpoint(checkpoint))
    assert info["stop_ids"] == ([eos] if isinstance(eos, int) else eos)
    assert info["num_key_value_heads"] == 2


def test_files_that_trigger_a_new_run(checkpoint: Path) -> None:
    """A changed shard triggers a new run; a changed README does not."""
    names = {Path(path).name for path in checkpoint_files(checkpoint)}
    assert {FIRST, "config.json", "tokenizer.json", INDEX} <= names
    assert not {"modeling_x.py", "pytorch_model.bin", "README.md"} & names
    assert checkpoint_files(None) == checkpoint_files("nowhere") == []
