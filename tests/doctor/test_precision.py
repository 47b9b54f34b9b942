"""Weight formats that are less accurate or larger than necessary, activations beyond float16, and valid bundles."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from faulty_bundles import LLMEXPORT, changed_bundle, convert_part, errors, file_findings, link_copy, run_checks
from hf2mnn.core.manifest import NAME
from hf2mnn.doctor.checks.precision import fp16_overflow, largest_activations
from hf2mnn.doctor.findings import Severity
from hf2mnn.mnn.bundle import DECODER, GRAPHS, PARTS, VISION, EngineSettings
from hf2mnn.mnn.convert import CUSTOM_OPERATORS, read_graph
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.variant import Choice
from hf2mnn.reference.golden import ACTIVATIONS
from hf2mnn.stages.quantize import quantize

FOUR = WeightFormat(4, 64)
TEXT_POINT = "model.language_model.layers.1.mlp.down_proj"
VISION_POINT = "model.visual.blocks.0.mlp.fc2"


@pytest.fixture(scope="module")
def make(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantizes the embedded model."""

    def build(decoder: WeightFormat = FOUR, vision: WeightFormat = WeightFormat(8, 64), **choice: object) -> Path:
        folder = tmp_path_factory.mktemp("quantized") / "bundle"
        chosen = Choice(decoder, vision, EngineSettings(), **choice)
        return quantize(results / "onnx", results / "graphs", folder, chosen, 1)

    return build


def test_wide_scales(make: Callable) -> None:
    (finding,) = file_findings(make(WeightFormat(4, 64, scale_bits=32, method="rtn"))).values()
    assert (finding.check, finding.severity) == ("scales_32_bit", Severity.ADVICE)
    assert "0.50 bits per weight" in finding.evidence


def test_vision_below_8_bits(make: Callable) -> None:
    bundle = make(vision=WeightFormat(4, 64))
    assert {f.check: f.severity for f in file_findings(bundle).values()} == {"vision_bits": Severity.WARNING}


def test_bits_that_a_plan_chose(results: Path) -> None:
    """The plan of the embedded model gives layers of the vision tower fewer than 8 bits, by their measured effect."""
    bundle = results / "bundles" / "mixed"
    assert min(weight.bits for weight in read_graph(bundle / VISION).weights()) < 8
    assert not file_findings(bundle)


def test_a_block_that_does_not_divide(results: Path, tmp_path: Path) -> None:
    """With blocks of 128, layers of 192 inputs get one scale per channel."""
    bundle = link_copy(results / "bundles" / "int8", tmp_path / "bundle")
    (bundle / NAME).unlink()
    model = onnx.load(results / "onnx" / "vision.onnx", load_external_data=False)
    quantized = (
        "--weightQuantBits=8",
        "--weightQuantBlock=128",
        "--weightQuantAsymmetric=1",
        "--weightQuantScaleBit=16",
    )
    convert_part(model, "vision", results / "onnx", bundle, (*quantized, CUSTOM_OPERATORS))
    (finding,) = file_findings(bundle).values()
    assert (finding.check, finding.severity) == ("block_per_channel", Severity.WARNING)
    assert "192 inputs; the block is 128" in finding.evidence


def test_one_scale_a_channel_everywhere(make: Callable) -> None:
    findings = file_findings(make(WeightFormat(4, 0)))
    assert {f.check: f.severity for f in findings.values()} == {"block_per_channel": Severity.ADVICE}


@pytest.fixture
def llmexport(tmp_path: Path) -> Path:
    return link_copy(LLMEXPORT, tmp_path / "bundle")


def test_bundle_of_llmexport(llmexport: Path) -> None:
    """It has 4 bits in a small vision tower, and float32 scales."""
    assert set(file_findings(llmexport)) == {"vision_bits", "scales_32_bit"}
    assert not errors(llmexport)
    os.link(llmexport / DECODER, llmexport / "alone.mnn")
    os.link(llmexport / f"{DECODER}.weight", llmexport / "alone.mnn.weight")
    assert set(file_findings(llmexport / "alone.mnn")) == {"scales_32_bit"}


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8", "int4", "int4-gptq", "mixed"])
def test_valid_bundles(results: Path, variant: str) -> None:
    assert not file_findings(results / "bundles" / variant, checkpoint=results / "checkpoint")


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_valid_bundles_of_other_methods(make: Callable, results: Path, method: str) -> None:
    """The rtn bundle has its embedding in lm_head."""
    bundle = make(WeightFormat(4, 64, method=method), embedding="lm_head" if method == "rtn" else "file")
    assert not file_findings(bundle, checkpoint=results / "checkpoint")


@pytest.mark.parametrize("stage", ["graphs", "onnx"])
def test_earlier_stages(results: Path, stage: str) -> None:
    assert not file_findings(results / stage)
    for part in PARTS:
        name = PARTS[part][1] if stage == "onnx" else GRAPHS[part][0]
        assert not errors(results / stage / name)


# Activations


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
        [fp16_overflow], changed_bundle(results / "bundles" / "int4", tmp_path / "bundle", config, reference=recorded)
    )
    assert [(finding.where, finding.severity) for finding in findings] == [entry[:2] for entry in expected]
    for finding, (*_, evidence) in zip(findings, expected, strict=True):
        assert evidence in finding.evidence


def test_the_embedded_model_fits(results: Path, tmp_path: Path) -> None:
    """Its activations are far below the range, and without a reference there is no finding."""
    assert max(largest_activations(results / "reference/evaluation").values()) < 2000
    without = changed_bundle(results / "bundles" / "int4", tmp_path / "without")
    assert run_checks([fp16_overflow], without) == []
