"""The error budget: how much of a variant's divergence each source brings, each switched alone.

A source is measured as the mean KL divergence between two runs that differ in it and in nothing else,
over the same teacher-forced positions. For errors that are small and independent these add up to the whole; what they
do not explain is theirs together, and is shown as such.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from hf2mnn.core.files import link_or_copy, sha256
from hf2mnn.core.progress import steps
from hf2mnn.evaluation.names import CONVERSION, PREPROCESSING, TOTAL
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import (
    CONFIG,
    DECODER,
    EMBEDDING,
    MODEL_CONFIG,
    TOKENIZER,
    VISION,
    embedding_table,
    table_blocks,
)
from hf2mnn.mnn.engine import run_worker
from hf2mnn.quant.embedding import TIED, embedding_blocks, tied_in
from hf2mnn.reference.golden import Golden, spread_examples

COLUMNS = ["source", "mean_kld", "positions"]
EXAMPLES = 24
EXACT_LOGITS, RESIZED_LOGITS, TOKENS = "exact.safetensors", "resized.safetensors", "tokens.json"
"""Files of the baseline stage, beside the float32 bundle."""
BUNDLE = "bundle"
"""Folder of the float32 bundle in that of the baseline stage."""
EXACT = {"precision": "high", "memory": "high"}


@dataclass(frozen=True)
class Run:
    """A bundle put together of the files of two, and the settings it runs with; `rest` gives the model's settings and
    the tokenizer. `resize` lets the engine resize the images.
    """

    decoder: Path
    vision: Path
    embedding: Path
    rest: Path
    precision: str
    memory: str
    resize: bool = False


class Bench:
    """Runs bundles on the chosen examples, each combination once."""

    def __init__(self, golden: Golden, base: Path, onnx_folder: Path, threads: int, time_limit: float) -> None:
        """`base` is the float32 bundle; runs take from it what they do not name."""
        self.golden, self.base, self.onnx_folder = golden, base, onnx_folder
        self.threads, self.time_limit = threads, time_limit
        self.examples = spread_examples(golden.records, EXAMPLES)
        self._done: dict[tuple, dict[str, np.ndarray]] = {}
        self._tokens: dict[str, dict[str, list[int]]] = {}

    @property
    def exact(self) -> Run:
        """The float32 bundle at the engine's most exact settings."""
        return Run(self.base, self.base, self.base, self.base, **EXACT)

    def save_baseline(self, folder: Path) -> None:
        """Run the float32 bundle alone and with the engine's own resizing, for the diagnoses of all variants."""
        save_file(self.logits(self.exact), folder / EXACT_LOGITS)
        save_file(self.logits(replace(self.exact, resize=True)), folder / RESIZED_LOGITS)
        (folder / TOKENS).write_text(json.dumps(self.tokens(self.base)))

    def load_baseline(self, folder: Path) -> None:
        """Take the runs of `save_baseline` in place of running them again."""
        self._done[self._key(self.exact)] = load_file(folder / EXACT_LOGITS)
        self._done[self._key(replace(self.exact, resize=True))] = load_file(folder / RESIZED_LOGITS)
        self._tokens[sha256(self.base / TOKENIZER)] = json.loads((folder / TOKENS).read_text())

    @staticmethod
    def _parts(run: Run) -> list[Path]:
        parts = [run.decoder / DECODER, run.decoder / f"{DECODER}.weight", *run.embedding.glob(EMBEDDING)]
        return parts + sorted(run.vision.glob(f"{VISION}*"))

    def _key(self, run: Run) -> tuple:
        files = [*self._parts(run), run.rest / MODEL_CONFIG, run.rest / TOKENIZER]
        return (*map(sha256, files), run.precision, run.memory, run.resize)

    def logits(self, run: Run) -> dict[str, np.ndarray]:
        """Teacher-forced logits by example."""
        key = self._key(run)
        if key not in self._done:
            self._done[key] = self._run(run)
        return self._done[key]

    def tokens(self, bundle: Path) -> dict[str, list[int]]:
        """What a bundle's tokenizer makes of the chosen examples' prompts; it has run."""
        return self._tokens.get(sha256(bundle / TOKENIZER), {})

    def _run(self, run: Run) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory(prefix="hf2mnn-budget-") as name:
            folder = Path(name)
            rest = {path.name: path for path in run.rest.iterdir() if path.is_file()}
            for path in (rest | {path.name: path for path in self._parts(run)}).values():
                link_or_copy(path.resolve(), folder / path.name)
            # Where the embedding is stands among the settings, and belongs to it.
            settings, tied = json.loads((folder / MODEL_CONFIG).read_text()), tied_in(run.embedding)
            if settings.pop(TIED, None) != tied:
                (folder / MODEL_CONFIG).unlink()
                (folder / MODEL_CONFIG).write_text(json.dumps(settings | ({TIED: tied} if tied else {})))
            result, tokens = folder / "logits.safetensors", folder / "tokens.json"
            job = {"bundle": str(folder), "reference": str(self.golden.folder.resolve()), "examples": self.examples}
            job |= {"settings": {"precision": run.precision, "memory": run.memory}, "threads": self.threads}
            job |= {"resize": run.resize, "result": str(result), "tokens": str(tokens)}
            run_worker("hf2mnn.mnn.worker.forced", job, self.time_limit)
            self._tokens[sha256(run.rest / TOKENIZER)] = json.loads(tokens.read_text())
            return load_file(result)

    def with_embedding(self, bundle: Path) -> dict[str, np.ndarray]:
        """Teacher-forced logits by example of the ONNX graphs, float32 but for the embedding, which is the bundle's."""
        from hf2mnn.onnx.session import OnnxModel

        blocks = [stored for stored, _ in embedding_blocks(bundle, self.onnx_folder)]
        model, logits = OnnxModel(self.onnx_folder, self.threads, np.concatenate(blocks)), {}
        chosen = (example for example in self.golden.examples() if example.id in self.examples)
        for example in steps("ONNX Runtime reads", chosen, "examples", len(self.examples)):
            images = [self.golden.image(name) for name in example.images]
            fed = [(image.pixel_values, image.grid_thw) for image in images]
            ids = np.concatenate([example.input_ids, example.answer_ids[:-1]])
            rows = model.prefill(model.new_cache(), ids, fed, all_logits=True)
            logits[example.id] = rows[len(example.input_ids) - 1 :]
        return logits


