"""The error budget: each source is measured alone, and where there is nothing it says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from hf2mnn.evaluation import error_budget as module
from hf2mnn.evaluation.error_budget import Bench, Run, budget, divergence, exact_embedding
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.reference.golden import Golden
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.reference import run as run_reference
from support import float_bundle

RANDOM = np.random.default_rng(0)
NOISE = {
    name: RANDOM.normal(size=(5, 20)) for name in ("decoder", "vision", "embedding", "low", "packed", "resize", "mnn")
}
RIGHT = RANDOM.normal(size=(5, 20))


class FakeBench:
    """A bundle's logits are PyTorch's and a noise for each thing about it that is not as it should be."""

    def __init__(self, base: Path, noises: dict[str, float]) -> None:
        self.base, self.onnx_folder, self.examples, self.noises = base, base, ["a"], noises
        self.golden = SimpleNamespace(examples=lambda: iter([SimpleNamespace(id="a", logits=RIGHT)]))

    def _with(self, **there: bool) -> dict[str, np.ndarray]:
        return {
            "a": RIGHT + sum(self.noises.get(name, 0) * NOISE[name] for name, is_there in there.items() if is_there)
        }

    def logits(self, run: Run) -> dict[str, np.ndarray]:
        parts = {name: getattr(run, name) != self.base for name in ("decoder", "vision", "embedding")}
        return self._with(mnn=True, low=run.precision == "low", packed=run.memory == "low", resize=run.resize, **parts)

    def with_embedding(self, bundle: Path) -> dict[str, np.ndarray]:
        return self._with(embedding=bundle != self.base)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """From noises by place to the budget by source."""
    base, bundle = tmp_path / "float", tmp_path / "int4"
    for folder, level in ((base, "high"), (bundle, "low")):
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps({"precision": level, "memory": level}))
    monkeypatch.setattr(module, "exact_embedding", lambda *_: False)

    def of(**noises: float) -> dict[str, float]:
        frame = budget(FakeBench(base, noises), bundle)
        assert (frame["positions"] == 5).all()
        return dict(zip(frame["source"], frame["mean_kld"], strict=True))

    return of


SOURCES = {
    "decoder": "decoder weights",
    "vision": "vision weights",
    "embedding": "embedding",
    "packed": "activation quantization",
    "low": "fp16 arithmetic",
    "mnn": "conversion",
    "resize": "image preprocessing",
}


@pytest.mark.parametrize("noise", SOURCES)
def test_each_source_is_measured_alone(sources: Callable[..., dict[str, float]], noise: str) -> None:
    """What is wrong with one thing is not seen in the row of another. How the engine resizes is no part of the total:
    the comparison gives it the checkpoint's images.
    """
    found = sources(**{noise: 0.3})
    expected = kl_divergence(RIGHT, RIGHT + 0.3 * NOISE[noise]).mean()
    rows = {SOURCES[noise], "total"} - ({"total"} if noise == "resize" else set())
    assert {source for source, value in found.items() if value > 1e-12} == rows
    assert [found[row] for row in rows] == pytest.approx([expected] * len(rows))


def test_small_independent_errors_add_up_to_the_whole(sources: Callable[..., dict[str, float]]) -> None:
    found = sources(decoder=0.05, vision=0.05, packed=0.05, low=0.05, embedding=0.05)
    parts = sum(value for source, value in found.items() if source not in ("total", "image preprocessing"))
    assert parts == pytest.approx(found["total"], rel=0.5)


def test_divergence_is_over_positions_not_examples() -> None:
    """An answer of four tokens has four times the weight of one."""
    flat, sharp = np.zeros((4, 3)), np.array([[3.0, 0.0, 0.0]])
    one = {"long": flat, "short": sharp}
    other = {"long": flat, "short": np.zeros((1, 3))}
    assert divergence(one, other) == pytest.approx(kl_divergence(sharp, np.zeros((1, 3)))[0] / 5)


def bench_of(folder: Path, bundle: str = "float") -> Bench:
    return Bench(Golden(folder / "reference"), folder / "bundles" / bundle, folder / "onnx", 1, 60)


def real(folder: Path, bundle: str) -> dict[str, float]:
    frame = budget(bench_of(folder), folder / "bundles" / bundle)
    return dict(zip(frame["source"], frame["mean_kld"], strict=True))


def test_a_float_bundle_of_a_bfloat16_checkpoint_has_no_errors_to_explain(shapes: Path) -> None:
    found = real(shapes, "fp32")
    exact = ("embedding", "vision weights", "decoder weights", "activation quantization", "fp16 arithmetic")
    assert {source: found[source] for source in exact} == dict.fromkeys(exact, 0)
    assert found["conversion"] < 1e-10
    assert found["total"] < 1e-10


def test_a_bundle_of_four_bits_owes_most_to_its_decoders_weights(shapes: Path) -> None:
    found = real(shapes, "int4")
    assert found["embedding"] == 0
    assert found["conversion"] < 1e-10 < found["vision weights"] < 1e-4
    assert found["activation quantization"] > 1e-8
    assert found["decoder weights"] > 0.5 * found["total"] > 1e-5
    parts = sum(value for source, value in found.items() if source not in ("total", "image preprocessing"))
    assert parts == pytest.approx(found["total"], rel=0.5)


SMALL = {
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 10000.0, "rope_type": "default"},
}


def test_an_embedding_that_bfloat16_rounds_is_a_source_of_its_own(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A checkpoint in float32: what its embedding loses is not laid on the conversion."""
    checkpoint = make_checkpoint(text=SMALL, vision={"depth": 1, "embed_dim": 96, "num_heads": 3}, tied=False)
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1 + 1 / 300)
    model.save_pretrained(checkpoint)
    source = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    (tmp_path / "set").mkdir()
    example = {"id": "a", "messages": [{"role": "user", "content": "What is a star?"}]}
    (tmp_path / "set" / "examples.jsonl").write_text(json.dumps(example))
    run_reference(source, tmp_path / "set", tmp_path / "reference", 6, threads=1)
    float_bundle(export_onnx(source, tmp_path / "onnx"), tmp_path / "bundles" / "float")
    assert not exact_embedding(tmp_path / "bundles" / "float", tmp_path / "onnx")
    found = real(tmp_path, "float")
    assert found["embedding"] == pytest.approx(found["total"], rel=1e-2)
    assert found["embedding"] > 1e-9
    assert found["conversion"] < found["embedding"] / 1000
