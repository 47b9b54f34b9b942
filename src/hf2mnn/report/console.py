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
from rich.text import Text

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import NAME, Manifest, stage_folders
from hf2mnn.core.progress import duration
from hf2mnn.evaluation.findings import out_of_tolerance
from hf2mnn.figures import CONSOLE, FIGURES, SPEED, UNITS, on_page, readable_size, shown_in
from hf2mnn.report.table import FAIL, PASS

if TYPE_CHECKING:
    from hf2mnn.evaluation.tune import Trial, Tuned
    from hf2mnn.report.evidence import Evidence
    from hf2mnn.report.versions import Versions

HEADS = {"variant": "variant"} | {f.name: f.head or f.label for f in shown_in(CONSOLE)} | {"verdict": "verdict"}
TABLE_NOTE = """\
top-1, mean KLD (nats): teacher-forced. greedy: answers that equal PyTorch's. task: task accuracy. vision:
cosine of image embeddings. KV cache: largest KLD between two ways of filling it. as called: task accuracy
for a plain call of MNN 3.6.1, whose positions after an image are wrong. tok/s: decoding on this machine."""
LAYERS_NOTE = """\
ONNX, MNN: error against PyTorch, accumulated from the input on. MNN local: error of this operator alone,
given MNN's own values of the tap points before it."""
STAGES_NOTE = """\
total: sum of all stages; for memory, the maximum. Stages that run at the same time take less time
than the sum and more memory than the maximum. Files that bundles share on disk are counted once
for each bundle."""


def cell(column: str, value: object) -> str:
    """Format a value of a column; a dash where nothing was measured."""
    if pd.isna(value):
        return "-"
    return UNITS[FIGURES[column].unit].format(value) if column in FIGURES else str(value)


def shown(unit: str, value: float, spread: float | None = None) -> str:
    """Format a value with three significant digits, in the unit's scale, and its spread with as many decimals."""
    scale, decimals = UNITS[unit].scale[1], 0
    value *= scale
    while decimals < 3 and abs(value) * 10**decimals < 99.5:
        decimals += 1
    return f"{value:.{decimals}f}" + (f" ±{spread * scale:.{decimals}f}" if spread is not None else "")


def measured(unit: str, runs: dict[str, float]) -> str:
    """Format the median of a measure of the benchmark, ± half its interquartile range."""
    return shown(unit, runs["median"], (runs["third_quartile"] - runs["first_quartile"]) / 2)


