"""Both places of a tied model's embedding: each is read by the engine as it is meant, and each is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hf2mnn.core.errors import BundleError, QuantizationError
from hf2mnn.evaluation.causes import wrong_embedding
from hf2mnn.metrics import relative_error
from hf2mnn.mnn.bundle import EMBEDDING, MODEL_CONFIG, EngineSettings, embedding_table
from hf2mnn.mnn.convert import read_graph
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.mnn.engine import run_worker
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.quant.embedding import embedding_blocks, read_tied
from hf2mnn.quant.formats import LM_HEAD
from hf2mnn.quant.variant import Choice
from hf2mnn.quant.weights import WeightFile, operators
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import run as quantize
from support import TEXT, VISION, float_bundle

TOKENS = [0, 1, 31, 32, 300, 511]
FORMATS = {
    "4 bits": WeightFormat(4, 64),
    "4 bits a channel, symmetric": WeightFormat(4, 0, symmetric=True),
    "8 bits": WeightFormat(8, 32),
    "8 bits, float32 scales": WeightFormat(8, 128, scale_bits=32),
}


@pytest.fixture(scope="module")
def stages(make_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Onnx and float of a tied model."""
    folder = tmp_path_factory.mktemp("tied")
    fetch_checkpoint(folder / "checkpoint", make_checkpoint(TEXT, VISION, tied=True))
    return export_onnx(folder / "checkpoint", folder / "onnx"), float_bundle(folder / "onnx", folder / "float")


def make(stages: tuple[Path, Path], folder: Path, form: WeightFormat, embedding: str) -> Path:
    choice = Choice(form, WeightFormat(8), EngineSettings("high", "high"), embedding=embedding)
    return quantize(*stages, folder / embedding, choice, 1)


def head_of(bundle: Path) -> np.ndarray:
    """What the levels of lm_head stand for."""
    graph = read_graph(bundle / "llm.mnn")
    return WeightFile(graph, bundle / "llm.mnn.weight").rows(operators(graph)[-1])


def predicted(onnx_folder: Path, folder: Path, head: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """ONNX Runtime's logits after each of TOKENS, with this lm_head and this embedding."""
    shutil.copytree(onnx_folder, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name.startswith("lm_head")]
    weight.CopyFrom(numpy_helper.from_array(head, weight.name))
    onnx.save(model, folder / "decoder.onnx")
    session = OnnxModel(folder, threads=1, embedding=embedding)
    return np.concatenate([session.prefill(session.new_cache(), np.array([token])) for token in TOKENS])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_engine_reads_from_lm_head_what_lm_head_holds(
    stages: tuple[Path, Path], form: WeightFormat, tmp_path: Path
) -> None:
    """With all else in float32, its predictions are ONNX Runtime's with the rows of lm_head as the embedding, and not
    those with the checkpoint's own.
    """
    floats = WeightFormat()
    choice = Choice(floats, floats, EngineSettings("high", "high"), {"decoder": {LM_HEAD: asdict(form)}}, LM_HEAD)
    bundle = quantize(*stages, tmp_path / "tied", choice, 1)
    assert not (bundle / EMBEDDING).exists()
    head = head_of(bundle)
    blocks = list(embedding_blocks(bundle, stages[0]))
    np.testing.assert_array_equal(np.concatenate([stored for stored, _ in blocks]), head)
    job = {"bundle": str(bundle), "tokens": TOKENS, "result": str(tmp_path / "logits.npy")}
    run_worker("first_logits", job, 60)
    found = np.load(tmp_path / "logits.npy")
    right = predicted(stages[0], tmp_path / "tied-onnx", head, head)
    own = predicted(stages[0], tmp_path / "own-onnx", head, np.concatenate([row for _, row in blocks]))
    assert relative_error(right, found) < 1e-4
    assert relative_error(own, found) > 20 * relative_error(right, found)
    assert wrong_embedding(bundle, stages[0]) == []


def test_bytes_are_what_the_choice_costs(stages: tuple[Path, Path], tmp_path: Path) -> None:
    sizes, said = {}, {}
    for embedding in ("file", "lm_head"):
        bundle = make(stages, tmp_path, WeightFormat(4, 64), embedding)
        manifest = json.loads((bundle / "manifest.json").read_text())
        said[embedding] = manifest["results"]["embedding_bytes"]
        sizes[embedding] = sum(entry["size"] for entry in manifest["outputs"].values())
    cost = embedding_table(stages[0]).size
    assert said == {"file": cost, "lm_head": 0}
    assert sizes["file"] - sizes["lm_head"] == pytest.approx(cost, abs=400)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 16])
def test_bits_that_the_engine_reads_no_embedding_of_are_refused(
    stages: tuple[Path, Path], bits: int, tmp_path: Path
) -> None:
    """It would take 3 bits for 4, and talk nonsense."""
    with pytest.raises(QuantizationError, match=f"lm_head: .* 4 or 8 bits, this one gets {bits}; use embedding: file"):
        make(stages, tmp_path, WeightFormat(bits), "lm_head")
    assert not (tmp_path / "lm_head").exists()


def test_an_untied_model_has_no_embedding_in_lm_head(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="lm_head: the model's embedding is another weight"):
        make((onnx_folder, bundle), tmp_path, WeightFormat(4, 64), "lm_head")


@pytest.mark.parametrize("key", ["weight_offset", "alpha_offset"])
def test_offsets_at_other_data_are_noticed(stages: tuple[Path, Path], key: str, tmp_path: Path) -> None:
    """The engine reads whatever is there."""
    bundle = make(stages, tmp_path, WeightFormat(4, 64), "lm_head")
    config = json.loads((bundle / MODEL_CONFIG).read_text())
    config["tie_embeddings"][key] -= 64
    (bundle / MODEL_CONFIG).write_text(json.dumps(config))
    (finding,) = wrong_embedding(bundle, stages[0])
    assert "rows of the embedding are not the checkpoint's" in finding.message
    config["tie_embeddings"][key] += 10**9
    (bundle / MODEL_CONFIG).write_text(json.dumps(config))
    with pytest.raises(BundleError, match="ends before the embedding"):
        wrong_embedding(bundle, stages[0])
    assert read_tied(bundle)["quant_bit"] == 4
