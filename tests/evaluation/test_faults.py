"""Faults that real conversions make, put into sound bundles: each fails, and the report names what and where it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from faults import (
    FAULTS,
    LAYERS,
    break_bundle,
    flipped_rope,
    shifted_ids,
    swapped_weights,
    unfused_attention,
    wrong_mean,
    zeroed_norm,
)
from hf2mnn.config.schema import GeneralGates
from hf2mnn.evaluation import error_budget as budget
from hf2mnn.mnn.bundle import DECODER, TOKENIZER, VISION
from hf2mnn.mnn.convert import read_graph, write_graph
from hf2mnn.mnn.tokenizer import chat_template, write_tokenizer
from hf2mnn.report.evidence import read_evidence
from hf2mnn.report.table import FAIL, PASS, RowSpec, make_table
from hf2mnn.stages.diagnose import run as diagnose
from hf2mnn.stages.evaluate import run as evaluate

Fault = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Verdict:
    """A bundle's row of the table, and the findings behind it."""

    row: pd.Series
    findings: list[dict[str, Any]]


@pytest.fixture(scope="module")
def judge(shapes: Path) -> Iterator[Callable[[str], Verdict]]:
    """From a bundle's name to its verdict under the general gates, by the stages of the pipeline."""

    def of(name: str) -> Verdict:
        reference, onnx, bundle = shapes / "reference", shapes / "onnx", shapes / "bundles" / name
        evaluate(reference, onnx, shapes / "evaluation" / name, bundle, threads=1, time_limit=120)
        diagnosis, sound = shapes / "diagnosis" / name, shapes / "bundles" / "float"
        diagnose(reference, onnx, sound, bundle, diagnosis, threads=1, time_limit=120)
        evidence = read_evidence("shapes-vl", shapes, [name])
        gates = GeneralGates().model_dump(exclude_none=True)
        table = make_table(evidence, [RowSpec(name, required=True, gates=gates)])
        return Verdict(table.iloc[1], evidence.rows[0].findings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "EXAMPLES", 3)
        yield of


@pytest.fixture
def judge_broken(
    shapes: Path, judge: Callable[[str], Verdict], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Fault], Verdict]:
    """From a sound variant's name and a fault to the verdict on a copy of it with the fault in it."""
    # The error budget is no part of a verdict, and would be most of the time.
    monkeypatch.setattr(budget, "budget", lambda *_: pd.DataFrame(columns=budget.COLUMNS))

    def of(variant: str, fault: Fault) -> Verdict:
        name = f"{variant}-{fault.__name__}"
        break_bundle(shapes / "bundles" / variant, shapes / "bundles" / name, shapes / "onnx", fault)
        return judge(name)

    return of


