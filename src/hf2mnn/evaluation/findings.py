"""What is wrong with a bundle, in a form that the report can read without any engine."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

CACHE_TOLERANCE = 0.05
"""KL divergence in nats between two ways of filling the cache. Packed weights round activations by the call, which
brings up to 0.01; an attention without its cache brings 0.7 and more."""


@dataclass(frozen=True)
class Finding:
    """part: settings, tokenizer, template, embedding, vision, decoder or cache; point: a name of `hf2mnn.reference.tap_points`, a key
    or None; sentence: what is wrong, for a person.
    """

    part: str
    point: str | None
    sentence: str


def wrong_cache(parity: pd.DataFrame) -> list[Finding]:
    """Ways of filling the KV cache after which the same text has other logits."""
    bad = parity[parity["max_kld"] > CACHE_TOLERANCE].sort_values("max_kld", ascending=False)
    if bad.empty:
        return []
    ways = ", ".join(f"{row['way']} ({row['probe']}) by {row['max_kld']:.2g}" for _, row in bad.iterrows())
    return [Finding("cache", None, f"reading the same text another way than at once changes its logits: {ways} nats")]


def misread_template(answers: pd.DataFrame) -> list[Finding]:
    """Conversations of which the engine makes another prompt than the checkpoint's template, which the bundle has."""
    wrong = answers[answers["template_difference"].notna()]
    if wrong.empty:
        return []
    first, known = wrong.iloc[0], answers["template_match"].notna().sum()
    how = f"the engine makes another prompt of {len(wrong)} of {known} conversations"
    return [Finding("template", None, f"{how}: first in {first['id']}, {first['template_difference']}")]


def out_of_tolerance(layers: pd.DataFrame) -> pd.DataFrame:
    """Points whose operator alone leaves tolerance, once each, in the order in which data flows."""
    bad = layers[layers["mnn_local"] > layers["tolerance"]]
    # Through the vision tower before the decoder.
    ordered = bad.assign(late=bad["part"] == "decoder").sort_values(["late", "order"], kind="stable")
    return ordered.drop(columns="late").drop_duplicates("point")
