"""A checkpoint folder that looks whole as long as it is not run, and is small enough to break in many ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from support import SHAPES_VL

COPIED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """shapes-vl's files around two shards with one small tensor each, and what a stage must never touch."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in COPIED:
        shutil.copyfile(SHAPES_VL / name, folder / name)
    shards = {"model-00001-of-00002.safetensors": "one", "model-00002-of-00002.safetensors": "two"}
    for file, tensor in shards.items():
        save_file({tensor: np.arange(64, dtype=np.float32)}, folder / file)
    index = {"weight_map": {tensor: file for file, tensor in shards.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "modeling_x.py").write_text("raise SystemExit('code of a stranger')\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "README.md").write_text("# A model\n")
    return folder
