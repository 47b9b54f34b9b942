"""What transformers only warns of: a weight that is not there is drawn at random, and the reference would be noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.reference.model import load_config, load_model, refused_as_source
from support import SHAPES_VL

WEIGHT = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHAPES_VL, tmp_path / "checkpoint"))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["text_config"][key] = value
    path.write_text(json.dumps(content))


def test_whole_checkpoint_loads(folder: Path) -> None:
    assert not load_model(Checkpoint(folder)).training


def test_missing_weight_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(CheckpointError, match=r"holds no weight for model\.language_model\.layers\.2\.mlp\."):
        load_model(Checkpoint(folder))


def test_weight_of_another_shape_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:100].clone()}))
    with pytest.raises(CheckpointError, match="transformers makes no model of"):
        load_model(Checkpoint(folder))


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "256"), ("num_hidden_layers", None)])
def test_config_that_describes_no_model_is_one_sentence(folder: Path, key: str, value: object) -> None:
    edit_config(folder, key, value)
    with pytest.raises(CheckpointError, match=key) as refused:
        load_config(Checkpoint(folder))
    assert "\n" not in str(refused.value)


def test_memory_that_runs_out_is_not_the_checkpoints_fault(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="can't allocate"), refused_as_source(Checkpoint(folder)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 55050240 bytes.")
