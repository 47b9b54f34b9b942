"""User-provided sets: copied with their images, and refused if an example or image is invalid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.manifest import Manifest
from hf2mnn.reference.examples import read_examples
from hf2mnn.stages.examples import run as collect_examples


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Three questions about two images, and a third image without a question."""
    folder = tmp_path / "few"
    (folder / "images").mkdir(parents=True)
    for name in ("red", "blue", "green"):
        Image.new("RGB", (56, 56), name).save(folder / "images" / f"{name}.png")
    records = [
        {
            "id": f"{name}-{number}",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": f"images/{name}.png"}, {"type": "text", "text": "Which?"}],
                }
            ],
        }
        for number, name in enumerate(("red", "blue", "red"))
    ]
    (folder / "examples.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def test_examples_and_their_images_are_copied(few: Path, tmp_path: Path) -> None:
    copy = collect_examples(tmp_path / "copy", few)
    manifest = Manifest.load(copy)
    assert manifest.verify() == copy
    assert set(manifest.outputs) == {"examples.jsonl", "images/red.png", "images/blue.png"}
    assert all((copy / name).read_bytes() == (few / name).read_bytes() for name in manifest.outputs)
    assert read_examples(copy) == read_examples(few)


def test_equal_sets_have_equal_digests_at_any_path(few: Path, tmp_path: Path) -> None:
    first = collect_examples(tmp_path / "made", few)
    again = collect_examples(tmp_path / "again", first)
    assert Manifest.load(again).digest() == Manifest.load(first).digest()


@pytest.mark.parametrize(("content", "message"), [(None, "there is no image"), (b"PNG", "is not an image")])
def test_unreadable_image_is_refused(content: bytes | None, message: str, few: Path, tmp_path: Path) -> None:
    image = few / "images" / "blue.png"
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(EvaluationSetError, match=message):
        collect_examples(tmp_path / "made", few)
    assert not (tmp_path / "made").exists()
