"""Tokenizers that are truncated or of another model, and chat templates that the engine does not implement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from faulty_bundles import changed_bundle, run_checks
from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.doctor.checks.tokenizer import CHECKS
from hf2mnn.doctor.findings import Severity
from hf2mnn.mnn.tokenizer import encode_tokenizer
from support import SHAPES_VL

FILE = "tokenizer.mtok"
HEADER = b"430 4\n14 1 0\n549 550 551 552 553 554 555 556 557 558 559 560 561 562 551\n"
"""Header of the demonstration tokenizer: 14 special tokens, then the stop id."""


@pytest.fixture(scope="module")
def content() -> bytes:
    encoded = encode_tokenizer(SHAPES_VL)
    assert encoded.startswith(HEADER)
    return encoded


def with_stop_ids(content: bytes, *ids: int) -> bytes:
    """Return the tokenizer with other stop ids."""
    special = HEADER.split(b"\n")[2].rpartition(b" ")[0].decode()
    changed = f"430 4\n14 {len(ids)} 0\n{' '.join([special, *map(str, ids)])}\n"
    return changed.encode() + content.removeprefix(HEADER)


def other_tokenizer(folder: Path, change: str) -> bytes:
    """Return the checkpoint's tokenizer with a change in tokenizer.json."""
    shutil.copytree(SHAPES_VL, folder, ignore=lambda *_: ["evaluation", "training", "model.safetensors"])
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = stored["model"]["vocab"], stored["model"]["merges"]
    if change == "swapped":
        one, other = list(vocabulary)[300:302]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    elif change == "merges":
        merges[10], merges[20] = merges[20], merges[10]
    else:
        stored["added_tokens"].append({**stored["added_tokens"][-1], "id": 563, "content": "<|more|>"})
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return encode_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        (lambda content: content[: len(content) // 2], "is not a tokenizer file that MNN's engine can read: "),
        (lambda content: LFS_POINTER + b"/spec/v1\n", "is a Git LFS pointer"),
        (lambda content: b'{"version": "1.0"}', "does not begin with '430'"),
        (lambda content: b"", "does not begin with '430'"),
    ],
    ids=["cut short", "an LFS pointer", "tokenizer.json", "empty"],
)
def test_tokenizer_unreadable(change: Any, evidence: str, content: bytes, bundle: Path, tmp_path: Path) -> None:
    changed = changed_bundle(bundle, tmp_path / "changed", files={FILE: change(content)}, checkpoint=SHAPES_VL)
    (finding,) = run_checks(CHECKS, changed)
    assert (finding.check, finding.where) == ("tokenizer_unreadable", FILE)
    assert evidence in finding.evidence


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        ("swapped", "2 of 563 tokens differ ("),
        ("merges", "its 293 merges, or their order, differ from the checkpoint's 293"),
        ("added", "it has 1 tokens that the checkpoint lacks (from '<|more|>' on)"),
    ],
)
def test_tokenizer_differs(change: str, evidence: str, bundle: Path, tmp_path: Path) -> None:
    files = {FILE: other_tokenizer(tmp_path / "other", change)}
    (finding,) = run_checks(CHECKS, changed_bundle(bundle, tmp_path / "changed", files=files, checkpoint=SHAPES_VL))
    assert finding.check == "tokenizer_differs"
    assert evidence in finding.evidence


def test_words_that_the_engine_cannot_read_whole_are_named(bundle: Path, tmp_path: Path) -> None:
    """By `ignore_merges` a token that no merges lead to is read whole; files of other exporters only merge."""
    other_tokenizer(tmp_path / "other", "merges")
    path = tmp_path / "other" / "tokenizer.json"
    stored = json.loads(path.read_text())
    merge = stored["model"]["merges"].pop()
    word = ("".join(merge) if isinstance(merge, list) else merge.replace(" ", "")).replace("Ġ", " ")
    path.write_text(json.dumps(stored))
    merging = encode_tokenizer(path.parent)
    stored["model"]["ignore_merges"] = True
    path.write_text(json.dumps(stored))
    own = changed_bundle(bundle, tmp_path / "own", files={FILE: encode_tokenizer(path.parent)}, checkpoint=path.parent)
    assert run_checks(CHECKS, own) == []
    foreign = changed_bundle(bundle, tmp_path / "foreign", files={FILE: merging}, checkpoint=path.parent)
    (finding,) = run_checks(CHECKS, foreign)
    assert finding.check == "tokenizer_merges"
    assert f"produce 1 tokens ({word!r})" in finding.evidence


