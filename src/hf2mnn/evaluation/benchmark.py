"""Benchmark: bundles of one model timed against each other, in turns, by one process at a time.

Files: benchmark.parquet has a row for every bundle, repeat and measure; benchmark.json and benchmark.csv their medians, quartiles
and ratios; cache.parquet what the KV cache is worth.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from hf2mnn.core.errors import BundleError, BundleFault, ConfigError, EngineError
from hf2mnn.core.manifest import tool_versions
from hf2mnn.core.progress import steps
from hf2mnn.machine.hardware import describe_machine
from hf2mnn.mnn.bundle import MODEL_CONFIG
from hf2mnn.mnn.engine import check_bundle, run_worker

FIGURES, TABLE, SUMMARY, CACHE = "benchmark.parquet", "benchmark.csv", "benchmark.json", "cache.parquet"
UNITS = {
    "load_s": "s",
    "first_token_s": "s",
    "prefill_s": "s",
    "prefill_tokens_per_s": "tokens/s",
    "decode_s": "s",
    "decode_tokens_per_s": "tokens/s",
    "image_s": "s",
    "vision_s": "s",
    "base_mb": "MB",
    "peak_mb": "MB",
    "bundle_mb": "MB",
}
"""Measures in their order, with their units; what each is stands in docs/speed.md."""
SPREAD = {"median": 0.5, "first_quartile": 0.25, "third_quartile": 0.75, "lowest": 0.0, "highest": 1.0}
"""What is told of the runs of a measure, as quantiles."""
TIME_LIMIT = 7200.0
LENGTHS = (32, 64, 128, 256, 512)
"""Tokens in the cache when what it is worth is measured."""


def parse_bundles(texts: Sequence[str]) -> dict[str, Path]:
    """Folders by name, of NAME=FOLDER.

    Raises:
        ConfigError: a text is not of that form, or a name is there twice.
    """
    bundles = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ConfigError(f"--bundle {text!r}: give NAME=FOLDER")
        if name in bundles:
            raise ConfigError(f"--bundle {text!r}: the name {name!r} is given twice")
        bundles[name] = Path(folder)
    return bundles


def turns(names: Sequence[Any], repeats: int) -> list[tuple[int, Any]]:
    """(repeat, name) in order: every name once a repeat, each repeat beginning with the next one.

    A machine that slows down, or a neighbour that wakes up, so falls on all alike.
    """
    return [(i, names[(i + j) % len(names)]) for i in range(repeats) for j in range(len(names))]


def measure(
    bundle: Path,
    settings: dict[str, Any],
    prompt_tokens: int,
    answer_tokens: int,
    image_side: int,
    lengths: Sequence[int],
    time_limit: float,
    python: Path | None = None,
) -> dict[str, Any]:
    """One measurement of `bundle` under `settings` (over config.json's), in a process of its own; `python` is that of
    a toolchain, whose engine is measured.

    Raises:
        BundleFault, EngineError: naming the bundle.
    """
    with tempfile.TemporaryDirectory(prefix="hf2mnn-speed-") as folder:
        result = Path(folder, "result.json")
        job = {
            "bundle": str(bundle),
            "settings": settings,
            "prompt_tokens": prompt_tokens,
            "answer_tokens": answer_tokens,
            "image_side": image_side,
            "lengths": list(lengths),
            "result": str(result),
        }
        try:
            run_worker("hf2mnn.mnn.worker.speed", job, time_limit, python)
        except EngineError as error:
            raise type(error)(f"{bundle} cannot be timed: {error}") from None
        return json.loads(result.read_text())


def check_bundles(bundles: dict[str, Path]) -> dict[str, Path]:
    """Absolute folders by name.

    Raises:
        BundleError: one is not whole, or they are not of one model, so that a ratio would say nothing.
    """
    folders = {name: check_bundle(folder) for name, folder in bundles.items()}
    models = {name: json.loads((path / MODEL_CONFIG).read_text()).get("hf2mnn") for name, path in folders.items()}
    (first, wanted), *others = models.items()
    for name, model in models.items():
        if model is None:
            raise BundleError(
                f"{folders[name]} was not made by hf2mnn: its {MODEL_CONFIG} does not say which model it is"
            )
    for name, model in others:
        if model != wanted:
            raise BundleError(f"bundles {first} and {name} are not of one model; time them apart")
    return folders


def summarize(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row for each bundle and measure: median, quartiles, range, and the median's ratio to that of `baseline`."""
    grouped = frame.groupby(["bundle", "measure"], sort=False)["value"]
    table = grouped.quantile(list(SPREAD.values())).unstack()
    table.columns = list(SPREAD)
    table = table.join(grouped.count().rename("repeats")).reset_index()
    base = table[table["bundle"] == baseline].set_index("measure")["median"]
    table.insert(2, "unit", table["measure"].map(UNITS))
    table["ratio"] = table["median"] / table["measure"].map(base)
    return table


def summarize_cache(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Medians for each bundle and length; `worth` is how many times a step is faster with the cache than without."""
    columns = ["bundle", "length", "cached_s", "recomputed_s", "difference"]
    grouped = pd.DataFrame(rows, columns=columns).groupby(["bundle", "length"], sort=False)
    table = grouped[["cached_s", "recomputed_s"]].median().join(grouped["difference"].max()).reset_index()
    table.insert(4, "worth", table["recomputed_s"] / table["cached_s"])
    return table


def _measures(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    figures = ["unit", *SPREAD, "ratio"]
    return {name: rows.set_index("measure")[figures].to_dict("index") for name, rows in table.groupby("bundle")}


def _describe(
    table: pd.DataFrame, engines: dict[str, dict], sizes: dict[str, int], cache: pd.DataFrame
) -> dict[str, Any]:
    """benchmark.json's part about each bundle."""
    measures = _measures(table)
    return {
        name: {
            "bytes": sizes[name],
            "engine": engines[name],
            "measures": measures[name],
            "cache": cache[cache["bundle"] == name].drop(columns="bundle").to_dict("records"),
        }
        for name in engines
    }


def time_in_turns(
    folders: dict[Any, Path],
    settings: dict[str, Any],
    options: dict[str, Any],
    repeats: int,
    time_limit: float,
    pythons: Mapping[Any, Path | None] = MappingProxyType({}),
) -> tuple[pd.DataFrame, list[dict[str, Any]], dict[Any, dict[str, Any]], dict[Any, str]]:
    """(rows of benchmark.parquet, rows of cache.parquet, what each process said of its engine, and what is wrong with the
    bundles that do not run: the evaluation says so too, and the others are timed all the same).
    """
    rows, cache, said, broken = [], [], {}, {}
    for turn, (repeat, name) in enumerate(steps("speed", turns(list(folders), repeats), "runs")):
        if name in broken:
            continue
        try:
            found = measure(folders[name], settings, **options, time_limit=time_limit, python=pythons.get(name))
        except BundleFault as error:
            broken[name] = str(error)
            continue
        run = {"bundle": name, "repeat": repeat, "turn": turn}
        rows += [
            {**run, "measure": key, "value": found["measures"][key], "unit": unit}
            for key, unit in UNITS.items()
            if key in found["measures"]
        ]
        cache += [{"bundle": name, **row} for row in found["cache"]]
        said[name] = {"engine": found["engine"], "image": found["image"]}
    if not said:
        raise EngineError(f"none of the bundles runs: {next(iter(broken.values()))}")
    return pd.DataFrame(rows), cache, said, broken


def time_versions(
    one: dict[str, Path], other: dict[str, Path], settings: dict[str, Any], python: Path | None = None
) -> list[dict[str, Any]]:
    """The bundles of two versions of a model timed against each other, in turns; `settings` is the benchmark.json whose
    prompt, answer, image, threads and repeats are taken, and `python` that of the toolchain in whose engine the other
    version runs. Gives "measures" by bundle for each version, as benchmark.json's "bundles".

    Raises:
        BundleError, EngineError: a bundle is not whole, the engine was stopped, or it runs none of them.
    """
    sides = {"one": one, "other": other}
    folders = {f"{side}/{name}": check_bundle(path) for side, named in sides.items() for name, path in named.items()}
    options = {key: settings[key] for key in ("prompt_tokens", "answer_tokens", "image_side")}
    threads = {"thread_num": settings["threads"]}
    pythons = {f"other/{name}": python for name in other}
    options["lengths"] = []
    frame, *_ = time_in_turns(folders, threads, options, settings["repeats"], TIME_LIMIT, pythons)
    described = _measures(summarize(frame, frame["bundle"].iloc[0]))
    return [
        {name: {"measures": described[f"{side}/{name}"]} for name in named if f"{side}/{name}" in described}
        for side, named in sides.items()
    ]


def write_benchmark(
    folders: dict[str, Path],
    sizes: dict[str, int],
    chosen: dict[str, Any],
    options: dict[str, Any],
    folder: Path,
    time_limit: float,
) -> dict[str, Any]:
    """Time `folders`, bundles by name, and write the tables and the summary to `folder`; returns the summary.

    Args:
        folders: Checked bundles by name (`check_bundles`).
        sizes: Bytes of each bundle.
        chosen: Settings of the run: baseline, repeats, threads and `options`.
        options: Arguments of `measure`.
        folder: Output folder.
        time_limit: Seconds after which one process is stopped.

    Raises:
        EngineError: The engine was stopped, or runs none of the bundles.
    """
    threads = {"thread_num": chosen["threads"]}
    frame, cache, said, broken = time_in_turns(folders, threads, options, chosen["repeats"], time_limit)
    engines = {name: said[name]["engine"] for name in folders if name in said}
    base = chosen["baseline"] if chosen["baseline"] in engines else next(iter(engines))
    frame.to_parquet(folder / FIGURES, index=False)
    table, worth = summarize(frame, base), summarize_cache(cache)
    worth.to_parquet(folder / CACHE, index=False)
    settings = {name: engine["decoder"] for name, engine in engines.items()}
    for key in ("thread_num", "precision", "memory"):
        table[key] = table["bundle"].map({name: setting[key] for name, setting in settings.items()})
    table.to_csv(folder / TABLE, index=False)
    summary = {
        "machine": describe_machine() | {"MNN": tool_versions("MNN")["MNN"]},
        **chosen,
        "baseline": base,
        "broken": broken,
        "image": said[base]["image"],
        "bundles": _describe(table, engines, sizes, worth),
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary
