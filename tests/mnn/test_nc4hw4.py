"""A decoder in the NC4HW4 layout computes the same values with a fifth of the operators."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from checkpoints import SHAPES, make_small
from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation.layers import GraphInputs, OnnxGraph, run_mnn
from hf2mnn.mnn import bundle as bundles
from hf2mnn.mnn import nc4hw4
from hf2mnn.mnn.convert import read_graph, write_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.nc4hw4 import Layout, supports_nc4hw4, to_nc4hw4
from hf2mnn.onnx.deepstack import DEEPSTACK
from hf2mnn.onnx.initializers import small_constants
from hf2mnn.onnx.session import causal_mask
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import float_bundle

LAYERS, TOKENS = 2, [0, 1, 31, 32, 300, 511]
QWEN3 = SHAPES["qwen3-vl"].text
DEEP = 3
"""Layers of Qwen3-VL to whose outputs deepstack adds."""
RELEASE, OLDER = "3.6.1", "3.6.0"


def plain_bundle(onnx: Path, destination: Path) -> Path:
    """Make the float32 bundle that an older release of MNN gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "tool_versions", lambda *_: {"MNN": OLDER})
        return float_bundle(onnx, destination)


@pytest.fixture(scope="module", params=["grouped", "single", "one for all"])
def both(
    request: pytest.FixtureRequest, model_with_heads: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Bundles of one model in NC4HW4 and NCHW, with 2, 4 and 1 heads for keys and values."""
    if request.param == "grouped":
        onnx, bundle = (request.getfixturevalue(name) for name in ("onnx_folder", "bundle"))
    else:
        model = model_with_heads({"single": 4, "one for all": 1}[request.param])
        onnx, bundle = model / "onnx", model / "float"
    return bundle, plain_bundle(onnx, tmp_path_factory.mktemp("plain") / "plain")


def test_a_layer_has_twelve_operators(both: tuple[Path, Path]) -> None:
    graph, plain = (read_graph(bundle / "llm.mnn") for bundle in both)
    counts = {kind: len(graph.of_type(kind)) for kind in ("Convolution", "LayerNorm", "RoPE", "Attention")}
    assert counts == {"Convolution": 7 * LAYERS + 1, "LayerNorm": 2 * LAYERS + 1, "RoPE": LAYERS, "Attention": LAYERS}
    silu = [op for op in graph.of_type("BinaryOp") if op["main"]["opType"] == "MUL_SILU"]
    assert len(silu) == LAYERS
    assert len(graph.of_type("ConvertTensor")) == len(graph.of_type("Reshape")) == 2
    assert len(graph.ops) < len(plain.ops) - 40 * LAYERS


def test_manifests_have_the_layout_and_the_reason(both: tuple[Path, Path]) -> None:
    """Of the graphs and of the bundles."""
    layouts = [
        {"decoder_layout": "NC4HW4"},
        {
            "decoder_layout": "NCHW",
            "layout_reason": f"MNN {OLDER} does not have its operators, MNN {RELEASE} does",
        },
    ]
    for bundle, layout in zip(both, layouts, strict=True):
        results = Manifest.load(bundle.with_name(f"{bundle.name}-graphs")).results
        assert {key: value for key, value in results.items() if key != "tokenizer_differences"} == layout
        assert Manifest.load(bundle).results.items() >= layout.items()


@pytest.mark.parametrize(
    ("release", "supported"),
    [("3.5.0", False), ("3.6.0", False), ("3.6.1", True), ("3.6.1.post1", True), ("3.10.0", True)],
)
def test_only_releases_with_the_operators_get_them(release: str, supported: bool) -> None:
    assert supports_nc4hw4(release) == supported


def first_logits(bundles: tuple[Path, Path], tmp_path: Path) -> list[np.ndarray]:
    logits = []
    for bundle in bundles:
        job = {"bundle": str(bundle), "tokens": TOKENS, "result": str(tmp_path / "logits.npy")}
        run_worker("first_logits", job, 60)
        logits.append(np.load(tmp_path / "logits.npy"))
    return logits


def test_both_layouts_have_the_same_logits(both: tuple[Path, Path], tmp_path: Path) -> None:
    np.testing.assert_allclose(*first_logits(both, tmp_path), atol=1e-4)


def rewrite(plain: Path, change: Callable[[list[dict]], None], vectors: dict[str, np.ndarray] | None = None) -> Layout:
    """Rewrite the graph of a bundle after a change of its operators; a graph that is not rewritten stays unchanged."""
    graph = read_graph(plain / "llm.mnn")
    change(graph.ops)
    before = copy.deepcopy(graph.content)
    layout = to_nc4hw4(graph, vectors or {}, RELEASE)
    assert (layout.name == "NC4HW4") == (graph.content != before) == (not layout.reason)
    return layout


def test_another_structure_is_not_rewritten(both: tuple[Path, Path]) -> None:
    """Another activation, one more normalization, a missing layer, one more factor; each with its reason."""
    plain = both[1]

    def tanh(ops: list[dict]) -> None:
        next(op for op in ops if op["type"] == "UnaryOp" and op["main"]["opType"] == "SILU")["main"]["opType"] = "TANH"

    def normed(ops: list[dict]) -> None:
        norm = next(op for op in ops if op["type"] == "LayerNorm")
        ops.append(copy.deepcopy(norm) | {"name": "model.language_model.layers.0.self_attn.q_norm"})

    def missing(ops: list[dict]) -> None:
        ops.remove(next(op for op in ops if op["name"].endswith("up_proj__matmul_converted")))

    def scaled(ops: list[dict]) -> None:
        """The residual stream times two, as in some families."""
        norm = next(op for op in ops if op["name"].endswith("layers.1.post_attention_layernorm"))
        (source,) = norm["inputIndexes"]
        total = next(op for op in ops if source in op["outputIndexes"])
        total["outputIndexes"], norm["inputIndexes"] = [source], [source]
        ops.insert(ops.index(total) + 1, copy.deepcopy(total) | {"name": "twice", "inputIndexes": [source, source]})

    def headless(ops: list[dict]) -> None:
        for op in ops:
            op["name"] = op["name"].replace("self_attn.q_proj", "self_attn.query")

    def unfused(ops: list[dict]) -> None:
        next(op for op in ops if op["type"] == "Attention")["main"]["kv_cache"] = False

    def renormed(ops: list[dict]) -> None:
        norm = next(op for op in ops if op["type"] == "LayerNorm")
        ops.append(copy.deepcopy(norm) | {"name": "another_norm"})

    layer = "model.language_model.layers"
    reasons = {
        tanh: f"the activation of {layer}.0.mlp.gate_proj is not SiLU",
        normed: "not all queries and keys are normalized",
        missing: f"its layers do not have the usual linear layers, see {layer}.0.mlp.up_proj",
        scaled: "it has 9 operators of type ADD instead of 8",
        headless: "it has no layers with a self_attn.q_proj",
        unfused: "1 of its 2 attentions are fused",
        renormed: "it has 6 normalizations of the stream instead of 5",
    }
    for change, reason in reasons.items():
        assert rewrite(plain, change) == Layout("NCHW", reason)
    assert rewrite(plain, lambda _: None) == Layout("NC4HW4")


def test_an_older_release_gets_no_new_operators(both: tuple[Path, Path]) -> None:
    graph = read_graph(both[1] / "llm.mnn")
    before = copy.deepcopy(graph.content)
    layout = to_nc4hw4(graph, {}, OLDER)
    assert layout == Layout("NCHW", "MNN 3.6.0 does not have its operators, MNN 3.6.1 does")
    assert graph.content == before


def test_a_graph_is_not_rewritten_twice(both: tuple[Path, Path], tmp_path: Path) -> None:
    assert rewrite(Path(shutil.copytree(both[0], tmp_path / "again")), lambda _: None).name == "NCHW"


# Qwen3-VL: normalized queries and keys, and deepstack


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a Qwen3-VL."""
    folder = tmp_path_factory.mktemp("qwen3")
    checkpoint = make_small(SHAPES["qwen3-vl"], folder / "hub")
    export_onnx(fetch_checkpoint(folder / "checkpoint", checkpoint), folder / "onnx")
    float_bundle(folder / "onnx", folder / "nc4hw4")
    plain_bundle(folder / "onnx", folder / "plain")
    return folder


def test_rope_normalizes_and_the_stream_takes_the_sum(qwen3: Path) -> None:
    graph, layers = read_graph(qwen3 / "nc4hw4" / "llm.mnn"), QWEN3["num_hidden_layers"]
    assert len(graph.of_type("LayerNorm")) == 2 * layers + 1
    assert len(dict(graph.rotary_norms)) == 2 * layers
    sums = [op for op in graph.of_type("BinaryOp") if op["main"]["opType"] == "ADD"]
    assert len(sums) == 2 * DEEP + 1
    assert len(graph.ops) < len(read_graph(qwen3 / "plain" / "llm.mnn").ops) - 45 * layers


def test_gamma_is_the_checkpoints_to_the_last_bit(qwen3: Path, tmp_path: Path) -> None:
    """In the graph of the convert stage and in the .mnn file; a graph that is read back from it is rounded."""
    weights = load_file(qwen3 / "checkpoint" / "model.safetensors")
    norms = {name: values for name, values in weights.items() if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert len(norms) == 2 * QWEN3["num_hidden_layers"]
    content = (qwen3 / "nc4hw4" / "llm.mnn").read_bytes()
    stored = dict(read_graph(qwen3 / "nc4hw4-graphs" / "llm.json").rotary_norms)
    for name, values in norms.items():
        assert values.float().numpy().astype("<f4").tobytes() in content, name
        assert stored[name.removesuffix(".weight")]["gamma"] == values.float().tolist()
    graph, exact = read_graph(qwen3 / "nc4hw4" / "llm.mnn"), small_constants(qwen3 / "onnx" / "decoder.onnx")
    name, norm = next(graph.rotary_norms)
    gamma = exact[f"{name}.weight"].tolist()
    assert norm["gamma"] != gamma
    graph.restore_constants(exact, rounded_only=True)
    assert norm["gamma"] == gamma
    # The form of the graph is that of the converter's JSON.
    write_graph(graph, tmp_path / "llm.mnn")
    assert (tmp_path / "llm.mnn").read_bytes() == content


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        pytest.param(7, (7, 192), id="an image"),
        pytest.param(7, (1, 192), id="one token for all"),
        pytest.param(7, (1, 1), id="one number for a text"),
        pytest.param(1, (1, 1), id="one number for a token"),
    ],
)
def test_deepstack_features_are_added(qwen3: Path, tokens: int, shape: tuple[int, int]) -> None:
    """Random numbers where the engine feeds zeros, in every shape that it feeds."""
    random = np.random.default_rng(0)
    embeds = random.standard_normal((tokens, QWEN3["hidden_size"]), np.float32)
    features = random.standard_normal((DEEP, *shape), np.float32)
    shared = {
        "attention_mask": causal_mask(0, tokens),
        "position_ids": np.sort(random.integers(0, 20, (3, tokens)), axis=1).astype(np.int32),
        "logits_index": np.array([0], np.int32),
    }
    past = np.zeros((5, 2, 1, 0, QWEN3["num_key_value_heads"], QWEN3["head_dim"]), np.float32)
    whole = np.array(np.broadcast_to(features, (DEEP, shape[0], QWEN3["hidden_size"])))
    onnx = {"inputs_embeds": embeds[None], "past_key_values": past, DEEPSTACK: whole, **shared}
    inputs = GraphInputs("p", "decoder", onnx, {"input_ids": embeds[:, None], DEEPSTACK: features, **shared})
    points = [f"model.language_model.layers.{layer}" for layer in range(QWEN3["num_hidden_layers"])] + ["logits"]
    expected = OnnxGraph.load(qwen3 / "onnx", "decoder").run(onnx, points, {}, 1)
    graph = read_graph(qwen3 / "nc4hw4" / "llm.mnn")
    graph.restore_constants(small_constants(qwen3 / "onnx" / "decoder.onnx"), rounded_only=True)
    (values,) = run_mnn(qwen3 / "nc4hw4", [inputs], {"decoder": graph}, {"decoder": points}, 1, 60)
    for point in points:
        value = values[point].reshape(expected[point].shape)
        np.testing.assert_allclose(value, expected[point], atol=1e-5, err_msg=point)


