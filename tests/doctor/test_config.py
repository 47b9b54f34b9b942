"""A configuration with one fault has one finding, of the check for that fault; settings of image processing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from faulty_bundles import changed_bundle, run_checks
from hf2mnn.doctor.checks.config import CHECKS
from hf2mnn.doctor.findings import Severity
from hf2mnn.mnn.convert import read_graph, write_graph

WRONG: dict[str, tuple[dict[str, Any], str, str, Severity]] = {
    "no config.json": ({"files": {"config.json": None}}, "config_unreadable", "has no config.json", Severity.ERROR),
    "config.json is cut short": (
        {"files": {"config.json": b'{"llm_model": "llm.mn'}},
        "config_unreadable",
        "Unterminated string",
        Severity.ERROR,
    ),
    "no llm_config.json": (
        {"files": {"llm_config.json": None}},
        "config_unreadable",
        "has no llm_config.json",
        Severity.ERROR,
    ),
    "llm_config.json is a list": (
        {"files": {"llm_config.json": b"[]"}},
        "config_unreadable",
        "holds no JSON object",
        Severity.ERROR,
    ),
    "tokenizer by default": (
        {"config": {"tokenizer_file": None}},
        "file_missing",
        "has no tokenizer_file, and the engine's default is tokenizer.txt",
        Severity.ERROR,
    ),
    "tokenizer named wrongly": (
        {"config": {"tokenizer_file": "tokenizer.model"}},
        "file_missing",
        "names tokenizer.model",
        Severity.ERROR,
    ),
    "no embedding": ({"files": {"embeddings_bf16.bin": None}}, "file_missing", "embeddings_bf16.bin", Severity.ERROR),
    "no decoder": ({"files": {"llm.mnn": None}}, "file_missing", "names llm.mnn", Severity.ERROR),
    "out of the folder": (
        {"config": {"embedding_file": "../embeddings_bf16.bin"}, "files": {}},
        "path_outside",
        "'../embeddings_bf16.bin'",
        Severity.ERROR,
    ),
    "another folder": ({"config": {"base_dir": "elsewhere/"}}, "path_outside", "'elsewhere/'", Severity.ERROR),
    "no vision tower": ({"files": {"visual.mnn": None}}, "vision_missing", "visual.mnn is missing", Severity.ERROR),
    "vision left out": ({"model": {"is_visual": False}}, "vision_missing", "is_visual is false", Severity.ERROR),
    "no attention_mask": (
        {"model": {"attention_mask": None}},
        "attention_mask",
        "attention_mask is 'int' (the default), the graph's input is DT_FLOAT",
        Severity.ERROR,
    ),
    "hidden_size": (
        {"model": {"hidden_size": 512}},
        "config_differs",
        "has 512, the graph has 256",
        Severity.ERROR,
    ),
    "layer_nums": ({"model": {"layer_nums": None}}, "config_differs", "has 32, the graph has 4", Severity.WARNING),
    "key_value_shape": (
        {"model": {"key_value_shape": [2, 1, 0, 4, 16]}},
        "config_differs",
        "the graph has 128",
        Severity.ADVICE,
    ),
    "is_mrope": ({"model": {"is_mrope": None}}, "mrope", "position_ids is [3, tokens]", Severity.ERROR),
    "precision": ({"config": {"precision": "fp16"}}, "setting_unknown", '"fp16"; it knows low', Severity.WARNING),
    "memory": ({"config": {"memory": 2}}, "setting_unknown", "2; it knows low", Severity.WARNING),
    "backend": ({"config": {"backend_type": "gpu"}}, "setting_unknown", '"gpu"; it knows cpu', Severity.WARNING),
    "vision's precision": (
        {"config": {"mllm": {"precision": "fp32"}}},
        "setting_unknown",
        '"fp32"; it knows low',
        Severity.WARNING,
    ),
    "sampler": ({"config": {"sampler_type": "beam"}}, "setting_unknown", '"beam"; it knows greedy', Severity.WARNING),
}


@pytest.mark.parametrize(("change", "check", "evidence", "severity"), WRONG.values(), ids=WRONG)
def test_one_fault_has_one_finding(
    change: dict[str, Any], check: str, evidence: str, severity: Severity, bundle: Path, tmp_path: Path
) -> None:
    (finding,) = run_checks(CHECKS, changed_bundle(bundle, tmp_path / "changed", **change))
    assert (finding.check, finding.severity) == (check, severity)
    assert evidence in finding.evidence


def test_the_cure_of_a_missing_tokenizer_names_the_existing_file(bundle: Path, tmp_path: Path) -> None:
    (finding,) = run_checks(CHECKS, changed_bundle(bundle, tmp_path / "changed", {"tokenizer_file": None}))
    assert finding.cure == 'set "tokenizer_file": "tokenizer.mtok" in config.json: that file exists'


def test_a_valid_configuration_has_no_finding(bundle: Path, tmp_path: Path) -> None:
    assert (
        run_checks(
            CHECKS, changed_bundle(bundle, tmp_path / "valid", {"backend_type": "opencl", "precision": "normal"})
        )
        == []
    )


# Image processing

IMAGE_SETTINGS = {
    "mean": ({"image_mean": [127.5] * 3}, "image_normalization", "image_mean is [127.5"),
    "mean not times 255": ({"image_mean": [0.48145466, 0.4578275, 0.40821073]}, "image_normalization", "[0.48"),
    "norm": ({"image_norm": [1 / 127.5] * 3}, "image_normalization", "image_norm is [0.0078"),
    "start": ({"vision_start": 1}, "vision_ids", "vision_start is 1"),
    "end by default": ({"vision_end": None}, "vision_ids", "vision_end is 151858 (the engine default)"),
    "pad": ({"image_pad": 560}, "vision_ids", "image_pad is 560, the checkpoint's is 561"),
}


@pytest.mark.parametrize("known", ["checkpoint", "bundle", "without model.json"])
@pytest.mark.parametrize(("model", "check", "evidence"), IMAGE_SETTINGS.values(), ids=IMAGE_SETTINGS)
def test_image_settings_of_another_model(
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
