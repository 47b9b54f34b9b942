"""Terminal output: variants, layers, versions, the benchmark, `hf2mnn tune`, and the resources of the stages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import NAME, Manifest, stage_folders
from hf2mnn.core.progress import duration
from hf2mnn.evaluation.findings import out_of_tolerance
from hf2mnn.figures import CONSOLE, FIGURES, SPEED, UNITS, on_page, readable_size, shown_in
from hf2mnn.report.table import FAIL, PASS

if TYPE_CHECKING:
    from hf2mnn.evaluation.tune import Trial, Tuned
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


def shown(unit: str, value: float, spread: float | None = None) -> str:
    """Format a value with three significant digits, in the unit's scale, and its spread with as many decimals."""
    scale, decimals = UNITS[unit].scale[1], 0
    value *= scale
    while decimals < 3 and abs(value) * 10**decimals < 99.5:
        decimals += 1
    return f"{value:.{decimals}f}" + (f" ±{spread * scale:.{decimals}f}" if spread is not None else "")


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
    for message in [*versions.changed_inputs, *versions.messages, *versions.only_in()]:
        console.print(message, markup=False)


def print_speed(speed: dict[str, Any], file: IO[str] | None = None) -> None:
    """Print the results of a benchmark; `speed` is benchmark.json."""
    console, machine, measures = console_to(file, 140), speed["machine"], on_page(SPEED)
    title = (
        f"prompt {speed['prompt_tokens']} tokens, answer {speed['answer_tokens']} tokens, {speed['threads']} threads"
    )
    table = new_table(title, ["bundle"], [measure.measure_head for measure in measures])
    for name, bundle in speed["bundles"].items():
        cells = []
        for measure in measures:
            if (values := bundle["measures"].get(measure.name)) is None:
                cells.append("-")
                continue
            spread = (values["third_quartile"] - values["first_quartile"]) / 2
            cells.append(f"{shown(measure.unit, values['median'], spread)} ({values['ratio']:.2f})")
        table.add_row(name, *cells)
    console.print(table)
    title = "speed-up of a decoding step by the KV cache"
    table = new_table(title, ["bundle"], [f"{length} tokens" for length in speed["lengths"]])
    for name, bundle in speed["bundles"].items():
        table.add_row(name, *(f"{row['speedup']:.1f}" for row in bundle["cache"]))
    console.print(table)
    print_note(
        console,
        f"Median of {speed['repeats']} runs ± half the interquartile range (ratio to {speed['baseline']}).\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']},"
        f" MNN {machine['MNN']}.",
    )


def print_tuned(tuned: Tuned, written: bool, file: IO[str] | None = None) -> None:
    """Print all settings that were timed, by group, and the choice."""
    console = console_to(file, 140)
    heads = ("request ms", "decode tok/s", "peak MB", "mean KLD", "")
    table = new_table("settings, timed in interleaved runs within each group", ("setting", "value"), heads)
    table.columns[1].justify, table.columns[-1].justify = "right", "left"
    for group, trials in groupby(tuned.trials, key=lambda trial: trial.group):
        for trial in trials:
            table.add_row(group, trial.label, *_trial_cells(trial, tuned.max_kld))
        table.add_section()
    console.print(table)
    console.print(tuned.verdict, markup=False)
    if tuned.changed:
        settings = ", ".join(f"{key} {value}" for key, value in tuned.changed.items())
        console.print(f"{'written' if written else 'not written (--dry-run)'}: {settings}", markup=False)


def _trial_cells(trial: Trial, max_kld: float) -> list[str]:
    kld = f"{trial.kld:.2g}" if trial.kld else "0"
    if not trial.seconds:
        return ["-", "-", "-", kld, "[red]refused[/]" if trial.kld > max_kld else ""]
    return [
        shown("s", trial.median, trial.spread / 2),
        shown("tokens/s", median(trial.decode_tokens_per_s)),
        shown("MB", median(trial.peak_mb)) if trial.peak_mb else "-",
        kld,
        "[green]chosen[/]" if trial.chosen else "",
    ]


def _resource_cells(seconds: float, cpu_seconds: float, peak_mb: float, size: float) -> list[str]:
    wall, cpu = (f"{time:.1f} s" if time < 9.95 else duration(time) for time in (seconds, cpu_seconds))
    # Manifests of older versions have no CPU time.
    return [wall, cpu if cpu_seconds else "-", readable_size(peak_mb * 1e6), readable_size(size)]


def print_stages(results: Path, stages: Sequence[str], file: IO[str] | None = None) -> None:
    """Print the time, memory and disk space of each finished stage, in the order of `stages`, for each model.

    Raises:
        ManifestError: No stage has finished, or a manifest cannot be read.
    """
    models = sorted(path.parent.parent for path in results.glob(f"*/checkpoint/{NAME}"))
    if not models:
        raise ManifestError(f"no stage has finished in {results}: give the folder that holds a folder for each model")
    console = console_to(file, 100)
    order = {stage: position for position, stage in enumerate(stages)}
    for model in models:
        manifests = [(path.relative_to(model).as_posix(), Manifest.load(path)) for path in stage_folders(model)]
        manifests.sort(key=lambda entry: (order.get(entry[1].stage, len(order)), entry[0]))
        rows = {
            path: (m.seconds, m.cpu_seconds, m.peak_rss_mb, sum(output["size"] for output in m.outputs.values()))
            for path, m in manifests
        }
        seconds, cpu_seconds, peaks, sizes = zip(*rows.values(), strict=True)
        total = _resource_cells(sum(seconds), sum(cpu_seconds), max(peaks), sum(sizes))
        heads = ("time", "CPU time", "peak memory", "files")
        table = new_table(f"{model.name}: resources of each stage", ["stage"], heads, folded="stage")
        table.show_footer = True
        for column, foot in zip(table.columns, ["total", *total], strict=True):
            column.footer = foot
        for path, row in rows.items():
            table.add_row(path, *_resource_cells(*row))
        console.print(table)
    print_note(
        console,
        "total: sum of all stages; for memory, the maximum. Stages that run at the same time take less time\n"
        "than the sum and more memory than the maximum. Files that bundles share on disk are counted once\n"
        "for each bundle.",
    )
