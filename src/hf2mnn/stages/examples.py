"""examples: a user-provided set, or a labelled data set to draw from -> examples.jsonl and the images that it names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.config.models import Dataset
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.options import Out
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage("examples", tools=("datasets", "pillow"), footprint=Footprint(2000, 0, 240, 0))


def run(
    destination: Out,
    path: Annotated[
        Path | None, typer.Option(help="Folder with examples.jsonl; with --dataset, a local copy of that data set.")
    ] = None,
    dataset: Annotated[Dataset | None, typer.Option(help="Labelled data set to draw from.")] = None,
    samples: Annotated[int, typer.Option(help="Questions to draw from the data set.", min=1)] = 100,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch of the data set on the hub.")] = "main",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> Path:
    """Collect an evaluation or calibration set: your own, or questions of a labelled data set.

    Example: hf2mnn examples --dataset docvqa --samples 100 --out my-docvqa

    Example: hf2mnn examples --path my-questions --out results/mine/examples/evaluation
    """
    if dataset is None and path is None:
        raise Hf2mnnError("give --path FOLDER, --dataset NAME, or both")
    if dataset is None:
        from hf2mnn.reference.examples import NAME, read_examples, read_image

        records = read_examples(path)
        images = sorted({name for record in records for name in record.images})
        for name in images:
            read_image(path / name)
        with open_stage(STAGE, destination, paths={"examples": path}, tools=("pillow",)) as stage:
            for name in [NAME, *images]:
                (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path / name, stage.folder / name)
            stage.results["examples"] = len(records)
    else:
        from hf2mnn.reference.labelled_sets import draw_examples, get_dataset

        chosen = get_dataset(dataset)
        settings = {"dataset": dataset, "samples": samples, "seed": seed, "split": chosen.split}
        settings |= {"repository": chosen.repository, "revision": revision} if path is None else {}
        with open_stage(STAGE, destination, settings=settings, paths={"path": path} if path else {}) as stage:
            stage.results.update(draw_examples(dataset, samples, stage.folder, path, revision, seed))
    return destination
