"""What a path is, any file however broken, and what the command says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hf2mnn import cli
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.doctor.examine import BUNDLE_CHECKS, MODEL_CHECKS, ONNX_CHECKS, look_at
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle
from hf2mnn.doctor.show import exit_code
from hf2mnn.mnn.bundle import CONFIG, DECODER, MODEL_CONFIG, VISION
from patients import LLMEXPORT, copied, edited, errors, own

BROKEN = {
    "empty": b"",
    "zeros": bytes(1000),
    "noise": np.random.default_rng(0).bytes(5000),
    "text": b"<html>404</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return copied(LLMEXPORT, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("path", "kind", "checks"),
    [
        ("bundles/int4", "bundle", [*BUNDLE_CHECKS, *MODEL_CHECKS]),
        (f"bundles/int4/{CONFIG}", "bundle", [*BUNDLE_CHECKS, *MODEL_CHECKS]),
        (f"bundles/int4/{VISION}", "MNN model", MODEL_CHECKS),
        ("graphs", "folder of the mnn stage", MODEL_CHECKS),
        ("onnx", "folder of ONNX models", ONNX_CHECKS),
        ("onnx/vision.onnx", "ONNX model", ONNX_CHECKS),
    ],
)
def test_kinds(results: Path, path: str, kind: str, checks: list) -> None:
    seen = look_at(results / path)
    assert (seen.kind, seen.checks) == (kind, [check.__name__ for check in checks])


@pytest.mark.parametrize("path", ["source", "nothing", "onnx/model.json"])
def test_what_is_nothing_of_the_kind(results: Path, path: str) -> None:
    with pytest.raises(Hf2mnnError, match=r"there is no|is nothing that can be examined"):
        look_at(results / path)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_graphs_that_are_none(tmp_path: Path, content: bytes) -> None:
    for name, check in (("model.mnn", "unreadable_graph"), ("model.onnx", "unreadable_onnx")):
        (tmp_path / name).write_bytes(content)
        assert errors(tmp_path / name) == {check}
        assert [finding.severity for finding in look_at(tmp_path / name).findings] == [Severity.ERROR]


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_graph_that_was_cut_short(bundle: Path, kept: float) -> None:
    """The converter crashes on it, or reads on behind its end. The rest of the bundle is examined all the same."""
    path = own(bundle / DECODER)
    os.truncate(path, int(path.stat().st_size * kept))
    (bundle / f"{VISION}.weight").unlink()
    assert errors(bundle) == {"unreadable_graph", "weight_file_missing"}


@pytest.mark.parametrize("file", [CONFIG, MODEL_CONFIG])
@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b'{"llm_model": 3, "layer_nums": "x"}', b"[" * 9999])
def test_settings_that_are_none(bundle: Path, file: str, content: bytes) -> None:
    own(bundle / file).write_bytes(content)
    assert not errors(bundle)
    assert Bundle(bundle).file("llm_model").name == DECODER


def test_files_are_named_by_either_settings_and_stay_inside(bundle: Path) -> None:
    """As the engine merges them, and joins paths: an absolute one is below the folder, and nothing above it is read."""
    (bundle / DECODER).rename(bundle / "other.mnn")
    config = json.loads(own(bundle / MODEL_CONFIG).read_text())
    (bundle / MODEL_CONFIG).write_text(json.dumps(config | {"llm_model": "/other.mnn"}))
    assert Bundle(bundle).models["decoder"].path == bundle / "other.mnn"
    (bundle / MODEL_CONFIG).write_text(json.dumps(config | {"llm_model": "../bundle/other.mnn"}))
    assert list(Bundle(bundle).models) == ["vision"]


def numbers(value: object, change: Callable[[int], int]) -> object:
    """A graph with every number of its operators changed."""
    if isinstance(value, dict):
        return {key: numbers(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [numbers(one, change) for one in value]
    return change(value) if type(value) is int else value


@pytest.mark.parametrize("change", [lambda n: -n - 1, lambda n: 2 * n + 1, lambda _: 0, lambda _: 2**31 - 1])
def test_graphs_with_numbers_that_cannot_be(bundle: Path, change: Callable[[int], int]) -> None:
    """Sizes, offsets and shapes of a stranger's: findings, never an exception, and no memory for what is not there."""

    def spoil(graph) -> None:
        for op in graph.of_type("Convolution", "LayerNorm"):
            op["main"] = numbers(op["main"], change)

    edited(bundle, spoil)
    assert {finding.severity for finding in look_at(bundle).findings} & {Severity.ERROR, Severity.WARNING}


def test_a_check_that_trips_lets_the_others_look(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trips(model) -> list[Finding]:
        raise KeyError(model.part)

    monkeypatch.setattr("hf2mnn.doctor.examine.MODEL_CHECKS", [trips, *MODEL_CHECKS])
    (bundle / f"{DECODER}.weight").unlink()
    said = [finding.check for finding in look_at(bundle).findings]
    assert said.count("not_examined") == 2 and "weight_file_missing" in said


# The command


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
    assert exit_code([Finding("check", severity, "", "", "", "", "") for severity in severities]) == code


def told(*arguments: object) -> tuple[int, str]:
    """Exit code and output of `hf2mnn doctor`."""
    done = CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])
    return done.exit_code, done.stdout


def test_the_command(bundle: Path) -> None:
    """Errors come first; JSON says the same."""
    (bundle / f"{DECODER}.weight").unlink()
    code, said = told(bundle)
    assert code == 4
    assert said.startswith(f"ERROR {DECODER}.weight: the weights of {DECODER} are not there [weight_file_missing]\n")
    assert f"{bundle} (bundle, {len(BUNDLE_CHECKS) + len(MODEL_CHECKS)} checks)" in said.splitlines()[-1]
    shown = json.loads(told(bundle, "--json")[1])
    assert (shown["path"], shown["kind"]) == (str(bundle), "bundle")
    assert shown["findings"][0]["check"] == "weight_file_missing" and "weights_constant" in shown["checks"]


def test_the_command_on_a_good_model(results: Path) -> None:
    code, said = told(results / "bundles" / "int4" / VISION)
    assert code == 0
    assert said == f"no findings: {results / 'mnn' / 'int4' / VISION} (MNN model, {len(MODEL_CHECKS)} checks)\n"


def test_only_a_bundle_is_run(results: Path) -> None:
    done = CliRunner().invoke(cli.app, ["doctor", str(results / "bundles" / "int4" / VISION), "--run"])
    assert isinstance(done.exception, Hf2mnnError)
    assert "--run asks a bundle" in str(done.exception)
