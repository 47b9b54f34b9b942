"""The general evaluation set: what it must hold, that its program draws it, and that the engine agrees on it."""

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
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.reference import run as run_reference
from support import REPOSITORY, SHAPES_VL, float_bundle

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
    return [read_image(GENERAL / name).size for name in example.pictures]


def test_every_kind_of_prompt_is_there() -> None:
    assert {example.category for example in EXAMPLES} == CATEGORIES
    assert len({example.language for example in of("language")}) >= 6
    assert len(EXAMPLES) >= 40
    assert {example.answers for example in EXAMPLES} == {None}


def test_pictures_are_of_many_shapes_and_none_is_superfluous() -> None:
    named = {name for example in EXAMPLES for name in example.pictures}
    stored = {path.relative_to(GENERAL).as_posix() for path in GENERAL.glob("images/*")}
    assert named == stored
    shapes = [size for example in of("aspect") for size in sizes(example)]
    assert max(width / height for width, height in shapes) >= 8
    assert min(width / height for width, height in shapes) <= 1 / 6
    assert any(max(size) <= 40 for size in shapes)
    assert any(width % 14 and height % 14 for width, height in shapes)
    assert max(width * height for example in EXAMPLES for width, height in sizes(example)) <= 900 * 600
    assert sum(path.stat().st_size for path in GENERAL.glob("images/*")) < 600_000


def test_several_pictures_and_several_turns() -> None:
    """A picture in the first turn, in a later one, in both, in none; two in one turn, of different sizes."""
    assert all(len(set(example.pictures)) == 2 for example in of("two-images"))
    assert any(len(set(sizes(example))) == 2 for example in of("two-images"))
    turns = []
    for example in of("multi-turn"):
        asked = [message for message in example.messages if message["role"] == "user"]
        assert len(asked) >= 2
        turns.append(tuple(any(part["type"] == "image" for part in message["content"]) for message in asked))
    assert {turn[:2] for turn in turns} == {(False, False), (True, False), (False, True), (True, True)}
    assert any(message["role"] == "system" for example in of("multi-turn") for message in example.messages)


def test_prompts_are_from_one_character_to_hundreds_of_words() -> None:
    assert min(len(texts(example)) for example in of("short")) == 1
    assert max(len(texts(example).split()) for example in of("long")) >= 380


def test_readme_counts_what_there_is() -> None:
    text = (GENERAL / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z, -]+) \| (\d+) \|", text, re.MULTILINE)
    counted = {names: sum(len(of(name)) for name in names.split(", ")) for names, _ in rows}
    assert counted == {names: int(count) for names, count in rows}
    assert {name for names, _ in rows for name in names.split(", ")} == CATEGORIES
    assert text.startswith(f"# The general set\n\n{len(EXAMPLES)} examples")


def test_it_is_what_its_program_makes(tmp_path: Path) -> None:
    """Word for word, and pixel for pixel with the release of Pillow that is pinned."""
    command = [sys.executable, GENERAL / "make.py", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "examples.jsonl").read_bytes() == (GENERAL / "examples.jsonl").read_bytes()
    pinned = f"pillow=={PIL.__version__}\n" in (REPOSITORY / "requirements.txt").read_text()
    made = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in made] == sorted(path.name for path in (GENERAL / "images").iterdir())
    for path in made:
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
class Judged:
    golden: Golden
    folder: Path


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Some of the set, answered by the embedded model in PyTorch and as a float32 bundle in the engine. Its pictures
    are shrunk to at most 224 pixels, with their shapes.
    """
    folder = tmp_path_factory.mktemp("general")
    chosen = [example for example in EXAMPLES if example.id in CHOSEN]
    (folder / "set" / "images").mkdir(parents=True)
    lines = (GENERAL / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["id"] in CHOSEN]
    (folder / "set" / "examples.jsonl").write_text("\n".join(kept), encoding="utf-8")
    for name in {name for example in chosen for name in example.pictures}:
        picture = read_image(GENERAL / name)
        picture.thumbnail((224, 224))
        picture.save(folder / "set" / name)
    source = fetch_checkpoint(folder / "checkpoint", SHAPES_VL)
    reference = run_reference(source, folder / "set", folder / "reference", LENGTH, threads=1)
    onnx = export_onnx(source, folder / "onnx")
    bundle = float_bundle(onnx, folder / "bundle")
    made = evaluate(reference, onnx, folder / "eval", bundle, threads=1, time_limit=120)
    return Judged(Golden(reference), made)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_engine_gives_pytorchs_logits(judged: Judged, name: str) -> None:
    """Odd shapes, two pictures, pictures in later turns: what is at a wrong position is wrong by whole units."""
    wanted = next(example for example in judged.golden.examples() if example.id == name)
    with safe_open(judged.folder / "logits.safetensors", "np") as tensors:
        found = tensors.get_tensor(name)
    assert found.shape == wanted.logits.shape
    np.testing.assert_allclose(found, wanted.logits, atol=3e-3, rtol=0)


def test_the_engine_answers_as_pytorch(judged: Judged) -> None:
    answers = pd.read_parquet(judged.folder / "answers.parquet").set_index("id")
    assert set(answers.index) == set(CHOSEN)
    assert answers["greedy_match"].all()
    assert answers["expected"].isna().all()
    summary = json.loads((judged.folder / "summary.json").read_text())
    assert summary["task_accuracy"] is None
    assert summary["vision_cosine"] > 0.99999
