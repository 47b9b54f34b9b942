"""Evaluation sets: a folder with examples.jsonl and the images that it names.

One JSON object a line:

    {"id": "count-en-3", "category": "count", "language": "en", "answer": "2", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "images/003.png"},
                                     {"type": "text", "text": "How many things are there?"}]}]}

`messages` is what transformers' chat templates take; `answer` is left out where no one answer is right, and a list
where there are several. `metric`, a key of `hf2mnn.reference.tasks.METRICS`, says how an answer is held against them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.untrusted import inside, parse_json, read_bytes
from hf2mnn.reference.tasks import METRICS

NAME = "examples.jsonl"
MOST_BYTES = 1 << 28
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Of images. PIL knows others, among them PostScript, for which it starts an interpreter."""


NOT_TAKEN = {
    "video": "a video, which MNN's engine 3.6.1 has no input for; give frames of it as images",
    "audio": "a sound, which no family here takes; leave it out",
    "image_url": "an image_url; name a file of the set as {'type': 'image', 'image': FILE}",
}
"""Kinds of parts that chat templates know and no example may have."""


@dataclass(frozen=True)
class Example:
    id: str
    category: str
    language: str
    messages: list[dict[str, Any]]
    answers: list[str] | None
    metric: str = "exact"

    @property
    def images(self) -> list[str]:
        """File names of the images, in the order of the prompt."""
        return image_names(self.messages)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message's content, which may be a text alone."""
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def image_names(messages: list[dict[str, Any]]) -> list[str]:
    """File names of the images of a conversation, in its order. Templates know an image by the key alone, too."""
    parts = [part for message in messages for part in parts_of(message)]
    return [part["image"] for part in parts if part.get("type") == "image" or "image" in part]


def _answers(record: dict[str, Any], where: str) -> tuple[list[str] | None, str]:
    """Accepted answers and metric of a record."""
    answers, metric = record.get("answer"), record.get("metric", "exact")
    if answers is None and "metric" in record:
        raise EvaluationSetError(f"{where} has a metric but no answer; add one, see docs/evaluation.md")
    if metric not in METRICS:
        raise EvaluationSetError(
            f"{where} has the metric {metric!r}; there are {', '.join(METRICS)}; see docs/evaluation.md"
        )
    answers = [answers] if isinstance(answers, str) else answers
    if answers is not None and not (
        isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
    ):
        raise EvaluationSetError(
            f"{where} has an answer that is neither a text nor a list of texts; see docs/evaluation.md"
        )
    return answers, metric


def check_messages(messages: list[dict[str, Any]], folder: Path) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError for what no chat template takes, for what MNN's engine
    cannot be given, and for images that are not in the folder.
    """
    if not isinstance(messages, list):
        raise TypeError("messages are a list")
    for message in messages:
        parts = parts_of(message)
        if not isinstance(message["role"], str) or not all(isinstance(part.get("text", ""), str) for part in parts):
            raise TypeError("roles and contents are texts")
        for part in parts:
            kind = part.get("type", "text")
            if other := ({kind} | part.keys()) & NOT_TAKEN.keys():
                name = min(other)
                raise ValueError(f"a part of it is {NOT_TAKEN[name]}")
    for name in image_names(messages):
        inside(folder, name)


def _parse(line: str, where: str, folder: Path) -> Example:
    try:
        record = parse_json(line)
        answers, metric = _answers(record, where)
        example = Example(
            id=record["id"],
            category=record.get("category", "any"),
            language=record.get("language", "any"),
            messages=record["messages"],
            answers=answers,
            metric=metric,
        )
        if not isinstance(example.category, str) or not isinstance(example.language, str):
            raise TypeError("category and language are texts")
        check_messages(example.messages, folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationSetError(
            f"{where} is not an example ({type(error).__name__}: {error}); see docs/evaluation.md"
        ) from None
    if not example.messages or not isinstance(example.id, str) or "/" in example.id:
        raise EvaluationSetError(f"{where} needs messages and an id without '/'; see docs/evaluation.md")
    return example


def read_examples(folder: Path) -> list[Example]:
    """Raises EvaluationSetError for a missing file, a bad line, an id used twice, or an empty set."""
    path = Path(folder) / NAME
    try:
        lines = read_bytes(path, MOST_BYTES).decode().split("\n")
    except OSError:
        raise EvaluationSetError(
            f"{folder} is not an evaluation set: it has no {NAME}; see docs/evaluation.md"
        ) from None
    except UnicodeDecodeError as error:
        raise EvaluationSetError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None
    except ValueError as error:
        raise EvaluationSetError(f"{path} cannot be read ({error}); see docs/evaluation.md") from None
    examples = [_parse(line, f"{path}:{number}", Path(folder)) for number, line in enumerate(lines, 1) if line.strip()]
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise EvaluationSetError(f"{path} uses the id {example.id} twice; every example needs its own")
        seen.add(example.id)
    if not examples:
        raise EvaluationSetError(f"{path} holds no examples")
    return examples


def image_files(examples: list[Example], folder: Path) -> dict[str, Path]:
    """Return the image files of examples by their names in the set, sorted."""
    return {name: folder / name for name in sorted({name for example in examples for name in example.images})}


def read_image(path: Path) -> Image.Image:
    """An RGB image. Raises EvaluationSetError where the file is missing or no image."""
    try:
        with warnings.catch_warnings():
            # The library bears twice the pixels from which on it warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From memory: of a file the library allocates whatever length a chunk of it claims.
            with Image.open(BytesIO(read_bytes(path, MOST_BYTES)), formats=FORMATS) as image:
                return image.convert("RGB")
    except FileNotFoundError:
        raise EvaluationSetError(f"there is no image {path}") from None
    except MemoryError:
        raise
    except Exception as error:  # of a broken image the library's readers raise anything
        raise EvaluationSetError(f"{path} is not an image that can be read ({error}); give a PNG or JPEG") from None
