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

from hf2mnn.core.errors import EvaluationSetError, first_line, suggest
from hf2mnn.reference.examples import NAME, as_rgb

if TYPE_CHECKING:
    from datasets import Dataset

# Instructions of LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744), which most evaluations use.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
IMAGE_REFERENCE = re.compile(r"<image (\d)>")


@dataclass(frozen=True)
class Question:
    """Question of a data set."""

    parts: list[str | Image.Image]  # in the order of the prompt
    answers: list[str]
    category: str | None = None  # None: the name of the data set


@dataclass(frozen=True)
class LabelledSet:
    """Data set on the Hugging Face hub."""

    repository: str
    split: str
    metric: str  # of `hf2mnn.reference.tasks`
    texts: tuple[str, ...]  # columns that `read` needs besides `images`
    read: Callable[[dict[str, Any]], Question]
    config: str | None = None
    images: tuple[str, ...] = ("image",)
    keep: Callable[[dict[str, Any]], bool] = lambda row: True  # filter on rows without their images

    @property
    def columns(self) -> list[str]:
        """Columns that `read` needs."""
        return [*self.images, *self.texts]

    @property
    def files(self) -> str:
        """Pattern of the split's parquet files, so that no other split is downloaded."""
        return f"{self.config or 'data'}/{self.split}-*.parquet"


def _options(question: str, options: list[str], answer: str) -> str:
    """Return a multiple-choice question with lettered options; `answer` must be one of the letters."""
    lettered = {chr(ord("A") + index): option for index, option in enumerate(options)}
    if answer not in lettered:
        raise ValueError(f"the answer {answer!r} is not one of its {len(options)} options")
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in lettered.items()), LETTER])


def _short(row: dict[str, Any]) -> Question:
    """Read a row with short answers; its first type, if it has one, is the category."""
    answers = row["answers"] if "answers" in row else [row["answer"]]
    types = row.get("question_types") or [row.get("type")]
    return Question([row["image"], f"{row['question']}\n{SHORT}"], answers, types[0])


def _ai2d(row: dict[str, Any]) -> Question:
    """Read a row; `answer` is the index of the right option, as a string."""
    letter = chr(ord("A") + int(row["answer"]))
    return Question([row["image"], _options(row["question"], row["options"], letter)], [letter])


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
    parts, inserted = IMAGE_REFERENCE.split(text), set()  # texts at even indices, numbers of images at odd ones
    for index in range(1, len(parts), 2):
        number = parts[index]
        parts[index] = f"image {number}" if number in inserted else row[f"image_{number}"]
        inserted.add(number)
    subject = re.sub(r"^\w+?_(.*)_\d+$", r"\1", row["id"])
    return Question([part for part in parts if part != ""], [row["answer"]], subject)


# Repositories, splits and columns are those of the dataset cards on the hub (README.md, dataset_info); those of ChartQA
# are of upload_chartqa.py in lmms-eval, which wrote the repository.
DATASETS = {
    "textvqa": LabelledSet("lmms-lab/textvqa", "validation", "vqa", ("question", "answers"), _short),
    "docvqa": LabelledSet(
        "lmms-lab/DocVQA", "validation", "anls", ("question", "question_types", "answers"), _short, "DocVQA"
    ),
    "chartqa": LabelledSet("lmms-lab/ChartQA", "test", "relaxed", ("question", "answer", "type"), _short),
    "ai2d": LabelledSet("lmms-lab/ai2d", "test", "choice", ("question", "options", "answer"), _ai2d),
    "mmbench": LabelledSet(
        "lmms-lab/MMBench", "dev", "choice", ("question", "hint", *"ABCD", "answer", "category"), _mmbench, "en"
    ),
    # Without the few open questions, which have a metric of their own.
    "mmmu": LabelledSet(
        "lmms-lab/MMMU",
        "validation",
        "choice",
        ("id", "question", "options", "answer", "question_type"),
        _mmmu,
        images=tuple(f"image_{number}" for number in range(1, 8)),
        keep=lambda row: row["question_type"] == "multiple-choice",
    ),
}


