"""A person's own set is kept as it is, with the images that it names and no others, and a broken one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.manifest import Manifest
from hf2mnn.reference.examples import read_examples
from hf2mnn.stages.examples import copy_set
from support import run_cli


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Three questions about two images, and one that none names."""
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


def test_examples_and_their_images_are_kept_byte_for_byte(few: Path, tmp_path: Path) -> None:
    made = copy_set(few, tmp_path / "made")
    manifest = Manifest.load(made)
    assert manifest.verify() == made
    assert set(manifest.outputs) == {"examples.jsonl", "images/red.png", "images/blue.png"}
    assert all((made / name).read_bytes() == (few / name).read_bytes() for name in manifest.outputs)
    assert read_examples(made) == read_examples(few)


def test_the_same_examples_have_the_same_digest_wherever_they_lie(few: Path, tmp_path: Path) -> None:
    first = copy_set(few, tmp_path / "made")
    again = copy_set(first, tmp_path / "again")
    assert Manifest.load(again).digest() == Manifest.load(first).digest()


@pytest.mark.parametrize(("content", "says"), [(None, "there is no image"), (b"PNG", "is not an image")])
def test_image_that_cannot_be_read_is_said_before_anything_is_asked(
    content: bytes | None, says: str, few: Path, tmp_path: Path
) -> None:
    image = few / "images" / "blue.png"
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(EvaluationSetError, match=says):
        copy_set(few, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("given", [(), ("--dataset", "docvqa", "--examples", "x")], ids=["neither", "both"])
def test_command_takes_one_kind_of_set(given: tuple[str, ...], tmp_path: Path) -> None:
    done = run_cli("evaluation", *given, "--out", tmp_path / "made")
    assert done.returncode == 1 and "either --dataset NAME or --examples FOLDER" in done.stderr
