"""The convert stage compares tokenizers: faults stop it, documented differences are named by kind and script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.tokenizer import encode_tokenizer
from hf2mnn.mnn.tokenizer_probe import compare_tokenizers, make_probes
from support import SHAPES_VL

DOCUMENTED = {("marks", "COMBINING"), ("control", "")}
"""Kinds in which the tokenizers of Qwen may differ."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.mtok").write_bytes(encode_tokenizer(SHAPES_VL))
    return tmp_path / "tokenizer.mtok"


def test_differences_are_named_by_kind_and_script(file: Path) -> None:
    differences = compare_tokenizers(SHAPES_VL, file)
    assert {(group["kind"], group["script"]) for group in differences} <= DOCUMENTED
    (marks,) = [group for group in differences if group["kind"] == "marks"]
    assert 0 < marks["different"] < marks["texts"]
    assert marks["share"] == marks["different"] / marks["texts"]
    assert marks["examples"]


def test_probes_have_all_scripts_and_added_tokens() -> None:
    tokenizer = load_tokenizer(SHAPES_VL)
    probes = make_probes(tokenizer)
    scripts = {script for kind, script in probes if kind == "letters"}
    assert {"LATIN", "CJK", "HANGUL", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "CYRILLIC", "MYANMAR"} < scripts
    assert {"white space", "code", "digits", "emoji", "vocabulary", "control", "marks"} < {kind for kind, _ in probes}
    assert all(token in "".join(probes["added tokens", ""]) for token in tokenizer.get_added_vocab())


def test_another_tokenizer_fails(file: Path, tmp_path: Path) -> None:
    other = shutil.copytree(SHAPES_VL, tmp_path / "other", ignore=lambda *_: ["evaluation", "training"])
    stored = json.loads((other / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ConversionError, match=r"the engine encodes .* as \[.*\] with the tokenizer of"):
        compare_tokenizers(other, file)
