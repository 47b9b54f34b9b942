"""Benchmark: time and memory of a model's bundles, in interleaved runs of one process at a time.

Files: benchmark.parquet has a row for each bundle, repeat and measure; benchmark.json and benchmark.csv have medians,
quartiles and ratios; cache.parquet has the speedup of the KV cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hf2mnn.core.errors import BundleError, BundleFault, ConfigError, EngineError
from hf2mnn.core.files import user_path
from hf2mnn.core.manifest import Manifest, tool_versions
from hf2mnn.core.progress import steps
from hf2mnn.figures import BENCHMARK, measured_on
from hf2mnn.machine.hardware import describe_machine
from hf2mnn.mnn.bundle_config import MODEL_CONFIG, read_config
from hf2mnn.mnn.engine import check_bundle, run_worker

MEASURES, TABLE, SUMMARY, CACHE = "benchmark.parquet", "benchmark.csv", "benchmark.json", "cache.parquet"
UNITS = {figure.name: figure.unit for figure in measured_on(BENCHMARK)}
"""Measures and their units."""
SPREAD = {"median": 0.5, "first_quartile": 0.25, "third_quartile": 0.75, "lowest": 0.0, "highest": 1.0}
"""Quantiles of a measure over its runs."""
TIME_LIMIT = 7200.0
OPTIONS = ("prompt_tokens", "answer_tokens", "image_side", "lengths")
"""Arguments of `measure` that are settings of a benchmark."""
LENGTHS = (32, 64, 128, 256, 512)
"""Tokens in the KV cache at which its speedup is measured."""


def parse_bundles(texts: Sequence[str]) -> dict[str, Path]:
    """Parse NAME=FOLDER; return folders by name, or raise ConfigError for another form or a name that occurs twice."""
    bundles = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ConfigError(f"--bundle {text!r}: give NAME=FOLDER")
        if name in bundles:
            raise ConfigError(f"--bundle {text!r}: the name {name!r} is given twice")
        bundles[name] = user_path(folder)
    return bundles


def interleaved(names: Sequence[Any], repeats: int) -> list[tuple[int, Any]]:
    """Return (repeat, name) in the order of runs: each repeat runs every name once and starts with the next name.

    A machine that slows down affects all names alike.
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
    """Measure a bundle once, in a process of its own.

    `settings` replace those of config.json, `lengths` are the tokens in the KV cache when its speedup is measured, and
    `python` is the interpreter of a toolchain, whose engine runs the bundle.

    Raises:
        BundleFault: The engine refused the bundle or crashed on it.
        EngineError: The engine was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="hf2mnn-speed-") as folder:
        result = Path(folder, "result.json")
        job = {"bundle": str(bundle), "settings": settings, "result": str(result), "lengths": list(lengths)}
        job |= {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "image_side": image_side}
        try:
            run_worker("hf2mnn.mnn.worker.speed", job, time_limit, python)
        except EngineError as error:
            raise type(error)(f"{bundle} cannot be timed: {error}") from None
        return json.loads(result.read_text())


def check_bundles(bundles: dict[str, Path]) -> dict[str, Manifest]:
    """Return verified manifests by name; their folders are absolute.

    Raises:
        BundleError: A bundle is not whole, was not made by hf2mnn, or is of another model.
    """
    checked = {name: check_bundle(folder) for name, folder in bundles.items()}
    models = {name: read_config(bundle.folder, MODEL_CONFIG).get("hf2mnn") for name, bundle in checked.items()}
    for name, model in models.items():
        if model is None:
            raise BundleError(
                f"{checked[name].folder} was not made by hf2mnn: its {MODEL_CONFIG} does not say which model it is"
            )
    first = next(iter(models))
    for name, model in models.items():
        if model != models[first]:
            raise BundleError(f"bundles {first} and {name} are of different models; time them separately")
    return checked


def summarize(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return a row for each bundle and measure: median, quartiles, range, and the ratio to the baseline's median."""
    grouped = frame.groupby(["bundle", "measure"], sort=False)["value"]
    table = grouped.quantile(list(SPREAD.values())).unstack()
    table.columns = list(SPREAD)
    table = table.join(grouped.count().rename("repeats")).reset_index()
    base = table[table["bundle"] == baseline].set_index("measure")["median"]
    table.insert(2, "unit", table["measure"].map(UNITS))
    table["ratio"] = table["median"] / table["measure"].map(base)
    return table


