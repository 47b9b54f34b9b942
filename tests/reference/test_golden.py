"""The stored reference, read back."""

from __future__ import annotations

import pytest

from hf2mnn.reference.golden import spread_examples


@pytest.mark.parametrize("count", [1, 5, 24, 25, 300])
def test_examples_spread_over_every_kind(count: int) -> None:
    records = [{"id": f"{i:03}", "category": "abcd"[i % 4]} for i in range(count)]
    chosen = spread_examples(records, 24)
    assert len(set(chosen)) == len(chosen) == min(24, count)
    assert {records[int(name)]["category"] for name in chosen} == {record["category"] for record in records}
