"""Times and memory as a person reads them in a terminal."""

from __future__ import annotations

from itertools import groupby
from statistics import median
from typing import IO, TYPE_CHECKING, Any

from rich.table import Table

from hf2mnn.report.console import console_to

if TYPE_CHECKING:
    from hf2mnn.evaluation.tune import Trial, Tuned

HEADS = {
    "load_s": "load ms",
    "first_token_s": "first token ms",
    "prefill_tokens_per_s": "prefill tok/s",
    "decode_tokens_per_s": "decode tok/s",
    "vision_s": "vision ms",
    "bundle_mb": "memory MB",
}


def shown(measure: str, value: float, spread: float | None = None) -> str:
    """Three digits, and the spread with as many places; seconds as milliseconds."""
    scale = 1000 if measure.endswith("_s") and not measure.endswith("_per_s") else 1
    value, places = value * scale, 0
    while places < 3 and abs(value) * 10**places < 99.5:
        places += 1
    return f"{value:.{places}f}" + (f" ±{spread * scale:.{places}f}" if spread is not None else "")


def cell(measure: str, figures: dict[str, Any] | None) -> str:
    """Median, half the distance of the quartiles, and the ratio to the baseline."""
    if figures is None:
        return "-"
    spread = (figures["third_quartile"] - figures["first_quartile"]) / 2
    return f"{shown(measure, figures['median'], spread)} ({figures['ratio']:.2f})"


def print_speed(speed: dict[str, Any], file: IO[str] | None = None) -> None:
    """`speed` is speed.json."""
    out, machine = console_to(file, 140), speed["machine"]
    title = f"{speed['prompt_tokens']} tokens in, {speed['answer_tokens']} out, threads: {speed['threads']}"
    made = Table(title=title, title_justify="left", title_style="bold")
    for head in ("bundle", *HEADS.values()):
        made.add_column(head, justify="left" if head == "bundle" else "right", no_wrap=True)
    for name, bundle in speed["bundles"].items():
        made.add_row(name, *(cell(measure, bundle["measures"].get(measure)) for measure in HEADS))
    out.print(made)
    worth = Table(title="times that a step is faster with the KV cache", title_justify="left", title_style="bold")
    worth.add_column("bundle", no_wrap=True)
    for length in speed["lengths"]:
        worth.add_column(f"after {length}", justify="right", no_wrap=True)
    for name, bundle in speed["bundles"].items():
        worth.add_row(name, *(f"{row['worth']:.1f}" for row in bundle["cache"]))
    out.print(worth)
    out.print(
        f"Median of {speed['repeats']} runs, ± half the distance of the quartiles, (ratio to {speed['baseline']}).\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']},"
        f" MNN {machine['MNN']}.",
        style="dim",
        markup=False,
    )


def print_tuned(tuned: Tuned, written: bool, file: IO[str] | None = None) -> None:
    """Every setting that was tried, beside those it was timed against, and what came of it."""
    out = console_to(file, 140)
    title = "settings, each timed in turns with those of its group"
    made = Table(title=title, title_justify="left", title_style="bold")
    for head in ("setting", "value", "request ms", "decode tok/s", "peak MB", "mean KLD", ""):
        made.add_column(head, justify="left" if head in ("setting", "") else "right", no_wrap=True)
    for group, trials in groupby(tuned.trials, key=lambda trial: trial.group):
        for trial in trials:
            made.add_row(group, *trial_cells(trial, tuned.max_kld))
        made.add_section()
    out.print(made)
    out.print(tuned.verdict, markup=False)
    if tuned.changed:
        settings = ", ".join(f"{key} {value}" for key, value in tuned.changed.items())
        out.print(f"{'written' if written else 'not written (--dry-run)'}: {settings}", markup=False)


def trial_cells(trial: Trial, max_kld: float) -> list[str]:
    """A row of the table above, its group left out."""
    kld = f"{trial.kld:.2g}" if trial.kld else "0"
    if not trial.seconds:
        return [trial.label, "-", "-", "-", kld, "[red]refused[/]" if trial.kld > max_kld else ""]
    return [
        trial.label,
        shown("request_s", trial.median, trial.spread / 2),
        shown("decode_tokens_per_s", median(trial.decode_tokens_per_s)),
        shown("peak_mb", median(trial.peak_mb)) if trial.peak_mb else "-",
        kld,
        "[green]chosen[/]" if trial.chosen else "",
    ]
