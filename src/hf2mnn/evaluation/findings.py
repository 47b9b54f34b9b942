"""Findings, and the files of an evaluation and a diagnosis. The report reads both without an engine."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from hf2mnn.figures import FIGURES as REGISTRY

# Files of an evaluation.
SUMMARY = "summary.json"
FIGURES = "figures.parquet"
ANSWERS = "answers.parquet"
POSITIONS = "metrics.parquet"
IMAGES = "images.parquet"
PARITY = "parity.parquet"

# Files of a diagnosis.
LAYERS = "layers.parquet"
BUDGET = "budget.parquet"
FINDINGS = "findings.json"

CONVERSION, PREPROCESSING, TOTAL = "conversion", "image preprocessing", "total"
"""Sources of the error budget that the report treats apart from the others."""

CACHE_TOLERANCE = REGISTRY["cache_parity"].gate.default
"""KL divergence in nats between two ways of filling the KV cache above which there is a finding.

Quantized weights bring up to 0.01, since activations are rounded for each call; an attention without its cache brings
0.7 and more.
"""


@dataclass(frozen=True)
class Finding:
    """Cause of error."""

    part: str  # settings, tokenizer, template, embedding, vision, decoder, cache or engine
    point: str | None  # tap point (`hf2mnn.reference.golden`) or configuration key; None if there is none
    message: str  # text for the user


def wrong_cache(parity: pd.DataFrame) -> list[Finding]:
    """Report ways of filling the KV cache that change the logits of the same text."""
    bad = parity[parity["max_kld"] > CACHE_TOLERANCE].sort_values("max_kld", ascending=False)
    if bad.empty:
        return []
    ways = ", ".join(f"{row['way']} ({row['probe']}) by {row['max_kld']:.2g}" for _, row in bad.iterrows())
    return [Finding("cache", None, f"logits depend on how the KV cache is filled: {ways} nats")]


def wrong_rendering(answers: pd.DataFrame) -> list[Finding]:
    """Report conversations that the engine renders to another prompt than transformers does with the same template."""
    wrong = answers[answers["template_difference"].notna()]
    if wrong.empty:
        return []
    first, known = wrong.iloc[0], answers["template_match"].notna().sum()
    count = f"the engine renders {len(wrong)} of {known} conversations to another prompt"
    return [Finding("template", None, f"{count}: first in {first['id']}, {first['template_difference']}")]


def out_of_tolerance(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the tap points whose local error exceeds its tolerance, each once, in the order of computation."""
    bad = layers[layers["local_error"] > layers["tolerance"]]
    # The vision tower is computed before the decoder.
    ordered = bad.assign(late=bad["part"] == "decoder").sort_values(["late", "order"], kind="stable")
    return ordered.drop(columns="late").drop_duplicates("point")
