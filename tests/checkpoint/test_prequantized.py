"""AWQ and GPTQ checkpoints: weights are read exactly, and layers that cannot be converted exactly are refused."""

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

from hf2mnn.checkpoint.architecture import load_config
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.prequantized import PrequantizedLayers, Quantization
from hf2mnn.checkpoint.size import model_size
from hf2mnn.checkpoint.tensors import layout
from hf2mnn.checkpoint.weight_files import INDEX
from hf2mnn.core.errors import CheckpointError
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.reference import model as reference_model
from hf2mnn.reference.model import choose_weight_storage, load_model
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from prequantized_layers import Quantized, pack, quantize, settings, write_prequantized

LAYER = "model.layers.0.self_attn.q_proj"
PARAMETER = "model.language_model.layers.0.self_attn.q_proj.weight"
# Together: both orders, all formats, symmetric or not, groups of all sizes, old and new names and config.
KINDS: dict[str, dict[str, Any]] = {
    "awq": {"kind": "awq", "group": 128},
    "awq, symmetric, one group per row": {"kind": "awq", "group": -1, "symmetric": True, "old": False},
    "gptq": {"kind": "gptq", "group": 64, "symmetric": True},
    "gptq, asymmetric": {"kind": "gptq", "group": 32, "old": False},
    "gptq_v2": {"kind": "gptq_v2", "group": 32},
    "gptq, 8 bits": {"kind": "gptq", "bits": 8, "group": 128, "symmetric": True},
    "gptq_v2, 8 bits, one group per row": {"kind": "gptq_v2", "bits": 8, "group": -1},
}


@dataclass(frozen=True)
class Written:
    folder: Path
    layers: dict[str, Quantized]
    settings: dict[str, Any]


