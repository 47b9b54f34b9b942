"""The comparison as a person reads it in a terminal."""

from __future__ import annotations

import sys
from typing import IO

import pandas as pd
from rich.console import Console
from rich.table import Table

HEADS = {
    "variant": "variant",
    "top1_agreement": "top-1",
    "mean_kld": "mean KLD",
    "greedy_match": "greedy match",
    "task_accuracy": "task accuracy",
    "vision_cosine": "vision cosine",
    "as_called_accuracy": "as called",
    "bytes": "size",
    "verdict": "verdict",
}


def readable_size(size: float) -> str:
    """Bytes as B, kB, MB or GB of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def cell(column: str, value: object) -> str:
    """A figure with the digits that mean something, or a dash where nothing was measured."""
    if pd.isna(value):
        return "-"
    if column == "bytes":
        return readable_size(int(value))
    if column == "mean_kld":
        return f"{value:.2g}" if value else "0"
    if column == "vision_cosine":
        return f"{value:.5f}"
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)


def print_table(frame: pd.DataFrame, file: IO[str] | None = None) -> None:
    """One table a model, and below it why a row failed."""
    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 120
    for model, rows in frame.groupby("model", sort=False):
        made = Table(title=f"{model}: every conversion against PyTorch fp32", title_justify="left", title_style="bold")
        for column, head in HEADS.items():
            made.add_column(head, justify="left" if column in ("variant", "verdict") else "right", no_wrap=True)
        for row in rows.to_dict("records"):
            colour = {"pass": "green", "FAIL": "red"}.get(row["verdict"], "dim")
            cells = [cell(column, row[column]) for column in HEADS]
            made.add_row(*cells[:-1], f"[{colour}]{cells[-1]}[/]")
        console.print(made)
        for row in rows.to_dict("records"):
            if row["reason"]:
                console.print(f"  {row['variant']}: {row['reason']}", markup=False)
    console.print(
        "top-1, mean KLD (nats): teacher-forced. greedy match: whole answers equal, token for token. as called: task\n"
        "accuracy for a caller of MNN 3.6.1 as it is, which places the tokens after a picture wrongly.",
        style="dim",
        markup=False,
    )
