"""Activations that do not fit into half floats are told of where they would be computed in half floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from broken import broken, found
from hf2mnn.doctor.checks.overflow import CHECKS, largest_activations
from hf2mnn.doctor.finding import Severity
from hf2mnn.reference.golden import ACTIVATIONS

POINT = "model.language_model.layers.1.mlp.down_proj"
SEEN = "model.visual.blocks.0.mlp.fc2"


def reference(results: Path, folder: Path, sizes: dict[str, float]) -> Path:
    """The recorded reference, with other largest values of some points."""
    folder.mkdir()
    for path in (results / "reference/evaluation").iterdir():
        if path.name != ACTIVATIONS:
            (folder / path.name).symlink_to(path)
    with safe_open(results / "reference/evaluation" / ACTIVATIONS, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        metadata = file.metadata()
    for name, size in sizes.items():
        rows = tensors[f"image/{name}"].copy()
        rows[0, 0] = -size
        tensors[f"image/{name}"] = rows
    save_file(tensors, folder / ACTIVATIONS, metadata)
    return folder


@pytest.mark.parametrize(
    ("sizes", "config", "told"),
    [
        ({POINT: 70000.0}, {"precision": "low"}, [("config.json: precision", Severity.ERROR, "7e+04")]),
        ({POINT: np.inf}, {"precision": "low"}, [("config.json: precision", Severity.ERROR, "inf")]),
        ({POINT: 20000.0}, {"precision": "low"}, [("config.json: precision", Severity.WARNING, "2e+04")]),
        ({POINT: 10000.0}, {"precision": "low"}, []),
        ({POINT: 70000.0}, {"precision": "high"}, []),
        ({POINT: 70000.0}, {"precision": "normal"}, []),
        (
            {POINT: 70000.0},
            {"precision": "normal", "backend_type": "opencl"},
            [("config.json: precision", Severity.ERROR, "backend 'opencl'")],
        ),
        ({SEEN: 70000.0}, {"precision": "low", "mllm": {"precision": "high"}}, []),
        (
            {SEEN: 70000.0},
            {"precision": "high", "mllm": {"precision": "low"}},
            [("config.json: mllm.precision", Severity.ERROR, SEEN)],
        ),
        # Without "mllm" the vision tower runs by the decoder's settings.
        ({SEEN: 70000.0}, {"precision": "low", "mllm": None}, [("config.json: mllm.precision", Severity.ERROR, SEEN)]),
    ],
)
def test_what_does_not_fit_is_told(
    sizes: dict[str, float], config: dict, told: list[tuple], results: Path, tmp_path: Path
) -> None:
    recorded = reference(results, tmp_path / "reference", sizes)
    findings = found(CHECKS, broken(results / "bundles" / "int4", tmp_path / "bundle", config, reference=recorded))
    assert [(finding.where, finding.severity) for finding in findings] == [entry[:2] for entry in told]
    for finding, (*_, evidence) in zip(findings, told, strict=True):
        assert evidence in finding.evidence


def test_the_embedded_model_fits(results: Path, tmp_path: Path) -> None:
    """By far: what is told of is not near to its values."""
    assert max(largest_activations(results / "reference/evaluation").values()) < 2000
    without = broken(results / "bundles" / "int4", tmp_path / "without")
    assert found(CHECKS, without) == []
