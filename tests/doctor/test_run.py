"""Failures of the engine become findings with its last output and the most likely cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from faulty_bundles import changed_bundle, convert_part
from hf2mnn.doctor.artifacts import Bundle
from hf2mnn.doctor.run import diagnose, run_bundle

PROMPT = "What colour is it?"


@pytest.fixture(scope="module")
def original(results: Path) -> Path:
    return results / "bundles" / "int4"


WIDE = {"hidden_size": 512}


def only_finding(bundle: Bundle, time_limit: float = 60) -> Any:
    (finding,) = run_bundle(bundle, PROMPT, time_limit)
    return finding


def test_a_valid_bundle_has_no_finding(original: Path, tmp_path: Path) -> None:
    """It needs neither a manifest nor the key "hf2mnn"."""
    assert run_bundle(changed_bundle(original, tmp_path / "foreign", model={"hf2mnn": None}), PROMPT, 60) == []


def test_one_empty_answer_is_no_finding(original: Path, tmp_path: Path) -> None:
    """The embedded model answers the default prompt with nothing, and an image with text."""
    assert run_bundle(changed_bundle(original, tmp_path / "valid"), "What is the capital of France?", 60) == []


def test_empty_answers(original: Path, tmp_path: Path) -> None:
    """The template contains the answer already."""
    template = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\nred"
    finding = only_finding(changed_bundle(original, tmp_path / "changed", model={"jinja": {"chat_template": template}}))
    assert (finding.check, finding.message) == ("run_empty", "the answers are empty")


def test_a_missing_file(original: Path, tmp_path: Path) -> None:
    finding = only_finding(changed_bundle(original, tmp_path / "changed", {"tokenizer_file": None}))
    assert finding.check == "run_load"
    assert finding.message.endswith("is missing or unreadable")
    assert finding.evidence == "its last output: [Error]: tokenizer file not found: tokenizer.txt"


def test_missing_weights_give_garbage_or_a_crash(results: Path, original: Path, tmp_path: Path) -> None:
    """The engine loads both bundles without an error.

    The float weights are zero: truncated ones would be read from uninitialized memory.
    """
    size = (results / "bundles" / "fp32" / "llm.mnn.weight").stat().st_size
    files = {"llm.mnn.weight": bytes(size)}
    finding = only_finding(changed_bundle(results / "bundles" / "fp32", tmp_path / "float", files=files))
    assert (finding.check, finding.evidence.partition(";")[0]) == (
        "run_garbage",
        "they are equal, not finite, or beyond 1e+30",
    )
    finding = only_finding(
        changed_bundle(original, tmp_path / "pointer", files={"llm.mnn.weight": b"version https://git-lfs"})
    )
    assert finding.check == "run_crash"
    assert "most likely a weight file is missing, truncated, or another model's" in finding.message
    assert "Memory not Enough, can't extract IDST" in finding.evidence


def test_a_decoder_with_the_cache_as_an_input(results: Path, bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(results / "onnx" / "decoder.onnx", load_external_data=False)
    convert_part(model, "decoder", results / "onnx", tmp_path, options=())
    files = {name: (tmp_path / name).read_bytes() for name in ("llm.mnn", "llm.mnn.weight")}
    finding = only_finding(changed_bundle(bundle, tmp_path / "changed", files=files))
    assert finding.check in ("run_load", "run_crash")
    assert "converted without --transformerFuse" in finding.message
    assert "past_key_values" in finding.evidence
    assert "--transformerFuse" in finding.cure


def test_a_crash_names_the_step(original: Path, tmp_path: Path) -> None:
    # Memory behind the embedding may let it answer the text with garbage, and crash at the image.
    findings = {
        finding.check: finding
        for finding in run_bundle(changed_bundle(original, tmp_path / "text", model=WIDE), PROMPT, 60)
    }
    assert findings.keys() <= {"run_crash", "run_garbage", "run_repetition"}
    assert "most likely sizes in the configuration differ from the graph" in findings["run_crash"].message
    assert findings["run_crash"].evidence.startswith("signal ")
    finding = only_finding(changed_bundle(original, tmp_path / "image", files={"visual.mnn.weight": None}))
    assert "crashes while answering a prompt with an image: most likely a weight file is missing" in finding.message


def test_the_time_limit(original: Path, tmp_path: Path) -> None:
    finding = only_finding(changed_bundle(original, tmp_path / "slow"), time_limit=0.05)
    assert (finding.check, finding.message) == (
        "run_hang",
        "the engine does not finish while loading the bundle",
    )


def test_a_template_that_is_rendered_differently(original: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if loop.index0 % 2 == 0 %}!{% endif %}{% endfor %}"
    findings = run_bundle(
        changed_bundle(original, tmp_path / "odd", model={"jinja": {"chat_template": template}}), PROMPT, 60
    )
    assert findings[0].check == "run_template"
    # The engine evaluates `loop.index0 % 2` as `loop.index0`.
    assert findings[0].evidence.startswith(f"from character {len(PROMPT)} on the engine has '{PROMPT}Yes.!")


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("17 tensor [ past_key_values ] is input but not found", "without --transformerFuse"),
        ("3 tensor [ token_type_ids ] is input but not found", "other inputs or outputs"),
        ("[Error]: LLM weight file not found: llm.mnn.weight", "is missing or unreadable"),
        ("Failed: magic number is wrong from: tokenizer.txt.", "tokenizer file is not a tokenizer"),
        ("Can't open file:visual.mnn.weight", "weight file"),
        ("Can't open file:visual.mnn", "a .mnn file is missing"),
        ("Don't support type [GridSample]", "operators that this engine does not implement"),
        ("Resize error for type = Raster, name = x", "differ from the graph"),
        ("[Error]: Load module failed, please check model.", "truncated, or not a model"),
    ],
)
def test_known_messages(line: str, cause: str) -> None:
    assert cause in diagnose(["another line", line]).cause


def test_an_unknown_message() -> None:
    assert diagnose(["an unknown message"]) is None
