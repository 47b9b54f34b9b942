"""Loading of checkpoints: problems that transformers only warns of are errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.reference.model import load_model
from support import SHAPES_VL

WEIGHT = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHAPES_VL, tmp_path / "checkpoint"))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_complete_checkpoint_loads(folder: Path) -> None:
    assert not load_model(Checkpoint(folder)).training


def test_a_missing_weight_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(CheckpointError, match=r"has no weight model\.language_model\.layers\.2\.mlp\."):
        load_model(Checkpoint(folder))


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:100].clone()}))
    with pytest.raises(CheckpointError, match="transformers cannot build the model of"):
        load_model(Checkpoint(folder))
