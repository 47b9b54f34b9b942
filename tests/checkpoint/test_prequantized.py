"""Packed checkpoints: every weight is the one that was packed, and what cannot be kept exactly is refused by name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.prequantized import PackedLayers, parse_quantization
from hf2mnn.checkpoint.size import model_size
from hf2mnn.core.errors import CheckpointError
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.reference import model as source_model
from hf2mnn.reference.model import load_config, load_model, place_weights
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from prequantized_layers import Quantized, pack, quantize, settings, write_packed

LAYER = "model.layers.0.self_attn.q_proj"
PARAMETER = "model.language_model.layers.0.self_attn.q_proj.weight"
TEXT = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 1e6, "rope_type": "default"},
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"depth": 1, "embed_dim": 64, "num_heads": 2}
# Between them: both orders, all formats, symmetric or not, groups of all sizes, names and config old and new.
KINDS: dict[str, dict[str, Any]] = {
    "awq": {"kind": "awq", "group": 128},
    "awq, symmetric, a group a row": {"kind": "awq", "group": -1, "symmetric": True, "old": False},
    "gptq": {"kind": "gptq", "group": 64, "symmetric": True},
    "gptq, asymmetric": {"kind": "gptq", "group": 32, "old": False},
    "gptq_v2": {"kind": "gptq_v2", "group": 32},
    "gptq, 8 bits": {"kind": "gptq", "bits": 8, "group": 128, "symmetric": True},
    "gptq_v2, 8 bits, a group a row": {"kind": "gptq_v2", "bits": 8, "group": -1},
}
EXPORTED = ["awq", "gptq, asymmetric"]


@dataclass(frozen=True)
class Written:
    folder: Path
    layers: dict[str, Quantized]
    settings: dict[str, Any]


@pytest.fixture(scope="module", params=KINDS)
def written(
    request: pytest.FixtureRequest, floats: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> Written:
    chosen = {"bits": 4, "symmetric": False, "old": True} | KINDS[request.param]
    folder = tmp_path_factory.mktemp("packed") / "checkpoint"
    return Written(folder, write_packed(floats[chosen["old"]], folder, **chosen), chosen)


@pytest.fixture(scope="module")
def floats(make_checkpoint: Callable[..., Path]) -> dict[bool, Path]:
    """Checkpoints in bfloat16, one with its embedding tied."""
    return {tied: make_checkpoint(text=TEXT, vision=VISION, tied=tied) for tied in (False, True)}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    """Set keys of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_every_weight_is_the_one_that_was_packed(written: Written) -> None:
    checkpoint = Checkpoint(written.folder)
    checkpoint.check()
    assert len(written.layers) == 14
    for parameter, layer in written.layers.items():
        packed, weight = checkpoint.packed(parameter), checkpoint.tensor(parameter)
        assert (packed.bits, packed.group) == (layer.bits, layer.group)
        assert (packed.levels.dtype, packed.zeros.dtype, packed.scales.dtype) == (np.uint8, np.uint8, np.float16)
        np.testing.assert_array_equal(packed.levels, layer.levels)
        np.testing.assert_array_equal(packed.zeros, layer.zeros)
        np.testing.assert_array_equal(packed.scales, layer.scales)
        assert packed.symmetric == written.settings["symmetric"]
        assert checkpoint.find(parameter).endswith(".qweight")
        assert weight.dtype == torch.float32
        assert tuple(weight.shape) == checkpoint.shape(parameter)
        np.testing.assert_array_equal(weight.double().numpy(), layer.weight)
    zeros = np.concatenate([layer.zeros.ravel() for layer in written.layers.values()])
    low, high = int(written.settings["kind"] == "gptq"), 2 ** written.settings["bits"] - 1
    # The check above sees the ends of the range, unless all are in the middle.
    assert written.settings["symmetric"] or (zeros.min() <= low + 3 and zeros.max() >= high - 3)


