"""The comparison from end to end: what is measured of a process, what llmexport is given, what is kept."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import psutil
import pytest

from hf2mnn.config.schema import Weights, parse_json
from hf2mnn.core.errors import Hf2mnnError, MachineError
from support import REPOSITORY, SHAPES_VL, TEXT, VISION

COLUMNS = "tool,step,wall_s,cpu_s,peak_rss_mb,bytes_written"
ENGINE_COLUMNS = "bundle,figure,median,low,high,ratio,rounds"
# Holds 200 MB, writes 8 MB that are gone at the end, and starts one that nobody waits for, as os.popen does: it holds
# 100 MB and computes for half a second.
LEFT_ALONE = "import time\nheld = bytearray(b'.') * 100_000_000\nwhile time.process_time() < 0.5: pass"
PARENT = f"""
import os, subprocess, sys
held = bytearray(b".") * 200_000_000
with open("scratch", "wb") as file:
    file.write(bytes(8_000_000))
os.remove("scratch")
subprocess.Popen([sys.executable, "-c", {LEFT_ALONE!r}], stdout=subprocess.PIPE).stdout.read()
os._exit(0)
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """bench/scale.py, which is a program and in no package; the engine's child finds scale_engine.py beside it."""
    sys.path.insert(0, str(REPOSITORY / "bench"))
    yield importlib.import_module("scale")
    sys.path.remove(str(REPOSITORY / "bench"))


def test_a_process_is_measured_with_all_that_it_starts(bench: ModuleType, tmp_path: Path) -> None:
    taken = bench.measured([sys.executable, "-c", PARENT], tmp_path / "log", cwd=tmp_path)
    assert 0.5 < taken.cpu_s < 5
    assert taken.wall_s > 0.4
    # Two interpreters come on top, and not the memory of this process, which a child shares while it starts.
    assert 300 < taken.peak_rss_mb < 350
    assert 8_000_000 <= taken.bytes_written < 12_000_000


def test_what_a_failed_process_said_is_told_and_nothing_of_it_goes_on(bench: ModuleType, tmp_path: Path) -> None:
    program = "import subprocess\nsubprocess.Popen(['sleep', '60'])\nprint('no such weight', flush=True)\nexit(3)"
    started = time.monotonic()
    with pytest.raises(Hf2mnnError, match=r"exit code 3.*no such weight"):
        bench.measured([sys.executable, "-c", program], tmp_path / "log")
    assert time.monotonic() - started < 10
    assert [process for process in psutil.Process().children() if process.name() == "sleep"] == []


def test_llmexport_is_given_settings_as_they_were_before_transformers_5(bench: ModuleType, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in SHAPES_VL.iterdir() if path.is_file()}
    flat = bench.flat_checkpoint(SHAPES_VL, tmp_path / "flat")
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
    # Through links nothing was changed, a second time neither; what is flat already stays as it is.
    again = bench.flat_checkpoint(flat, tmp_path / "again")
    bench.flat_checkpoint(SHAPES_VL, flat)
    assert json.loads((again / "config.json").read_text()) == config
    assert before == {path: path.read_bytes() for path in SHAPES_VL.iterdir() if path.is_file()}


def test_the_bundle_to_compare_is_like_llmexports(bench: ModuleType) -> None:
    real = {"vision_config": {"embed_dim": 1280}, "tie_word_embeddings": True}
    like = bench.formats(real)["int4 rtn"]
    decoder, vision = (parse_json(Weights, like[like.index(part) + 1], part) for part in ("--decoder", "--vision"))
    assert [decoder[key] for key in ("bits", "block", "method", "symmetric")] == [4, 64, "rtn", False]
    assert [vision[key] for key in ("bits", "block", "method", "symmetric")] == [4, 128, "rtn", False]
    assert like[-2:] == ["--embedding", "lm_head"]
    # A block of 128 does not divide what the embedded model's vision tower reads; an untied model has no such lm_head.
    small = bench.formats({"vision_config": {"embed_dim": 192}})["int4 rtn"]
    assert '"block": 64' in small[3]
    assert "--embedding" not in small


def test_totals_are_of_one_bundle_and_medians_of_all_repeats(bench: ModuleType) -> None:
    def rows(repeat: int, seconds: float) -> list[dict]:
        steps = ["source", "onnx", "mnn", "quantize int4 rtn", "quantize int4"]
        made = [("hf2mnn", step, seconds * (i + 1), 100.0 * (i + 1)) for i, step in enumerate(steps)]
        made.append(("llmexport", "export", 30 * seconds, 900.0))
        return [
            {"tool": tool, "step": step, "repeat": repeat, "wall_s": wall, "cpu_s": wall, "peak_rss_mb": peak}
            | {"bytes_written": 10}
            for tool, step, wall, peak in made
        ]

    table = bench.summarize(pd.DataFrame([row for repeat, s in enumerate([1, 9, 2]) for row in rows(repeat, s)]))
    assert ",".join(table.columns) == COLUMNS
    assert table["tool"].tolist() == ["hf2mnn"] * 7 + ["llmexport"]
    found = table.set_index("step")
    assert found.loc["onnx", "wall_s"] == 4
    assert found.loc["total int4 rtn", COLUMNS.split(",")[2:]].tolist() == [20, 20, 400, 40]
    assert found.loc["total int4", "wall_s"] == 2 * (1 + 2 + 3 + 5)
    assert found.loc["export", "wall_s"] == 60


def test_ratios_are_those_within_each_round(bench: ModuleType) -> None:
    # The machine halves its speed in the second round; and only the first has an image.
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


@pytest.fixture
def quick(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[str], dict]:
    """With steps that only make their folders, what ran is counted; and their code, to be changed."""
    ran, code = [], {"onnx": "present"}

    def steps(checkpoint: Path, root: Path, variants: list[str], threads: int) -> list:
        names, made = ["source", "onnx", "mnn", "quantize int4 rtn"], []
        for name in names:
            command = (sys.executable, "-c", f"import os; os.mkdir({str(root / name)!r})")
            made.append(bench.Step("hf2mnn", name, command, root / name, code["onnx"] if name != "source" else ""))
        return made

    run = bench.Turns.run
    monkeypatch.setattr(bench.Turns, "run", lambda turns, *given: ran.append(given[0].name) or run(turns, *given))
    monkeypatch.setattr(bench, "own_steps", steps)
    monkeypatch.setattr(bench, "WARM_OURS", "")
    return bench, ran, code


def test_what_was_measured_is_kept(quick: tuple[ModuleType, list[str], dict], tmp_path: Path) -> None:
    bench, ran, code = quick
    arguments = ["--checkpoint", str(SHAPES_VL), "--only", "hf2mnn", "--rounds", "0", "--out", str(tmp_path)]
    bench.main(arguments)
    text = (tmp_path / "scale-shapes-vl.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    assert [line.split(",")[1] for line in text.splitlines()[1:]] == [*ran, "total int4 rtn"]
    ran.clear()
    bench.main(arguments)
    assert (ran, (tmp_path / "scale-shapes-vl.csv").read_text()) == ([], text)
    code["onnx"] = "as it will be"
    bench.main([*arguments, "--repeats", "2"])
    assert ran == ["onnx", "mnn", "quantize int4 rtn", "source", "onnx", "mnn", "quantize int4 rtn"]


def test_a_machine_too_small_is_told_before_anything_runs(
    quick: tuple[ModuleType, list[str], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, ran, _ = quick
    monkeypatch.setattr(bench, "available_memory", lambda: 10**6)
    with pytest.raises(MachineError, match="--only hf2mnn"):
        bench.check_room(SHAPES_VL, tmp_path, ["hf2mnn", "llmexport"])
    bench.check_room(SHAPES_VL, tmp_path, ["hf2mnn"])
    monkeypatch.setitem(bench.DISK, "hf2mnn", 10**9)
    arguments = ["--checkpoint", str(SHAPES_VL), "--only", "hf2mnn", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="free; make space"):
        bench.main(arguments)
    with pytest.raises(SystemExit, match="make bench"):
        bench.main([*arguments[:2], *arguments[4:], "--llmexport-python", str(tmp_path / "none")])
    assert ran == []


@pytest.mark.slow
def test_a_small_model_from_end_to_end(
    bench: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is quantized as llmexport does it runs in the engine, its embedding read from lm_head."""
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
