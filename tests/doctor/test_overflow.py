"""Activations beyond the float16 range, with settings that allow float16 or do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from faulty_bundles import changed_bundle, run_checks
from hf2mnn.doctor.checks.overflow import CHECKS, largest_activations
from hf2mnn.doctor.findings import Severity
from hf2mnn.reference.golden import ACTIVATIONS

TEXT_POINT = "model.language_model.layers.1.mlp.down_proj"
VISION_POINT = "model.visual.blocks.0.mlp.fc2"


def reference(results: Path, folder: Path, sizes: dict[str, float]) -> Path:
    """Copy the recorded reference with other maxima of some tap points."""
    folder.mkdir()
    for path in (results / "reference/evaluation").iterdir():
        if path.name != ACTIVATIONS:
            (folder / path.name).symlink_to(path)
    with safe_open(results / "reference/evaluation" / ACTIVATIONS, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        metadata = file.metadata()
    for name, size in sizes.items():
        rows = tensors[f"image/{name}"].copy()
        rows[0, 0] = -size
        tensors[f"image/{name}"] = rows
    save_file(tensors, folder / ACTIVATIONS, metadata)
    return folder


@pytest.mark.parametrize(
    ("sizes", "config", "expected"),
    [
        ({TEXT_POINT: 70000.0}, {"precision": "low"}, [("config.json: precision", Severity.ERROR, "7e+04")]),
        ({TEXT_POINT: np.inf}, {"precision": "low"}, [("config.json: precision", Severity.ERROR, "inf")]),
        ({TEXT_POINT: 20000.0}, {"precision": "low"}, [("config.json: precision", Severity.WARNING, "2e+04")]),
        ({TEXT_POINT: 10000.0}, {"precision": "low"}, []),
        ({TEXT_POINT: 70000.0}, {"precision": "high"}, []),
        ({TEXT_POINT: 70000.0}, {"precision": "normal"}, []),
        (
            {TEXT_POINT: 70000.0},
            {"precision": "normal", "backend_type": "opencl"},
            [("config.json: precision", Severity.ERROR, "backend 'opencl'")],
        ),
        ({VISION_POINT: 70000.0}, {"precision": "low", "mllm": {"precision": "high"}}, []),
        (
            {VISION_POINT: 70000.0},
            {"precision": "high", "mllm": {"precision": "low"}},
            [("config.json: mllm.precision", Severity.ERROR, VISION_POINT)],
        ),
        # Without "mllm" the vision tower has the decoder's settings.
        (
            {VISION_POINT: 70000.0},
            {"precision": "low", "mllm": None},
            [("config.json: mllm.precision", Severity.ERROR, VISION_POINT)],
        ),
    ],
)
def test_fp16_overflow(
    sizes: dict[str, float], config: dict, expected: list[tuple], results: Path, tmp_path: Path
) -> None:
    recorded = reference(results, tmp_path / "reference", sizes)
    findings = run_checks(
        CHECKS, changed_bundle(results / "bundles" / "int4", tmp_path / "bundle", config, reference=recorded)
    )
    assert [(finding.where, finding.severity) for finding in findings] == [entry[:2] for entry in expected]
    for finding, (*_, evidence) in zip(findings, expected, strict=True):
        assert evidence in finding.evidence


def test_the_embedded_model_fits(results: Path, tmp_path: Path) -> None:
    """Its activations are far below the range, and without a reference there is no finding."""
    assert max(largest_activations(results / "reference/evaluation").values()) < 2000
    without = changed_bundle(results / "bundles" / "int4", tmp_path / "without")
    assert run_checks(CHECKS, without) == []
