"""KV-cache parity: however a text came into the cache, the logits at each of its positions are the same.

This is where a conversion that loads and answers wrongly is caught: an attention that was not fused, positions that do
not go on, a cache that keeps what was taken back.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hf2mnn.metrics import kl_divergence, same_top
from hf2mnn.reference.cache_fill import AT_ONCE

COLUMNS = ["probe", "way", "positions", "max_kld", "max_logit_change", "same_top"]


def parity_table(logits: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    """A table with COLUMNS: each probe and way against the same probe read at once. `max_logit_change` is the largest
    difference of a logit in standard deviations of all logits of the probe.
    """
    rows = []
    for probe, ways in sorted(logits.items()):
        right = ways[AT_ONCE]
        for way, rows_of_way in ways.items():
            if way != AT_ONCE:
                change = float(np.abs(rows_of_way - right).max() / right.std())
                divergence, same = kl_divergence(right, rows_of_way).max(), same_top(right, rows_of_way).mean()
                rows.append((probe, way, len(right), float(divergence), change, float(same)))
    return pd.DataFrame(rows, columns=COLUMNS)
