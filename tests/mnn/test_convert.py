"""MNN's converter says "Success" and exits 0 whatever happened: each of its traps is set here, and must be seen."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from hf2mnn.core.errors import ConversionError, ExportError
from hf2mnn.machine.child import environment
from hf2mnn.mnn import convert
from hf2mnn.mnn.bundle import convert_decoder, convert_vision
from hf2mnn.mnn.convert import WeightFormat, convert_onnx, read_graph, run_converter, write_graph
from hf2mnn.mnn.graph import Graph, prove_size, prove_weights
from support import REPOSITORY

LAYERS = 2


def stored(folder: Path, name: str = "llm.mnn") -> dict[str, bytes]:
    return {suffix: (folder / f"{name}{suffix}").read_bytes() for suffix in ("", ".weight")}


def edited(onnx_folder: Path, folder: Path, edit: Callable[[onnx.GraphProto], None]) -> Path:
    """A copy of the graphs with the decoder's changed."""
    shutil.copytree(onnx_folder, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    edit(model.graph)
    onnx.save(model, folder / "decoder.onnx")
    return folder


def insert(after: str, op: str, *extra: str) -> Callable[[onnx.GraphProto], None]:
    """Put an op behind the value `after`."""

    def edit(graph: onnx.GraphProto) -> None:
        index, node = next((i, node) for i, node in enumerate(graph.node) if node.output[0] == after)
        node.output[0] = f"{after}_before"
        graph.node.insert(index + 1, helper.make_node(op, [f"{after}_before", *extra], [after]))

    return edit


def turn(name: str) -> Callable[[onnx.GraphProto], None]:
    """Swap the two inputs of a node: the same numbers, another chain."""

    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.output[0] == name)
        node.input[:] = node.input[::-1]

    return edit


# Attention


def test_a_decoder_comes_out_fused_and_asks_for_what_the_engine_feeds(onnx_folder: Path, tmp_path: Path) -> None:
    """The tensors that `llm.cpp` looks up by name, and nothing that it does not feed."""
    convert_decoder(onnx_folder, tmp_path, LAYERS, WeightFormat())
    graph = read_graph(tmp_path / "llm.mnn")
    assert sorted(graph.inputs) == ["attention_mask", "input_ids", "logits_index", "position_ids"]
    assert graph.outputs == ["logits"]
    assert [op["main"]["kv_cache"] for op in graph.of_type("Attention")] == [True] * LAYERS
    assert not graph.of_type("Softmax")


def test_without_the_fuse_option_the_sentence_says_so(onnx_folder: Path, tmp_path: Path) -> None:
    """The engine would stop at its first question with "past_key_values tensor is input but not found"."""
    with pytest.raises(ConversionError, match=r"still asks for past_key_values.* 0 of 2 .*--transformerFuse"):
        convert_decoder(onnx_folder, tmp_path, LAYERS, WeightFormat(), fuse=False)


@pytest.mark.parametrize(
    "edit",
    [
        turn("attention_1/masked"),
        turn("attention_0/scaled"),
        insert("attention_1/scaled", "Mul", "attention_1/scale"),
        insert("attention_0/weights", "Relu"),
        insert("attention_1/present_key", "Relu"),
        insert("attention_1/value_heads", "Relu"),
    ],
    ids=["mask first", "scale first", "scaled twice", "weights changed", "cached key changed", "value changed"],
)
def test_one_attention_that_is_not_the_chain_is_noticed(
    onnx_folder: Path, tmp_path: Path, edit: Callable[[onnx.GraphProto], None]
) -> None:
    """The converter prints success, cuts the past off that layer, and the bundle forgets the prompt in it."""
    spoilt = edited(onnx_folder, tmp_path / "onnx", edit)
    with pytest.raises(ConversionError, match="1 of 2 attentions fused"):
        convert_decoder(spoilt, tmp_path, LAYERS, WeightFormat())


def test_a_decoder_with_fewer_layers_than_the_model_is_noticed(onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="2 of 3 attentions fused"):
        convert_decoder(onnx_folder, tmp_path, LAYERS + 1, WeightFormat())


# Weights


FORMATS = [WeightFormat(bits, block) for bits in range(2, 9) for block in (0, 64)]
FORMATS += [WeightFormat(4, 32), WeightFormat(4, 128), WeightFormat(8, 32), WeightFormat(3, 128)]
FORMATS += [WeightFormat(bits, block, symmetric=True) for bits, block in ((2, 64), (4, 64), (4, 128), (8, 0))]
FORMATS += [WeightFormat(4, 64, scale_bits=32), WeightFormat(4, 64, method="hqq"), WeightFormat(16), WeightFormat()]


@pytest.mark.parametrize("weights", FORMATS, ids=lambda w: "-".join(str(value) for value in vars(w).values()))
def test_weights_are_stored_as_asked(onnx_folder: Path, tmp_path: Path, weights: WeightFormat) -> None:
    """Bits, block, zero points and scales of every layer; and the bytes on disk, counted by hand, agree.

    The converter takes 16 bits for 8, a bare --weightQuantAsymmetric for its opposite, and an odd block for none.
    """
    convert_decoder(onnx_folder, tmp_path, LAYERS, weights)
    layers = read_graph(tmp_path / "llm.mnn").weights()
    assert len(layers) == 7 * LAYERS + 1
    for layer in layers:
        assert layer.bits == weights.bits
        if weights.bits >= 16:
            size = layer.inputs * layer.outputs * weights.bits // 8
        else:
            block = weights.block or layer.inputs
            # One block a row is one scale a channel.
            assert layer.block == (block if block < layer.inputs else 0)
            assert (layer.symmetric, layer.scale_bits) == (weights.symmetric, weights.scale_bits)
            scales = layer.outputs * (layer.inputs // block) * (1 if weights.symmetric else 2)
            size = layer.inputs * layer.outputs * weights.bits // 8 + scales * weights.scale_bits // 8
        # Biases are float; the header of packed weights lists at most 256 values.
        assert size <= layer.size <= size + 4 * layer.outputs + 512, layer.name


@pytest.mark.parametrize("block", [40, 48, 256])
def test_a_block_that_does_not_fit_is_an_error_and_not_another_block(
    onnx_folder: Path, tmp_path: Path, block: int
) -> None:
    """The converter falls back to one scale a channel without a word: fewer bytes, much worse answers."""
    with pytest.raises(ConversionError, match=rf"128 inputs.* block channel, where 4 bits, block {block} were asked"):
        convert_decoder(onnx_folder, tmp_path, LAYERS, WeightFormat(4, block))


def test_proofs_tell_formats_apart(onnx_folder: Path, tmp_path: Path) -> None:
    """Each thing that was asked for is looked at by itself."""
    convert_decoder(onnx_folder, tmp_path, LAYERS, WeightFormat(4, 64))
    graph = read_graph(tmp_path / "llm.mnn")
    prove_weights(graph, "llm.mnn", 4, 64, False, 16)
    for asked in ((8, 64, False, 16), (4, 32, False, 16), (4, 0, False, 16), (4, 64, True, 16), (4, 64, False, 32)):
        with pytest.raises(ConversionError, match="is stored with 4 bits, block 64"):
            prove_weights(graph, "llm.mnn", *asked)
    size = (tmp_path / "llm.mnn.weight").stat().st_size
    prove_size(graph, "llm.mnn", size)
    with pytest.raises(ConversionError, match="cut short"):
        prove_size(graph, "llm.mnn", graph.external_size() - 1)


def test_the_vision_tower_is_stored_as_asked(onnx_folder: Path, tmp_path: Path) -> None:
    """All but its patch embedding, whose 14 x 14 kernels no block divides: that has one scale a channel."""
    for block in (0, 32):
        convert_vision(onnx_folder, tmp_path, WeightFormat(8, block))
        graph = read_graph(tmp_path / "visual.mnn")
        assert graph.inputs == ["patches", "position_ids", "attention_mask"]
        found = [(layer.bits, layer.block) for layer in graph.weights()]
        assert found == [(8, 0)] * 2 + [(8, block)] * 6
    with pytest.raises(ConversionError, match=r"96 inputs.* block 80 were asked"):
        convert_vision(onnx_folder, tmp_path, WeightFormat(8, 80))


# Bad input


def test_no_model_is_an_error_although_the_converter_exits_0(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage" * 100)
    (tmp_path / "empty.onnx").touch()
    for name in ("garbage.onnx", "empty.onnx", "nowhere.onnx"):
        with pytest.raises(ConversionError, match=f"wrote no model from {name}"):
            convert_onnx(tmp_path / name, tmp_path / "out.mnn", WeightFormat())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.onnx", "garbage.onnx"]


def test_an_op_that_mnn_does_not_have_is_named(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    nodes = [helper.make_node("Conjure", ["x"], ["z"], domain="nowhere"), helper.make_node("Relu", ["z"], ["y"])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "unknown.onnx")
    with pytest.raises(ConversionError, match="Conjure"):
        convert_onnx(tmp_path / "unknown.onnx", tmp_path / "out.mnn", WeightFormat())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.unlink(),
        lambda data: data.write_bytes(data.read_bytes()[:100_000]),
        lambda data: data.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ],
    ids=["missing", "cut short", "LFS pointer"],
)
def test_weights_that_are_not_there_are_an_error(
    onnx_folder: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """The converter puts zeros for what it does not find, and everything else about the model looks right."""
    shutil.copytree(onnx_folder, tmp_path / "onnx")
    data = tmp_path / "onnx" / "model.safetensors"
    data.write_bytes(data.read_bytes())  # no link any more
    spoil(data)
    with pytest.raises(ExportError, match=r"decoder\.onnx reads .* export it again"):
        convert_decoder(tmp_path / "onnx", tmp_path, LAYERS, WeightFormat())


def test_a_file_that_is_no_mnn_model_kills_only_the_converter(tmp_path: Path) -> None:
    """It dies by a segmentation fault; we live and say so."""
    for name, content in {"garbage.mnn": b"garbage" * 1000, "empty.mnn": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=r"died|not a model"):
            read_graph(tmp_path / name)
    with pytest.raises(ConversionError, match=r"there is no MNN model .*nowhere\.mnn"):
        read_graph(tmp_path / "nowhere.mnn")


def test_a_graph_that_cannot_be_built_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConversionError):
        write_graph(Graph({"oplists": 3}), tmp_path / "out.mnn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("os.kill(os.getpid(), 11)", r"died \(signal 11\); its last words: the last word"),
        ("os.abort()", r"died \(signal 6\); its last words: the last word"),
        ("sys.exit(3)", r"died \(exit code 3\)"),
        ("os.kill(os.getpid(), 15)", r"stopped from outside \(signal 15\)"),
        ("print('Converted Success!')", r"wrote no model from decoder\.onnx: the last word / Converted Success!"),
    ],
    ids=["segmentation fault", "abort", "exit code", "stopped", "an error and exit code 0"],
)
def test_however_the_converter_ends_it_is_one_sentence(
    onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    monkeypatch.setattr(convert, "CALL", f"import os, sys; print('the last word', flush=True); {body}")
    with pytest.raises(ConversionError, match=says) as failed:
        convert_onnx(onnx_folder / "decoder.onnx", tmp_path / "out.mnn", WeightFormat())
    assert len(str(failed.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_converter_ends_with_who_has_started_it(tmp_path: Path) -> None:
    """Who is killed cannot stop its children; one that went on would write where the next run works."""
    started = tmp_path / "started"
    work = f"open({str(started)!r}, 'w').write(str(sys.argv)); import time; time.sleep(300)"
    call = convert.CALL.replace("_tools.mnnconvert(", f"{work}; print(")
    program = f"""
from pathlib import Path
from hf2mnn.mnn import convert
convert.CALL = {call!r}
convert.run_converter([], Path({str(tmp_path)!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment())
    until = time.monotonic() + 60
    while not started.exists() and time.monotonic() < until:
        time.sleep(0.02)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone == [child] or child.status() == psutil.STATUS_ZOMBIE


def test_a_conversion_that_takes_too_long_is_stopped(onnx_folder: Path, tmp_path: Path) -> None:
    arguments = ["-f", "ONNX", "--modelFile", str(onnx_folder / "decoder.onnx"), "--MNNModel", "model.mnn"]
    with pytest.raises(ConversionError, match=r"stopped after .*decoder\.onnx"):
        run_converter(arguments, tmp_path, time_limit=0.01)


# Repeatable, apart from each other, and quiet


def test_conversions_at_once_are_those_made_one_by_one(
    onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter stages weights in its working directory; two in one corrupt each other, sizes right.

    And the bytes are the same each time, nothing is left beside them, or where the program was started.
    """
    monkeypatch.chdir(tmp_path)
    formats = [WeightFormat(), WeightFormat(8, 64), WeightFormat(4, 32), WeightFormat(4, 64), WeightFormat(3)]
    places = [tmp_path / f"{when}{index}" for when in ("alone", "together") for index in range(len(formats))]
    for place in places:
        place.mkdir()

    def convert(place: Path, weights: WeightFormat) -> dict[str, bytes]:
        convert_decoder(onnx_folder, place, LAYERS, weights)
        return stored(place)

    alone = [convert(*pair) for pair in zip(places, formats, strict=False)]
    with ThreadPoolExecutor(len(formats)) as pool:
        together = list(pool.map(convert, places[len(formats) :], formats))
    assert [made == twin for made, twin in zip(alone, together, strict=True)] == [True] * len(formats)
    assert len({made[".weight"] for made in alone}) == len(formats)
    assert sorted(tmp_path.iterdir()) == sorted(places)
    assert all(sorted(path.name for path in place.iterdir()) == ["llm.mnn", "llm.mnn.weight"] for place in places)


def test_many_into_one_folder_at_once(onnx_folder: Path, tmp_path: Path) -> None:
    """The decoder and the vision tower of one bundle may be made at the same time."""
    with ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(convert_decoder, onnx_folder, tmp_path, LAYERS, WeightFormat()),
            pool.submit(convert_vision, onnx_folder, tmp_path, WeightFormat()),
        ]
        assert [future.result() for future in made] == [None, None]
    names = ["llm.mnn", "llm.mnn.weight", "visual.mnn", "visual.mnn.weight"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def references(path: Path) -> list[str]:
    """Modules that a program imports, and its strings but for docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found.append(node.value)
    return found


def test_the_modules_that_install_and_report_are_never_reached() -> None:
    """`MNN.tools` and the script `mnnconvert` install packages and report usage over the network when imported."""
    paths = [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "workflow").rglob("*.py")]
    assert len(paths) > 20
    told = {path: text for path in paths for text in references(path) if re.search(r"MNN\.tools|mnnconvert", text)}
    # The one way in: the compiled module itself.
    assert [text.count("_tools.mnnconvert(['mnnconvert'") for text in told.values()] == [1]
    assert "MNN.tools" not in "".join(told.values())
    rules = [REPOSITORY / "Snakefile", *(REPOSITORY / "workflow").rglob("*.smk")]
    assert not [path for path in rules if re.search(r"MNN\.tools|mnnconvert", path.read_text())]


@pytest.fixture
def trap(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment whose pip and mnnconvert only write down that they were called."""
    folder, record = tmp_path / "trap", tmp_path / "called"
    folder.mkdir()
    for name in ("pip", "pip3", "mnnconvert"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {record}\nexit 1\n')
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}, record


@pytest.mark.parametrize("name", ["pip", "mnnconvert"])
def test_the_trap_catches_what_it_is_for(trap: tuple[dict[str, str], Path], name: str) -> None:
    """That the next test can fail, shown without importing what must never be imported."""
    environment, record = trap
    subprocess.run(["sh", "-c", f"{name} install something"], env=environment, capture_output=True)
    assert record.read_text() == f"{name} install something\n"


def test_a_conversion_calls_neither_pip_nor_the_script(
    onnx_folder: Path, tmp_path: Path, trap: tuple[dict[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, record = trap
    monkeypatch.setenv("PATH", environment["PATH"])
    (tmp_path / "out").mkdir()
    convert_decoder(onnx_folder, tmp_path / "out", LAYERS, WeightFormat(4, 64))
    assert (tmp_path / "out" / "llm.mnn").is_file()
    assert not record.exists()
