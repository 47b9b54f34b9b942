"""Tests of the plots: values are correct, and the SVG is valid, self-contained and deterministic."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf2mnn.report import plots
from hf2mnn.report.svg import COLOURS, assign_styles
from page_evidence import make_budget, make_layers, make_speed

NAMES = ["onnxruntime", "fp16", "$x_1$ & <b>", "a-very-long-name-of-a-variant-that-has-all-options"]
STYLES = assign_styles(NAMES)
NUMBERS = st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1.0, 2.0, float("nan")]))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_pareto_front_is_not_dominated_and_dominates_all_other_points(points: list[tuple[float, float]]) -> None:
    front = plots.pareto_front(np.array(points).reshape(-1, 2))
    known = [index for index, point in enumerate(points) if not np.isnan(point).any()]

    def dominates(one: int, other: int) -> bool:
        (a, b), (c, d) = points[one], points[other]
        return a <= c and b <= d and (a < c or b < d)

    assert set(front) <= set(known)
    assert not any(dominates(one, other) for one in known for other in front)
    assert all(any(dominates(one, other) for one in front) for other in set(known) - set(front))
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def sizes(**others: object) -> pd.DataFrame:
    table = {"name": NAMES, "megabytes": [20.0, 20.0, 9.0, 5.0], "mean_kld": [0.0, 1e-12, 1e-4, 0.3]}
    table |= {"low": [0.0, 1e-13, 1e-5, 0.1], "high": [0.0, 1e-11, 1e-3, 0.4]}
    return pd.DataFrame(
        {**table, "failed": [False, False, False, True], "candidate": [False, True, True, True], **others}
    )


def percentiles() -> dict[str, pd.Series]:
    values = pd.Series(dict(zip(plots.PERCENTILES, [0, 1e-12, 1e-6, 1e-3, 0.1, 3], strict=True)))
    return dict(zip(NAMES, (values * factor for factor in (0, 1, 2, 3)), strict=True))


def budgets() -> dict[str, pd.Series]:
    values = {
        name: make_budget(size).set_index("source")["mean_kld"] for name, size in zip(NAMES, (0, 1, 2, 3), strict=True)
    }
    values[NAMES[1]]["total"] = 9.0  # more than the sum of its sources
    return values


def curves(column: str, faulty: str | None = None) -> dict[str, pd.DataFrame]:
    layers = make_layers(0.01, faulty)
    return dict.fromkeys(NAMES, plots.depth_table(layers[layers["part"] == "decoder"], column))


PLOTS: dict[str, Callable[[], str]] = {
    "size": lambda: plots.size_plot(sizes(), STYLES),
    "size without divergence": lambda: plots.size_plot(sizes(mean_kld=0.0, low=0.0, high=0.0), STYLES),
    "percentiles": lambda: plots.percentile_plot(percentiles(), STYLES),
    "budget": lambda: plots.budget_plot(budgets()),
    "layers": lambda: plots.layer_plot(curves("mnn_error"), STYLES, "layers-decoder", "Decoder", "error"),
    "local": lambda: plots.layer_plot(curves("local_error", "m.norm"), STYLES, "local-decoder", "Decoder", "error"),
    "cache": lambda: plots.cache_plot(make_speed(NAMES)[1], STYLES),
    "speed": lambda: plots.speed_plot(make_speed(NAMES)[0], STYLES),
}


@cache
def svg_of(name: str) -> str:
    return PLOTS[name]()


@pytest.mark.parametrize("name", PLOTS)
def test_svg_is_valid_self_contained_and_deterministic(name: str) -> None:
    settings = dict(matplotlib.rcParams)
    text = svg_of(name)
    assert text == PLOTS[name]()
    assert dict(matplotlib.rcParams) == settings
    root = ElementTree.fromstring(text)
    assert root.tag == "svg"
    assert {"role", "aria-label", "viewBox"} <= set(root.attrib)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) == set(ids)
    assert "://" not in text
    assert "<style" not in text
    assert not {"script", "image", "foreignObject"} & {element.tag for element in root.iter()}
    assert any((element.text or "").strip() for element in root.iter("text")), "text is not converted to outlines"


def words(svg: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter("text")]


def test_names_are_not_parsed_as_math() -> None:
    assert "$x_1$ & <b>" in words(svg_of("size"))
    assert "$x_1$ & <b>" in words(svg_of("speed"))


def test_values_below_the_axis_are_written() -> None:
    texts = words(svg_of("size"))
    assert "onnxruntime (0)" in texts
    assert "fp16 (1e-12)" in texts
    assert "below 10⁻⁸" in texts
    above = sizes(mean_kld=[0.1, 0.1, 0.1, 0.1], high=0.2)
    assert not any("below" in text for text in words(plots.size_plot(above, STYLES)))


def test_labels_of_close_points_do_not_overlap() -> None:
    """Labels leave their points, and a line connects them, where there is no room."""
    names = [f"variant-{index}" for index in range(8)]
    table = pd.DataFrame({"name": names, "megabytes": [100.0] * 8, "mean_kld": [0.01] * 8, "failed": False})
    svg = plots.size_plot(table.assign(low=0.009, high=0.011, candidate=True), assign_styles(names))
    root = ElementTree.fromstring(svg)
    boxes = []
    for element in root.iter("text"):
        if (element.text or "").startswith("variant-"):
            x, y = float(element.get("x")), float(element.get("y"))
            boxes.append((x, y, x + plots.LETTER * len(element.text), y + 11))
    assert len(boxes) == 8
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:index]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_only_bundles_are_on_the_pareto_front() -> None:
    label = ElementTree.fromstring(svg_of("size")).get("aria-label")
    front = label.rpartition("Pareto front: ")[2]
    assert "onnxruntime" not in front
    assert all(name in front for name in NAMES[1:])


def test_shares_are_normalized_by_the_larger_of_sum_and_total() -> None:
    budget = pd.Series({"decoder weights": 0.6, "vision weights": 0.6, "image preprocessing": 3.0, "total": 1.0})
    shares, total, rest, preprocessing = plots._shares(budget)
    assert shares.sum() == pytest.approx(1)
    assert (total, rest, preprocessing) == pytest.approx((1 / 1.2, 0, 2.5))
    shares, total, rest, _ = plots._shares(budget.replace(1.0, 2.4))
    assert (shares.sum(), total, rest) == pytest.approx((0.5, 1, 0.5))
    assert plots._shares(budget * 0)[1:] == (0, 0, 0)


def test_blocks_are_numbered_tap_points_with_others_inside() -> None:
    points = pd.Series(["v.patch", "v.blocks.0.norm", "v.blocks.0", "v.blocks.10.mlp.fc1", "v.blocks.10", "v.mlp.0"])
    assert list(plots.blocks_of(points)) == ["", "v.blocks.0", "v.blocks.0", "v.blocks.10", "v.blocks.10", ""]


def test_depth_table_has_block_outputs_or_the_largest_local_error() -> None:
    layers = make_layers(0.01, "m.layers.1.q_proj")
    decoder = layers[layers["part"] == "decoder"]
    table = plots.depth_table(decoder, "mnn_error")
    assert list(table["label"]) == ["0", "1", "out"]
    assert list(table["value"]) == pytest.approx([0.02, 0.04, 0.06])
    table = plots.depth_table(decoder, "local_error")
    assert list(table["label"]) == ["0", "1", "out"]
    assert list(table["value"]) == pytest.approx([0.005, 0.9, 0.005])
    assert list(table["over"]) == [False, True, False]
    vision = plots.depth_table(layers[layers["part"] == "vision"], "local_error")
    assert list(vision["label"]) == ["in", "0", "1", "out"]


@pytest.mark.parametrize(
    ("measure", "value", "better"),
    [
        ("load_s", 0.5, 2.0),
        ("decode_tokens_per_s", 2.0, 2.0),
        ("bundle_mb", 2.0, 0.5),
        ("prefill_tokens_per_s", 0.5, 0.5),
    ],
)
def test_improvement_is_above_one(measure: str, value: float, better: float) -> None:
    values = {"median": value, "first_quartile": 0.9 * value, "third_quartile": 1.1 * value}
    median, low, high = plots._improvement(measure, values, 1.0)
    assert median == pytest.approx(better)
    assert low < median < high


def test_colours_have_contrast_on_light_and_dark() -> None:
    """WCAG 1.4.11 requires 3 for graphics; the cards of the page are #f5f7f9 and #1d2126."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in COLOURS:
        for card in ("#f5f7f9", "#1d2126"):
            light, dark = sorted([luminance(colour), luminance(card)], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, card)
