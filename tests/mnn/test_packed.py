"""The decoder in the engine's own layout computes what it computed before, with a fifth of the operators."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hf2mnn.mnn import bundle as bundles
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.packed import pack_decoder, runs_packed
from hf2mnn.onnx.export import export_onnx
from hf2mnn.source.fetch import fetch_source
from support import TEXT, VISION, float_bundle

LAYERS, TOKENS = 2, [0, 1, 31, 32, 300, 511]


@pytest.fixture(scope="module", params=["grouped", "single", "one for all"])
def both(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Bundles of one model, packed and as older releases of MNN get it, by `show_linear_layers` alone; with 2, 4 and 1
    heads for keys and values."""
    heads = {"grouped": 2, "single": 4, "one for all": 1}[request.param]
    folder = tmp_path_factory.mktemp("packed")
    checkpoint = make_checkpoint(TEXT | {"num_key_value_heads": heads}, VISION, tied=heads == 4)
    onnx = export_onnx(fetch_source(folder / "source", checkpoint), folder / "onnx")
    packed = float_bundle(onnx, folder / "packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "tool_versions", lambda *_: {"MNN": "3.6.0"})
        plain = float_bundle(onnx, folder / "plain")
    return packed, plain


def test_a_layer_has_twelve_operators(both: tuple[Path, Path]) -> None:
    packed, plain = (read_graph(bundle / "llm.mnn") for bundle in both)
    counts = {kind: len(packed.of_type(kind)) for kind in ("Convolution", "LayerNorm", "RoPE", "Attention")}
    assert counts == {"Convolution": 7 * LAYERS + 1, "LayerNorm": 2 * LAYERS + 1, "RoPE": LAYERS, "Attention": LAYERS}
    silu = [op for op in packed.of_type("BinaryOp") if op["main"]["opType"] == "MUL_SILU"]
    assert len(silu) == LAYERS
    assert len(packed.of_type("ConvertTensor")) == len(packed.of_type("Reshape")) == 2
    assert len(packed.ops) < len(plain.ops) - 40 * LAYERS


@pytest.mark.parametrize(
    ("release", "known"), [("3.5.0", False), ("3.6.0", False), ("3.6.1", True), ("3.6.1.post1", True), ("3.10.0", True)]
)
def test_only_releases_that_have_the_operators_get_them(release: str, known: bool) -> None:
    assert runs_packed(release) == known


def test_every_token_is_answered_as_before(both: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for bundle in both:
        job = {"bundle": str(bundle), "tokens": TOKENS, "result": str(tmp_path / "logits.npy")}
        run_worker("first_logits", job, 60)
        found.append(np.load(tmp_path / "logits.npy"))
    np.testing.assert_allclose(*found, atol=1e-4)


def edited(plain: Path, change: Callable[[list[dict]], None]) -> bool:
    graph = read_graph(plain / "llm.mnn")
    change(graph.ops)
    before = copy.deepcopy(graph.content)
    done = pack_decoder(graph)
    assert done or graph.content == before
    return done


def test_what_is_not_understood_is_left_alone(both: tuple[Path, Path]) -> None:
    """Another activation, a further normalization (of queries, say), a layer that is not there, one more factor."""
    plain = both[1]

    def tanh(ops: list[dict]) -> None:
        next(op for op in ops if op["type"] == "UnaryOp" and op["main"]["opType"] == "SILU")["main"]["opType"] = "TANH"

    def normed(ops: list[dict]) -> None:
        norm = next(op for op in ops if op["type"] == "LayerNorm")
        ops.append(copy.deepcopy(norm) | {"name": "model.language_model.layers.0.self_attn.q_norm"})

    def missing(ops: list[dict]) -> None:
        ops.remove(next(op for op in ops if op["name"].endswith("up_proj__matmul_converted")))

    def scaled(ops: list[dict]) -> None:
        """The residual stream times two, as some families have it."""
        norm = next(op for op in ops if op["name"].endswith("layers.1.post_attention_layernorm"))
        (read,) = norm["inputIndexes"]
        total = next(op for op in ops if read in op["outputIndexes"])
        total["outputIndexes"], norm["inputIndexes"] = [read], [read]
        ops.insert(ops.index(total) + 1, copy.deepcopy(total) | {"name": "twice", "inputIndexes": [read, read]})

    for change in (tanh, normed, missing, scaled):
        assert not edited(plain, change)
    assert edited(plain, lambda _: None)


def test_a_packed_graph_is_packed_no_second_time(both: tuple[Path, Path], tmp_path: Path) -> None:
    assert not edited(Path(shutil.copytree(both[0], tmp_path / "again")), lambda _: None)
