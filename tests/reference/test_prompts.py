"""Messages and images become what transformers would feed the model."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf2mnn.checkpoint.facts import model_facts
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError, EvaluationSetError
from hf2mnn.reference import prompts
from hf2mnn.reference.prompts import Prompter
from support import SHAPES_VL


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(SHAPES_VL, model_facts(Checkpoint(SHAPES_VL)))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(width=st.integers(2, 9), height=st.integers(2, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_unpatch_inverts_the_processor(prompter: Prompter, width: int, height: int, seed: int) -> None:
    """The engine is shown the image that transformers saw, pixel for pixel: here one that needs no resizing."""
    image = noise(28 * width, 28 * height, seed)
    made = prompter.image(image)
    assert made.grid_thw.tolist() == [1, 2 * height, 2 * width]
    assert made.pixel_values.shape == (4 * height * width, 1176)
    np.testing.assert_array_equal(made.resized, np.array(image))


@pytest.mark.parametrize(("width", "height"), [(100, 61), (31, 300), (900, 500), (20, 20)])
def test_a_resized_image_is_given_at_the_size_it_was_cut_at(prompter: Prompter, width: int, height: int) -> None:
    """And it is what 'hf2mnn ask' makes of the image, so that both show the model the same."""
    image = noise(width, height)
    made = prompter.image(image)
    size = Checkpoint(SHAPES_VL).family.image_size(width, height, prompter.facts)
    assert made.resized.shape == (size[1], size[0], 3)
    np.testing.assert_array_equal(made.resized, np.array(image.resize(size, Image.Resampling.BICUBIC)))


def test_a_image_like_a_thread_is_refused(prompter: Prompter) -> None:
    with pytest.raises(EvaluationSetError, match="refuses a 1 x 300 image"):
        prompter.image(noise(1, 300))


def test_each_image_takes_the_tokens_that_the_vision_tower_gives(prompter: Prompter) -> None:
    """Two images of different sizes, each its own number of tokens, in the order of the prompt."""
    wide, tall = prompter.image(noise(140, 56)), prompter.image(noise(56, 84))
    content = [
        {"type": "image", "image": "wide"},
        {"type": "text", "text": "红色 or blue?"},
        {"type": "image", "image": "tall"},
    ]
    messages = [{"role": "user", "content": content}]
    ids = prompter.input_ids(messages, [wide, tall])
    image = prompter.facts["image_token_id"]
    runs = [(token == image, len(list(group))) for token, group in groupby(ids.tolist())]
    assert ids.dtype == np.int64
    assert [length for is_image, length in runs if is_image] == [10, 6]
    without = [token for token in ids.tolist() if token != image]
    assert prompter.tokenizer.decode(without) == prompter.text(messages).replace("<|image_pad|>", "")


def test_text_alone_is_tokenized_as_transformers_does(prompter: Prompter) -> None:
    messages = [{"role": "user", "content": "几个圆？"}, {"role": "assistant", "content": "2"}]
    encoded = prompter.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompter.input_ids(messages, []).tolist() == list(encoded)


@pytest.mark.parametrize("given_images", [0, 2])
def test_another_number_of_images_than_the_template_wrote_is_refused(prompter: Prompter, given_images: int) -> None:
    """Otherwise the second image's tokens would be filled with the first's."""
    messages = [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "?"}]}]
    images = [prompter.image(noise(56, 56))] * given_images
    with pytest.raises(EvaluationSetError, match=f"wrote 1 images for {given_images}"):
        prompter.input_ids(messages, images)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20))
@settings(max_examples=50, deadline=None)
def test_an_answer_is_decoded_without_the_token_that_ends_it(prompter: Prompter, text: str) -> None:
    ids = prompter.tokenizer(text, add_special_tokens=False).input_ids
    plain = prompter.tokenizer.backend_tokenizer.normalizer
    wanted = (plain.normalize_str(text) if plain else text).strip()
    assert prompter.decode([*ids, *prompter.facts["stop_ids"]]) == wanted
    assert prompter.decode(np.array(ids, np.int64)) == wanted


def test_a_checkpoint_without_its_template_or_tokenizer_is_refused(prompter: Prompter, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not load"):
        Prompter(tmp_path, prompter.facts)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((SHAPES_VL / name).read_text())
        content.pop("chat_template", None)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no chat template"):
        Prompter(tmp_path, prompter.facts)


@pytest.fixture
def templated(tmp_path: Path) -> Callable[[str], Prompter]:
    """The prompter of a checkpoint with another template."""

    def make(template: str) -> Prompter:
        for path in SHAPES_VL.iterdir():
            if path.suffix == ".json":
                shutil.copyfile(path, tmp_path / path.name)
        (tmp_path / "chat_template.jinja").write_text(template)
        return Prompter(tmp_path, model_facts(Checkpoint(tmp_path)))

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
def test_a_template_cannot_leave_its_sandbox(template: str, templated: Callable[[str], Prompter]) -> None:
    with pytest.raises(CheckpointError, match="the chat template of"):
        templated(template).text([{"role": "user", "content": "Hello"}])


def test_a_template_without_an_end_is_stopped(
    templated: Callable[[str], Prompter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"TimeoutError: it took more than 0\.2 s"):
        templated(endless).text([{"role": "user", "content": "Hello"}])
    assert time.monotonic() - begun < 5
