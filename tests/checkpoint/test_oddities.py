"""Published oddities of checkpoints, with transformers as the oracle.

Each folder is either refused by `fetch` with one line that names a file or a key, or read as transformers reads it:
weights, settings of the model, token ids, prompts, stop ids and image settings.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from checkpoints import SHAPES, configuration, make_small
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.checkpoint_tokenizer import read_checkpoint_tokenizer
from hf2mnn.mnn.template import render
from hf2mnn.reference.model import load_model
from hf2mnn.reference.prompts import Preprocessor
from hf2mnn.stages.fetch import run as fetch
from oddities import EITHER, ODDITIES, REFUSED, SAME, Oddity
from tokenizing import Engine

PROBES = (
    "Hello world 12 345, what's up?",
    "  two  spaces\n\n\ttab \r\n end   ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|image_pad|> <|video_pad|>",
    "<|new|><|newer|> <d> x<row_1_col_1>y [PAD] <pad>",
    "<s>hello</s> <unk> world",
    "        eight     five",
    "e\u0301 cafe\u0301 \u00e9 \u4f60\u597d \U0001f600",
    "a",
)
"""Texts with added tokens of all oddities, digits, white space, and characters that normalizers change."""
CHATS = (
    [{"role": "user", "content": "hello 12"}],
    [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": " c\n"},
    ],
)
IDS = torch.tensor([[40, 41, 42, 100, 7, 300, 301, 302, 9, 8, 7, 6, 5, 4, 3, 2, 40, 41, 12, 13, 14, 15]])
"""Prompt longer than the sliding windows that the oddities set."""
SPECIFIC = r"[\w.]+\.(json|safetensors|jinja|txt|bin)\b"
"""A file in a message."""


class Refused(Exception):
    """Transformers fails or draws weights at random."""


def architecture(oddity: Oddity) -> type[transformers.PreTrainedModel]:
    return getattr(transformers, configuration(SHAPES[oddity.family]).architectures[0])


@lru_cache(maxsize=1)
def load_with_transformers(oddity: Oddity, folder: Path) -> transformers.PreTrainedModel:
    """Return the model of transformers in float32; raise Refused where its weights are not those of the folder."""
    try:
        model, report = architecture(oddity).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    if random := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise Refused(f"drawn at random: {random[0]}")
    return model.eval()


@lru_cache(maxsize=1)
def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def prompts_of_transformers(oddity: Oddity, folder: Path) -> list[str]:
    """Return the prompts of CHATS; a processor, which vision-language models have, reads more files than a tokenizer.

    The processor itself needs torchvision; its template is read without it.
    """
    tokenizer = load_tokenizer(folder)
    try:
        own = Qwen2VLProcessor.get_processor_dict(folder)[0] if SHAPES[oddity.family].vision else {}
        template = own.get("chat_template")
        return [
            tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
            for chat in CHATS
        ]
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def load_image_processor(folder: Path) -> Any:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        processor(images=[Image.new("RGB", (100, 60))])
        return processor
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def check_refused_by_transformers(oddity: Oddity, folder: Path) -> str:
    """Return the reason why transformers refuses the folder, or an empty string."""
    try:
        if oddity.concerns & {"weights", "config", "stop"}:
            load_with_transformers(oddity, folder)
        if "tokenizer" in oddity.concerns:
            load_tokenizer(folder)
        if "chat" in oddity.concerns:
            prompts_of_transformers(oddity, folder)
        if "images" in oddity.concerns:
            load_image_processor(folder)
    except Refused as error:
        return str(error)
    return ""


# What both read ------------------------------------------------------------------------------------------------------


def compare_weights(oddity: Oddity, original: Path, fetched: Path, scratch: Path) -> list[str]:
    """Compare the bytes of each parameter, in float32."""
    model, checkpoint = load_with_transformers(oddity, original), Checkpoint(fetched)
    differing = []
    for name, parameter in model.state_dict().items():
        own = checkpoint.tensor(name).float()
        if own.shape != parameter.shape or not torch.equal(own.view(torch.int32), parameter.view(torch.int32)):
            differing.append(f"{name} differs")
    return differing


def compare_config(oddity: Oddity, original: Path, fetched: Path, scratch: Path) -> list[str]:
    """Compare model.json with the configuration of transformers, and the logits of a prompt."""
    model, checkpoint = load_with_transformers(oddity, original), Checkpoint(fetched)
    text, info, differing = model.config.get_text_config(), model_info(checkpoint), []
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if info[key] != getattr(text, key):
            differing.append(f"{key} is {info[key]}, not {getattr(text, key)}")
    rows = model.get_output_embeddings().weight.data_ptr(), model.get_input_embeddings().weight.data_ptr()
    if info["tie_word_embeddings"] != (rows[0] == rows[1]):
        differing.append(f"tie_word_embeddings is {info['tie_word_embeddings']}")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        for storage in ("resident", "mapped"):
            off = float((load_model(checkpoint, storage)(input_ids=IDS).logits - expected).abs().max())
            if not off < 1e-5:
                differing.append(f"logits of the {storage} model differ by {off:.2g}")
    return differing


def compare_tokenizer(oddity: Oddity, original: Path, fetched: Path, scratch: Path) -> list[str]:
    """Compare ids of PROBES and texts of added tokens in MNN's engine.

    Where only the first text of a prompt gets a meta space, the probes follow a token, as in the prompts of a template:
    the engine does not know which text is the first.
    """
    tokenizer = load_tokenizer(original)
    splitter = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    begin = tokenizer.bos_token if splitter.get("prepend_scheme") == "first" else ""
    probes = [begin + text for text in PROBES]
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in probes]
    added = sorted(tokenizer.added_tokens_decoder)
    decoded = [tokenizer.decode([number], skip_special_tokens=True) for number in added]
    with Engine(fetched, scratch) as engine:
        ids, texts = engine("tokenizer_encode", probes), engine("tokenizer_decode", added)
    pairs = [*zip(probes, ids, expected, strict=True), *zip(added, texts, decoded, strict=True)]
    return [f"{probe!r} becomes {own}, not {right}" for probe, own, right in pairs if own != right]


def compare_chat(oddity: Oddity, original: Path, fetched: Path, scratch: Path) -> list[str]:
    """Compare the prompts of the reference and of the bundle."""
    preprocessor = Preprocessor(fetched, model_info(Checkpoint(fetched)))
    tokenizer = read_checkpoint_tokenizer(fetched)
    tokens = {key: text for key, text in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)) if text}
    differing = []
    for chat, right in zip(CHATS, prompts_of_transformers(oddity, original), strict=True):
        for user, own in (
            ("reference", preprocessor.render(chat)),
            ("bundle", render(tokenizer.template, chat, tokens)),
        ):
            if own != right:
                differing.append(f"the prompt of the {user} is {own!r}, not {right!r}")
    return differing


def compare_stop(oddity: Oddity, original: Path, fetched: Path, scratch: Path) -> list[str]:
    """Compare the stop ids with those of `generate`; the engine may stop at the tokenizer's end-of-text token too."""
    model = load_with_transformers(oddity, original)
    listed = model.generation_config.eos_token_id
    expected = set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    own, engine = set(model_info(Checkpoint(fetched))["stop_ids"]), set(read_checkpoint_tokenizer(fetched).stop)
    optional = {load_tokenizer(original).eos_token_id}
    differing = [] if own == expected else [f"model.json stops at {own}, not {expected}"]
    if not expected <= engine <= expected | optional:
        differing.append(f"the engine stops at {engine}, not {expected}")
    return differing


