"""Fuzz tests of every parser of untrusted files.

`make test` tries a few fixed files per parser; `make fuzz` tries 100,000 random ones and prints its seed.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save_file

from hf2mnn.checkpoint.adapter import Adapter
from hf2mnn.checkpoint.facts import chat_template
from hf2mnn.checkpoint.folder import ADAPTER_FILES, Checkpoint, read_json
from hf2mnn.checkpoint.hub.pin import load_pin
from hf2mnn.checkpoint.preflight import (
    check_code,
    check_depth,
    check_features,
    check_files,
    check_images,
    check_pixels,
    check_tokenizer,
)
from hf2mnn.checkpoint.tensors import layout
from hf2mnn.checkpoint.weight_files import weight_files
from hf2mnn.config.load import load_config
from hf2mnn.config.plan import load_plan
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import CONFIG, MODEL_CONFIG
from hf2mnn.mnn.bundle_config import check_paths
from hf2mnn.mnn.graph import Graph
from hf2mnn.mnn.nfc import nfc_replacements
from hf2mnn.mnn.tokenizer import encode_tokenizer
from hf2mnn.onnx.initializers import float_values, stored_initializers
from hf2mnn.quant.blob import Quantized, header, pack, parse_header, parse_sparse, scale_bytes, unpack
from hf2mnn.quant.weights import WeightFile, operators
from hf2mnn.reference.examples import read_examples, read_image
from hostile import VALUES, cases, changed, damaged, json_files, survive
from support import REPOSITORY, SHAPES_VL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the memory limit needs Linux")

ROWS, INPUTS, BLOCK = 4, 32, 16
WEIGHT = Quantized(
    (np.arange(ROWS * INPUTS) % 16 - 8).astype(np.int8).reshape(ROWS, INPUTS),
    np.ones((ROWS, INPUTS // BLOCK), np.float32),
    np.zeros((ROWS, INPUTS // BLOCK), np.float32),
)
BLOB = header(ROWS, INPUTS, INPUTS // BLOCK, 4)[0] + pack(WEIGHT.q, 4)
# Two dimensions, 3 non-zero values, steps of 4 bits, a table of 16 values of 4 bits.
SPARSE = (
    b"\x02\x04\0\x20\0"
    + (3).to_bytes(4, "little")
    + b"\x04"
    + pack(np.array([2, 2, 2], np.int8), 4)
    + b"\x10"
    + np.arange(-8, 8).astype(np.int8).tobytes()
    + pack(np.array([1, 2, 3], np.int8), 4)
)
SCALES = scale_bytes(WEIGHT, 16)
QUANTIZED = {
    "type": 1,
    "readType": ROWS * 2,
    "aMin": 1,
    "aMaxOrBits": 4,
    "quantScale": 1.0,
    "shapeInt32": False,
    "has_scaleInt": False,
    "scaleStorage": "FP16",
}


def convolution(name: str, external: list[int], stored: dict[str, Any] | None, output: int) -> dict[str, Any]:
    common = {"kernelX": 1, "kernelY": 1, "inputCount": INPUTS, "outputCount": ROWS, "group": 1}
    main = {"common": common, "external": external} | ({"quanParameter": stored} if stored else {})
    return {"name": name, "type": "Convolution", "inputIndexes": [0], "outputIndexes": [output], "main": main}


BYTES = BLOB + SCALES + bytes(4 * ROWS)
AFTER = len(BYTES)
GRAPH = {
    "tensorName": ["x", "y", "z", "w"],
    "outputName": ["y"],
    "oplists": [
        {"name": "x", "type": "Input", "outputIndexes": [0], "main": {"dims": [1, 2]}},
        convolution("quantized", [0, len(BLOB), len(SCALES), 4 * ROWS, 0], QUANTIZED, 1),
        convolution("sparse", [AFTER, len(SPARSE), len(SCALES), 4 * ROWS, 0], QUANTIZED | {"type": 2}, 2),
        convolution("float", [0, 4 * ROWS * INPUTS, 4 * ROWS], None, 3),
    ],
}
WEIGHTS = (BYTES + SPARSE + SCALES + bytes(4 * ROWS)).ljust(4 * ROWS * (INPUTS + 1), b"\0")
MANIFEST = {
    "stage": "mnn",
    "hf2mnn": "0",
    "inputs": {"onnx": "ab"},
    "tools": {"MNN": "3.6.1"},
    "settings": {"a": [1]},
    "seconds": 1.5,
    "cpu_seconds": 2,
    "peak_rss_mb": 3,
    "results": {"kld": 0.1},
    "outputs": {"config.json": {"size": 2, "sha256": "0" * 64}},
}
PIN = {
    "hub": "huggingface",
    "repository": "owner/name",
    "revision": "a" * 40,
    "branch": "main",
    "files": {"config.json": {"size": 3, "blob_id": "b" * 40}, "m.safetensors": {"size": 9, "sha256": "c" * 64}},
}
PLAN = {
    "decoder": {"lm_head": {"bits": 8, "block": 64}, "model.layers.0.mlp": {"method": "rtn", "symmetric": True}},
    "vision": {"visual.merger": {"bits": 8, "scale_bits": 16}},
}
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"k_proj": 3},
    "alpha_pattern": {"model.*proj": 8},
    "use_rslora": True,
    "use_dora": False,
    "modules_to_save": ["lm_head"],
    "bias": "none",
    "init_lora_weights": True,
    "base_model_name_or_path": "owner/name",
    "lora_bias": False,
}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
EXAMPLE = {
    "id": "one",
    "category": "count",
    "language": "en",
    "answer": ["2", "two"],
    "metric": "exact",
    "messages": [{"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "How"}]}],
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", autouse=True)
def warm_up() -> None:
    """Load and compile once, so that the first file does not count it."""
    from hf2mnn.checkpoint.architecture import meta_model

    meta_model(Checkpoint(SHAPES_VL))
    unpack(pack(np.zeros(4, np.int8), 4), 4, 4)
    nfc_replacements()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a few tensors, and an image of an evaluation set."""
    folder = tmp_path_factory.mktemp("hostile")
    for path in SHAPES_VL.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    tensors = {f"model.layers.{i}.weight": np.ones((2, 3), np.float32) for i in range(8)}
    save_file(tensors, folder / "model.safetensors")
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "p.png")
    return folder


