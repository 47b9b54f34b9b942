"""Ask a finished bundle something, as an application would."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf2mnn.checkpoint.facts import check_facts
from hf2mnn.core.errors import BundleError, EvaluationSetError
from hf2mnn.core.untrusted import read_json
from hf2mnn.families import family_named
from hf2mnn.mnn.bundle import MODEL_CONFIG, TOKENIZER
from hf2mnn.mnn.engine import check_bundle, run_worker
from hf2mnn.mnn.paths import read_config
from hf2mnn.mnn.template import render
from hf2mnn.mnn.tokenizer_file import read_tokenizer
from hf2mnn.reference.examples import check_messages, image_names, read_image

FILES = re.compile(r"<(img|audio)>.*?</\1>")
"""What the engine takes for the name of a file, wherever it stands in a prompt."""


def read_conversation(path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """The messages of a JSON file, a list as `messages` of an evaluation set, and their images, which lie beside it.

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
    return messages, [path.parent / name for name in image_names(messages)]


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
    image_files: list[Path],
    max_new_tokens: int = 512,
    threads: int = 0,
    time_limit: float = 600,
    as_called: bool = False,
) -> str:
    """The engine's greedy answer to a conversation as text; `image_files` are its images in order.

    The checkpoint's template writes the prompt, images are resized as the checkpoint's processor would, and tokens
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
    if image_files and not family.sees:
        raise EvaluationSetError(f"{folder} is a {family.model_type}, which does not see; ask it without images")
    prompt = _prompt(folder, messages)
    if family.sees and prompt.count(family.image_text) != len(image_files):
        raise EvaluationSetError(
            f"the chat template wrote {prompt.count(family.image_text)} images for {len(image_files)} in the messages"
        )
    with tempfile.TemporaryDirectory(prefix="hf2mnn-ask-") as scratch:
        images = []
        for index, file in enumerate(image_files):
            path, image = Path(scratch, f"{index}.npy"), read_image(file)
            if not as_called:
                size = family.image_size(image.width, image.height, model)
                image = image.resize(size, Image.Resampling.BICUBIC)
            np.save(path, np.array(image))
            images.append(str(path))
        result = Path(scratch, "answer.json")
        job = {
            "bundle": str(folder),
            "messages": messages,
            "prompt": prompt,
            "images": images,
            "max_new_tokens": max_new_tokens,
            "threads": threads,
            "as_called": as_called,
            "result": str(result),
        }
        run_worker("hf2mnn.mnn.worker.ask", job, time_limit)
        return json.loads(result.read_text())["text"]


def ask_bundle(
    bundle: Path,
    prompt: str,
    image_files: list[Path],
    max_new_tokens: int = 512,
    system: str | None = None,
    **options: Any,
) -> str:
    """The answer to one question, its images before its text; `options` are those of `continue_conversation`."""
    parts = [{"type": "image", "image": str(file)} for file in image_files]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}] if parts else prompt}
    messages = [asked] if system is None else [{"role": "system", "content": system}, asked]
    return continue_conversation(bundle, messages, image_files, max_new_tokens, **options)
