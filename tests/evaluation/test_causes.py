"""Each check reports its own fault with the tap point or key, and nothing on right data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import pytest

from hf2mnn.evaluation import causes
from hf2mnn.evaluation.causes import unfused_attention, wrong_embedding, wrong_layers, wrong_settings, wrong_tokens
from hf2mnn.evaluation.layers import COLUMNS
from hf2mnn.mnn.bundle import MODEL_CONFIG
from hf2mnn.mnn.graph import Graph

IMAGE = 9

# Settings


def settings_with(shapes: Path, folder: Path, edit: Callable[[dict[str, Any]], object]) -> list[causes.Finding]:
    facts = json.loads((shapes / "onnx" / "model.json").read_text())
    stored = json.loads((shapes / "bundles" / "fp32" / MODEL_CONFIG).read_text())
    edit(stored)
    (folder / MODEL_CONFIG).write_text(json.dumps(stored))
    return wrong_settings(folder, facts)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [127.5, 127.5, 127.5]),
        ("image_norm", [0.0078, 0.0078, 0.0078]),
        ("image_pad", 562),
        ("is_mrope", False),
        ("attention_mask", "int"),
        ("key_value_shape", [2, 1, 0, 4, 64]),
        ("layer_nums", 3),
    ],
)
def test_a_wrong_setting_is_reported_with_both_values(shapes: Path, tmp_path: Path, key: str, value: Any) -> None:
    right = json.loads((shapes / "bundles" / "fp32" / MODEL_CONFIG).read_text())[key]
    (finding,) = settings_with(shapes, tmp_path, lambda stored: stored.update({key: value}))
    assert (finding.part, finding.point) == ("settings", key)
    assert finding.message == f"{MODEL_CONFIG} has {key} {value}, the checkpoint has {right}"
    (finding,) = settings_with(shapes, tmp_path, lambda stored: stored.pop(key))
    assert finding.point == key


def test_rounded_floats_and_unknown_keys_are_right(shapes: Path, tmp_path: Path) -> None:
    def rewrite(stored: dict[str, Any]) -> None:
        stored["image_mean"] = [round(value, 5) for value in stored["image_mean"]]
        stored["something"] = "else"

    assert settings_with(shapes, tmp_path, rewrite) == []


# Tokenizer


def check_tokens(tokens: dict[str, list[int]], **right: list[int]) -> list[causes.Finding]:
    examples = [SimpleNamespace(id=name, input_ids=np.array(ids)) for name, ids in right.items()]
    return wrong_tokens(SimpleNamespace(examples=lambda: iter(examples)), tokens, IMAGE)


def test_equal_tokens_are_right_and_an_image_is_one_token() -> None:
    assert check_tokens({"a": [1, 2, IMAGE, 3]}, a=[1, 2, IMAGE, IMAGE, IMAGE, 3], other=[5]) == []
    assert check_tokens({"a": [1, 1, 2]}, a=[1, 1, 2]) == []


@pytest.mark.parametrize("shift", [1, -2])
def test_shifted_ids_are_recognized(shift: int) -> None:
    tokens = {name: [token + shift for token in ids] for name, ids in {"a": [3, 7], "b": [4]}.items()}
    (finding,) = check_tokens(tokens, a=[3, 7], b=[4])
    assert finding.part == "tokenizer"
    assert finding.message.endswith(f"for 2 of 2 prompts: every id is shifted by {shift:+d}")


@pytest.mark.parametrize(
    "tokens",
    [{"a": [3, 7], "b": [5, 9]}, {"a": [3, 7], "b": [4]}, {"a": [3, 7], "b": [4, 8, 8]}, {"a": [3, 7], "b": []}],
)
def test_prompts_with_wrong_ids_are_counted_and_the_first_is_named(tokens: dict[str, list[int]]) -> None:
    (finding,) = check_tokens(tokens, a=[3, 7], b=[4, 9])
    assert finding.message.endswith("for 1 of 2 prompts: first in b")


def test_prompts_with_different_shifts_are_not_shifted() -> None:
    (finding,) = check_tokens({"a": [4, 8], "b": [6]}, a=[3, 7], b=[4])
    assert finding.message.endswith("for 2 of 2 prompts: first in a")


# Embedding


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 8)).astype(ml_dtypes.bfloat16)


@pytest.fixture
def embedding(table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], list[causes.Finding]]:
    """Return a function from a stored embedding, read in two blocks, to findings."""

    def check(stored: np.ndarray) -> list[causes.Finding]:
        one, other = stored.astype(np.float32), table.astype(np.float32)
        blocks = [(one[:20], other[:20]), (one[20:], other[20:])]
        monkeypatch.setattr(causes, "embedding_blocks", lambda *_: iter(blocks))
        monkeypatch.setattr(causes, "read_tied", lambda _: None)
        return wrong_embedding(Path(), Path())

    return check


def test_a_right_embedding_has_no_finding(embedding: Callable, table: np.ndarray) -> None:
    assert embedding(table) == []


def test_a_wrong_value_makes_a_wrong_row(embedding: Callable, table: np.ndarray) -> None:
    stored = table.copy()
    stored[[4, 30], [1, 2]] = 0
    (finding,) = embedding(stored)
    assert (finding.part, finding.message) == ("embedding", "2 of 50 rows of the embedding are not the checkpoint's")


@pytest.mark.parametrize("shift", [1, -1, 2, -2])
def test_shifted_rows_are_recognized(embedding: Callable, table: np.ndarray, shift: int) -> None:
    (finding,) = embedding(np.roll(table, -shift, axis=0))
    assert finding.message == (
        "50 of 50 rows of the embedding are not the checkpoint's:"
        f" row i holds token i{shift:+d}'s, the ids are shifted by {abs(shift)}"
    )


def test_rows_of_another_model_are_not_shifted(embedding: Callable, table: np.ndarray) -> None:
    assert "shifted" not in embedding(table[::-1])[0].message


# Attention


def decoder(*caches: bool | None, inputs: tuple[str, ...] = ("input_ids",)) -> Graph:
    """Return a decoder with one attention for each `kv_cache`; None is an attention that is not fused."""
    ops = [{"type": "Input", "name": name, "outputIndexes": [i], "main": {}} for i, name in enumerate(inputs)]
    names = list(inputs)
    for layer, cached in enumerate(caches):
        names.append(f"layers.{layer}.self_attn.context")
        kind = {"type": "MatMul", "main": {}} if cached is None else {"type": "Attention", "main": {"kv_cache": cached}}
        ops.append(kind | {"name": names[-1], "outputIndexes": [len(names) - 1]})
    return Graph({"oplists": ops, "tensorName": names, "outputName": []})


def test_fused_attentions_have_no_finding() -> None:
    assert unfused_attention(decoder(True, True), 2) == []


@pytest.mark.parametrize("caches", [(True, None, True), (True, False, True)])
def test_an_attention_without_cache_is_named(caches: tuple) -> None:
    (finding,) = unfused_attention(decoder(*caches), 3)
    assert (finding.part, finding.point) == ("decoder", "layers.1.self_attn.context")
    assert finding.message == ("2 of 3 attentions are fused with a KV cache; not fused: layers.1.self_attn.context")


def test_a_missing_layer_or_a_cache_input_is_a_finding() -> None:
    (finding,) = unfused_attention(decoder(True, True), 3)
    assert "not fused: unknown" in finding.message
    assert unfused_attention(decoder(True, True, inputs=("input_ids", "past_key_values")), 2)


# Layers


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    sound = dict.fromkeys(COLUMNS, 0.0) | {"probe": "text", "part": "decoder", "operator": "linear layer", "detail": ""}
    sound |= {"tolerance": 0.1, "onnx_tolerance": 0.001}
    return pd.DataFrame([sound | {"order": order, "point": f"p{order}"} | row for order, row in enumerate(rows)])


def test_points_within_tolerance_are_right_at_any_accumulated_error() -> None:
    """The accumulated error comes from layers before; a point without a value is not measured."""
    assert wrong_layers(frame({"mnn_error": 5.0, "local_error": 0.1}, {"local_error": np.nan})) == []
    assert wrong_layers(pd.DataFrame(columns=COLUMNS)) == []


def test_a_point_out_of_tolerance_is_named_with_its_detail() -> None:
    findings = wrong_layers(frame({}, {"local_error": 0.25}, {"local_error": 9.0, "detail": "it gives only zeros"}))
    assert [(finding.part, finding.point) for finding in findings] == [("decoder", "p1"), ("decoder", "p2")]
    assert findings[0].message == "p1 (linear layer): its values are off by 0.25 of their size"
    assert findings[1].message == "p2 (linear layer): it gives only zeros"


def test_the_first_points_are_named_and_the_others_counted() -> None:
    """Points are in the order of computation, each once for both probes."""
    bad = [{"local_error": 1.0} for _ in range(5)]
    rows = [
        row | {"probe": probe, "order": o, "point": f"p{o}"} for probe in ("image", "text") for o, row in enumerate(bad)
    ]
    findings = wrong_layers(frame(*reversed(rows)))
    assert [finding.point for finding in findings] == ["p0", "p1", "p2", None]
    assert findings[-1].message == "2 more tap points of the decoder exceed their tolerance"


def test_vision_comes_before_the_decoder_and_the_onnx_graph_before_mnn() -> None:
    findings = wrong_layers(
        frame({"local_error": 1.0}, {"part": "vision", "local_error": 1.0}, {"part": "vision", "onnx_error": 0.5})
    )
    assert [finding.part for finding in findings] == ["vision", "vision", "decoder"]
    assert findings[0].message == "the ONNX graph deviates from PyTorch at p2: error 0.5"
