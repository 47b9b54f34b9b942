"""Preprocessing of messages and images, against transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import CheckpointError, EvaluationSetError
from hf2mnn.families import FAMILIES
from hf2mnn.reference import prompts
from hf2mnn.reference.prompts import Preprocessor, check_markers
from support import SHAPES_VL


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    return Preprocessor(SHAPES_VL, model_info(Checkpoint(SHAPES_VL)))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(width=st.integers(2, 9), height=st.integers(2, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_unpatch_inverts_the_processor(preprocessor: Preprocessor, width: int, height: int, seed: int) -> None:
    """MNN's engine gets the image of transformers, pixel for pixel; here one that needs no resizing."""
    image = noise(28 * width, 28 * height, seed)
    processed = preprocessor.process_image(image)
    assert processed.grid_thw.tolist() == [1, 2 * height, 2 * width]
    assert processed.pixel_values.shape == (4 * height * width, 1176)
    np.testing.assert_array_equal(processed.resized, np.array(image))


@pytest.mark.parametrize(("width", "height"), [(100, 61), (31, 300), (900, 500), (20, 20)])
def test_a_resized_image_has_the_size_of_its_patches(preprocessor: Preprocessor, width: int, height: int) -> None:
    """It equals the image that 'hf2mnn ask' gives to the engine."""
    image = noise(width, height)
    processed = preprocessor.process_image(image)
    size = Checkpoint(SHAPES_VL).family.image_size(width, height, preprocessor.info)
    assert processed.resized.shape == (size[1], size[0], 3)
    np.testing.assert_array_equal(processed.resized, np.array(image.resize(size, Image.Resampling.BICUBIC)))


def test_an_image_with_an_extreme_aspect_ratio_is_refused(preprocessor: Preprocessor) -> None:
    with pytest.raises(EvaluationSetError, match="refuses an image of 1 x 300 pixels"):
        preprocessor.process_image(noise(1, 300))


def test_each_image_has_as_many_tokens_as_embeddings(preprocessor: Preprocessor) -> None:
    """Two images of different sizes, in the order of the prompt."""
    wide, tall = preprocessor.process_image(noise(140, 56)), preprocessor.process_image(noise(56, 84))
    content = [
        {"type": "image", "image": "wide"},
        {"type": "text", "text": "红色 or blue?"},
        {"type": "image", "image": "tall"},
    ]
    messages = [{"role": "user", "content": content}]
    ids = preprocessor.input_ids(messages, [wide, tall])
    image = preprocessor.info["image_token_id"]
    runs = [(token == image, len(list(group))) for token, group in groupby(ids.tolist())]
    assert ids.dtype == np.int64
    assert [length for is_image, length in runs if is_image] == [10, 6]
    without = [token for token in ids.tolist() if token != image]
    assert preprocessor.tokenizer.decode(without) == preprocessor.render(messages).replace("<|image_pad|>", "")


def test_text_alone_is_tokenized_as_transformers_does(preprocessor: Preprocessor) -> None:
    messages = [{"role": "user", "content": "几个圆？"}, {"role": "assistant", "content": "2"}]
    encoded = preprocessor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert preprocessor.input_ids(messages, []).tolist() == list(encoded)


@pytest.mark.parametrize("given_images", [0, 2])
def test_another_number_of_images_than_in_the_template_is_refused(
    preprocessor: Preprocessor, given_images: int
) -> None:
    """Otherwise the second image's tokens would get the first's embeddings."""
    messages = [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "?"}]}]
    images = [preprocessor.process_image(noise(56, 56))] * given_images
    with pytest.raises(EvaluationSetError, match=f"1 times, for {given_images} images or videos in the messages;"):
        preprocessor.input_ids(messages, images)


@pytest.mark.parametrize("image", [False, True], ids=["text", "with an image"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<|image_pad|>", "the marker <|image_pad|>"),
        ("<|vision_start|><|image_pad|><|vision_end|>", "the marker <|image_pad|>"),
        ("<|video_pad|>", "the marker <|video_pad|>"),
        ("<img>a.png</img>", "takes '<img>a.png</img>' in a message for a file"),
        ("<audio>a.wav</audio>", "takes '<audio>a.wav</audio>' in a message for a file"),
        ("<|vision_start|> <|vision_end|> <img> </audio>", None),
    ],
)
def test_markers_in_texts(preprocessor: Preprocessor, text: str, message: str | None, image: bool) -> None:
    """Transformers' processor refuses the first three, and the engine opens files; other markers are text to both."""
    parts = [{"type": "image", "image": "x"}] if image else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": f"What is {text}?"}]}]
    images = [preprocessor.process_image(noise(56, 56))] * image
    if message:
        with pytest.raises(EvaluationSetError, match=re.escape(message)):
            preprocessor.input_ids(messages, images)
    else:
        assert preprocessor.info["vision_start_token_id"] in preprocessor.input_ids(messages, images)


def test_markers_are_text_for_a_model_without_images() -> None:
    check_markers("<|image_pad|> <|video_pad|> <img>a.png</img>", 0, FAMILIES["qwen2"])


def test_tag_in_two_parts_is_refused(preprocessor: Preprocessor) -> None:
    """No text of the messages has it, but the prompt."""
    parts = [{"type": "text", "text": text} for text in ("<im", "g>/etc/passwd</img>")]
    with pytest.raises(EvaluationSetError, match="for a file"):
        preprocessor.input_ids([{"role": "user", "content": parts}], [])


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20))
@settings(max_examples=50, deadline=None)
def test_an_answer_is_decoded_without_its_stop_token(preprocessor: Preprocessor, text: str) -> None:
    ids = preprocessor.tokenizer(text, add_special_tokens=False).input_ids
    assume(not set(ids) & set(preprocessor.tokenizer.all_special_ids))  # decode drops them
    plain = preprocessor.tokenizer.backend_tokenizer.normalizer
    expected = (plain.normalize_str(text) if plain else text).strip()
    assert preprocessor.decode([*ids, *preprocessor.info["stop_ids"]]) == expected
    assert preprocessor.decode(np.array(ids, np.int64)) == expected


def test_a_checkpoint_without_its_template_or_tokenizer_is_refused(preprocessor: Preprocessor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        Preprocessor(tmp_path, preprocessor.info)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((SHAPES_VL / name).read_text())
        content.pop("chat_template", None)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no chat template"):
        Preprocessor(tmp_path, preprocessor.info)


@pytest.fixture
def templated(tmp_path: Path) -> Callable[[str], Preprocessor]:
    """Function that returns the preprocessor of a checkpoint with another template."""

    def make(template: str) -> Preprocessor:
        for path in SHAPES_VL.iterdir():
            if path.suffix in (".json", ".safetensors"):
                shutil.copyfile(path, tmp_path / path.name)
        (tmp_path / "chat_template.jinja").write_text(template)
        return Preprocessor(tmp_path, model_info(Checkpoint(tmp_path)))

    return make


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{% if %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str, templated: Callable[[str], Preprocessor]) -> None:
    with pytest.raises(CheckpointError, match="the chat template of"):
        templated(template).render([{"role": "user", "content": "Hello"}])


def test_a_template_without_an_end_is_stopped(
    templated: Callable[[str], Preprocessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match=r"TimeoutError: it took more than 0\.2 s"):
        templated(endless).render([{"role": "user", "content": "Hello"}])