def folder_without(folder: Path, name: str) -> Path:
    """Return a folder of links to all files except `name`, which the test writes."""
    copy = folder.with_name(f"{folder.name}-{name}")
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != name and not (copy / path.name).exists():
            (copy / path.name).symlink_to(path)
    return copy


def parse_quantized(stored: bytes, count: int, wide: bool) -> np.ndarray:
    head = parse_header(stored, len(stored), count, wide, "layer")
    return head.decode(stored[head.size :], count, "layer")


@cases()
@given(st.binary(max_size=200) | damaged(BLOB), st.sampled_from([ROWS * INPUTS, 0, 1, 1 << 31, 1 << 60]), st.booleans())
def test_quantized_values(stored: bytes, count: int, wide: bool) -> None:
    survive(parse_quantized, stored, count, wide)


@cases()
@given(
    st.binary(max_size=80) | damaged(SPARSE),
    st.sampled_from([ROWS * INPUTS, 0, 1, 1 << 31, 1 << 60, 0xFFFFFFFF**2]),
    st.booleans(),
    st.integers(0, 20),
)
def test_sparse_values(stored: bytes, count: int, wide: bool, scales: int) -> None:
    survive(parse_sparse, stored, np.ones(scales, np.float32), count, wide, "layer")


def read_weights(content: Any, path: Path) -> None:
    graph = Graph.checked(content)
    weights = WeightFile(graph, path)
    for operator in operators(graph):
        weights.rows(operator)
        weights.bias(operator)


@cases()
@given(graph=changed(GRAPH), stored=st.just(WEIGHTS) | st.just(WEIGHTS) | damaged(WEIGHTS))
def test_weight_file_under_any_graph(graph: Any, stored: bytes, folder: Path) -> None:
    path = folder / "llm.mnn.weight"
    path.write_bytes(stored)
    survive(convert_value_errors, read_weights, graph, path)


def convert_value_errors(parse: Any, *arguments: Any) -> None:
    """Raise a ConversionError where `Graph.checked` raises ValueError, as `read_graph` does."""
    from hf2mnn.core.errors import ConversionError

    try:
        Graph.checked(arguments[0])
    except (ValueError, TypeError) as error:
        raise ConversionError(f"no graph ({error})") from None
    parse(*arguments)


@cases()
@given(content=json_files(MANIFEST))
def test_manifest(content: bytes, folder: Path) -> None:
    target = folder_without(folder, "manifest.json")
    (target / "manifest.json").write_bytes(content)
    survive(lambda: Manifest.load(target).verify())


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    described = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
        "__metadata__": {"format": "pt"},
    }
    text = draw(json_files(described))
    length = draw(st.sampled_from([len(text)] * 6 + [0, len(text) + 1, 100_000_001, 1 << 60, (1 << 64) - 1]))
    return length.to_bytes(8, "little") + text + bytes(draw(st.sampled_from([40, 40, 40, 39, 41, 0])))


