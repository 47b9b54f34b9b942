"""The comparison of methods of quantization, on a layer small enough for every test run."""

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
    """bench/quant.py, which is a program and in no package; its child processes import it by this name."""
    sys.path.insert(0, str(REPOSITORY / "bench"))
    yield importlib.import_module("quant")
    sys.path.remove(str(REPOSITORY / "bench"))


@pytest.fixture
def small(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With one small layer and 3 bits."""
    prepare = bench.prepare_student_t
    monkeypatch.setitem(bench.DATA, "student-t", lambda root: prepare(root, SHAPE))
    grid = [bench.Case("student-t", tool, method, 3, 64) for tool, method in GRID]
    monkeypatch.setattr(bench, "cases", lambda data, full: grid if data == "student-t" else [])
    return bench


def test_rows_of_both_tools_and_none_twice(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.main(["student-t", "--out", str(tmp_path)])
    text = (tmp_path / "quant.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    table = pd.read_csv(tmp_path / "quant.csv")
    assert list(zip(table["tool"], table["method"], strict=True)) == GRID
    errors = dict(zip(GRID, table["weight_error"], strict=True))
    assert 0.1 < errors["hf2mnn", "mse"] < errors["converter", "hqq"] < errors["converter", "rtn"] < 0.3
    # The two round to nearest alike, and store the same format.
    assert errors["hf2mnn", "rtn"] == pytest.approx(errors["converter", "rtn"], rel=0.01)
    assert table["bytes"].nunique() == 1
    assert (table["seconds"] >= 0).all()
    assert table["peak_rss_mb"].between(10, 1000).all()
    assert table["mean_kld"].isna().all()

    made, make = [], small.make
    monkeypatch.setattr(small, "make", lambda case, *rest: made.append(case) or make(case, *rest))
    monkeypatch.setattr(small, "fingerprint", lambda stage: "the code as it will be")
    small.main(["student-t", "--out", str(tmp_path)])
    assert [(case.tool, case.method) for case in made] == GRID[:2]
    small.main(["student-t", "--out", str(tmp_path)])
    assert len(made) == 2


def test_too_little_disk_is_said_before_anything_is_made(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "NEEDS_GB", 10**9)
    with pytest.raises(SystemExit, match="--scale"):
        bench.main(["qwen2-vl-2b", "--out", str(tmp_path)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_methods_are_compared_where_they_have_what_they_go_by(bench: ModuleType) -> None:
    """Every method at every number of bits in blocks of 64; calibrated ones only where there are activations."""
    plain = {("hf2mnn", "rtn"), ("hf2mnn", "hqq"), ("hf2mnn", "mse"), ("converter", "rtn"), ("converter", "hqq")}
    calibrated = {("hf2mnn", "awq"), ("hf2mnn", "gptq")}
    for data, wanted in (("shapes-vl", plain | calibrated), ("student-t", plain)):
        for bits in (8, 4, 3, 2):
            grid = [case for case in bench.cases(data, full=False) if (case.bits, case.block) == (bits, 64)]
            assert {(case.tool, case.method) for case in grid} == wanted
