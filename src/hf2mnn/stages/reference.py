"""reference: a checkpoint, examples -> prompts, token ids, logits, answers, image embeddings, probes' tap points."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.core.options import CheckpointFolder, Out, Threads, WeightsKept
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "reference",
    tools=("torch", "transformers", "tokenizers", "pillow"),
    # Float32 weights and the logits of all answers; with less memory the weights stay mapped from their files.
    footprint=Footprint(3000, 4.1, 60, 120),
    inputs={"checkpoint": "fetch"},
)


def run(
    checkpoint: CheckpointFolder,
    examples: Annotated[Path, typer.Option(help="Folder with examples.jsonl.")],
    destination: Out,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 64,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> Path:
    """Answer a set with PyTorch in float32, for all comparisons.

    Example: hf2mnn reference results/shapes-vl/checkpoint --examples models/shapes-vl/evaluation
        --out results/shapes-vl/reference/evaluation
    """
    from hf2mnn.checkpoint.folder import Checkpoint
    from hf2mnn.reference.examples import NAME, image_files, read_examples, read_image
    from hf2mnn.reference.pytorch import set_torch_threads, usable_examples, write_reference

    loaded = Checkpoint(checkpoint)
    chosen = usable_examples(read_examples(examples), loaded, examples)
    set_torch_threads(threads)
    paths = image_files(chosen, examples)
    images = {name: read_image(path) for name, path in paths.items()}
    files = {"examples": examples / NAME, **paths}
    settings = {"max_new_tokens": max_new_tokens, "threads": threads}
    with open_stage(
        STAGE, destination, {"checkpoint": checkpoint}, settings, files=files, paths={"examples": examples}
    ) as stage:
        stage.results.update(write_reference(loaded, chosen, images, stage.folder, max_new_tokens, weights))
    return destination
