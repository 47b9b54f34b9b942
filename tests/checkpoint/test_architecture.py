"""Building a checkpoint's architecture with transformers: errors for an invalid config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf2mnn.checkpoint.architecture import load_config, meta_model, transformers_errors
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "256"), ("num_hidden_layers", None)])
def test_invalid_config_is_a_one_line_error(checkpoint: Path, key: str, value: object) -> None:
    path = checkpoint / "config.json"
    content = json.loads(path.read_text())
    content["text_config"][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=key) as error:
        load_config(Checkpoint(checkpoint))
    assert "\n" not in str(error.value)


def test_lack_of_memory_is_not_an_error_of_the_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match="can't allocate"), transformers_errors(Checkpoint(checkpoint)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 55050240 bytes.")


def test_meta_model_has_shapes_without_values(checkpoint: Path) -> None:
    parameters = meta_model(Checkpoint(checkpoint)).state_dict()
    assert {value.device.type for value in parameters.values()} == {"meta"}
    assert parameters["lm_head.weight"].shape == (640, 128)
