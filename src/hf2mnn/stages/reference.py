"""reference: answers of the transformers model in float32, for all comparisons.

Reads a checkpoint and an evaluation or calibration set.
Writes prompts, token ids, logits, answers, image embeddings, and tap points of two probes.
"""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

STAGE = Stage(
    "reference",
    tools=("torch", "transformers", "tokenizers", "pillow"),
    # Float32 weights and the logits of all answers; with less memory the weights stay mapped from their files.
    footprint=Footprint(3000, 4.1, 60, 120),
    inputs={"checkpoint": "fetch"},
)


def run(
    checkpoint: Path, examples: Path, destination: Path, max_new_tokens: int, threads: int, weights: str = "auto"
) -> Path:
    """Answer every example greedily and write inputs, logits and answers.

    Raises:
        EvaluationSetError: An example or an image cannot be read.
        CheckpointError, ManifestError: The checkpoint is incomplete, or differs from its manifest.
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
