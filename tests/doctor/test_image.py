"""Settings by which an image is read: against the checkpoint, or against what hf2mnn has noted of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from broken import broken, found
from hf2mnn.doctor.checks.image import CHECKS
from hf2mnn.mnn.convert import read_graph, write_graph

WRONG = {
    "mean": ({"image_mean": [127.5] * 3}, "image_normalization", "image_mean is [127.5"),
    "mean not times 255": ({"image_mean": [0.48145466, 0.4578275, 0.40821073]}, "image_normalization", "[0.48"),
    "norm": ({"image_norm": [1 / 127.5] * 3}, "image_normalization", "image_norm is [0.0078"),
    "start": ({"vision_start": 1}, "vision_ids", "vision_start is 1"),
    "end by default": ({"vision_end": None}, "vision_ids", "vision_end is 151858 (the engine's default)"),
    "pad": ({"image_pad": 560}, "vision_ids", "image_pad is 560, the checkpoint's is 561"),
}


@pytest.mark.parametrize("known", ["by the checkpoint", "by the bundle", "foreign"])
@pytest.mark.parametrize(("model", "check", "evidence"), WRONG.values(), ids=WRONG)
def test_a_wrong_setting_is_found(
    model: dict, check: str, evidence: str, known: str, bundle: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """A foreign bundle has no key of ours, so that only the checkpoint tells."""
    model = model | ({"hf2mnn": None} if known == "foreign" else {})
    checkpoint = None if known == "by the bundle" else checkpoint_folder
    (finding,) = found(CHECKS, broken(bundle, tmp_path / "broken", model=model, checkpoint=checkpoint))
    assert finding.check == check
    assert evidence in finding.evidence


@pytest.mark.parametrize("key", ["patch_size", "merge_size", "min_pixels", "max_pixels", "image_std"])
def test_sizes_that_the_bundle_notes_are_the_checkpoints(
    key: str, bundle: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_folder, changed, symlinks=True)
    path = changed / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(settings | {key: [0.5] * 3 if key == "image_std" else 28}))
    findings = found(CHECKS, broken(bundle, tmp_path / "sound", checkpoint=changed))
    assert f"hf2mnn.{key}" in findings[-1].where or key in {finding.evidence.split()[0] for finding in findings}
    assert {finding.check for finding in findings} <= {"image_sizes", "image_normalization"}


def test_a_tower_for_patches_of_another_size_is_found(bundle: Path, tmp_path: Path) -> None:
    graph = read_graph(bundle / "visual.mnn")
    (patches,) = [op for op in graph.of_type("Input") if op["name"] == "patches"]
    patches["main"]["dims"][-1] = 1536
    write_graph(graph, tmp_path / "visual.mnn")
    changed = broken(bundle, tmp_path / "broken", files={"visual.mnn": (tmp_path / "visual.mnn").read_bytes()})
    (finding,) = found(CHECKS, changed)
    assert (finding.check, finding.where) == ("image_sizes", "visual.mnn: patches")
    assert "reads 1536 values a patch, the engine gives 1176" in finding.evidence


def test_the_engine_defaults_are_those_of_its_model(bundle: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    """Left out, mean and norm are CLIP's, which are this checkpoint's too: no alarm."""
    model = {"image_mean": None, "image_norm": None}
    assert found(CHECKS, broken(bundle, tmp_path / "bare", model=model, checkpoint=checkpoint_folder)) == []