@cases()
@given(content=tensor_files() | st.binary(max_size=60))
def test_safetensors(content: bytes, folder: Path) -> None:
    target = folder_without(folder, "model.safetensors")
    (target / "model.safetensors").write_bytes(content)
    survive(layout, target / "model.safetensors")
    checkpoint = Checkpoint(target)
    survive(lambda: (checkpoint.headers, checkpoint.shapes(), checkpoint.prequantized_layers.check()))


@cases()
@given(
    content=json_files(
        {
            "metadata": {"total_size": 1},
            "weight_map": {f"model.layers.{i}.weight": "model.safetensors" for i in range(8)},
        }
    )
)
def test_index(content: bytes, folder: Path) -> None:
    target = folder_without(folder, INDEX)
    (target / INDEX).write_bytes(content)
    survive(lambda: weight_files({INDEX}, lambda name: read_json(target / name), target))


def read_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checks = (check_files, check_code, Checkpoint.check, check_depth, check_features, check_images, check_pixels)
    for check in checks:
        check(checkpoint)
    chat_template(folder)


@cases()
@given(
    content=json_files(json.loads((SHAPES_VL / "config.json").read_text()) | {"quantization_config": {"bits": 4}})
    | json_files(json.loads((SHAPES_VL / "config.json").read_text()))
)
def test_config(content: bytes, folder: Path) -> None:
    target = folder_without(folder, "config.json")
    (target / "config.json").write_bytes(content)
    survive(read_checkpoint, target)


IMAGES = json.loads((SHAPES_VL / "preprocessor_config.json").read_text())
OTHER_SETTINGS = {
    "preprocessor_config.json": IMAGES,
    "processor_config.json": {"image_processor": IMAGES, "processor_class": "Qwen2VLProcessor"},
    "generation_config.json": json.loads((SHAPES_VL / "generation_config.json").read_text()),
    "chat_template.json": {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
@cases(5, 2000)
@given(data=st.data())
def test_other_settings(name: str, data: st.DataObject, folder: Path) -> None:
    target = folder_without(folder, name)
    (target / name).write_bytes(data.draw(json_files(OTHER_SETTINGS[name])))
    survive(read_checkpoint, target)


@cases(10, 4000)
@given(content=json_files(json.loads((SHAPES_VL / "tokenizer.json").read_text())))
def test_tokenizer(content: bytes, folder: Path) -> None:
    target = folder_without(folder, "tokenizer.json")
    (target / "tokenizer.json").write_bytes(content)
    survive(encode_tokenizer, target)
    survive(check_tokenizer, Checkpoint(target))


@cases(5, 2000)
@given(
    content=json_files(
        {**json.loads((SHAPES_VL / "tokenizer_config.json").read_text()), "chat_template": [{"name": "default"}]}
    )
)
def test_tokenizer_settings(content: bytes, folder: Path) -> None:
    target = folder_without(folder, "tokenizer_config.json")
    (target / "chat_template.jinja").unlink(missing_ok=True)
    (target / "tokenizer_config.json").write_bytes(content)
    survive(encode_tokenizer, target)


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return Checkpoint(SHAPES_VL)


@cases(10, 2000)
@given(
    settings=st.just(json.dumps(LORA).encode()) | json_files(LORA),
    tensors=st.fixed_dictionaries(
        {"lora_A.weight": st.sampled_from([(2, 256), (2,), (0, 256), ()]), "lora_B.weight": st.just((256, 2))},
        optional={name: st.just((2, 2)) for name in ("lora_B.bias", "base_layer.weight", "weight", "lora_embedding_A")},
    ),
)
def test_adapter(settings: bytes, tensors: dict[str, tuple[int, ...]], folder: Path, base: Checkpoint) -> None:
    target = folder_without(folder, "adapter")
    stored = {f"{QUERY}.{name}": np.ones(shape, np.float32) for name, shape in tensors.items()}
    save_file(stored | {"base_model.model.lm_head.weight": np.ones((640, 256), np.float32)}, target / ADAPTER_FILES[1])
    (target / ADAPTER_FILES[0]).write_bytes(settings)
    survive(lambda: Adapter(target).changes(base))


@cases()
@given(content=json_files(PIN))
def test_pin(content: bytes, folder: Path) -> None:
    path = folder / "pin.json"
    path.write_bytes(content)
    survive(load_pin, path)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
YAML = st.sampled_from(
    [BOMB, "a: &a [*a]", "a: 2001-99-99", "[" * 900, "? [a]\n: b", "!!python/name:os.system x", "a: 0x_"]
)


@st.composite
def yaml_files(draw: st.DrawFn, document: Any) -> bytes:
    match draw(st.integers(0, 4)):
        case 0:
            return draw(YAML).encode() if draw(st.booleans()) else draw(st.binary(max_size=60))
        case 1:
            return draw(damaged(yaml.safe_dump(document).encode()))
        case _:
            return json.dumps(draw(changed(document))).encode()  # JSON is YAML


@cases(10, 4000)
@given(content=yaml_files(PLAN))
def test_plan(content: bytes, folder: Path) -> None:
    path = folder / "plan.yaml"
    path.write_bytes(content)
    survive(load_plan, path)


@cases(5, 2000)
@given(content=yaml_files(yaml.safe_load((REPOSITORY / "config.yaml").read_text())))
def test_configuration(content: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    survive(load_config, path)


@cases()
@given(content=json_files(EXAMPLE))
def test_examples(content: bytes, folder: Path) -> None:
    target = folder_without(folder, "examples.jsonl")
    (target / "examples.jsonl").write_bytes(content)
    survive(read_examples, target)


@pytest.fixture(scope="module")
def images(folder: Path) -> list[bytes]:
    images = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3)).save(folder / f"image.{kind}", kind)
        images.append((folder / f"image.{kind}").read_bytes())
    return images


@cases(10, 4000)
@given(data=st.data())
def test_image(data: st.DataObject, images: list[bytes], folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(images)))))
    survive(read_image, path)


