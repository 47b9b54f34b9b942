"""One small checkpoint with random weights, its graphs and its bundle: for the converter and for the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf2mnn.mnn.stages import convert_float
from hf2mnn.onnx.export import export_onnx
from hf2mnn.source.fetch import fetch_source

TEXT = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 10000.0, "rope_type": "default"},
}
VISION = {"depth": 1, "embed_dim": 96, "num_heads": 3}


@pytest.fixture(scope="session")
def source_folder(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = make_checkpoint(text=TEXT, vision=VISION, tied=False)
    return fetch_source(tmp_path_factory.mktemp("source") / "source", checkpoint)


@pytest.fixture(scope="session")
def onnx_folder(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `onnx` stage's folder. Tests only read it."""
    return export_onnx(source_folder, tmp_path_factory.mktemp("onnx") / "onnx")


@pytest.fixture(scope="session")
def bundle(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 bundle. Tests only read it."""
    return convert_float(onnx_folder, tmp_path_factory.mktemp("mnn") / "float")
