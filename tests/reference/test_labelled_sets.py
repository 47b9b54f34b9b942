"""Loaders of labelled data sets, on small local copies with the columns and types of the data sets' cards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf2mnn.core.errors import EvaluationSetError, Hf2mnnError
from hf2mnn.core.manifest import Manifest
from hf2mnn.reference.examples import Example, read_examples, read_image
from hf2mnn.reference.labelled_sets import DATASETS, LETTER, SHORT
from hf2mnn.reference.tasks import score_answer
from hf2mnn.stages.examples import run as collect_examples

TEXT, TEXTS, IMAGE = Value("string"), List(Value("string")), ImageFeature()


def draw_set(dataset: str, samples: int, destination: Path, copy: Path | None = None, **options: Any) -> Path:
    return collect_examples(destination, copy, dataset, samples, **options)


def drawn(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# Columns and types as each dataset's card lists them.
FEATURES: dict[str, dict[str, Any]] = {
    "textvqa": {
        "image_id": TEXT,
        "question_id": Value("int32"),
        "question": TEXT,
        "question_tokens": TEXTS,
        "image": IMAGE,
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": TEXT,
        "flickr_300k_url": TEXT,
        "answers": TEXTS,
        "image_classes": TEXTS,
        "set_name": TEXT,
        "ocr_tokens": TEXTS,
    },
    "docvqa": {
        "questionId": TEXT,
        "question": TEXT,
        "question_types": TEXTS,
        "image": IMAGE,
        "docId": Value("int64"),
        "ucsf_document_id": TEXT,
        "ucsf_document_page_no": TEXT,
        "answers": TEXTS,
        "data_split": TEXT,
    },
    "chartqa": {"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE},
    "ai2d": {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": IMAGE},
    "mmbench": {
        "index": Value("int64"),
        "question": TEXT,
        "hint": TEXT,
        "answer": TEXT,
        **dict.fromkeys("ABCD", TEXT),
        "category": TEXT,
        "image": IMAGE,
        "source": TEXT,
        "L2-category": TEXT,
        "comment": TEXT,
        "split": TEXT,
    },
    "mmmu": {
        "id": TEXT,
        "question": TEXT,
        "options": TEXT,
        "explanation": TEXT,
        **{f"image_{number}": IMAGE for number in range(1, 8)},
        "img_type": TEXT,
        "answer": TEXT,
        "topic_difficulty": TEXT,
        "question_type": TEXT,
        "subfield": TEXT,
    },
}

ROWS: dict[str, list[dict[str, Any]]] = {
    "textvqa": [
        {"question": "what brand is this?", "image": drawn(0), "answers": ["nokia"] * 9 + ["nokia phone"]},
        {"question": "who says so?", "image": drawn(1), "answers": ["sam"] * 10},
    ],
    "docvqa": [
        {
            "question": "What is the date?",
            "image": drawn(0),
            "answers": ["1/8/93", "1-8-93"],
            "question_types": ["form"],
        },
        {"question": "Who signed?", "image": drawn(0), "answers": ["T.F. Riehl"], "question_types": []},
    ],
    "chartqa": [
        {"type": "human_test", "question": "How many bars?", "answer": "14", "image": drawn(0)},
        {"type": "augmented_test", "question": "What share?", "answer": "50%", "image": drawn(1)},
    ],
    "ai2d": [
        {"question": "What is at the top?", "options": ["egg", "larva", "frog"], "answer": "2", "image": drawn(0)},
        {"question": "Which eats grass?", "options": ["cow", "fox"], "answer": "0", "image": drawn(1)},
    ],
    "mmbench": [
        {
            "question": "Which is it?",
            "hint": "Look.",
            "answer": "B",
            "image": drawn(0),
            "category": "ocr",
            "A": "one",
            "B": "two",
            "C": "nan",
            "D": None,
        },
        {
            "question": "What?",
            "hint": "nan",
            "answer": "D",
            "image": drawn(1),
            "category": "action",
            "A": "a",
            "B": "b",
            "C": "c",
            "D": "d",
        },
    ],
    "mmmu": [
        {
            "id": "validation_Art_Theory_1",
            "question_type": "multiple-choice",
            "answer": "B",
            "question": "<image 1> Which fits <image 1>?",
            "options": "['<image 2>', \"it's <image 3>\", 'none']",
            **{f"image_{number}": drawn(number) for number in (1, 2, 3)},
        },
        {
            "id": "validation_Math_2",
            "question_type": "multiple-choice",
            "answer": "A",
            "image_1": drawn(1),
            "question": "What is <image 1>?",
            "options": "['3', '4']",
        },
        {
            "id": "validation_Math_3",
            "question_type": "open",
            "answer": "['3.5', '7/2']",
            "image_1": drawn(1),
            "question": "How much is <image 1>?",
            "options": "[]",
        },
    ],
}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write a parquet file at its path in the hub's repository, with images as bytes."""
    features = Features(FEATURES[name])
    dataset = Dataset.from_list([{column: row.get(column) for column in features} for row in rows], features=features)
    path = folder / DATASETS[name].files.replace("*", "00000-of-00001")
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No access to the hub, and no files in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def draw(tmp_path: Path) -> Callable[[str], tuple[Path, list[Example]]]:
    """Function that returns the evaluation set of all ROWS of a data set, and its examples."""

    def make(name: str) -> tuple[Path, list[Example]]:
        folder = draw_set(name, len(ROWS[name]), tmp_path / "set", write(tmp_path / "copy", name, ROWS[name]))
        return folder, read_examples(folder)

    return make


