"""The `examples` stage: a person's own evaluation or calibration set, checked and kept beside what is made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from hf2mnn.manifest import Manifest, stage_folder
from hf2mnn.reference.examples import NAME, read_examples, read_picture


def take_examples(examples: Path, destination: Path) -> Path:
    """Copy the examples of a folder, and the pictures that they name, to `destination`.

    Raises:
        EvaluationSetError: it is no such set, or a picture is missing or none.
    """
    found = read_examples(examples)
    pictures = sorted({name for example in found for name in example.pictures})
    for name in pictures:
        read_picture(examples / name)
    manifest = Manifest("examples", places={"examples": str(examples)}, results={"examples": len(found)})
    with stage_folder(destination, manifest) as folder:
        for name in [NAME, *pictures]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(examples / name, folder / name)
    return destination
