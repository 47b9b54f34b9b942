"""Tests of bench/scale.py: resources of a process, inputs of llmexport, tables, and reuse of measurements."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import psutil
import pytest

from hf2mnn.config.load import parse_option
from hf2mnn.config.variants import Weights
from hf2mnn.core.errors import Hf2mnnError, MachineError
from support import REPOSITORY, SHAPES_VL, TEXT, VISION

COLUMNS = "tool,step,wall_s,cpu_s,peak_rss_mb,bytes_written"
ENGINE_COLUMNS = "bundle,figure,median,low,high,ratio,rounds"
# Allocates 200 MB, writes and deletes 8 MB, and starts an orphan, as os.popen does, which allocates 100 MB and computes
# for half a second.
ORPHAN = "import time\ndata = bytearray(b'.') * 100_000_000\nwhile time.process_time() < 0.5: pass"
PARENT = f"""
import os, subprocess, sys
data = bytearray(b".") * 200_000_000
with open("scratch", "wb") as file:
    file.write(bytes(8_000_000))
os.remove("scratch")
subprocess.Popen([sys.executable, "-c", {ORPHAN!r}], stdout=subprocess.PIPE).stdout.read()
os._exit(0)
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """Import bench/scale.py; its folder is on the path for the modules next to it, also in child processes."""
    sys.path.insert(0, str(REPOSITORY / "bench"))
    yield importlib.import_module("scale")
    sys.path.remove(str(REPOSITORY / "bench"))


@pytest.fixture(scope="module")
def steps(bench: ModuleType) -> ModuleType:
    return importlib.import_module("scale_steps")


def test_usage_includes_all_child_processes(bench: ModuleType, tmp_path: Path) -> None:
    usage = bench.run_measured([sys.executable, "-c", PARENT], tmp_path / "log", cwd=tmp_path)
    assert usage.cpu_s >= 0.5
    assert usage.wall_s > 0.4
    # Both processes and their interpreters, but not the memory of this process, which a child shares until exec.
    assert 300 < usage.peak_rss_mb < 350
    assert 8_000_000 <= usage.bytes_written < 12_000_000


def test_failed_process_is_reported_and_its_children_are_killed(bench: ModuleType, tmp_path: Path) -> None:
    program = "import subprocess\nsubprocess.Popen(['sleep', '60'])\nprint('no such weight', flush=True)\nexit(3)"
    with pytest.raises(Hf2mnnError, match=r"exit code 3.*no such weight"):
        bench.run_measured([sys.executable, "-c", program], tmp_path / "log")
    assert [process for process in psutil.Process().children() if process.name() == "sleep"] == []


def test_llmexport_gets_settings_of_transformers_4(steps: ModuleType, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in SHAPES_VL.iterdir() if path.is_file()}
    flat = steps.flat_checkpoint(SHAPES_VL, tmp_path / "flat")
    config = json.loads((flat / "config.json").read_text())
    nested = json.loads((SHAPES_VL / "config.json").read_text())
    assert config["hidden_size"] == nested["text_config"]["hidden_size"]
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [8, 12, 12]}
    assert config["rope_theta"] == 10000
    assert (config["model_type"], config["torch_dtype"]) == ("qwen2_vl", "bfloat16")
    assert {"text_config", "dtype", "layer_types", "rope_parameters"}.isdisjoint(config)
    assert "rope_parameters" not in config["vision_config"]
    tokenizer = json.loads((flat / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|image_pad|>" in tokenizer["additional_special_tokens"]
    assert tokenizer["chat_template"] == (SHAPES_VL / "chat_template.jinja").read_text()
    assert (flat / "model.safetensors").readlink() == SHAPES_VL / "model.safetensors"
    # Files behind the links do not change, and a flat checkpoint stays the same.
    again = steps.flat_checkpoint(flat, tmp_path / "again")
    steps.flat_checkpoint(SHAPES_VL, flat)
    assert json.loads((again / "config.json").read_text()) == config
    assert before == {path: path.read_bytes() for path in SHAPES_VL.iterdir() if path.is_file()}


def test_matched_variant_has_the_formats_of_llmexport(steps: ModuleType) -> None:
    real = {"vision_config": {"embed_dim": 1280}, "tie_word_embeddings": True}
    options = steps.quantize_options(real)["int4 rtn"]
    decoder, vision = (
        parse_option(Weights, options[options.index(part) + 1], part) for part in ("--decoder", "--vision")
    )
    assert [decoder[key] for key in ("bits", "block", "method", "symmetric")] == [4, 64, "rtn", False]
    assert [vision[key] for key in ("bits", "block", "method", "symmetric")] == [4, 128, "rtn", False]
    assert options[-2:] == ["--embedding", "lm_head"]
    # 128 does not divide the width of the embedded model's vision tower; an untied model needs its embedding.
    small = steps.quantize_options({"vision_config": {"embed_dim": 192}})["int4 rtn"]
    assert '"block": 64' in small[3]
    assert "--embedding" not in small


def test_totals_are_those_of_one_bundle_and_medians_over_repeats(bench: ModuleType) -> None:
    def rows(repeat: int, seconds: float) -> list[dict]:
        names = ["fetch", "export", "convert", "quantize int4 rtn", "quantize int4"]
        entries = [("hf2mnn", name, seconds * (i + 1), 100.0 * (i + 1)) for i, name in enumerate(names)]
        entries.append(("llmexport", "total", 30 * seconds, 900.0))
        return [
            {"tool": tool, "step": step, "repeat": repeat, "wall_s": wall, "cpu_s": wall, "peak_rss_mb": peak}
            | {"bytes_written": 10}
            for tool, step, wall, peak in entries
        ]

    table = bench.summarize(pd.DataFrame([row for repeat, s in enumerate([1, 9, 2]) for row in rows(repeat, s)]))
    assert ",".join(table.columns) == COLUMNS
    assert table["tool"].tolist() == ["hf2mnn"] * 7 + ["llmexport"]
    by_step = table.set_index("step")
    assert by_step.loc["export", "wall_s"] == 4
    assert by_step.loc["total int4 rtn", COLUMNS.split(",")[2:]].tolist() == [20, 20, 400, 40]
    assert by_step.loc["total int4", "wall_s"] == 2 * (1 + 2 + 3 + 5)
    assert by_step.loc["total", "wall_s"] == 60


def test_ratios_are_taken_within_each_round(bench: ModuleType) -> None:
    # The machine is half as fast in the second round; only the first round has an image.
    rounds = [
        {"hf2mnn int4": {"decode_tokens_s": 20.0, "image_s": 3.0}, "llmexport": {"decode_tokens_s": 16.0}},
        {"hf2mnn int4": {"decode_tokens_s": 10.0}, "llmexport": {"decode_tokens_s": 8.0}},
        {"hf2mnn int4": {"decode_tokens_s": 21.0}, "llmexport": {"decode_tokens_s": 15.0}},
    ]
    table = bench.summarize_engine(rounds)
    assert ",".join(table.columns) == ENGINE_COLUMNS
    assert table.iloc[0].tolist() == ["hf2mnn int4", "decode_tokens_s", 20, 10, 21, 1.25, 3]
    assert table.iloc[1]["rounds"] == 1
    assert np.isnan(table.iloc[1]["ratio"])
    assert table.iloc[2]["ratio"] == 1


Quick = tuple[ModuleType, list[str], dict[str, str]]


@pytest.fixture
def quick(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Quick:
    """Replace the steps by ones that only make their folders; return the names of those that ran, and their code."""
    ran, code = [], {"export": "present"}

    def hf2mnn_steps(checkpoint: Path, root: Path, variants: list[str], threads: int) -> list:
        def step(name: str) -> object:
            command = (sys.executable, "-c", f"import os; os.mkdir({str(root / name)!r})")
            return bench.Step("hf2mnn", name, command, root / name, "" if name == "fetch" else code["export"])

        return [step(name) for name in ("fetch", "export", "convert", "quantize int4 rtn")]

    run = bench.ToolRuns.run
    monkeypatch.setattr(bench.ToolRuns, "run", lambda runs, *args: ran.append(args[0].name) or run(runs, *args))
    monkeypatch.setattr(bench, "hf2mnn_steps", hf2mnn_steps)
    monkeypatch.setattr(bench, "WARM_UP_HF2MNN", "")
    return bench, ran, code


def test_measurements_are_reused_until_code_changes(quick: Quick, tmp_path: Path) -> None:
    bench, ran, code = quick
    arguments = ["--checkpoint", str(SHAPES_VL), "--only", "hf2mnn", "--rounds", "0", "--out", str(tmp_path)]
    bench.main(arguments)
    text = (tmp_path / "scale-shapes-vl.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    assert [line.split(",")[1] for line in text.splitlines()[1:]] == [*ran, "total int4 rtn"]
    ran.clear()
    bench.main(arguments)
    assert (ran, (tmp_path / "scale-shapes-vl.csv").read_text()) == ([], text)
    code["export"] = "changed"
    bench.main([*arguments, "--repeats", "2"])
    changed = ["export", "convert", "quantize int4 rtn"]
    assert ran == [*changed, "fetch", *changed]


def test_machine_is_checked_before_anything_runs(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, ran, _ = quick
    monkeypatch.setattr(bench, "available_memory", lambda: 10**6)
    with pytest.raises(MachineError, match="--only hf2mnn"):
        bench.check_room(SHAPES_VL, tmp_path, ["hf2mnn", "llmexport"])
    bench.check_room(SHAPES_VL, tmp_path, ["hf2mnn"])
    monkeypatch.setitem(bench.DISK, "hf2mnn", 10**9)
    arguments = ["--checkpoint", str(SHAPES_VL), "--only", "hf2mnn", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="free some space"):
        bench.main(arguments)
    with pytest.raises(SystemExit, match="make bench"):
        bench.main([*arguments[:2], *arguments[4:], "--llmexport-python", str(tmp_path / "none")])
    assert ran == []


@pytest.mark.slow
def test_small_model_end_to_end(
    bench: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle with the formats of llmexport, whose embedding is in lm_head, runs in the engine."""
    for name, value in (("PROMPT", 32), ("ANSWER", 8), ("IMAGE", 56)):
        monkeypatch.setattr(bench, name, value)
    checkpoint = make_checkpoint(text=TEXT, vision=VISION, tied=True)
    arguments = ["--checkpoint", str(checkpoint), "--only", "hf2mnn", "--variant", "int4 rtn", "--rounds", "1"]
    bench.main([*arguments, "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    table = pd.read_csv(tmp_path / f"scale-{checkpoint.name}.csv").set_index("step")
    assert (table[["wall_s", "cpu_s", "peak_rss_mb"]] > 0).all(axis=None)
    assert table.loc["total int4 rtn", "wall_s"] == pytest.approx(table["wall_s"].iloc[:4].sum(), rel=1e-3)
    engine = pd.read_csv(tmp_path / f"engine-{checkpoint.name}.csv").set_index("figure")
    assert list(engine.index) == bench.FIGURES
    assert (engine["median"] > 0).all()
    assert not (tmp_path / "work" / "hf2mnn" / "int4-rtn" / "embeddings_bf16.bin").exists()