def prompt_of(example: Example) -> str:
    """Return the prompt with [] for an image."""
    (turn,) = example.messages
    return "".join("[]" if part["type"] == "image" else part["text"] for part in turn["content"])


def test_every_loader_is_tested() -> None:
    assert FEATURES.keys() == ROWS.keys() == DATASETS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_rows_become_examples_with_their_images(name: str, draw: Callable) -> None:
    """With a manifest; the label is right by the set's metric, and another answer is wrong."""
    folder, examples = draw(name)
    assert Manifest.load(folder).verify() == folder
    assert [example.id for example in examples] == [f"{name}-00000", f"{name}-00001"]
    assert {example.metric for example in examples} == {DATASETS[name].metric}
    for example in examples:
        assert score_answer(example.metric, example.answers[0], example.answers) == 1
        assert score_answer(example.metric, "xyzzy", example.answers) == 0
        assert example.images
        assert all(read_image(folder / image).size == (40, 30) for image in example.images)
    stored = {path.relative_to(folder).as_posix() for path in folder.glob("images/*")}
    assert stored == {image for example in examples for image in example.images}
    np.testing.assert_array_equal(
        np.array(read_image(folder / examples[0].images[0])),
        np.array(ROWS[name][0].get("image") or ROWS[name][0]["image_1"]),
    )