def weight_of(bundle: Path, file: str, name: str) -> np.memmap:
    """A float32 weight in a bundle's file, to be written to."""
    (op,) = [op for op in read_graph(bundle / file).ops if op["name"] == name]
    offset, size, _ = op["main"]["external"]
    return np.memmap(bundle / f"{file}.weight", np.float32, mode="r+", offset=offset, shape=size // 4)


def shifted_lm_head(bundle: Path, _: Path) -> None:
    """Logit i is token i + 1's: a vocabulary that was padded at the wrong end."""
    weight = weight_of(bundle, DECODER, "logits__matmul_converted")
    weight[:] = np.roll(weight.reshape(640, -1), -1, axis=0).reshape(-1)


def swapped_channels(bundle: Path, _: Path) -> None:
    """The first convolution takes blue for red: a processor for images in the other order."""
    weight = weight_of(bundle, VISION, "model.visual.patch_embed.proj__0")
    weight[:] = weight.reshape(-1, 3, 2 * 14 * 14)[:, ::-1].reshape(-1)


def other_rope_base(bundle: Path, _: Path) -> None:
    """Rotary frequencies of the base 1000000, the larger models', where the checkpoint's is 10000."""
    graph = read_graph(bundle / DECODER)
    (constant,) = [op for op in graph.of_type("Const") if op["name"].endswith("rotary_emb.inv_freq")]
    constant["main"]["float32s"] = (1e6 ** -(np.arange(32) / 32)).tolist()
    write_graph(graph, bundle / DECODER)


def swapped_sections(bundle: Path, _: Path) -> None:
    """M-RoPE's sections in another order: right for text, where rows, columns and time are the same."""
    graph = read_graph(bundle / DECODER)
    (constant,) = [op for op in graph.of_type("Const") if op["main"].get("int32s") == [8, 12, 12]]
    constant["main"]["int32s"] = [12, 12, 8]
    write_graph(graph, bundle / DECODER)


def cacheless_attention(bundle: Path, _: Path) -> None:
    """One attention is MNN's own operator, and keeps nothing."""
    graph = read_graph(bundle / DECODER)
    graph.of_type("Attention")[2]["main"]["kv_cache"] = False
    write_graph(graph, bundle / DECODER)


def stale_template(bundle: Path, onnx_folder: Path) -> None:
    """The chat template of an earlier checkpoint, with another system prompt."""
    path, template = bundle / TOKENIZER, chat_template(onnx_folder).encode()
    path.write_bytes(path.read_bytes().replace(template, template.replace(b"assistant", b"companion")))


def foreign_tokenizer(bundle: Path, onnx_folder: Path) -> None:
    """A tokenizer with the same vocabulary and half of the merges."""
    folder = bundle / "foreign"
    shutil.copytree(onnx_folder, folder, ignore=shutil.ignore_patterns("*.onnx*"))
    described = json.loads((folder / "tokenizer.json").read_text())
    merges = described["model"]["merges"]
    described["model"]["merges"] = merges[: len(merges) // 2]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    write_tokenizer(folder, bundle / TOKENIZER)
    shutil.rmtree(folder)


@dataclass(frozen=True)
class Cause:
    """The first finding: its part, its point, and a piece of its sentence. Others accuse `more` alone."""

    part: str
    point: str | None
    sentence: str
    more: tuple[str, ...] = ()


FIRST = "model.language_model.layers.0.self_attn"
CAUSES: dict[Fault, Cause] = {
    unfused_attention: Cause(
        "decoder",
        f"{LAYERS}.2.self_attn.context",
        f"3 of 4 attentions are fused with a KV cache; not fused: {LAYERS}.2.",
    ),
    swapped_weights: Cause(
        "decoder",
        f"{LAYERS}.1.self_attn.q_proj",
        f"it has the weights of {LAYERS}.2.self_attn.q_proj",
        (f"{LAYERS}.1.self_attn.o_proj", f"{LAYERS}.1.mlp.down_proj"),
    ),
    zeroed_norm: Cause("decoder", f"{LAYERS}.2.input_layernorm", "(normalization): it gives only zeros"),
    wrong_mean: Cause(
        "settings", "image_mean", "image_mean [0.0, 0.0, 0.0], the checkpoint's is [122.7", ("image_norm",)
    ),
    shifted_ids: Cause("embedding", None, "row i holds token i+1's, the ids are shifted by 1"),
    stale_template: Cause("tokenizer", None, "the chat template in tokenizer.mtok is not the checkpoint's"),
    flipped_rope: Cause(
        "decoder",
        f"{LAYERS}.1.self_attn.query",
        "a sign is flipped in both halves of the rotation",
        (f"{LAYERS}.1.self_attn.key",),
    ),
    shifted_lm_head: Cause("decoder", "lm_head", "lm_head (linear layer): its values are off"),
    swapped_channels: Cause("vision", "model.visual.patch_embed.proj", "(convolution): its values are off"),
    other_rope_base: Cause(
        "decoder", f"{FIRST}.query", "(rotary position embedding)", (f"{FIRST}.key", f"{LAYERS}.1.self_attn.query")
    ),
    swapped_sections: Cause(
        "decoder", f"{FIRST}.query", "(rotary position embedding)", (f"{FIRST}.key", f"{LAYERS}.1.self_attn.query")
    ),
    cacheless_attention: Cause("decoder", f"{LAYERS}.2.self_attn.context", f"not fused: {LAYERS}.2.self_attn.context"),
}


@pytest.mark.parametrize("variant", ["fp32", "int4"])
def test_a_sound_bundle_passes_and_nothing_is_said_against_it(judge: Callable[[str], Verdict], variant: str) -> None:
    """Without this a diagnosis that accuses everyone would pass the tests below."""
    verdict = judge(variant)
    assert (verdict.row["verdict"], verdict.row["reason"], verdict.row["cause"]) == (PASS, "", "")
    assert verdict.row["findings"] == 0
    assert verdict.findings == []


def check(verdict: Verdict, fault: Fault) -> None:
    """FAIL, the cause first, and nobody accused who is innocent; findings that are about no point may follow."""
    cause, first = CAUSES[fault], verdict.findings[0]
    assert verdict.row["verdict"] == FAIL
    assert (first["part"], first["point"]) == (cause.part, cause.point)
    assert cause.sentence in first["sentence"]
    assert verdict.row["cause"].startswith(first["sentence"])
    accused = {finding["point"] for finding in verdict.findings} - {None}
    assert accused == {cause.point, *cause.more} - {None}


@pytest.mark.parametrize("fault", CAUSES, ids=lambda fault: fault.__name__)
def test_a_fault_in_a_float_bundle_fails_and_is_named(
    judge_broken: Callable[[str, Fault], Verdict], fault: Fault
) -> None:
    check(judge_broken("fp32", fault), fault)


@pytest.mark.parametrize("fault", [swapped_weights, zeroed_norm, flipped_rope], ids=lambda fault: fault.__name__)
def test_rounding_to_four_bits_does_not_hide_a_fault(
    judge_broken: Callable[[str, Fault], Verdict], fault: Fault
) -> None:
    """Each point is held against what is right given MNN's own inputs, so errors before it do not blur it."""
    check(judge_broken("int4", fault), fault)


def test_every_known_fault_has_its_cause_here() -> None:
    assert set(FAULTS) <= CAUSES.keys()


def test_a_foreign_tokenizer_fails_and_is_named(shapes: Path, judge: Callable[[str], Verdict]) -> None:
    """Logits are judged on transformers' tokens, so every other figure of such a bundle is good."""
    break_bundle(shapes / "bundles" / "fp32", shapes / "bundles" / "foreign", shapes / "onnx", foreign_tokenizer)
    verdict = judge("foreign")
    assert verdict.row["verdict"] == FAIL
    assert verdict.row["top1_agreement"] == 1 > verdict.row["tokenizer_match"]
    assert [finding["part"] for finding in verdict.findings] == ["tokenizer"]
    assert "the tokenizer makes other ids of 3 of 3 prompts" in verdict.row["cause"]


def test_what_the_engine_makes_of_a_conversation_is_told_where_it_parts_from_the_template(
    shapes: Path, judge: Callable[[str], Verdict]
) -> None:
    """The tokens of the right prompt are right, and so are all figures but those of a plain call."""
    break_bundle(shapes / "bundles" / "fp32", shapes / "bundles" / "stale", shapes / "onnx", stale_template)
    verdict = judge("stale")
    assert verdict.row["top1_agreement"] == verdict.row["tokenizer_match"] == 1 > verdict.row["template_match"] == 0
    assert [finding["part"] for finding in verdict.findings] == ["tokenizer", "template"]
    assert re.search(
        r"another prompt of \d+ of \d+ conversations: first in .*companion.* for .*assistant",
        verdict.findings[1]["sentence"],
    )
