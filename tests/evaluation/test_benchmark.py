"""Benchmark in the real engine: definitions of the measures, and their summaries.

No test depends on the speed of a machine.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hf2mnn.core.errors import BundleError, ConfigError, EngineError
from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation.benchmark import UNITS, interleaved, measure, parse_bundles, summarize, summarize_cache
from hf2mnn.mnn.bundle_config import decoder_settings, vision_settings, with_settings
from hf2mnn.report.console import print_speed, shown
from hf2mnn.stages.benchmark import run as run_benchmark

PROMPT, ANSWER, LENGTHS, REPEATS = 24, 4, (8, 384), 3


@dataclass(frozen=True)
class Measured:
    folder: Path
    measures: pd.DataFrame
    cache: pd.DataFrame
    speed: dict[str, Any]


@pytest.fixture(scope="module")
def measured(bundle: Path, int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    out = tmp_path_factory.mktemp("speed") / "benchmark"
    bundles = [f"int8={int8}", f"float={bundle}"]
    run_benchmark(bundles, "float", out, REPEATS, PROMPT, ANSWER, 1, 56, LENGTHS, time_limit=60)
    measures, cache = pd.read_parquet(out / "benchmark.parquet"), pd.read_parquet(out / "cache.parquet")
    return Measured(out, measures, cache, json.loads((out / "benchmark.json").read_text()))


def update_manifest(folder: Path) -> None:
    manifest = Manifest.load(folder)
    manifest.folder = None
    manifest.save(folder)


# Measures


def test_runs_are_interleaved(measured: Measured) -> None:
    """Each repeat runs every bundle and starts with the next one."""
    order = measured.measures.drop_duplicates("order").sort_values("order")
    assert order["bundle"].tolist() == ["int8", "float", "float", "int8", "int8", "float"]
    assert order["repeat"].tolist() == [0, 0, 1, 1, 2, 2]
    assert [name for _, name in interleaved("abc", 4)] == list("abcbcacababc")


def test_every_run_has_every_measure(measured: Measured) -> None:
    for _, rows in measured.measures.groupby("order"):
        assert dict(zip(rows["measure"], rows["unit"], strict=True)) == UNITS
        assert (rows["value"] > 0).all()


def test_rates_follow_from_times(measured: Measured) -> None:
    for _, rows in measured.measures.groupby("order"):
        values = rows.set_index("measure")["value"]
        assert values["prefill_tokens_per_s"] * values["prefill_s"] == pytest.approx(PROMPT)
        assert values["decode_tokens_per_s"] * values["decode_s"] == pytest.approx(ANSWER)
        assert values["first_token_s"] > values["prefill_s"]
        assert values["peak_mb"] - values["base_mb"] == pytest.approx(values["bundle_mb"])


def test_memory_is_that_of_the_child(bundle: Path) -> None:
    """`getrusage` gives a child at least the memory of its parent."""
    ballast = np.ones(40_000_000)
    values = measure(bundle, {}, 2, 1, 56, (), 60)["measures"]
    assert values["base_mb"] < values["peak_mb"] < ballast.nbytes / 1e6


def test_a_cached_step_and_a_recomputed_one_give_equal_logits(measured: Measured) -> None:
    """The cached step has the right position and length, so both times are of the same work."""
    exact = measured.cache[measured.cache["bundle"] == "float"]
    assert exact["length"].tolist() == list(LENGTHS)
    assert (exact["difference"] < 1e-4).all()


def test_the_speedup_of_the_cache_grows_with_its_length(measured: Measured) -> None:
    assert np.allclose(measured.cache["speedup"], measured.cache["recomputed_s"] / measured.cache["cached_s"])
    for _, rows in measured.cache.groupby("bundle"):
        assert rows.set_index("length")["speedup"][LENGTHS[1]] > rows.set_index("length")["speedup"][LENGTHS[0]]


# Summaries


def test_medians_quartiles_ranges_and_ratios_follow_from_the_measures(measured: Measured) -> None:
    table = pd.read_csv(measured.folder / "benchmark.csv").set_index(["bundle", "measure"])
    assert len(table) == 2 * len(UNITS)
    for (name, key), rows in measured.measures.groupby(["bundle", "measure"]):
        least, low, middle, high, most = np.percentile(rows["value"], [0, 25, 50, 75, 100])
        base = measured.measures.query("bundle == 'float' and measure == @key")["value"].median()
        summary = measured.speed["bundles"][name]["measures"][key]
        wanted = {"median": middle, "first_quartile": low, "third_quartile": high, "ratio": middle / base}
        wanted |= {"lowest": least, "highest": most}
        assert {figure: summary[figure] for figure in wanted} == pytest.approx(wanted)
        assert table.loc[(name, key), list(wanted)].to_dict() == pytest.approx(wanted)
        assert table.loc[(name, key), "repeats"] == REPEATS
    assert (table.loc["float", "ratio"] == 1).all()


def test_the_spread_is_that_of_the_repeats() -> None:
    rows = [("a", i, "load_s", value) for i, value in enumerate([4.0, 1.0, 2.0, 3.0, 100.0])]
    rows += [("b", i, "load_s", 6.0) for i in range(5)]
    table = summarize(pd.DataFrame(rows, columns=["bundle", "repeat", "measure", "value"]), "b").set_index("bundle")
    figures = table.loc["a", ["median", "first_quartile", "third_quartile", "ratio", "repeats"]]
    assert figures.tolist() == [3, 2, 4, 0.5, 5]


def test_the_speedup_is_of_medians_and_the_difference_the_largest() -> None:
    times = [(1.0, 10.0, 0.1), (3.0, 20.0, 0.3), (2.0, 90.0, 0.2)]
    rows = [
        {"bundle": "a", "length": 8, "cached_s": cached, "recomputed_s": again, "difference": difference}
        for cached, again, difference in times
    ]
    assert summarize_cache(rows).to_dict("records") == [
        {"bundle": "a", "length": 8, "cached_s": 2.0, "recomputed_s": 20.0, "speedup": 10.0, "difference": 0.3}
    ]


def test_settings_and_machine_are_recorded(measured: Measured) -> None:
    """Both parts have the threads of the run, and the bundle's other settings."""
    speed = measured.speed
    assert Manifest.load(measured.folder).verify() == measured.folder
    assert (speed["baseline"], speed["repeats"], speed["threads"], speed["image"]) == ("float", REPEATS, 1, [56, 56])
    assert speed["machine"]["cores"] >= 1 and speed["machine"]["cpu"] and speed["machine"]["MNN"] == "3.6.1"
    for part in ("decoder", "vision"):
        engines = {name: bundle["engine"][part] for name, bundle in speed["bundles"].items()}
        assert [engine["thread_num"] for engine in engines.values()] == [1, 1]
        assert [engine["memory"] for engine in engines.values()] == ["low", "high"]


