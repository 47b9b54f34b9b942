"""Load a bundle in the engine, in a child process, and check its answers."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hf2mnn.core.errors import BundleError, BundleFault, EngineStopped
from hf2mnn.doctor.artifacts import Bundle
from hf2mnn.doctor.checks.tokenizer import template_of
from hf2mnn.doctor.findings import Finding, Findings, Severity
from hf2mnn.metrics import common_prefix
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.mnn.bundle_config import outside_paths
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.engine_facts import GARBAGE_LOGIT, MESSAGES

MAX_NEW_TOKENS = 48
REPEATED = 12  # number of equal tokens in a row from which an answer counts as a repetition
UNDECODABLE = 0.1  # fraction of an answer's characters that may be invalid UTF-8: the last one may be incomplete
LINES = 3  # number of the engine's last lines that are shown


class Diagnosis(NamedTuple):
    """Most likely cause of a failure of the engine, and its cure."""

    cause: str
    cure: str
    action: str = ""  # what the engine does, if the diagnosis is that of a step


CONVERT_AGAIN = "convert the checkpoint again, so that graph and configuration are of one conversion"
COPY_AGAIN = "copy it again (in a clone without Git LFS run 'git lfs pull'), or convert the checkpoint again"
DIAGNOSES = {
    "kv_cache_input": Diagnosis(
        "the decoder was converted without --transformerFuse: its KV cache is an input, and the engine keeps it itself",
        "convert the ONNX with --transformerFuse ('hf2mnn convert' does)",
    ),
    "graph_inputs": Diagnosis(
        "the decoder has other inputs or outputs than this engine uses",
        "convert the model for MNN's LLM engine ('hf2mnn convert', or llmexport of the engine's release)",
    ),
    "file_missing": Diagnosis(
        "a file that config.json names, or the engine's default for it, is missing or unreadable",
        "copy it into the bundle, or name it in config.json",
    ),
    "tokenizer": Diagnosis("the tokenizer file is not a tokenizer", COPY_AGAIN),
    "weights": Diagnosis("a weight file is missing, truncated, or another model's", COPY_AGAIN),
    "embedding": Diagnosis("the embedding file is missing", "copy it, or name it as embedding_file in config.json"),
    "operator": Diagnosis(
        "the graph has operators that this engine does not implement: of a newer converter, or of another runtime",
        "use the MNN release that the bundle was converted for, or convert it with the installed one",
    ),
    "shapes": Diagnosis(
        "sizes in the configuration differ from the graph (hidden_size, attention_mask, is_mrope)", CONVERT_AGAIN
    ),
    "memory": Diagnosis(
        "the machine has less memory than the model needs", "run it on a larger machine, or quantize it to fewer bits"
    ),
    "graph_file": Diagnosis(
        "a .mnn file is missing, truncated, or not a model of this MNN",
        "copy it again, or convert the checkpoint with this MNN",
    ),
}
"""Diagnosis by the kind of the engine's last messages (`engine_facts.MESSAGES`)."""
GARBAGE = Diagnosis("a weight file or the embedding is missing, truncated or another model's", COPY_AGAIN)
STEPS = {
    "load": Diagnosis("a file is truncated, or not what its name says", COPY_AGAIN, "while loading the bundle"),
    "template": Diagnosis(
        "the engine's Jinja does not implement this template",
        "rewrite the template without what it does not implement",
        "while rendering the chat template",
    ),
    "text": Diagnosis(
        "configuration and graph, or tokenizer and embedding, are of two models: an id or a size is out of range",
        f"see the findings about the configuration, or {CONVERT_AGAIN}",
        "while answering a text prompt",
    ),
    "image": Diagnosis(
        "the vision tower, the ids of image tokens or the patch sizes are not those of this engine",
        f"see the findings about the vision tower, or {CONVERT_AGAIN}",
        "while answering a prompt with an image",
    ),
}
"""Diagnosis of a failure without a known message, by the step of `hf2mnn.mnn.worker.question`."""


def diagnose(output: list[str]) -> Diagnosis | None:
    """Return the diagnosis for the engine's output, or None if it has no known message."""
    text = "\n".join(output)
    return next((DIAGNOSES[kind] for kind, pattern in MESSAGES.items() if re.search(pattern, text)), None)


def _fault(error: BundleFault | EngineStopped, step: Diagnosis) -> Finding:
    if isinstance(error, EngineStopped):
        message = f"the engine does not finish {step.action}"
        cure = f"give it more time (--time-limit) or memory; otherwise {step.cause}: {step.cure}"
        return Finding(CONFIG, message, str(error), "an application that runs it hangs", cure, check="run_hang")
    known = diagnose(error.output) or (GARBAGE if error.kind == "garbage" else step)
    # The engine runs on links in a temporary folder.
    lines = [re.sub(r"/\S*?/bundle-[^/\s]+/", "", line) for line in error.output][-LINES:]
    evidence = f"its last output: {' / '.join(lines)}" if lines else "it printed nothing"
    if error.kind == "load":
        check, message = "run_load", f"the engine does not load the bundle: {known.cause}"
        effect = "there is no answer"
    elif error.kind == "garbage":
        check, message = "run_garbage", f"the engine's logits are invalid ({step.action}): {known.cause}"
        evidence = f"they are equal, not finite, or beyond {GARBAGE_LOGIT:.0e}; {evidence}"
        effect = "the answer repeats one token or is wrong"
    else:
        check, message = "run_crash", f"the engine crashes {step.action}: most likely {known.cause}"
        evidence = f"{error.ended or error}; {evidence}"
        effect = "the application that runs it crashes, too"
    return Finding(CONFIG, message, evidence, effect, known.cure, check=check)


