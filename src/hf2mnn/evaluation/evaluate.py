"""Evaluation of a bundle in MNN's engine, or of the ONNX graphs in ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import BundleFault
from hf2mnn.evaluation.findings import SUMMARY
from hf2mnn.evaluation.score import Answer, Outputs, score, score_fault
from hf2mnn.mnn.engine import run_worker
from hf2mnn.reference.golden import Golden
from hf2mnn.reference.prompts import AnswerDecoder

LOGITS = "logits.safetensors"


def run_engine(bundle: Path, golden: Golden, max_new_tokens: int, threads: int, time_limit: float) -> Outputs:
    """Run the evaluation set through a bundle, in a child process, which raises the errors of `run_worker`."""
    with tempfile.TemporaryDirectory(prefix="hf2mnn-eval-") as folder:
        result, called = Path(folder, "result.safetensors"), Path(folder, "called.json")
        job = {"bundle": str(bundle.resolve()), "reference": str(golden.folder.resolve())}
        job |= {"max_new_tokens": max_new_tokens, "threads": threads, "result": str(result), "called": str(called)}
        run_worker("hf2mnn.mnn.worker.evaluate", job, time_limit)
        as_called, outputs = json.loads(called.read_text()), Outputs()
        with safe_open(result, "np") as tensors:
            for example, plain in as_called.items():
                logits, greedy = (tensors.get_tensor(f"examples/{example}/{name}") for name in ("logits", "greedy_ids"))
                engine = (plain["answer"], plain["prompt"], plain["written"])
                outputs.answers[example] = Answer(logits, greedy.tolist(), *engine)
            for name in golden.image_names():
                outputs.embeds[name] = tensors.get_tensor(f"images/{name}/embeds")
            for name in sorted(n for n in tensors.keys() if n.startswith("parity/")):  # noqa: SIM118
                _, probe, way = name.split("/")
                outputs.parity.setdefault(probe, {})[way] = tensors.get_tensor(name)
    return outputs


def evaluate(
    golden: Golden,
    onnx_folder: Path,
    bundle: Path | None,
    folder: Path,
    size: int,
    limit: int,
    threads: int,
    time_limit: float,
    keep_logits: bool = False,
) -> dict[str, Any]:
    """Write the tables of a conversion and summary.json to `folder`; returns the summary.

    Runs `bundle` in MNN's engine, or the graphs of `onnx_folder` in ONNX Runtime if it is None. `size` is in bytes and
    `limit`, the longest answer, in tokens. With `keep_logits` also writes logits.safetensors, to recompute figures.

    A bundle that the engine refuses or crashes on is a result: `fault` in the summary is the message, figures are None.
    Raises EngineError if the engine was stopped.
    """
    decode, fault = AnswerDecoder(load_tokenizer(onnx_folder)), None
    image = json.loads((onnx_folder / "model.json").read_text()).get("image_token_id")
    try:
        if bundle is not None:
            outputs = run_engine(bundle, golden, limit, threads, time_limit)
        else:
            from hf2mnn.evaluation.onnxruntime import run_onnxruntime  # a toolchain's environment may lack it

            outputs = run_onnxruntime(onnx_folder, golden, limit, threads)
        scores = score(golden, outputs, decode, image)
        if keep_logits:
            logits = {name: answer.logits.astype(np.float32) for name, answer in outputs.answers.items()}
            save_file(logits, folder / LOGITS)
    except BundleFault as error:
        fault, scores = str(error), score_fault(golden, decode, image)
    for name, frame in scores.tables().items():
        frame.to_parquet(folder / name, index=False)
    summary = {"fault": fault, **scores.summary, "bytes": size}
    summary |= {"positions": len(scores.positions), "examples": len(scores.answers)}
    summary["labelled"] = int(scores.answers["expected"].notna().sum())
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary
