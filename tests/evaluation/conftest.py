"""The embedded model with a few examples, converted and quantized once for all workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.variant import Choice
from hf2mnn.stages.baseline import run as run_baseline
from hf2mnn.stages.convert import run as convert_graphs
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import quantize
from hf2mnn.stages.reference import run as run_reference
from support import SHAPES_VL

EXAMPLES = {
    *("object-00", "colour-01", "count-00", "describe-00", "digit-01", "sum-00", "translate-00"),
    *("resized-0", "turns-0", "two-0", "free-0"),
}
"""Examples of the evaluation set: three without an image, one with two."""


def few_examples(destination: Path) -> Path:
    """Write an evaluation set of EXAMPLES."""
    whole = SHAPES_VL / "evaluation"
    lines = (whole / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if json.loads(line)["id"] in EXAMPLES]
    assert len(chosen) == len(EXAMPLES)
    destination.mkdir()
    (destination / "examples.jsonl").write_text("\n".join(chosen), encoding="utf-8")
    (destination / "images").symlink_to(whole / "images")
    return destination


def make_shapes(folder: Path) -> None:
    """Run the stages up to the bundles fp32 and int4 and the baseline."""
    folder.mkdir(parents=True)
    checkpoint = fetch_checkpoint(folder / "checkpoint", SHAPES_VL)
    reference = run_reference(
        checkpoint,
        few_examples(folder / "evaluation-set"),
        folder / "reference" / "evaluation",
        max_new_tokens=16,
        threads=1,
    )
    onnx = export_onnx(checkpoint, folder / "onnx")
    graphs = convert_graphs(onnx, folder / "graphs")
    (folder / "bundles").mkdir()
    exact, low = EngineSettings(), EngineSettings(precision="low", memory="low")
    quantize(onnx, graphs, folder / "bundles" / "fp32", Choice(WeightFormat(), WeightFormat(), exact), 1)
    quantize(onnx, graphs, folder / "bundles" / "int4", Choice(WeightFormat(4, 64), WeightFormat(8), low), 1)
    run_baseline(reference, onnx, graphs, folder / "baseline", threads=1, time_limit=120)


@pytest.fixture(scope="session")
def shapes(make_once: Callable[..., Path]) -> Path:
    """results/shapes-vl up to the baseline. Tests only read it."""
    return make_once("evaluated", lambda folder: make_shapes(folder / "shapes-vl")) / "shapes-vl"


@pytest.fixture(scope="session")
def int8(onnx_folder: Path, graphs: Path, make_once: Callable[..., Path]) -> Path:
    """An int8 bundle of the small checkpoint. Tests only read it."""
    choice = Choice(WeightFormat(8, 32), WeightFormat(8), EngineSettings(precision="low", memory="low", threads=3))
    return make_once("int8", lambda folder: quantize(onnx_folder, graphs, folder / "int8", choice, 1)) / "int8"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the float32 bundle of the small checkpoint, to change."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))
