"""Mixed precision: plans are optimal, within their budget, and can be read and pinned."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf2mnn.config.plan import load_plan
from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.plan import expected_divergence, options, solve, write_plan


def table(rows: list[tuple[str, int, float]]) -> pd.DataFrame:
    """Return rows (operator, bytes, kld) with the other columns of a plan."""
    formats = pd.DataFrame(rows, columns=["operator", "bytes", "kld"])
    return formats.assign(part="decoder", bits=4, block=64, weights=1000)


choices = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1).map(lambda kld: round(kld, 4))), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(choices, st.floats(0, 1))
def test_no_other_plan_within_the_budget_is_better(groups: list, share: float) -> None:
    """Of all combinations."""
    rows = [(f"o{i}", size, kld) for i, group in enumerate(groups) for size, kld in group]
    least, most = (sum(end(size for size, _ in group) for group in groups) for end in (min, max))
    budget = int(least + share * (most - least))
    chosen = solve(table(rows), budget)
    assert list(chosen["operator"]) == [f"o{i}" for i in range(len(groups))]
    assert chosen["bytes"].sum() <= budget
    fitting = [combination for combination in itertools.product(*groups) if sum(s for s, _ in combination) <= budget]
    best = min(sum(kld for _, kld in combination) for combination in fitting)
    assert chosen["kld"].sum() == pytest.approx(best, abs=1e-6 * max(1, best))


def test_of_equal_plans_the_smaller_one_is_chosen() -> None:
    assert solve(table([("a", 10, 0.0), ("a", 5, 0.0), ("b", 7, 0.1), ("b", 9, 0.1)]), 100)["bytes"].tolist() == [5, 7]


def test_the_error_of_a_small_budget_has_the_smallest_possible_one() -> None:
    rows = table([("a", 300, 0.1), ("a", 250, 0.2), ("b", 400, 0.1)])
    with pytest.raises(QuantizationError, match=r"leaves 649 bytes .* take 650: .* least 2.6 bits a weight, 1 bytes"):
        solve(rows, 649)
    assert solve(rows, 650)["bytes"].sum() == 650


def measurements(*pairs: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["weight_error", "mean_kld"]).assign(operator="o")


def test_divergences_are_interpolated_between_measurements() -> None:
    """Outside of their range, with the square of the error."""
    table = measurements((0.4, 0.08), (0.1, 0.002))
    divergence = expected_divergence(table, np.array([0.4, 0.1, 0.2, 0.05, 0.8]))
    assert divergence[:2] == pytest.approx([0.08, 0.002])
    assert divergence[2] == pytest.approx(np.sqrt(0.08 * 0.002))
    assert divergence[3:] == pytest.approx([0.002 / 4, 0.08 * 4])


@given(
    st.lists(st.tuples(st.floats(1e-3, 1), st.floats(0, 1)), min_size=1, max_size=4, unique_by=lambda p: p[0]),
    st.lists(st.floats(1e-4, 2), min_size=2, max_size=6),
)
def test_the_divergence_of_a_larger_error_is_not_smaller(pairs: list, errors: list[float]) -> None:
    """Measurements of very small divergences are noise, which a plan must not follow."""
    divergence = expected_divergence(measurements(*pairs), np.array(sorted(errors)))
    assert (np.diff(divergence) >= -1e-12 * np.abs(divergence[1:])).all()


def test_an_operator_without_a_weight_error_has_no_divergence() -> None:
    assert expected_divergence(measurements((0.0, 0.0)), np.array([0.1])) == pytest.approx([0])


def test_a_tied_lm_head_has_the_divergence_of_both_and_4_or_8_bits() -> None:
    formats = pd.DataFrame({"operator": ["lm_head"] * 3, "bits": [3, 4, 8], "weight_error": [0.2, 0.1, 0.01]})
    known = pd.concat([measurements((0.1, 0.004)).assign(operator=name) for name in ("lm_head", "embedding")])
    assert options(known, formats, tied=False)["kld"].tolist() == pytest.approx([0.016, 0.004, 0.00004])
    tied = options(known, formats, tied=True)
    assert tied["bits"].tolist() == [4, 8]
    assert tied["kld"].tolist() == pytest.approx([0.008, 0.00008])


def test_a_plan_is_readable_and_valid(tmp_path: Path) -> None:
    chosen = pd.DataFrame(
        [("decoder", "a.q_proj", 3, 64, 900, 0.00126, 2000), ("vision", "b.qkv", 8, 0, 512, 0, 400)],
        columns=["part", "operator", "bits", "block", "bytes", "kld", "weights"],
    )
    write_plan(chosen, ["4.25 bits a weight."], tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert text.startswith("# 4.25 bits a weight.\ndecoder:\n")
    assert "a.q_proj: {bits: 3, block: 64}  # 3.60 bits a weight, 900 bytes, KL divergence 0.0013" in text
    assert yaml.safe_load(text)["vision"] == {"b.qkv": {"bits": 8, "block": 0}}
    assert load_plan(tmp_path / "plan.yaml").decoder["a.q_proj"].bits == 3
