"""Attribution: what is wrong with a bundle, named by part and place, from what can be looked at and measured.

Each check looks at one thing alone and finds nothing where that is right, so a finding is a cause and no symptom. They
come in the order in which data flows: settings, tokenizer, embedding, vision tower, decoder, KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf2mnn.evaluation.findings import Finding, out_of_tolerance
from hf2mnn.evaluation.layers import rounding_error
from hf2mnn.mnn.bundle import MODEL_CONFIG, TOKENIZER, model_settings
from hf2mnn.mnn.graph import Graph
from hf2mnn.mnn.paths import read_config
from hf2mnn.mnn.tokenizer import chat_template
from hf2mnn.quant.embedding import embedding_blocks, tied_in
from hf2mnn.reference.golden import Golden, without_repeats

SHIFTS = (1, -1, 2, -2)
"""Rows or ids by which a table may be off; what is off by one is the usual mistake."""
NAMED = 3
"""Findings of one part that are named; the others are counted."""


def wrong_settings(bundle: Path, facts: dict[str, Any]) -> list[Finding]:
    """Keys of llm_config.json that are not what the checkpoint says."""
    stored = read_config(bundle, MODEL_CONFIG)
    # "hf2mnn" holds model.json: `hf2mnn ask` and the evaluation go by its ids and sizes.
    right = model_settings(facts, bundle) | {f"hf2mnn.{key}": value for key, value in facts.items()}
    given_of = stored | {f"hf2mnn.{key}": value for key, value in stored.get("hf2mnn", {}).items()}
    return [
        Finding("settings", key, f"{MODEL_CONFIG} says {key} {given}, the checkpoint's is {wanted}")
        for key, given, wanted in differing(given_of, right)
    ]


def differing(given: dict[str, Any], right: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value, right value) of each key whose value is not the right one, or is not there; floats within 1e-6."""
    found = []
    for key, wanted in sorted(right.items()):
        value = given.get(key)
        listed = _numbers(value) and _numbers(wanted) and len(value) == len(wanted)
        if not (np.allclose(value, wanted, rtol=1e-6) if listed else value == wanted):
            found.append((key, value, wanted))
    return found


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)


def wrong_template(bundle: Path, onnx_folder: Path) -> list[Finding]:
    """Whether the tokenizer's file holds the checkpoint's chat template; prompts of an evaluation come rendered."""
    if chat_template(onnx_folder).encode() in (bundle / TOKENIZER).read_bytes():
        return []
    return [Finding("tokenizer", None, f"the chat template in {TOKENIZER} is not the checkpoint's")]


def wrong_tokens(golden: Golden, tokens: dict[str, list[int]], image_token_id: int | None) -> list[Finding]:
    """Prompts that the bundle's tokenizer turns into other ids than transformers'. `tokens` by example, an image being
    one image token.
    """
    wrong, shifted, first = 0, set(), ""
    for example in golden.examples():
        if example.id not in tokens:
            continue
        right = without_repeats(example.input_ids, image_token_id)
        made = np.array(tokens[example.id])
        if len(made) != len(right) or (made != right).any():
            wrong, first = wrong + 1, first or example.id
            shifted.add(int(made[0] - right[0]) if len(made) == len(right) and np.ptp(made - right) == 0 else None)
    if not wrong:
        return []
    (shift,) = shifted if len(shifted) == 1 else (None,)
    how = f"every id is shifted by {shift:+d}" if shift else f"first in {first}"
    return [Finding("tokenizer", None, f"the tokenizer makes other ids of {wrong} of {len(tokens)} prompts: {how}")]


def wrong_embedding(bundle: Path, onnx_folder: Path) -> list[Finding]:
    sentence = wrong_rows(embedding_blocks(bundle, onnx_folder), tied_in(bundle))
    return [Finding("embedding", None, sentence)] if sentence else []


def wrong_rows(blocks: Iterable[tuple[np.ndarray, np.ndarray]], tied: dict[str, Any] | None) -> str | None:
    """Rows of an embedding that are not the checkpoint's, both as `quant.embedding.beside` gives them: rounded to
    bfloat16, or, where lm_head serves as the embedding, as near as its bits allow.
    """
    wrong, count, shifts = 0, 0, dict.fromkeys(SHIFTS, 0)
    allowed = rounding_error(tied["quant_bit"]) if tied else 0.0
    for stored, right in blocks:
        # Put so that what is no number differs.
        differs = ~(np.linalg.norm(stored - right, axis=1) <= allowed * np.linalg.norm(right, axis=1))
        wrong, count = wrong + int(differs.sum()), count + len(right)
        for shift in SHIFTS if differs.any() else ():
            one, other = (stored[:-shift], right[shift:]) if shift > 0 else (stored[-shift:], right[:shift])
            off = np.linalg.norm(one - other, axis=1)
            shifts[shift] += int((off <= allowed * np.linalg.norm(other, axis=1)).sum())
    if not wrong:
        return None
    shift = max(shifts, key=shifts.get)
    how = (
        f": row i holds token {'i' + f'{shift:+d}'}'s, the ids are shifted by {abs(shift)}"
        if shifts[shift] > count / 2
        else ""
    )
    return f"{wrong} of {count} rows of the embedding are not the checkpoint's{how}"


def unfused(graph: Graph, layers: int) -> list[Finding]:
    """Attentions that are not the engine's own operator: they know no KV cache and no causal mask."""
    fused = graph.fused
    if len(fused) == layers and "past_key_values" not in graph.inputs:
        return []
    names = graph.content["tensorName"]
    have = {names[op["outputIndexes"][0]] for op in fused}
    left = sorted(name for name in graph.values if name.endswith(".context") and name not in have)
    where = ", ".join(left) or "unknown"
    sentence = f"{len(fused)} of {layers} attentions are fused with a KV cache; not fused: {where}"
    return [Finding("decoder", left[0] if left else None, sentence)]


def wrong_layers(layers: pd.DataFrame) -> list[Finding]:
    """Points whose operator alone leaves tolerance; the first of each part is named, with what it looks like."""
    findings = []
    for part in ("vision", "decoder"):
        rows = layers[layers["part"] == part]
        bad = rows[rows["onnx_error"] > rows["onnx_tolerance"]].drop_duplicates("point")
        if len(bad):
            row = bad.iloc[0]
            findings.append(
                Finding(
                    part,
                    row["point"],
                    f"the ONNX graph leaves PyTorch at {row['point']}: error {row['onnx_error']:.2g}",
                )
            )
        bad = out_of_tolerance(rows)
        for _, row in bad.head(NAMED).iterrows():
            looks = row["looks"] or f"its values are off by {row['mnn_local']:.2g} of their size"
            findings.append(Finding(part, row["point"], f"{row['point']} ({row['operator']}): {looks}"))
        if len(bad) > NAMED:
            findings.append(Finding(part, None, f"{len(bad) - NAMED} more points of the {part} leave tolerance"))
    return findings
