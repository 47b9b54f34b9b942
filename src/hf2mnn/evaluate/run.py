"""The `evaluate` stage: one conversion's answers to the evaluation set, in the runtime that will run it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hf2mnn.errors import BundleFault
from hf2mnn.evaluate.answers import Answer, Outcome
from hf2mnn.evaluate.names import LOGITS, SUMMARY
from hf2mnn.evaluate.score import score, score_fault
from hf2mnn.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.mnn.engine import run_worker
from hf2mnn.reference.golden import Golden
from hf2mnn.reference.text import AnswerDecoder


def _run_engine(bundle: Path, golden: Golden, max_new_tokens: int, threads: int, time_limit: float) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="hf2mnn-eval-") as folder:
        result, said = Path(folder, "result.safetensors"), Path(folder, "called.json")
        job = {
            "bundle": str(bundle.resolve()),
            "reference": str(golden.folder.resolve()),
            "result": str(result),
            "called": str(said),
            "max_new_tokens": max_new_tokens,
            "threads": threads,
        }
        run_worker("hf2mnn.mnn.worker.evaluate", job, time_limit)
        as_called, outcome = json.loads(said.read_text()), Outcome()
        with safe_open(result, "np") as tensors:
            for record in golden.records:
                name = f"examples/{record['id']}"
                greedy = tensors.get_tensor(f"{name}/greedy_ids").tolist()
                called = as_called[record["id"]]
                outcome.answers[record["id"]] = Answer(
                    tensors.get_tensor(f"{name}/logits"), greedy, called["answer"], called["prompt"], called["written"]
                )
            for name in golden.picture_names():
                outcome.embeds[name] = tensors.get_tensor(f"pictures/{name}/embeds")
            for name in sorted(n for n in tensors.keys() if n.startswith("parity/")):  # noqa: SIM118
                _, probe, way = name.split("/")
                outcome.parity.setdefault(probe, {})[way] = tensors.get_tensor(name)
    return outcome


def evaluate(
    reference: Path, onnx_folder: Path, destination: Path, bundle: Path | None, threads: int, time_limit: float
) -> Path:
    """Evaluate `bundle` in MNN's engine, or, where it is None, the ONNX graphs in ONNX Runtime.

    That the engine refuses a bundle or crashes on it is a result: the summary says so under "fault", figures are None.

    Raises:
        ManifestError: an input is not what its manifest says.
        EngineError: the engine was stopped.
    """
    inputs = {"reference": Manifest.load(reference), "onnx": Manifest.load(onnx_folder)}
    if bundle is not None:
        inputs["bundle"] = Manifest.load(bundle)
    for upstream in inputs.values():
        upstream.verify()
    golden = Golden(reference)
    limit = inputs["reference"].settings["max_new_tokens"]
    tools = tool_versions("MNN" if bundle else "onnxruntime", "numpy")
    manifest = Manifest("evaluate", {name: m.digest() for name, m in inputs.items()}, {"threads": threads}, tools)
    decode, facts = AnswerDecoder(onnx_folder), json.loads((onnx_folder / "model.json").read_text())
    with stage_folder(destination, manifest) as folder:
        fault, outcome = None, Outcome()
        if bundle is None:
            from hf2mnn.evaluate.onnxruntime import run_onnxruntime  # not in the environment of the engine

            outcome, measured = run_onnxruntime(onnx_folder, golden, limit, threads), onnx_folder
        else:
            measured = bundle
            try:
                outcome = _run_engine(bundle, golden, limit, threads, time_limit)
            except BundleFault as error:
                fault = str(error)
        if fault is None:
            scores = score(golden, outcome, decode, facts.get("image_token_id"))
        else:
            scores = score_fault(golden, decode, facts.get("image_token_id"))
        for name, frame in scores.tables().items():
            frame.to_parquet(folder / name, index=False)
        save_file({name: answer.logits.astype(np.float32) for name, answer in outcome.answers.items()}, folder / LOGITS)
        size = sum(entry["size"] for entry in inputs["onnx" if bundle is None else "bundle"].outputs.values())
        summary = {"fault": fault, **scores.summary, "bytes": size}
        summary |= {"positions": len(scores.positions), "examples": len(scores.answers)}
        summary["labelled"] = int(scores.answers["expected"].notna().sum())
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        manifest.results = {"measured": measured.name, **summary}
    return destination
