"""A bundle in the engine itself: loaded in a process of its own and asked something."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import BundleError, BundleFault, EngineStopped
from hf2mnn.doctor.checks.tokenizer import template_of
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.paths import leading_out

LIMIT = 48
"""Tokens of an answer."""
REPEATED = 12
"""Times of one token in a row that are no answer any more."""
BROKEN = 0.1
"""Share of an answer's characters that may be no UTF-8: the last may be cut off."""
WORDS = 3
"""Lines of the engine's last ones that are shown."""


@dataclass(frozen=True)
class Signature:
    """What the engine says before it gives up, what is most likely wrong then, and what to do."""

    said: str
    cause: str
    cure: str


SIGNATURES = (
    Signature(
        r"past_key_values.*is input but not found",
        "the decoder was converted without --transformerFuse: it asks for a KV cache that the engine keeps itself",
        "convert the ONNX with --transformerFuse ('hf2mnn mnn' does)",
    ),
    Signature(
        r"tensor \[ .* \] is input but not found|Can't find output",
        "the decoder has other inputs or outputs than this engine feeds and reads",
        "convert the model for MNN's LLM engine ('hf2mnn mnn', or llmexport of the engine's own version)",
    ),
    Signature(
        r"(tokenizer|LLM model|LLM weight) file not found|permission denied",
        "a file that config.json names, or that is the engine's default, is not there or cannot be read",
        "copy it into the bundle, or name it in config.json",
    ),
    Signature(
        r"magic number is wrong|load tokenizer|load tokenzier",
        "the tokenizer's file is none",
        "take the tokenizer of the checkpoint; of a clone without Git LFS run 'git lfs pull'",
    ),
    Signature(
        r"weightLength is 0|can't extract IDST|Read shape error|Can't open file:.*weight|Rebuild External Op failed"
        r"|[Ee]xternal is nullptr|Read file Error",
        "a weight file is not there, shorter than the graph reads, or another model's",
        "copy it again (of a clone without Git LFS run 'git lfs pull'), or convert the checkpoint again",
    ),
    Signature(
        r"embedding file",
        "the embedding's file is not there",
        "copy it into the bundle, or name it as embedding_file in config.json",
    ),
    Signature(
        r"Don't support|[Cc]reate execution error|Can't create|not support|Plugin|EXTRA|Extra",
        "the graph holds operators that this engine does not have: it is older than the converter, or they are another"
        " runtime's",
        "use the MNN that the bundle was made for, or convert it with this one",
    ),
    Signature(
        r"[Cc]ompute [Ss]hape|[Rr]esize error|Broad cast error|compute size|Error for concat size",
        "the sizes in the config are not the graph's (hidden_size, attention_mask, is_mrope)",
        "convert the checkpoint again, so that graph and config are of one conversion",
    ),
    Signature(
        r"Memory Alloc Failed|OOM|Alloc memory|bad_alloc",
        "the machine has not the memory that the model takes",
        "run it on a larger machine, or quantize it to fewer bits",
    ),
    Signature(
        r"Can't open file|Load module failed|Invalid net|Invalidate buffer|Create module error|Error for open",
        "a .mnn file is not there, not whole, or not a model of this MNN",
        "copy it again, or convert the checkpoint with this MNN",
    ),
)
"""By MNN 3.6.1's own messages (llm.cpp, tokenizer.cpp, diskembedding.cpp, FileLoader.cpp, Pipeline.cpp,
PipelineModule.cpp); the first that fits counts."""

STEPS = {
    "load": (
        "while it loaded the bundle",
        "a file is not whole, or not what its name says",
        "see what the other findings say of the files, or convert the checkpoint again",
    ),
    "template": (
        "while it rendered the chat template",
        "the engine's Jinja does not run this template",
        "write the template with what it runs",
    ),
    "text": (
        "while it answered a text",
        "config and graph, or tokenizer and embedding, are not of one model: an id or a size is read past its end",
        "see what the other findings say of the config, or convert the checkpoint again",
    ),
    "image": (
        "while it looked at an image",
        "the vision tower, the vision ids or the sizes of patches are not what the engine takes them for",
        "see what the other findings say of the vision tower, or convert the checkpoint again",
    ),
}
"""What the engine was doing, what is most likely where it said nothing that is known, and what to do."""

GARBAGE = (
    "a weight file or the embedding is missing, cut short or another model's",
    "copy it again (of a clone without Git LFS run 'git lfs pull'), or convert the checkpoint again",
)
"""The same of logits that are none."""


def explain(words: list[str], step: str) -> tuple[str, str]:
    """The most likely cause of what the engine printed during a step, and the cure."""
    said = "\n".join(words)
    known = next((found for found in SIGNATURES if re.search(found.said, said)), None)
    return (known.cause, known.cure) if known else STEPS[step][1:]


def _finding(check: str, severity: Severity, sentence: str, evidence: str, effect: str, cure: str) -> Finding:
    return Finding(check, severity, CONFIG, sentence, evidence, effect, cure)


