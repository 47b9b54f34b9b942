"""The embedding of a tied model, in a file or in lm_head: the engine reads the intended rows, and sizes count."""

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
from hf2mnn.mnn.engine import run_worker
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.quant.embedding import embedding_blocks, read_tied
from hf2mnn.quant.formats import LM_HEAD, WeightFormat
from hf2mnn.quant.variant import Choice
from hf2mnn.quant.weights import WeightFile, operators
from hf2mnn.stages.quantize import quantize

TOKENS = [0, 1, 31, 32, 300, 511]
FORMATS = {
    "4 bits": WeightFormat(4, 64),
    "4 bits a channel, symmetric": WeightFormat(4, 0, symmetric=True),
    "8 bits": WeightFormat(8, 32),
    "8 bits, float32 scales": WeightFormat(8, 128, scale_bits=32),
}


@pytest.fixture(scope="module")
def stages(model_with_heads: Callable[[int], Path]) -> tuple[Path, Path]:
    """Folders of the export and convert stages of a tied model."""
    model = model_with_heads(4)
    return model / "onnx", model / "float-graphs"


def make_bundle(stages: tuple[Path, Path], folder: Path, form: WeightFormat, embedding: str) -> Path:
    choice = Choice(form, WeightFormat(8), EngineSettings("high", "high"), embedding=embedding)
    return quantize(*stages, folder / embedding, choice, 1)


def head_of(bundle: Path) -> np.ndarray:
    """Return the weight of lm_head as it is stored."""
    graph = read_graph(bundle / "llm.mnn")
    return WeightFile(graph, bundle / "llm.mnn.weight").rows(operators(graph)[-1])


def predicted(onnx_folder: Path, folder: Path, head: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """Return ONNX Runtime's logits after each of TOKENS, with this lm_head and this embedding."""
    shutil.copytree(onnx_folder, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name.startswith("lm_head")]
    weight.CopyFrom(numpy_helper.from_array(head, weight.name))
    onnx.save(model, folder / "decoder.onnx")
    session = OnnxModel(folder, threads=1, embedding=embedding)
    return np.concatenate([session.prefill(session.new_cache(), np.array([token])) for token in TOKENS])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_engine_reads_the_rows_of_lm_head(stages: tuple[Path, Path], form: WeightFormat, tmp_path: Path) -> None:
    """With all else in float32, its logits are those of ONNX Runtime with the rows of lm_head as the embedding.

    They are not those with the checkpoint's embedding.
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
    logits = np.load(tmp_path / "logits.npy")
    expected = predicted(stages[0], tmp_path / "tied-onnx", head, head)
    own = predicted(stages[0], tmp_path / "own-onnx", head, np.concatenate([row for _, row in blocks]))
    assert relative_error(expected, logits) < 1e-4
    assert relative_error(own, logits) > 20 * relative_error(expected, logits)
    assert wrong_embedding(bundle, stages[0]) == []


def test_embedding_bytes_are_those_of_the_file(stages: tuple[Path, Path], tmp_path: Path) -> None:
    sizes, reported = {}, {}
    for embedding in ("file", "lm_head"):
        bundle = make_bundle(stages, tmp_path, WeightFormat(4, 64), embedding)
        manifest = json.loads((bundle / "manifest.json").read_text())
        reported[embedding] = manifest["results"]["embedding_bytes"]
        sizes[embedding] = sum(entry["size"] for entry in manifest["outputs"].values())
    cost = embedding_table(stages[0]).size
    assert reported == {"file": cost, "lm_head": 0}
    assert sizes["file"] - sizes["lm_head"] == pytest.approx(cost, abs=400)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 16])
def test_bits_of_which_the_engine_reads_no_embedding_are_refused(
    stages: tuple[Path, Path], bits: int, tmp_path: Path
) -> None:
    """It would read 3 bits as 4, and produce wrong output."""
    with pytest.raises(
        QuantizationError, match=f"lm_head: .* 4 or 8 bits, but the format has {bits}; use embedding: file"
    ):
        make_bundle(stages, tmp_path, WeightFormat(bits), "lm_head")
    assert not (tmp_path / "lm_head").exists()


def test_an_untied_model_has_no_embedding_in_lm_head(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="lm_head: the model's embedding is another weight"):
        make_bundle((onnx_folder, graphs), tmp_path, WeightFormat(4, 64), "lm_head")


@pytest.mark.parametrize("key", ["weight_offset", "alpha_offset"])
def test_wrong_offsets_are_reported(stages: tuple[Path, Path], key: str, tmp_path: Path) -> None:
    """The engine reads any bytes as weights."""
    bundle = make_bundle(stages, tmp_path, WeightFormat(4, 64), "lm_head")
    config = json.loads((bundle / MODEL_CONFIG).read_text())
    config["tie_embeddings"][key] -= 64
    (bundle / MODEL_CONFIG).write_text(json.dumps(config))
    (finding,) = wrong_embedding(bundle, stages[0])
    assert "rows of the embedding are not the checkpoint's" in finding.message
    config["tie_embeddings"][key] += 10**9
    (bundle / MODEL_CONFIG).write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"ends before byte \d+, where llm_config\.json has the embedding"):
        wrong_embedding(bundle, stages[0])
    assert read_tied(bundle)["quant_bit"] == 4
