"""Hostile checkpoints: no code of theirs runs, no path leads out of the folder, no size exceeds the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.preflight import check_checkpoint
from hf2mnn.checkpoint.tensors import layout
from hf2mnn.checkpoint.weight_files import INDEX
from hf2mnn.core.errors import CheckpointError
from hf2mnn.stages.fetch import run as fetch_checkpoint

FIRST = "model-00001-of-00002.safetensors"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(Checkpoint(folder))
    return str(error.value)


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


# Code


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "pytorch_model-1.bin"])
def test_pickled_weights_alone_are_refused_with_advice(name: str, checkpoint: Path) -> None:
    for path in [checkpoint / INDEX, checkpoint / "pytorch_model.bin", *checkpoint.glob("*.safetensors")]:
        path.unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Trap(checkpoint / "trapped")))
    message = check_error(checkpoint)
    assert f"({name})" in message
    assert "weights_only=True).save_pretrained" in message
    assert not (checkpoint / "trapped").exists()


def test_pickled_weights_that_an_index_names_are_refused(checkpoint: Path) -> None:
    change(checkpoint / INDEX, weight_map={"lm_head.weight": "pytorch_model.bin"})
    assert "names pytorch_model.bin, not a safetensors file" in check_error(checkpoint)


@pytest.mark.parametrize("indexed", [True, False])
def test_pickled_weights_beside_safetensors_are_never_read(indexed: bool, checkpoint: Path, tmp_path: Path) -> None:
    """Without an index, transformers finds no safetensors and would load the pickle."""
    from hf2mnn.reference.model import load_model

    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    if not indexed:
        (checkpoint / INDEX).unlink()
        assert f"transformers loads model.safetensors or the files of {INDEX}" in check_error(checkpoint)
        return
    source = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    assert not (source / "pytorch_model.bin").exists()
    load_model(Checkpoint(checkpoint))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "configuration_x.X"}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["other/repo--tokenization_x.X", None]}}, "auto_map"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "processing_x.X"}}, "auto_map"),
        ("config.json", {"attn_implementation": "owner/kernels"}, "attn_implementation"),
        ("config.json", {"vision_config": {"_attn_implementation": {"": "owner/kernels:f"}}}, "_attn_implementation"),
    ],
)
def test_remote_code_is_refused(name: str, changes: dict[str, Any], key: str, checkpoint: Path) -> None:
    change(checkpoint / name, **changes)
    message = check_error(checkpoint)
    assert name in message
    assert f"remove {key} from the file" in message


# Paths


def test_link_out_of_the_folder_is_refused_but_not_a_hubs_cache(checkpoint: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for index, path in enumerate(sorted(checkpoint.iterdir())):
        blob = blobs / f"{index:064x}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    check_checkpoint(Checkpoint(snapshot))
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (snapshot / "chat_template.jinja").unlink(missing_ok=True)
    (snapshot / "chat_template.jinja").symlink_to(secret)
    assert "a link to" in check_error(snapshot)


def test_named_pipe_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    assert "is not a regular file" in check_error(checkpoint)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", "a\0.safetensors", "x" * 300]
)
def test_an_index_names_only_safetensors_of_its_folder(name: str, checkpoint: Path) -> None:
    change(checkpoint / INDEX, weight_map={"lm_head.weight": name})
    assert INDEX in check_error(checkpoint)


def test_tensor_in_two_files_is_refused(checkpoint: Path) -> None:
    """PyTorch would load one of them, and the conversion the other."""
    shutil.copyfile(checkpoint / FIRST, checkpoint / "other.safetensors")
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    change(checkpoint / INDEX, weight_map=weight_map | {"x": "other.safetensors"})
    assert "both hold" in check_error(checkpoint)


# Sizes


def tensors(header: Any, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        tensors({"a": entry()}, length=1 << 60),
        tensors({"a": entry()}, length=(1 << 64) - 1),
        tensors({"a": entry()}, length=99_999_999),
        tensors({"a": entry(shape=[1 << 62, 1 << 62, 16])}),
        tensors({"a": entry(shape=[1 << 32, 1 << 32])}),
        tensors({"a": entry(offsets=[0, 1 << 40])}),
        tensors({"a": entry(offsets=[24, 0])}),
        tensors({"a": entry(offsets=[-24, 0])}),
        tensors({"a": entry(shape=[-2, -3])}),
        tensors({"a": entry(shape=[2.0, 3])}),
        tensors({"a": entry(shape=[True, 6])}),
        tensors({"a": entry("BF16")}),
        tensors({"a": entry(), "b": entry(offsets=[0, 24])}),
        tensors({"a": entry(), "b": entry("U8", [12], [12, 24])}),
        tensors({"a": entry(offsets=[0])}),
        tensors({"a": entry(shape="23")}),
        tensors({"a": 1}),
        tensors([]),
        tensors(b'{"a": ' + b"[" * 5000),
        tensors(json.dumps({"a": entry()}).encode()[:-1] + b', "a": ' + json.dumps(entry()).encode() + b"}"),
        tensors(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}'),
        b"\x01",
        b"",
    ],
    ids=range(23),
)
def test_invalid_header_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        layout(path)
    path.write_bytes(tensors({"a": entry(), "__metadata__": {"format": "pt"}}))
    assert list(layout(path)) == ["a"]


@pytest.mark.parametrize(
    ("text", "vision", "part"),
    [
        ({"num_hidden_layers": 10**9}, {}, "has 1000000000 layers"),
        ({}, {"depth": 10**9}, "has 1000000000 layers"),
        ({"num_hidden_layers": 2**40, "layer_types": None}, {}, "has 1099511627776 layers"),
        ({"num_attention_heads": 0}, {}, "division or modulo by zero"),
        ({"vocab_size": "640"}, {}, "'vocab_size' expected int, got str (value: '640')"),
        ({"vocab_size": True}, {}, "'vocab_size' expected int, got bool (value: True)"),
        ({"hidden_size": 128.5}, {}, "'hidden_size' expected int, got float (value: 128.5)"),
    ],
)
def test_impossible_size_is_refused(text: dict[str, Any], vision: dict[str, Any], part: str, checkpoint: Path) -> None:
    stored = json.loads((checkpoint / "config.json").read_text())
    change(
        checkpoint / "config.json",
        text_config=stored["text_config"] | text,
        vision_config=stored["vision_config"] | vision,
    )
    assert part in check_error(checkpoint)
