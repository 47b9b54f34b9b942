"""The page: whole by itself, safe whatever a model says, and right in what it tells."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import typer

from hf2mnn.cli import app
from hf2mnn.report import provenance
from hf2mnn.report.evidence import Evidence
from hf2mnn.report.examples import SHOWN
from hf2mnn.report.page import render_page, verdict
from made_evidence import HOSTILE, RECORDS, make_evidence, make_row, make_table, record

BAD = "int4-hqq-block32-vision-int8"
VOID = {"meta", "link", "br", "hr", "img", "input", "area", "base", "col", "embed", "source", "track", "wbr"}


class Reader(HTMLParser):
    """Tags with their attributes in order, text by tag, and whatever is not closed as it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.faults: list[str] = []
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
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def said(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return make_evidence(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def table(evidence: Evidence) -> pd.DataFrame:
    return make_table(evidence, {BAD: True})


@pytest.fixture(scope="module")
def page(evidence: Evidence, table: pd.DataFrame) -> str:
    return render_page(evidence, table)


def bare(evidence: Evidence) -> Evidence:
    """Only evaluated: no diagnosis, no speed, no bundles' manifests."""
    rows = [
        replace(row, layers=None, budget=None, findings=[], manifests={"evaluate": row.manifests["evaluate"]})
        for row in evidence.rows
    ]
    manifests = {"reference": evidence.manifests["reference"]}
    return replace(evidence, rows=rows, manifests=manifests, speed=None, cache=None)


def whole(page: str) -> Reader:
    """The page read, once it is seen to be sound."""
    read = Reader(page)
    assert (read.faults, read.open) == ([], [])
    names = Counter(attributes["id"] for _, attributes in read.tags if "id" in attributes)
    assert [name for name, count in names.items() if count > 1] == []
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base", "img")
        assert [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")] == []
        if (target := attributes.get("href")) is not None:
            assert target.startswith("data:image/") or target[1:] in names, target[:80]
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(names)
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    return read


def test_page_stands_alone(page: str) -> None:
    read = whole(page)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    policy = [attributes for tag, attributes in read.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert [attributes["content"] for attributes in policy] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    assert ("html", {"lang": "en"}) in read.tags
    assert any(attributes.get("name") == "viewport" for _, attributes in read.tags)


def test_sections_come_verdict_first(page: str) -> None:
    places = [
        page.index(mark) for mark in ('class="verdict', 'id="comparison"', 'id="size"', 'id="figures"', 'id="tasks"')
    ]
    places += [page.index(f'id="{name}"') for name in ("cache", "budget", "layers", "speed", "examples", "provenance")]
    assert places == sorted(places)


def test_same_bytes_twice(evidence: Evidence, table: pd.DataFrame, page: str) -> None:
    assert render_page(evidence, table) == page


def test_what_a_model_says_is_text(page: str) -> None:
    read = whole(page)
    assert HOSTILE in "".join(read.text)
    assert "<script>alert(1)</script>" in "".join(read.text)


def test_it_can_be_read_without_eyes(page: str) -> None:
    tags = Reader(page).tags
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    tables, captions = (sum(tag == wanted for tag, _ in tags) for wanted in ("table", "caption"))
    assert tables == captions > 5
    for tag, attributes in tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert any(attributes.get("lang") == "zh" for _, attributes in tags)


def test_each_image_is_embedded_once(page: str, evidence: Evidence) -> None:
    assert len(re.findall(r"data:image/(?:png|jpeg);base64,", page)) == 2
    assert page.count('<use href="#image-') == 3


def test_at_most_so_many_examples(tmp_path: Path) -> None:
    records = [record(f"id-{i:02}", "yes", images=[f"images/{i}.png"]) for i in range(SHOWN + 5)]
    made = make_evidence(tmp_path, records)
    last = records[-1]["id"]
    rows = [make_row(tmp_path / "more", records, "int2", 0.1, {last: "no"})]
    page = render_page(replace(made, rows=rows), make_table(replace(made, rows=rows), {}))
    assert page.count("<article") == page.count("data:image/") == SHOWN
    assert last in Reader(page.split("<article")[1]).said
    assert f"{SHOWN} of {SHOWN + 5} examples" in Reader(page).said


def test_differences_are_marked_and_equal_answers_told_once(page: str) -> None:
    (chinese,) = [part for part in page.split("<article") if ">chinese, place</h3>" in part]
    assert "左<mark>下</mark>角是红色" in chinese
    assert 'lang="zh"' in chinese
    told = Reader(chinese.split("<details>")[0]).said
    assert "pytorch, onnxruntime, fp16, int8 wrong左上角是红色" in told
    called = Reader(chinese.split("<details>")[1].split("</details>")[0]).said
    assert called.startswith("As called: another answer")
    assert f"fp16, int8, {BAD} wrong" in called
    assert "onnxruntime" not in called  # it is no engine


@pytest.mark.parametrize(
    ("failed", "good", "words"),
    [
        ({}, True, ["All 4 conversions keep their gates", "smallest that keeps them is int4"]),
        ({BAD: True}, False, [f"{BAD} misses a gate that must be kept.", "smallest that keeps them is int8"]),
        ({BAD: False}, True, [f"Every required conversion keeps its gates; {BAD}, not required, does not."]),
        ({BAD: False, "int8": True}, False, [f"int8 misses a gate that must be kept. So does {BAD}, not required."]),
        ({BAD: True, "int8": True, "fp16": True}, False, [f"fp16, int8 and {BAD} miss a gate"]),
    ],
)
def test_verdict(failed: dict[str, bool], good: bool, words: list[str], evidence: Evidence) -> None:
    made = verdict(evidence, make_table(evidence, failed))
    assert made.good == good
    assert {row["variant"] for row in made.failed} == set(failed)
    for word in words:
        assert word in f"{made.sentence} {made.choice}"


def test_failed_row_is_explained_first(page: str) -> None:
    top = Reader(page.split("<nav")[0] + "</main></body></html>").said
    assert "Fail." in top
    assert "mean_kld 0.4, at most 0.1 wanted" in top
    assert "decoder, m.layers.1.q_proj: m.layers.1.q_proj (linear layer): its sign is turned" in top


def test_numbers_say_what_was_measured(page: str) -> None:
    said = Reader(page).said
    for word in (
        "its sign is turned",
        "m.layers.1.q_proj",
        "decoder weights",
        "two turns",
        "512 tokens",
        "3 runs in turns",
        "a CPU",
    ):
        assert word in said, word


@pytest.mark.parametrize("kept", ["nothing more", "images", "labels"])
def test_works_with_less(kept: str, tmp_path: Path) -> None:
    records = [{**made, "images": made["images"] if kept == "images" else []} for made in RECORDS]
    records = [{**made, "expected": made["expected"] if kept == "labels" else None} for made in records]
    made = bare(make_evidence(tmp_path, records))
    page = render_page(made, make_table(made, {BAD: False}))
    read = whole(page)
    for gone in ("Error budget", "Layers", "Speed and memory", "Settings of each variant"):
        assert gone not in read.said
    assert ("Task accuracy" in read.said) == (kept == "labels")
    assert ("data:image/" in page) == (kept == "images")
    assert "it was not diagnosed" in read.said


def test_speed_of_a_model_that_does_not_see(evidence: Evidence, table: pd.DataFrame) -> None:
    page = render_page(replace(evidence, speed=evidence.speed | {"image": None}), table)
    assert "8 out; 3 runs in turns" in " ".join(whole(page).said.split())


def test_bundle_that_does_not_run_is_only_judged(evidence: Evidence) -> None:
    good, broken = evidence.rows[1], evidence.rows[-1]
    figures = ("mean_kld", "top1_agreement", "mean_kld_low", "mean_kld_high", "greedy_match", "task_accuracy")
    summary = {**broken.summary, **dict.fromkeys(figures), "fault": "the engine ended with signal 11"}
    empty = {"figures": broken.figures[:0], "positions": broken.positions[:0], "parity": broken.parity[:0]}
    answers = broken.answers.assign(answer="", score=0.0, as_called=None)
    faulty = replace(broken, summary=summary, answers=answers, layers=None, budget=None, findings=[], **empty)
    for rows in ([good, faulty], [faulty]):
        made = replace(evidence, rows=rows, speed=None, cache=None)
        read = whole(render_page(made, make_table(made, {BAD: True})))
        assert f"{BAD} misses a gate" in read.said
        assert f"evaluation/{BAD}" in read.said
        told = read.said.split("struck out")[1].split("Provenance")[0]
        assert BAD not in told


def test_commands_are_the_programs_own(evidence: Evidence) -> None:
    """Each is taken by the command line's parser as it stands."""
    commands = typer.main.get_command(app).commands
    stages = provenance.stages(evidence)
    assert [stage.place for stage in stages][:3] == ["source", "reference", "onnx"]
    assert {stage.command[1] for stage in stages} == {
        *("source", "reference", "onnx", "quantize", "evaluate", "diagnose", "speed")
    }
    for stage in stages:
        program, name, *arguments = stage.command
        assert program == "hf2mnn"
        commands[name].make_context(name, list(arguments))
        assert arguments[-2:] == ["--out", f"results/some-model/{stage.place}"]


def test_what_the_manifests_do_not_hold_is_said(evidence: Evidence, page: str, tmp_path: Path) -> None:
    said = Reader(page).said
    assert "some/model on the Hugging Face hub, revision main" in said
    for sentence in provenance.missing(evidence):
        assert sentence in said
    assert len(provenance.missing(evidence)) == 3
    manifests = dict(evidence.manifests)
    settings, places = manifests["reference"].settings | {"threads": 2}, {"evaluation": str(tmp_path / "my-set")}
    manifests["reference"] = replace(manifests["reference"], settings=settings, paths=places)
    manifests["source"] = replace(manifests["source"], settings={}, paths={"path": str(tmp_path / "checkpoint")})
    complete = replace(evidence, manifests=manifests)
    assert provenance.missing(complete) == []
    lines = [stage.line for stage in provenance.stages(complete)]
    assert lines[0] == "hf2mnn source --path checkpoint --out results/some-model/source"
    assert "--evaluation my-set --max-new-tokens 64 --threads 2" in lines[1]
    assert str(tmp_path) not in render_page(complete, make_table(complete, {}))


def test_real_page(results: Path) -> None:
    """The embedded model's, as the pipeline makes it."""
    page = (results / "report.html").read_text(encoding="utf-8")
    read = whole(page)
    assert "shapes-vl" in read.said
    assert page.count("<article") == SHOWN
    assert len(page) < 1_000_000
