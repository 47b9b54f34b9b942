"""Sampling from the stored reference."""

from __future__ import annotations

import pytest

from hf2mnn.reference.golden import sample_examples


@pytest.mark.parametrize("count", [1, 5, 24, 25, 300])
def test_a_sample_covers_every_category(count: int) -> None:
    records = [{"id": f"{i:03}", "category": "abcd"[i % 4]} for i in range(count)]
    chosen = sample_examples(records, 24)
    assert len(set(chosen)) == len(chosen) == min(24, count)
    assert {records[int(name)]["category"] for name in chosen} == {record["category"] for record in records}
