"""The embedded model with a few examples, converted and quantized once: a folder as the pipeline leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.quant.variant import Choice
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import run as quantize
from hf2mnn.stages.reference import run as run_reference
from support import SHAPES_VL, float_bundle

CATEGORIES = {
    "object": 3,
    "colour": 3,
    "count": 3,
    "describe": 3,
    "digit": 2,
    "sum": 2,
    "translate": 1,
    "resized": 1,
    "turns": 1,
    "two images": 1,
    "free text": 1,
}
"""How many examples of each category are taken: 5 without an image, one with two."""


def few_examples(destination: Path) -> Path:
    """An evaluation set of the first examples of each category."""
    whole, left, chosen = SHAPES_VL / "evaluation", dict(CATEGORIES), []
    for line in (whole / "examples.jsonl").read_text(encoding="utf-8").splitlines():
        category = json.loads(line)["category"]
        if left.get(category):
            left[category] -= 1
            chosen.append(line)
    assert not any(left.values())
    destination.mkdir()
    (destination / "examples.jsonl").write_text("\n".join(chosen), encoding="utf-8")
    (destination / "images").symlink_to(whole / "images")
    return destination


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/shapes-vl with source, reference, onnx and the bundles float, fp32 and int4. Tests only add to it."""
    folder = tmp_path_factory.mktemp("evaluated") / "results" / "shapes-vl"
    source = fetch_checkpoint(folder / "checkpoint", SHAPES_VL)
    run_reference(source, few_examples(folder / "evaluation"), folder / "reference", max_new_tokens=16, threads=1)
    onnx, bundle = export_onnx(source, folder / "onnx"), float_bundle(folder / "onnx", folder / "bundles" / "float")
    quantize(onnx, bundle, folder / "bundles" / "fp32", Choice(WeightFormat(), WeightFormat(), EngineSettings()), 1)
    packed = EngineSettings(precision="low", memory="low")
    quantize(onnx, bundle, folder / "bundles" / "int4", Choice(WeightFormat(4, 64), WeightFormat(8), packed), 1)
    return folder
