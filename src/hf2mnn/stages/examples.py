"""examples: the questions that a model is evaluated or calibrated on.

Reads a user-provided set (a folder with examples.jsonl), or draws one from a labelled data set.
Writes examples.jsonl and the images that it names.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

STAGE = Stage("examples", tools=("datasets", "pillow"), footprint=Footprint(2000, 0, 240, 0))


def copy_set(examples: Path, destination: Path) -> Path:
    """Copy a user-provided set after reading every example and image.

    Raises:
        EvaluationSetError: The folder is not an evaluation set, or an image is missing or unreadable.
    """
    from hf2mnn.reference.examples import NAME, read_examples, read_image

    records = read_examples(examples)
    images = sorted({name for record in records for name in record.images})
    for name in images:
        read_image(examples / name)
    with open_stage(STAGE, destination, paths={"examples": examples}, tools=("pillow",)) as stage:
        for name in [NAME, *images]:
            (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(examples / name, stage.folder / name)
        stage.results["examples"] = len(records)
    return destination


def draw_set(
    dataset: str, samples: int, destination: Path, path: Path | None = None, revision: str = "main", seed: int = 0
) -> Path:
    """Draw `samples` questions of a labelled data set by `seed`; `path` is a local copy, else the hub's is used.

    Raises:
        EvaluationSetError: The data set is unknown, cannot be read, or has other columns.
    """
    from hf2mnn.reference.labelled_sets import draw_examples, get_dataset

    chosen = get_dataset(dataset)
    settings = {"dataset": dataset, "samples": samples, "seed": seed, "split": chosen.split}
    settings |= {"repository": chosen.repository, "revision": revision} if path is None else {}
    with open_stage(STAGE, destination, settings=settings, paths={"path": path} if path else {}) as stage:
        stage.results.update(draw_examples(dataset, samples, stage.folder, path, revision, seed))
    return destination
