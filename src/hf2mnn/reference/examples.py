"""Evaluation sets: a folder with examples.jsonl and the images that it names.

Each line of examples.jsonl is a JSON object:

    {"id": "count-en-3", "category": "count", "language": "en", "answer": "2", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "images/003.png"},
                                     {"type": "text", "text": "How many things are there?"}]}]}

`messages` is a conversation in the format of transformers' chat templates. `answer` is one accepted answer, a list of
them, or absent. `metric`, a key of `hf2mnn.reference.tasks.METRICS`, compares answers; the default is "exact".
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.untrusted import parse_json, path_inside, read_bytes
from hf2mnn.reference.tasks import METRICS

NAME = "examples.jsonl"
MAX_FILE_BYTES = 1 << 28
# PIL has others, among them PostScript, for which it starts an interpreter.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
UNBROKEN = re.compile(r"[^\W\d_]{1000,}|[^\w\s]{1000,}|\s{1000,}")  # not split by byte-level BPE
MAX_UNBROKEN = 30_000
"""Bytes of a run of letters, punctuation or white space: MNN's engine merges it in quadratic time, this one in 32 s."""
# Kinds of message parts that chat templates accept and evaluation sets must not have.
UNSUPPORTED_PARTS = {
    "video": "a video, which MNN 3.6.1 cannot read; add its frames as images",
    "audio": "audio, which no model family supports; remove it",
    "image_url": "an image_url; name a file of the set as {'type': 'image', 'image': FILE}",
}


@dataclass(frozen=True)
class Example:
    """Line of examples.jsonl; `answers` is None for an example without labels."""

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


def check_text(text: str) -> None:
    """Raise ValueError for text that MNN's engine cannot encode, or not in useful time.

    Its Python binding drops text after U+0000 and ends the process at a lone surrogate, which UTF-8 does not have.
    """
    if "\0" in text:
        raise ValueError("a text has U+0000, after which the engine reads nothing; remove it")
    if surrogate := LONE_SURROGATE.search(text):
        raise ValueError(f"a text has {surrogate[0]!r}, which is no character (invalid UTF-8); remove it")
    for run in UNBROKEN.finditer(text):
        if (size := len(run[0].encode())) > MAX_UNBROKEN:
            raise ValueError(
                f"a text has {size} bytes without a break ({run[0][:20]!r}...), which takes the engine more than half a"
                " minute; add spaces or punctuation"
            )


def content_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message; content that is a string is one text part, and a call of tools may have none."""
    if message.get("content") is None and message.get("tool_calls"):
        return []
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def image_names(messages: list[dict[str, Any]]) -> list[str]:
    """Return a conversation's image files in order; chat templates know an image by its type or its key "image"."""
    parts = [part for message in messages for part in content_parts(message)]
    return [part["image"] for part in parts if part.get("type") == "image" or "image" in part]


def _invalid(where: object, problem: str, advice: str = "") -> EvaluationSetError:
    return EvaluationSetError(f"{where} {problem}; {advice}see docs/evaluation.md")


def check_messages(messages: list[dict[str, Any]], folder: Path) -> None:
    """Check that chat templates and MNN's engine accept a conversation, and that its images are files of `folder`.

    Raise ValueError for an unsupported part, text that the engine cannot encode, or a path out of the folder, and
    TypeError, KeyError or AttributeError for an invalid structure.
    """
    if not isinstance(messages, list):
        raise TypeError("messages must be a list")
    for message in messages:
        parts = content_parts(message)
        if not isinstance(message["role"], str) or not all(isinstance(part.get("text", ""), str) for part in parts):
            raise TypeError("role and text must be strings")
        for part in parts:
            check_text(part.get("text", ""))
            if unsupported := ({part.get("type", "text")} | part.keys()) & UNSUPPORTED_PARTS.keys():
                raise ValueError(f"a part of it is {UNSUPPORTED_PARTS[min(unsupported)]}")
    for name in image_names(messages):
        path_inside(folder, name)


def _parse(line: str, where: str, folder: Path) -> Example:
    try:
        record = parse_json(line)
        answers, metric = record.get("answer"), record.get("metric", "exact")
        if answers is None and "metric" in record:
            raise _invalid(where, "has a metric and no answer", "add an answer, ")
        if metric not in METRICS:
            raise _invalid(where, f"has an unknown metric {metric!r}", f"choose one of {', '.join(METRICS)}, ")
        answers = [answers] if isinstance(answers, str) else answers
        is_list = isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
        if answers is not None and not is_list:
            raise _invalid(where, "has an answer that is neither a string nor a list of strings")
        category, language = record.get("category", "any"), record.get("language", "any")
        example = Example(record["id"], category, language, record["messages"], answers, metric)
        if not isinstance(category, str) or not isinstance(language, str):
            raise TypeError("category and language must be strings")
        check_messages(example.messages, folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _invalid(where, f"is not an example ({type(error).__name__}: {error})") from None
    if not example.messages or not isinstance(example.id, str) or "/" in example.id:
        raise _invalid(where, "needs messages and an id without '/'")
    return example


def read_examples(folder: Path) -> list[Example]:
    """Read an evaluation set, or raise EvaluationSetError if it is missing, empty or invalid, or has an id twice."""
    path = Path(folder) / NAME
    try:
        lines = read_bytes(path, MAX_FILE_BYTES).decode("utf-8-sig").split("\n")
    except OSError:
        raise _invalid(folder, f"is not an evaluation set: it has no {NAME}") from None
    except UnicodeDecodeError as error:
        raise EvaluationSetError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None
    except ValueError as error:
        raise _invalid(path, f"cannot be read ({error})") from None
    examples = [_parse(line, f"{path}:{number}", Path(folder)) for number, line in enumerate(lines, 1) if line.strip()]
    if twice := [name for name, uses in Counter(example.id for example in examples).items() if uses > 1]:
        raise EvaluationSetError(f"{path} uses the id {twice[0]} twice; give each example its own")
    if not examples:
        raise _invalid(path, "holds no examples", "add some, ")
    return examples


def image_files(examples: list[Example], folder: Path) -> dict[str, Path]:
    """Return the image files of examples by their names in the set, sorted."""
    return {name: folder / name for name in sorted({name for example in examples for name in example.images})}


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright and in RGB, as `transformers.image_utils.load_image` does (which loads torch)."""
    return ImageOps.exif_transpose(image).convert("RGB")


def read_image(path: Path) -> Image.Image:
    """Read an image with `as_rgb`, or raise EvaluationSetError if the file is missing, unreadable or not an image."""
    try:
        with warnings.catch_warnings():
            # PIL only warns up to twice its limit of pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From memory: reading a file, PIL allocates any length that a chunk claims.
            with Image.open(BytesIO(read_bytes(path, MAX_FILE_BYTES)), formats=IMAGE_FORMATS) as image:
                return as_rgb(image)
    except FileNotFoundError:
        raise EvaluationSetError(f"there is no image {path}; add it or correct its name") from None
    except MemoryError:
        raise
    except PermissionError as error:
        raise EvaluationSetError(f"the image {path} cannot be read ({error.strerror}); grant access to it") from None
    except Exception as error:  # for invalid images PIL raises exceptions of any type
        unknown = isinstance(error, UnidentifiedImageError)  # whose message has an address in memory
        problem = f"it is none of {', '.join(IMAGE_FORMATS)}, or its first bytes are damaged" if unknown else error
        raise EvaluationSetError(
            f"{path} is not an image that can be read ({problem}); convert it to PNG or JPEG"
        ) from None
