"""Ask a finished bundle something, as an application would."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf2mnn.errors import BundleError, EvaluationSetError
from hf2mnn.families import family_named
from hf2mnn.mnn.bundle import MODEL_CONFIG, TOKENIZER
from hf2mnn.mnn.engine import check_bundle, run_worker
from hf2mnn.mnn.paths import read_config
from hf2mnn.mnn.template import render
from hf2mnn.mnn.tokenizer_file import read_tokenizer
from hf2mnn.reference.examples import check_messages, picture_names, read_picture
from hf2mnn.source.facts import check_facts
from hf2mnn.untrusted import read_json

FILES = re.compile(r"<(img|audio)>.*?</\1>")
"""What the engine takes for the name of a file, wherever it stands in a prompt."""


def read_conversation(path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """The messages of a JSON file, a list as `messages` of an evaluation set, and their pictures, which lie beside it.

    Raises:
        EvaluationSetError: it is none, or holds what the engine cannot be given.
    """
    try:
        messages = read_json(path)
        check_messages(messages, path.parent)
    except FileNotFoundError:
        raise EvaluationSetError(f"there is no conversation {path}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationSetError(
            f"{path} is not a conversation ({type(error).__name__}: {error}); see docs/bundle.md"
        ) from None
    if not messages:
        raise EvaluationSetError(f"{path} holds no messages; see docs/bundle.md")
    return messages, [path.parent / name for name in picture_names(messages)]


def _prompt(folder: Path, messages: list[dict[str, Any]]) -> str:
    """As the checkpoint's template, which is in the tokenizer's file, writes it."""
    tokenizer = read_tokenizer(folder / TOKENIZER)
    tokens = {"eos_token": tokenizer.eos, "bos_token": tokenizer.bos}
    prompt = render(tokenizer.template, messages, {name: text for name, text in tokens.items() if text})
    if prompt is None:
        raise EvaluationSetError(
            f"the chat template of {folder} refuses these messages; look at their roles, their order and their contents"
        )
    if found := FILES.search(prompt):
        raise EvaluationSetError(f"the engine takes {found[0][:80]!r} for a file; write it otherwise")
    return prompt


def continue_conversation(
    bundle: Path,
    messages: list[dict[str, Any]],
    images: list[Path],
    max_new_tokens: int = 512,
    threads: int = 0,
    time_limit: float = 600,
    as_called: bool = False,
) -> str:
    """The engine's greedy answer to a conversation as text; `images` are its pictures in order.

    The checkpoint's template writes the prompt, pictures are resized as the checkpoint's processor would, and tokens
    after one get their right positions; with `as_called` all three are left to the engine, whose ways of doing so
    differ.

    Raises:
        BundleError, EngineError: the bundle is not whole, or the engine failed on it.
        EvaluationSetError: an image is not one, or the messages are not such that the template takes.
    """
    folder = check_bundle(bundle)
    model = read_config(folder, MODEL_CONFIG).get("hf2mnn")
    if not isinstance(model, dict):
        raise BundleError(f"{folder} was not made by hf2mnn: its {MODEL_CONFIG} does not say which model it is")
    check_facts(model, folder / MODEL_CONFIG)
    family = family_named(model.get("model_type"), folder)
    if images and not family.sees:
        raise EvaluationSetError(f"{folder} is a {family.model_type}, which does not see; ask it without pictures")
    prompt = _prompt(folder, messages)
    if family.sees and prompt.count(family.image_text) != len(images):
        raise EvaluationSetError(
            f"the chat template wrote {prompt.count(family.image_text)} pictures for {len(images)} in the messages"
        )
    with tempfile.TemporaryDirectory(prefix="hf2mnn-ask-") as scratch:
        pictures = []
        for index, image in enumerate(images):
            path, picture = Path(scratch, f"{index}.npy"), read_picture(image)
            if not as_called:
                size = family.picture_size(picture.width, picture.height, model)
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            np.save(path, np.array(picture))
            pictures.append(str(path))
        result = Path(scratch, "answer.json")
        job = {
            "bundle": str(folder),
            "messages": messages,
            "prompt": prompt,
            "pictures": pictures,
            "max_new_tokens": max_new_tokens,
            "threads": threads,
            "as_called": as_called,
            "result": str(result),
        }
        run_worker("hf2mnn.mnn.worker.ask", job, time_limit)
        return json.loads(result.read_text())["text"]


def ask_bundle(
    bundle: Path, prompt: str, images: list[Path], max_new_tokens: int = 512, system: str | None = None, **options: Any
) -> str:
    """The answer to one question, its pictures before its text; `options` are those of `continue_conversation`."""
    parts = [{"type": "image", "image": str(image)} for image in images]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}] if parts else prompt}
    messages = [asked] if system is None else [{"role": "system", "content": system}, asked]
    return continue_conversation(bundle, messages, images, max_new_tokens, **options)