def test_what_is_not_packed_is_as_it_is_stored(written: Written) -> None:
    checkpoint = Checkpoint(written.folder)
    for parameter in ("model.visual.blocks.0.mlp.fc1.weight", "model.language_model.embed_tokens.weight"):
        assert checkpoint.packed(parameter) is None
        assert checkpoint.tensor(parameter).dtype == torch.float16
        assert checkpoint.find(parameter).endswith(".weight")


def test_settings_are_read(written: Written) -> None:
    wanted, found = written.settings, Checkpoint(written.folder).quantization
    assert found.method == wanted["kind"].removesuffix("_v2")
    assert found.format == ("gemm" if wanted["kind"] == "awq" else wanted["kind"])
    assert (found.bits, found.group, found.symmetric) == (wanted["bits"], wanted["group"], wanted["symmetric"])
    assert not found.act_order
    assert not hasattr(load_config(Checkpoint(written.folder)), "quantization_config")


def test_a_float_checkpoint_has_none(floats: dict[bool, Path]) -> None:
    checkpoint = Checkpoint(floats[True])
    assert checkpoint.quantization is None
    assert checkpoint.packed(PARAMETER) is None


def test_the_reference_is_the_model_of_the_same_weights_in_float(written: Written, tmp_path: Path) -> None:
    """Written out in float32 and loaded by transformers itself: the same parameters, buffers, and way to generate."""
    loaded = load_model(Checkpoint(written.folder))

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]:
            del tensors[name]
        for parameter, layer in written.layers.items():
            name = parameter.replace("language_model.", "") if written.settings["old"] else parameter
            tensors[name] = torch.from_numpy(layer.weight.astype(np.float32))

    folder = tmp_path / "float"
    folder.mkdir()
    for path in written.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit(folder, unpack)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))

    wanted = load_model(Checkpoint(folder))
    assert not loaded.training
    assert loaded.generation_config.to_dict() == wanted.generation_config.to_dict()
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(loaded, kind)()), dict(getattr(wanted, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
    assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) == Checkpoint(folder).tied
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, wanted(input_ids=ids).logits)


def test_packed_layers_are_never_mapped(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(written.folder)
    monkeypatch.setattr(source_model, "available_memory", lambda: 0)
    assert place_weights(checkpoint, "auto") == ("resident", "packed layers are unpacked once")
    with pytest.raises(CheckpointError, match="packed and cannot be mapped"):
        place_weights(checkpoint, "mapped")


@pytest.mark.parametrize("written", EXPORTED, indirect=True)
def test_exported_logits_are_those_of_the_reference(written: Written, tmp_path: Path) -> None:
    onnx = export_onnx(fetch_checkpoint(tmp_path / "checkpoint", written.folder), tmp_path / "onnx")
    model, runtime = load_model(Checkpoint(tmp_path / "checkpoint")), OnnxModel(onnx, threads=1)
    random, grid = np.random.default_rng(0), np.array([1, 4, 6])
    ids = np.array([*random.integers(0, 540, 7), 558, *[561] * 6, 559, *random.integers(0, 540, 5)])
    pixels = random.standard_normal((24, 1176)).astype(np.float32)
    tokens = torch.from_numpy(ids)[None]
    with torch.inference_mode():
        wanted = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=torch.from_numpy(pixels),
            image_grid_thw=torch.from_numpy(grid)[None],
            mm_token_type_ids=(tokens == 561).int(),
        ).logits[0]
    assert wanted.std() > 0.3
    found = runtime.prefill(runtime.new_cache(), ids, [(pixels, grid)], all_logits=True)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4, rtol=0)


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, int, Quantized]:
    """A kind, group_size, and any layer that it can hold."""
    kind = draw(st.sampled_from(["awq", "gptq", "gptq_v2"]))
    bits = 4 if kind == "awq" else draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([16, 32, 48]))
    groups, outputs = draw(st.integers(1, 3)), 8 * draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = random.integers(0, 2**bits, (outputs, groups * group))
    zeros = random.integers(int(kind == "gptq"), 2**bits, (outputs, groups))
    # Any finite float16: subnormal, negative, 0.
    scales = random.integers(0, 0x7C00, (outputs, groups)) | random.integers(0, 2, (outputs, groups)) << 15
    layer = Quantized(levels, zeros, scales.astype(np.uint16).view(np.float16), bits, group)
    return kind, draw(st.sampled_from([group, -1])) if groups == 1 else group, layer


