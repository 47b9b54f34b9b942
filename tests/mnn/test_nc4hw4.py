"""The decoder in the engine's own layout computes what it computed before, with a fifth of the operators."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from checkpoints import SHAPES, make_small
from hf2mnn.evaluation.layers import Part, Portable, _run_mnn
from hf2mnn.mnn import bundle as bundles
from hf2mnn.mnn import nc4hw4 as packing
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.nc4hw4 import pack_decoder, runs_packed
from hf2mnn.onnx.deepstack import DEEPSTACK
from hf2mnn.onnx.initializers import initializer_values, small_values
from hf2mnn.onnx.session import causal_mask
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import TEXT, VISION, float_bundle

LAYERS, TOKENS = 2, [0, 1, 31, 32, 300, 511]
QWEN3 = SHAPES["qwen3-vl"].text
DEEP = 3
"""Layers after which Qwen3-VL adds what it has seen."""


def bundles_of(onnx: Path, folder: Path) -> tuple[Path, Path]:
    """Bundles of one model, packed and as older releases of MNN get it, by `show_linear_layers` alone."""
    packed = float_bundle(onnx, folder / "packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "tool_versions", lambda *_: {"MNN": "3.6.0"})
        plain = float_bundle(onnx, folder / "plain")
    return packed, plain


@pytest.fixture(scope="module", params=["grouped", "single", "one for all"])
def both(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """With 2, 4 and 1 heads for keys and values."""
    heads = {"grouped": 2, "single": 4, "one for all": 1}[request.param]
    folder = tmp_path_factory.mktemp("packed")
    checkpoint = make_checkpoint(TEXT | {"num_key_value_heads": heads}, VISION, tied=heads == 4)
    return bundles_of(export_onnx(fetch_checkpoint(folder / "checkpoint", checkpoint), folder / "onnx"), folder)


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


def first_logits(bundles: tuple[Path, Path], tmp_path: Path) -> list[np.ndarray]:
    found = []
    for bundle in bundles:
        job = {"bundle": str(bundle), "tokens": TOKENS, "result": str(tmp_path / "logits.npy")}
        run_worker("first_logits", job, 60)
        found.append(np.load(tmp_path / "logits.npy"))
    return found


def test_every_token_is_answered_as_before(both: tuple[Path, Path], tmp_path: Path) -> None:
    np.testing.assert_allclose(*first_logits(both, tmp_path), atol=1e-4)


def edited(plain: Path, change: Callable[[list[dict]], None], vectors: dict[str, np.ndarray] | None = None) -> bool:
    graph = read_graph(plain / "llm.mnn")
    change(graph.ops)
    before = copy.deepcopy(graph.content)
    done = pack_decoder(graph, vectors or {})
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


# Queries and keys that are normalized, and deepstack


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a Qwen3-VL."""
    folder = tmp_path_factory.mktemp("qwen3")
    source = fetch_checkpoint(folder / "checkpoint", make_small(SHAPES["qwen3-vl"], folder / "checkpoint"))
    bundles_of(export_onnx(source, folder / "onnx"), folder)
    return folder


def test_the_rotation_normalizes_and_the_stream_takes_the_sum(qwen3: Path) -> None:
    graph, layers = read_graph(qwen3 / "packed" / "llm.mnn"), QWEN3["num_hidden_layers"]
    assert len(graph.of_type("LayerNorm")) == 2 * layers + 1
    assert len(dict(graph.rotary_norms)) == 2 * layers
    sums = [op for op in graph.of_type("BinaryOp") if op["main"]["opType"] == "ADD"]
    assert len(sums) == 2 * DEEP + 1
    assert len(graph.ops) < len(read_graph(qwen3 / "plain" / "llm.mnn").ops) - 45 * layers


