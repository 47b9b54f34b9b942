"""Settings of image processing against the checkpoint, or against the bundle's own model.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from faulty_bundles import changed_bundle, run_checks
from hf2mnn.doctor.checks.image import CHECKS
from hf2mnn.mnn.convert import read_graph, write_graph

WRONG = {
    "mean": ({"image_mean": [127.5] * 3}, "image_normalization", "image_mean is [127.5"),
    "mean not times 255": ({"image_mean": [0.48145466, 0.4578275, 0.40821073]}, "image_normalization", "[0.48"),
    "norm": ({"image_norm": [1 / 127.5] * 3}, "image_normalization", "image_norm is [0.0078"),
    "start": ({"vision_start": 1}, "vision_ids", "vision_start is 1"),
    "end by default": ({"vision_end": None}, "vision_ids", "vision_end is 151858 (the engine default)"),
    "pad": ({"image_pad": 560}, "vision_ids", "image_pad is 560, the checkpoint's is 561"),
}


@pytest.mark.parametrize("known", ["checkpoint", "bundle", "without model.json"])
@pytest.mark.parametrize(("model", "check", "evidence"), WRONG.values(), ids=WRONG)
def test_wrong_settings(
    model: dict, check: str, evidence: str, known: str, bundle: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """A bundle without the key "hf2mnn" is compared with the checkpoint."""
    model = model | ({"hf2mnn": None} if known == "without model.json" else {})
    checkpoint = None if known == "bundle" else checkpoint_folder
    (finding,) = run_checks(CHECKS, changed_bundle(bundle, tmp_path / "changed", model=model, checkpoint=checkpoint))
    assert finding.check == check
    assert evidence in finding.evidence


@pytest.mark.parametrize("key", ["patch_size", "merge_size", "min_pixels", "max_pixels", "image_std"])
def test_sizes_in_model_json_that_differ_from_the_checkpoint(
    key: str, bundle: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_folder, changed, symlinks=True)
    path = changed / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(settings | {key: [0.5] * 3 if key == "image_std" else 28}))
    findings = run_checks(CHECKS, changed_bundle(bundle, tmp_path / "valid", checkpoint=changed))
    assert f"hf2mnn.{key}" in findings[-1].where or key in {finding.evidence.split()[0] for finding in findings}
    assert {finding.check for finding in findings} <= {"image_sizes", "image_normalization"}


def test_a_tower_for_patches_of_another_size(bundle: Path, tmp_path: Path) -> None:
    graph = read_graph(bundle / "visual.mnn")
    (patches,) = [op for op in graph.of_type("Input") if op["name"] == "patches"]
    patches["main"]["dims"][-1] = 1536
    write_graph(graph, tmp_path / "visual.mnn")
    changed = changed_bundle(bundle, tmp_path / "changed", files={"visual.mnn": (tmp_path / "visual.mnn").read_bytes()})
    (finding,) = run_checks(CHECKS, changed)
    assert (finding.check, finding.where) == ("image_sizes", "visual.mnn: patches")
    assert "reads 1536 values per patch, the engine feeds 1176" in finding.evidence


def test_engine_defaults_that_match_the_checkpoint(bundle: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    """The default mean and norm are CLIP's, which this checkpoint has, too."""
    model = {"image_mean": None, "image_norm": None}
    assert (
        run_checks(CHECKS, changed_bundle(bundle, tmp_path / "bare", model=model, checkpoint=checkpoint_folder)) == []
    )
