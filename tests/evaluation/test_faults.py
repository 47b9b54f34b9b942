"""Faults of real conversions, put into right bundles: each fails a gate, and the diagnosis names its cause."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from faults import (
    FAULTS,
    LAYERS,
    Fault,
    break_bundle,
    flipped_rope,
    shifted_ids,
    swapped_weights,
    unfused_attention,
    wrong_mean,
    zeroed_norm,
)
from faulty_bundles import edit_graph
from hf2mnn.checkpoint.facts import chat_template
from hf2mnn.config.variants import GeneralGates
from hf2mnn.evaluation import error_budget
from hf2mnn.mnn.bundle import DECODER, TOKENIZER, VISION
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.graph import Graph
from hf2mnn.mnn.tokenizer import write_tokenizer
from hf2mnn.report.evidence import read_evidence
from hf2mnn.report.table import FAIL, PASS, VariantSpec, make_table
from hf2mnn.stages.diagnose import run as diagnose
from hf2mnn.stages.evaluate import run as evaluate


@dataclass(frozen=True)
class Verdict:
    """Row of a bundle in the table, and its findings."""

    row: pd.Series
    findings: list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of results/shapes-vl by hard links, to which tests add bundles."""
    destination = tmp_path_factory.mktemp("faults") / "shapes-vl"
    return Path(shutil.copytree(shapes, destination, symlinks=True, copy_function=os.link))


def judge(folder: Path, name: str) -> Verdict:
    """Return the verdict on a bundle under the general gates, by the stages of the pipeline."""
    reference, onnx, bundle = folder / "reference" / "evaluation", folder / "onnx", folder / "bundles" / name
    evaluate(reference, onnx, folder / "evaluation" / name, bundle, threads=1, time_limit=120)
    diagnose(reference, onnx, folder / "baseline", bundle, folder / "diagnosis" / name, threads=1, time_limit=120)
    evidence = read_evidence("shapes-vl", folder, [name])
    gates = GeneralGates().model_dump(exclude_none=True)
    table = make_table(evidence, [VariantSpec(name, required=True, gates=gates)])
    return Verdict(table.iloc[1], evidence.variants[0].findings)


@pytest.fixture(scope="module")
def judge_broken(folder: Path) -> Callable[[str, Fault], Verdict]:
    """Return a function from a variant and a fault to the verdict on a copy with the fault, without error budget."""

    @cache
    def of(variant: str, fault: Fault) -> Verdict:
        name = f"{variant}-{fault.__name__}"
        break_bundle(folder / "bundles" / variant, folder / "bundles" / name, folder / "onnx", fault)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(error_budget, "budget", lambda *_: pd.DataFrame(columns=error_budget.COLUMNS))
            return judge(folder, name)

    return of


