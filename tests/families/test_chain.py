"""Every family from a checkpoint to answers: PyTorch, ONNX Runtime and MNN's engine side by side.

Small checkpoints of the true architecture, whose sizes differ (`checkpoints.SHAPES`). One of them is tried by `make
test`, all by `make test-families`; Qwen2-VL has more in tests/onnx and tests/mnn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from asking import turn, write_set
from checkpoints import SHAPES, make_small
from hf2mnn.doctor.examine import examine
from hf2mnn.families import FAMILIES, Family
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.mnn.convert import WeightFormat, read_graph
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.quant.variant import Choice
from hf2mnn.reference.golden import Golden
from hf2mnn.stages.convert import run as convert_graphs
from hf2mnn.stages.evaluate import run as evaluate
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import run as quantize
from hf2mnn.stages.reference import run as run_reference

CLOSE = 1e-4
"""Bound on logits whose deviation is about 0.6; what is measured is below 1e-5."""
LENGTH = 8
SIZES = {"wide": (252, 112), "tall": (112, 308), "odd": (200, 75)}
"""Wide and tall are several of Qwen2.5-VL's windows, some of them cut off; odd is resized."""
QUICK = ("llama",)
EVERY = [
    pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name in QUICK else [pytest.mark.slow])])
    for name in sorted(SHAPES)
]


user = partial(turn, SIZES)

TURNS = [
    {"role": "system", "content": "You see shapes."},
    {"role": "user", "content": "红色?"},
    {"role": "assistant", "content": "2"},
]
TEXTS = {
    "text": [{"role": "user", "content": "三角形是什么颜色？"}],
    "turns": [*TURNS, {"role": "user", "content": "and blue? " * 10}],
}
IMAGES = {
    "wide": [user("wide", "How many purple things are there?")],
    "tall": [user("tall", "What is at the bottom left?")],
    "two": [*TURNS, user("odd", "and", "tall", "Which is larger?")],
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation set of texts and images."""
    return write_set(tmp_path_factory.mktemp("asked"), SIZES, {**TEXTS, **IMAGES})


@dataclass(frozen=True)
class Made:
    """A family's stages."""

    family: Family
    folder: Path

    @property
    def golden(self) -> Golden:
        return Golden(self.folder / "reference")

    def summary(self, row: str) -> dict[str, float]:
        return json.loads((self.folder / row / "summary.json").read_text())


@pytest.fixture(scope="module", params=EVERY)
def made(request: pytest.FixtureRequest, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, shape = tmp_path_factory.mktemp(request.param), SHAPES[request.param]
    source = fetch_checkpoint(folder / "checkpoint", make_small(shape, folder / "checkpoint"))
    reference = run_reference(source, asked, folder / "reference", LENGTH, threads=1)
    onnx = export_onnx(source, folder / "onnx")
    base = convert_graphs(onnx, folder / "base")
    for name, bits, settings in (("fp32", 32, EngineSettings()), ("int8", 8, EngineSettings(memory="low"))):
        weights = WeightFormat(bits=bits, block=16 if bits == 8 else 0)
        choice = Choice(weights, WeightFormat(bits=bits), settings)
        bundle = quantize(onnx, base, folder / name, choice, threads=1)
        evaluate(reference, onnx, folder / f"eval-{name}", bundle, threads=1, time_limit=120)
    evaluate(reference, onnx, folder / "eval-onnx", None, threads=1, time_limit=120)
    return Made(FAMILIES[shape.model_type], folder)


@pytest.mark.parametrize("row", ["onnx", "fp32"])
def test_every_logit_and_every_answer_is_pytorchs(made: Made, row: str) -> None:
    """Prefill and cached decode, text and images; an image's embeddings, and what deepstack adds."""
    examples = list(made.golden.examples())
    assert len(examples) == len(TEXTS) + (len(IMAGES) if made.family.sees else 0)
    with safe_open(made.folder / f"eval-{row}" / "logits.safetensors", "np") as tensors:
        for example in examples:
            assert example.logits.std() > 0.3
            np.testing.assert_allclose(tensors.get_tensor(example.id), example.logits, atol=CLOSE, rtol=0)
    summary = made.summary(f"eval-{row}")
    assert summary["greedy_match"] == summary["top1_agreement"] == 1
    assert summary["cache_parity"] < 1e-8
    if made.family.sees:
        assert summary["vision_cosine"] > 0.999999
    else:
        assert summary["vision_cosine"] is None


def test_every_attention_is_fused_and_every_decoder_packed(made: Made) -> None:
    facts = json.loads((made.folder / "onnx" / "model.json").read_text())
    graph = read_graph(made.folder / "fp32" / "llm.mnn")
    assert len(graph.fused) == facts["num_hidden_layers"]
    # SmolLM3 has layers that are not rotated, and is left in the layout that serves all.
    packed = 0 if facts["model_type"] == "smollm3" else facts["num_hidden_layers"]
    assert len(graph.of_type("RoPE")) == packed, "the decoder is not in the engine's own layout"
    assert (made.folder / "fp32" / "visual.mnn").exists() == made.family.sees


def test_eight_bits_are_near(made: Made) -> None:
    summary = made.summary("eval-int8")
    assert summary["fault"] is None
    assert summary["top1_agreement"] >= 0.9
    assert 1e-9 < summary["mean_kld"] < 1e-2
    assert summary["bytes"] < 0.6 * made.summary("eval-fp32")["bytes"]


def test_the_doctor_finds_nothing(made: Made) -> None:
    found = examine(made.folder / "fp32", checkpoint=made.folder / "checkpoint")
    assert [finding.sentence for finding in found] == []


def test_the_engine_as_it_is_called_makes_the_same_prompt_and_tokens(made: Made) -> None:
    """A text-only model by the engine's own class, one that sees by another."""
    summary = made.summary("eval-fp32")
    assert summary["tokenizer_match"] == summary["template_match"] == 1


@pytest.mark.parametrize("made", [one for one in EVERY if one.values == ("qwen3-vl",)], indirect=True)
def test_what_deepstack_adds_is_seen(made: Made) -> None:
    """Without it the comparison above would hold just as well of a model that has none."""
    model = OnnxModel(made.folder / "onnx")
    example = next(example for example in made.golden.examples() if example.id == "wide")
    image = made.golden.image(example.images[0])
    fed = [(image.pixel_values, image.grid_thw)]
    right = model.prefill(model.new_cache(), example.input_ids, fed)
    see = model.see
    model.see = lambda shown: [see(shown)[0], np.zeros_like(see(shown)[1])]
    blind = model.prefill(model.new_cache(), example.input_ids, fed)
    np.testing.assert_allclose(right[-1], example.logits[0], atol=CLOSE)
    assert np.abs(right - blind).max() > 100 * CLOSE
