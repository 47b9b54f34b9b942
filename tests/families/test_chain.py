"""Every family from a checkpoint to answers, in PyTorch, ONNX Runtime and MNN's engine.

Small checkpoints of the real architectures with different sizes (`checkpoints.SHAPES`): one family in `make test`, all
in `make test-families`. tests/onnx and tests/mnn have more of Qwen2-VL.
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
from hf2mnn.mnn.convert import read_graph
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.variant import Choice
from hf2mnn.reference.golden import Golden
from hf2mnn.stages.convert import run as convert_graphs
from hf2mnn.stages.evaluate import run as evaluate
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import quantize
from hf2mnn.stages.reference import run as run_reference

CLOSE = 1e-4
"""Tolerance of logits whose standard deviation is about 0.6; measured differences are below 1e-5."""
LENGTH = 8
SIZES = {"wide": (252, 112), "tall": (112, 308), "odd": (200, 75)}
"""Wide and tall have several windows of Qwen2.5-VL, some of them cut off; odd is resized."""
QUICK = ("llama",)
EVERY = [
    pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name in QUICK else [pytest.mark.slow])])
    for name in sorted(SHAPES)
]


user = partial(turn, SIZES)

FIRST_TURNS = [
    {"role": "system", "content": "You see shapes."},
    {"role": "user", "content": "红色?"},
    {"role": "assistant", "content": "2"},
]
TEXTS = {
    "text": [{"role": "user", "content": "三角形是什么颜色？"}],
    "turns": [*FIRST_TURNS, {"role": "user", "content": "and blue? " * 10}],
}
IMAGES = {
    "wide": [user("wide", "How many purple things are there?")],
    "tall": [user("tall", "What is at the bottom left?")],
    "two": [*FIRST_TURNS, user("odd", "and", "tall", "Which is larger?")],
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation set of texts and images."""
    return write_set(tmp_path_factory.mktemp("examples"), SIZES, {**TEXTS, **IMAGES})


@dataclass(frozen=True)
class Chain:
    """Stage folders of a family."""

    family: Family
    folder: Path

    @property
    def golden(self) -> Golden:
        return Golden(self.folder / "reference")

    def summary(self, variant: str) -> dict[str, float]:
        return json.loads((self.folder / f"eval-{variant}" / "summary.json").read_text())


@pytest.fixture(scope="module", params=EVERY)
def chain(request: pytest.FixtureRequest, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder, shape = tmp_path_factory.mktemp(request.param), SHAPES[request.param]
    source = fetch_checkpoint(folder / "checkpoint", make_small(shape, folder / "saved"))
    reference = run_reference(source, examples, folder / "reference", LENGTH, threads=1)
    onnx = export_onnx(source, folder / "onnx")
    base = convert_graphs(onnx, folder / "base")
    for name, bits, settings in (("fp32", 32, EngineSettings()), ("int8", 8, EngineSettings(memory="low"))):
        weights = WeightFormat(bits=bits, block=16 if bits == 8 else 0)
        choice = Choice(weights, WeightFormat(bits=bits), settings)
        bundle = quantize(onnx, base, folder / name, choice, threads=1)
        evaluate(reference, onnx, folder / f"eval-{name}", bundle, threads=1, time_limit=120, keep_logits=True)
    evaluate(reference, onnx, folder / "eval-onnx", None, threads=1, time_limit=120, keep_logits=True)
    return Chain(FAMILIES[shape.model_type], folder)


@pytest.mark.parametrize("variant", ["onnx", "fp32"])
def test_logits_and_answers_are_those_of_pytorch(chain: Chain, variant: str) -> None:
    """Prefill and cached decode, text and images, image embeddings and deepstack features."""
    examples = list(chain.golden.examples())
    assert len(examples) == len(TEXTS) + (len(IMAGES) if chain.family.has_vision else 0)
    with safe_open(chain.folder / f"eval-{variant}" / "logits.safetensors", "np") as tensors:
        for example in examples:
            assert example.logits.std() > 0.3
            np.testing.assert_allclose(tensors.get_tensor(example.id), example.logits, atol=CLOSE, rtol=0)
    summary = chain.summary(variant)
    assert summary["greedy_match"] == summary["top1_agreement"] == 1
    assert summary["cache_parity"] < 1e-8
    if chain.family.has_vision:
        assert summary["vision_cosine"] > 0.999999
    else:
        assert summary["vision_cosine"] is None


def test_every_attention_is_fused_and_every_decoder_is_nc4hw4(chain: Chain) -> None:
    facts = json.loads((chain.folder / "onnx" / "model.json").read_text())
    graph = read_graph(chain.folder / "fp32" / "llm.mnn")
    assert len(graph.fused) == facts["num_hidden_layers"]
    # SmolLM3 has layers without RoPE, and keeps the NCHW layout.
    rotated = 0 if facts["model_type"] == "smollm3" else facts["num_hidden_layers"]
    assert len(graph.of_type("RoPE")) == rotated, "the decoder is not in the layout NC4HW4"
    assert (chain.folder / "fp32" / "visual.mnn").exists() == chain.family.has_vision


def test_eight_bits_are_close(chain: Chain) -> None:
    summary = chain.summary("int8")
    assert summary["fault"] is None
    assert summary["top1_agreement"] >= 0.9
    assert 1e-9 < summary["mean_kld"] < 1e-2
    assert summary["bytes"] < 0.6 * chain.summary("fp32")["bytes"]


def test_the_doctor_has_no_findings(chain: Chain) -> None:
    findings = examine(chain.folder / "fp32", checkpoint=chain.folder / "checkpoint").findings
    assert [finding.message for finding in findings] == []


def test_the_engine_has_the_same_prompt_and_tokens(chain: Chain) -> None:
    """The engine has one class for text-only models and another for image input."""
    summary = chain.summary("fp32")
    assert summary["tokenizer_match"] == summary["template_match"] == 1


@pytest.mark.parametrize("chain", [one for one in EVERY if one.values == ("qwen3-vl",)], indirect=True)
def test_deepstack_features_change_the_logits(chain: Chain) -> None:
    """Otherwise the comparison above would pass without them."""
    model = OnnxModel(chain.folder / "onnx")
    example = next(example for example in chain.golden.examples() if example.id == "wide")
    image = chain.golden.image(example.images[0])
    fed = [(image.pixel_values, image.grid_thw)]
    right = model.prefill(model.new_cache(), example.input_ids, fed)
    embed_image = model.embed_image
    model.embed_image = lambda image: [embed_image(image)[0], np.zeros_like(embed_image(image)[1])]
    without = model.prefill(model.new_cache(), example.input_ids, fed)
    np.testing.assert_allclose(right[-1], example.logits[0], atol=CLOSE)
    assert np.abs(right - without).max() > 100 * CLOSE
