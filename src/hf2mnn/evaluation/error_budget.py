"""Error budget: the mean KL divergence that each source of error adds, switched on alone.

The divergence of a source is that between two runs over the same teacher-forced positions that differ in this source
only. Small independent errors add up to the total; the remainder is due to sources together, and the report shows it.
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
from hf2mnn.evaluation.findings import CONVERSION, PREPROCESSING, TOTAL
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import CONFIG, DECODER, EMBEDDING, MODEL_CONFIG, TOKENIZER, VISION, embedding_table, table_blocks
from hf2mnn.mnn.bundle_config import decoder_settings
from hf2mnn.mnn.engine import run_worker
from hf2mnn.quant.embedding import TIED, embedding_blocks, read_tied
from hf2mnn.reference.golden import Golden, sample_examples

COLUMNS = ["source", "mean_kld", "positions"]
EXAMPLES = 24
"""Examples that are run."""
BUNDLE = "bundle"
"""Folder of the float32 bundle in that of the baseline stage."""
EXACT_LOGITS, RESIZED_LOGITS, EMBEDDING_LOGITS = "exact.safetensors", "resized.safetensors", "embedding.safetensors"
TOKENS = "tokens.json"
"""Files of the baseline stage, beside the float32 bundle."""

Logits = dict[str, np.ndarray]
"""Teacher-forced logits, float32 [answer tokens, vocabulary], by example."""


@dataclass(frozen=True)
class Configuration:
    """One run of the engine: files of one or two bundles, and settings, which are the most exact ones by default."""

    decoder: Path  # bundle of the decoder
    vision: Path  # bundle of the vision tower
    embedding: Path  # bundle of the embedding
    rest: Path  # bundle of the model's settings and the tokenizer
    precision: str = "high"
    memory: str = "high"
    resize: bool = False  # whether the engine resizes the images itself

    @property
    def weight_files(self) -> list[Path]:
        """Files of decoder, embedding and vision tower."""
        decoder = [self.decoder / DECODER, self.decoder / f"{DECODER}.weight"]
        return [*decoder, *self.embedding.glob(EMBEDDING), *sorted(self.vision.glob(f"{VISION}*"))]

    @property
    def key(self) -> tuple:
        """Digests of the files, and settings: equal for configurations that compute the same."""
        files = [*self.weight_files, self.rest / MODEL_CONFIG, self.rest / TOKENIZER]
        return (*map(sha256, files), self.precision, self.memory, self.resize)


class Runs:
    """Runs of configurations on some examples, each run once."""

    def __init__(self, golden: Golden, base: Path, onnx_folder: Path, threads: int, time_limit: float) -> None:
        """Prepare runs; `base` is the float32 bundle, which gives the files that are not under test."""
        self.golden, self.base, self.onnx_folder = golden, base, onnx_folder
        self.threads, self.time_limit = threads, time_limit
        self.examples = sample_examples(golden.records, EXAMPLES)
        self._logits: dict[tuple, Logits] = {}
        self._embedding_logits: dict[tuple, Logits] = {}
        self._tokens: dict[str, dict[str, list[int]]] = {}

    @property
    def exact(self) -> Configuration:
        """The float32 bundle with the engine's most exact settings."""
        return Configuration(self.base, self.base, self.base, self.base)

    def save_baseline(self, folder: Path) -> None:
        """Run what the diagnoses of all variants compare with: the float32 bundle, also with the engine's resizing."""
        save_file(self.logits(self.exact), folder / EXACT_LOGITS)
        save_file(self.logits(replace(self.exact, resize=True)), folder / RESIZED_LOGITS)
        if not self.is_exact_embedding(self.base):
            save_file(self.with_embedding(self.base), folder / EMBEDDING_LOGITS)
        (folder / TOKENS).write_text(json.dumps(self.tokens(self.base)))

    def load_baseline(self, folder: Path) -> None:
        """Load the runs of `save_baseline`."""
        self._logits[self.exact.key] = load_file(folder / EXACT_LOGITS)
        self._logits[replace(self.exact, resize=True).key] = load_file(folder / RESIZED_LOGITS)
        if (folder / EMBEDDING_LOGITS).exists():
            self._embedding_logits[self._embedding_key(self.base)] = load_file(folder / EMBEDDING_LOGITS)
        self._tokens[sha256(self.base / TOKENIZER)] = json.loads((folder / TOKENS).read_text())

    def logits(self, run: Configuration) -> Logits:
        """Return the logits of a configuration."""
        key = run.key
        if key not in self._logits:
            self._logits[key] = self._run(run)
        return self._logits[key]

    def tokens(self, bundle: Path) -> dict[str, list[int]]:
        """Return the token ids of the examples' prompts by the tokenizer of a bundle that has run."""
        return self._tokens.get(sha256(bundle / TOKENIZER), {})

    def _run(self, run: Configuration) -> Logits:
        with tempfile.TemporaryDirectory(prefix="hf2mnn-budget-") as name:
            folder = Path(name)
            files = {path.name: path for path in run.rest.iterdir() if path.is_file()}
            files |= {path.name: path for path in run.weight_files}
            for path in files.values():
                link_or_copy(path.resolve(), folder / path.name)
            # The settings say where the embedding is, so this key comes from the embedding's bundle.
            settings, tied = json.loads((folder / MODEL_CONFIG).read_text()), read_tied(run.embedding)
            if settings.pop(TIED, None) != tied:
                (folder / MODEL_CONFIG).unlink()
                (folder / MODEL_CONFIG).write_text(json.dumps(settings | ({TIED: tied} if tied else {})))
            result, tokens = folder / "logits.safetensors", folder / "tokens.json"
            job = {"bundle": str(folder), "reference": str(self.golden.folder.resolve()), "examples": self.examples}
            job |= {"settings": {"precision": run.precision, "memory": run.memory}, "resize": run.resize}
            job |= {"threads": self.threads, "result": str(result), "tokens": str(tokens)}
            run_worker("hf2mnn.mnn.worker.forced", job, self.time_limit)
            self._tokens[sha256(run.rest / TOKENIZER)] = json.loads(tokens.read_text())
            return load_file(result)

    def is_exact_embedding(self, bundle: Path) -> bool:
        """Return whether the bundle's embedding equals the checkpoint's bit for bit."""
        blocks, exact = embedding_blocks(bundle, self.onnx_folder), table_blocks(embedding_table(self.onnx_folder))
        return all((stored == right).all() for (stored, _), right in zip(blocks, exact, strict=True))

    @staticmethod
    def _embedding_key(bundle: Path) -> tuple:
        tied = read_tied(bundle)
        return (sha256(bundle / (f"{DECODER}.weight" if tied else EMBEDDING)), json.dumps(tied))

    def with_embedding(self, bundle: Path) -> Logits:
        """Return the logits of the float32 ONNX graphs with the bundle's embedding."""
        key = self._embedding_key(bundle)
        if key not in self._embedding_logits:
            self._embedding_logits[key] = self._run_onnx(bundle)
        return self._embedding_logits[key]

    def _run_onnx(self, bundle: Path) -> Logits:
        from hf2mnn.onnx.session import OnnxModel

        blocks = [stored for stored, _ in embedding_blocks(bundle, self.onnx_folder)]
        model, logits = OnnxModel(self.onnx_folder, self.threads, np.concatenate(blocks)), {}
        chosen = (example for example in self.golden.examples() if example.id in self.examples)
        for example in steps("ONNX Runtime: forced answers", chosen, "examples", len(self.examples)):
            images = [self.golden.image(name) for name in example.images]
            patches = [(image.pixel_values, image.grid_thw) for image in images]
            ids = np.concatenate([example.input_ids, example.answer_ids[:-1]])
            rows = model.prefill(model.new_cache(), ids, patches, all_logits=True)
            logits[example.id] = rows[len(example.input_ids) - 1 :]
        return logits