@given(layers())
@hypothesis_settings(max_examples=60, deadline=None)
def test_whatever_was_packed_comes_out(drawn: tuple[str, int, Quantized]) -> None:
    kind, group, layer = drawn
    quantization = parse_quantization(settings(kind, layer.bits, group, False), Path("config.json"))
    with tempfile.TemporaryDirectory() as folder:
        shards = {}
        # A layer may lie in several files.
        for name, tensor in pack(layer, kind).items():
            shards[f"{LAYER}.{name}"] = path = Path(folder) / f"{name}.safetensors"
            save_file({f"{LAYER}.{name}": tensor}, path)
        found = PackedLayers(Path(folder), quantization, shards)
        assert found.names == [LAYER]
        assert found.shape(LAYER) == layer.levels.shape
        found.check()
        read = found.read(LAYER)
    np.testing.assert_array_equal(read.levels, layer.levels)
    np.testing.assert_array_equal(read.zeros, layer.zeros)
    np.testing.assert_array_equal(read.scales.view(np.uint16), layer.scales.view(np.uint16))
    np.testing.assert_array_equal(read.dequantize().astype(np.float64), layer.weight)


@pytest.fixture
def one(checkpoint: Path) -> Callable[[str], Path]:
    """A checkpoint that looks whole as long as it is not run, with one packed layer of 16 outputs and 64 inputs."""

    def make(kind: str, bits: int = 4) -> Path:
        for path in [*checkpoint.glob("*.safetensors"), checkpoint / "model.safetensors.index.json"]:
            path.unlink()
        weight = np.random.default_rng(0).standard_normal((16, 64))
        tensors = pack(quantize(weight, bits, 32, symmetric=True), kind)
        save_file({f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
        configure(checkpoint, **settings(kind, bits, 32, True))
        Checkpoint(checkpoint).check()
        return checkpoint

    return make


def set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        edit(folder, lambda tensors: tensors.update({f"{LAYER}.{name}": change(tensors[f"{LAYER}.{name}"])}))

    return harm


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: [tensors.pop(f"{LAYER}.{name}") for name in names])


def add(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: tensor}))