def test_both_layouts_of_qwen3_have_the_same_logits(qwen3: Path, tmp_path: Path) -> None:
    np.testing.assert_allclose(*first_logits((qwen3 / "nc4hw4", qwen3 / "plain"), tmp_path), atol=1e-4)


def test_a_decoder_that_would_lose_operators_is_not_rewritten(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, vectors = qwen3 / "plain", small_constants(qwen3 / "onnx" / "decoder.onnx")

    def named(ops: list[dict], name: str) -> dict:
        return next(op for op in ops if op["name"].endswith(name))

    def one_less(ops: list[dict]) -> None:
        """One key is not normalized."""
        norm = named(ops, "layers.3.self_attn.k_norm")
        consumer = next(op for op in ops if norm["outputIndexes"][0] in op.get("inputIndexes", []))
        consumer["inputIndexes"] = norm["inputIndexes"]
        ops.remove(norm)

    def centred(ops: list[dict]) -> None:
        """One normalization subtracts the mean."""
        named(ops, "layers.1.self_attn.q_norm")["main"]["useRMSNorm"] = False

    def crossed(ops: list[dict]) -> None:
        """The normalization of one key reads the query."""
        key, query = (named(ops, f"layers.1.self_attn.{name}_norm") for name in "kq")
        key["inputIndexes"] = query["inputIndexes"]

    def subtracted(ops: list[dict]) -> None:
        named(ops, "deepstack_1/added")["main"]["opType"] = "SUB"

    def elsewhere(ops: list[dict]) -> None:
        """Features are added to the output of another layer."""
        other = named(ops, "deepstack_0/added")["inputIndexes"][0]
        named(ops, "deepstack_1/added")["inputIndexes"][0] = other

    norm = "is not an RMS norm of each head between a projection and its rotation"
    attention = "model.language_model.layers.1.self_attn"
    not_added = "deepstack is not added to the outputs of the first layers"
    reasons = {
        one_less: "not all queries and keys are normalized",
        centred: f"{attention}.q_norm {norm}",
        crossed: f"{attention}.k_norm {norm}",
        subtracted: not_added,
        elsewhere: not_added,
    }
    for change, reason in reasons.items():
        assert rewrite(plain, change, vectors) == Layout("NCHW", reason), change.__name__
    for name, other in (("DEEPSTACK", "another"), ("ROTARY_NORMS", ())):
        with monkeypatch.context() as patch:
            patch.setattr(nc4hw4, name, other)
            assert rewrite(plain, lambda _: None, vectors).name == "NCHW", name
    assert rewrite(plain, lambda _: None, vectors) == Layout("NC4HW4")