@pytest.fixture(scope="module", params=KINDS)
def written(
    request: pytest.FixtureRequest, bases: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> Written:
    options = {"bits": 4, "symmetric": False, "old": True} | KINDS[request.param]
    folder = tmp_path_factory.mktemp("prequantized") / "checkpoint"
    return Written(folder, write_prequantized(bases[options["old"]], folder, **options), options)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    """Set keys of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_are_read_exactly(written: Written) -> None:
    checkpoint = Checkpoint(written.folder)
    checkpoint.check()
    assert len(written.layers) == 14
    for parameter, layer in written.layers.items():
        linear, weight = checkpoint.prequantized(parameter), checkpoint.tensor(parameter)
        assert (linear.bits, linear.group) == (layer.bits, layer.group)
        assert (linear.q.dtype, linear.zero_points.dtype, linear.scales.dtype) == (np.uint8, np.uint8, np.float16)
        np.testing.assert_array_equal(linear.q, layer.q)
        np.testing.assert_array_equal(linear.zero_points, layer.zero_points)
        np.testing.assert_array_equal(linear.scales, layer.scales)
        assert linear.symmetric == written.settings["symmetric"]
        assert checkpoint.find(parameter).endswith(".qweight")
        assert weight.dtype == torch.float32
        np.testing.assert_array_equal(weight.double().numpy(), layer.weight)
    zero_points = np.concatenate([layer.zero_points.ravel() for layer in written.layers.values()])
    low, high = int(written.settings["kind"] == "gptq"), 2 ** written.settings["bits"] - 1
    # The zero points cover the range, unless all are in the middle.
    assert written.settings["symmetric"] or (zero_points.min() <= low + 3 and zero_points.max() >= high - 3)


def test_other_weights_keep_their_dtype(written: Written) -> None:
    checkpoint = Checkpoint(written.folder)
    for parameter in ("model.visual.blocks.0.mlp.fc1.weight", "model.language_model.embed_tokens.weight"):
        assert checkpoint.prequantized(parameter) is None
        assert checkpoint.tensor(parameter).dtype == torch.float16
        assert checkpoint.find(parameter).endswith(".weight")


def test_settings_are_read(written: Written) -> None:
    expected, quantization = written.settings, Checkpoint(written.folder).quantization
    assert quantization.method == expected["kind"].removesuffix("_v2")
    assert quantization.format == ("gemm" if expected["kind"] == "awq" else expected["kind"])
    assert (quantization.bits, quantization.group) == (expected["bits"], expected["group"])
    assert not quantization.act_order
    assert not hasattr(load_config(Checkpoint(written.folder)), "quantization_config")


def test_floating_point_checkpoint_has_no_quantization(bases: dict[bool, Path]) -> None:
    checkpoint = Checkpoint(bases[True])
    assert checkpoint.quantization is None
    assert checkpoint.prequantized(PARAMETER) is None


def test_reference_equals_the_dequantized_model(written: Written, tmp_path: Path) -> None:
    """Transformers loads the float32 weights to equal parameters, buffers and generation settings."""
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

    expected = load_model(Checkpoint(folder))
    assert not loaded.training
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    for kind in ("named_parameters", "named_buffers"):
        actual, reference = dict(getattr(loaded, kind)()), dict(getattr(expected, kind)())
        assert actual.keys() == reference.keys()
        for name, tensor in reference.items():
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor), name
    assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) == Checkpoint(folder).tied
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("written", ["awq"], indirect=True)
def test_prequantized_weights_are_never_mapped(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(written.folder)
    monkeypatch.setattr(reference_model, "available_memory", lambda: 0)
    assert choose_weight_storage(checkpoint, "auto") == ("resident", "prequantized layers are dequantized once")
    with pytest.raises(CheckpointError, match=r"prequantized layers of .* cannot be mapped"):
        choose_weight_storage(checkpoint, "mapped")


@pytest.mark.parametrize("written", ["awq"], indirect=True)
def test_exported_logits_equal_the_reference(written: Written, tmp_path: Path) -> None:
    onnx = export_onnx(fetch_checkpoint(tmp_path / "checkpoint", written.folder), tmp_path / "onnx")
    model, runtime = load_model(Checkpoint(tmp_path / "checkpoint")), OnnxModel(onnx, threads=1)
    random, grid = np.random.default_rng(0), np.array([1, 4, 6])
    ids = np.array([*random.integers(0, 540, 7), 558, *[561] * 6, 559, *random.integers(0, 540, 5)])
    pixels = random.standard_normal((24, 1176)).astype(np.float32)
    tokens = torch.from_numpy(ids)[None]
    with torch.inference_mode():
        expected = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=torch.from_numpy(pixels),
            image_grid_thw=torch.from_numpy(grid)[None],
            mm_token_type_ids=(tokens == 561).int(),
        ).logits[0]
    assert expected.std() > 0.3
    logits = runtime.prefill(runtime.new_cache(), ids, [(pixels, grid)], all_logits=True)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4, rtol=0)


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, int, Quantized]:
    """Draw a kind, a group_size, and a layer that it can hold."""
    kind = draw(st.sampled_from(["awq", "gptq", "gptq_v2"]))
    bits = 4 if kind == "awq" else draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([16, 32, 48]))
    groups, outputs = draw(st.integers(1, 3)), 8 * draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    q = random.integers(0, 2**bits, (outputs, groups * group))
    zero_points = random.integers(int(kind == "gptq"), 2**bits, (outputs, groups))
    # Any finite float16: subnormal, negative, 0.
    scales = random.integers(0, 0x7C00, (outputs, groups)) | random.integers(0, 2, (outputs, groups)) << 15
    layer = Quantized(q, zero_points, scales.astype(np.uint16).view(np.float16), bits, group)
    return kind, draw(st.sampled_from([group, -1])) if groups == 1 else group, layer


@given(layers())
@hypothesis_settings(max_examples=30, deadline=None)
def test_any_layer_is_read_exactly(drawn: tuple[str, int, Quantized]) -> None:
    kind, group, layer = drawn
    quantization = Quantization.parse(settings(kind, layer.bits, group, False), Path("config.json"))
    with tempfile.TemporaryDirectory() as folder:
        stored = {}
        # The tensors of a layer may be in several files.
        for name, tensor in pack(layer, kind).items():
            save_file({f"{LAYER}.{name}": tensor}, Path(folder) / f"{name}.safetensors")
            stored |= layout(Path(folder) / f"{name}.safetensors")
        layers = PrequantizedLayers(Path(folder), quantization, stored)
        assert layers.names == [LAYER]
        assert layers.shape(LAYER) == layer.q.shape
        layers.check()
        linear = layers.read(LAYER)
    np.testing.assert_array_equal(linear.q, layer.q)
    np.testing.assert_array_equal(linear.zero_points, layer.zero_points)
    np.testing.assert_array_equal(linear.scales.view(np.uint16), layer.scales.view(np.uint16))
    np.testing.assert_array_equal(linear.dequantize().astype(np.float64), layer.weight)


@pytest.fixture
def one(checkpoint: Path) -> Callable[[str], Path]:
    """Return a function that writes a checkpoint with one prequantized layer of 16 outputs and 64 inputs only."""

    def make(kind: str, bits: int = 4) -> Path:
        for path in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX]:
            path.unlink()
        weight = np.random.default_rng(0).standard_normal((16, 64))
        tensors = pack(quantize(weight, bits, 32, symmetric=True), kind)
        save_file({f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
        configure(checkpoint, **settings(kind, bits, 32, True))
        Checkpoint(checkpoint).check()
        return checkpoint

    return make


def set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit_folder(folder: Path) -> None:
        edit(folder, lambda tensors: tensors.update({f"{LAYER}.{name}": change(tensors[f"{LAYER}.{name}"])}))

    return edit_folder


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: [tensors.pop(f"{LAYER}.{name}") for name in names])


def add(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: tensor}))


def set_keys(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: configure(folder, **changes)


def remove_settings(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def remove_order(folder: Path) -> None:
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
    "bitsandbytes": ("awq", set_keys(quant_method="bitsandbytes"), ["'bitsandbytes'", "awq, gptq", "float16"]),
    "fp8": ("gptq", set_keys(quant_method="fp8"), ["'fp8'"]),
    "compressed-tensors": ("gptq", set_keys(quant_method="compressed-tensors"), ["'compressed-tensors'"]),
    "no method": ("gptq", set_keys(quant_method=None), ["quant_method None"]),
    "a method that is not a string": ("gptq", set_keys(quant_method=["awq"]), ["quant_method ['awq']"]),
    "gemv": ("awq", set_keys(version="GEMV"), ["awq", "'gemv'", "gemm"]),
    "gemv in the newer key": ("awq", set_keys(version=None, format="gemv_fast"), ["'gemv_fast'"]),
    "llm-awq": ("awq", set_keys(backend="llm-awq"), ["'llm-awq'"]),
    "marlin": ("gptq", set_keys(checkpoint_format="marlin"), ["'marlin'", "gptq, gptq_v2"]),
    "3 bits": ("gptq", set_keys(bits=3), ["gptq weights of unsupported 3 bits", "4, 8"]),
    "8 bits of awq": ("awq", set_keys(bits=8), ["awq weights of unsupported 8 bits"]),
    "bits that are not a number": ("awq", set_keys(bits="4"), ["'4' bits"]),
    "no bits": ("awq", set_keys(bits=None), ["None bits"]),
    "groups that are not a multiple of 16": ("awq", set_keys(group_size=24), ["group_size 24", "16"]),
    "empty groups": ("awq", set_keys(group_size=0), ["group_size 0"]),
    "no group size": ("gptq", set_keys(group_size=None), ["group_size None"]),
    "no settings": ("awq", remove_settings, [LAYER, "no quantization_config"]),
    "groups that do not divide the inputs": ("awq", set_keys(group_size=48), [LAYER, "64 inputs", "groups of 48"]),
    "other groups than are stored": ("awq", set_keys(group_size=64), [f"{LAYER}.qzeros has shape [2, 2]", "[1, 2]"]),
    "other bits than are stored": ("gptq", set_keys(bits=8), [LAYER, "not of the same model"]),
    "no scales": ("awq", remove("scales"), [f"{LAYER} has qweight without scales", "download"]),
    "no zero points": ("gptq", remove("qzeros"), [f"{LAYER} has qweight without qzeros"]),
    "no qweight": ("gptq", remove("qweight"), [f"{LAYER} has qzeros without qweight"]),
    "a scaled activation": (
        "awq",
        add("model.layers.0.mlp.act.scales", torch.ones(8)),
        ["model.layers.0.mlp.act has scales without qweight and qzeros"],
    ),
    "twice": ("awq", add(f"{LAYER}.weight", torch.ones(16, 64)), [LAYER, "twice"]),
    "qweight of another dtype": (
        "awq",
        set_tensor("qweight", torch.Tensor.long),
        [f"{LAYER}.qweight has the unsupported dtype I64", "I32"],
    ),
    "qweight of 3 dimensions": (
        "awq",
        set_tensor("qweight", lambda t: t[..., None].clone()),
        [f"{LAYER}.qweight has shape"],
    ),
    "qweight of 1 dimension": ("gptq", set_tensor("qweight", lambda t: t[:, 0].clone()), [LAYER, "do not divide"]),
    "truncated zero points": (
        "gptq",
        set_tensor("qzeros", lambda t: t[:, :1].clone()),
        [f"{LAYER}.qzeros has shape [2, 1]"],
    ),
    "truncated scales": ("awq", set_tensor("scales", lambda t: t[:1].clone()), [f"{LAYER}.scales has shape [1, 16]"]),
    "truncated g_idx": ("gptq", set_tensor("g_idx", lambda t: t[:32].clone()), [f"{LAYER}.g_idx has shape [32]"]),
    "outputs that do not fill a word": ("gptq", cut_outputs, [LAYER, "12 outputs", "words of 8"]),
    "act-order": ("gptq", set_tensor("g_idx", lambda t: t[SHUFFLED].clone()), [LAYER, "act-order", "desc_act"]),
    "act-order of groups": ("gptq_v2", set_tensor("g_idx", lambda t: t.flip(0).clone()), [LAYER, "act-order"]),
    "act-order without g_idx": ("gptq", remove_order, [LAYER, "act-order"]),
    "scales of NaN": ("awq", set_tensor("scales", fill(np.nan)), [f"{LAYER}.scales", "not finite"]),
    "infinite scales": ("gptq", set_tensor("scales", fill(np.inf)), [f"{LAYER}.scales", "not finite"]),
    "scales in float32": (
        "gptq",
        set_tensor("scales", torch.Tensor.float),
        [f"{LAYER}.scales has the unsupported dtype F32", "F16 or BF16"],
    ),
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
    "a zero point of 0 - 1": ("gptq", set_tensor("qzeros", lambda t: t | 15), [f"{LAYER}.qzeros", "gptq_v2"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_error_names_layer_and_fault(case: str, one: Callable[[str], Path]) -> None:
    kind, edit_folder, parts = REFUSED[case]
    folder = one(kind)
    edit_folder(folder)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder).check()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    assert [part for part in parts if part not in message] == [], message
    if LAYER in message:
        with pytest.raises(CheckpointError) as error:
            Checkpoint(folder).prequantized_layers.read(LAYER)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("awq", set_tensor("scales", torch.Tensor.bfloat16)),
        ("gptq", remove("g_idx")),
        ("gptq", set_keys(desc_act=True)),
        ("gptq", set_keys(checkpoint_format=None)),
        ("gptq", set_keys(checkpoint_format=None, format="gptq")),
        ("awq", set_keys(version=None)),
        ("awq", set_keys(version="GEMM")),
        ("awq", set_keys(version=None, zero_point=True, checkpoint_format="gemm")),
    ],
    ids=["bfloat16", "no g_idx", "static groups", "no format", "newer key", "no version", "capitals", "gptqmodel"],
)
def test_equivalent_settings_are_read(kind: str, change: Callable[[Path], None], one: Callable[[str], Path]) -> None:
    """bfloat16 can hold these scales; desc_act with consecutive groups is AutoGPTQ's static_groups."""
    folder = one(kind)
    set_tensor("scales", lambda t: t.bfloat16().half())(folder)
    expected = Checkpoint(folder).prequantized_layers.read(LAYER)
    change(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    linear = checkpoint.prequantized_layers.read(LAYER)
    assert linear.scales.dtype == np.float16
    np.testing.assert_array_equal(linear.dequantize(), expected.dequantize())
    assert np.abs(linear.dequantize()).max() > 1


def test_only_zero_biases_are_dropped(bases: dict[bool, Path], tmp_path: Path) -> None:
    """AutoGPTQ writes a bias for every layer; a bias with values must not be lost silently."""
    folder, bias = tmp_path / "prequantized", "model.layers.1.mlp.down_proj.bias"
    write_prequantized(bases[True], folder, "gptq")
    assert bias in load_file(folder / "model.safetensors")
    assert "model.language_model.layers.1.mlp.down_proj.bias" not in load_model(Checkpoint(folder)).state_dict()
    edit(folder, lambda tensors: tensors[bias].__setitem__(5, 0.5))
    with pytest.raises(CheckpointError, match=rf"{bias} is not zero".replace(".", r"\.")):
        load_model(Checkpoint(folder))


def test_weights_of_another_model_are_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    folder = tmp_path / "prequantized"
    write_prequantized(bases[True], folder, "awq")
    whole = load_file(folder / "model.safetensors")
    for change, message in (
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}), r"model\.norm\.weight of shape \[64\]"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"no weight for model\.language_model\.norm\.weight"),
        (
            lambda tensors: tensors.update(
                {
                    name: tensors[name.replace("k_proj", "q_proj")].clone()
                    for name in tensors
                    if "layers.0.self_attn.k" in name
                }
            ),
            r"layers\.0\.self_attn\.k_proj\.\w+ of shape \[128",
        ),
    ):
        save_file(whole, folder / "model.safetensors")
        edit(folder, change)
        Checkpoint(folder).check()
        with pytest.raises(CheckpointError, match=message):
            load_model(Checkpoint(folder))


def test_memory_is_planned_for_dequantized_weights(bases: dict[bool, Path], tmp_path: Path) -> None:
    """Stages hold weights in float32: the memory requested from a cluster must not shrink with the file."""
    expected = model_size(str(bases[True]), None).weights
    for kind, bits in (("awq", 4), ("gptq", 8)):
        folder = tmp_path / kind
        write_prequantized(bases[True], folder, kind, bits=bits)
        assert model_size(str(folder), None).weights == pytest.approx(expected, rel=0.1)
        assert (folder / "model.safetensors").stat().st_size < 0.9 * 2 * expected
    configure(folder, quant_method="fp8")
    assert not model_size(str(folder), None).known
