"""Chat template, stop ids and image settings are those of transformers, whichever files of a checkpoint hold them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from hf2mnn.checkpoint.facts import DEFAULT, chat_template, stop_ids
from hf2mnn.checkpoint.folder import TEMPLATES, Checkpoint, checkpoint_files
from hf2mnn.checkpoint.hub.pin import matches
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.checkpoint.preflight import check_checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.tokenizer import encode_tokenizer, template_differences
from hf2mnn.reference.prompts import Preprocessor
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import SHAPES_VL

CHAT = [{"role": "user", "content": "Hello"}]
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")


def copy(folder: Path, *names: str) -> Path:
    """Copy files of the embedded model into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in names or FILES:
        shutil.copyfile(SHAPES_VL / name, folder / name)
    return folder


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file, which need not exist; None removes a key."""
    stored = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(Checkpoint(folder))
    return str(error.value)


# Chat templates


@contextmanager
def processors_without_videos() -> Iterator[None]:
    """Let transformers load Qwen2-VL's processor without torchvision, which only its videos need."""

    def parts(_: type, folder: Path, *__: Any, **___: Any) -> list[Any]:
        return [AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), None]

    with (
        patch.object(Qwen2VLProcessor, "_get_arguments_from_pretrained", classmethod(parts)),
        patch.object(Qwen2VLProcessor, "check_argument_for_proper_class", lambda *_: None),
    ):
        yield


def rendered_by_transformers(folder: Path, vision: bool) -> str | None:
    """Return the prompt by transformers' processor or tokenizer; None where it has no template for a chat."""
    with processors_without_videos():
        loaded = (Qwen2VLProcessor if vision else AutoTokenizer).from_pretrained(folder)
    if vision and loaded.chat_template is None:
        loaded = loaded.tokenizer  # as a user of such a checkpoint does
    if loaded.chat_template is None or (isinstance(loaded.chat_template, dict) and DEFAULT not in loaded.chat_template):
        return None
    return loaded.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


TEMPLATE_FILES = {
    "chat_template.jinja": lambda path: path.write_text("jinja {{ messages[0].content }}"),
    "chat_template.json": lambda path: change(path, chat_template="json {{ messages[0].content }}"),
    "tokenizer_config.json": lambda path: change(path, chat_template="tokenizer {{ messages[0].content }}"),
    "processor_config.json": lambda path: change(path, chat_template="processor {{ messages[0].content }}"),
    f"{TEMPLATES}/tool_use.jinja": lambda path: path.write_text("tools {{ messages[0].content }}"),
    f"{TEMPLATES}/{DEFAULT}.jinja": lambda path: path.write_text("folder {{ messages[0].content }}"),
    "several": lambda path: change(
        path.with_name("tokenizer_config.json"),
        chat_template=[
            {"name": "tool_use", "template": "one {{ messages[0].content }}"},
            {"name": "default", "template": "two {{ messages[0].content }}"},
        ],
    ),
}
"""Files that may hold a chat template, each with another one."""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.sets(st.sampled_from(sorted(TEMPLATE_FILES)), min_size=1, max_size=4), vision=st.booleans())
def test_chat_template_is_that_of_transformers(names: set[str], vision: bool, tmp_path: Path) -> None:
    """Of the processor for a model with images, of the tokenizer for one without; or refused where it has none."""
    folder = copy(tmp_path / "checkpoint")
    if not vision:
        change(folder / "config.json", model_type="qwen2")
    for name in sorted(names):
        (folder / name).parent.mkdir(exist_ok=True)
        TEMPLATE_FILES[name](folder / name)
    try:
        expected = rendered_by_transformers(folder, vision)
    except ValueError as error:
        assert "conflicting files" in str(error)
        expected = None
    if expected is None:
        with pytest.raises(CheckpointError, match="chat template"):
            chat_template(folder)
        return
    assert chat_template(folder).replace("{{ messages[0].content }}", "Hello") == expected


@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside another"])
def test_one_chat_template_in_reference_and_bundle(other: bool, tmp_path: Path) -> None:
    """chat_template.json of the processor, in transformers before the templates of the tokenizer."""
    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors")
    template = (SHAPES_VL / "chat_template.jinja").read_text()
    change(folder / "chat_template.json", chat_template=template.replace("helpful", "right"))
    if other:
        change(folder / "tokenizer_config.json", chat_template=template)
        (folder / "chat_template.jinja").write_text(template)
    fetched = fetch_checkpoint(tmp_path / "fetched", folder)
    prompt = Preprocessor(fetched, model_info(Checkpoint(fetched))).render(CHAT)
    assert "You are a right assistant." in prompt
    assert b"You are a right assistant." in encode_tokenizer(fetched)


