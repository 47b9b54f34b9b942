"""A configuration with one fault has one finding, of the check for that fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from faulty_bundles import changed_bundle, run_checks
from hf2mnn.doctor.checks.config import CHECKS
from hf2mnn.doctor.findings import Severity

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
