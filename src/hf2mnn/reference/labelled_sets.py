"""Evaluation sets from public benchmarks: TextVQA, DocVQA, ChartQA, AI2D, MMBench and MMMU."""

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

# Instructions of LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744), which most evaluations use.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
IMAGE_REFERENCE = re.compile(r"<image (\d)>")


@dataclass(frozen=True)
class Question:
    """Question of a data set.

    Attributes:
        parts: Texts and images in the order of the prompt.
        answers: Accepted answers.
        category: Category in the evaluation set.
    """

    parts: list[str | Image.Image]
    answers: list[str]
    category: str


@dataclass(frozen=True)
class LabelledSet:
    """Data set on the Hugging Face hub.

    Attributes:
        repository: Repository on the hub.
        split: Split.
        files: Pattern of the split's parquet files, so that no other split is downloaded.
        metric: Metric of `hf2mnn.reference.tasks`.
        columns: Columns that `read` needs.
        read: Function from a row to its question.
        config: Configuration of the data set.
        images: Columns that hold images.
        keep: Filter on rows without their images; None keeps all.
    """

    repository: str
    split: str
    files: str
    metric: str
    columns: tuple[str, ...]
    read: Callable[[dict[str, Any]], Question]
    config: str = "default"
    images: tuple[str, ...] = ("image",)
    keep: Callable[[dict[str, Any]], bool] | None = None


def _options(question: str, options: list[str], answer: str) -> str:
    """Return a multiple-choice question with lettered options; `answer` must be one of the letters."""
    lettered = {chr(ord("A") + index): option for index, option in enumerate(options)}
    if answer not in lettered:
        raise ValueError(f"the answer {answer!r} is not one of its {len(options)} options")
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in lettered.items()), LETTER])


def _textvqa(row: dict[str, Any]) -> Question:
    return Question([row["image"], f"{row['question']}\n{SHORT}"], row["answers"], "textvqa")


def _docvqa(row: dict[str, Any]) -> Question:
    kinds = row["question_types"] or ["docvqa"]
    return Question([row["image"], f"{row['question']}\n{SHORT}"], row["answers"], kinds[0])


def _chartqa(row: dict[str, Any]) -> Question:
    return Question([row["image"], f"{row['question']}\n{SHORT}"], [row["answer"]], row["type"])


def _ai2d(row: dict[str, Any]) -> Question:
    """Read a row; `answer` is the index of the right option, as a string."""
    letter = chr(ord("A") + int(row["answer"]))
    return Question([row["image"], _options(row["question"], row["options"], letter)], [letter], "ai2d")


def _mmbench(row: dict[str, Any]) -> Question:
    """Read a row; missing options and hints are null or "nan"."""
    options = [row[letter] for letter in "ABCD" if row[letter] not in (None, "", "nan")]
    hint = "" if row["hint"] in (None, "", "nan") else f"{row['hint']}\n"
    text = _options(f"{hint}{row['question']}", options, row["answer"])
    return Question([row["image"], text], [row["answer"]], row["category"])


def _mmmu(row: dict[str, Any]) -> Question:
    """Read a row; `options` is a Python list as a string.

    The first reference to an image is replaced by the image, later ones by its number.
    """
    text = _options(row["question"], ast.literal_eval(row["options"]), row["answer"])
    parts, inserted, end = [], set(), 0
    for reference in IMAGE_REFERENCE.finditer(text):
        number = reference[1]
        parts.append(text[end : reference.start()])
        parts.append(f"image {number}" if number in inserted else row[f"image_{number}"])
        inserted.add(number)
        end = reference.end()
    parts.append(text[end:])
    subject = re.sub(r"^\w+?_(.*)_\d+$", r"\1", row["id"])
    return Question([part for part in parts if part != ""], [row["answer"]], subject)


# Repositories, splits and columns are those of the dataset cards on the hub (README.md, dataset_info).
DATASETS = {
    # card: question_id, question, image, answers (ten), image_classes, ocr_tokens, ...
    "textvqa": LabelledSet(
        repository="lmms-lab/textvqa",
        split="validation",
        files="data/validation-*.parquet",
        metric="vqa",
        columns=("image", "question", "answers"),
        read=_textvqa,
    ),
    # card: questionId, question, question_types, image, docId, ucsf_document_id, answers, ...
    "docvqa": LabelledSet(
        repository="lmms-lab/DocVQA",
        config="DocVQA",
        split="validation",
        files="DocVQA/validation-*.parquet",
        metric="anls",
        columns=("image", "question", "question_types", "answers"),
        read=_docvqa,
    ),
    # upload_chartqa.py of lmms-eval, which wrote the repository: type, question, answer, image
    "chartqa": LabelledSet(
        repository="lmms-lab/ChartQA",
        split="test",
        files="data/test-*.parquet",
        metric="relaxed",
        columns=("image", "question", "answer", "type"),
        read=_chartqa,
    ),
    # card: question, options, answer, image
    "ai2d": LabelledSet(
        repository="lmms-lab/ai2d",
        split="test",
        files="data/test-*.parquet",
        metric="choice",
        columns=("image", "question", "options", "answer"),
        read=_ai2d,
    ),
    # card, configuration "en": index, question, hint, answer, A, B, C, D, category, image, source, L2-category, ...
    "mmbench": LabelledSet(
        repository="lmms-lab/MMBench",
        config="en",
        split="dev",
        files="en/dev-*.parquet",
        metric="choice",
        columns=("image", "question", "hint", "A", "B", "C", "D", "answer", "category"),
        read=_mmbench,
    ),
    # card: id, question, options, explanation, image_1 to image_7, img_type, answer, question_type, subfield, ...
    # Without the few open questions, which have a metric of their own.
    "mmmu": LabelledSet(
        repository="lmms-lab/MMMU",
        split="validation",
        files="data/validation-*.parquet",
        metric="choice",
        columns=("id", "question", "options", "answer", "question_type", *(f"image_{n}" for n in range(1, 8))),
        images=tuple(f"image_{n}" for n in range(1, 8)),
        read=_mmmu,
        keep=lambda row: row["question_type"] == "multiple-choice",
    ),
}


