"""MNN's converter reports success and exits with 0 after any error: every such case is an error here."""

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

import mnn_quantizer
from hf2mnn.core.errors import ConversionError, ExportError
from hf2mnn.machine.child import child_environment
from hf2mnn.mnn import convert
from hf2mnn.mnn.bundle import GRAPHS, PARTS, convert_decoder, convert_vision
from hf2mnn.mnn.convert import convert_onnx, read_graph, run_converter, write_graph
from hf2mnn.mnn.graph import Graph
from hf2mnn.onnx.initializers import small_constants
from support import REPOSITORY

LAYERS = 2
DECODER_FILES, VISION_FILES = ["llm.json", "llm.weight"], ["visual.json", "visual.weight"]


def changed_onnx(onnx_folder: Path, folder: Path, edit: Callable[[onnx.GraphProto], None]) -> Path:
    """Copy the ONNX graphs with a change of the decoder's."""
    shutil.copytree(onnx_folder, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    edit(model.graph)
    onnx.save(model, folder / "decoder.onnx")
    return folder


def insert(after: str, op: str, *extra: str) -> Callable[[onnx.GraphProto], None]:
    """Insert an operator after the value `after`."""

    def edit(graph: onnx.GraphProto) -> None:
        index, node = next((i, node) for i, node in enumerate(graph.node) if node.output[0] == after)
        node.output[0] = f"{after}_before"
        graph.node.insert(index + 1, helper.make_node(op, [f"{after}_before", *extra], [after]))

    return edit


def swap_inputs(name: str) -> Callable[[onnx.GraphProto], None]:
    """Swap the two inputs of a node, which gives the same numbers."""

    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.output[0] == name)
        node.input[:] = node.input[::-1]

    return edit


# Attention


def test_a_decoder_is_fused_and_has_the_engines_inputs(graphs: Path) -> None:
    """The tensors that `llm.cpp` looks up by name, and no other input."""
    graph = read_graph(graphs / GRAPHS["decoder"][0])
    assert sorted(graph.inputs) == ["attention_mask", "input_ids", "logits_index", "position_ids"]
    assert graph.outputs == ["logits"]
    assert [op["main"]["kv_cache"] for op in graph.of_type("Attention")] == [True] * LAYERS
    assert not graph.of_type("Softmax")


def test_the_error_names_the_missing_fuse_option(onnx_folder: Path, tmp_path: Path) -> None:
    """The engine would stop with "past_key_values tensor is input but not found"."""
    with pytest.raises(ConversionError, match=r"has the input past_key_values.* 0 of 2 .*--transformerFuse"):
        mnn_quantizer.convert_decoder(onnx_folder, tmp_path, LAYERS, fuse=False)


@pytest.mark.parametrize(
    "edit",
    [
        swap_inputs("attention_1/masked"),
        swap_inputs("attention_0/scaled"),
        insert("attention_1/scaled", "Mul", "attention_1/scale"),
        insert("attention_0/weights", "Relu"),
        insert("attention_1/present_key", "Relu"),
        insert("attention_1/value_heads", "Relu"),
    ],
    ids=["mask first", "scale first", "scaled twice", "weights changed", "cached key changed", "value changed"],
)
def test_an_attention_that_is_not_fused_is_an_error(
    onnx_folder: Path, tmp_path: Path, edit: Callable[[onnx.GraphProto], None]
) -> None:
    """The converter prints success and drops the past of that layer."""
    changed = changed_onnx(onnx_folder, tmp_path / "onnx", edit)
    with pytest.raises(ConversionError, match="1 of 2 attentions fused"):
        convert_decoder(changed, tmp_path, LAYERS)


def test_a_decoder_with_fewer_layers_than_the_model_is_an_error(onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="2 of 3 attentions fused"):
        convert_decoder(onnx_folder, tmp_path, LAYERS + 1)


# JSON and .mnn


@pytest.mark.parametrize("part", PARTS)
def test_a_graph_has_the_form_of_the_converters_json(
    graphs: Path, onnx_folder: Path, tmp_path: Path, part: str
) -> None:
    """Keys, their order and defaults: a .mnn file has the same bytes whether its graph was read back in between."""
    once, again = tmp_path / "once.mnn", tmp_path / "again.mnn"
    write_graph(read_graph(graphs / GRAPHS[part][0]), once)
    graph = read_graph(once)
    graph.restore_constants(small_constants(onnx_folder / PARTS[part][1]))
    write_graph(graph, again)
    assert again.read_bytes() == once.read_bytes()


def test_a_saved_graph_is_read_back(graphs: Path, tmp_path: Path) -> None:
    graph = read_graph(graphs / "llm.json")
    graph.save(tmp_path / "llm.json")
    assert (tmp_path / "llm.json").read_bytes() == (graphs / "llm.json").read_bytes()


# Bad input


def test_no_model_is_an_error_although_the_converter_exits_0(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage" * 100)
    (tmp_path / "empty.onnx").touch()
    for name in ("garbage.onnx", "empty.onnx", "nowhere.onnx"):
        with pytest.raises(ConversionError, match=f"wrote no model from {name}"):
            convert_onnx(tmp_path / name, tmp_path / "out.weight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.onnx", "garbage.onnx"]


def test_an_unsupported_operator_is_named(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    nodes = [helper.make_node("Conjure", ["x"], ["z"], domain="nowhere"), helper.make_node("Relu", ["z"], ["y"])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "unknown.onnx")
    with pytest.raises(ConversionError, match="Conjure"):
        convert_onnx(tmp_path / "unknown.onnx", tmp_path / "out.weight")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.unlink(),
        lambda data: data.write_bytes(data.read_bytes()[:100_000]),
        lambda data: data.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ],
    ids=["missing", "truncated", "LFS pointer"],
)
def test_missing_weights_are_an_error(onnx_folder: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """The converter uses zeros, and the rest of the model is as expected."""
    shutil.copytree(onnx_folder, tmp_path / "onnx")
    data = tmp_path / "onnx" / "model.safetensors"
    data.write_bytes(data.read_bytes())  # a copy in place of the link
    damage(data)
    with pytest.raises(ExportError, match=r"of decoder\.onnx ends at byte .* export the graph again"):
        convert_decoder(tmp_path / "onnx", tmp_path, LAYERS)


def test_a_file_that_is_no_mnn_model_crashes_only_the_converter(tmp_path: Path) -> None:
    """The converter has a segmentation fault; this process reports it."""
    for name, content in {"garbage.mnn": b"garbage" * 1000, "empty.mnn": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=r"crashed|not a model"):
            read_graph(tmp_path / name)
    with pytest.raises(ConversionError, match=r"nowhere\.mnn does not exist: give the path of an MNN model"):
        read_graph(tmp_path / "nowhere.mnn")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"oplists": [', "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (b"\xff", "can't decode"),
        (b"[]", "it has no names of tensors"),
        (b'{"tensorName": [], "outputName": [], "oplists": []}', "it has no operators"),
    ],
)
def test_a_json_file_that_is_no_graph_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "llm.json").write_bytes(content)
    with pytest.raises(ConversionError, match=rf"llm\.json is not a valid MNN model \(.*{message}"):
        read_graph(tmp_path / "llm.json")


def test_a_graph_that_cannot_be_built_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConversionError):
        write_graph(Graph({"oplists": 3}), tmp_path / "out.mnn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), 11)", r"crashed \(signal 11\); its last output: the last line"),
        ("os.abort()", r"crashed \(signal 6\); its last output: the last line"),
        ("sys.exit(3)", r"crashed \(exit code 3\)"),
        ("os.kill(os.getpid(), 15)", r"stopped from outside \(signal 15\)"),
        ("print('Converted Success!')", r"wrote no model from decoder\.onnx: the last line / Converted Success!"),
    ],
    ids=["segmentation fault", "abort", "exit code", "stopped", "an error and exit code 0"],
)
def test_every_end_of_the_converter_has_a_message(
    onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    monkeypatch.setattr(convert, "CALL", f"import os, sys; print('the last line', flush=True); {body}")
    with pytest.raises(ConversionError, match=message) as failed:
        convert_onnx(onnx_folder / "decoder.onnx", tmp_path / "out.weight")
    assert len(str(failed.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_converter_ends_with_its_parent(tmp_path: Path) -> None:
    """A killed parent cannot stop its children; one that went on would write to the folder of the next run."""
    started = tmp_path / "started"
    work = f"open({str(started)!r}, 'w').write(str(sys.argv)); import time; time.sleep(300)"
    call = convert.CALL.replace("_tools.mnnconvert(", f"{work}; print(")
    program = f"""
from pathlib import Path
from hf2mnn.mnn import convert
convert.CALL = {call!r}
convert.run_converter([], Path({str(tmp_path)!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], env=child_environment())
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


# Repeatable, isolated and quiet


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_parallel_conversions_have_the_same_bytes(
    onnx_folder: Path, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter writes temporary weights to its working directory; two conversions in one corrupt each other.

    Parts of one model are converted into one folder here. No other file remains there or in the working directory.
    """
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2 * len(folders)) as pool:
        decoders = [pool.submit(convert_decoder, onnx_folder, folder, LAYERS) for folder in folders]
        towers = [pool.submit(convert_vision, onnx_folder, folder) for folder in folders]
        assert {future.result().name for future in decoders} == {"NC4HW4"}
        assert [future.result() for future in towers] == [None, None]
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    expected = {name: (graphs / name).read_bytes() for name in (*DECODER_FILES, *VISION_FILES)}
    assert [files(folder) == expected for folder in folders] == [True, True]


def references(path: Path) -> list[str]:
    """Return the modules that a program imports, and its strings without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            texts += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            texts += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            texts.append(node.value)
    return texts


def test_modules_that_install_packages_and_report_usage_are_not_imported() -> None:
    """`MNN.tools` and the script `mnnconvert` do so when they are imported."""
    paths = [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "workflow").rglob("*.py")]
    assert len(paths) > 20
    matches = {path: text for path in paths for text in references(path) if re.search(r"MNN\.tools|mnnconvert", text)}
    # The only call: the compiled module itself.
    assert [text.count("_tools.mnnconvert(['mnnconvert'") for text in matches.values()] == [1]
    assert "MNN.tools" not in "".join(matches.values())
    rules = [REPOSITORY / "Snakefile", *(REPOSITORY / "workflow").rglob("*.smk")]
    assert not [path for path in rules if re.search(r"MNN\.tools|mnnconvert", path.read_text())]


@pytest.fixture
def trap(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment whose pip and mnnconvert only record their calls."""
    folder, record = tmp_path / "trap", tmp_path / "calls"
    folder.mkdir()
    for name in ("pip", "pip3", "mnnconvert"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {record}\nexit 1\n')
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}, record


@pytest.mark.parametrize("name", ["pip", "mnnconvert"])
def test_the_trap_records_calls(trap: tuple[dict[str, str], Path], name: str) -> None:
    """So the next test can fail, without an import of what must not be imported."""
    environment, record = trap
    subprocess.run(["sh", "-c", f"{name} install something"], env=environment, capture_output=True)
    assert record.read_text() == f"{name} install something\n"


def test_a_conversion_calls_neither_pip_nor_the_script(
    onnx_folder: Path, tmp_path: Path, trap: tuple[dict[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, record = trap
    monkeypatch.setenv("PATH", environment["PATH"])
    (tmp_path / "out").mkdir()
    convert_decoder(onnx_folder, tmp_path / "out", LAYERS)
    write_graph(read_graph(tmp_path / "out" / "llm.json"), tmp_path / "out" / "llm.mnn")
    assert (tmp_path / "out" / "llm.mnn").is_file()
    assert not record.exists()
