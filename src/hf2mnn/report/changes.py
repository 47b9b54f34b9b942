"""The `compare` stage: what changed between two versions of a model, as a table to sort and a page to read.

Files: changes.csv has a row for every figure that changed beyond its uncertainty; changes.md, for people, these, and
before them all conversions side by side.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tabulate import tabulate

from hf2mnn.core.files import whole_file
from hf2mnn.report.console import HEADS, cell
from hf2mnn.report.versions import Speeds, Versions

TABLE, PAGE = "changes.csv", "changes.md"
SPEED = "decode_tokens_per_s"


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table, which is one in a terminal as well."""
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True).splitlines()


def _timed(table: pd.DataFrame, speeds: dict) -> pd.DataFrame:
    """With the speed that was measured in turns with the other version's, and no other."""
    measured = {name: bundle["measures"].get(SPEED, {}).get("median") for name, bundle in speeds.items()}
    return table.assign(**{SPEED: table["variant"].map(measured)})


def side_by_side(one: pd.DataFrame, other: pd.DataFrame, speeds: Speeds) -> list[str]:
    """A row for each conversion that both tables have: what is the same once, what differs as "before → after"."""
    sides = [
        {row["variant"]: row for row in _timed(table, timed).to_dict("records")}
        for table, timed in zip((one, other), speeds, strict=True)
    ]
    rows = []
    for name in [name for name in sides[0] if name in sides[1]]:
        pairs = [tuple(cell(column, side[name][column]) for side in sides) for column in HEADS]
        rows.append([a if a == b else f"{a} → {b}" for a, b in pairs])
    return _markdown(list(HEADS.values()), rows)


def changes_page(versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> str:
    """changes.md."""
    lines = [f"# From {versions.one} to {versions.other}", ""]
    lines += [f"- {sentence}" for sentence in versions.made_of]
    lines += ["", *side_by_side(*tables, speeds), "", "## What changed beyond its uncertainty", ""]
    rows = [
        [row.variant, row.figure, f"{row.one:.4g}", f"{row.other:.4g}", row.change]
        for row in versions.changes.itertuples()
    ]
    lines += _markdown(["variant", "figure", "before", "after", "change"], rows) if rows else ["Nothing."]
    lines += ["", *(f"- {sentence}" for sentence in versions.first_changed)]
    lines += [f"- only in {folder}: {', '.join(names)}" for folder, names in versions.only.items() if names]
    return "\n".join(lines) + "\n"


def write_changes(folder: Path, versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> None:
    """Write changes.csv and changes.md into `folder`; `tables` are the summaries of both versions."""
    with whole_file(folder / TABLE) as path:
        versions.changes.rename(columns={"one": "before", "other": "after"}).to_csv(path, index=False)
    with whole_file(folder / PAGE) as path:
        path.write_text(changes_page(versions, tables, speeds), encoding="utf-8")