@pytest.mark.parametrize(
    ("name", "prompts", "answers", "categories"),
    [
        (
            "textvqa",
            [f"[]what brand is this?\n{SHORT}", f"[]who says so?\n{SHORT}"],
            [["nokia"] * 9 + ["nokia phone"], ["sam"] * 10],
            ["textvqa", "textvqa"],
        ),
        (
            "docvqa",
            [f"[]What is the date?\n{SHORT}", f"[]Who signed?\n{SHORT}"],
            [["1/8/93", "1-8-93"], ["T.F. Riehl"]],
            ["form", "docvqa"],
        ),
        (
            "chartqa",
            [f"[]How many bars?\n{SHORT}", f"[]What share?\n{SHORT}"],
            [["14"], ["50%"]],
            ["human_test", "augmented_test"],
        ),
        (
            "ai2d",
            [
                f"[]What is at the top?\nA. egg\nB. larva\nC. frog\n{LETTER}",
                f"[]Which eats grass?\nA. cow\nB. fox\n{LETTER}",
            ],
            [["C"], ["A"]],
            ["ai2d", "ai2d"],
        ),
        (
            "mmbench",
            [
                f"[]Look.\nWhich is it?\nA. one\nB. two\n{LETTER}",
                f"[]What?\nA. a\nB. b\nC. c\nD. d\n{LETTER}",
            ],
            [["B"], ["D"]],
            ["ocr", "action"],
        ),
        (
            "mmmu",
            [
                f"[] Which fits image 1?\nA. []\nB. it's []\nC. none\n{LETTER}",
                f"What is []?\nA. 3\nB. 4\n{LETTER}",
            ],
            [["B"], ["A"]],
            ["Art_Theory", "Math"],
        ),
    ],
)
def test_prompts_are_those_of_published_evaluations(
    name: str, prompts: list[str], answers: list[list[str]], categories: list[str], draw: Callable
) -> None:
    _, examples = draw(name)
    assert [prompt_of(example) for example in examples] == prompts
    assert [example.answers for example in examples] == answers
    assert [example.category for example in examples] == categories


def test_an_image_of_two_questions_is_one_file(draw: Callable) -> None:
    """DocVQA has four questions for each page, and its image is embedded once."""
    folder, examples = draw("docvqa")
    assert examples[0].images == examples[1].images
    assert len(list(folder.glob("images/*"))) == 1


def many(count: int) -> list[dict[str, Any]]:
    return [{"question": f"q{n}", "image": drawn(n, (8, 8)), "answer": "1", "type": "t"} for n in range(count)]


def ids(folder: Path) -> set[str]:
    return {example.id for example in read_examples(folder)}


def test_the_seed_draws_and_more_samples_keep_those_of_fewer(tmp_path: Path) -> None:
    copy = write(tmp_path / "copy", "chartqa", many(30))
    drawn_ids = {
        (samples, seed): ids(draw_set("chartqa", samples, tmp_path / f"{samples}-{seed}", copy, seed=seed))
        for samples, seed in ((5, 0), (10, 0), (10, 1))
    }
    assert len(drawn_ids[5, 0]) == 5
    assert drawn_ids[5, 0] < drawn_ids[10, 0]
    assert drawn_ids[10, 0] != drawn_ids[10, 1]
    again = draw_set("chartqa", 5, tmp_path / "again", copy)
    assert (again / "examples.jsonl").read_bytes() == (tmp_path / "5-0" / "examples.jsonl").read_bytes()


def test_a_set_with_fewer_rows_than_samples_is_used_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MMMU's open question does not count."""
    folder = draw_set("mmmu", 9, tmp_path / "set", write(tmp_path / "copy", "mmmu", ROWS["mmmu"]))
    assert "mmmu has only 2 rows for 9 samples; using all" in capsys.readouterr().err
    assert ids(folder) == {"mmmu-00000", "mmmu-00001"}
    assert Manifest.load(folder).results == {"examples": 2, "rows": 2}


