"""The comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

from hf2mnn.manifest import Manifest
from hf2mnn.reference.golden import Golden
from hf2mnn.report.console import HEADS, cell

TEMPLATES = Path(__file__).parent
MARK = re.compile(r"<\|[^|]*\|>")
SHOWN = 40
"""Examples shown at most, those with a difference first."""


def _data_uri(picture: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _examples(reference: Path, answers: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    golden = Golden(reference)
    by_id = {name: frame.set_index("id") for name, frame in answers.items()}
    shown = []
    for record in golden.records:
        given = {name: frame.loc[record["id"]] for name, frame in by_id.items()}
        rows = [
            {"name": name, "answer": row["answer"], "differs": row["answer"] != record["answer"]}
            for name, row in given.items()
        ]
        shown.append({**record, "rows": rows, "differing": sum(row["differs"] for row in rows)})
    shown.sort(key=lambda example: -example["differing"])
    shown = shown[:SHOWN]
    for example in shown:
        example["images"] = [_data_uri(golden.picture(name).original) for name in example["pictures"]]
    return shown


def _question(prompt: str) -> str:
    """The last user turn of a rendered prompt, without the template's marks."""
    turn = prompt.rsplit("<|im_start|>user", 1)[-1].split("<|im_end|>")[0]
    return MARK.sub("", turn).strip()


def render_page(
    model: str,
    frame: pd.DataFrame,
    answers: dict[str, pd.DataFrame],
    reference: Path,
    manifests: dict[str, Manifest],
) -> str:
    """HTML with the verdict, the table, examples with their pictures, and what everything was made of and by."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["jinja"]))
    environment.filters["question"] = _question
    rows = frame.to_dict("records")
    return environment.get_template("page.html.jinja").render(
        model=model,
        heads=HEADS,
        rows=[{**row, "cells": {column: cell(column, row[column]) for column in HEADS}} for row in rows],
        failed=[row for row in rows if row["verdict"] == "FAIL"],
        required=[row for row in rows if row["verdict"] == "FAIL" and row["required"]],
        examples=_examples(reference, answers),
        manifests=manifests,
    )