def test_its_weights_are_the_checkpoints_to_the_last_bit(qwen3: Path) -> None:
    """In the graph of the `mnn` stage and in the bundle's, which was read from a dump with six decimals."""
    weights = load_file(qwen3 / "checkpoint" / "model.safetensors")
    norms = {name: values for name, values in weights.items() if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert len(norms) == 2 * QWEN3["num_hidden_layers"]
    for folder in ("packed-base", "packed"):
        content = (qwen3 / folder / "llm.mnn").read_bytes()
        for name, values in norms.items():
            assert values.float().numpy().astype("<f4").tobytes() in content, (folder, name)
    graph, exact = read_graph(qwen3 / "packed" / "llm.mnn"), small_values(qwen3 / "onnx" / "decoder.onnx")
    name, norm = next(graph.rotary_norms)
    wanted = exact[f"{name}.weight"].tolist()
    assert norm["gamma"] != wanted
    graph.sharpen_constants(exact)
    assert norm["gamma"] == wanted


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [
        pytest.param(7, (7, 192), id="an image"),
        pytest.param(7, (1, 192), id="one token for all"),
        pytest.param(7, (1, 1), id="one number for a text"),
        pytest.param(1, (1, 1), id="one number for a token"),
    ],
)
def test_what_deepstack_adds_is_added(qwen3: Path, tokens: int, seen: tuple[int, int]) -> None:
    """Numbers, where the engine feeds zeros, in every form that it feeds."""
    random = np.random.default_rng(0)
    embeds = random.standard_normal((tokens, QWEN3["hidden_size"]), np.float32)
    added = random.standard_normal((DEEP, *seen), np.float32)
    shared = {
        "attention_mask": causal_mask(0, tokens),
        "position_ids": np.sort(random.integers(0, 20, (3, tokens)), axis=1).astype(np.int32),
        "logits_index": np.array([0], np.int32),
    }
    past = np.zeros((5, 2, 1, 0, QWEN3["num_key_value_heads"], QWEN3["head_dim"]), np.float32)
    whole = np.array(np.broadcast_to(added, (DEEP, seen[0], QWEN3["hidden_size"])))
    onnx = {"inputs_embeds": embeds[None], "past_key_values": past, DEEPSTACK: whole, **shared}
    part = Part("p", "decoder", onnx, {"input_ids": embeds[:, None], DEEPSTACK: added, **shared})
    points = [f"model.language_model.layers.{layer}" for layer in range(QWEN3["num_hidden_layers"])] + ["logits"]
    wanted = Portable.load(qwen3 / "onnx", "decoder").run(onnx, points, {}, 1)
    graph = read_graph(qwen3 / "packed" / "llm.mnn")
    graph.sharpen_constants(small_values(qwen3 / "onnx" / "decoder.onnx"))
    (found,) = _run_mnn(qwen3 / "packed", [part], {"decoder": graph}, {"decoder": points}, 1, 60)
    for point in points:
        np.testing.assert_allclose(found[point].reshape(wanted[point].shape), wanted[point], atol=1e-5, err_msg=point)


def test_the_engine_answers_as_before(qwen3: Path, tmp_path: Path) -> None:
    np.testing.assert_allclose(*first_logits((qwen3 / "packed", qwen3 / "plain"), tmp_path), atol=1e-4)


def test_what_would_get_lost_is_left_alone(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, vectors = qwen3 / "plain", initializer_values(qwen3 / "onnx" / "decoder.onnx", 1)

    def named(ops: list[dict], name: str) -> dict:
        return next(op for op in ops if op["name"].endswith(name))

    def one_less(ops: list[dict]) -> None:
        """A key that is not normalized."""
        norm = named(ops, "layers.3.self_attn.k_norm")
        reader = next(op for op in ops if norm["outputIndexes"][0] in op.get("inputIndexes", []))
        reader["inputIndexes"] = norm["inputIndexes"]
        ops.remove(norm)

    def shifted(ops: list[dict]) -> None:
        """A normalization that takes the mean away."""
        named(ops, "layers.1.self_attn.q_norm")["main"]["useRMSNorm"] = False

    def crossed(ops: list[dict]) -> None:
        """The key's normalization reads the query."""
        key, query = (named(ops, f"layers.1.self_attn.{name}_norm") for name in "kq")
        key["inputIndexes"] = query["inputIndexes"]

    def subtracted(ops: list[dict]) -> None:
        named(ops, "deepstack_1/added")["main"]["opType"] = "SUB"

    def elsewhere(ops: list[dict]) -> None:
        """Added to another layer's output."""
        other = named(ops, "deepstack_0/added")["inputIndexes"][0]
        named(ops, "deepstack_1/added")["inputIndexes"][0] = other

    for change in (one_less, shifted, crossed, subtracted, elsewhere):
        assert not edited(plain, change, vectors), change.__name__
    for name, other in (("DEEPSTACK", "another"), ("ROTARY_NORMS", ())):
        with monkeypatch.context() as patch:
            patch.setattr(packing, name, other)
            assert not edited(plain, lambda _: None, vectors), name
    assert edited(plain, lambda _: None, vectors)
