"""Bundles timed in the real engine: that the figures are of what they say, and come out as they were measured.

No test knows how fast a machine is.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hf2mnn.core.errors import BundleError, ConfigError, EngineError
from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation.benchmark import UNITS, measure, parse_bundles, summarize, summarize_cache, turns
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.mnn.settings import engine_settings, vision_settings, with_settings
from hf2mnn.quant.variant import Choice
from hf2mnn.report.speed import print_speed, shown
from hf2mnn.stages.benchmark import run as run_benchmark
from hf2mnn.stages.quantize import run as quantize

PROMPT, ANSWER, LENGTHS, REPEATS = 24, 4, (8, 384), 3


@dataclass(frozen=True)
class Measured:
    folder: Path
    figures: pd.DataFrame
    cache: pd.DataFrame
    speed: dict[str, Any]


@pytest.fixture(scope="module")
def int8(onnx_folder: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    formats = WeightFormat(bits=8, block=32), WeightFormat(bits=8)
    settings = EngineSettings(precision="low", memory="low", threads=3)
    return quantize(onnx_folder, bundle, tmp_path_factory.mktemp("int8") / "int8", Choice(*formats, settings), 1)


@pytest.fixture(scope="module")
def measured(bundle: Path, int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    out = tmp_path_factory.mktemp("speed") / "benchmark"
    bundles = {"int8": int8, "float": bundle}
    run_benchmark(bundles, "float", out, REPEATS, PROMPT, ANSWER, 1, 56, LENGTHS, time_limit=60)
    figures, cache = pd.read_parquet(out / "benchmark.parquet"), pd.read_parquet(out / "cache.parquet")
    return Measured(out, figures, cache, json.loads((out / "benchmark.json").read_text()))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def vouch(folder: Path) -> None:
    manifest = Manifest.load(folder)
    manifest.folder = None
    manifest.save(folder)


# What was measured


def test_bundles_are_timed_in_turns(measured: Measured) -> None:
    """Each repeat has every bundle, and begins with the next one."""
    order = measured.figures.drop_duplicates("turn").sort_values("turn")
    assert order["bundle"].tolist() == ["int8", "float", "float", "int8", "int8", "float"]
    assert order["repeat"].tolist() == [0, 0, 1, 1, 2, 2]
    assert [name for _, name in turns("abc", 4)] == list("abcbcacababc")


def test_every_turn_has_every_measure(measured: Measured) -> None:
    for _, rows in measured.figures.groupby("turn"):
        assert dict(zip(rows["measure"], rows["unit"], strict=True)) == UNITS
        assert (rows["value"] > 0).all()


def test_rates_are_those_of_the_times(measured: Measured) -> None:
    for _, rows in measured.figures.groupby("turn"):
        found = rows.set_index("measure")["value"]
        assert found["prefill_tokens_per_s"] * found["prefill_s"] == pytest.approx(PROMPT)
        assert found["decode_tokens_per_s"] * found["decode_s"] == pytest.approx(ANSWER)
        assert found["first_token_s"] > found["prefill_s"]
        assert found["peak_mb"] - found["base_mb"] == pytest.approx(found["bundle_mb"])


def test_memory_is_the_childs_own(bundle: Path) -> None:
    """`getrusage` would give a child at least what its parent had."""
    ballast = np.ones(40_000_000)
    found = measure(bundle, {}, 2, 1, 56, (), 60)["measures"]
    assert found["base_mb"] < found["peak_mb"] < ballast.nbytes / 1e6


def test_both_ways_to_a_token_give_its_logits(measured: Measured) -> None:
    """The cached step is at its right place and length, so that the two times are of the same work."""
    exact = measured.cache[measured.cache["bundle"] == "float"]
    assert exact["length"].tolist() == list(LENGTHS)
    assert (exact["difference"] < 1e-4).all()


def test_the_cache_is_worth_more_the_longer_it_is(measured: Measured) -> None:
    assert np.allclose(measured.cache["worth"], measured.cache["recomputed_s"] / measured.cache["cached_s"])
    for _, rows in measured.cache.groupby("bundle"):
        assert rows.set_index("length")["worth"][LENGTHS[1]] > rows.set_index("length")["worth"][LENGTHS[0]]


# How it is put together


def test_medians_quartiles_ranges_and_ratios_are_those_of_the_figures(measured: Measured) -> None:
    table = pd.read_csv(measured.folder / "benchmark.csv").set_index(["bundle", "measure"])
    assert len(table) == 2 * len(UNITS)
    for (name, key), rows in measured.figures.groupby(["bundle", "measure"]):
        least, low, middle, high, most = np.percentile(rows["value"], [0, 25, 50, 75, 100])
        base = measured.figures.query("bundle == 'float' and measure == @key")["value"].median()
        found = measured.speed["bundles"][name]["measures"][key]
        wanted = {"median": middle, "first_quartile": low, "third_quartile": high, "ratio": middle / base}
        wanted |= {"lowest": least, "highest": most}
        assert {figure: found[figure] for figure in wanted} == pytest.approx(wanted)
        assert table.loc[(name, key), list(wanted)].to_dict() == pytest.approx(wanted)
        assert table.loc[(name, key), "repeats"] == REPEATS
    assert (table.loc["float", "ratio"] == 1).all()


def test_the_spread_is_that_of_the_repeats() -> None:
    rows = [("a", i, "load_s", value) for i, value in enumerate([4.0, 1.0, 2.0, 3.0, 100.0])]
    rows += [("b", i, "load_s", 6.0) for i in range(5)]
    table = summarize(pd.DataFrame(rows, columns=["bundle", "repeat", "measure", "value"]), "b").set_index("bundle")
    figures = table.loc["a", ["median", "first_quartile", "third_quartile", "ratio", "repeats"]]
    assert figures.tolist() == [3, 2, 4, 0.5, 5]


def test_the_caches_worth_is_of_medians_and_its_difference_the_largest() -> None:
    times = [(1.0, 10.0, 0.1), (3.0, 20.0, 0.3), (2.0, 90.0, 0.2)]
    rows = [
        {"bundle": "a", "length": 8, "cached_s": cached, "recomputed_s": again, "difference": difference}
        for cached, again, difference in times
    ]
    assert summarize_cache(rows).to_dict("records") == [
        {"bundle": "a", "length": 8, "cached_s": 2.0, "recomputed_s": 20.0, "worth": 10.0, "difference": 0.3}
    ]


def test_settings_and_machine_are_recorded(measured: Measured) -> None:
    """Threads are the run's, for both parts; the rest is each bundle's own."""
    speed = measured.speed
    assert Manifest.load(measured.folder).verify() == measured.folder
    assert (speed["baseline"], speed["repeats"], speed["threads"], speed["image"]) == ("float", REPEATS, 1, [56, 56])
    assert speed["machine"]["cores"] >= 1 and speed["machine"]["cpu"] and speed["machine"]["MNN"] == "3.6.1"
    for part in ("decoder", "vision"):
        engines = {name: bundle["engine"][part] for name, bundle in speed["bundles"].items()}
        assert [engine["thread_num"] for engine in engines.values()] == [1, 1]
        assert [engine["memory"] for engine in engines.values()] == ["low", "high"]


def test_settings_reach_both_parts_and_leave_the_rest() -> None:
    config = {"thread_num": 4, "llm_model": "x", "mllm": {"thread_num": 2, "memory": "high"}}
    made = with_settings(config, {"thread_num": 1, "dynamic_option": 8})
    assert made["llm_model"] == "x" and config["thread_num"] == 4
    assert engine_settings(made)["thread_num"] == vision_settings(made)["thread_num"] == 1
    assert engine_settings(made)["dynamic_option"] == vision_settings(made)["dynamic_option"] == 8
    assert (engine_settings(made)["memory"], vision_settings(made)["memory"]) == ("low", "high")


def test_the_bundles_are_left_as_they_are(measured: Measured, bundle: Path, int8: Path) -> None:
    for folder in (bundle, int8):
        Manifest.load(folder).verify()
        assert {path.name for path in folder.iterdir()} == {*Manifest.load(folder).outputs, "manifest.json", ".hf2mnn"}


def test_a_person_can_read_it(measured: Measured) -> None:
    said = io.StringIO()
    print_speed(measured.speed, said)
    for text in ("int8", "(1.00)", "prefill tok/s", "after 384", measured.speed["machine"]["cpu"], "ratio to float"):
        assert text in said.getvalue()
    assert [shown("load_s", 0.01234, 0.00056), shown("decode_tokens_per_s", 1234.5)] == ["12.3 ±0.6", "1234"]


# What cannot be timed


def test_a_bundle_that_does_not_run_is_named_and_the_others_are_timed(copy: Path, bundle: Path, tmp_path: Path) -> None:
    """The evaluation makes it a red row; a report of the others must not depend on it."""
    (copy / "llm.mnn").write_bytes(np.random.default_rng(1).bytes((copy / "llm.mnn").stat().st_size))
    vouch(copy)
    run_benchmark({"bad": copy, "good": bundle}, "bad", tmp_path / "out", 1, 2, 1, 1, 56, (), 60)
    summary = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert list(summary["bundles"]) == ["good"] and summary["baseline"] == "good"
    assert f"{copy} cannot be timed: MNN's engine does not load {copy}:" in summary["broken"]["bad"]


def test_bundles_none_of_which_runs_are_an_error(copy: Path, tmp_path: Path) -> None:
    (copy / "llm.mnn").write_bytes(b"no graph")
    vouch(copy)
    with pytest.raises(EngineError, match="none of the bundles runs"):
        run_benchmark({"bad": copy}, "bad", tmp_path / "out", 1, 2, 1, 1, 56, (), 60)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_answers_garbage_is_no_measurement(copy: Path) -> None:
    """Weights of the right size that are none would be as fast."""
    (copy / "llm.mnn.weight").write_bytes(bytes((copy / "llm.mnn.weight").stat().st_size))
    with pytest.raises(EngineError, match=rf"{copy} cannot be timed: .*garbage"):
        measure(copy, {}, 4, 1, 56, (), 60)


def test_a_process_that_takes_too_long_is_stopped(bundle: Path) -> None:
    with pytest.raises(EngineError, match=rf"{bundle} cannot be timed: .*stopped after"):
        measure(bundle, {}, 2, 1, 56, (), 0.05)


def test_bundles_of_two_models_are_not_compared(copy: Path, bundle: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "llm_config.json").read_text())
    content["hf2mnn"]["hidden_size"] = 64
    (copy / "llm_config.json").write_text(json.dumps(content))
    vouch(copy)
    with pytest.raises(BundleError, match="bundles a and b are not of one model"):
        run_benchmark({"a": bundle, "b": copy}, "a", tmp_path / "out")


def test_a_bundle_that_is_not_whole_is_refused(copy: Path, bundle: Path, tmp_path: Path) -> None:
    (copy / "visual.mnn.weight").unlink()
    with pytest.raises(BundleError, match=r"visual\.mnn\.weight"):
        run_benchmark({"a": bundle, "b": copy}, "a", tmp_path / "out")


def test_the_baseline_must_be_one_of_them(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fp16' is none of the bundles; there are a"):
        run_benchmark({"a": bundle}, "fp16", tmp_path / "out")


@pytest.mark.parametrize("texts", [["a"], ["=b"], ["a="], ["a=b", "a=c"]])
def test_bundles_are_given_by_name(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--bundle"):
        parse_bundles(texts)
    assert parse_bundles(["a=b/c", "d=e=f"]) == {"a": Path("b/c"), "d": Path("e=f")}
