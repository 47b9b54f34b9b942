"""A short chain of stages on the embedded model, and the commands that run them."""

from __future__ import annotations

import json
from pathlib import Path

from support import SHAPES_VL, run_cli

STAGES = ("checkpoint", "onnx", "graphs", "bundles/int4", "reference/evaluation", "evaluation/int4")
"""Folders of the chain, in the order in which they are made."""


def few_examples(folder: Path, count: int, name: str = "evaluation") -> None:
    """Write the first examples of the embedded model's evaluation or calibration set to `folder`."""
    source = SHAPES_VL / name
    folder.mkdir()
    lines = (source / "examples.jsonl").read_text().splitlines()[:count]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    for path in source.iterdir():
        if path.name != "examples.jsonl":
            (folder / path.name).symlink_to(path)


def command(chain: Path, stage: str) -> list[object]:
    """Return the arguments of `hf2mnn` for one of STAGES or "report", with inputs from `chain` and without --out."""
    reference, onnx = chain / "reference/evaluation", chain / "onnx"
    weights, variants = {"bits": 4, "block": 64}, [{"name": "int4", "required": False, "gates": {}}]
    return {
        "checkpoint": ["fetch", "--path", SHAPES_VL],
        "onnx": ["export", chain / "checkpoint"],
        "graphs": ["convert", onnx],
        "bundles/int4": ["quantize", onnx, chain / "graphs", "--decoder", json.dumps(weights)],
        "reference/evaluation": [
            *("reference", chain / "checkpoint", "--examples", chain / "few", "--max-new-tokens", 4),
        ],
        "evaluation/int4": [
            *("evaluate", "--reference", reference, "--onnx", onnx, "--bundle", chain / "bundles/int4"),
        ],
        "report": ["report", "few", chain, "--variants", json.dumps(variants)],
    }[stage]


def make_chain(folder: Path) -> Path:
    """Run STAGES with a few examples in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    few_examples(folder / "few", 4)
    for stage in STAGES:
        process = run_cli(*command(folder, stage), "--out", folder / stage)
        assert process.returncode == 0, process.stderr
    return folder
