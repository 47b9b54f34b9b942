"""Error budget: each source is measured alone, and a source without error has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from hf2mnn.evaluation.error_budget import BUNDLE, Configuration, Runs, budget, divergence
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.reference.golden import Golden
from hf2mnn.stages.baseline import run as run_baseline
from hf2mnn.stages.convert import run as convert_graphs
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.reference import run as run_reference

RANDOM = np.random.default_rng(0)
NOISE = {
    name: RANDOM.normal(size=(5, 20))
    for name in ("decoder", "vision", "embedding", "precision", "memory", "resize", "mnn")
}
RIGHT = RANDOM.normal(size=(5, 20))


class FakeRuns:
    """Runs whose logits are PyTorch's, plus a noise for each part that differs from the float32 bundle."""

    def __init__(self, base: Path, noises: dict[str, float]) -> None:
        self.base, self.onnx_folder, self.examples, self.noises = base, base, ["a"], noises
        self.golden = SimpleNamespace(examples=lambda: iter([SimpleNamespace(id="a", logits=RIGHT)]))

    def _with(self, **active: bool) -> dict[str, np.ndarray]:
        return {"a": RIGHT + sum(self.noises.get(name, 0) * NOISE[name] for name, added in active.items() if added)}

    @property
    def exact(self) -> Configuration:
        return Runs.exact.fget(self)

    def logits(self, run: Configuration) -> dict[str, np.ndarray]:
        parts = {name: getattr(run, name) != self.base for name in ("decoder", "vision", "embedding")}
        low = {"precision": run.precision == "low", "memory": run.memory == "low"}
        return self._with(mnn=True, resize=run.resize, **low, **parts)

    def is_exact_embedding(self, bundle: Path) -> bool:
        return False

    def with_embedding(self, bundle: Path) -> dict[str, np.ndarray]:
        return self._with(embedding=bundle != self.base)