def test_newlines_are_those_of_jinja(tmp_path: Path) -> None:
    """The engine's Jinja keeps carriage returns and the newline at the end."""
    folder = copy(tmp_path / "checkpoint")
    change(folder / "chat_template.json", chat_template="{{ a }}\r\nb\n\n")
    assert chat_template(folder) == "{{ a }}\nb\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "tool_use", "template": "a"}], "has the chat templates tool_use but none of the name default"),
        ([{"name": "default"}], "transformers cannot load the tokenizer"),
        ("", "has no chat template; add one"),
        (5, "the chat template of .* cannot be loaded"),
        ("\ud800", "is not text"),
    ],
)
def test_faulty_chat_template_is_refused(template: Any, message: str, tmp_path: Path) -> None:
    folder = copy(tmp_path / "checkpoint")
    change(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError, match=message):
        chat_template(folder)


def test_missing_chat_template_is_refused_by_fetch(tmp_path: Path) -> None:
    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors")
    assert "has no chat template" in error_of(folder)


def test_templates_in_the_folder_are_fetched_and_named(tmp_path: Path) -> None:
    """Only that folder is read, locally and from a hub."""
    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors", "chat_template.jinja")
    for name in (TEMPLATES, "other"):
        (folder / name).mkdir()
        (folder / name / "tool_use.jinja").write_text("tools")
    assert str(folder / TEMPLATES / "tool_use.jinja") in checkpoint_files(folder)
    fetched = fetch_checkpoint(tmp_path / "fetched", folder)
    assert (fetched / TEMPLATES / "tool_use.jinja").is_file()
    assert not (fetched / "other").exists()
    assert "the bundle has the chat template default, not tool_use" in template_differences(fetched)
    names = [
        f"{TEMPLATES}/a.jinja",
        "other/a.jinja",
        f"{TEMPLATES}/a.safetensors",
        f"{TEMPLATES}/../a.jinja",
        "a/b.safetensors",
    ]
    assert [matches(name) for name in names] == [True, False, False, False, False]


def test_model_that_a_processor_names_is_not_fetched(tmp_path: Path) -> None:
    """Transformers would download an audio tokenizer from a hub while it reads the chat template."""
    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors", "chat_template.jinja")
    named = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "owner/name"}
    change(folder / "processor_config.json", audio_tokenizer=named)
    assert "audio_tokenizer" in error_of(folder)


# Stop ids


STOP_IDS = {
    "generation config": ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, {"eos_token_id": 6}),
    "one id": ({"eos_token_id": 3}, {}, {}),
    "outer config": (None, {"eos_token_id": 5}, {"eos_token_id": 6}),
    "text config": (None, {}, {"eos_token_id": [6, 7]}),
    "generation config without it": ({"bos_token_id": 1}, {"eos_token_id": 5}, {"eos_token_id": 6}),
    "none at all": (None, {}, {"eos_token_id": None}),
}


@pytest.mark.parametrize("case", STOP_IDS)
def test_stop_ids_are_those_of_generate(case: str, small: Path, tmp_path: Path) -> None:
    """Where transformers stops at none, it is the tokenizer's end of text; an application stops at all of them."""
    generation, outer, text = STOP_IDS[case]
    folder = Path(shutil.copytree(small, tmp_path / "checkpoint"))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        change(folder / "generation_config.json", **generation)
    stored = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", eos_token_id=None, text_config=stored | text)
    change(folder / "config.json", **outer)
    expected = Qwen2VLForConditionalGeneration.from_pretrained(folder).generation_config.eos_token_id
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    expected = [end] if expected is None else expected if isinstance(expected, list) else [expected]
    assert stop_ids(folder) == model_info(Checkpoint(folder))["stop_ids"] == expected
    _, counts, numbers, _ = encode_tokenizer(folder).split(b"\n", 3)
    assert [int(number) for number in numbers.split()][int(counts.split()[0]) :] == sorted({*expected, end})


@pytest.mark.parametrize("eos", [-1, 1 << 31, "<|im_end|>", [551, None], True, [[551]]])
def test_invalid_stop_ids_are_refused(eos: Any, tmp_path: Path) -> None:
    folder = copy(tmp_path / "checkpoint")
    change(folder / "generation_config.json", eos_token_id=eos)
    with pytest.raises(CheckpointError, match=r"eos_token_id|generation settings"):
        stop_ids(folder)


# Images


