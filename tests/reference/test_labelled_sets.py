"""Labelled data sets: each loader on a small local copy with its card's columns and types, through to the examples."""

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
from hf2mnn.stages.examples import draw_set

TEXT, TEXTS, IMAGE = Value("string"), List(Value("string")), ImageFeature()


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
    """A parquet file where the hub's repository has it, with images as bytes inside, as the hub has them."""
    features = Features(FEATURES[name])
    made = Dataset.from_list([{column: row.get(column) for column in features} for row in rows], features=features)
    path = folder / DATASETS[name].files.replace("*", "00000-of-00001")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(path)
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No word to the hub, and nothing left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], tuple[Path, list[Example]]]:
    """The evaluation set of all ROWS of a data set, and its examples as the reference stage reads them."""

    def make(name: str) -> tuple[Path, list[Example]]:
        folder = draw_set(name, len(ROWS[name]), tmp_path / "set", write(tmp_path / "copy", name, ROWS[name]))
        return folder, read_examples(folder)

    return make


def said(example: Example) -> str:
    """Its prompt, with an image as []."""
    (turn,) = example.messages
    return "".join("[]" if part["type"] == "image" else part["text"] for part in turn["content"])


def test_every_loader_is_tested() -> None:
    assert FEATURES.keys() == ROWS.keys() == DATASETS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_rows_become_examples_with_their_images(name: str, made: Callable) -> None:
    """Whole and vouched for; the label itself is right by the set's own metric, and nonsense is not."""
    folder, examples = made(name)
    assert Manifest.load(folder).verify() == folder
    assert [example.id for example in examples] == [f"{name}-00000", f"{name}-00001"]
    assert {example.metric for example in examples} == {DATASETS[name].metric}
    for example in examples:
        assert score_answer(example.metric, example.answers[0], example.answers) == 1
        assert score_answer(example.metric, "nonsense", example.answers) == 0
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
def test_each_set_asks_as_the_field_does(
    name: str, prompts: list[str], answers: list[list[str]], categories: list[str], made: Callable
) -> None:
    _, examples = made(name)
    assert [said(example) for example in examples] == prompts
    assert [example.answers for example in examples] == answers
    assert [example.category for example in examples] == categories


def test_a_image_that_is_asked_about_twice_is_one_file(made: Callable) -> None:
    """DocVQA has four questions a page: the vision tower need not see it four times."""
    folder, examples = made("docvqa")
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


def test_fewer_rows_than_wanted_are_all_taken_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MMMU's open question does not count: it is no part of the set."""
    folder = draw_set("mmmu", 9, tmp_path / "set", write(tmp_path / "copy", "mmmu", ROWS["mmmu"]))
    assert "mmmu has 2 rows, fewer than the 9 wanted; all are taken" in capsys.readouterr().err
    assert ids(folder) == {"mmmu-00000", "mmmu-00001"}
    assert Manifest.load(folder).results == {"examples": 2, "rows": 2}


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "data"
    copy.mkdir(parents=True)
    Dataset.from_dict({"query": ["?"], "label": ["1"]}).to_parquet(copy / "test-00000-of-00001.parquet")
    with pytest.raises(EvaluationSetError, match=r"no column 'image' here; there are query, label: .*lmms-lab/ChartQA"):
        draw_set("chartqa", 1, tmp_path / "set", copy.parent)


def test_images_without_a_note_that_they_are_some_are_read(tmp_path: Path) -> None:
    """A copy made by another tool has the bytes but not the mark of the datasets library."""
    copy = write(tmp_path / "copy", "ai2d", ROWS["ai2d"])
    (file,) = copy.glob("data/*.parquet")
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    folder = draw_set("ai2d", 2, tmp_path / "set", copy)
    assert len(ids(folder)) == 2


def test_other_layouts_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    """A folder whose names tell the split, and not in the place where the hub has it."""
    copy = write(tmp_path / "hub", "docvqa", ROWS["docvqa"])
    (file,) = copy.glob("DocVQA/*.parquet")
    (tmp_path / "flat").mkdir()
    file.rename(tmp_path / "flat" / "validation.parquet")
    assert len(ids(draw_set("docvqa", 2, tmp_path / "set", tmp_path / "flat"))) == 2
    with pytest.raises(EvaluationSetError, match=r"the test rows of .*flat cannot be read \(.*test"):
        draw_set("chartqa", 2, tmp_path / "set", tmp_path / "flat")


def test_the_hub_is_asked_for_one_split_at_one_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DocVQA's other splits would be 8 GB more."""
    copy, asked = write(tmp_path / "copy", "docvqa", ROWS["docvqa"]), []

    def load(kind: str, data_files: dict[str, str], split: str) -> Dataset:
        asked.append((kind, data_files, split))
        return Dataset.from_parquet(str(next(copy.glob("DocVQA/*.parquet"))))

    monkeypatch.setattr(datasets, "load_dataset", load)
    folder = draw_set("docvqa", 1, tmp_path / "set", revision="abc123")
    pattern = "hf://datasets/lmms-lab/DocVQA@abc123/DocVQA/validation-*.parquet"
    assert asked == [("parquet", {"validation": pattern}, "validation")]
    settings = Manifest.load(folder).settings
    assert (settings["repository"], settings["revision"], settings["seed"]) == ("lmms-lab/DocVQA", "abc123", 0)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), OSError(), ValueError("Unknown split")])
def test_a_hub_that_does_not_answer_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(EvaluationSetError, match=r"lmms-lab/ai2d@main cannot be read \(.+\); give --path") as refused:
        draw_set("ai2d", 1, tmp_path / "set")
    assert "\n" not in str(refused.value)


def test_local_copies_that_are_none(tmp_path: Path) -> None:
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
    with pytest.raises(EvaluationSetError, match="no loader for 'gqa'; there are textvqa, docvqa"):
        draw_set("gqa", 1, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "spoilt", [{"image": None}, {"answer": "five"}, {"answer": None}, {"options": None}, {"answer": "7"}], ids=str
)
def test_a_row_that_is_not_as_its_card_says_is_named(spoilt: dict[str, Any], tmp_path: Path) -> None:
    """And nothing of the set is left."""
    copy = write(tmp_path / "copy", "ai2d", [ROWS["ai2d"][0] | spoilt])
    with pytest.raises(EvaluationSetError, match=r"row 0 of ai2d is not what its card says"):
        draw_set("ai2d", 1, tmp_path / "set", copy)
    assert not (tmp_path / "set").exists()


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("years of work")
    with pytest.raises(Hf2mnnError, match="holds files that no stage has made"):
        draw_set("ai2d", 1, tmp_path / "set", write(tmp_path / "copy", "ai2d", ROWS["ai2d"]))
    assert (tmp_path / "set" / "thesis.txt").read_text() == "years of work"


def test_examples_are_plain_json(made: Callable) -> None:
    folder, _ = made("mmbench")
    first = json.loads((folder / "examples.jsonl").read_text().splitlines()[0])
    assert set(first) == {"id", "category", "language", "answer", "metric", "messages"}