def test_a_missing_column_is_named_with_the_present_ones(tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "data"
    copy.mkdir(parents=True)
    Dataset.from_dict({"query": ["?"], "label": ["1"]}).to_parquet(copy / "test-00000-of-00001.parquet")
    with pytest.raises(EvaluationSetError, match=r"no column 'image', only query, label; .*lmms-lab/ChartQA"):
        draw_set("chartqa", 1, tmp_path / "set", copy.parent)


def test_image_columns_without_the_type_of_the_library_are_read(tmp_path: Path) -> None:
    """A copy of another tool has the bytes without the metadata of the datasets library."""
    copy = write(tmp_path / "copy", "ai2d", ROWS["ai2d"])
    (file,) = copy.glob("data/*.parquet")
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    folder = draw_set("ai2d", 2, tmp_path / "set", copy)
    assert len(ids(folder)) == 2


def test_other_layouts_of_a_folder_are_read_by_the_library(tmp_path: Path) -> None:
    """A folder whose file names have the split, at other paths than on the hub."""
    copy = write(tmp_path / "hub", "docvqa", ROWS["docvqa"])
    (file,) = copy.glob("DocVQA/*.parquet")
    (tmp_path / "flat").mkdir()
    file.rename(tmp_path / "flat" / "validation.parquet")
    assert len(ids(draw_set("docvqa", 2, tmp_path / "set", tmp_path / "flat"))) == 2
    with pytest.raises(EvaluationSetError, match=r"the test rows of .*flat cannot be read \(.*test"):
        draw_set("chartqa", 2, tmp_path / "set", tmp_path / "flat")


def test_only_the_files_of_one_split_and_revision_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DocVQA's other splits would be 8 GB more."""
    copy, calls = write(tmp_path / "copy", "docvqa", ROWS["docvqa"]), []

    def load(kind: str, data_files: dict[str, list[str]], split: str) -> Dataset:
        calls.append((kind, data_files, split))
        return Dataset.from_parquet(str(next(copy.glob("DocVQA/*.parquet"))))

    monkeypatch.setattr(datasets, "load_dataset", load)
    folder = draw_set("docvqa", 1, tmp_path / "set", revision="abc123")
    pattern = "hf://datasets/lmms-lab/DocVQA@abc123/DocVQA/validation-*.parquet"
    assert calls == [("parquet", {"validation": [pattern]}, "validation")]
    settings = Manifest.load(folder).settings
    assert (settings["repository"], settings["revision"], settings["seed"]) == ("lmms-lab/DocVQA", "abc123", 0)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), OSError(), ValueError("Unknown split")])
def test_a_failed_download_gives_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(EvaluationSetError, match=r"lmms-lab/ai2d@main cannot be read \(.+\); give --path") as refused:
        draw_set("ai2d", 1, tmp_path / "set")
    assert "\n" not in str(refused.value)


def test_invalid_local_copies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationSetError, match="there is no folder"):
        draw_set("ai2d", 1, tmp_path / "set", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationSetError, match=r"empty cannot be read"):
        draw_set("ai2d", 1, tmp_path / "set", tmp_path / "empty")
    (tmp_path / "cut" / "data").mkdir(parents=True)
    (tmp_path / "cut" / "data" / "test-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(EvaluationSetError, match=r"cut cannot be read \(.*[Pp]arquet") as refused:
        draw_set("ai2d", 1, tmp_path / "set", tmp_path / "cut")
    assert "\n" not in str(refused.value)
    with pytest.raises(EvaluationSetError, match="unknown data set 'gqa'; choose one of textvqa, docvqa"):
        draw_set("gqa", 1, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "spoilt", [{"image": None}, {"answer": "five"}, {"answer": None}, {"options": None}, {"answer": "7"}], ids=str
)
def test_an_invalid_row_is_named(spoilt: dict[str, Any], tmp_path: Path) -> None:
    """No folder of the set remains."""
    copy = write(tmp_path / "copy", "ai2d", [ROWS["ai2d"][0] | spoilt])
    with pytest.raises(EvaluationSetError, match=r"row 0 of ai2d cannot be read \(.*lmms-lab/ai2d"):
        draw_set("ai2d", 1, tmp_path / "set", copy)
    assert not (tmp_path / "set").exists()


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("years of work")
    with pytest.raises(Hf2mnnError, match="holds files that no stage wrote"):
        draw_set("ai2d", 1, tmp_path / "set", write(tmp_path / "copy", "ai2d", ROWS["ai2d"]))
    assert (tmp_path / "set" / "thesis.txt").read_text() == "years of work"


def test_examples_are_plain_json(draw: Callable) -> None:
    folder, _ = draw("mmbench")
    first = json.loads((folder / "examples.jsonl").read_text().splitlines()[0])
    assert set(first) == {"id", "category", "language", "answer", "metric", "messages"}
