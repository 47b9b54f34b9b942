"""Tests of provenance: command lines, origin of the checkpoint, settings, resources and files from the manifests."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from hf2mnn.cli import app
from hf2mnn.core.manifest import Manifest
from hf2mnn.report import provenance
from hf2mnn.report.evidence import BUNDLES, REFERENCE_FOLDER, Evidence
from hf2mnn.report.provenance import command_line


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ([], "(the stage quantize was called from Python)"),
        (["hf2mnn", "plan", "results/m/sensitivity"], "hf2mnn plan results/m/sensitivity"),
        (["hf2mnn", "fetch", "--path", "/data/me/my model"], "hf2mnn fetch --path 'my model'"),
        (["hf2mnn", "evaluate", "--bundle=/data/int4"], "hf2mnn evaluate --bundle=int4"),
        (["hf2mnn", "benchmark", "--bundle", "a=/data/int4"], "hf2mnn benchmark --bundle a=int4"),
        (["hf2mnn", "benchmark", "--bundle=a=/data/int4"], "hf2mnn benchmark --bundle=a=int4"),
        (["hf2mnn", "quantize", '{"bits": 4}'], "hf2mnn quantize '{\"bits\": 4}'"),
    ],
)
def test_command_is_for_a_shell_and_without_absolute_paths(command: list[str], line: str) -> None:
    assert command_line(Manifest("quantize", command=command)) == line


def test_stages_are_in_the_order_of_the_pipeline(evidence: Evidence) -> None:
    paths = list(evidence.stage_folders())
    names = [variant.name for variant in evidence.variants]
    assert paths == [
        *("checkpoint", REFERENCE_FOLDER, "onnx"),
        *(f"bundles/{name}" for name in names[1:]),
        *(f"evaluation/{name}" for name in names),
        *(f"diagnosis/{name}" for name in names[1:]),
        "benchmark",
    ]


def test_commands_of_a_real_run_are_accepted_by_the_command_line(results: Path) -> None:
    """The manifests record what the command line parser takes."""
    commands = typer.main.get_command(app).commands
    manifests = [json.loads(path.read_text()) for path in sorted(results.rglob("manifest.json"))]
    assert {"fetch", "reference", "quantize", "evaluate", "benchmark"} <= {entry["stage"] for entry in manifests}
    for entry in manifests:
        Path(entry["command"][-1]).relative_to(f"results/{results.name}")
        program, name, *arguments = shlex.split(command_line(Manifest(**entry)))
        assert (program, name, arguments[-2]) == ("hf2mnn", entry["stage"], "--out")
        commands[name].make_context(name, arguments)


def test_origin_of_the_checkpoint(evidence: Evidence) -> None:
    def origin(**entries: object) -> str:
        manifest = replace(evidence.manifests["checkpoint"], **entries)
        return provenance.checkpoint_origin(replace(evidence, manifests={"checkpoint": manifest}))

    hub = {"repository": "some/model", "revision": "main"}
    assert origin() == "Checkpoint: some/model on the Hugging Face hub, revision main."
    assert origin(settings=hub | {"hub": "modelscope", "commit": "abc"}) == (
        "Checkpoint: some/model on ModelScope, revision main, commit abc."
    )
    assert origin(settings={}, paths={"path": "/data/me/model"}) == "Checkpoint: local folder model."
    adapted = origin(settings=hub | {"adapter": {"repository": "some/lora", "revision": "v1"}})
    assert adapted.endswith(" Merged adapter: some/lora on the Hugging Face hub, revision v1.")
    assert "unknown" in provenance.checkpoint_origin(replace(evidence, manifests={}))


def test_settings_hold_quantization_layout_and_plan(evidence: Evidence) -> None:
    variant = evidence.variants[-1]

    def cells(**entries: object) -> list[tuple[str, str]]:
        manifest = replace(variant.manifests[BUNDLES], **entries)
        changed = replace(variant, manifests={BUNDLES: manifest})
        (row,) = provenance.variant_settings(replace(evidence, variants=[evidence.variants[0], changed])).rows
        assert row[0] == variant.name
        return [(cell.text, cell.note) for cell in row[1]]

    decoder, vision, engine, bits, embedding, layout = cells()
    assert decoder == vision == ("bits 4, block 64, method rtn, scale bits 16, symmetric false", "")
    assert engine == ("memory low, precision low, threads 4", "")
    assert (bits, embedding, layout) == (("32", ""), ("", ""), ("", ""))
    results = {"bits_per_weight": 4.25, "embedding_bytes": 327680}
    slow = {"decoder_layout": "NCHW", "layout_reason": "an operator has no NC4HW4 kernel"}
    assert cells(results=results | slow)[3:] == [("4.250", ""), ("0.3 MB", ""), tuple(slow.values())]
    assert cells(results={"embedding_bytes": 0})[4] == ("in lm_head", "")
    assert cells(paths={"plan": "/data/plan.yaml"})[0] == ("plan plan.yaml, method rtn", "")
    assert provenance.variant_settings(replace(evidence, variants=evidence.variants[:1])) is None


def test_texts_with_other_token_ids(evidence: Evidence) -> None:
    folders = evidence.stage_folders()
    assert provenance.tokenizer_differences(folders) is None
    group = {
        "kind": "marks",
        "script": "ARABIC",
        "texts": 8,
        "different": 2,
        "share": 0.25,
        "examples": ["\u0644\u0651"],
    }
    manifest = replace(evidence.manifests["checkpoint"], results={"tokenizer_differences": [group]})
    ((name, cells),) = provenance.tokenizer_differences(folders | {"graphs": manifest}).rows
    assert (name, [cell.text for cell in cells]) == ("marks ARABIC", ["2 of 8 (25.0%)", r"'\u0644\u0651'"])


def test_resources_and_files_of_each_stage(evidence: Evidence) -> None:
    folders = evidence.stage_folders()
    rows = dict(provenance.stage_resources(folders).rows)
    assert list(rows) == list(folders)
    reference = evidence.manifests[REFERENCE_FOLDER]
    assert rows[REFERENCE_FOLDER][2].text == reference.digest()[:12]
    assert rows[REFERENCE_FOLDER][3].text == f"hf2mnn {reference.hf2mnn}, torch 2"
    files = provenance.listed_files(folders).rows
    position = files.index((REFERENCE_FOLDER, []))
    (user_provided, (_, digest)), (name, (size, sha256)) = files[position + 1 : position + 3]
    assert (user_provided, digest.text) == ("examples.jsonl (input)", "ab" * 32)
    stored = reference.outputs["examples.json"]
    assert (name, size.text, sha256.text) == ("examples.json", f"{stored['size']:,}", stored["sha256"])
    headings = [head for head, cells in files if not cells]
    assert [path for path in headings if path.startswith(("evaluation", "diagnosis", "benchmark"))] == []
