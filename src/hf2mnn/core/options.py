"""Options of the command line that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Out = Annotated[Path, typer.Option("--out", help="Output folder; replaced as a whole when the stage succeeds.")]
Threads = Annotated[int, typer.Option(help="Threads to compute with; 0 for the default of the runtime.", min=0)]
TimeLimit = Annotated[float, typer.Option(help="Seconds after which the engine is stopped.", min=1)]
WeightsKept = Annotated[
    Literal["auto", "resident", "mapped"],
    typer.Option(
        help="resident holds the weights in memory in float32; mapped reads them from the checkpoint for each layer:"
        " same results, less memory, slower; auto is resident if they fit."
    ),
]
Hub = Annotated[Literal["huggingface", "modelscope"], typer.Option(help="Hub of the repository.")]
AdapterHub = Annotated[Literal["huggingface", "modelscope"], typer.Option(help="Hub of the adapter.")]
Revision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the repository; by default the hub's default branch.")
]
Embedding = Annotated[
    Literal["file", "lm_head"],
    typer.Option(help="Where the engine reads the embedding: a bfloat16 file, or lm_head of a tied model."),
]
CheckpointFolder = Annotated[Path, typer.Argument(help="Folder of the fetch stage.")]
OnnxArgument = Annotated[Path, typer.Argument(help="Folder of the export stage.")]
OnnxFolder = Annotated[Path, typer.Option("--onnx", help="Folder of the export stage.")]
GraphsFolder = Annotated[Path, typer.Option("--graphs", help="Folder of the convert stage.")]
ReferenceFolder = Annotated[Path, typer.Option("--reference", help="Folder of the reference stage.")]
CalibrationAnswers = Annotated[
    Path, typer.Option("--calibration", help="Folder of the reference stage for the calibration set.")
]
