"""Checks of a bundle that name causes of error by part and tap point or key.

Each check compares one thing with the checkpoint or the ONNX graph, so that a finding is a cause and not a symptom. The
order is that of the data: settings, tokenizer, embedding, vision tower, decoder, KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf2mnn.checkpoint.facts import chat_template
from hf2mnn.evaluation.findings import Finding, out_of_tolerance
from hf2mnn.evaluation.layers import rounding_error
from hf2mnn.mnn.bundle import MODEL_CONFIG, TOKENIZER, model_settings
from hf2mnn.mnn.bundle_config import read_config
from hf2mnn.mnn.graph import Graph
from hf2mnn.quant.embedding import embedding_blocks, read_tied
from hf2mnn.reference.golden import Golden, collapse_repeats

SHIFTS = (1, -1, 2, -2)
"""Shifts of embedding rows that are recognized."""
NAMED = 3
"""Tap points of one part that have a finding of their own; the others are counted."""


def wrong_settings(bundle: Path, facts: dict[str, Any]) -> list[Finding]:
    """Report keys of llm_config.json that differ from the checkpoint (`facts`: model.json)."""
    stored = read_config(bundle, MODEL_CONFIG)
    # "hf2mnn" holds model.json, which `hf2mnn ask` and the evaluation use.
    expected = model_settings(facts, bundle) | {f"hf2mnn.{key}": value for key, value in facts.items()}
    given = stored | {f"hf2mnn.{key}": value for key, value in stored.get("hf2mnn", {}).items()}
    return [
        Finding("settings", key, f"{MODEL_CONFIG} has {key} {value}, the checkpoint has {right}")
        for key, value, right in differing(given, expected)
    ]


def differing(given: dict[str, Any], expected: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value, expected value) of each expected key that is missing or different; numbers within 1e-6."""
    differences = []
    for key, right in sorted(expected.items()):
        value = given.get(key)
        numeric = _numbers(value) and _numbers(right) and len(value) == len(right)
        if not (np.allclose(value, right, rtol=1e-6) if numeric else value == right):
            differences.append((key, value, right))
    return differences


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)


def wrong_template(bundle: Path, onnx_folder: Path) -> list[Finding]:
    """Report a tokenizer file without the checkpoint's chat template."""
    if chat_template(onnx_folder).encode() in (bundle / TOKENIZER).read_bytes():
        return []
    return [Finding("tokenizer", None, f"the chat template in {TOKENIZER} is not the checkpoint's")]


def wrong_tokens(golden: Golden, tokens: dict[str, list[int]], image_token_id: int | None) -> list[Finding]:
    """Report prompts that the bundle's tokenizer encodes to other ids than transformers.

    `tokens` are the bundle's ids by example, with one image token for each image.
    """
    wrong, shifts, first = 0, set(), ""
    for example in golden.examples():
        if example.id not in tokens:
            continue
        expected = collapse_repeats(example.input_ids, image_token_id)
        ids = np.array(tokens[example.id])
        if not np.array_equal(ids, expected):
            wrong, first = wrong + 1, first or example.id
            shifts.add(int(ids[0] - expected[0]) if len(ids) == len(expected) and np.ptp(ids - expected) == 0 else None)
    if not wrong:
        return []
    (shift,) = shifts if len(shifts) == 1 else (None,)
    detail = f"every id is shifted by {shift:+d}" if shift else f"first in {first}"
    return [Finding("tokenizer", None, f"the tokenizer gives wrong ids for {wrong} of {len(tokens)} prompts: {detail}")]


def wrong_embedding(bundle: Path, onnx_folder: Path) -> list[Finding]:
    """Report embedding rows that differ from the checkpoint's."""
    message = wrong_rows(embedding_blocks(bundle, onnx_folder), read_tied(bundle))
    return [Finding("embedding", None, message)] if message else []


def wrong_rows(blocks: Iterable[tuple[np.ndarray, np.ndarray]], tied: dict[str, Any] | None) -> str | None:
    """Describe embedding rows that differ from the checkpoint's; None if there are none.

    `blocks` have stored rows and the checkpoint's rows rounded to bfloat16, float32 [rows, hidden]. `tied` are the
    settings of an embedding that is the quantized lm_head, whose rows may differ by the rounding of their bits.
    """
    wrong, count, shifts = 0, 0, dict.fromkeys(SHIFTS, 0)
    allowed = rounding_error(tied["quant_bit"]) if tied else 0.0
    for stored, expected in blocks:
        # Negated so that NaN differs.
        differs = ~(np.linalg.norm(stored - expected, axis=1) <= allowed * np.linalg.norm(expected, axis=1))
        wrong, count = wrong + int(differs.sum()), count + len(expected)
        for shift in SHIFTS if differs.any() else ():
            one, other = (stored[:-shift], expected[shift:]) if shift > 0 else (stored[-shift:], expected[:shift])
            error = np.linalg.norm(one - other, axis=1)
            shifts[shift] += int((error <= allowed * np.linalg.norm(other, axis=1)).sum())
    if not wrong:
        return None
    message, shift = f"{wrong} of {count} rows of the embedding are not the checkpoint's", max(shifts, key=shifts.get)
    if shifts[shift] > count / 2:
        message += f": row i holds token i{shift:+d}'s, the ids are shifted by {abs(shift)}"
    return message


def unfused_attention(graph: Graph, layers: int) -> list[Finding]:
    """Report attentions that are not the engine's fused operator, and so have no KV cache and no causal mask."""
    fused = graph.fused
    if len(fused) == layers and "past_key_values" not in graph.inputs:
        return []
    names = graph.content["tensorName"]
    outputs = {names[op["outputIndexes"][0]] for op in fused}
    unfused = sorted(name for name in graph.values if name.endswith(".context") and name not in outputs)
    named = ", ".join(unfused) or "unknown"
    message = f"{len(fused)} of {layers} attentions are fused with a KV cache; not fused: {named}"
    return [Finding("decoder", unfused[0] if unfused else None, message)]


def wrong_layers(layers: pd.DataFrame) -> list[Finding]:
    """Report tap points that exceed their tolerance in a table of `compare_layers`; the first of each part by name."""
    findings = []
    for part in ("vision", "decoder"):
        rows = layers[layers["part"] == part]
        wrong_onnx = rows[rows["onnx_error"] > rows["onnx_tolerance"]]
        if len(wrong_onnx):
            first = wrong_onnx.iloc[0]
            message = f"the ONNX graph deviates from PyTorch at {first['point']}: error {first['onnx_error']:.2g}"
            findings.append(Finding(part, first["point"], message))
        bad = out_of_tolerance(rows)
        for _, row in bad.head(NAMED).iterrows():
            detail = row["detail"] or f"its values are off by {row['local_error']:.2g} of their size"
            findings.append(Finding(part, row["point"], f"{row['point']} ({row['operator']}): {detail}"))
        if len(bad) > NAMED:
            message = f"{len(bad) - NAMED} more tap points of the {part} exceed their tolerance"
            findings.append(Finding(part, None, message))
    return findings