def say(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: configure(folder, **changes)


def forget_settings(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def forget_order(folder: Path) -> None:
    remove("g_idx")(folder)
    configure(folder, desc_act=True)


def cut_outputs(folder: Path) -> None:
    for name in ("qweight", "scales"):
        set_tensor(name, lambda t: t[:, :12].clone())(folder)
    set_tensor("qzeros", lambda t: t[:, :1].clone())(folder)


def fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 3] = value
        return tensor

    return change


SHUFFLED = torch.randperm(64, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "bitsandbytes": ("awq", say(quant_method="bitsandbytes"), ["'bitsandbytes'", "awq, gptq", "float16"]),
    "fp8": ("gptq", say(quant_method="fp8"), ["'fp8'"]),
    "compressed-tensors": ("gptq", say(quant_method="compressed-tensors"), ["'compressed-tensors'"]),
    "no method": ("gptq", say(quant_method=None), ["quant_method None"]),
    "a method that is no name": ("gptq", say(quant_method=["awq"]), ["quant_method ['awq']"]),
    "gemv": ("awq", say(version="GEMV"), ["awq", "'gemv'", "gemm"]),
    "gemv as newer writers say it": ("awq", say(version=None, format="gemv_fast"), ["'gemv_fast'"]),
    "llm-awq": ("awq", say(backend="llm-awq"), ["'llm-awq'"]),
    "marlin": ("gptq", say(checkpoint_format="marlin"), ["'marlin'", "gptq, gptq_v2"]),
    "3 bits": ("gptq", say(bits=3), ["gptq weights of 3 bits", "4, 8"]),
    "8 bits of awq": ("awq", say(bits=8), ["awq weights of 8 bits"]),
    "bits that are no number": ("awq", say(bits="4"), ["'4' bits"]),
    "no bits": ("awq", say(bits=None), ["None bits"]),
    "groups that are no multiple of 16": ("awq", say(group_size=24), ["groups of 24", "16"]),
    "groups of none": ("awq", say(group_size=0), ["groups of 0"]),
    "groups that are not said": ("gptq", say(group_size=None), ["groups of None"]),
    "no settings": ("awq", forget_settings, [LAYER, "no quantization_config"]),
    "groups that do not divide the inputs": ("awq", say(group_size=48), [LAYER, "64 inputs", "groups of 48"]),
    "other groups than are stored": ("awq", say(group_size=64), [f"{LAYER}.qzeros as [2, 2]", "[1, 2]"]),
    "other bits than are stored": ("gptq", say(bits=8), [LAYER, "not of one model"]),
    "no scales": ("awq", remove("scales"), [f"{LAYER}.qweight without scales", "download"]),
    "no zero points": ("gptq", remove("qzeros"), [f"{LAYER}.qweight without qzeros"]),
    "no levels": ("gptq", remove("qweight"), [f"{LAYER}.qzeros without qweight"]),
    "a scaled activation": (
        "awq",
        add("model.layers.0.mlp.act.scales", torch.ones(8)),
        ["model.layers.0.mlp.act.scales without qweight and qzeros"],
    ),
    "twice": ("awq", add(f"{LAYER}.weight", torch.ones(16, 64)), [LAYER, "twice"]),
    "levels of another type": ("awq", set_tensor("qweight", torch.Tensor.long), [f"{LAYER}.qweight as I64", "I32"]),
    "levels of 3 dimensions": ("awq", set_tensor("qweight", lambda t: t[..., None].clone()), [f"{LAYER}.qweight as"]),
    "levels of 1 dimension": ("gptq", set_tensor("qweight", lambda t: t[:, 0].clone()), [LAYER, "do not divide"]),
    "zero points cut short": ("gptq", set_tensor("qzeros", lambda t: t[:, :1].clone()), [f"{LAYER}.qzeros as [2, 1]"]),
    "scales cut short": ("awq", set_tensor("scales", lambda t: t[:1].clone()), [f"{LAYER}.scales as [1, 16]"]),
    "order cut short": ("gptq", set_tensor("g_idx", lambda t: t[:32].clone()), [f"{LAYER}.g_idx as [32]"]),
    "outputs that fill no word": ("gptq", cut_outputs, [LAYER, "12 outputs", "words of 8"]),
    "act-order": ("gptq", set_tensor("g_idx", lambda t: t[SHUFFLED].clone()), [LAYER, "act-order", "desc_act"]),
    "act-order of groups": ("gptq_v2", set_tensor("g_idx", lambda t: t.flip(0).clone()), [LAYER, "act-order"]),
    "act-order without its order": ("gptq", forget_order, [LAYER, "act-order"]),
    "scales of NaN": ("awq", set_tensor("scales", fill(np.nan)), [f"{LAYER}.scales", "not finite"]),
    "infinite scales": ("gptq", set_tensor("scales", fill(np.inf)), [f"{LAYER}.scales", "not finite"]),
    "scales in float32": ("gptq", set_tensor("scales", torch.Tensor.float), [f"{LAYER}.scales as F32", "F16 or BF16"]),
    "scales beyond float16": (
        "awq",
        set_tensor("scales", lambda t: fill(1e30)(t.bfloat16())),
        [f"{LAYER}.scales", "bfloat16"],
    ),
    "scales below float16": (
        "gptq",
        set_tensor("scales", lambda t: fill(2.0**-30)(t.bfloat16())),
        [f"{LAYER}.scales", "bfloat16"],
    ),
    "a zero point of 0 less 1": ("gptq", set_tensor("qzeros", lambda t: t | 15), [f"{LAYER}.qzeros", "gptq_v2"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_said(case: str, one: Callable[[str], Path]) -> None:
    kind, harm, says = REFUSED[case]
    folder = one(kind)
    harm(folder)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(folder).check()
    sentence = str(refused.value)
    assert len(sentence.splitlines()) == 1
    assert str(folder) in sentence
    assert [part for part in says if part not in sentence] == [], sentence
    if LAYER in sentence:
        with pytest.raises(CheckpointError) as refused:
            Checkpoint(folder).packed_layers.read(LAYER)
        assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("awq", set_tensor("scales", torch.Tensor.bfloat16)),
        ("gptq", remove("g_idx")),
        ("gptq", say(desc_act=True)),
        ("gptq", say(checkpoint_format=None)),
        ("gptq", say(checkpoint_format=None, format="gptq")),
        ("awq", say(version=None)),
        ("awq", say(version="GEMM")),
        ("awq", say(version=None, zero_point=True, checkpoint_format="gemm")),
    ],
    ids=["bfloat16", "no g_idx", "static groups", "no format", "newer key", "no version", "capitals", "gptqmodel"],
)
def test_other_ways_to_say_the_same_are_read(
    kind: str, change: Callable[[Path], None], one: Callable[[str], Path]
) -> None:
    """Scales are made such that bfloat16 holds them; desc_act with groups of neighbours is AutoGPTQ's static_groups."""
    folder = one(kind)
    set_tensor("scales", lambda t: t.bfloat16().half())(folder)
    wanted = Checkpoint(folder).packed(PARAMETER)
    change(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    found = checkpoint.packed(PARAMETER)
    assert found.scales.dtype == np.float16
    np.testing.assert_array_equal(found.dequantize(), wanted.dequantize())
    assert np.abs(found.dequantize()).max() > 1


def test_biases_that_are_zero_are_dropped_and_others_are_not(floats: dict[bool, Path], tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias; were one of them used, nothing would say that it is lost."""
    folder, bias = tmp_path / "packed", "model.layers.1.mlp.down_proj.bias"
    write_packed(floats[True], folder, "gptq")
    assert bias in load_file(folder / "model.safetensors")
    assert "model.language_model.layers.1.mlp.down_proj.bias" not in load_model(Checkpoint(folder)).state_dict()
    edit(folder, lambda tensors: tensors[bias].__setitem__(5, 0.5))
    with pytest.raises(CheckpointError, match=rf"{bias}, which is not zero".replace(".", r"\.")):
        load_model(Checkpoint(folder))


def test_weights_of_another_model_are_refused(floats: dict[bool, Path], tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    write_packed(floats[True], folder, "awq")
    whole = load_file(folder / "model.safetensors")
    for harm, says in (
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}), r"model\.norm\.weight as \[64\]"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"no weight for model\.language_model\.norm\.weight"),
        (
            lambda tensors: tensors.update(
                {
                    name: tensors[name.replace("k_proj", "q_proj")].clone()
                    for name in tensors
                    if "layers.0.self_attn.k" in name
                }
            ),
            r"layers\.0\.self_attn\.k_proj\.\w+ as \[128",
        ),
    ):
        save_file(whole, folder / "model.safetensors")
        edit(folder, harm)
        Checkpoint(folder).check()
        with pytest.raises(CheckpointError, match=says):
            load_model(Checkpoint(folder))


def test_memory_is_planned_for_unpacked_weights(floats: dict[bool, Path], tmp_path: Path) -> None:
    """Stages hold weights in float32: what is asked of a cluster must not shrink with the file."""
    wanted = model_size(str(floats[True]), None).weights
    for kind, bits in (("awq", 4), ("gptq", 8)):
        folder = tmp_path / kind
        write_packed(floats[True], folder, kind, bits=bits)
        assert model_size(str(folder), None).weights == pytest.approx(wanted, rel=0.1)
        assert (folder / "model.safetensors").stat().st_size < 0.9 * 2 * wanted
    configure(folder, quant_method="fp8")
    assert not model_size(str(folder), None).known