def console_to(file: IO[str] | None = None, width: int = 120) -> Console:
    """Return a console without markup for `file` (stdout by default), `width` characters wide if it is no terminal."""
    console = Console(file=file or sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = width
    return console


def new_table(title: str, heads: Sequence[str], left: Sequence[str], folded: str = "") -> Table:
    """Return a table with the columns `left` left-aligned and the others right-aligned; long cells of `folded` wrap."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=head != folded, overflow="fold")
    return table


def print_table(frame: pd.DataFrame, file: IO[str] | None = None) -> None:
    """Print the comparison of each model, and the reasons of missed gates."""
    console = console_to(file)
    for model, group in frame.groupby("model", sort=False):
        title, rows = f"{model}: variants compared with PyTorch in float32", group.to_dict("records")
        table = new_table(title, list(HEADS.values()), ("variant", "verdict"), folded="variant")
        for row in rows:
            *cells, verdict = (cell(column, row[column]) for column in HEADS)
            table.add_row(*cells, Text(verdict, {PASS: "green", FAIL: "red"}.get(verdict, "dim")))
        console.print(table)
        for row in rows:
            if row["reason"]:
                console.print(f"  {row['variant']}: {row['reason']}")
            if row["cause"]:
                console.print(f"  {row['variant']}, cause: {row['cause']}")
    console.print(TABLE_NOTE, style="dim")


def _layer_table(title: str, layers: pd.DataFrame) -> Table:
    heads = ("tap point", "operator", "ONNX", "MNN", "cosine", "MNN local", "tolerance")
    table = new_table(title, heads, heads[:2], folded="tap point")
    errors = dict.fromkeys(("onnx_error", "mnn_error", "local_error", "tolerance"), "max")
    points = layers.sort_values("order").groupby("point", sort=False)
    points = points.agg({"operator": "first", **errors, "mnn_cosine": "min"})
    for point, operator, onnx, mnn, local, tolerance, cosine in points.itertuples():
        name = point.removeprefix("model.").removeprefix("language_model.")
        own = Text(f"{local:.1e}", "red" if local > tolerance else "")
        table.add_row(name, operator, f"{onnx:.1e}", f"{mnn:.1e}", f"{cosine:.5f}", own, f"{tolerance:.1e}")
    return table


def print_layers(evidence: Evidence, file: IO[str] | None = None) -> None:
    """Print the errors of each diagnosed variant by layer, and the first operator that exceeds its tolerance."""
    console = console_to(file)
    for variant in evidence.variants:
        if variant.layers is None:
            continue
        for part, layers in variant.layers.groupby("part", sort=False):
            title = f"{variant.name}, {part}: relative error at each tap point, the larger of its probes"
            console.print(_layer_table(title, layers))
        bad = out_of_tolerance(variant.layers)
        if bad.empty:
            console.print(f"{variant.name}: all operators are within tolerance")
            continue
        first = bad.iloc[0]
        detail = first["detail"] or f"relative error {first['local_error']:.2g}"
        text = f"{variant.name}: first out of tolerance: {first['point']} ({first['operator']}): {detail}"
        console.print(text, style="red")
    console.print(LAYERS_NOTE, style="dim")


def print_versions(versions: Versions, file: IO[str] | None = None) -> None:
    """Print the changes between two versions that exceed their uncertainty, and the first layer that changed."""
    console = console_to(file)
    title = f"Changes beyond uncertainty, {versions.before} to {versions.after}"
    table = new_table(title, list(versions.changes), left=("variant", "figure", "change"))
    for row in versions.changes.itertuples():
        change = Text(row.change, "red" if row.change in ("worse", "slower", "larger") else "green")
        table.add_row(row.variant, row.figure, f"{row.before:.4g}", f"{row.after:.4g}", change)
    console.print(table if len(versions.changes) else f"{title}: none")
    for message in versions.changed_inputs + versions.messages:
        console.print(message)


def print_speed(speed: dict[str, Any], file: IO[str] | None = None) -> None:
    """Print the results of a benchmark; `speed` is benchmark.json."""
    console, bundles, measures = console_to(file, 140), speed["bundles"], on_page(SPEED)
    title = "prompt {prompt_tokens} tokens, answer {answer_tokens} tokens, {threads} threads".format(**speed)
    table = new_table(title, ["bundle", *(measure.measure_head for measure in measures)], left=["bundle"])
    for name, bundle in bundles.items():
        values = [(measure.unit, bundle["measures"].get(measure.name)) for measure in measures]
        cells = [f"{measured(unit, runs)} ({runs['ratio']:.2f})" if runs else "-" for unit, runs in values]
        table.add_row(name, *cells)
    console.print(table)
    title = "speed-up of a decoding step by the KV cache"
    table = new_table(title, ["bundle", *(f"{length} tokens" for length in speed["lengths"])], left=["bundle"])
    for name, bundle in bundles.items():
        table.add_row(name, *(f"{row['speedup']:.1f}" for row in bundle["cache"]))
    console.print(table)
    runs = "Median of {repeats} runs ± half the interquartile range (ratio to {baseline}).".format(**speed)
    machine = "{cpu}, {cores} cores, {memory_gb} GB, {system}, MNN {MNN}.".format(**speed["machine"])
    console.print(f"{runs}\n{machine}", style="dim")


def _trial_cells(trial: Trial, max_kld: float) -> list[str | Text]:
    kld = f"{trial.kld:.2g}" if trial.kld else "0"
    if not trial.seconds:
        return ["-", "-", "-", kld, Text("refused", "red") if trial.kld > max_kld else ""]
    times = [shown("s", trial.median, trial.spread / 2), shown("tokens/s", median(trial.decode_tokens_per_s))]
    peak = shown("MB", median(trial.peak_mb)) if trial.peak_mb else "-"
    return [*times, peak, kld, Text("chosen", "green") if trial.chosen else ""]


def print_tuned(tuned: Tuned, written: bool, file: IO[str] | None = None) -> None:
    """Print all settings that were timed, by group, and the choice."""
    console = console_to(file, 140)
    heads = ("setting", "value", "request ms", "decode tok/s", "peak MB", "mean KLD", "")
    table = new_table("settings, timed in interleaved runs within each group", heads, left=("setting", ""))
    for group, trials in groupby(tuned.trials, key=lambda trial: trial.group):
        for trial in trials:
            table.add_row(group, trial.label, *_trial_cells(trial, tuned.max_kld))
        table.add_section()
    console.print(table)
    console.print(tuned.verdict)
    if tuned.changed:
        settings = ", ".join(f"{key} {value}" for key, value in tuned.changed.items())
        console.print(f"{'written' if written else 'not written (--dry-run)'}: {settings}")


def _resource_cells(seconds: float, cpu_seconds: float, peak_mb: float, size: float) -> list[str]:
    wall, cpu = (f"{time:.1f} s" if time < 9.95 else duration(time) for time in (seconds, cpu_seconds))
    # Manifests of older versions have no CPU time.
    return [wall, cpu if cpu_seconds else "-", readable_size(peak_mb * 1e6), readable_size(size)]


def print_stages(results: Path, stages: Sequence[str], file: IO[str] | None = None) -> None:
    """Print resources of each model's finished stages, in the order of `stages`; raise ManifestError without any."""
    models = sorted(path.parent.parent for path in results.glob(f"*/checkpoint/{NAME}"))
    if not models:
        raise ManifestError(f"no stage has finished in {results}: give the folder that holds a folder for each model")
    console = console_to(file, 100)
    order = {stage: position for position, stage in enumerate(stages)}
    for model in models:
        heads = ("stage", "time", "CPU time", "peak memory", "files")
        table = new_table(f"{model.name}: resources of each stage", heads, left=["stage"], folded="stage")
        manifests = map(Manifest.load, stage_folders(model))
        rows = []
        for manifest in sorted(manifests, key=lambda manifest: order.get(manifest.stage, len(order))):
            size = sum(output["size"] for output in manifest.outputs.values())
            rows.append((manifest.seconds, manifest.cpu_seconds, manifest.peak_rss_mb, size))
            table.add_row(manifest.folder.relative_to(model).as_posix(), *_resource_cells(*rows[-1]))
        seconds, cpu_seconds, peaks, sizes = zip(*rows, strict=True)
        table.add_section()
        table.add_row("total", *_resource_cells(sum(seconds), sum(cpu_seconds), max(peaks), sum(sizes)), style="bold")
        console.print(table)
    console.print(STAGES_NOTE, style="dim")
