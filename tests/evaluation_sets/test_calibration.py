"""Calibration sets: contents, reproduction by their programs, and no overlap with evaluation sets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from hf2mnn.reference.examples import Example, read_examples, read_image
from support import REPOSITORY, SHAPES_VL


@dataclass(frozen=True)
class Set:
    """Calibration set, the evaluation set that it must not overlap, the program that writes it, and its bounds."""

    folder: Path
    evaluation: Path
    program: Path
    min_examples: int
    max_bytes: int

    @property
    def examples(self) -> list[Example]:
        return read_examples(self.folder)

    def image_names(self) -> set[str]:
        return {name for example in self.examples for name in example.images}


GENERAL = Set(
    REPOSITORY / "evaluation" / "calibration",
    REPOSITORY / "evaluation" / "general",
    REPOSITORY / "evaluation" / "general" / "make_calibration.py",
    40,
    320_000,
)
SHAPES = Set(
    SHAPES_VL / "calibration",
    SHAPES_VL / "evaluation",
    SHAPES_VL / "training" / "make_calibration.py",
    60,
    150_000,
)
SETS = pytest.mark.parametrize("calibration", [GENERAL, SHAPES], ids=["general", "shapes-vl"])


def pixels(folder: Path) -> dict[str, tuple]:
    """Return size and RGB bytes of every stored image, by its name in the examples."""
    images = {f"images/{path.name}": read_image(path) for path in sorted(folder.glob("images/*"))}
    return {name: (image.size, image.tobytes()) for name, image in images.items()}


def prompts(folder: Path) -> dict[str, str]:
    """Return the messages of each example by id, with images as hashes of their pixels."""
    images, messages = pixels(folder), {}
    for example in read_examples(folder):
        text = json.dumps(example.messages)
        for name in example.images:
            text = text.replace(f'"{name}"', str(hash(images[name])))
        messages[example.id] = text
    return messages


@SETS
def test_a_set_has_texts_and_images(calibration: Set) -> None:
    assert len(calibration.examples) >= calibration.min_examples
    with_images = [example for example in calibration.examples if example.images]
    assert 0.3 <= len(with_images) / len(calibration.examples) <= 0.95
    assert any(len(example.images) > 1 for example in calibration.examples)
    assert any(len(example.messages) > 1 for example in calibration.examples)
    assert calibration.image_names() == set(pixels(calibration.folder))
    size = sum(path.stat().st_size for path in calibration.folder.rglob("*") if path.is_file())
    assert size < calibration.max_bytes


@SETS
def test_a_set_shares_no_prompt_with_its_evaluation_set(calibration: Set) -> None:
    """Prompts are unique."""
    own = prompts(calibration.folder)
    assert len(set(own.values())) == len(own)
    assert set(own.values()) & set(prompts(calibration.evaluation).values()) == set()


@SETS
def test_a_set_shares_no_image_with_its_evaluation_set(calibration: Set) -> None:
    """By pixels, and by the bytes of the files."""
    own = pixels(calibration.folder)
    assert len(set(own.values())) == len(own)
    assert set(own.values()) & set(pixels(calibration.evaluation).values()) == set()
    files = [
        {path.read_bytes() for path in folder.glob("images/*")}
        for folder in (calibration.folder, calibration.evaluation)
    ]
    assert files[0] & files[1] == set()


def test_no_text_of_the_general_sets_is_in_both() -> None:
    """Not even with another image."""

    def texts(examples: list[Example]) -> set[str]:
        parts = [part for e in examples for message in e.messages for part in message["content"]]
        return {part["text"] for part in parts if part["type"] == "text"}

    assert texts(GENERAL.examples) & texts(read_examples(GENERAL.evaluation)) == set()


def test_the_default_set_covers_many_kinds() -> None:
    categories = {example.category for example in GENERAL.examples}
    assert {"language", "code", "arithmetic", "list", "long", "ocr", "chart", "scene", "aspect"} <= categories
    assert len({example.language for example in GENERAL.examples}) >= 6
    assert sum(example.language == "zh" for example in GENERAL.examples) >= 8
    shapes = [read_image(GENERAL.folder / name).size for name in sorted(GENERAL.image_names())]
    assert max(width / height for width, height in shapes) >= 6
    assert min(width / height for width, height in shapes) <= 1 / 4
    assert max(width * height for width, height in shapes) <= 640 * 480


def test_the_set_of_shapes_vl_covers_the_kinds_of_its_evaluation_set() -> None:
    """The same categories and languages; resized images have other sizes."""

    def kinds(examples: list[Example]) -> set[tuple[str, str]]:
        return {(example.category, example.language) for example in examples}

    evaluation = read_examples(SHAPES.evaluation)
    assert kinds(SHAPES.examples) == kinds(evaluation)
    assert len(SHAPES.image_names()) <= 24
    odd = [
        {read_image(folder / name).size for e in examples if e.category == "resized" for name in e.images}
        for folder, examples in ((SHAPES.folder, SHAPES.examples), (SHAPES.evaluation, evaluation))
    ]
    assert odd[0] & odd[1] == set()
    assert all(width % 28 and height % 28 for width, height in odd[0])


def test_the_readme_has_the_right_counts() -> None:
    text = (GENERAL.folder / "README.md").read_text(encoding="utf-8")
    counts = re.findall(r"^\| ([a-z, -]+) \| (\d+) \|", text, re.MULTILINE)
    of = [example.category for example in GENERAL.examples]
    assert {names: sum(of.count(name) for name in names.split(", ")) for names, _ in counts} == {
        names: int(count) for names, count in counts
    }
    assert {name for names, _ in counts for name in names.split(", ")} == set(of)
    assert f"\n{len(of)} examples without labels and {len(GENERAL.image_names())} images" in text


@SETS
def test_the_program_reproduces_the_set(calibration: Set, tmp_path: Path) -> None:
    """Texts are equal; pixels are equal with the pinned release of Pillow."""
    command = [sys.executable, calibration.program, "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "examples.jsonl").read_bytes() == (calibration.folder / "examples.jsonl").read_bytes()
    pinned = f"pillow=={PIL.__version__}\n" in (REPOSITORY / "requirements.txt").read_text()
    names = sorted(path.name for path in (calibration.folder / "images").iterdir())
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    for name in names:
        with (
            Image.open(tmp_path / "images" / name) as again,
            Image.open(calibration.folder / "images" / name) as stored,
        ):
            assert again.size == stored.size
            assert not pinned or np.array_equal(np.array(again), np.array(stored)), name
