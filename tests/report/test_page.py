"""Tests of the page: self-contained, valid, safe for any text of a model, and complete."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from hf2mnn.report.evidence import EVALUATION, REFERENCE_FOLDER, Evidence
from hf2mnn.report.examples import MAX_EXAMPLES
from hf2mnn.report.page import render_page, verdict
from page_evidence import HOSTILE, RECORDS, make_evidence, make_table, make_variant, record

FAULTY = "int4-hqq-block32-vision-int8"
VOID = {"meta", "link", "br", "hr", "img", "input", "area", "base", "col", "embed", "source", "track", "wbr"}


class ParsedPage(HTMLParser):
    """Tags with their attributes in order, text outside of styles, and closing tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.unmatched: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unmatched.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots, which take most of the time of a page."""
    plots = {**dict.fromkeys(("size", "percentiles", "budget", "speed", "cache")), "layers": []}
    monkeypatch.setattr("hf2mnn.report.page._plots", lambda *_: plots)


def only_evaluated(evidence: Evidence) -> Evidence:
    """Remove the diagnosis, the benchmark and the manifests of the bundles."""
    variants = [
        replace(variant, layers=None, budget=None, findings=[], manifests={EVALUATION: variant.manifests[EVALUATION]})
        for variant in evidence.variants
    ]
    manifests = {REFERENCE_FOLDER: evidence.manifests[REFERENCE_FOLDER]}
    return replace(evidence, variants=variants, manifests=manifests, speed=None, cache=None)


def parse_valid(page: str) -> ParsedPage:
    """Parse a page, and check that it is well-formed and loads nothing."""
    parsed = ParsedPage(page)
    assert (parsed.unmatched, parsed.open) == ([], [])
    ids = Counter(attributes["id"] for _, attributes in parsed.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base", "img")
        assert [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")] == []
        if (target := attributes.get("href")) is not None:
            assert target.startswith("data:image/") or target[1:] in ids, target[:80]
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    depths = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert depths[0] == 1
    assert depths.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(depths))
    return parsed


def test_page_is_self_contained(page: str) -> None:
    parsed = parse_valid(page)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    policy = [attributes for _, attributes in parsed.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert [attributes["content"] for attributes in policy] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    assert ("html", {"lang": "en"}) in parsed.tags
    assert any(attributes.get("name") == "viewport" for _, attributes in parsed.tags)


def test_verdict_is_first(page: str) -> None:
    ids = ("comparison", "size", "figures", "tasks", "cache", "budget", "layers", "speed", "examples", "provenance")
    positions = [page.index(text) for text in ('class="verdict', *(f'id="{name}"' for name in ids))]
    assert positions == sorted(positions)


def test_same_bytes_twice(evidence: Evidence, table: pd.DataFrame, page: str) -> None:
    assert render_page(evidence, table) == page


def test_text_of_a_model_is_escaped(page: str) -> None:
    text = "".join(parse_valid(page).pieces)
    assert HOSTILE in text
    assert "<script>alert(1)</script>" in text


def test_page_is_accessible(page: str) -> None:
    tags = ParsedPage(page).tags
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    tables, captions = (sum(tag == name for tag, _ in tags) for name in ("table", "caption"))
    assert tables == captions > 5
    for tag, attributes in tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert any(attributes.get("lang") == "zh" for _, attributes in tags)


def test_each_image_is_embedded_once(page: str) -> None:
    assert len(re.findall(r"data:image/(?:png|jpeg);base64,", page)) == 2
    assert page.count('<use href="#image-') == 3


def test_number_of_examples_is_limited(tmp_path: Path, without_plots: None) -> None:
    records = [record(f"id-{i:02}", "yes", images=[f"images/{i}.png"]) for i in range(MAX_EXAMPLES + 5)]
    last = records[-1]["id"]
    variant = make_variant(tmp_path / "results", records, "int2", 0.1, {last: "no"})
    evidence = replace(make_evidence(tmp_path, records, ("fp16",)), variants=[variant], speed=None, cache=None)
    page = render_page(evidence, make_table(evidence, {}))
    assert page.count("<article") == page.count("data:image/") == MAX_EXAMPLES
    assert last in ParsedPage(page.split("<article")[1]).text
    assert f"{MAX_EXAMPLES} of {MAX_EXAMPLES + 5} examples" in ParsedPage(page).text


def test_variants_with_the_same_answer_are_listed_together(page: str) -> None:
    (chinese,) = [part for part in page.split("<article") if ">chinese, location</h3>" in part]
    assert "左<mark>下</mark>角是红色" in chinese
    assert 'lang="zh"' in chinese
    answers, as_called = (ParsedPage(part).text for part in chinese.split("</details>")[0].split("<details>"))
    assert "pytorch, onnxruntime, fp16, int8 wrong左上角是红色" in answers
    assert as_called.startswith("As called: 1 other answer")
    assert f"fp16, int8, {FAULTY} wrong" in as_called
    assert "onnxruntime" not in as_called, "it is not an engine"


@pytest.mark.parametrize(
    ("failed", "passed", "texts"),
    [
        ({}, True, ["All 4 variants pass their gates.", "smallest variant that passes is int4"]),
        ({FAULTY: True}, False, [f"{FAULTY} misses a required gate.", "smallest variant that passes is int8"]),
        ({FAULTY: False}, True, [f"All required variants pass; {FAULTY} misses an optional gate."]),
        ({FAULTY: False, "int8": True}, False, [f"int8 misses a required gate. {FAULTY} misses an optional gate."]),
        ({FAULTY: True, "int8": True, "fp16": True}, False, [f"fp16, int8 and {FAULTY} miss a required gate."]),
    ],
)
def test_verdict(failed: dict[str, bool], passed: bool, texts: list[str], evidence: Evidence) -> None:
    summary = verdict(evidence, make_table(evidence, failed))
    assert summary.passed == passed
    assert {row["variant"] for row in summary.failed} == set(failed)
    # The faulty variant has a finding, which is shown whether it passes or not.
    assert [row["variant"] for row in summary.flagged] == ([] if FAULTY in failed else [FAULTY])
    for text in texts:
        assert text in f"{summary.text} {summary.choice}"


def test_failed_variant_is_explained_first(page: str) -> None:
    top = ParsedPage(page.split("<nav")[0] + "</main></body></html>").text
    assert "Fail." in top
    assert "mean_kld 0.4, at most 0.1 wanted" in top
    assert "decoder, m.layers.1.q_proj: m.layers.1.q_proj (linear layer): sign flipped" in top


def test_page_holds_the_measurements_and_commands(page: str, evidence: Evidence) -> None:
    text = ParsedPage(page).text
    for words in (
        *("sign flipped", "m.layers.1.q_proj", "decoder weights", "multi-turn", "512 tokens", "3 interleaved runs"),
        *("a CPU", "some/model on the Hugging Face hub, revision main"),
        *(f"hf2mnn evaluate --out {variant.name}" for variant in evidence.variants),
    ):
        assert words in text, words
    assert str(evidence.folder) not in page, "paths of this machine are of no use elsewhere"


@pytest.mark.parametrize("kept", ["nothing more", "images", "labels"])
def test_sections_without_measurements_are_left_out(kept: str, tmp_path: Path) -> None:
    records = [{**entry, "images": entry["images"] if kept == "images" else []} for entry in RECORDS]
    records = [{**entry, "expected": entry["expected"] if kept == "labels" else None} for entry in records]
    evidence = only_evaluated(make_evidence(tmp_path, records, ("onnxruntime", FAULTY)))
    page = render_page(evidence, make_table(evidence, {FAULTY: False}))
    text = parse_valid(page).text
    for title in ("Error budget", "Layers", "Speed and memory", "Settings of each variant"):
        assert title not in text
    assert ('id="tasks"' in page) == (kept == "labels")
    assert ("data:image/" in page) == (kept == "images")
    assert "the variant was not diagnosed" in text


def test_benchmark_without_images_and_with_a_broken_bundle(
    evidence: Evidence, table: pd.DataFrame, without_plots: None
) -> None:
    speed = evidence.speed | {"image": None, "broken": {"int2": "the engine crashed (signal 11)"}}
    text = parse_valid(render_page(replace(evidence, speed=speed), table)).text
    assert "answer 8 tokens, 3 interleaved runs" in text
    assert "int2 was not timed: the engine crashed (signal 11)" in text


def test_bundle_that_does_not_run_is_only_in_verdict_table_and_provenance(evidence: Evidence) -> None:
    good, broken = evidence.variants[1], evidence.variants[-1]
    figures = ("mean_kld", "top1_agreement", "mean_kld_low", "mean_kld_high", "greedy_match", "task_accuracy")
    summary = {**broken.summary, **dict.fromkeys(figures), "fault": "the engine ended with signal 11"}
    empty = {"figures": broken.figures[:0], "parity": broken.parity[:0]}
    answers = broken.answers.assign(answer="", score=0.0, as_called=None)
    faulty = replace(broken, summary=summary, answers=answers, layers=None, budget=None, findings=[], **empty)
    for variants in ([good, faulty], [faulty]):
        reduced = replace(evidence, variants=variants, speed=None, cache=None)
        text = parse_valid(render_page(reduced, make_table(reduced, {FAULTY: True}))).text
        assert f"{FAULTY} misses a required gate" in text
        assert f"evaluation/{FAULTY}" in text
        assert FAULTY not in text.split("struck out")[1].split("Provenance")[0]


def test_page_of_the_embedded_model(results: Path) -> None:
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "shapes-vl" in parse_valid(page).text
    assert page.count("<article") == MAX_EXAMPLES
    assert len(page) < 1_000_000