def _answer_findings(answers: dict[str, dict[str, Any]]) -> Findings:
    """Yield the findings about answers by step, in the form of `hf2mnn.mnn.worker.question`."""
    useless = "the answers are useless"
    for step, answer in answers.items():
        text, action = answer["text"], STEPS[step].action
        if answer["longest"] >= REPEATED:
            message = f"the answer repeats one token ({action})"
            evidence = f"{answer['longest']} times in a row: {text[:80]!r}"
            cure = 'see the other findings, and try "precision": "high" in config.json, in case float16 overflows'
            yield Finding(CONFIG, message, evidence, useless, cure, check="run_repetition")
        elif (invalid := text.count("\ufffd")) > max(1, UNDECODABLE * len(text)):
            message = f"the answer is not text ({action})"
            evidence = f"{invalid} of {len(text)} characters are invalid UTF-8: {text[:80]!r}"
            cure = "tokenizer or weights are another model's: see the other findings, or convert the checkpoint again"
            yield Finding(CONFIG, message, evidence, useless, cure, check="run_undecodable")
    # A small model may answer one of the two prompts with nothing.
    if answers and not any(answer["text"] or answer["longest"] >= REPEATED for answer in answers.values()):
        evidence = f"tokens {', '.join(str(answer['answer'][:8]) for answer in answers.values())}"
        cure = "compare the chat template and its stop ids with the checkpoint's"
        message, effect = "the answers are empty", "there is no answer"
        yield Finding(CONFIG, message, evidence, effect, cure, check="run_empty", severity=Severity.WARNING)


def _job(bundle: Bundle, prompt: str, result: Path) -> dict[str, Any]:
    """Return the job of `hf2mnn.mnn.worker.question`."""
    try:
        template, _ = template_of(bundle)
        tokens = {"eos_token": bundle.tokenizer.eos, "bos_token": bundle.tokenizer.bos}
    except BundleError:  # run the engine with the invalid tokenizer
        template, tokens = "", {"eos_token": "", "bos_token": ""}
    jinja, question = bundle.model.get("jinja"), {"role": "user", "content": prompt}
    if isinstance(jinja, dict):
        tokens |= {"eos_token": jinja["eos"]} if isinstance(jinja.get("eos"), str) else {}
        tokens |= jinja["context"] if isinstance(jinja.get("context"), dict) else {}
    return {
        "bundle": str(bundle.folder.resolve()),
        "prompt": prompt,
        "chat": [question, {"role": "assistant", "content": "Yes."}, question],
        "template": "" if bundle.model.get("use_template") is False else template,
        "tokens": tokens,
        "visual": bundle.model.get("is_visual") is True,
        "max_new_tokens": MAX_NEW_TOKENS,
        "result": str(result),
    }


def run_bundle(bundle: Bundle, prompt: str, time_limit: float) -> list[Finding]:
    """Load a bundle in the engine and ask it `prompt`, and the same about a small image if it has a vision tower.

    The engine is stopped after `time_limit` seconds. The bundle needs neither a manifest nor the key "hf2mnn". A bundle
    whose configuration names paths outside its folder is not run; `path_outside` reports it.
    """
    if any(outside_paths(bundle.folder, bundle.model)):
        return []
    findings = []
    with tempfile.TemporaryDirectory(prefix="hf2mnn-doctor-") as scratch:
        path, fault = Path(scratch, "result.json"), None
        try:
            run_worker("hf2mnn.mnn.worker.question", _job(bundle, prompt, path), time_limit)
        except (BundleFault, EngineStopped) as error:
            fault = error
        results = json.loads(path.read_text()) if path.is_file() else {"step": "load"}
    if fault:
        findings.append(_fault(fault, STEPS.get(results["step"], STEPS["text"])))
    engine, expected = results.get("template", [None, None])
    if engine != expected:
        first = common_prefix(engine, expected)
        context = slice(max(first - 20, 0), first + 30)
        message = "the engine renders the chat template differently than transformers"
        evidence = f"from character {first} on the engine has {engine[context]!r}, Jinja {expected[context]!r}"
        effect = "the model gets another chat format than in training: worse answers, or answers without an end"
        cure = "rewrite the template without what the engine's Jinja does not implement"
        findings.append(Finding(CONFIG, message, evidence, effect, cure, check="run_template"))
    return [*findings, *_answer_findings({step: results[step] for step in ("text", "image") if step in results})]
