"""The calibration sets: what they must hold, that their programs write them, and that no evaluation set shares any."""

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
    folder: Path
    judge: Path
    """The evaluation set from which it must be apart."""
    program: Path
    examples_wanted: int
    bytes_wanted: int

    @property
    def examples(self) -> list[Example]:
        return read_examples(self.folder)

    def named(self) -> set[str]:
        return {name for example in self.examples for name in example.pictures}


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
SETS = pytest.mark.parametrize("made", [GENERAL, SHAPES], ids=["general", "shapes-vl"])


def pixels(folder: Path) -> dict[str, tuple]:
    """Size and RGB bytes of every stored picture, by its name in the examples."""
    pictures = {f"images/{path.name}": read_image(path) for path in sorted(folder.glob("images/*"))}
    return {name: (picture.size, picture.tobytes()) for name, picture in pictures.items()}


def prompts(folder: Path) -> dict[str, str]:
    """What each example says, pictures as their pixels, by id."""
    seen, found = pixels(folder), {}
    for example in read_examples(folder):
        said = json.dumps(example.messages)
        for name in example.pictures:
            said = said.replace(f'"{name}"', str(hash(seen[name])))
        found[example.id] = said
    return found


@SETS
def test_it_has_text_and_pictures(made: Set) -> None:
    assert len(made.examples) >= made.examples_wanted
    pictured = [example for example in made.examples if example.pictures]
    assert 0.3 <= len(pictured) / len(made.examples) <= 0.95
    assert any(len(example.pictures) > 1 for example in made.examples)
    assert any(len(example.messages) > 1 for example in made.examples)
    assert made.named() == set(pixels(made.folder))
    size = sum(path.stat().st_size for path in made.folder.rglob("*") if path.is_file())
    assert size < made.bytes_wanted


@SETS
def test_it_shares_no_prompt_with_what_judges(made: Set) -> None:
    """Nor has it one twice."""
    found = prompts(made.folder)
    assert len(set(found.values())) == len(found)
    assert set(found.values()) & set(prompts(made.judge).values()) == set()


@SETS
def test_it_shares_no_picture_with_what_judges(made: Set) -> None:
    """By pixels, and by the bytes of the files."""
    found = pixels(made.folder)
    assert len(set(found.values())) == len(found)
    assert set(found.values()) & set(pixels(made.judge).values()) == set()
    files = [{path.read_bytes() for path in folder.glob("images/*")} for folder in (made.folder, made.judge)]
    assert files[0] & files[1] == set()


def test_no_text_of_the_general_sets_is_in_both() -> None:
    """With another picture either: only what somebody has written anew."""

    def texts(examples: list[Example]) -> set[str]:
        parts = [part for e in examples for message in e.messages for part in message["content"]]
        return {part["text"] for part in parts if part["type"] == "text"}

    assert texts(GENERAL.examples) & texts(read_examples(GENERAL.judge)) == set()


def test_the_default_set_is_of_many_kinds() -> None:
    categories = {example.category for example in GENERAL.examples}
    assert {"language", "code", "arithmetic", "list", "long", "ocr", "chart", "scene", "aspect"} <= categories
    assert len({example.language for example in GENERAL.examples}) >= 6
    assert sum(example.language == "zh" for example in GENERAL.examples) >= 8
    shapes = [read_image(GENERAL.folder / name).size for name in sorted(GENERAL.named())]
    assert max(width / height for width, height in shapes) >= 6
    assert min(width / height for width, height in shapes) <= 1 / 4
    assert max(width * height for width, height in shapes) <= 640 * 480


def test_shapes_vls_set_is_of_the_kinds_that_its_evaluation_set_has() -> None:
    """Each category that it has in both languages is here in both; pictures that are resized are of other sizes."""

    def kinds(examples: list[Example]) -> set[tuple[str, str]]:
        return {(example.category, example.language) for example in examples}

    judge = read_examples(SHAPES.judge)
    assert kinds(SHAPES.examples) == kinds(judge)
    assert len(SHAPES.named()) <= 24
    odd = [
        {read_image(folder / name).size for e in examples if e.category == "resized" for name in e.pictures}
        for folder, examples in ((SHAPES.folder, SHAPES.examples), (SHAPES.judge, judge))
    ]
    assert odd[0] & odd[1] == set()
    assert all(width % 28 and height % 28 for width, height in odd[0])


def test_readme_counts_what_there_is() -> None:
    text = (GENERAL.folder / "README.md").read_text(encoding="utf-8")
    counts = re.findall(r"^\| ([a-z, -]+) \| (\d+) \|", text, re.MULTILINE)
    of = [example.category for example in GENERAL.examples]
    assert {names: sum(of.count(name) for name in names.split(", ")) for names, _ in counts} == {
        names: int(count) for names, count in counts
    }
    assert {name for names, _ in counts for name in names.split(", ")} == set(of)
    assert f"\n{len(of)} examples without labels and {len(GENERAL.named())} pictures" in text


@SETS
def test_it_is_what_its_program_makes(made: Set, tmp_path: Path) -> None:
    """Word for word, and pixel for pixel with the release of Pillow that is pinned."""
    command = [sys.executable, made.program, "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "examples.jsonl").read_bytes() == (made.folder / "examples.jsonl").read_bytes()
    pinned = f"pillow=={PIL.__version__}\n" in (REPOSITORY / "requirements.txt").read_text()
    names = sorted(path.name for path in (made.folder / "images").iterdir())
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    for name in names:
        with Image.open(tmp_path / "images" / name) as again, Image.open(made.folder / "images" / name) as stored:
            assert again.size == stored.size
            assert not pinned or np.array_equal(np.array(again), np.array(stored)), name
