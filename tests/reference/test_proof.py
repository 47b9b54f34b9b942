"""The reference is compared with transformers' own model: a difference of a weight or of a computation is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import SHAPES, make_small
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.reference.proof import prove
from hf2mnn.reference.pytorch import ReferenceModel
from prequantized_layers import write_prequantized

KEY = "model.language_model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, with a vision tower."""
    return make_small(SHAPES["qwen2-vl"], tmp_path_factory.mktemp("qwen2-vl") / "saved")


def compare(reference: ReferenceModel, checkpoint: Checkpoint) -> dict[str, int]:
    images, parts = [], [{"type": "text", "text": "How many?"}]
    if reference.family.has_vision:
        pixels = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
        images, parts = [reference.preprocessor.process_image(Image.fromarray(pixels))], [{"type": "image"}, *parts]
    ids = reference.preprocessor.input_ids([{"role": "user", "content": parts}], images)
    return prove(reference, checkpoint, torch.from_numpy(ids), images)


@pytest.mark.parametrize(("family", "weights", "modules"), [("qwen2", 51, 7), ("qwen2.5-vl", 129, 15)])
def test_resident_and_mapped_weights_are_those_of_transformers(
    family: str, weights: int, modules: int, tmp_path: Path
) -> None:
    """All weights, and every block and other layer of decoder and vision tower."""
    checkpoint = Checkpoint(make_small(SHAPES[family], tmp_path / "saved"))
    resident, mapped = (ReferenceModel(checkpoint, 1, kind) for kind in ("resident", "mapped"))
    assert compare(resident, checkpoint) == {"weights": weights, "modules": 0}
    assert compare(mapped, checkpoint) == {"weights": weights, "modules": modules}


def test_dequantized_weights_are_compared(folder: Path, tmp_path: Path) -> None:
    write_prequantized(folder, tmp_path / "awq", "awq", group=16)
    checkpoint = Checkpoint(tmp_path / "awq")
    assert compare(ReferenceModel(checkpoint, 1), checkpoint) == {"weights": 70, "modules": 10}


def test_a_tensor_that_transformers_gives_another_parameter_is_reported(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    reference = ReferenceModel(checkpoint, 1, "resident")
    value = KEY.replace(".k_proj", ".v_proj")
    checkpoint.names[KEY] = checkpoint.names[value]
    with pytest.raises(CheckpointError, match=rf"{KEY} of the reference \(resident weights\) has other values"):
        compare(reference, checkpoint)


@pytest.mark.parametrize("part", ["model.visual.blocks.1", "model.language_model.layers.1", "lm_head"])
def test_a_weight_that_differs_is_reported(part: str, folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    reference = ReferenceModel(checkpoint, 1, "mapped")
    module = next(m for m in reference.model.get_submodule(part).modules() if hasattr(m, "stored"))
    module.stored = module.stored.clone()
    module.stored[0, 0] += 1
    with pytest.raises(CheckpointError, match=rf"{part}.*weight of the reference \(mapped weights\) has other values"):
        compare(reference, checkpoint)


def test_a_computation_that_differs_is_reported(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    reference = ReferenceModel(checkpoint, 1, "mapped")
    reference.decoder.layers[2].input_layernorm.variance_epsilon = 1e-3
    with pytest.raises(CheckpointError, match=r"model\.language_model\.layers\.2 of the reference .* other outputs"):
        compare(reference, checkpoint)
