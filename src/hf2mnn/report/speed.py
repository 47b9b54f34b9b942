"""Terminal output of the benchmark and of `hf2mnn tune`."""

from __future__ import annotations

from itertools import groupby
from statistics import median
from typing import IO, TYPE_CHECKING, Any

from hf2mnn.figures import FIGURES, SPEED, UNITS, on_page
from hf2mnn.report.console import console_to, new_table, print_note

if TYPE_CHECKING:
    from hf2mnn.evaluation.tune import Trial, Tuned

HEADS = {figure.name: figure.measure_head for figure in on_page(SPEED)}


def shown(unit: str, value: float, spread: float | None = None) -> str:
    """Format a value with three significant digits, in the unit's scale, and its spread with as many decimals."""
    scale, decimals = UNITS[unit].scale[1], 0
    value *= scale
    while decimals < 3 and abs(value) * 10**decimals < 99.5:
        decimals += 1
    return f"{value:.{decimals}f}" + (f" ±{spread * scale:.{decimals}f}" if spread is not None else "")


def cell(measure: str, values: dict[str, Any] | None) -> str:
    """Format the median of a measure, half its interquartile range, and the ratio to the baseline."""
    if values is None:
        return "-"
    spread = (values["third_quartile"] - values["first_quartile"]) / 2
    return f"{shown(FIGURES[measure].unit, values['median'], spread)} ({values['ratio']:.2f})"


def print_speed(speed: dict[str, Any], file: IO[str] | None = None) -> None:
    """Print the results of a benchmark; `speed` is benchmark.json."""
    console, machine = console_to(file, 140), speed["machine"]
    title = (
        f"prompt {speed['prompt_tokens']} tokens, answer {speed['answer_tokens']} tokens, {speed['threads']} threads"
    )
    table = new_table(title, ["bundle"], list(HEADS.values()))
    for name, bundle in speed["bundles"].items():
        table.add_row(name, *(cell(measure, bundle["measures"].get(measure)) for measure in HEADS))
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
            table.add_row(group, *trial_cells(trial, tuned.max_kld))
        table.add_section()
    console.print(table)
    console.print(tuned.verdict, markup=False)
    if tuned.changed:
        settings = ", ".join(f"{key} {value}" for key, value in tuned.changed.items())
        console.print(f"{'written' if written else 'not written (--dry-run)'}: {settings}", markup=False)


def trial_cells(trial: Trial, max_kld: float) -> list[str]:
    """Return the cells of a trial after its group."""
    kld = f"{trial.kld:.2g}" if trial.kld else "0"
    if not trial.seconds:
        return [trial.label, "-", "-", "-", kld, "[red]refused[/]" if trial.kld > max_kld else ""]
    return [
        trial.label,
        shown("s", trial.median, trial.spread / 2),
        shown("tokens/s", median(trial.decode_tokens_per_s)),
        shown("MB", median(trial.peak_mb)) if trial.peak_mb else "-",
        kld,
        "[green]chosen[/]" if trial.chosen else "",
    ]