def test_the_old_text_format_is_compared_too(content: bytes, bundle: Path, tmp_path: Path) -> None:
    stored = json.loads((SHAPES_VL / "tokenizer.json").read_text())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    texts = {number: text for text, number in stored["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in stored["added_tokens"]}
    lines = [texts[number] for number in sorted(texts)]
    for name, tokens in {"equal": lines, "changed": [*lines[:300], lines[301], lines[300], *lines[302:]]}.items():
        text = HEADER.decode().replace("430 4", "430 3") + "\n".join([f"{len(lines)} {len(merges)}", *tokens, *merges])
        changed = changed_bundle(
            bundle,
            tmp_path / name,
            {"tokenizer_file": "tokenizer.txt"},
            {"jinja": {"chat_template": "{{ messages[0].content }}"}},
            {"tokenizer.txt": text.encode()},
            SHAPES_VL,
        )
        assert [finding.check for finding in run_checks(CHECKS, changed)] == ["tokenizer_differs"] * (name == "changed")


@pytest.mark.parametrize(
    ("ids", "checks", "evidence"),
    [
        ((), ["special_tokens", "tokenizer_differs"], "it has no stop ids"),
        ((600,), ["special_tokens", "tokenizer_differs"], "stop ids [600] are not tokens"),
        ((549,), ["special_tokens", "tokenizer_differs"], "also stops at 551 ('<|im_end|>')"),
        ((551, 5000), ["tokenizer_ids", "special_tokens", "tokenizer_differs"], "1 ids from 5000 (None) on; the model"),
    ],
)
def test_stop_ids(
    ids: tuple[int, ...], checks: list[str], evidence: str, content: bytes, bundle: Path, tmp_path: Path
) -> None:
    files = {FILE: with_stop_ids(content, *ids)}
    findings = run_checks(CHECKS, changed_bundle(bundle, tmp_path / "changed", files=files, checkpoint=SHAPES_VL))
    assert [finding.check for finding in findings] == checks
    assert evidence in findings[0].evidence


def test_image_tokens(content: bytes, bundle: Path, tmp_path: Path) -> None:
    """They are compared by id, and in known families by text."""
    renamed = changed_bundle(
        bundle, tmp_path / "renamed", files={FILE: content.replace(b"<|image_pad|>", b"<|other_pad|>")}
    )
    foreign = changed_bundle(bundle, tmp_path / "foreign", model={"vision_start": None, "hf2mnn": None})
    for changed, evidence in (
        (renamed, "image_pad is 561, which is '<|other_pad|>', not '<|image_pad|>'"),
        (foreign, "vision_start is 151857, which is not a token of this tokenizer"),
    ):
        (finding,) = run_checks(CHECKS, changed)
        assert finding.check == "special_tokens"
        assert evidence in finding.evidence


@pytest.mark.parametrize(
    ("template", "severity", "evidence"),
    [
        ("", Severity.WARNING, "neither jinja.chat_template nor the tokenizer file holds one"),
        ("{% for m in messages %}", Severity.ERROR, "is not valid Jinja (Unexpected end of template"),
        ("{{ messages|map(attribute='content')|join }}", Severity.WARNING, "the filter join (line 1)"),
    ],
    ids=["missing", "no template", "not run"],
)
def test_chat_template(
    template: str, severity: Severity, evidence: str, content: bytes, bundle: Path, tmp_path: Path
) -> None:
    """llm_config.json has precedence over the tokenizer file."""
    (finding,) = run_checks(
        CHECKS, changed_bundle(bundle, tmp_path / "config", model={"jinja": {"chat_template": template}})
    )
    assert (finding.check, finding.severity) == ("chat_template", severity)
    assert finding.where == "llm_config.json: jinja.chat_template"
    assert evidence in finding.evidence
    at = content.index(b"{%") - 4
    files = {FILE: content[:at] + len(template).to_bytes(4, "little") + template.encode() + b"\x00\x00"}
    (finding,) = run_checks(CHECKS, changed_bundle(bundle, tmp_path / "file", files=files))
    assert (finding.check, finding.where) == ("chat_template", f"{FILE}: chat template")


def test_use_template_false(bundle: Path, tmp_path: Path) -> None:
    bare = changed_bundle(bundle, tmp_path / "bare", {"use_template": False}, {"jinja": {"chat_template": ""}})
    assert run_checks(CHECKS, bare) == []