def test_settings_apply_to_both_parts_and_keep_the_others() -> None:
    config = {"thread_num": 4, "llm_model": "x", "mllm": {"thread_num": 2, "memory": "high"}}
    changed = with_settings(config, {"thread_num": 1, "dynamic_option": 8})
    assert changed["llm_model"] == "x" and config["thread_num"] == 4
    assert decoder_settings(changed)["thread_num"] == vision_settings(changed)["thread_num"] == 1
    assert decoder_settings(changed)["dynamic_option"] == vision_settings(changed)["dynamic_option"] == 8
    assert (decoder_settings(changed)["memory"], vision_settings(changed)["memory"]) == ("low", "high")


def test_bundles_are_unchanged(measured: Measured, bundle: Path, int8: Path) -> None:
    for folder in (bundle, int8):
        Manifest.load(folder).verify()
        assert {path.name for path in folder.iterdir()} == {*Manifest.load(folder).outputs, "manifest.json", ".hf2mnn"}


def test_the_console_shows_medians_ratios_and_the_machine(measured: Measured) -> None:
    printed = io.StringIO()
    print_speed(measured.speed, printed)
    for text in ("int8", "(1.00)", "prefill tok/s", "384 tokens", measured.speed["machine"]["cpu"], "ratio to float"):
        assert text in printed.getvalue()
    assert [shown("s", 0.01234, 0.00056), shown("tokens/s", 1234.5)] == ["12.3 ±0.6", "1234"]


# Failures


def test_a_bundle_that_does_not_run_is_named_and_the_others_are_timed(copy: Path, bundle: Path, tmp_path: Path) -> None:
    """The evaluation makes it fail; the report of the others does not depend on it."""
    (copy / "llm.mnn").write_bytes(np.random.default_rng(1).bytes((copy / "llm.mnn").stat().st_size))
    update_manifest(copy)
    run_benchmark([f"bad={copy}", f"good={bundle}"], "bad", tmp_path / "out", 1, 2, 1, 1, 56, (), 60)
    summary = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert list(summary["bundles"]) == ["good"] and summary["baseline"] == "good"
    assert f"{copy} cannot be timed: MNN's engine does not load {copy}:" in summary["broken"]["bad"]


def test_bundles_none_of_which_runs_are_an_error(copy: Path, tmp_path: Path) -> None:
    (copy / "llm.mnn").write_bytes(b"no graph")
    update_manifest(copy)
    with pytest.raises(EngineError, match="none of the bundles runs"):
        run_benchmark([f"bad={copy}"], "bad", tmp_path / "out", 1, 2, 1, 1, 56, (), 60)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_answers_garbage_is_no_measurement(copy: Path) -> None:
    """Zero weights are as fast as right ones."""
    (copy / "llm.mnn.weight").write_bytes(bytes((copy / "llm.mnn.weight").stat().st_size))
    with pytest.raises(EngineError, match=rf"{copy} cannot be timed: .*garbage"):
        measure(copy, {}, 4, 1, 56, (), 60)


def test_a_process_that_takes_too_long_is_stopped(bundle: Path) -> None:
    with pytest.raises(EngineError, match=rf"{bundle} cannot be timed: .*stopped after"):
        measure(bundle, {}, 2, 1, 56, (), 0.05)


def test_bundles_of_two_models_are_refused(copy: Path, bundle: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "llm_config.json").read_text())
    content["hf2mnn"]["hidden_size"] = 64
    (copy / "llm_config.json").write_text(json.dumps(content))
    update_manifest(copy)
    with pytest.raises(BundleError, match="bundles a and b are of different models"):
        run_benchmark([f"a={bundle}", f"b={copy}"], "a", tmp_path / "out")


def test_a_bundle_that_is_not_whole_is_refused(copy: Path, bundle: Path, tmp_path: Path) -> None:
    (copy / "visual.mnn.weight").unlink()
    with pytest.raises(BundleError, match=r"visual\.mnn\.weight"):
        run_benchmark([f"a={bundle}", f"b={copy}"], "a", tmp_path / "out")


def test_the_baseline_must_be_one_of_them(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no bundle 'fp16'; there are a"):
        run_benchmark([f"a={bundle}"], "fp16", tmp_path / "out")


@pytest.mark.parametrize("texts", [["a"], ["=b"], ["a="], ["a=b", "a=c"]])
def test_bundles_are_given_by_name(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--bundle"):
        parse_bundles(texts)
    assert parse_bundles(["a=b/c", "d=e=f"]) == {"a": Path("b/c"), "d": Path("e=f")}