def _fault(error: BundleFault, step: str) -> Finding:
    doing, *_ = STEPS[step]
    cause, cure = explain(error.words, step)
    # The engine was given links in a folder of its own.
    said = [re.sub(r"/\S*?/bundle-[^/\s]+/", "", word) for word in error.words if not word.startswith("refused: ")]
    words = " / ".join(said[-WORDS:])
    last = f"its last words: {words}" if words else "it said nothing"
    if "does not load" in str(error):
        return _finding(
            "run_load",
            Severity.ERROR,
            f"the engine does not load the bundle: {cause}",
            last,
            "there is no answer",
            cure,
        )
    if "answers garbage" in str(error):
        return _finding(
            "run_garbage",
            Severity.ERROR,
            f"the engine's logits are no logits ({doing}): {GARBAGE[0] if cause == STEPS[step][1] else cause}",
            f"they are equal, not finite, or beyond 1e30; {last}",
            "the answer is one token over and over, or nonsense",
            GARBAGE[1] if cause == STEPS[step][1] else cure,
        )
    how = re.search(r"\((signal \d+|exit code \d+)\)", str(error))
    return _finding(
        "run_crash",
        Severity.ERROR,
        f"the engine dies {doing}: most likely {cause}",
        f"{how[1] if how else error}; {last}",
        "the application that runs it ends with it",
        cure,
    )


def _first_difference(one: str, other: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(at - 20, 0)
    return f"from character {at} on the engine has {one[begin : at + 30]!r}, Jinja {other[begin : at + 30]!r}"


def _rendered(found: dict[str, Any]) -> list[Finding]:
    made, right = found.get("template", [None, None])
    if right is None or made == right:
        return []
    return [
        _finding(
            "run_template",
            Severity.ERROR,
            "the engine renders the chat template otherwise than transformers does",
            _first_difference(made, right),
            "the model gets another format of chats than it was trained on: worse answers, or ones without an end",
            "write the template without what the engine's Jinja does not run",
        )
    ]


def _answered(found: dict[str, Any]) -> list[Finding]:
    findings = []
    for step in ("text", "image"):
        if step not in found:
            continue
        answered, doing = found[step], STEPS[step][0]
        text, shown = answered["text"], repr(answered["text"][:80])
        if answered["longest"] >= REPEATED:
            findings.append(
                _finding(
                    "run_repetition",
                    Severity.ERROR,
                    f"the answer repeats one token ({doing})",
                    f"{answered['longest']} times in a row: {shown}",
                    "answers are of no use",
                    "weights, positions or the attention mask are wrong, or half floats overflow: see the other"
                    ' findings, and try "precision": "high" in config.json',
                )
            )
        elif text and text.count("\ufffd") > max(1, BROKEN * len(text)):
            findings.append(
                _finding(
                    "run_undecodable",
                    Severity.ERROR,
                    f"the answer is no text ({doing})",
                    f"{text.count(chr(0xFFFD))} of {len(text)} characters are no UTF-8: {shown}",
                    "answers are of no use",
                    "the tokenizer or the weights are not this model's: see the other findings, or convert the"
                    " checkpoint again",
                )
            )
    answers = [found[step] for step in ("text", "image") if step in found]
    # One alone may be all that a small model has to say.
    if answers and not any(answered["text"] for answered in answers) and not findings:
        findings.append(
            _finding(
                "run_empty",
                Severity.WARNING,
                "the answers are empty",
                f"tokens {', '.join(str(answered['answer'][:8]) for answered in answers)}",
                "there is no answer",
                "see whether the chat template is the checkpoint's, and its stop ids",
            )
        )
    return findings


def run_bundle(bundle: Bundle, prompt: str, time_limit: float) -> list[Finding]:
    """What the engine makes of a bundle in `time_limit` seconds: it is loaded, asked `prompt`, and where it sees the
    same about a small image. Neither a manifest nor a key of ours is asked for. One whose configuration leads out of
    its folder is not run: `checks.config.path_outside` says so.

    Raises:
        MachineError: the machine has no room or no memory left.
        EngineError: a bug of ours.
    """
    if any(leading_out(bundle.folder, bundle.model)):
        return []
    try:
        template, _ = template_of(bundle)
        tokens = {"eos_token": bundle.tokenizer.eos, "bos_token": bundle.tokenizer.bos}
    except BundleError:
        # What the engine does with such a tokenizer is the question.
        template, tokens = "", {"eos_token": "", "bos_token": ""}
    given = bundle.model.get("jinja")
    if isinstance(given, dict) and isinstance(given.get("eos"), str):
        tokens["eos_token"] = given["eos"]
    roles = (("user", prompt), ("assistant", "Yes."), ("user", prompt))
    with tempfile.TemporaryDirectory(prefix="hf2mnn-doctor-") as scratch:
        result = Path(scratch, "result.json")
        job = {
            "bundle": str(bundle.folder.resolve()),
            "prompt": prompt,
            "chat": [{"role": role, "content": content} for role, content in roles],
            "template": "" if bundle.model.get("use_template") is False else template,
            "tokens": tokens,
            "visual": bundle.model.get("is_visual") is True,
            "max_new_tokens": LIMIT,
            "result": str(result),
        }
        try:
            run_worker("hf2mnn.mnn.worker.question", job, time_limit)
            faults = []
        except (BundleFault, EngineStopped) as error:
            step = json.loads(result.read_text())["step"] if result.is_file() else "load"
            faults = [_fault(error, step)] if isinstance(error, BundleFault) else [_stopped(error, step)]
        found = json.loads(result.read_text()) if result.is_file() else {}
    return [*faults, *_rendered(found), *_answered(found)]


def _stopped(error: EngineStopped, step: str) -> Finding:
    doing, cause, cure = STEPS[step]
    return _finding(
        "run_hang",
        Severity.ERROR,
        f"the engine does not come to an end {doing}",
        str(error),
        "an application that runs it hangs",
        f"give it more time (--time-limit) or memory; if that does not help, {cause}: {cure}",
    )