def weight_of(bundle: Path, file: str, name: str) -> np.memmap:
    """Return a float32 weight of a bundle's file, as writable memory map."""
    (op,) = [op for op in read_graph(bundle / file).ops if op["name"] == name]
    offset, size, _ = op["main"]["external"]
    return np.memmap(bundle / f"{file}.weight", np.float32, mode="r+", offset=offset, shape=size // 4)


def shifted_lm_head(bundle: Path, _: Path) -> None:
    """Shift the logits by one token, as a vocabulary that is padded at the wrong end."""
    weight = weight_of(bundle, DECODER, "logits__matmul_converted")
    weight[:] = np.roll(weight.reshape(640, -1), -1, axis=0).reshape(-1)


def swapped_channels(bundle: Path, _: Path) -> None:
    """Swap red and blue in the first convolution, as for BGR images."""
    weight = weight_of(bundle, VISION, "model.visual.patch_embed.proj__0")
    weight[:] = weight.reshape(-1, 3, 2 * 14 * 14)[:, ::-1].reshape(-1)


def other_rope_base(bundle: Path, _: Path) -> None:
    """Use rotary frequencies of base 1,000,000, where the checkpoint has 10,000."""

    def edit(graph: Graph) -> None:
        (constant,) = [op for op in graph.of_type("Const") if op["name"].endswith("rotary_emb.inv_freq")]
        constant["main"]["float32s"] = (1e6 ** -(np.arange(32) / 32)).tolist()

    edit_graph(bundle, edit)


def swapped_sections(bundle: Path, _: Path) -> None:
    """Swap M-RoPE sections: right for text, where row, column and time are equal."""

    def edit(graph: Graph) -> None:
        (constant,) = [op for op in graph.of_type("Const") if op["main"].get("int32s") == [8, 12, 12]]
        constant["main"]["int32s"] = [12, 12, 8]

    edit_graph(bundle, edit)


def cacheless_attention(bundle: Path, _: Path) -> None:
    """Switch off the KV cache of one fused attention."""
    edit_graph(bundle, lambda graph: graph.of_type("Attention")[2]["main"].update(kv_cache=False))


def stale_template(bundle: Path, onnx_folder: Path) -> None:
    """Use the chat template of an earlier checkpoint, with another role name."""
    path, template = bundle / TOKENIZER, chat_template(onnx_folder).encode()
    path.write_bytes(path.read_bytes().replace(template, template.replace(b"assistant", b"companion")))


def foreign_tokenizer(bundle: Path, onnx_folder: Path) -> None:
    """Use a tokenizer with the same vocabulary and half of the merges."""
    tokenizer = bundle / "foreign"
    shutil.copytree(onnx_folder, tokenizer, ignore=shutil.ignore_patterns("*.onnx*"))
    described = json.loads((tokenizer / "tokenizer.json").read_text())
    merges = described["model"]["merges"]
    described["model"]["merges"] = merges[: len(merges) // 2]
    (tokenizer / "tokenizer.json").write_text(json.dumps(described))
    write_tokenizer(tokenizer, bundle / TOKENIZER)
    shutil.rmtree(tokenizer)


@dataclass(frozen=True)
class Cause:
    """First finding: part, tap point, and text in its message; `more` are the tap points of other findings."""

    part: str
    point: str | None
    message: str
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
        "settings", "image_mean", "image_mean [0.0, 0.0, 0.0], the checkpoint has [122.7", ("image_norm",)
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
def test_a_right_bundle_passes_without_findings(folder: Path, variant: str) -> None:
    """A diagnosis that reports every tap point would pass the tests below."""
    verdict = judge(folder, variant)
    assert (verdict.row["verdict"], verdict.row["reason"], verdict.row["cause"]) == (PASS, "", "")
    assert verdict.row["findings"] == 0
    assert verdict.findings == []


def check(verdict: Verdict, fault: Fault) -> None:
    """Check that the bundle fails, the cause comes first, and no right tap point is reported."""
    cause, first = CAUSES[fault], verdict.findings[0]
    assert verdict.row["verdict"] == FAIL
    assert (first["part"], first["point"]) == (cause.part, cause.point)
    assert cause.message in first["message"]
    assert verdict.row["cause"].startswith(first["message"])
    reported = {finding["point"] for finding in verdict.findings} - {None}
    assert reported == {cause.point, *cause.more} - {None}


@pytest.mark.parametrize("fault", CAUSES, ids=lambda fault: fault.__name__)
def test_a_fault_in_a_float32_bundle_is_named(judge_broken: Callable[[str, Fault], Verdict], fault: Fault) -> None:
    check(judge_broken("fp32", fault), fault)


@pytest.mark.parametrize("fault", [swapped_weights, zeroed_norm, flipped_rope], ids=lambda fault: fault.__name__)
def test_a_fault_in_a_4_bit_bundle_is_named(judge_broken: Callable[[str, Fault], Verdict], fault: Fault) -> None:
    """The local error of a tap point does not include the rounding errors before it."""
    check(judge_broken("int4", fault), fault)


def test_every_fault_has_a_cause() -> None:
    assert set(FAULTS) <= CAUSES.keys()


def test_a_foreign_tokenizer_is_named(folder: Path) -> None:
    """Logits are measured on transformers' tokens, so all other figures of such a bundle are good."""
    break_bundle(folder / "bundles" / "fp32", folder / "bundles" / "foreign", folder / "onnx", foreign_tokenizer)
    verdict = judge(folder, "foreign")
    assert verdict.row["verdict"] == FAIL
    assert verdict.row["top1_agreement"] == 1 > verdict.row["tokenizer_match"]
    assert [finding["part"] for finding in verdict.findings] == ["tokenizer"]
    assert "the tokenizer gives wrong ids for 11 of 11 prompts" in verdict.row["cause"]


def test_a_stale_template_is_named_with_the_first_difference_of_a_prompt(
    judge_broken: Callable[[str, Fault], Verdict],
) -> None:
    """Tokens of the right prompt are right, and so are all figures but those of a plain call."""
    verdict = judge_broken("fp32", stale_template)
    assert verdict.row["top1_agreement"] == verdict.row["tokenizer_match"] == 1 > verdict.row["template_match"] == 0
    assert [finding["part"] for finding in verdict.findings] == ["tokenizer", "template"]
    assert re.search(
        r"renders \d+ of \d+ conversations to another prompt: first in .*companion.* for .*assistant",
        verdict.findings[1]["message"],
    )
