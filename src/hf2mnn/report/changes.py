"""Files of the `compare` stage: changes.csv with one row for each changed figure, and changes.md for readers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tabulate import tabulate

from hf2mnn.core.files import atomic_file
from hf2mnn.figures import BENCHMARK, CONSOLE, shown_in
from hf2mnn.report.console import HEADS, cell
from hf2mnn.report.versions import Speeds, Versions

TABLE, PAGE = "changes.csv", "changes.md"
SPEEDS = [figure.name for figure in shown_in(CONSOLE) if figure.source == BENCHMARK]


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a padded Markdown table."""
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True).splitlines()


def _with_speeds(table: pd.DataFrame, speeds: dict) -> pd.DataFrame:
    """Replace the speeds of a summary by those of interleaved runs; without such runs they are missing."""
    timed = table["variant"].map(lambda name: speeds.get(name, {}).get("measures", {}))
    return table.assign(**{speed: [measures.get(speed, {}).get("median") for measures in timed] for speed in SPEEDS})


def side_by_side(tables: list[pd.DataFrame], speeds: Speeds) -> list[str]:
    """Return a Markdown table of the variants of both versions, with changed cells as "before → after"."""
    sides = [
        {row["variant"]: row for row in _with_speeds(table, timed).to_dict("records")}
        for table, timed in zip(tables, speeds, strict=True)
    ]
    rows = []
    for name in [name for name in sides[0] if name in sides[1]]:
        pairs = [tuple(cell(column, side[name][column]) for side in sides) for column in HEADS]
        rows.append([before if before == after else f"{before} → {after}" for before, after in pairs])
    return _markdown(list(HEADS.values()), rows)


def changes_page(versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> str:
    """Return the contents of changes.md."""
    lines = [f"# Changes from {versions.before} to {versions.after}", ""]
    lines += [f"- {message}" for message in versions.changed_inputs]
    lines += ["", *side_by_side(tables, speeds), "", "## Changes beyond uncertainty", ""]
    rows = [
        [row.variant, row.figure, f"{row.before:.4g}", f"{row.after:.4g}", row.change]
        for row in versions.changes.itertuples()
    ]
    lines += _markdown(list(versions.changes.columns), rows) if rows else ["None."]
    lines += ["", *(f"- {message}" for message in versions.messages)]
    lines += [f"- only in {folder}: {', '.join(names)}" for folder, names in versions.only.items() if names]
    return "\n".join(lines) + "\n"


def write_changes(folder: Path, versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> None:
    """Write changes.csv and changes.md.

    Args:
        folder: Output folder.
        versions: Differences between the versions.
        tables: Summaries of both versions.
        speeds: Speeds of both versions from interleaved runs; empty dictionaries without them.
    """
    with atomic_file(folder / TABLE) as path:
        versions.changes.to_csv(path, index=False)
    with atomic_file(folder / PAGE) as path:
        path.write_text(changes_page(versions, tables, speeds), encoding="utf-8")
