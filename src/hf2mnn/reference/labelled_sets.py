"""Evaluation sets of labelled data sets: TextVQA, DocVQA, ChartQA, AI2D, MMBench and MMMU."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.reference.examples import NAME

if TYPE_CHECKING:
    from datasets import Dataset

# What LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744) asks for, and most evaluations since.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PLACE = re.compile(r"<image (\d)>")


@dataclass(frozen=True)
class Question:
    """`parts` in the order of the prompt, texts and images; `answers` that are accepted."""

    parts: list[str | Image.Image]
    answers: list[str]
    category: str


@dataclass(frozen=True)
class LabelledSet:
    """Where a data set lies on the hub, and what a row of it asks.

    files: pattern of the split's parquet files in the repository, so that no other split is downloaded; `read` needs
    `columns`, of which `images` hold images; rows that `keep` (given the columns without images) refuses are no
    part of the set.
    """

    repository: str
    config: str
    split: str
    files: str
    metric: str
    language: str
    columns: tuple[str, ...]
    images: tuple[str, ...]
    read: Callable[[dict[str, Any]], Question]
    keep: Callable[[dict[str, Any]], bool] | None = None


def _options(question: str, options: list[str], answer: str) -> str:
    """The question with lettered options, of which `answer`, a letter, must be one."""
    lettered = {chr(ord("A") + place): option for place, option in enumerate(options)}
    if answer not in lettered:
        raise ValueError(f"the answer {answer!r} is none of its {len(options)} options")
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in lettered.items()), LETTER])


def _textvqa(row: dict[str, Any]) -> Question:
    return Question([row["image"], f"{row['question']}\n{SHORT}"], row["answers"], "textvqa")


def _docvqa(row: dict[str, Any]) -> Question:
    kinds = row["question_types"] or ["docvqa"]
    return Question([row["image"], f"{row['question']}\n{SHORT}"], row["answers"], kinds[0])


def _chartqa(row: dict[str, Any]) -> Question:
    return Question([row["image"], f"{row['question']}\n{SHORT}"], [row["answer"]], row["type"])


def _ai2d(row: dict[str, Any]) -> Question:
    """`answer` is the right option's place from 0, as text."""
    letter = chr(ord("A") + int(row["answer"]))
    return Question([row["image"], _options(row["question"], row["options"], letter)], [letter], "ai2d")


def _mmbench(row: dict[str, Any]) -> Question:
    """Options and hints that there are not are null or "nan"."""
    options = [row[letter] for letter in "ABCD" if row[letter] not in (None, "", "nan")]
    hint = "" if row["hint"] in (None, "", "nan") else f"{row['hint']}\n"
    text = _options(f"{hint}{row['question']}", options, row["answer"])
    return Question([row["image"], text], [row["answer"]], row["category"])


def _mmmu(row: dict[str, Any]) -> Question:
    """`options` is a Python list as text. An image stands where it is first named; after that its number does."""
    text = _options(row["question"], ast.literal_eval(row["options"]), row["answer"])
    parts, seen, end = [], set(), 0
    for place in PLACE.finditer(text):
        parts.append(text[end : place.start()])
        parts.append(f"image {place[1]}" if place[1] in seen else row[f"image_{place[1]}"])
        seen.add(place[1])
        end = place.end()
    parts.append(text[end:])
    subject = re.sub(r"^\w+?_(.*)_\d+$", r"\1", row["id"])
    return Question([part for part in parts if part != ""], [row["answer"]], subject)


# Repositories, splits and columns are those of the dataset cards on the hub (README.md, dataset_info).
DATASETS = {
    # card: question_id, question, image, answers (ten), image_classes, ocr_tokens, ...
    "textvqa": LabelledSet(
        repository="lmms-lab/textvqa",
        config="default",
        split="validation",
        files="data/validation-*.parquet",
        metric="vqa",
        language="en",
        columns=("image", "question", "answers"),
        images=("image",),
        read=_textvqa,
    ),
    # card: questionId, question, question_types, image, docId, ucsf_document_id, answers, ...
    "docvqa": LabelledSet(
        repository="lmms-lab/DocVQA",
        config="DocVQA",
        split="validation",
        files="DocVQA/validation-*.parquet",
        metric="anls",
        language="en",
        columns=("image", "question", "question_types", "answers"),
        images=("image",),
        read=_docvqa,
    ),
    # lmms-eval's upload_chartqa.py, which made the repository: type, question, answer, image
    "chartqa": LabelledSet(
        repository="lmms-lab/ChartQA",
        config="default",
        split="test",
        files="data/test-*.parquet",
        metric="relaxed",
        language="en",
        columns=("image", "question", "answer", "type"),
        images=("image",),
        read=_chartqa,
    ),
    # card: question, options, answer, image
    "ai2d": LabelledSet(
        repository="lmms-lab/ai2d",
        config="default",
        split="test",
        files="data/test-*.parquet",
        metric="choice",
        language="en",
        columns=("image", "question", "options", "answer"),
        images=("image",),
        read=_ai2d,
    ),
    # card, configuration en: index, question, hint, answer, A, B, C, D, category, image, source, L2-category, ...
    "mmbench": LabelledSet(
        repository="lmms-lab/MMBench",
        config="en",
        split="dev",
        files="en/dev-*.parquet",
        metric="choice",
        language="en",
        columns=("image", "question", "hint", "A", "B", "C", "D", "answer", "category"),
        images=("image",),
        read=_mmbench,
    ),
    # card: id, question, options, explanation, image_1 to image_7, img_type, answer, question_type, subfield, ...
    # Its few open questions are scored by rules of their own, and are left out.
    "mmmu": LabelledSet(
        repository="lmms-lab/MMMU",
        config="default",
        split="validation",
        files="data/validation-*.parquet",
        metric="choice",
        language="en",
        columns=("id", "question", "options", "answer", "question_type", *(f"image_{n}" for n in range(1, 8))),
        images=tuple(f"image_{n}" for n in range(1, 8)),
        read=_mmmu,
        keep=lambda row: row["question_type"] == "multiple-choice",
    ),
}


