"""What the engine does with a bundle becomes a finding, with its last words and the most likely cause."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from broken import broken
from hf2mnn.core.errors import ConversionError
from hf2mnn.doctor.patient import Bundle
from hf2mnn.doctor.run import STEPS, explain, run_bundle
from hf2mnn.mnn.bundle import convert_decoder
from hf2mnn.mnn.convert import WeightFormat

PROMPT = "What colour is it?"


@pytest.fixture(scope="module")
def sound(results: Path) -> Path:
    return results / "bundles" / "int4"


WIDE = {"hidden_size": 512}


def only(bundle: Bundle, time_limit: float = 60) -> Any:
    (finding,) = run_bundle(bundle, PROMPT, time_limit)
    return finding


def test_a_sound_bundle_answers(sound: Path, tmp_path: Path) -> None:
    """Also one without a manifest and without our key, as anybody's is."""
    assert run_bundle(broken(sound, tmp_path / "foreign", model={"hf2mnn": None}), PROMPT, 60) == []


def test_an_answer_to_what_a_small_model_does_not_know_is_no_finding(sound: Path, tmp_path: Path) -> None:
    """The command's own question: the embedded model says nothing, but of an image it does."""
    assert run_bundle(broken(sound, tmp_path / "sound"), "What is the capital of France?", 60) == []


def test_answers_that_are_empty_are_told_of(sound: Path, tmp_path: Path) -> None:
    """The template has the answer in it already."""
    template = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\nred"
    finding = only(broken(sound, tmp_path / "broken", model={"jinja": {"chat_template": template}}))
    assert (finding.check, finding.sentence) == ("run_empty", "the answers are empty")


def test_a_missing_file_is_named_by_the_engine(sound: Path, tmp_path: Path) -> None:
    finding = only(broken(sound, tmp_path / "broken", {"tokenizer_file": None}))
    assert finding.check == "run_load"
    assert finding.sentence.endswith("is not there or cannot be read")
    assert finding.evidence == "its last words: [Error]: tokenizer file not found: tokenizer.txt"


def test_weights_that_are_none_give_garbage_or_a_crash(results: Path, sound: Path, tmp_path: Path) -> None:
    """The engine says that it has loaded either. (In place of float weights that were cut off it reads what lay in
    memory, which gives another answer each time; here they are zero.)
    """
    size = (results / "bundles" / "fp32" / "llm.mnn.weight").stat().st_size
    files = {"llm.mnn.weight": bytes(size)}
    finding = only(broken(results / "bundles" / "fp32", tmp_path / "float", files=files))
    assert (finding.check, finding.evidence.partition(";")[0]) == (
        "run_garbage",
        "they are equal, not finite, or beyond 1e30",
    )
    finding = only(broken(sound, tmp_path / "packed", files={"llm.mnn.weight": b"version https://git-lfs"}))
    assert finding.check == "run_crash"
    assert "most likely a weight file is not there, shorter than the graph reads" in finding.sentence
    assert "Memory not Enough, can't extract IDST" in finding.evidence


def test_a_decoder_that_asks_for_its_cache_is_explained(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    with contextlib.suppress(ConversionError):
        convert_decoder(onnx_folder, tmp_path, 2, WeightFormat(), fuse=False)
    files = {name: (tmp_path / name).read_bytes() for name in ("llm.mnn", "llm.mnn.weight")}
    finding = only(broken(bundle, tmp_path / "broken", files=files))
    assert finding.check in ("run_load", "run_crash")
    assert "converted without --transformerFuse" in finding.sentence
    assert "past_key_values" in finding.evidence
    assert "--transformerFuse" in finding.cure


def test_a_crash_is_told_with_what_the_engine_was_doing(sound: Path, tmp_path: Path) -> None:
    # What it reads beyond its memory may carry it through a text with garbage, and end it at the image.
    found = {finding.check: finding for finding in run_bundle(broken(sound, tmp_path / "text", model=WIDE), PROMPT, 60)}
    assert found.keys() <= {"run_crash", "run_garbage", "run_repetition"}
    assert "most likely the sizes in the config are not the graph's" in found["run_crash"].sentence
    assert found["run_crash"].evidence.startswith("signal ")
    finding = only(broken(sound, tmp_path / "image", files={"visual.mnn.weight": None}))
    assert "dies while it looked at an image: most likely a weight file is not there" in finding.sentence


def test_a_hang_ends(sound: Path, tmp_path: Path) -> None:
    finding = only(broken(sound, tmp_path / "slow"), time_limit=0.05)
    assert (finding.check, finding.sentence) == (
        "run_hang",
        "the engine does not come to an end while it loaded the bundle",
    )


def test_a_template_that_is_rendered_otherwise_is_shown(sound: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if loop.index0 % 2 == 0 %}!{% endif %}{% endfor %}"
    findings = run_bundle(broken(sound, tmp_path / "odd", model={"jinja": {"chat_template": template}}), PROMPT, 60)
    assert findings[0].check == "run_template"
    # The engine takes `loop.index0 % 2` for `loop.index0`.
    assert findings[0].evidence.startswith(f"from character {len(PROMPT)} on the engine has '{PROMPT}Yes.!")


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("17 tensor [ past_key_values ] is input but not found", "without --transformerFuse"),
        ("3 tensor [ token_type_ids ] is input but not found", "other inputs or outputs"),
        ("[Error]: LLM weight file not found: llm.mnn.weight", "is not there"),
        ("Failed: magic number is wrong from: tokenizer.txt.", "tokenizer's file is none"),
        ("Can't open file:visual.mnn.weight", "weight file"),
        ("Can't open file:visual.mnn", "a .mnn file is not there"),
        ("Don't support type [GridSample]", "operators that this engine does not have"),
        ("Resize error for type = Raster, name = x", "not the graph's"),
        ("[Error]: Load module failed, please check model.", "not whole"),
        ("nothing that is known", STEPS["image"][1]),
    ],
)
def test_last_words_are_explained(said: str, cause: str) -> None:
    assert cause in explain(["something before", said], "image")[0]
