"""The `diagnose` stage: why a variant answers as it does: layer by layer, source by source, and what is wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from hf2mnn.errors import BundleFault
from hf2mnn.evaluate import budget, causes, layers
from hf2mnn.evaluate.findings import Finding
from hf2mnn.evaluate.names import BUDGET, FINDINGS, LAYERS
from hf2mnn.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.mnn.bundle import PARTS, EngineSettings, parts_in
from hf2mnn.mnn.convert import WeightFormat, read_graph
from hf2mnn.onnx.initializers import small_values
from hf2mnn.quant.stages import quantize
from hf2mnn.quant.variant import Choice
from hf2mnn.reference.golden import Golden


@contextmanager
def exact_bundle(onnx_folder: Path, base: Path, threads: int) -> Iterator[Path]:
    """A bundle of 32 bits, there while the block lasts: it is as large as the model in float32."""
    exact = Choice(WeightFormat(), WeightFormat(), EngineSettings())
    with tempfile.TemporaryDirectory(prefix="hf2mnn-float-") as folder:
        yield quantize(onnx_folder, base, Path(folder, "float"), exact, max(threads, 1))


def diagnose(
    reference: Path,
    onnx_folder: Path,
    base: Path,
    bundle: Path,
    destination: Path,
    threads: int,
    time_limit: float,
) -> list[Finding]:
    """Write layers.parquet, budget.parquet and findings.json to `destination`; gives the findings. `base` is the `mnn`
    stage's folder.

    A bundle that does not run is a finding, no failure: what could be measured before is written.

    Raises:
        ManifestError: an input is not what its manifest says.
        EngineError: the engine was stopped.
    """
    folders = {"reference": reference, "onnx": onnx_folder, "base": base, "bundle": bundle}
    inputs = {name: Manifest.load(folder) for name, folder in folders.items()}
    for upstream in inputs.values():
        upstream.verify()
    golden, facts = Golden(reference), json.loads((onnx_folder / "model.json").read_text())
    digests, tools = {name: m.digest() for name, m in inputs.items()}, tool_versions("MNN", "onnxruntime", "numpy")
    manifest = Manifest("diagnose", digests, {"threads": threads}, tools)
    with stage_folder(destination, manifest) as folder:
        graphs = {part: read_graph(bundle / PARTS[part][0]) for part in parts_in(onnx_folder)}
        for part, graph in graphs.items():
            # What is run to look inside is built from the dump, and must compute what the bundle computes.
            graph.sharpen_constants(small_values(onnx_folder / f"{part}.onnx"))
        found = causes.wrong_settings(bundle, facts) + causes.wrong_template(bundle, onnx_folder)
        found += causes.wrong_embedding(bundle, onnx_folder)
        found += causes.unfused(graphs["decoder"], facts["num_hidden_layers"])
        compared, sources = pd.DataFrame(columns=layers.COLUMNS), pd.DataFrame(columns=budget.COLUMNS)
        try:
            compared = layers.compare_layers(golden, onnx_folder, facts, bundle, graphs, threads, time_limit)
            found += causes.wrong_layers(compared)
            with exact_bundle(onnx_folder, base, threads) as exact:
                bench = budget.Bench(golden, exact, onnx_folder, threads, time_limit)
                sources = budget.budget(bench, bundle)
                found += causes.wrong_tokens(golden, bench.tokens(bundle), facts.get("image_token_id"))
        except BundleFault as error:
            found.append(Finding("engine", None, str(error)))
        compared.to_parquet(folder / LAYERS, index=False)
        sources.to_parquet(folder / BUDGET, index=False)
        (folder / FINDINGS).write_text(json.dumps([asdict(finding) for finding in found], indent=1) + "\n")
        manifest.results = {"findings": [finding.sentence for finding in found]}
    return found
