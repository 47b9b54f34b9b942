"""The benchmark of methods of quantization, with one small layer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from support import REPOSITORY

COLUMNS = "data,tool,method,bits,block,weight_error,mean_kld,top1_agreement,bytes,seconds,peak_rss_mb"
SHAPE = (32, 128)
GRID = [("hf2mnn", "rtn"), ("hf2mnn", "mse"), ("converter", "rtn"), ("converter", "hqq")]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """bench/quant.py; its child processes import it by this name."""
    sys.path.insert(0, str(REPOSITORY / "bench"))
    yield importlib.import_module("quant")
    sys.path.remove(str(REPOSITORY / "bench"))


@pytest.fixture
def small(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with one small layer and 3 bits."""
    prepare = bench.prepare_student_t
    monkeypatch.setitem(bench.DATA, "student-t", lambda root: prepare(root, SHAPE))
    grid = [bench.Case("student-t", tool, method, 3, 64) for tool, method in GRID]
    monkeypatch.setattr(bench, "cases", lambda data, full: grid if data == "student-t" else [])
    return bench


def test_rows_of_both_tools_are_measured_once(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.main(["student-t", "--out", str(tmp_path)])
    text = (tmp_path / "quant.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    table = pd.read_csv(tmp_path / "quant.csv")
    assert list(zip(table["tool"], table["method"], strict=True)) == GRID
    errors = dict(zip(GRID, table["weight_error"], strict=True))
    assert 0.1 < errors["hf2mnn", "mse"] < errors["converter", "hqq"] < errors["converter", "rtn"] < 0.3
    # Both round to nearest and store the same format.
    assert errors["hf2mnn", "rtn"] == pytest.approx(errors["converter", "rtn"], rel=0.01)
    assert table["bytes"].nunique() == 1
    assert (table["seconds"] >= 0).all()
    assert table["peak_rss_mb"].between(10, 1000).all()
    assert table["mean_kld"].isna().all()

    calls, make = [], small.make
    monkeypatch.setattr(small, "make", lambda case, *rest: calls.append(case) or make(case, *rest))
    monkeypatch.setattr(small, "fingerprint", lambda stage: "changed code")
    small.main(["student-t", "--out", str(tmp_path)])
    assert [(case.tool, case.method) for case in calls] == GRID[:2]
    small.main(["student-t", "--out", str(tmp_path)])
    assert len(calls) == 2


def test_too_little_disk_is_an_error_before_any_file_is_written(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "NEEDS_GB", 10**9)
    with pytest.raises(SystemExit, match="--scale"):
        bench.main(["qwen2-vl-2b", "--out", str(tmp_path)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_methods_are_compared_if_they_have_their_inputs(bench: ModuleType) -> None:
    """Every method at every number of bits in blocks of 64; calibrated ones only with recorded inputs."""
    plain = {("hf2mnn", "rtn"), ("hf2mnn", "hqq"), ("hf2mnn", "mse"), ("converter", "rtn"), ("converter", "hqq")}
    calibrated = {("hf2mnn", "awq"), ("hf2mnn", "gptq")}
    for data, wanted in (("shapes-vl", plain | calibrated), ("student-t", plain)):
        for bits in (8, 4, 3, 2):
            grid = [case for case in bench.cases(data, full=False) if (case.bits, case.block) == (bits, 64)]
            assert {(case.tool, case.method) for case in grid} == wanted