def divergence(one: Logits, other: Logits) -> float:
    """Return the mean KL divergence in nats over all positions."""
    return float(np.concatenate([kl_divergence(one[name], other[name]) for name in sorted(one)]).mean())


def budget(runs: Runs, bundle: Path) -> pd.DataFrame:
    """Return a table with COLUMNS: the divergence of each source, and the total from PyTorch.

    Raises EngineError if a run failed.
    """
    config = decoder_settings(json.loads((bundle / CONFIG).read_text()))
    base, exact, weights = runs.base, runs.exact, Configuration(bundle, bundle, bundle, bundle)
    low_memory = replace(weights, memory=config["memory"])
    as_configured = replace(low_memory, precision=config["precision"])
    pairs = {
        "vision weights": (exact, replace(exact, vision=bundle)),
        "decoder weights": (exact, replace(exact, decoder=bundle)),
        "settings": (replace(weights, rest=base), weights),
        "activation quantization": (weights, low_memory),
        "fp16 arithmetic": (low_memory, as_configured),
        PREPROCESSING: (exact, replace(exact, resize=True)),
    }
    pytorch = {example.id: example.logits for example in runs.golden.examples() if example.id in runs.examples}
    count = sum(len(rows) for rows in pytorch.values())
    # The float32 bundle has a bfloat16 embedding. Where that is inexact, ONNX Runtime separates its error.
    rounded, own = (pytorch if runs.is_exact_embedding(each) else runs.with_embedding(each) for each in (base, bundle))
    sources = {CONVERSION: divergence(rounded, runs.logits(exact)), "embedding": divergence(pytorch, own)}
    sources |= {source: divergence(runs.logits(one), runs.logits(other)) for source, (one, other) in pairs.items()}
    sources[TOTAL] = divergence(pytorch, runs.logits(as_configured))
    return pd.DataFrame([(source, value, count) for source, value in sources.items()], columns=COLUMNS)