def get_dataset(name: str) -> LabelledSet:
    """Return a labelled data set.

    Raises:
        EvaluationSetError: There is no data set of this name.
    """
    if name not in DATASETS:
        raise EvaluationSetError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _load(dataset: LabelledSet, path: Path | None, revision: str) -> Dataset:
    """Load the split from the hub, or from a local copy in `path`, memory-mapped: rows are read on access."""
    import httpx2
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    where = f"hf://datasets/{dataset.repository}@{revision}" if path is None else str(path)
    if path is not None and not path.is_dir():
        raise EvaluationSetError(f"there is no folder {path}; give the folder with the data set's parquet files")
    try:
        if path is None:
            return load_dataset("parquet", data_files={dataset.split: f"{where}/{dataset.files}"}, split=dataset.split)
        if files := sorted(str(file) for file in path.glob(dataset.files)):
            return load_dataset("parquet", data_files={dataset.split: files}, split=dataset.split)
        config = dataset.config if dataset.config in get_dataset_config_names(where) else None
        return load_dataset(where, config, split=dataset.split)
    except (DatasetsError, HfHubHTTPError, httpx2.TransportError, OSError, ValueError) as error:
        # The message of DatasetsError is generic ("An error occurred while ..."); its cause is specific.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise EvaluationSetError(
            f"the {dataset.split} rows of {where} cannot be read ({reason}); give --path a folder with the parquet"
            " files"
        ) from None


def _check_columns(rows: Dataset, chosen: LabelledSet, name: str) -> Dataset:
    """Return `rows` with the columns of the data set, and images decoded.

    Raises:
        EvaluationSetError: A column is missing.
    """
    from datasets import Image as ImageFeature

    missing = [column for column in chosen.columns if column not in rows.column_names]
    if missing:
        raise EvaluationSetError(
            f"the rows of {name} have no column {missing[0]!r}, only {', '.join(rows.column_names)}; check that they"
            f" are of {chosen.repository}"
        )
    rows = rows.select_columns(list(chosen.columns))
    for column in chosen.images:
        if not isinstance(rows.features[column], ImageFeature):
            rows = rows.cast_column(column, ImageFeature())
    return rows


def _sample(rows: Dataset, chosen: LabelledSet, samples: int, seed: int) -> tuple[list[int], int]:
    """Draw row numbers at random.

    A larger sample with the same seed contains a smaller one.

    Returns:
        Row numbers in ascending order, and the number of rows to draw from.
    """
    numbers = list(range(len(rows)))
    if chosen.keep is not None:
        texts = rows.select_columns([column for column in chosen.columns if column not in chosen.images])
        numbers = [number for number, row in enumerate(texts) if chosen.keep(row)]
    shuffled = list(numbers)
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[:samples]), len(numbers)


def _save_image(image: Image.Image, folder: Path) -> str:
    """Save an image under its digest, so that questions share it, and return its path below `folder`."""
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
            raise ValueError("no answer")
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": _save_image(part, folder)}
            for part in question.parts
        ]
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, OSError) as error:
        raise EvaluationSetError(
            f"row {number} of {name} cannot be read ({type(error).__name__}: {error}); check that the rows are of"
            f" {chosen.repository}"
        ) from None
    return {
        "id": f"{name}-{number:05}",
        "category": question.category,
        "language": "en",
        "answer": question.answers,
        "metric": chosen.metric,
        "messages": [{"role": "user", "content": content}],
    }


def draw_examples(
    dataset: str, samples: int, folder: Path, path: Path | None = None, revision: str = "main", seed: int = 0
) -> dict[str, int]:
    """Write an evaluation set with a random sample of a data set.

    Args:
        dataset: Name in DATASETS.
        samples: Number of examples.
        folder: Output folder.
        path: Folder with a local copy of the data set; None downloads it.
        revision: Commit, tag or branch on the hub.
        seed: Seed of the sample.

    Returns:
        Numbers of `examples` written and of `rows` available.

    Raises:
        EvaluationSetError: The data set is unknown, cannot be downloaded or read, or has other columns.
    """
    chosen = get_dataset(dataset)
    rows = _check_columns(_load(chosen, path, revision), chosen, dataset)
    numbers, available = _sample(rows, chosen, samples, seed)
    if not numbers:
        raise EvaluationSetError(f"{dataset} has no usable rows; check that they are of {chosen.repository}")
    if len(numbers) < samples:
        print(f"{dataset} has only {available} rows for {samples} samples; using all", file=sys.stderr)
    (folder / "images").mkdir()
    records = [_record(dataset, number, rows, chosen, folder) for number in numbers]
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"examples": len(records), "rows": available}