def dataset_named(name: str) -> LabelledSet:
    """Return a labelled data set. Raises EvaluationSetError for an unknown name."""
    if name not in DATASETS:
        raise EvaluationSetError(f"there is no loader for {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def _load(chosen: LabelledSet, path: Path | None, revision: str) -> Dataset:
    """The split, on disk and mapped into memory: a row is read when it is asked for."""
    import httpx2
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    where = f"hf://datasets/{chosen.repository}@{revision}" if path is None else str(path)
    if path is not None and not path.is_dir():
        raise EvaluationSetError(f"there is no folder {path}; give the one that holds the data set's parquet files")
    try:
        if path is None:
            return load_dataset("parquet", data_files={chosen.split: f"{where}/{chosen.files}"}, split=chosen.split)
        if found := sorted(str(file) for file in path.glob(chosen.files)):
            return load_dataset("parquet", data_files={chosen.split: found}, split=chosen.split)
        config = chosen.config if chosen.config in get_dataset_config_names(where) else None
        return load_dataset(where, config, split=chosen.split)
    except (DatasetsError, HfHubHTTPError, httpx2.TransportError, OSError, ValueError) as error:
        # Without a message of its own ("An error occurred while ..."), what it comes from says more.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise EvaluationSetError(
            f"the {chosen.split} rows of {where} cannot be read ({reason}); give --path a folder with its parquet files"
        ) from None


def _check_columns(rows: Dataset, chosen: LabelledSet, name: str) -> Dataset:
    """`rows` with the columns that are needed, images as images."""
    from datasets import Image as ImageFeature

    missing = [column for column in chosen.columns if column not in rows.column_names]
    if missing:
        raise EvaluationSetError(
            f"{name} has no column {missing[0]!r} here; there are {', '.join(rows.column_names)}: is this"
            f" {chosen.repository}?"
        )
    rows = rows.select_columns(list(chosen.columns))
    for column in chosen.images:
        if not isinstance(rows.features[column], ImageFeature):
            rows = rows.cast_column(column, ImageFeature())
    return rows


def _sample(rows: Dataset, chosen: LabelledSet, samples: int, seed: int) -> tuple[list[int], int]:
    """(numbers of the rows taken, in order; number of rows there are). More samples keep those of fewer."""
    numbers = list(range(len(rows)))
    if chosen.keep is not None:
        texts = rows.select_columns([column for column in chosen.columns if column not in chosen.images])
        numbers = [number for number, row in enumerate(texts) if chosen.keep(row)]
    shuffled = list(numbers)
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[:samples]), len(numbers)


def _save_image(image: Image.Image, folder: Path) -> str:
    """File name under `folder`; an image that several questions share is one file."""
    image = image.convert("RGB")
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
    name = f"images/{digest}.png"
    if not (folder / name).exists():
        image.save(folder / name)
    return name


def _record(name: str, number: int, rows: Dataset, chosen: LabelledSet, folder: Path) -> dict[str, Any]:
    try:
        question = chosen.read(rows[number])
        if not question.answers or not all(isinstance(answer, str) for answer in question.answers):
            raise ValueError("it has no answer")
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": _save_image(part, folder)}
            for part in question.parts
        ]
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, OSError) as error:
        raise EvaluationSetError(
            f"row {number} of {name} is not what its card says ({type(error).__name__}: {error}); is this"
            f" {chosen.repository}?"
        ) from None
    return {
        "id": f"{name}-{number:05}",
        "category": question.category,
        "language": chosen.language,
        "answer": question.answers,
        "metric": chosen.metric,
        "messages": [{"role": "user", "content": content}],
    }


def draw_examples(
    dataset: str, samples: int, folder: Path, path: Path | None = None, revision: str = "main", seed: int = 0
) -> dict[str, int]:
    """Write an evaluation set of `samples` rows of the hub's data set, or of a local copy at `path`, to `folder`.

    Returns:
        Numbers of `examples` written and of `rows` available.

    Raises:
        EvaluationSetError: There is no such set, it cannot be reached or read, or it has other columns.
    """
    chosen = dataset_named(dataset)
    rows = _check_columns(_load(chosen, path, revision), chosen, dataset)
    numbers, available = _sample(rows, chosen, samples, seed)
    if not numbers:
        raise EvaluationSetError(f"{dataset} has no rows to draw; is this {chosen.repository}?")
    if len(numbers) < samples:
        print(f"{dataset} has {available} rows, fewer than the {samples} wanted; all are used", file=sys.stderr)
    (folder / "images").mkdir()
    records = [_record(dataset, number, rows, chosen, folder) for number in numbers]
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"examples": len(records), "rows": available}
