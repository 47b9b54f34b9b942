"""The table, the verdicts and the page: what a person decides by."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from hf2mnn.errors import Hf2mnnError, ManifestError
from hf2mnn.manifest import Manifest, stage_folder
from hf2mnn.report.compare import (
    COLUMNS,
    RowSpec,
    compare,
    join_tables,
    missed_gates,
    read_table,
    reasons,
    table,
)
from hf2mnn.report.console import print_table, readable_size

ASKED = ["model", "variant", "top1_agreement", "mean_kld", "greedy_match", "task_accuracy", "vision_cosine"]
SUMMARY: dict[str, Any] = {
    "top1_agreement": 0.95,
    "mean_kld": 0.1,
    "greedy_match": 0.9,
    "task_accuracy": 0.75,
    "vision_cosine": 0.99,
    "as_called_match": 0.5,
    "as_called_accuracy": 0.25,
    "bytes": 4_515_196,
    "labelled": 20,
}


@pytest.mark.parametrize(
    ("gate", "value", "bound", "kept"),
    [
        ("top1_agreement", 0.95, 0.95, True),
        ("top1_agreement", np.nextafter(0.95, 0), 0.95, False),
        ("greedy_match", 1.0, 1, True),
        ("greedy_match", 0.99, 1, False),
        ("vision_cosine", 0.99, 0.99, True),
        ("vision_cosine", 0.98, 0.99, False),
        ("vision_cosine", None, 0.99, True),  # no pictures, nothing to keep
        ("mean_kld", 0.1, 0.1, True),
        ("mean_kld", np.nextafter(0.1, 1), 0.1, False),
        ("mean_kld", float("nan"), 0.1, False),
        ("top1_agreement", float("nan"), 0.1, False),
        ("top1_agreement", None, 0.0, False),  # always measured: none is a fault
    ],
)
def test_bounds_are_inclusive_and_nan_keeps_none(gate: str, value: float | None, bound: float, kept: bool) -> None:
    missed = reasons({**SUMMARY, gate: value}, 15, {gate: bound})
    assert missed == [] if kept else len(missed) == 1
    for sentence in missed:
        assert sentence.startswith(f"{gate} ")
        assert f"{bound:g} wanted" in sentence


@pytest.mark.parametrize(
    ("right", "reference", "labelled", "lost"),
    [(15, 15, 20, 0), (14, 15, 20, 1), (16, 15, 20, -1), (0, 20, 20, 20), (149, 150, 168, 1), (111, 167, 177, 56)],
)
def test_answers_lost_counts_answers(right: int, reference: int, labelled: int, lost: int) -> None:
    """The count survives the share that summary.json keeps; more right answers than PyTorch has is no loss."""
    summary = {**SUMMARY, "task_accuracy": right / labelled, "labelled": labelled}
    for gate, unit in (("answers_lost", 1), ("accuracy_lost", labelled)):
        assert reasons(summary, reference, {gate: lost / unit}) == []
        (missed,) = reasons(summary, reference, {gate: (lost - 0.5) / unit})
        assert missed.startswith(f"{gate} ")


def test_task_gates_hold_where_nothing_is_labelled() -> None:
    summary = {**SUMMARY, "task_accuracy": None, "labelled": 0}
    assert reasons(summary, 0, {"answers_lost": 0, "accuracy_lost": 0.0}) == []


def test_all_missed_gates_are_told() -> None:
    missed = reasons(
        SUMMARY, 20, {"top1_agreement": 0.99, "mean_kld": 0.01, "accuracy_lost": 0.05, "greedy_match": 0.9}
    )
    assert missed == [
        "accuracy_lost 0.25, at most 0.05 wanted",
        "mean_kld 0.1, at most 0.01 wanted",
        "top1_agreement 0.95, at least 0.99 wanted",
    ]


def record(identifier: str, answer: str, expected: str | None = None, pictures: tuple[str, ...] = ()) -> dict[str, Any]:
    marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(pictures)
    prompt = (
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{marks}Is 1 < 2 & why?<|im_end|>\n<|im_start|>assistant\n"
    )
    return {
        "id": identifier,
        "category": "test",
        "language": "en",
        "expected": expected,
        "answer": answer,
        "prompt": prompt,
        "pictures": list(pictures),
    }


Results = tuple[Path, list[RowSpec]]
RECORDS = [
    record("plain", "a star", "a star", ("images/0.png",)),
    record("hostile", "<script>alert(1)</script>", "yes", ("images/0.png", "images/1.png")),
    record("free", "whatever"),
]


def make_reference(folder: Path, records: list[dict[str, Any]]) -> Path:
    """What `hf2mnn reference` leaves, with little in it."""
    tensors = {}
    for made in records:
        for name in ("input_ids", "answer_ids"):
            tensors[f"examples/{made['id']}/{name}"] = np.arange(3)
        tensors[f"examples/{made['id']}/position_ids"] = np.zeros((3, 3), np.int64)
        tensors[f"examples/{made['id']}/logits"] = np.zeros((3, 5), np.float32)
        for picture in made["pictures"]:
            tensors |= {
                f"pictures/{picture}/pixel_values": np.zeros((4, 6), np.float32),
                f"pictures/{picture}/grid_thw": np.array([1, 2, 2]),
                f"pictures/{picture}/embeds": np.zeros((1, 8), np.float32),
                f"pictures/{picture}/original": np.full((28, 28, 3), 200, np.uint8),
                f"pictures/{picture}/resized": np.full((28, 28, 3), 200, np.uint8),
            }
    labelled = [made for made in records if made["expected"] is not None]
    manifest = Manifest("reference", tools={"torch": "2"})
    with stage_folder(folder, manifest) as partial:
        save_file(tensors or {"none": np.zeros(1)}, partial / "golden.safetensors")
        (partial / "examples.json").write_text(json.dumps(records))
        right = sum(made["answer"] == made["expected"] for made in labelled)
        manifest.results = {"examples": len(records), "labelled": len(labelled), "right": right}
    return folder


def make_evaluation(
    folder: Path, reference: Path, records: list[dict[str, Any]], answers: dict[str, str], **figures: Any
) -> Path:
    """What `hf2mnn evaluate` leaves: `answers` by id where they are not PyTorch's."""
    given = [
        {
            "id": r["id"],
            "expected": r["expected"],
            "reference": r["answer"],
            "answer": answers.get(r["id"], r["answer"]),
        }
        for r in records
    ]
    manifest = Manifest("evaluate", {"reference": Manifest.load(reference).digest()}, tools={"MNN": "3.6.1"})
    with stage_folder(folder, manifest) as partial:
        labelled = sum(made["expected"] is not None for made in records)
        (partial / "summary.json").write_text(json.dumps({**SUMMARY, "labelled": labelled, **figures}))
        pd.DataFrame(given).to_parquet(partial / "answers.parquet", index=False)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A reference and two evaluations of it, the second of which misses a gate."""

    reference = make_reference(tmp_path / "reference", RECORDS)
    good = make_evaluation(tmp_path / "eval" / "fp32", reference, RECORDS, {})
    bad = make_evaluation(tmp_path / "eval" / "int4", reference, RECORDS, {"free": '"><img src=x onerror=alert(1)>'})
    return reference, [RowSpec("fp32", good, True, {"mean_kld": 0.2}), RowSpec("int4", bad, False, {"mean_kld": 0.01})]


def test_table_has_the_columns_asked_for_first(results: Results) -> None:
    frame = table("m", *results)
    assert list(frame.columns) == COLUMNS
    assert COLUMNS[: len(ASKED)] == ASKED
    assert {"bytes", "verdict"} <= set(COLUMNS)
    assert list(frame["variant"]) == ["pytorch", "fp32", "int4"]
    assert list(frame["verdict"]) == ["reference", "pass", "FAIL"]
    assert frame.loc[2, "reason"] == "mean_kld 0.1, at most 0.01 wanted"
    assert frame.loc[0, "task_accuracy"] == 0.5
    assert frame.loc[1, "bytes"] == SUMMARY["bytes"]


def test_table_survives_its_file(results: Results, tmp_path: Path) -> None:
    reference, rows = results
    made = compare("m", reference, rows, tmp_path / "summary.csv", tmp_path / "report.html")
    read = read_table(tmp_path / "summary.csv")
    pd.testing.assert_frame_equal(read, made, check_dtype=False)
    assert (tmp_path / "summary.csv").read_text().startswith(",".join(ASKED))
    joined = join_tables([tmp_path / "summary.csv"] * 2, tmp_path / "all.csv")
    assert list(joined["variant"]) == ["pytorch", "fp32", "int4"] * 2
    pd.testing.assert_frame_equal(read_table(tmp_path / "all.csv"), joined, check_dtype=False)


@pytest.mark.parametrize("name", ["007", "1.10", "null", "NA", "nan", "true"])
def test_names_stay_names(name: str, results: Results, tmp_path: Path) -> None:
    """config.yaml takes these as names of models and of variants; a csv must not make numbers or holes of them."""
    reference, (first, second) = results
    rows = [RowSpec(name, first.folder, True, first.gates), second]
    compare(name, reference, rows, tmp_path / "summary.csv", tmp_path / "report.html")
    frame = read_table(tmp_path / "summary.csv")
    assert list(frame["model"]) == [name] * 3
    assert list(frame["variant"]) == ["pytorch", name, "int4"]


@pytest.mark.parametrize(
    "stored",
    [None, b"", b"a,b\n1,2\n1,2,3\n", b"a,b\n1,2\n", b"\xff\xfe\x00", ",".join(COLUMNS).encode() + b'\n"'],
    ids=["missing", "empty", "ragged", "other columns", "binary", "open quote"],
)
def test_what_is_no_table_is_called_so(stored: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    if stored is not None:
        path.write_bytes(stored)
    with pytest.raises(Hf2mnnError, match=r"summary\.csv") as refused:
        read_table(path)
    assert len(str(refused.value).splitlines()) == 1


def test_only_required_rows_fail_the_run(results: Results) -> None:
    reference, (first, second) = results
    assert missed_gates(table("m", reference, [first, second])) == []
    strict = RowSpec("int4", second.folder, True, second.gates)
    assert missed_gates(table("m", reference, [first, strict])) == ["m/int4: mean_kld 0.1, at most 0.01 wanted"]


@pytest.mark.parametrize(
    "harmed", ["eval/int4/summary.json", "eval/fp32/answers.parquet", "reference/golden.safetensors"]
)
def test_inputs_must_be_whole(harmed: str, results: Results, tmp_path: Path) -> None:
    """A verdict on a file that was cut or changed is worth nothing; nothing is written then."""
    reference, rows = results
    path = tmp_path / harmed
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=re.escape(path.name)):
        compare("m", reference, rows, tmp_path / "summary.csv", tmp_path / "report.html")
    assert not (tmp_path / "summary.csv").exists()


def test_evaluation_of_another_reference_is_refused(results: Results, tmp_path: Path) -> None:
    """By hand it is easy to compare yesterday's evaluation with today's reference: figures of two different things."""
    _, rows = results
    other = make_reference(tmp_path / "other", RECORDS[:2])
    with pytest.raises(Hf2mnnError, match="fp32"):
        compare("m", other, rows, tmp_path / "summary.csv", tmp_path / "report.html")


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_stands_alone_and_runs_nothing(results: Results, tmp_path: Path) -> None:
    """It is mailed and archived: no request to anywhere, and what a model answers is shown, not run."""
    reference, rows = results
    compare("m", reference, rows, tmp_path / "summary.csv", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "poster", "background"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"@import|url\(|https?://", (tmp_path / "report.html").read_text(encoding="utf-8"))
    words = "".join(page.words)
    assert "<script>alert(1)</script>" in words
    assert '"><img src=x onerror=alert(1)>' in words
    assert "Is 1 < 2 & why?" in words
    assert "<|im_start|>" not in words
    assert [tag for tag, _ in page.elements].count("img") == 3
    assert "1 of 2 conversions miss a gate" in words
    # The example that a conversion answers otherwise comes first.
    assert words.index('"><img') < words.index("a star")


def test_page_of_a_model_without_pictures_or_labels(tmp_path: Path) -> None:
    reference = make_reference(tmp_path / "reference", [record("free", "whatever")])
    nothing = dict.fromkeys(("task_accuracy", "vision_cosine", "as_called_match", "as_called_accuracy"))
    folder = make_evaluation(tmp_path / "eval" / "int4", reference, [record("free", "whatever")], {}, **nothing)
    rows = [RowSpec("int4", folder, True, {"vision_cosine": 0.9, "answers_lost": 0, "mean_kld": 0.2})]
    frame = compare("m", reference, rows, tmp_path / "summary.csv", tmp_path / "report.html")
    assert list(frame["verdict"]) == ["reference", "pass"]
    page = Page(tmp_path / "report.html")
    assert "Every conversion keeps its gates." in "".join(page.words)
    assert not re.search(r"\bnan\b", "".join(page.words), re.IGNORECASE)
    assert "img" not in [tag for tag, _ in page.elements]


def printed(frame: pd.DataFrame) -> str:
    file = io.StringIO()
    print_table(frame, file)
    return file.getvalue()


def test_table_is_readable_where_it_is_no_terminal(results: Results) -> None:
    """In a log of a batch system: no colours, no line too wide, each figure with its head."""
    text = printed(table("shapes-vl", *results))
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "\x1b" not in text
    for word in (
        "shapes-vl",
        "pytorch",
        "95.0 %",
        "0.99000",
        "4.5 MB",
        "FAIL",
        "int4: mean_kld 0.1, at most 0.01 wanted",
    ):
        assert word in text
    assert "…" not in text


def test_long_names_do_not_cost_the_verdict(results: Results) -> None:
    reference, (first, second) = results
    long = RowSpec("int4-hqq-block32-vision-int8-symmetric", second.folder, False, second.gates)
    text = printed(table("m", reference, [first, long]))
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "FAIL" in text
    assert long.name in text


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_515_196, "4.5 MB"), (4_400_000_000, "4.40 GB")],
)
def test_sizes(size: int, shown: str) -> None:
    assert readable_size(size) == shown
