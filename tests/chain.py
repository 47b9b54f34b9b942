"""A short chain of stages: its evaluation set, and its commands as a person runs them by hand."""

from __future__ import annotations

import json
from pathlib import Path

from support import SHAPES_VL, run_cli


def few_examples(folder: Path, count: int, chosen: str = "evaluation") -> None:
    """The first examples of the embedded model's evaluation or calibration set."""
    whole = SHAPES_VL / chosen
    folder.mkdir()
    lines = (whole / "examples.jsonl").read_text().splitlines()[:count]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    for path in whole.iterdir():
        if path.name != "examples.jsonl":
            (folder / path.name).symlink_to(path)


def command(chain: Path, stage: str) -> list[object]:
    """Arguments of `hf2mnn` that make a stage of what is in `chain`, but for --out, which the report does not have."""
    return {
        "source": ["source", "--path", SHAPES_VL],
        "onnx": ["onnx", chain / "checkpoint"],
        "graphs": ["mnn", chain / "onnx"],
        "bundles/int4": [
            "quantize",
            chain / "onnx",
            chain / "graphs",
            "--decoder",
            json.dumps({"bits": 4, "block": 64}),
        ],
        "reference": ["reference", chain / "checkpoint", "--evaluation", chain / "few", "--max-new-tokens", 4],
        "evaluation/int4": [
            *("evaluate", "--reference", chain / "reference", "--onnx", chain / "onnx"),
            *("--bundle", chain / "bundles/int4"),
        ],
        "report": ["report", "few", chain, "--rows", json.dumps([{"name": "int4", "required": False, "gates": {}}])],
    }[stage]


def make_chain(folder: Path) -> Path:
    """source, onnx, graphs, mnn/int4, reference with a few examples, and eval/int4 in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    few_examples(folder / "few", 4)
    for stage in ("source", "onnx", "graphs", "bundles/int4", "reference", "evaluation/int4"):
        made = run_cli(*command(folder, stage), "--out", folder / stage)
        assert made.returncode == 0, made.stderr
    return folder