def patches_of(image: Image.Image, folder: Path) -> tuple[np.ndarray, list[int]]:
    """Return pixel_values and grid of an image by model.json alone."""
    info = model_info(Checkpoint(folder))
    size, merge = info["patch_size"], info["merge_size"]
    resized = image.resize(Checkpoint(folder).family.image_size(*image.size, info), Image.Resampling.BICUBIC)
    values = (np.array(resized) / 255 - info["image_mean"]) / info["image_std"]
    height, width = (side // size for side in values.shape[:2])
    cells = values.reshape(height // merge, merge, size, width // merge, merge, size, 3)
    cells = cells.transpose(0, 3, 1, 4, 6, 2, 5)[..., None, :, :].repeat(info["temporal_patch_size"], axis=-3)
    return cells.reshape(height * width, -1), [1, height, width]


def write_settings(folder: Path, stored: dict[str, Any], nested: bool) -> None:
    """Write settings as transformers 4 does, or nested as transformers 5 does, then beside others that do not count."""
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": stored}))
        change(
            folder / "preprocessor_config.json", image_mean=[0.1] * 3, size={"shortest_edge": 784, "longest_edge": 1568}
        )
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(stored))


limits = st.tuples(st.integers(28 * 28, 40_000), st.integers(20_000, 90_000))
sizes = st.one_of(
    st.just({}),
    limits.map(lambda edges: {"size": {"shortest_edge": edges[0], "longest_edge": edges[1]}}),
    limits.map(lambda edges: {"min_pixels": edges[0], "max_pixels": edges[1]}),
    # As Qwen2-VL was published.
    limits.map(lambda e: {"min_pixels": e[0], "max_pixels": e[1], "size": {"min_pixels": e[0], "max_pixels": e[1]}}),
    limits.map(lambda edges: {"max_pixels": edges[1], "size": {"shortest_edge": 3136, "longest_edge": 1 << 20}}),
)
pixels = st.fixed_dictionaries(
    {},
    optional={
        "do_rescale": st.booleans(),
        "do_normalize": st.booleans(),
        "do_convert_rgb": st.booleans(),
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 0.01]),
        "image_mean": st.sampled_from([[0.5] * 3, [0.4, 0.3, 0.2], 0.5]),
        "image_std": st.sampled_from([[0.5] * 3, [0.2, 0.3, 0.4]]),
        "image_processor_type": st.sampled_from(["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"]),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    limits=sizes,
    pixels=pixels,
    nested=st.booleans(),
    shape=st.tuples(st.integers(20, 300), st.integers(20, 300)),
)
def test_images_are_those_of_the_processor(
    limits: dict[str, Any], pixels: dict[str, Any], nested: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Limits of pixels absent, in old and in new keys; and pixels rescaled, normalized or neither."""
    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors")
    write_settings(folder, limits | pixels, nested)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="np")
    values, grid = patches_of(image, folder)
    assert expected["image_grid_thw"].tolist() == [grid]
    np.testing.assert_allclose(values, expected["pixel_values"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside preprocessor_config.json"])
def test_processor_of_transformers_5(both: bool, tmp_path: Path) -> None:
    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors", "chat_template.jinja")
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    stored["size"] = {"shortest_edge": 3136, "longest_edge": 28 * 28 * 32}
    change(folder / "processor_config.json", image_processor=stored, processor_class="Qwen2VLProcessor")
    if not both:
        (folder / "preprocessor_config.json").unlink()
    fetched = fetch_checkpoint(tmp_path / "fetched", folder)
    assert model_info(Checkpoint(fetched))["max_pixels"] == 28 * 28 * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize False, and only True is supported"),
        ({"resample": 2}, "resample 2, and only 3 is supported"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "image_processor_type 'CLIPImageProcessor', and only",
        ),
        ({"size": {"longest_edge": 7840}}, "invalid min_pixels: None"),
        ({"size": {"min_pixels": 784, "max_pixels": 7840}}, "invalid min_pixels: None"),
        ({"min_pixels": 0}, "invalid min_pixels: 0"),
        ({"min_pixels": 1 << 30}, "enlarges images to 1073741824 pixels"),
        ({"image_mean": [0.5]}, "mean must have 3 elements"),
        ({"image_std": [0, 0, 0]}, "invalid image_std"),
        ({"rescale_factor": 0}, "image processor of"),
        ({"auto_map": {"AutoImageProcessor": "a.B"}}, "requests remote code"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_image_settings_that_cannot_be_followed_are_refused(
    settings: dict[str, Any], message: str, nested: bool, tmp_path: Path
) -> None:
    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors", "chat_template.jinja")
    write_settings(folder, settings, nested)
    assert message in error_of(folder)


def test_other_pixels_than_the_settings_say_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that a later release of transformers may read, and this package does not know."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = copy(tmp_path / "checkpoint", *FILES, "model.safetensors", "chat_template.jinja")
    normalize = Qwen2VLImageProcessorPil.normalize
    monkeypatch.setattr(Qwen2VLImageProcessorPil, "normalize", lambda *arguments: normalize(*arguments) * 1.01)
    assert "changes images otherwise" in error_of(folder)
