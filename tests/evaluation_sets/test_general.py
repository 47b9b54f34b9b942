"""General evaluation set: contents, reproduction by its program, and agreement of the engine with PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pytest
from PIL import Image
from safetensors import safe_open

from hf2mnn.reference.examples import Example, read_examples, read_image
from hf2mnn.reference.golden import Golden
from hf2mnn.stages.evaluate import run as evaluate
from hf2mnn.stages.reference import run as run_reference
from support import REPOSITORY

GENERAL = REPOSITORY / "evaluation" / "general"
EXAMPLES = read_examples(GENERAL)
CATEGORIES = {
    *("language", "code", "arithmetic", "reasoning", "short", "long"),
    *("ocr", "chart", "scene", "aspect", "two-images", "multi-turn"),
}


def of(category: str) -> list[Example]:
    return [example for example in EXAMPLES if example.category == category]


def texts(example: Example) -> str:
    parts = [part for message in example.messages for part in message["content"]]
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def sizes(example: Example) -> list[tuple[int, int]]:
    return [read_image(GENERAL / name).size for name in example.images]


def test_all_categories_are_covered() -> None:
    assert {example.category for example in EXAMPLES} == CATEGORIES
    assert len({example.language for example in of("language")}) >= 6
    assert len(EXAMPLES) >= 40
    assert {example.answers for example in EXAMPLES} == {None}


def test_images_have_many_shapes_and_all_are_used() -> None:
    named = {name for example in EXAMPLES for name in example.images}
    stored = {path.relative_to(GENERAL).as_posix() for path in GENERAL.glob("images/*")}
    assert named == stored
    shapes = [size for example in of("aspect") for size in sizes(example)]
    assert max(width / height for width, height in shapes) >= 8
    assert min(width / height for width, height in shapes) <= 1 / 6
    assert any(max(size) <= 40 for size in shapes)
    assert any(width % 14 and height % 14 for width, height in shapes)
    assert max(width * height for example in EXAMPLES for width, height in sizes(example)) <= 900 * 600
    assert sum(path.stat().st_size for path in GENERAL.glob("images/*")) < 600_000


def test_several_images_and_several_turns() -> None:
    """An image in the first turn, in a later one, in both, in none; two in one turn, of different sizes."""
    assert all(len(set(example.images)) == 2 for example in of("two-images"))
    assert any(len(set(sizes(example))) == 2 for example in of("two-images"))
    turns = []
    for example in of("multi-turn"):
        questions = [message for message in example.messages if message["role"] == "user"]
        assert len(questions) >= 2
        turns.append(tuple(any(part["type"] == "image" for part in message["content"]) for message in questions))
    assert {turn[:2] for turn in turns} == {(False, False), (True, False), (False, True), (True, True)}
    assert any(message["role"] == "system" for example in of("multi-turn") for message in example.messages)


def test_prompts_have_from_one_character_to_hundreds_of_words() -> None:
    assert min(len(texts(example)) for example in of("short")) == 1
    assert max(len(texts(example).split()) for example in of("long")) >= 380


def test_the_readme_has_the_right_counts() -> None:
    text = (GENERAL / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z, -]+) \| (\d+) \|", text, re.MULTILINE)
    counted = {names: sum(len(of(name)) for name in names.split(", ")) for names, _ in rows}
    assert counted == {names: int(count) for names, count in rows}
    assert {name for names, _ in rows for name in names.split(", ")} == CATEGORIES
    assert text.startswith(f"# The general set\n\n{len(EXAMPLES)} examples")


def test_the_program_reproduces_the_set(tmp_path: Path) -> None:
    """Texts are equal; pixels are equal with the pinned release of Pillow."""
    command = [sys.executable, GENERAL / "make.py", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "examples.jsonl").read_bytes() == (GENERAL / "examples.jsonl").read_bytes()
    pinned = f"pillow=={PIL.__version__}\n" in (REPOSITORY / "requirements.txt").read_text()
    drawn = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in drawn] == sorted(path.name for path in (GENERAL / "images").iterdir())
    for path in drawn:
        with Image.open(path) as again, Image.open(GENERAL / "images" / path.name) as stored:
            assert again.size == stored.size
            assert not pinned or np.array_equal(np.array(again), np.array(stored)), path.name


# In the engine

CHOSEN = [
    "aspect-01",
    "aspect-02",
    "aspect-03",
    "two-images-01",
    "two-images-02",
    "multi-turn-03",
    "multi-turn-04",
    "short-02",
    "long-01",
    "language-04",
]
LENGTH = 6


@dataclass(frozen=True)
class Evaluated:
    golden: Golden
    folder: Path


@pytest.fixture(scope="module")
def evaluated(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Some examples, answered by the embedded model in PyTorch and as a float32 bundle in the engine.

    Their images are scaled down to at most 224 pixels.
    """
    folder = tmp_path_factory.mktemp("general")
    chosen = [example for example in EXAMPLES if example.id in CHOSEN]
    (folder / "set" / "images").mkdir(parents=True)
    lines = (GENERAL / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["id"] in CHOSEN]
    (folder / "set" / "examples.jsonl").write_text("\n".join(kept), encoding="utf-8")
    for name in {name for example in chosen for name in example.images}:
        image = read_image(GENERAL / name)
        image.thumbnail((224, 224))
        image.save(folder / "set" / name)
    reference = run_reference(results / "checkpoint", folder / "set", folder / "reference", LENGTH, threads=1)
    bundle = results / "bundles" / "fp32"
    evaluation = evaluate(
        reference, results / "onnx", folder / "eval", bundle, threads=1, time_limit=120, keep_logits=True
    )
    return Evaluated(Golden(reference), evaluation)


@pytest.mark.parametrize("name", CHOSEN)
def test_logits_of_the_engine_are_those_of_pytorch(evaluated: Evaluated, name: str) -> None:
    """Odd shapes, two images, images in later turns; a wrong position changes logits by whole units."""
    expected = next(example for example in evaluated.golden.examples() if example.id == name)
    with safe_open(evaluated.folder / "logits.safetensors", "np") as tensors:
        logits = tensors.get_tensor(name)
    assert logits.shape == expected.logits.shape
    np.testing.assert_allclose(logits, expected.logits, atol=3e-3, rtol=0)


def test_answers_of_the_engine_are_those_of_pytorch(evaluated: Evaluated) -> None:
    answers = pd.read_parquet(evaluated.folder / "answers.parquet").set_index("id")
    assert set(answers.index) == set(CHOSEN)
    assert answers["greedy_match"].all()
    assert answers["expected"].isna().all()
    summary = json.loads((evaluated.folder / "summary.json").read_text())
    assert summary["task_accuracy"] is None
    assert summary["vision_cosine"] > 0.99999
