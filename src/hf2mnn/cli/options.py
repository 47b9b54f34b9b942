"""Options and helpers that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Out = Annotated[Path, typer.Option("--out", help="Output folder; replaced as a whole when the stage has succeeded.")]
Threads = Annotated[int, typer.Option(help="Threads to compute with; 0 for the runtime's default.", min=0)]
TimeLimit = Annotated[float, typer.Option(help="Seconds after which the engine is stopped.", min=1)]
WeightsKept = Annotated[
    Literal["auto", "resident", "mapped"],
    typer.Option(
        help="resident holds the model's weights in float32; mapped reads them from the checkpoint as each layer runs:"
        " the same results in less memory, slower; auto is resident where they fit.",
    ),
]
Hub = Annotated[Literal["huggingface", "modelscope"], typer.Option(help="Hub of the repository.")]
Revision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the repository; left out, the hub's default branch.")
]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of the fetch stage.")]
OnnxFolder = Annotated[Path, typer.Option("--onnx", help="Folder of the export stage.")]
GraphsFolder = Annotated[Path, typer.Option("--graphs", help="Folder of the convert stage.")]
ReferenceFolder = Annotated[Path, typer.Option("--reference", help="Folder of the reference stage.")]
CalibrationAnswers = Annotated[
    Path, typer.Option("--calibration", help="Folder of the reference stage for the calibration set.")
]


def example(text: str) -> str:
    """Return the epilog of a command's help."""
    return f"Example: {text}"
