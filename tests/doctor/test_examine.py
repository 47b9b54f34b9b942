"""Kinds of paths, unreadable files, and the output of the command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from faulty_bundles import LLMEXPORT, changed_bundle, edit_graph, errors, link_copy, run_checks, unlink_copy
from hf2mnn import cli
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.manifest import NAME
from hf2mnn.doctor.artifacts import Bundle, MnnModel, OnnxFile
from hf2mnn.doctor.checks import CHECKS
from hf2mnn.doctor.examine import examine
from hf2mnn.doctor.findings import Examination, Finding, Severity
from hf2mnn.mnn.bundle import CONFIG, DECODER, MODEL_CONFIG, VISION
from support import SHAPES_VL

BUNDLE_CHECKS, MODEL_CHECKS, ONNX_CHECKS = CHECKS[Bundle], CHECKS[MnnModel], CHECKS[OnnxFile]
UNREADABLE = {
    "empty": b"",
    "zeros": bytes(1000),
    "noise": np.random.default_rng(0).bytes(5000),
    "text": b"<html>404</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return link_copy(LLMEXPORT, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("path", "kind", "checks"),
    [
        ("bundles/int4", "bundle", [*BUNDLE_CHECKS, *MODEL_CHECKS]),
        (f"bundles/int4/{CONFIG}", "bundle", [*BUNDLE_CHECKS, *MODEL_CHECKS]),
        (f"bundles/int4/{VISION}", "MNN model", MODEL_CHECKS),
        ("graphs", "folder of the convert stage", MODEL_CHECKS),
        ("graphs/llm.json", "graph of the convert stage", MODEL_CHECKS),
        ("onnx", "folder of ONNX models", ONNX_CHECKS),
        ("onnx/vision.onnx", "ONNX model", ONNX_CHECKS),
    ],
)
def test_kinds(results: Path, path: str, kind: str, checks: list) -> None:
    examination = examine(results / path)
    assert (examination.kind, examination.checks) == (kind, [check.__name__ for check in checks])


@pytest.mark.parametrize("path", ["checkpoint", "nothing", "onnx/model.json"])
def test_unknown_kinds(results: Path, path: str) -> None:
    with pytest.raises(Hf2mnnError, match=r"does not exist: give|cannot be examined: give"):
        examine(results / path)


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_graphs(tmp_path: Path, content: bytes) -> None:
    for name, check in (("model.mnn", "unreadable_graph"), ("model.onnx", "unreadable_onnx")):
        (tmp_path / name).write_bytes(content)
        assert errors(tmp_path / name) == {check}
        assert [finding.severity for finding in examine(tmp_path / name).findings] == [Severity.ERROR]


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_truncated_graphs(bundle: Path, kept: float) -> None:
    """The converter crashes on it, or reads past its end. The rest of the bundle is examined."""
    path = unlink_copy(bundle / DECODER)
    os.truncate(path, int(path.stat().st_size * kept))
    (bundle / f"{VISION}.weight").unlink()
    assert errors(bundle) == {"unreadable_graph", "weight_file_missing"}


@pytest.mark.parametrize("file", [CONFIG, MODEL_CONFIG])
@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b'{"llm_model": 3, "layer_nums": "x"}', b"[" * 9999])
def test_unreadable_configurations(bundle: Path, file: str, content: bytes) -> None:
    unlink_copy(bundle / file).write_bytes(content)
    assert not errors(bundle)
    assert Bundle(bundle).file("llm_model").name == DECODER


def test_paths_in_both_configurations(bundle: Path) -> None:
    """An absolute path is taken below the folder, as in the engine; a path outside the folder is not read."""
    (bundle / DECODER).rename(bundle / "other.mnn")
    config = json.loads(unlink_copy(bundle / MODEL_CONFIG).read_text())
    (bundle / MODEL_CONFIG).write_text(json.dumps(config | {"llm_model": "/other.mnn"}))
    assert Bundle(bundle).models["decoder"].path == bundle / "other.mnn"
    (bundle / MODEL_CONFIG).write_text(json.dumps(config | {"llm_model": "../bundle/other.mnn"}))
    assert list(Bundle(bundle).models) == ["vision"]


def change_numbers(value: object, change: Callable[[int], int]) -> object:
    """Return a JSON value with every integer changed."""
    if isinstance(value, dict):
        return {key: change_numbers(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [change_numbers(item, change) for item in value]
    return change(value) if type(value) is int else value


@pytest.mark.parametrize("change", [lambda n: -n - 1, lambda n: 2 * n + 1, lambda _: 0, lambda _: 2**31 - 1])
def test_impossible_numbers_in_graphs(bundle: Path, change: Callable[[int], int]) -> None:
    """Impossible sizes, offsets and shapes give findings, without an exception and without allocating memory."""

    def edit(graph) -> None:
        for op in graph.of_type("Convolution", "LayerNorm"):
            op["main"] = change_numbers(op["main"], change)

    edit_graph(bundle, edit)
    assert {finding.severity for finding in examine(bundle).findings} & {Severity.ERROR, Severity.WARNING}


def test_a_check_that_fails_does_not_stop_others(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model) -> list[Finding]:
        raise KeyError(model.part)

    monkeypatch.setitem(CHECKS, MnnModel, (fails, *MODEL_CHECKS))
    (bundle / f"{DECODER}.weight").unlink()
    names = [finding.check for finding in examine(bundle).findings]
    assert names.count("not_examined") == 2 and "weight_file_missing" in names


@pytest.mark.parametrize(
    ("severities", "code"),
    [
        ([], 0),
        ([Severity.ADVICE], 0),
        ([Severity.ADVICE, Severity.WARNING], 3),
        ([Severity.WARNING, Severity.ERROR], 4),
    ],
)
def test_exit_codes(severities: list[Severity], code: int) -> None:
    texts = dict.fromkeys(("where", "message", "evidence", "effect", "cure"), "")
    findings = [Finding(severity=severity, **texts) for severity in severities]
    assert Examination(Path(), "bundle", findings=findings).exit_code == code


def run_doctor(*arguments: object) -> tuple[int, str]:
    """Return exit code and output of `hf2mnn doctor`."""
    process = CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])
    return process.exit_code, process.stdout


def test_the_command(bundle: Path) -> None:
    """Errors come first; JSON has the same findings."""
    (bundle / f"{DECODER}.weight").unlink()
    code, output = run_doctor(bundle)
    assert code == 4
    assert output.startswith(f"ERROR {DECODER}.weight: the weight file of {DECODER} is missing [weight_file_missing]\n")
    assert f"{bundle} (bundle, {len(BUNDLE_CHECKS) + len(MODEL_CHECKS)} checks)" in output.splitlines()[-1]
    content = json.loads(run_doctor(bundle, "--json")[1])
    assert (content["path"], content["kind"]) == (str(bundle), "bundle")
    assert content["findings"][0]["check"] == "weight_file_missing" and "weights_constant" in content["checks"]


def test_the_command_on_a_valid_model(results: Path) -> None:
    code, output = run_doctor(results / "bundles" / "int4" / VISION)
    assert code == 0
    assert output == f"no findings: {results / 'bundles' / 'int4' / VISION} (MNN model, {len(MODEL_CHECKS)} checks)\n"


def test_only_a_bundle_is_run(results: Path) -> None:
    process = CliRunner().invoke(cli.app, ["doctor", str(results / "bundles" / "int4" / VISION), "--run"])
    assert isinstance(process.exception, Hf2mnnError)
    assert "--run needs a bundle" in str(process.exception)


@pytest.mark.parametrize("variant", ["int4", "fp16"])
def test_valid_bundles_have_no_finding(variant: str, results: Path, tmp_path: Path) -> None:
    """With checkpoint and reference, so that every check applies; and without manifest and model.json."""
    for name, changes in {
        "known": {"checkpoint": SHAPES_VL, "reference": results / "reference/evaluation"},
        "unknown": {"model": {"hf2mnn": None}, "files": {NAME: None}},
    }.items():
        assert (
            run_checks(BUNDLE_CHECKS, changed_bundle(results / "bundles" / variant, tmp_path / name, **changes)) == []
        )
