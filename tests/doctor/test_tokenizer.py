"""A tokenizer that is not the model's, or not whole, and chat templates that the engine does not render."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from broken import broken, found
from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.doctor.checks.tokenizer import CHECKS
from hf2mnn.doctor.finding import Severity
from hf2mnn.mnn.tokenizer import encode_tokenizer
from support import SHAPES_VL

FILE = "tokenizer.mtok"
HEADER = b"430 4\n14 1 0\n549 550 551 552 553 554 555 556 557 558 559 560 561 562 551\n"
"""Of the demonstration tokenizer: 14 special tokens, then the stop id."""


@pytest.fixture(scope="module")
def content() -> bytes:
    found = encode_tokenizer(SHAPES_VL)
    assert found.startswith(HEADER)
    return found


def stops(content: bytes, *ids: int) -> bytes:
    """The same tokenizer with other stop ids."""
    special = HEADER.split(b"\n")[2].rpartition(b" ")[0].decode()
    changed = f"430 4\n14 {len(ids)} 0\n{' '.join([special, *map(str, ids)])}\n"
    return changed.encode() + content.removeprefix(HEADER)


def other_tokenizer(folder: Path, change: str) -> bytes:
    """The checkpoint's tokenizer after a change to its tokenizer.json."""
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
    ("spoil", "evidence"),
    [
        (lambda content: content[: len(content) // 2], "is no tokenizer that MNN's engine can read: it "),
        (lambda content: LFS_POINTER + b"/spec/v1\n", "is a Git LFS pointer"),
        (lambda content: b'{"version": "1.0"}', "does not begin with '430'"),
        (lambda content: b"", "does not begin with '430'"),
    ],
    ids=["cut short", "an LFS pointer", "tokenizer.json", "empty"],
)
def test_what_is_no_tokenizer_is_found(spoil: Any, evidence: str, content: bytes, bundle: Path, tmp_path: Path) -> None:
    changed = broken(bundle, tmp_path / "broken", files={FILE: spoil(content)}, checkpoint=SHAPES_VL)
    (finding,) = found(CHECKS, changed)
    assert (finding.check, finding.where) == ("tokenizer_unreadable", FILE)
    assert evidence in finding.evidence


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        ("swapped", "2 of 563 tokens are others ("),
        ("merges", "its 293 merges are not the checkpoint's 293, or in another order"),
        ("added", "it has 1 tokens that the checkpoint has not (from '<|more|>' on)"),
    ],
)
def test_another_tokenizer_is_found(change: str, evidence: str, bundle: Path, tmp_path: Path) -> None:
    files = {FILE: other_tokenizer(tmp_path / "other", change)}
    (finding,) = found(CHECKS, broken(bundle, tmp_path / "broken", files=files, checkpoint=SHAPES_VL))
    assert finding.check == "tokenizer_differs"
    assert evidence in finding.evidence


def test_words_that_the_engine_cannot_read_whole_are_named(bundle: Path, tmp_path: Path) -> None:
    """As of Llama 3: by `ignore_merges` a token that no merges lead to is read whole, but not by the engine."""
    other_tokenizer(tmp_path / "other", "merges")
    path = tmp_path / "other" / "tokenizer.json"
    stored = json.loads(path.read_text())
    merge = stored["model"]["merges"].pop()
    word = ("".join(merge) if isinstance(merge, list) else merge.replace(" ", "")).replace("Ġ", " ")
    for ignored in (False, True):
        stored["model"]["ignore_merges"] = ignored
        path.write_text(json.dumps(stored))
        files = {FILE: encode_tokenizer(path.parent)}
        changed = broken(bundle, tmp_path / f"broken-{ignored}", files=files, checkpoint=path.parent)
        findings = found(CHECKS, changed)
        assert [finding.check for finding in findings] == ["tokenizer_merges"] * ignored
    assert f"1 tokens that no merges lead to ({word!r})" in findings[0].evidence


