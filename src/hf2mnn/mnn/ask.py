"""Ask a bundle, as an application does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf2mnn.checkpoint.model_info import check_model_info
from hf2mnn.core.errors import BundleError, EvaluationSetError
from hf2mnn.core.untrusted import read_json
from hf2mnn.families import Family, get_family
from hf2mnn.mnn.bundle_config import CONFIG, MAX_NEW_TOKENS, MODEL_CONFIG, TOKENIZER, read_config
from hf2mnn.mnn.engine import check_bundle, run_worker
from hf2mnn.mnn.template import render
from hf2mnn.mnn.tokenizer_file import read_tokenizer
from hf2mnn.reference.examples import check_messages, check_text, image_names, read_image
from hf2mnn.reference.prompts import check_markers


def read_conversation(path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Read messages from a JSON file (a list as `messages` of an evaluation set), and the paths of their images.

    Raise EvaluationSetError if it is not a conversation, or holds messages that the engine has no input for.
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


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Read tools from a JSON file, a list of objects as `apply_chat_template` of transformers takes it."""
    try:
        tools = read_json(path)
        if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("it is not a list of objects")
    except FileNotFoundError:
        raise EvaluationSetError(f"there is no file of tools {path}") from None
    except (OSError, ValueError) as error:
        raise EvaluationSetError(f"{path} holds no tools ({error}); see docs/bundle.md") from None
    return tools


def _prompt(
    folder: Path,
    family: Family,
    messages: list[dict[str, Any]],
    context: dict[str, Any],
    images: int,
    tools: list[dict[str, Any]] | None,
) -> str:
    """Render messages and tools with the chat template of the tokenizer file; `context` are further variables of it."""
    tokenizer = read_tokenizer(folder / TOKENIZER)
    tokens = {"eos_token": tokenizer.eos, "bos_token": tokenizer.bos}
    variables = {name: text for name, text in tokens.items() if text} | context
    prompt = render(tokenizer.template, messages, variables, tools)
    if prompt is None:
        raise EvaluationSetError(
            f"the chat template of {folder} rejects these messages; check their roles, order and contents"
        )
    if tools and prompt == render(tokenizer.template, messages, variables):
        raise EvaluationSetError(f"the chat template of {folder} does not write tools; omit --tools")
    try:
        check_text(prompt)
    except ValueError as error:
        raise EvaluationSetError(f"the engine cannot read these messages: {error}") from None
    check_markers(prompt, images, family)
    return prompt


def continue_conversation(
    bundle: Path,
    messages: list[dict[str, Any]],
    image_files: list[Path],
    max_new_tokens: int = 0,
    threads: int = 0,
    time_limit: float = 600,
    as_called: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Return the engine's greedy answer to a conversation with `image_files` in the order of its images.

    With `threads` or `max_new_tokens` 0 the number is that of config.json, whose system prompt and variables of the
    template apply too. With `as_called` the engine renders the template, resizes the images and counts positions. By
    default this package does so as transformers, because the engine differs. `tools` are those of `read_tools`.

    Raise BundleError if the bundle is incomplete, changed, or not from hf2mnn, EvaluationSetError if an image cannot be
    read or the template rejects the messages, and EngineError if the engine failed.
    """
    folder = check_bundle(bundle).folder
    info = read_config(folder, MODEL_CONFIG).get("hf2mnn")
    if not isinstance(info, dict):
        raise BundleError(f"{folder / MODEL_CONFIG} has no key hf2mnn: make the bundle with 'hf2mnn quantize'")
    check_model_info(info, folder / MODEL_CONFIG)
    family = get_family(info.get("model_type"), folder)
    if image_files and not family.has_vision:
        raise EvaluationSetError(f"{folder} is a {family.model_type} model, which has no image input; omit the images")
    if as_called and tools:
        raise EvaluationSetError("the engine's template writes tools otherwise; leave out --as-called or --tools")
    config = read_config(folder, CONFIG)
    if config.get("system_prompt") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config["system_prompt"]}, *messages]
    prompt = _prompt(folder, family, messages, config.get("jinja", {}).get("context", {}), len(image_files), tools)
    with tempfile.TemporaryDirectory(prefix="hf2mnn-ask-") as scratch:
        images = []
        for index, file in enumerate(image_files):
            image = read_image(file)
            if not as_called:
                image = image.resize(family.image_size(*image.size, info), Image.Resampling.BICUBIC)
            images.append(f"{scratch}/{index}.npy")
            np.save(images[-1], np.array(image))
        result = Path(scratch, "answer.json")
        job = {"bundle": str(folder), "messages": messages, "prompt": prompt, "images": images, "as_called": as_called}
        limit = max_new_tokens or config.get("max_new_tokens", MAX_NEW_TOKENS)
        job |= {"max_new_tokens": limit, "threads": threads, "result": str(result)}
        run_worker("hf2mnn.mnn.worker.ask", job, time_limit)
        return json.loads(result.read_text())["text"]


def ask_bundle(
    bundle: Path,
    prompt: str,
    image_files: list[Path],
    max_new_tokens: int = 0,
    system: str | None = None,
    **options: Any,
) -> str:
    """Return the answer to one question, with images before its text; for `options` see `continue_conversation`."""
    parts = [{"type": "image", "image": str(file)} for file in image_files]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}] if parts else prompt}
    messages = [question] if system is None else [{"role": "system", "content": system}, question]
    return continue_conversation(bundle, messages, image_files, max_new_tokens, **options)