def get_dataset(name: str) -> LabelledSet:
    """Return a labelled data set, or raise EvaluationSetError."""
    if name not in DATASETS:
        hint = suggest(name, list(DATASETS), listed=True)
        raise EvaluationSetError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}{hint}")
    return DATASETS[name]


def _load(dataset: LabelledSet, name: str, path: Path | None, revision: str) -> Dataset:
    """Load the split's columns from the hub, or from a local copy in `path`; rows are read on access."""
    import httpx2
    from datasets import Image as ImageFeature
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    if path is not None and not path.is_dir():
        raise EvaluationSetError(f"there is no folder {path}; give the folder with the data set's parquet files")
    where = f"hf://datasets/{dataset.repository}@{revision}" if path is None else str(path)
    try:
        files = [f"{where}/{dataset.files}"] if path is None else sorted(map(str, path.glob(dataset.files)))
        if files:
            rows = load_dataset("parquet", data_files={dataset.split: files}, split=dataset.split)
        else:
            config = dataset.config if dataset.config in get_dataset_config_names(where) else None
            rows = load_dataset(where, config, split=dataset.split)
    except (DatasetsError, HfHubHTTPError, httpx2.TransportError, OSError, ValueError) as error:
        # The message of DatasetsError is generic ("An error occurred while ..."); its cause is specific.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise EvaluationSetError(
            f"the {dataset.split} rows of {where} cannot be read ({first_line(cause)}); give --path a folder with the"
            " parquet files"
        ) from None
    if missing := [column for column in dataset.columns if column not in rows.column_names]:
        raise EvaluationSetError(
            f"the rows of {name} have no column {missing[0]!r}, only {', '.join(rows.column_names)}; check that they"
            f" are of {dataset.repository}"
        )
    rows = rows.select_columns(dataset.columns)
    for column in dataset.images:
        rows = rows.cast_column(column, ImageFeature())
    return rows


def _content(part: str | Image.Image, folder: Path) -> dict[str, str]:
    """Return a part of a message; an image is saved under its digest, so that questions share it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    image = as_rgb(part)
    name = f"images/{hashlib.sha256(f'{image.size}'.encode() + image.tobytes()).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        image.save(folder / name)
    return {"type": "image", "image": name}


def _record(name: str, number: int, rows: Dataset, chosen: LabelledSet, folder: Path) -> dict[str, Any]:
    try:
        question = chosen.read(rows[number])
        if not question.answers or not all(isinstance(answer, str) for answer in question.answers):
            raise ValueError("no answer")
        content = [_content(part, folder) for part in question.parts]
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, OSError) as error:
        raise EvaluationSetError(
            f"row {number} of {name} cannot be read ({type(error).__name__}: {error}); check that the rows are of"
            f" {chosen.repository}"
        ) from None
    return {
        "id": f"{name}-{number:05}",
        "category": name if question.category is None else question.category,
        "language": "en",
        "answer": question.answers,
        "metric": chosen.metric,
        "messages": [{"role": "user", "content": content}],
    }


def draw_examples(
    dataset: str, samples: int, folder: Path, path: Path | None = None, revision: str = "main", seed: int = 0
) -> dict[str, int]:
    """Write an evaluation set with a random sample of a data set, from a local copy in `path` or from the hub.

    `revision` is a commit, tag or branch on the hub. Returns the numbers of `examples` and of available `rows`.
    """
    chosen = get_dataset(dataset)
    rows = _load(chosen, dataset, path, revision)
    texts = rows.select_columns(list(chosen.texts))
    numbers = [number for number, row in enumerate(texts) if chosen.keep(row)]
    if not numbers:
        raise EvaluationSetError(f"{dataset} has no usable rows; check that they are of {chosen.repository}")
    if len(numbers) < samples:
        print(f"{dataset} has only {len(numbers)} rows for {samples} samples; using all", file=sys.stderr)
    random.Random(seed).shuffle(numbers)  # so a larger sample with the same seed contains a smaller one
    (folder / "images").mkdir()
    records = [_record(dataset, number, rows, chosen, folder) for number in sorted(numbers[:samples])]
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"examples": len(records), "rows": len(numbers)}
