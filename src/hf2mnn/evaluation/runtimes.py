"""Run an evaluation set in MNN's engine or in ONNX Runtime, and write what was measured."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf2mnn.core.errors import BundleFault
from hf2mnn.evaluation.answers import Answer, Outcome
from hf2mnn.evaluation.names import SUMMARY
from hf2mnn.evaluation.score import score, score_fault
from hf2mnn.mnn.engine import run_worker
from hf2mnn.reference.golden import Golden
from hf2mnn.reference.text import AnswerDecoder


def run_engine(bundle: Path, golden: Golden, max_new_tokens: int, threads: int, time_limit: float) -> Outcome:
    """Answer the evaluation set with a bundle, in a child process.

    Raises:
        BundleFault: The engine refused the bundle or crashed on it.
        EngineError: The engine was stopped.
    """
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
            for name in golden.image_names():
                outcome.embeds[name] = tensors.get_tensor(f"images/{name}/embeds")
            for name in sorted(n for n in tensors.keys() if n.startswith("parity/")):  # noqa: SIM118
                _, probe, way = name.split("/")
                outcome.parity.setdefault(probe, {})[way] = tensors.get_tensor(name)
    return outcome


def _outcome(
    golden: Golden, onnx_folder: Path, bundle: Path | None, limit: int, threads: int, time_limit: float
) -> Outcome:
    if bundle is not None:
        return run_engine(bundle, golden, limit, threads, time_limit)
    from hf2mnn.evaluation.onnxruntime import run_onnxruntime  # not in every environment of the engine

    return run_onnxruntime(onnx_folder, golden, limit, threads)


def evaluate(
    golden: Golden,
    onnx_folder: Path,
    bundle: Path | None,
    folder: Path,
    size: int,
    limit: int,
    threads: int,
    time_limit: float,
) -> dict[str, Any]:
    """Write the tables of a conversion and summary.json to `folder`; returns the summary.

    A bundle that the engine refuses or crashes on is a result: `fault` says why, and its figures are None.

    Args:
        golden: The reference.
        onnx_folder: Folder of the export stage.
        bundle: Bundle to run in MNN's engine; None runs the ONNX graphs in ONNX Runtime.
        folder: Output folder.
        size: Bytes of the conversion.
        limit: Longest answer, in tokens.
        threads: Threads of the runtime.
        time_limit: Seconds after which the engine is stopped.

    Raises:
        EngineError: The engine was stopped.
    """
    decode, facts = AnswerDecoder(onnx_folder), json.loads((onnx_folder / "model.json").read_text())
    image, fault = facts.get("image_token_id"), None
    try:
        scores = score(golden, _outcome(golden, onnx_folder, bundle, limit, threads, time_limit), decode, image)
    except BundleFault as error:
        fault, scores = str(error), score_fault(golden, decode, image)
    for name, frame in scores.tables().items():
        frame.to_parquet(folder / name, index=False)
    summary = {"fault": fault, **scores.summary, "bytes": size}
    summary |= {"positions": len(scores.positions), "examples": len(scores.answers)}
    summary["labelled"] = int(scores.answers["expected"].notna().sum())
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary
