"""The pipeline on the embedded model, as a user runs it: results, reruns and failures."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from faults import zeroed_norm
from hf2mnn.config.plan import load_plan
from hf2mnn.core.manifest import Manifest, updated_folder
from hf2mnn.core.verify import verify_folder
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.variant import Choice
from hf2mnn.stages.evaluate import run as evaluate
from hf2mnn.stages.plan import run as make_plan
from hf2mnn.stages.quantize import quantize
from support import BIN, QUICK, REPOSITORY, Workspace, run_cli

PLAIN = ["fp32", "fp16", "int8", "int4"]
VARIANTS = [*PLAIN, "int4-gptq", "mixed"]
ROWS = ["onnxruntime", *VARIANTS]
FINAL = {"report_model", "summarize_models", "check_gates", "all", "total"}
"""Jobs after every change."""


def jobs(output: str) -> dict[str, int]:
    """Return the number of jobs of each rule, from the table that Snakemake prints before it starts."""
    table = re.search(r"^job +count\n-+ +-+\n((?:\S+ +\d+\n)+)", output, re.MULTILINE)
    return {name: int(count) for name, count in (line.split() for line in table[1].splitlines())} if table else {}


@pytest.fixture
def copy(finished: Workspace, tmp_path: Path) -> Workspace:
    """Return a writable copy of the finished workspace, with Snakemake's records and file times."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder, symlinks=True)
    return Workspace(folder)


def test_every_stage_writes_its_files(finished: Workspace, results: Path) -> None:
    wanted = {
        ".": ["summary.csv", "summary.parquet", "figures.csv", "figures.parquet", "report.html"],
        "reference/evaluation": ["examples.json", "golden.safetensors", "activations.safetensors"],
        "benchmark": ["benchmark.parquet", "benchmark.csv", "benchmark.json", "cache.parquet"],
    }
    measured = ["summary.json", "answers.parquet", "metrics.parquet", "figures.parquet", "images.parquet"]
    wanted |= {f"evaluation/{row}": [*measured, "parity.parquet"] for row in ROWS}
    wanted |= {f"diagnosis/{variant}": ["layers.parquet", "budget.parquet", "findings.json"] for variant in VARIANTS}
    wanted |= {f"bundles/{variant}": ["llm.mnn", "visual.mnn", "config.json"] for variant in VARIANTS}
    for folder, names in wanted.items():
        names += [] if folder == "." else ["manifest.json"]
        assert [name for name in names if not (results / folder / name).is_file()] == [], folder
    for name in ("summary.csv", "summary.parquet", "gates.txt"):
        assert (finished.folder / "results" / name).is_file()
    assert (results / "baseline" / "manifest.json").is_file()
    assert not list(results.rglob("logits.safetensors")), "no stage reads them"


def test_table_has_a_row_for_every_boundary_and_variant(finished: Workspace) -> None:
    frame = pd.read_csv(finished.folder / "results" / "summary.csv")
    wanted = {"model", "top1_agreement", "mean_kld", "greedy_match", "task_accuracy", "vision_cosine", "bytes"}
    assert wanted <= set(frame.columns)
    assert list(frame["variant"]) == ["pytorch", *ROWS]
    own = finished.folder / "results" / "shapes-vl"
    pd.testing.assert_frame_equal(frame, pd.read_csv(own / "summary.csv"))
    measured = frame.set_index("variant").loc[VARIANTS]
    assert (measured["decode_tokens_per_s"] > 0).all() and (measured["findings"] == 0).all()
    assert list(pd.read_parquet(own / "figures.parquet")["variant"].unique()) == ROWS


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize("variant", ["onnxruntime", "int4"])
def test_figures_follow_from_the_logits(results: Path, tmp_path: Path, variant: str) -> None:
    """Recompute the table's figures from the definitions, without code of the package."""
    reference, folder = results / "reference" / "evaluation", tmp_path / variant
    bundle = None if variant == "onnxruntime" else results / "bundles" / variant
    evaluate(reference, results / "onnx", folder, bundle, threads=1, time_limit=600, keep_logits=True)
    golden = load_file(reference / "golden.safetensors")
    divergence, same, worst = {}, [], 0.0
    for name, logits in load_file(folder / "logits.safetensors").items():
        right = golden[f"examples/{name}/logits"]
        p, q = log_softmax(right), log_softmax(logits)
        divergence |= {(name, index): value for index, value in enumerate((np.exp(p) * (p - q)).sum(axis=1))}
        same += list(right.argmax(axis=1) == logits.argmax(axis=1))
        worst = max(worst, float(np.abs(logits - right).max()))
    table = pd.read_csv(results / "summary.csv").set_index("variant").loc[variant]
    assert table["mean_kld"] == pytest.approx(np.mean(list(divergence.values())), rel=1e-6, abs=1e-13)
    assert table["top1_agreement"] == pytest.approx(np.mean(same), abs=1e-12)
    positions = pd.read_parquet(results / "evaluation" / variant / "metrics.parquet").set_index(["id", "position"])[
        "kld"
    ]
    assert set(positions.index) == set(divergence)
    np.testing.assert_allclose(positions, [divergence[key] for key in positions.index], rtol=1e-6, atol=1e-12)
    if variant == "onnxruntime":
        assert worst < 1e-3, "the exported graph is the model"
        assert pd.read_parquet(folder / "answers.parquet")["greedy_match"].all()


def test_float_bundle_is_the_model_in_the_engine(results: Path) -> None:
    frame = pd.read_csv(results / "summary.csv").set_index("variant")
    labelled = json.loads((results / "evaluation" / "fp32" / "summary.json").read_text())["labelled"]
    assert frame.loc["fp32", "top1_agreement"] >= 0.995
    assert abs(frame.loc["fp32", "task_accuracy"] - frame.loc["pytorch", "task_accuracy"]) * labelled <= 1.001
    assert frame.loc["fp32", "vision_cosine"] > 0.99999
    assert (frame.loc[["fp32", "fp16"], "verdict"] == "pass").all()


def test_smaller_variants_are_smaller_and_further_away(results: Path) -> None:
    """Fewer bits are smaller on disk and further from PyTorch."""
    frame = pd.read_csv(results / "summary.csv").set_index("variant").loc[PLAIN]
    assert frame["bytes"].is_monotonic_decreasing
    # Below 1e-12 nats are the sums of float32 arithmetic: half floats hold a bfloat16 checkpoint exactly.
    assert frame["mean_kld"].clip(lower=1e-12).is_monotonic_increasing
    assert frame["mean_kld"]["fp16"] < 1e-12 < frame["mean_kld"]["int8"]


def test_a_calibrated_variant_of_the_same_size_is_closer(results: Path) -> None:
    """Bits and blocks are the same, and so is the speed of the engine; only quantized values and scales differ."""
    frame = pd.read_csv(results / "summary.csv").set_index("variant")
    weights = [(results / "bundles" / name / "llm.mnn.weight").stat().st_size for name in ("int4", "int4-gptq")]
    assert weights[0] == weights[1]
    assert frame.loc["int4-gptq", "mean_kld"] < 0.7 * frame.loc["int4", "mean_kld"]


@pytest.mark.slow
def test_mixed_precision_beats_the_uniform_variant_of_the_same_size(results: Path, tmp_path: Path) -> None:
    """Both parts in 4 bits by blocks of 64, against formats chosen within the bytes that those take."""
    onnx, base, settings = results / "onnx", results / "graphs", EngineSettings("low", "low")

    def judged(name: str, bits: int, block: int, plan: dict) -> dict:
        form = WeightFormat(bits, block, method="mse")
        bundle = quantize(onnx, base, tmp_path / name, Choice(form, form, settings, plan), 2)
        evaluate(results / "reference/evaluation", onnx, tmp_path / f"{name}-judged", bundle, threads=2, time_limit=600)
        weights = json.loads((bundle / "manifest.json").read_text())["results"]
        return weights | json.loads((tmp_path / f"{name}-judged" / "summary.json").read_text())

    uniform = judged("uniform", 4, 64, {})
    budget = str(uniform["bits_per_weight"])
    plan = make_plan(results / "sensitivity", onnx, base, tmp_path / "plan", budget)
    mixed = judged("mixed", 8, 0, load_plan(plan / "plan.yaml").model_dump(exclude_none=True))
    assert mixed["weight_bytes"] <= uniform["weight_bytes"]
    assert mixed["mean_kld"] < 0.9 * uniform["mean_kld"]


def test_the_budget_is_kept(results: Path) -> None:
    chosen = json.loads((results / "bundles" / "mixed" / "manifest.json").read_text())["results"]
    assert 4.2 < chosen["bits_per_weight"] <= 4.25


def test_plain_engine_computes_wrong_positions_after_an_image(results: Path) -> None:
    """A plain call of engine 3.6.1 loses right answers about images, and none without an image.

    If this fails, the engine is fixed, and docs and table must follow.
    """
    answers = pd.read_parquet(results / "evaluation" / "fp32" / "answers.parquet").query("expected.notna()")
    right = answers["as_called_score"]
    blind = answers["category"].isin(["sum", "translate"])
    assert (answers.loc[blind, "as_called"] == answers.loc[blind, "answer"]).all()
    assert right[~blind].mean() < answers["score"][~blind].mean() - 0.05


def test_run_ends_with_the_table_and_the_path_of_the_report(copy: Workspace) -> None:
    (copy.folder / "results" / "gates.txt").unlink()
    done = copy.snakemake(check=True)
    output = done.stdout + done.stderr
    assert "mean KLD" in output and "onnxruntime" in output
    assert "results/shapes-vl/report.html" in output


def test_unchanged_results_are_not_made_again(finished: Workspace) -> None:
    done = finished.snakemake("-n", check=True)
    assert "Nothing to be done" in done.stdout + done.stderr


ONE_VARIANT = {
    "quantize_variant": 1,
    "evaluate_variant": 1,
    "diagnose_variant": 1,
    "benchmark_variants": 1,
    "report_model": 1,
    "summarize_models": 1,
    "check_gates": 1,
    "all": 1,
    "total": 8,
}


def test_new_variant_converts_nothing_again(copy: Workspace) -> None:
    copy.config("  int4:\n", "  int3:\n    bits: 3\n    block: 32\n  int4:\n")
    planned = copy.snakemake("-n", check=True)
    assert jobs(planned.stdout + planned.stderr) == ONE_VARIANT


def test_changed_bits_rerun_that_variant_and_the_table(copy: Workspace) -> None:
    copy.config("  int4:\n    bits: 4\n", "  int4:\n    bits: 5\n")
    planned = copy.snakemake("-n", check=True)
    output = planned.stdout + planned.stderr
    assert jobs(output) == ONE_VARIANT
    assert "wildcards: model=shapes-vl, variant=int4" in output and "variant=int8" not in output
    assert "Params have changed" in output


def test_a_pinned_plan_makes_the_same_bundle_without_measuring(copy: Workspace) -> None:
    """With the chosen plan in config.yaml, no sensitivity is measured."""
    results = copy.folder / "results" / "shapes-vl"
    shutil.copy(results / "plans" / "mixed" / "plan.yaml", copy.folder / "my-plan.yaml")
    copy.config("bits: auto\n    budget: 4.25\n", "bits: 8\n    plan: my-plan.yaml\n")
    planned = copy.snakemake("-n", check=True)
    assert jobs(planned.stdout + planned.stderr) == ONE_VARIANT
    before = Manifest.load(results / "bundles" / "mixed").outputs
    copy.snakemake("results/shapes-vl/bundles/mixed", check=True)
    assert Manifest.load(results / "bundles" / "mixed").outputs == before


def test_deleted_file_is_reported_though_snakemake_does_not_detect_it(copy: Workspace) -> None:
    """Snakemake compares folders, and only those of the requested targets."""
    folder = "results/shapes-vl/bundles/int4"
    (copy.folder / folder / "visual.mnn").unlink()
    planned = copy.snakemake("-n", check=True)
    output = planned.stdout + planned.stderr
    assert re.search(rf"{folder}/visual\.mnn is missing.*{folder}", output)
    assert "Nothing to be done" in output
    shutil.rmtree(copy.folder / folder)
    copy.snakemake(folder, check=True)
    assert verify_folder(copy.folder / folder).intact


def test_second_model_is_a_second_block(copy: Workspace) -> None:
    copy.config("models:\n", "models:\n  twin:\n    source: {path: models/shapes-vl}\n    variants: [int4]\n")
    planned = copy.snakemake("-n", check=True)
    output = planned.stdout + planned.stderr
    assert jobs(output)["export_onnx"] == 1 and jobs(output)["quantize_variant"] == 1
    assert "model=shapes-vl" not in output


def test_toolchain_repeats_no_stage_of_the_pinned_tools(copy: Workspace) -> None:
    copy.config("models:\n", "toolchains:\n  old: {pins: {MNN: 3.6.0}}\nmodels:\n")
    planned = copy.snakemake("-n", check=True)
    output = planned.stdout + planned.stderr
    assert jobs(output)["make_toolchain"] == jobs(output)["compare_versions"] == jobs(output)["export_onnx"] == 1
    assert "model=shapes-vl+old" in output and not re.search(r"model=shapes-vl(,|$)", output, re.MULTILINE)


def test_changed_gate_rewrites_only_the_table(copy: Workspace) -> None:
    copy.config("mean_kld: 0.1", "mean_kld: 0.2")
    planned = copy.snakemake("-n", check=True)
    assert set(jobs(planned.stdout + planned.stderr)) == FINAL


def test_changed_benchmark_setting_repeats_the_benchmark_alone(copy: Workspace) -> None:
    copy.config(QUICK, QUICK.replace("repeats: 1", "repeats: 2"))
    planned = copy.snakemake("-n", check=True)
    assert set(jobs(planned.stdout + planned.stderr)) == FINAL | {"benchmark_variants"}


def test_required_variant_with_a_fault_fails_the_run_after_the_table_and_with_the_cause(copy: Workspace) -> None:
    """A zero weight appears in the line that a batch system prints; other variants are not affected."""
    bundle = copy.folder / "results" / "shapes-vl" / "bundles" / "int4"
    zeroed_norm(bundle, bundle.parent.parent / "onnx")
    with updated_folder(Manifest.load(bundle)):
        pass
    copy.config("  int4:\n", "  int4:\n    required: true\n")
    done = copy.snakemake()
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert jobs(output) == {name: count for name, count in ONE_VARIANT.items() if name != "quantize_variant"} | {
        "total": 7
    }
    (message,) = [line for line in output.splitlines() if line.startswith("error: 1 required of 8 ")]
    assert re.search(
        r"shapes-vl/int4: .*findings .*\(cause: model\.language_model\.layers\.2\.input_layernorm ", message
    )
    assert "variants compared with PyTorch in float32" in output, "the table is printed although the run fails"
    frame = pd.read_csv(copy.folder / "results" / "summary.csv").set_index("variant")
    assert list(frame["verdict"]) == ["reference", *["pass"] * 4, "FAIL", "pass", "pass"]
    assert not (copy.folder / "results" / "gates.txt").exists()


def test_optional_variant_that_misses_a_gate_does_not(copy: Workspace) -> None:
    copy.config("  int4:\n", "  int4:\n    gates: {mean_kld: 1.0e-12}\n")
    copy.snakemake(check=True)
    frame = pd.read_csv(copy.folder / "results" / "summary.csv").set_index("variant")
    assert frame.loc["int4", "verdict"] == "FAIL"


def test_a_model_against_itself_has_not_changed(finished: Workspace) -> None:
    done = run_cli("compare", "results/shapes-vl", "results/shapes-vl", "--layers", cwd=finished.folder)
    assert "Changes beyond uncertainty, results/shapes-vl to results/shapes-vl: none\n" in done.stdout, done.stderr
    assert "tools: no change\ncheckpoint: no change\npytorch: no layer changed\n" in done.stdout
    for variant in VARIANTS:
        assert f"{variant}: all operators are within tolerance\n" in done.stdout


def test_report_of_snakemake_carries_page_and_tables(
    finished: Workspace, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file for everything, without a network."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
    finished.snakemake("--report", str(tmp_path / "out.html"), cores=None, check=True)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=[\"']?http", page)
    embedded = [base64.b64decode(data) for data in re.findall(r'"data_uri": "data:[^"]*;base64,([^"]*)"', page)]
    for path in (results / "report.html", results / "figures.csv", results.parent / "summary.csv"):
        assert path.read_bytes() in embedded, path.name


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("bits: 4", "bits: 9", "variants.int4.bits"),
        ("block: 64", "blok: 64", "variants.int8.blok"),
        ("block: 64", "block: 48", "variants.int8.block"),
        ("int8:", "in t8:", "variants.in t8"),
    ],
)
def test_bad_config_is_refused_before_any_job(workspace: Workspace, old: str, new: str, key: str) -> None:
    workspace.config(old, new)
    done = workspace.snakemake()
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert f"config: {key}: " in output
    assert "Traceback" not in output
    assert not (workspace.folder / "results").exists()


def test_model_that_is_not_converted_is_refused_by_name(workspace: Workspace, tmp_path: Path) -> None:
    """The message reaches the terminal, and nothing remains that could pass for complete."""
    folder = tmp_path / "gemma"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    workspace.config("path: models/shapes-vl}", f"path: {folder}}}")
    done = workspace.snakemake()
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output
    assert "model_type 'gemma', which is not supported" in output and "error: " in output
    assert {path.name for path in (workspace.folder / "results" / "shapes-vl").iterdir()} <= {"examples"}


@pytest.mark.slow
def test_killed_stage_leaves_no_finished_folder(copy: Workspace) -> None:
    """SIGKILL the process group during a stage; the next run repeats it (all stages: tests/failures)."""
    results, stage = copy.folder / "results" / "shapes-vl", "bundles/int4"
    shutil.rmtree(results / stage)
    target = f"results/shapes-vl/{stage}"
    command = [BIN / "snakemake", "-s", REPOSITORY / "Snakefile", "--cores", "2", target]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=copy.folder, start_new_session=True, **quiet)
    folder = results / stage
    partial = folder.with_name(f".{folder.name}.partial")
    until = time.monotonic() + 120
    while not partial.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert partial.exists(), "the stage never started"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists()
    copy.snakemake("--unlock", check=True)
    copy.snakemake(target, check=True)
    assert (folder / "manifest.json").exists() and not partial.exists()


def test_results_of_the_former_layout_are_refused_and_kept(workspace: Workspace) -> None:
    former = workspace.folder / "results" / "shapes-vl" / "source"
    former.mkdir(parents=True)
    (former / "manifest.json").write_text("{}")
    done = workspace.snakemake("-n")
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "results/shapes-vl" in output and "earlier version" in output
    assert (former / "manifest.json").read_text() == "{}"