@pytest.fixture
def sources(tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Return a function from noises by part to the budget by source."""
    base, bundle = tmp_path / "float", tmp_path / "int4"
    for folder, level in ((base, "high"), (bundle, "low")):
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps({"precision": level, "memory": level}))

    def of(**noises: float) -> dict[str, float]:
        frame = budget(FakeRuns(base, noises), bundle)
        assert (frame["positions"] == 5).all()
        return dict(zip(frame["source"], frame["mean_kld"], strict=True))

    return of


SOURCES = {
    "decoder": "decoder weights",
    "vision": "vision weights",
    "embedding": "embedding",
    "memory": "activation quantization",
    "precision": "fp16 arithmetic",
    "mnn": "conversion",
    "resize": "image preprocessing",
}


@pytest.mark.parametrize("noise", SOURCES)
def test_each_source_is_measured_alone(sources: Callable[..., dict[str, float]], noise: str) -> None:
    """A source changes no other row. The engine's resizing is not in the total, which is measured on resized images."""
    values = sources(**{noise: 0.3})
    expected = kl_divergence(RIGHT, RIGHT + 0.3 * NOISE[noise]).mean()
    rows = {SOURCES[noise], "total"} - ({"total"} if noise == "resize" else set())
    assert {source for source, value in values.items() if value > 1e-12} == rows
    assert [values[row] for row in rows] == pytest.approx([expected] * len(rows))


def test_small_independent_errors_add_up_to_the_total(sources: Callable[..., dict[str, float]]) -> None:
    values = sources(decoder=0.05, vision=0.05, memory=0.05, precision=0.05, embedding=0.05)
    parts = sum(value for source, value in values.items() if source not in ("total", "image preprocessing"))
    assert parts == pytest.approx(values["total"], rel=0.5)


def test_divergence_averages_positions_not_examples() -> None:
    """An answer of four tokens has four times the weight of one."""
    flat, sharp = np.zeros((4, 3)), np.array([[3.0, 0.0, 0.0]])
    one = {"long": flat, "short": sharp}
    other = {"long": flat, "short": np.zeros((1, 3))}
    assert divergence(one, other) == pytest.approx(kl_divergence(sharp, np.zeros((1, 3)))[0] / 5)


def runs_of(folder: Path, base: Path, baseline: Path | None = None) -> Runs:
    runs = Runs(Golden(folder / "reference" / "evaluation"), base, folder / "onnx", 1, 60)
    if baseline:
        runs.load_baseline(baseline)
    return runs


def by_source(frame: pd.DataFrame) -> dict[str, float]:
    return dict(zip(frame["source"], frame["mean_kld"], strict=True))


@pytest.fixture(scope="module")
def int4(shapes: Path) -> tuple[Runs, pd.DataFrame]:
    """The runs and the budget of the int4 bundle, without the baseline stage."""
    runs = runs_of(shapes, shapes / "baseline" / BUNDLE)
    return runs, budget(runs, shapes / "bundles" / "int4")


def test_a_float32_bundle_of_a_bfloat16_checkpoint_has_no_errors(shapes: Path) -> None:
    baseline = shapes / "baseline"
    values = by_source(budget(runs_of(shapes, baseline / BUNDLE, baseline), shapes / "bundles" / "fp32"))
    exact = ("embedding", "vision weights", "decoder weights", "activation quantization", "fp16 arithmetic")
    assert {source: values[source] for source in exact} == dict.fromkeys(exact, 0)
    assert values["conversion"] < 1e-10
    assert values["total"] < 1e-10


def test_most_of_the_error_of_4_bits_is_that_of_the_decoder_weights(int4: tuple[Runs, pd.DataFrame]) -> None:
    values = by_source(int4[1])
    assert values["embedding"] == 0
    assert values["conversion"] < 1e-10 < values["vision weights"] < 1e-4
    assert values["activation quantization"] > 1e-8
    assert values["decoder weights"] > 0.5 * values["total"] > 1e-5
    parts = sum(value for source, value in values.items() if source not in ("total", "image preprocessing"))
    assert parts == pytest.approx(values["total"], rel=0.5)


def test_a_budget_with_the_baseline_equals_one_without(
    shapes: Path, int4: tuple[Runs, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs of the baseline stage replace those of the float32 bundle, and only those."""
    alone, expected = int4
    runs = runs_of(shapes, shapes / "baseline" / BUNDLE, shapes / "baseline")
    assert runs._logits.keys() == {alone.exact.key, replace(alone.exact, resize=True).key}
    for key, logits in runs._logits.items():
        assert logits.keys() == alone._logits[key].keys() == set(alone.examples)
        for example, values in logits.items():
            np.testing.assert_array_equal(values, alone._logits[key][example])
    started: list[tuple] = []
    monkeypatch.setattr(Runs, "_run", lambda _, run: started.append(run.key) or alone._logits[run.key])
    runs._tokens |= alone._tokens
    pd.testing.assert_frame_equal(budget(runs, shapes / "bundles" / "int4"), expected)
    assert len(started) == len(set(started)) == len(alone._logits) - 2
    assert runs.tokens(shapes / "bundles" / "int4") == alone.tokens(shapes / "bundles" / "int4") != {}


SMALL = {
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 10000.0, "rope_type": "default"},
}


def test_an_embedding_that_bfloat16_rounds_is_a_source(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a float32 checkpoint's embedding is not that of the conversion.

    The baseline stage keeps its logits, so that no diagnosis computes them again.
    """
    checkpoint = make_checkpoint(text=SMALL, vision={"depth": 1, "embed_dim": 96, "num_heads": 3}, tied=False)
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1 + 1 / 300)
    model.save_pretrained(checkpoint)
    source = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    (tmp_path / "set").mkdir()
    example = {"id": "a", "messages": [{"role": "user", "content": "What is a star?"}]}
    (tmp_path / "set" / "examples.jsonl").write_text(json.dumps(example))
    run_reference(source, tmp_path / "set", tmp_path / "reference" / "evaluation", 6, threads=1)
    onnx = export_onnx(source, tmp_path / "onnx")
    baseline = run_baseline(
        tmp_path / "reference" / "evaluation",
        onnx,
        convert_graphs(onnx, tmp_path / "graphs"),
        tmp_path / "baseline",
        1,
        60,
    )
    runs = runs_of(tmp_path, baseline / BUNDLE, baseline)
    assert not runs.is_exact_embedding(baseline / BUNDLE)
    monkeypatch.setattr(Runs, "_run_onnx", None)
    values = by_source(budget(runs, baseline / BUNDLE))
    assert values["embedding"] == pytest.approx(values["total"], rel=1e-2)
    assert values["embedding"] > 1e-9
    assert values["conversion"] < values["embedding"] / 1000
