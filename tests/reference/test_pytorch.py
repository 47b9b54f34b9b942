"""Reference outputs: greedy whatever the checkpoint's generation_config.json, and bit-identical with mapped weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.manifest import Manifest
from hf2mnn.reference.golden import ACTIVATIONS, TENSORS, Golden
from hf2mnn.reference.pytorch import ReferenceModel
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.reference import run as run_reference
from support import SHAPES_VL


@pytest.mark.parametrize("setting", [{"repetition_penalty": 5.0}, {"do_sample": True, "temperature": 9.0, "top_k": 5}])
def test_each_token_is_the_most_likely_one(make_checkpoint: Callable[..., Path], tmp_path: Path, setting: dict) -> None:
    """Transformers takes settings that a caller leaves out from generation_config.json: a penalty, or a temperature."""
    folder = shutil.copytree(
        make_checkpoint(text={"num_hidden_layers": 1, "layer_types": ["full_attention"]}), tmp_path / "c"
    )
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    output = ReferenceModel(Checkpoint(folder), max_new_tokens=12).generate(np.array([5, 6, 7, 5, 6, 7]), [])
    np.testing.assert_array_equal(output["answer_ids"], output["logits"].argmax(-1))


def test_mapped_weights_give_the_same_bytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, few = fetch_checkpoint(tmp_path / "checkpoint", SHAPES_VL), tmp_path / "few"
    few.mkdir()
    lines = (SHAPES_VL / "evaluation" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    (few / "examples.jsonl").write_text("\n".join(lines[:: len(lines) // 4]), encoding="utf-8")
    (few / "images").symlink_to(SHAPES_VL / "evaluation" / "images")
    resident, mapped = (
        Manifest.load(run_reference(source, few, tmp_path / weights, 8, 1, weights)) for weights in ("auto", "mapped")
    )
    for name in (TENSORS, ACTIVATIONS):
        assert resident.outputs[name] == mapped.outputs[name]
    assert [probe.kind for probe in Golden(resident.folder).probes()] == ["image", "text"]
    assert resident.settings == mapped.settings
    assert [manifest.results["weights"] for manifest in (resident, mapped)] == ["resident", "mapped"]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("PyTorch weights")]
    assert len(lines) == 2
    assert lines[0].startswith("PyTorch weights: resident (float32 weights need 1.5 GB, ")
    assert lines[1] == "PyTorch weights: mapped (set by --weights)"
