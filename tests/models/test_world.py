"""Data generator and files of the embedded model; a wrong label would look like a wrong conversion."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from support import SHAPES_VL

TRAINING = SHAPES_VL / "training"
EVALUATION = SHAPES_VL / "evaluation"

# Vocabulary of the data generator, repeated as an independent check.
POSITIONS = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}
POSITIONS_ZH = {"左上角": 0, "右上角": 1, "左下角": 2, "右下角": 3}
COLOURS_ZH = {"红色": "red", "绿色": "green", "蓝色": "blue", "黄色": "yellow", "紫色": "purple", "黑色": "black"}
KINDS_ZH = {"圆形": "circle", "正方形": "square", "三角形": "triangle", "星形": "star"}
Cells = list[tuple[str, str] | None]


@pytest.fixture(scope="module")
def world() -> Iterator[ModuleType]:
    """Module models/shapes-vl/training/world.py, which is in no package."""
    specification = importlib.util.spec_from_file_location("shapes_vl_world", TRAINING / "world.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["shapes_vl_world"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules["shapes_vl_world"]


def thing(name: str) -> tuple[str, str]:
    """Return (colour, kind) for "red star", "红色星形" or "红色数字7"."""
    if " " in name:
        colour, kind = name.split(" ")
        return colour, kind
    colour, kind = name[:2], name[2:]
    return COLOURS_ZH[colour], kind.removeprefix("数字") if kind.startswith("数字") else KINDS_ZH[kind]


def kind_of(name: str) -> str:
    return KINDS_ZH.get(name) or name.removeprefix("数字")


def right(text: str, answer: str, cells: Cells) -> bool:
    """Return whether `answer` is right for the question `text` about `cells`, from the words alone."""
    things = [cell for cell in cells if cell]
    if match := re.fullmatch(r"What is at the (.+)\?|(.+)是什么？", text):
        cell = cells[{**POSITIONS, **POSITIONS_ZH}[match[1] or match[2]]]
        return answer in ("nothing", "没有东西") if cell is None else thing(answer) == cell
    if match := re.fullmatch(r"What colour is the (.+)\?|(.+)是什么颜色？", text):
        kind = kind_of(match[1] or match[2])
        return [colour for colour, k in things if k == kind] == [COLOURS_ZH.get(answer, answer)]
    if match := re.fullmatch(r"How many (?:(\w+) )?things are there\?|有几个(?:(.+)的)?东西？", text):
        colour = match[1] or COLOURS_ZH.get(match[2] or "")
        return int(answer) == sum(colour in (None, c) for c, _ in things)
    if match := re.fullmatch(r"Is there a (.+)\?|有没有(.+)？", text):
        return {"yes": True, "有": True, "no": False, "没有": False}[answer] == (thing(match[1] or match[2]) in things)
    if match := re.fullmatch(r"Where is the (.+)\?|(.+)在哪里？", text):
        positions = [index for index, cell in enumerate(cells) if cell == thing(match[1] or match[2])]
        return positions == [{**POSITIONS, **POSITIONS_ZH}[answer]]
    if text in ("Which number is written?", "写的是哪个数字？"):
        return [kind for _, kind in things if kind.isdigit()] == [answer]
    if text in ("Describe the picture.", "描述这张图片。"):
        parts = [re.split(r": |：", part) for part in re.split(r"; |；", answer)]
        positions = [{**POSITIONS, **POSITIONS_ZH}[position] for position, _ in parts]
        things = [None if name in ("nothing", "没有东西") else thing(name) for _, name in parts]
        return positions == [0, 1, 2, 3] and things == cells
    if match := re.fullmatch(r"What is (\d) plus (\d)\?|(\d)加(\d)等于几？", text):
        return int(answer) == int(match[1] or match[3]) + int(match[2] or match[4])
    if match := re.fullmatch(r"What is (.+) in Chinese\?|(.+)用英语怎么说？", text):
        phrase = match[1] or match[2]
        return thing(phrase) == thing(answer) and (" " in phrase) != (" " in answer)
    raise AssertionError(f"unknown question {text!r}")


def cells_of(scene: object) -> Cells:
    return [None if cell is None else (cell.colour, cell.kind) for cell in scene.cells]


def test_every_answer_is_right(world: ModuleType) -> None:
    """All categories, both languages, hundreds of scenes."""
    rng = random.Random(1)
    answers_by_kind: dict[tuple[str, str], set[str]] = {}
    for _ in range(300):
        scene = world.draw_scene(rng)
        for category in [*world.IMAGE_CATEGORIES, *world.TEXT_CATEGORIES]:
            for language in ("en", "zh"):
                question = world.ask(scene, category, language, rng)
                if question is None:
                    continue
                assert (question.category, question.language) == (category, language)
                assert right(question.text, question.answer, cells_of(scene)), (question, scene)
                assert question.text.isascii() == (language == "en") or category == "translate"
                answers_by_kind.setdefault((category, language), set()).add(question.answer)
    assert len(answers_by_kind) == 2 * 9
    # No category can be answered without looking: each has more than one answer.
    assert {key: answers for key, answers in answers_by_kind.items() if len(answers) < 2} == {}


def test_a_seed_defines_an_image(world: ModuleType) -> None:
    def paint(seed: int) -> tuple[object, bytes]:
        rng = random.Random(seed)
        scene = world.draw_scene(rng)
        return scene, world.paint(scene, rng).tobytes()

    assert paint(7) == paint(7)
    assert paint(7)[1] != paint(8)[1]


def test_images_match_their_scene(world: ModuleType) -> None:
    """Each thing is painted in its cell and in its colour, and nothing in an empty cell."""
    rng = random.Random(3)
    for _ in range(60):
        scene = world.draw_scene(rng)
        width, height = scene.size
        image = np.asarray(world.paint(scene, rng)).astype(int)
        empty = np.asarray(world.paint(world.Scene((None,) * 4, scene.size), rng)).astype(int)
        assert image.shape == (height, width, 3)
        painted = (image != empty).any(axis=-1)
        for index, cell in enumerate(scene.cells):
            rows = slice(height // 2 * (index // 2), height // 2 * (index // 2 + 1))
            columns = slice(width // 2 * (index % 2), width // 2 * (index % 2 + 1))
            pixels = image[rows, columns][painted[rows, columns]]
            if cell is None:
                assert len(pixels) == 0
                continue
            assert len(pixels) > 60
            colour = np.median(pixels, axis=0)
            distances = {name: np.abs(colour - rgb).sum() for name, (_, rgb) in world.COLOURS.items()}
            assert min(distances, key=distances.get) == cell.colour


def test_sizes_are_not_resized_by_the_processor(world: ModuleType) -> None:
    """Some are tall and some wide, to detect wrong positions after an image."""
    assert [size for size in world.SIZES if size[0] % 28 or size[1] % 28] == []
    assert any(width < height for width, height in world.SIZES)
    assert any(width > height for width, height in world.SIZES)
    settings = json.loads((SHAPES_VL / "preprocessor_config.json").read_text())
    assert settings["patch_size"] * settings["merge_size"] == 28


def test_the_program_reproduces_the_evaluation_set(tmp_path: Path) -> None:
    """The same bytes and pixels: no answer was edited."""
    program = [sys.executable, TRAINING / "make_evaluation.py", "--out", tmp_path]
    subprocess.run(program, check=True, capture_output=True)
    assert (tmp_path / "examples.jsonl").read_bytes() == (EVALUATION / "examples.jsonl").read_bytes()
    names = sorted(path.name for path in (EVALUATION / "images").iterdir())
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    for name in names:
        drawn, stored = (np.asarray(Image.open(folder / "images" / name)) for folder in (tmp_path, EVALUATION))
        np.testing.assert_array_equal(drawn, stored, err_msg=name)


def test_the_evaluation_set_covers_all_categories(world: ModuleType) -> None:
    """Every category and language, and resized images, two images, several turns, no image."""
    records = [json.loads(line) for line in (EVALUATION / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    labelled = [record for record in records if record["answer"] is not None]
    assert len(labelled) >= 100
    covered = {(record["category"], record["language"]) for record in labelled}
    assert covered == {(c, lang) for c in world.IMAGE_CATEGORIES + world.TEXT_CATEGORIES for lang in ("en", "zh")}
    assert {"resized", "turns", "two pictures", "system"} <= {record["category"] for record in records}
    assert len({record["id"] for record in records}) == len(records)


def tensors() -> dict[str, dict]:
    with (SHAPES_VL / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return header


def test_model_is_small_and_bfloat16() -> None:
    """It is committed, with 12 MB in all."""
    files = [path for path in SHAPES_VL.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {described["dtype"] for described in tensors().values()} == {"BF16"}


def test_model_covers_the_features_of_a_conversion() -> None:
    """Grouped queries, M-RoPE, tied embedding, several layers, and sizes that quantization blocks divide."""
    config = json.loads((SHAPES_VL / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert config["model_type"] == "qwen2_vl"
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert text["num_attention_heads"] % text["num_key_value_heads"] == 0
    sections = text["rope_parameters"]["mrope_section"]
    assert len(sections) == 3
    assert 2 * sum(sections) == text["hidden_size"] // text["num_attention_heads"]
    assert config["tie_word_embeddings"] is True
    assert not [name for name in tensors() if "lm_head" in name]
    assert text["hidden_size"] >= 256
    assert text["hidden_size"] % 128 == text["intermediate_size"] % 128 == 0
    assert text["num_hidden_layers"] >= 4
    assert vision["depth"] >= 2
    layers = {int(match[1]) for name in tensors() if (match := re.search(r"(?<!visual\.)layers\.(\d+)\.", name))}
    assert layers == set(range(text["num_hidden_layers"]))


def test_tokenizer_has_the_special_tokens_of_qwen2_vl() -> None:
    """Each is one token, with the id in config.json."""
    tokenizer = Tokenizer.from_file(str(SHAPES_VL / "tokenizer.json"))
    config = json.loads((SHAPES_VL / "config.json").read_text())
    marks = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    ids = {mark: tokenizer.encode(f"<|{mark}|>", add_special_tokens=False).ids for mark in marks}
    assert {mark for mark, tokens in ids.items() if len(tokens) != 1} == set()
    assert ids["image_pad"] == [config["image_token_id"]]
    assert ids["video_pad"] == [config["video_token_id"]]
    assert ids["vision_start"] == [config["vision_start_token_id"]]
    assert ids["vision_end"] == [config["vision_end_token_id"]]
    assert ids["im_end"] == [config["text_config"]["eos_token_id"]]
    assert tokenizer.get_vocab_size() <= config["text_config"]["vocab_size"]


@pytest.mark.parametrize("words", ["左上角：红色数字7；", "Is there a purple triangle?", "naïve ☃ \U0001f31f\n\t x"])
def test_tokenizer_is_lossless(words: str) -> None:
    tokenizer = Tokenizer.from_file(str(SHAPES_VL / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(words).ids) == words