def test_the_old_text_format_is_compared_too(content: bytes, bundle: Path, tmp_path: Path) -> None:
    stored = json.loads((SHAPES_VL / "tokenizer.json").read_text())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    texts = {number: text for text, number in stored["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in stored["added_tokens"]}
    lines = [texts[number] for number in sorted(texts)]
    for name, tokens in {"sound": lines, "broken": [*lines[:300], lines[301], lines[300], *lines[302:]]}.items():
        text = HEADER.decode().replace("430 4", "430 3") + "\n".join([f"{len(lines)} {len(merges)}", *tokens, *merges])
        changed = broken(
            bundle,
            tmp_path / name,
            {"tokenizer_file": "tokenizer.txt"},
            {"jinja": {"chat_template": "{{ messages[0].content }}"}},
            {"tokenizer.txt": text.encode()},
            SHAPES_VL,
        )
        assert [finding.check for finding in found(CHECKS, changed)] == ["tokenizer_differs"] * (name == "broken")


@pytest.mark.parametrize(
    ("ids", "checks", "evidence"),
    [
        ((), ["special_tokens", "tokenizer_differs"], "it has no stop ids"),
        ((600,), ["special_tokens", "tokenizer_differs"], "stop ids [600] are no tokens"),
        ((549,), ["special_tokens", "tokenizer_differs"], "also stops at 551 ('<|im_end|>')"),
        ((551, 5000), ["tokenizer_ids", "special_tokens", "tokenizer_differs"], "1 ids from 5000 (None) on; the model"),
    ],
)
def test_what_ends_an_answer(
    ids: tuple[int, ...], checks: list[str], evidence: str, content: bytes, bundle: Path, tmp_path: Path
) -> None:
    files = {FILE: stops(content, *ids)}
    findings = found(CHECKS, broken(bundle, tmp_path / "broken", files=files, checkpoint=SHAPES_VL))
    assert [finding.check for finding in findings] == checks
    assert evidence in findings[0].evidence


def test_tokens_of_a_image(content: bytes, bundle: Path, tmp_path: Path) -> None:
    """By their ids, and where the family is known by their texts. That llm_config.json has the checkpoint's ids is
    another check's.
    """
    renamed = broken(bundle, tmp_path / "renamed", files={FILE: content.replace(b"<|image_pad|>", b"<|other_pad|>")})
    foreign = broken(bundle, tmp_path / "foreign", model={"vision_start": None, "hf2mnn": None})
    for changed, evidence in (
        (renamed, "image_pad is 561, which is '<|other_pad|>', not '<|image_pad|>'"),
        (foreign, "vision_start is 151857, which is no token of this tokenizer"),
    ):
        (finding,) = found(CHECKS, changed)
        assert finding.check == "special_tokens"
        assert evidence in finding.evidence


# Chat templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "severity", "evidence"),
    [
        ("", Severity.WARNING, "neither jinja.chat_template nor the tokenizer's file holds one"),
        ("{% for m in messages %}", Severity.ERROR, "is no Jinja (Unexpected end of template"),
        ("{{ messages|map(attribute='content')|join }}", Severity.WARNING, "the filter join (line 1)"),
    ],
    ids=["missing", "no template", "not run"],
)
def test_a_template_that_is_not_rendered_is_found(
    template: str, severity: Severity, evidence: str, content: bytes, bundle: Path, tmp_path: Path
) -> None:
    """In llm_config.json, which goes before the tokenizer's file, and in that."""
    (finding,) = found(CHECKS, broken(bundle, tmp_path / "config", model={"jinja": {"chat_template": template}}))
    assert (finding.check, finding.severity) == ("chat_template", severity)
    assert finding.where == "llm_config.json: jinja.chat_template"
    assert evidence in finding.evidence
    at = content.index(b"{%") - 4
    files = {FILE: content[:at] + len(template).to_bytes(4, "little") + template.encode() + b"\x00\x00"}
    (finding,) = found(CHECKS, broken(bundle, tmp_path / "file", files=files))
    assert (finding.check, finding.where) == ("chat_template", f"{FILE}: chat template")


def test_an_application_may_do_without_a_template(bundle: Path, tmp_path: Path) -> None:
    bare = broken(bundle, tmp_path / "bare", {"use_template": False}, {"jinja": {"chat_template": ""}})
    assert found(CHECKS, bare) == []
