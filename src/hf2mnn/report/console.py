"""Terminal output: comparison of variants, layer errors, and changes between versions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.table import Table

from hf2mnn.evaluation.findings import out_of_tolerance
from hf2mnn.figures import CONSOLE, FIGURES, shown_in
from hf2mnn.report.table import FAIL, PASS

if TYPE_CHECKING:
    from hf2mnn.report.evidence import Evidence, VariantEvidence
    from hf2mnn.report.versions import Versions

HEADS = {
    "variant": "variant",
    **{figure.name: figure.head or figure.label for figure in shown_in(CONSOLE)},
    "verdict": "verdict",
}
"""Heads of the columns of the comparison."""


def cell(column: str, value: object) -> str:
    """Format a value of a column; a dash where nothing was measured."""
    if pd.isna(value):
        return "-"
    return FIGURES[column].text(value) if column in FIGURES else str(value)


def console_to(file: IO[str] | None = None, width: int = 120) -> Console:
    """Return a console for `file` (stdout by default), `width` characters wide where that is no terminal."""
    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def new_table(title: str, left: Sequence[str], right: Sequence[str], folded: str = "") -> Table:
    """Return a table with left-aligned and then right-aligned columns; long cells of the column `folded` wrap."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for head in (*left, *right):
        justify = "left" if head in left else "right"
        table.add_column(head, justify=justify, no_wrap=head != folded, overflow="fold")
    return table


def print_note(console: Console, text: str) -> None:
    """Print a note below a table."""
    console.print(text, style="dim", markup=False)


def print_table(frame: pd.DataFrame, file: IO[str] | None = None) -> None:
    """Print the comparison of each model, and the reasons of missed gates."""
    console = console_to(file)
    for model, rows in frame.groupby("model", sort=False):
        title, heads = f"{model}: variants compared with PyTorch in float32", list(HEADS.values())
        table = new_table(title, heads[:1], heads[1:], folded=heads[0])
        table.columns[-1].justify = "left"
        for row in rows.to_dict("records"):
            colour = {PASS: "green", FAIL: "red"}.get(row["verdict"], "dim")
            cells = [cell(column, row[column]) for column in HEADS]
            table.add_row(*cells[:-1], f"[{colour}]{cells[-1]}[/]")
        console.print(table)
        for row in rows.to_dict("records"):
            if row["reason"]:
                console.print(f"  {row['variant']}: {row['reason']}", markup=False)
            if row["cause"]:
                console.print(f"  {row['variant']}, cause: {row['cause']}", markup=False)
    print_note(
        console,
        "top-1, mean KLD (nats): teacher-forced. greedy: answers that equal PyTorch's. task: task accuracy. vision:\n"
        "cosine of image embeddings. KV cache: largest KLD between two ways of filling it. as called: task accuracy\n"
        "for a plain call of MNN 3.6.1, whose positions after an image are wrong. tok/s: decoding on this machine.",
    )


def _print_variant_layers(console: Console, variant: VariantEvidence) -> None:
    for part, layers in variant.layers.groupby("part", sort=False):
        title = f"{variant.name}, {part}: relative error at each tap point, the larger of its probes"
        heads = ("ONNX", "MNN", "cosine", "MNN local", "tolerance")
        table = new_table(title, ("tap point", "operator"), heads, folded="tap point")
        for point, probes in layers.sort_values("order").groupby("point", sort=False):
            onnx, mnn, local, tolerance = probes[["onnx_error", "mnn_error", "local_error", "tolerance"]].max()
            table.add_row(
                point.removeprefix("model.").removeprefix("language_model."),
                probes["operator"].iloc[0],
                f"{onnx:.1e}",
                f"{mnn:.1e}",
                f"{probes['mnn_cosine'].min():.5f}",
                f"[red]{local:.1e}[/]" if local > tolerance else f"{local:.1e}",
                f"{tolerance:.1e}",
            )
        console.print(table)


def print_layers(evidence: Evidence, file: IO[str] | None = None) -> None:
    """Print the errors of each diagnosed variant by layer, and the first operator that exceeds its tolerance."""
    console = console_to(file)
    for variant in evidence.variants:
        if variant.layers is None:
            continue
        _print_variant_layers(console, variant)
        bad = out_of_tolerance(variant.layers)
        if bad.empty:
            console.print(f"{variant.name}: all operators are within tolerance", markup=False)
            continue
        first = bad.iloc[0]
        detail = first["detail"] or f"relative error {first['local_error']:.2g}"
        text = f"{variant.name}: first out of tolerance: {first['point']} ({first['operator']}): {detail}"
        console.print(text, markup=False, style="red")
    print_note(
        console,
        "ONNX, MNN: error against PyTorch, accumulated from the input on. MNN local: error of this operator alone,\n"
        "given MNN's own values of the tap points before it.",
    )


def print_versions(versions: Versions, file: IO[str] | None = None) -> None:
    """Print the changes between two versions that exceed their uncertainty, and the first layer that changed."""
    console = console_to(file)
    title = f"Changes beyond uncertainty, {versions.before} to {versions.after}"
    table = new_table(title, ("variant", "figure"), ("before", "after", "change"))
    table.columns[-1].justify = "left"
    for row in versions.changes.itertuples():
        colour = "red" if row.change in ("worse", "slower", "larger") else "green"
        table.add_row(row.variant, row.figure, f"{row.before:.4g}", f"{row.after:.4g}", f"[{colour}]{row.change}[/]")
    if len(versions.changes):
        console.print(table)
    else:
        console.print(f"{title}: none", markup=False)
    for message in [*versions.changed_inputs, *versions.messages]:
        console.print(message, markup=False)
    for folder, names in versions.only.items():
        if names:
            console.print(f"only in {folder}: {', '.join(names)}", markup=False)