def patches(image: np.ndarray, patch: int) -> np.ndarray:
    """Cut an image [height, width, 3] into patches [n, 3, patch, patch], in the order of transformers."""
    height, width, _ = image.shape
    cells = image.reshape(height // (2 * patch), 2, patch, width // (2 * patch), 2, patch, 3)
    return cells.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, patch, patch)


def compare_images(oddity: Oddity, original: Path, fetched: Path, scratch: Path) -> list[str]:
    """Compare sizes and pixels of an image as the engine and the reference get it with those of transformers."""
    processor, checkpoint, differing = load_image_processor(original), Checkpoint(fetched), []
    info = model_info(checkpoint)
    engine, preprocessor = checkpoint.family.engine_config(info), Preprocessor(fetched, info)
    resample, patch = Image.Resampling(info.get("resample", Image.Resampling.BICUBIC)), info["patch_size"]
    for width, height in ((40, 40), (200, 120), (640, 300)):
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(noise)
        features = processor(images=[image], return_tensors="np")
        grid, right = features["image_grid_thw"][0].tolist(), features["pixel_values"]
        size = checkpoint.family.image_size(width, height, info)
        own = [1, size[1] // patch, size[0] // patch]
        pixels = (np.array(image.resize(size, resample)) - engine["image_mean"]) * engine["image_norm"]
        frames = right.reshape(len(right), 3, -1, patch, patch)
        if own != grid:
            differing.append(f"an image of {width} x {height} has the grid {own}, not {grid}")
        elif (off := float(np.abs(patches(pixels, patch) - frames[:, :, 0]).max())) > 0.02:
            differing.append(f"pixels of the engine are off by up to {off:.3g}")
        used = preprocessor.process_image(image)
        if used.grid_thw.tolist() != grid or np.abs(used.pixel_values - right).max() > 1e-6:
            differing.append("pixels of the reference differ")
    return differing


COMPARISONS: dict[str, Callable[[Oddity, Path, Path, Path], list[str]]] = {
    "weights": compare_weights,
    "config": compare_config,
    "tokenizer": compare_tokenizer,
    "chat": compare_chat,
    "stop": compare_stop,
    "images": compare_images,
}


# The test ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(make_once: Callable[..., Path]) -> Callable[[str], Path]:
    """Function that returns the small checkpoint of a family, which tests only read."""

    def get(family: str) -> Path:
        folder = make_once(f"oddities-{family}", lambda folder: make_small(SHAPES[family], folder / "checkpoint"))
        return folder / "checkpoint"

    return get


def check_message(oddity: Oddity, error: CheckpointError, folders: list[Path]) -> None:
    """Check that a refusal is one line that names what the oddity is about; paths of the folders do not count."""
    message = str(error)
    for folder in folders:
        message = message.replace(str(folder), "FOLDER")
    assert len(message.splitlines()) == 1, message
    named = [name for name in oddity.names if name in message]
    assert named or (not oddity.names and re.search(SPECIFIC, message)), f"names none of {oddity.names}: {message}"


@pytest.mark.parametrize("oddity", ODDITIES, ids=lambda oddity: oddity.name)
def test_oddity_is_refused_by_name_or_read_as_transformers_reads_it(
    oddity: Oddity, base: Callable[[str], Path], tmp_path: Path
) -> None:
    original, fetched = tmp_path / "original", tmp_path / "fetched"
    shutil.copytree(base(oddity.family), original)
    oddity.change(original)
    refused = check_refused_by_transformers(oddity, original)
    if oddity.expected == SAME:
        assert not refused, f"transformers refuses this folder: {refused}"
    elif oddity.expected == REFUSED:
        assert refused or oddity.because, "transformers loads this folder"
    try:
        fetch(fetched, path=original)
    except CheckpointError as error:
        assert oddity.expected != SAME, f"refused: {error}"
        check_message(oddity, error, [original, fetched])
        return
    assert oddity.expected != REFUSED, f"accepted, though {refused or oddity.because}"
    assert not refused, f"accepted, though transformers refuses it: {refused}"
    differing = []
    for concern in sorted(oddity.concerns):
        try:
            differing += COMPARISONS[concern](oddity, original, fetched, tmp_path / "engine")
        except CheckpointError as error:
            differing.append(f"{concern} is refused after fetch: {error}")
    assert differing == []


def test_oddities_name_public_sources() -> None:
    assert len({oddity.name for oddity in ODDITIES}) == len(ODDITIES) >= 60
    hosts = re.compile(r"https://(github\.com|huggingface\.co)/[\w./#-]+")
    assert [oddity.source for oddity in ODDITIES if not hosts.fullmatch(oddity.source)] == []
    assert {oddity.family for oddity in ODDITIES} == set(SHAPES)
    assert {oddity.expected for oddity in ODDITIES} == {SAME, REFUSED, EITHER}
    assert {concern for oddity in ODDITIES for concern in oddity.concerns} == set(COMPARISONS)