def summarize_cache(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return medians for each bundle and length; `speedup` is the time of a step without the KV cache over with it."""
    columns = ["bundle", "length", "cached_s", "recomputed_s", "difference"]
    grouped = pd.DataFrame(rows, columns=columns).groupby(["bundle", "length"], sort=False)
    table = grouped[["cached_s", "recomputed_s"]].median().join(grouped["difference"].max()).reset_index()
    table.insert(4, "speedup", table["recomputed_s"] / table["cached_s"])
    return table


def _measures(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    columns = ["unit", *SPREAD, "ratio"]
    return {name: rows.set_index("measure")[columns].to_dict("index") for name, rows in table.groupby("bundle")}


class Timings(NamedTuple):
    """Results of interleaved runs."""

    measures: pd.DataFrame  # rows of benchmark.parquet
    cache: list[dict[str, Any]]  # rows of cache.parquet before they are summarized
    runs: dict[str, dict[str, Any]]  # engine settings and image size by bundle, as the process reports them
    broken: dict[str, str]  # message by bundle that does not run


def time_interleaved(
    folders: dict[str, Path], chosen: dict[str, Any], pythons: dict[str, Path | None], time_limit: float
) -> Timings:
    """Time bundles in interleaved runs; a bundle that does not run is recorded and skipped.

    `chosen` has the settings of the run: repeats, threads, and `OPTIONS`. Bundles in `pythons` run in the engine of a
    toolchain, which is given by its interpreter.

    Raises:
        EngineError: The engine was stopped, or none of the bundles runs.
    """
    settings, options = {"thread_num": chosen["threads"]}, {key: chosen[key] for key in OPTIONS}
    rows, cache, runs, broken = [], [], {}, {}
    for order, (repeat, name) in enumerate(steps("speed", interleaved(list(folders), chosen["repeats"]), "runs")):
        if name in broken:
            continue
        try:
            result = measure(folders[name], settings, **options, time_limit=time_limit, python=pythons.get(name))
        except BundleFault as error:
            broken[name] = str(error)
            continue
        run = {"bundle": name, "repeat": repeat, "order": order}
        rows += [
            {**run, "measure": key, "value": result["measures"][key], "unit": unit}
            for key, unit in UNITS.items()
            if key in result["measures"]
        ]
        cache += [{"bundle": name, **row} for row in result["cache"]]
        runs[name] = {"engine": result["engine"], "image": result["image"]}
    if not runs:
        raise EngineError(f"none of the bundles runs: {next(iter(broken.values()))}")
    return Timings(pd.DataFrame(rows), cache, runs, broken)


def time_versions(
    one: dict[str, Path], other: dict[str, Path], settings: dict[str, Any], python: Path | None = None
) -> list[dict[str, Any]]:
    """Time the bundles of two versions of a model, given by name, in interleaved runs.

    `settings` is the content of a benchmark.json, and `python` the interpreter of the toolchain whose engine runs the
    other version. Returns "measures" by bundle for each version, as "bundles" in benchmark.json.

    Raises:
        BundleError: A bundle is not whole.
        EngineError: The engine was stopped, or none of the bundles runs.
    """
    sides = {"one": one, "other": other}
    folders = {
        f"{side}/{name}": check_bundle(path).folder for side, named in sides.items() for name, path in named.items()
    }
    pythons = {f"other/{name}": python for name in other}
    frame = time_interleaved(folders, {**settings, "lengths": []}, pythons, TIME_LIMIT).measures
    described = _measures(summarize(frame, frame["bundle"].iloc[0]))
    return [
        {name: {"measures": described[f"{side}/{name}"]} for name in named if f"{side}/{name}" in described}
        for side, named in sides.items()
    ]


def write_benchmark(
    folders: dict[str, Path], sizes: dict[str, int], chosen: dict[str, Any], folder: Path, time_limit: float
) -> dict[str, Any]:
    """Time bundles and write the tables and the summary to `folder`; returns the summary.

    `folders` are checked (`check_bundles`), `sizes` are in bytes, and `chosen` has the baseline and the settings of
    `time_interleaved`.

    Raises:
        EngineError: The engine was stopped, or none of the bundles runs.
    """
    timings = time_interleaved(folders, chosen, {}, time_limit)
    engines = {name: timings.runs[name]["engine"] for name in folders if name in timings.runs}
    base = chosen["baseline"] if chosen["baseline"] in engines else next(iter(engines))
    timings.measures.to_parquet(folder / MEASURES, index=False)
    table, speedups = summarize(timings.measures, base), summarize_cache(timings.cache)
    speedups.to_parquet(folder / CACHE, index=False)
    for key in ("thread_num", "precision", "memory"):
        table[key] = table["bundle"].map({name: engine["decoder"][key] for name, engine in engines.items()})
    table.to_csv(folder / TABLE, index=False)
    measures = _measures(table)
    summary = {
        "machine": describe_machine() | tool_versions("MNN"),
        **chosen,
        "baseline": base,
        "broken": timings.broken,
        "image": timings.runs[base]["image"],
        "bundles": {
            name: {
                "bytes": sizes[name],
                "engine": engine,
                "measures": measures[name],
                "cache": speedups[speedups["bundle"] == name].drop(columns="bundle").to_dict("records"),
            }
            for name, engine in engines.items()
        },
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary
