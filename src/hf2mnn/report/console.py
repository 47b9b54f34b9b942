"""The comparison as a person reads it in a terminal."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.table import Table

from hf2mnn.evaluation.findings import out_of_tolerance

if TYPE_CHECKING:
    from hf2mnn.report.evidence import Evidence, Row
    from hf2mnn.report.versions import Versions

HEADS = {
    "variant": "variant",
    "top1_agreement": "top-1",
    "mean_kld": "mean KLD",
    "greedy_match": "greedy",
    "task_accuracy": "task",
    "vision_cosine": "vision",
    "cache_parity": "KV cache",
    "as_called_accuracy": "as called",
    "bytes": "size",
    "decode_tokens_per_s": "tok/s",
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
    if column in ("mean_kld", "cache_parity"):
        return f"{value:.2g}" if value else "0"
    if column.endswith("_per_s"):
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
    if column == "vision_cosine":
        return f"{value:.5f}"
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)


def console_to(file: IO[str] | None = None, width: int = 120) -> Console:
    """A console on `file` (stdout), `width` characters wide where that is no terminal."""
    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def print_table(frame: pd.DataFrame, file: IO[str] | None = None) -> None:
    """One table a model, and below it why a row failed."""
    console = console_to(file)
    for model, rows in frame.groupby("model", sort=False):
        made = Table(title=f"{model}: every conversion against PyTorch fp32", title_justify="left", title_style="bold")
        for column, head in HEADS.items():
            # A long name goes on in the next line, so that no figure is cut.
            left, name = column in ("variant", "verdict"), column == "variant"
            made.add_column(head, justify="left" if left else "right", no_wrap=not name, overflow="fold")
        for row in rows.to_dict("records"):
            colour = {"pass": "green", "FAIL": "red"}.get(row["verdict"], "dim")
            cells = [cell(column, row[column]) for column in HEADS]
            made.add_row(*cells[:-1], f"[{colour}]{cells[-1]}[/]")
        console.print(made)
        for row in rows.to_dict("records"):
            if row["reason"]:
                console.print(f"  {row['variant']}: {row['reason']}", markup=False)
            if row["cause"]:
                console.print(f"  {row['variant']}, cause: {row['cause']}", markup=False)
    console.print(
        "top-1, mean KLD (nats): teacher-forced. greedy: whole answers equal, token for token. task: accuracy.\n"
        "vision: cosine of image embeddings. KV cache: largest KLD between two ways of filling it. as called:\n"
        "task accuracy for a caller of MNN 3.6.1 as it is, which places the tokens after an image wrongly.\n"
        "tok/s: decoding on this machine.",
        style="dim",
        markup=False,
    )


def _print_row_layers(console: Console, row: Row) -> None:
    for part, points in row.layers.groupby("part", sort=False):
        title = f"{row.name}, {part}: relative error of each point, the worse of its probes"
        made = Table(title=title, title_justify="left", title_style="bold")
        for head in ("point", "operator", "ONNX", "MNN", "cosine", "MNN alone", "allowed"):
            left, name = head in ("point", "operator"), head == "point"
            made.add_column(head, justify="left" if left else "right", no_wrap=not name, overflow="fold")
        worst = points.sort_values("order").groupby("point", sort=False)
        for point, seen in worst:
            largest = seen[["onnx_error", "mnn_error", "mnn_local"]].max()
            out = largest["mnn_local"] > seen["tolerance"].max()
            cells = [f"{value:.1e}" for value in largest]
            cells = [cells[0], cells[1], f"{seen['mnn_cosine'].min():.5f}", f"[red]{cells[2]}[/]" if out else cells[2]]
            made.add_row(
                point.removeprefix("model.").removeprefix("language_model."),
                seen["operator"].iloc[0],
                *cells,
                f"{seen['tolerance'].max():.1e}",
            )
        console.print(made)


def print_layers(evidence: Evidence, file: IO[str] | None = None) -> None:
    """Each variant layer by layer, and the first point that leaves tolerance."""
    console = console_to(file)
    for row in evidence.rows:
        if row.layers is None:
            continue
        _print_row_layers(console, row)
        out = out_of_tolerance(row.layers)
        if out.empty:
            console.print(f"{row.name}: every operator stays within its tolerance", markup=False)
        else:
            first = out.iloc[0]
            looks = first["looks"] or f"off by {first['mnn_local']:.2g} of its size"
            said = f"{row.name}: the first to leave tolerance is {first['point']} ({first['operator']}): {looks}"
            console.print(said, markup=False, style="red")
    console.print(
        "MNN: against PyTorch, all errors on the way included. MNN alone: of this operator, given MNN's own values of\n"
        "the points before it.",
        style="dim",
        markup=False,
    )


def print_versions(versions: Versions, file: IO[str] | None = None) -> None:
    """What changed from one version to the other beyond its uncertainty, and where the first layer changed."""
    console = console_to(file)
    title = f"From {versions.one} to {versions.other}: what changed beyond its uncertainty"
    made = Table(title=title, title_justify="left", title_style="bold")
    for head in ("variant", "figure", "before", "after", "change"):
        made.add_column(head, justify="right" if head in ("before", "after") else "left", no_wrap=True)
    for row in versions.changes.itertuples():
        colour = "red" if row.change in ("worse", "slower", "larger") else "green"
        made.add_row(row.variant, row.figure, f"{row.one:.4g}", f"{row.other:.4g}", f"[{colour}]{row.change}[/]")
    if len(versions.changes):
        console.print(made)
    else:
        console.print(f"{title}: nothing", markup=False)
    for sentence in [*versions.made_of, *versions.first_changed]:
        console.print(sentence, markup=False)
    for folder, names in versions.only.items():
        if names:
            console.print(f"only in {folder}: {', '.join(names)}", markup=False)