def exact_embedding(bundle: Path, onnx_folder: Path) -> bool:
    """Whether the bundle's embedding is the checkpoint's, bit for bit."""
    exact = table_blocks(embedding_table(onnx_folder))
    return all(
        (stored == right).all() for (stored, _), right in zip(embedding_blocks(bundle, onnx_folder), exact, strict=True)
    )


def divergence(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Mean KL divergence in nats over all positions of the same examples."""
    return float(np.concatenate([kl_divergence(one[name], other[name]) for name in sorted(one)]).mean())


def budget(bench: Bench, bundle: Path) -> pd.DataFrame:
    """A table with COLUMNS: each source's own divergence, then the total against PyTorch.

    Raises:
        EngineError: a run failed.
    """
    base, config = bench.base, json.loads((bundle / CONFIG).read_text())
    precision, memory = config["precision"], config["memory"]
    exact = bench.exact
    weights = Run(bundle, bundle, bundle, bundle, **EXACT)
    packed = Run(bundle, bundle, bundle, bundle, EXACT["precision"], memory)
    computed = Run(bundle, bundle, bundle, bundle, precision, memory)
    steps = {
        "vision weights": (exact, Run(base, bundle, base, base, **EXACT)),
        "decoder weights": (exact, Run(bundle, base, base, base, **EXACT)),
        "settings": (Run(bundle, bundle, bundle, base, **EXACT), weights),
        "activation quantization": (weights, packed),
        "fp16 arithmetic": (packed, computed),
        PREPROCESSING: (exact, replace(exact, resize=True)),
    }
    wanted = set(bench.examples)
    right = {example.id: example.logits for example in bench.golden.examples() if example.id in wanted}
    count = sum(len(rows) for rows in right.values())
    # The float bundle holds the embedding as bfloat16 too: where that rounds, it is told apart by ONNX Runtime.
    rounded = right if exact_embedding(base, bench.onnx_folder) else bench.with_embedding(base)
    own = right if exact_embedding(bundle, bench.onnx_folder) else bench.with_embedding(bundle)
    found = {CONVERSION: divergence(rounded, bench.logits(exact)), "embedding": divergence(right, own)}
    found |= {source: divergence(bench.logits(one), bench.logits(other)) for source, (one, other) in steps.items()}
    found |= {TOTAL: divergence(right, bench.logits(computed))}
    return pd.DataFrame([(source, value, count) for source, value in found.items()], columns=COLUMNS)