@cases()
@given(
    content=json_files(
        {
            "llm_model": "llm.mnn",
            "llm_weight": "llm.mnn.weight",
            "tokenizer_file": "t",
            "base_dir": "",
            "tmp_path": "tmp",
            "mllm": {"visual_model": "visual.mnn", "thread_num": 4},
            "precision": "low",
        }
    ),
    name=st.sampled_from([CONFIG, MODEL_CONFIG]),
)
def test_bundle_configuration(content: bytes, name: str, folder: Path) -> None:
    target = folder_without(folder, "config.json")
    (target / name).write_bytes(content)
    survive(check_paths, target, (name,))


def graph_with(location: str, offset: str, dims: list[int], kind: int) -> bytes:
    table = TensorProto(name="table", data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset)):
        table.external_data.add(key=key, value=value)
    internal = helper.make_tensor("bias", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph([], "g", [], [], initializer=[table, internal])
    return helper.make_model(graph).SerializeToString()


ONNX_FILES = st.builds(
    graph_with,
    st.sampled_from(["model.safetensors", "../p.png", "/etc/passwd", "", "a\0b"]),
    st.sampled_from(["0", "8", "-1", "x", "1e3", str(1 << 70), ""]),
    st.lists(st.sampled_from([2, 3, 0, -1, 1 << 40, (1 << 63) - 1]), max_size=3),
    st.sampled_from([1, 10, 16, 0, 8, 99]),
)


@cases()
@given(content=ONNX_FILES | damaged(graph_with("model.safetensors", "8", [2, 2], 1)))
def test_onnx(content: bytes, folder: Path) -> None:
    path = folder / "x.onnx"
    path.write_bytes(content)
    survive(stored_initializers, path)
    survive(float_values, path)


def test_valid_files_are_accepted(folder: Path) -> None:
    """The undamaged files of all tests are accepted."""
    assert (parse_quantized(BLOB, ROWS * INPUTS, False) == WEIGHT.q.reshape(-1)).all()
    target = folder_without(folder, "nothing")
    (target / "w").write_bytes(WEIGHTS)
    read_weights(copy.deepcopy(GRAPH), target / "w")
    read_checkpoint(target)
    check_tokenizer(Checkpoint(target))
    assert encode_tokenizer(target)
    texts = {"pin.json": PIN, "plan.yaml": PLAN, "examples.jsonl": EXAMPLE}
    for name, content in texts.items():
        (target / name).unlink(missing_ok=True)
        (target / name).write_text(json.dumps(content))
    assert load_pin(target / "pin.json").repository == "owner/name"
    assert load_plan(target / "plan.yaml").decoder
    assert read_examples(target)[0].images == ["p.png"]
    stored = {f"{QUERY}.lora_A.weight": np.ones((2, 256)), f"{QUERY}.lora_B.weight": np.ones((256, 2))}
    stored["base_model.model.lm_head.weight"] = np.ones((640, 256))
    save_file({name: value.astype(np.float32) for name, value in stored.items()}, target / ADAPTER_FILES[1])
    (target / ADAPTER_FILES[0]).write_text(json.dumps(LORA))
    assert len(Adapter(target).changes(Checkpoint(SHAPES_VL))) == 2
    onnx.load_model_from_string(graph_with("model.safetensors", "8", [2, 2], 1))
    assert VALUES is not None
