"""Complete synthetic evidence of a model, with small tables of every kind, for tests of page and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from hf2mnn.core.manifest import Manifest, stage_folder
from hf2mnn.evaluation.aggregate import aggregate
from hf2mnn.report.evidence import (
    BENCHMARK,
    BUNDLES,
    DIAGNOSIS,
    EVALUATION,
    REFERENCE_FOLDER,
    Evidence,
    VariantEvidence,
)

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;<!--'
POINTS = {
    "vision": ["v.patch", "v.blocks.0.norm", "v.blocks.0", "v.blocks.1.norm", "v.blocks.1", "v.merger.mlp.0"],
    "decoder": ["m.layers.0.q_proj", "m.layers.0", "m.layers.1.q_proj", "m.layers.1", "m.norm", "lm_head"],
}


def record(identifier: str, answer: str, **others: Any) -> dict[str, Any]:
    """Return a record of examples.json; `images` are file names, `expected` are correct answers."""
    images = others.get("images", [])
    text = {"type": "text", "text": others.pop("question", "What is 1 < 2 & why?")}
    parts = [*({"type": "image", "image": name} for name in images), text]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}]
    defaults = {"category": "test", "language": "en", "expected": None, "metric": "exact", "images": images}
    return {**defaults, "id": identifier, "answer": answer, "messages": messages, "prompt": "", **others}


RECORDS = [
    record("plain", "a red star", expected=["a red star"], images=["images/0.png"]),
    record("chinese", "左上角是红色", language="zh", category="location", question="左上角是什么？", expected=["红色"]),
    record("two", "<script>alert(1)</script>", images=["images/0.png", "images/1.png"], expected=["yes"]),
    record("free", "whatever", question="One\ntwo\n" + "averyveryverylongwordwithoutspaces" * 4),
]


def make_reference(folder: Path, records: list[dict[str, Any]]) -> Manifest:
    tensors = {"none": np.zeros(1)}
    for name in {name for entry in records for name in entry["images"]}:
        pixels = np.linspace(0, 255, 28 * 56 * 3).astype(np.uint8).reshape(28, 56, 3)
        arrays = {"pixel_values": np.zeros(1), "grid_thw": np.ones(3), "embeds": np.zeros(1)}
        arrays |= {"original": np.roll(pixels, len(name) + int(name[-5]) * 9), "resized": pixels}
        tensors |= {f"images/{name}/{array}": value for array, value in arrays.items()}
    right = sum(entry["answer"] in (entry["expected"] or []) for entry in records)
    labelled = sum(entry["expected"] is not None for entry in records)
    manifest = Manifest(
        "reference",
        command=["hf2mnn", "reference", "checkpoint", "--examples", "/data/my-set", "--out", "results/some-model"],
        inputs={"examples": "ab" * 32},
        settings={"max_new_tokens": 64},
        tools={"torch": "2"},
        results={"labelled": labelled, "right": right},
    )
    with stage_folder(folder, manifest) as partial:
        save_file(tensors, partial / "golden.safetensors")
        (partial / "examples.json").write_text(json.dumps(records))
    return Manifest.load(folder)


def make_manifest(folder: Path, stage: str, **entries: Any) -> Manifest:
    """Write a stage folder with one file and the command line that would have written it; return its manifest."""
    command = ["hf2mnn", stage, "--out", str(folder)]
    with stage_folder(folder, Manifest(stage, **{"command": command, **entries})) as partial:
        (partial / "file.bin").write_bytes(stage.encode())
    return Manifest.load(folder)


def make_answers(
    records: list[dict[str, Any]], changed: dict[str, str], as_called: dict[str, str] | None
) -> pd.DataFrame:
    """Return the table of answers; `changed` and `as_called` hold by id the answers that differ from PyTorch's."""

    def score(entry: dict[str, Any], text: str | None) -> float | None:
        return None if entry["expected"] is None or text is None else float(text in entry["expected"])

    rows = []
    for entry in records:
        answer = changed.get(entry["id"], entry["answer"])
        plain = None if as_called is None else as_called.get(entry["id"], answer)
        same = answer == entry["answer"]
        rows.append(
            {"id": entry["id"], "category": entry["category"], "language": entry["language"]}
            | {"images": len(entry["images"]), "expected": " / ".join(entry["expected"] or []) or None}
            | {"reference": entry["answer"], "answer": answer, "greedy_match": same}
            | {"prefix_share": 1.0 if same else 0.3, "prefix_tokens": 10 if same else 3}
            | {"repetition": 0.0, "degenerate": False, "as_called": plain, "tokenizer_match": None}
            | {"template_match": None, "template_difference": None}
            | {"as_called_match": None if plain is None else plain == entry["answer"]}
            | {"reference_score": score(entry, entry["answer"]), "score": score(entry, answer)}
            | {"as_called_score": score(entry, plain)}
        )
    return pd.DataFrame(rows)


def make_positions(records: list[dict[str, Any]], size: float) -> pd.DataFrame:
    random = np.random.default_rng(3)
    frames = []
    for entry in records:
        kld = size * random.exponential(size=8)
        frame = pd.DataFrame({"id": entry["id"], "position": range(8), "after_image": bool(entry["images"])})
        frame = frame.assign(kld=kld, same_top=kld <= 2 * size, top5_overlap=0.8, reference_logprob=-0.5)
        frames.append(frame.assign(logprob=-0.5 - kld))
    return pd.concat(frames, ignore_index=True)


def make_layers(size: float, faulty: str | None = None) -> pd.DataFrame:
    """Return layers with errors of about `size`; the tap point `faulty` exceeds its tolerance."""
    rows = []
    for part, points in POINTS.items():
        for probe in ("image", "text")[: 1 + (part == "decoder")]:
            for order, point in enumerate(points):
                row = {"probe": probe, "part": part, "order": order, "point": point, "operator": "linear layer"}
                row |= {"onnx_error": 3e-7, "onnx_cosine": 1.0, "mnn_error": size * (1 + order), "mnn_cosine": 1.0}
                row |= {"local_error": 0.9 if point == faulty else size / 2, "tolerance": 0.4, "onnx_tolerance": 1e-3}
                rows.append(row | {"detail": "sign flipped" if point == faulty else ""})
    rows[1]["mnn_error"] = rows[1]["local_error"] = np.nan  # a tap point that the converter fused away
    return pd.DataFrame(rows)


def make_budget(size: float) -> pd.DataFrame:
    shares = {"conversion": 0.0, "embedding": 0.0, "vision weights": 0.2, "decoder weights": 0.7}
    shares |= {"activation quantization": 0.3, "fp16 arithmetic": 0.0, "image preprocessing": 4.0, "total": 1.0}
    return pd.DataFrame([(source, size * share, 32) for source, share in shares.items()]).set_axis(
        ["source", "mean_kld", "positions"], axis=1
    )


def make_parity(size: float) -> pd.DataFrame:
    rows = [(probe, way, 9, size, size, 1 - size) for probe in ("image", "text") for way in ("in chunks", "multi-turn")]
    return pd.DataFrame(rows, columns=["probe", "way", "positions", "max_kld", "max_logit_change", "same_top"])


def make_variant(
    root: Path,
    records: list[dict[str, Any]],
    name: str,
    size: float,
    changed: dict[str, str] | None = None,
    as_called: dict[str, str] | None = None,
    faulty: str | None = None,
) -> VariantEvidence:
    """Return a variant with a mean KL divergence of about `size`; only "onnxruntime" has no bundle."""
    positions, has_bundle = make_positions(records, size), name != "onnxruntime"
    answers = make_answers(records, changed or {}, (as_called or {}) if has_bundle else None)
    images = pd.DataFrame({"image": ["images/0.png"], "tokens": [4], "cosine": [0.99], "worst_cosine": [0.9]})
    figures = aggregate(positions, answers, images.assign(error=0.01))
    whole = figures[figures["group"] == "all"].set_index("figure")
    inputs = {"reference": "12" * 32, "onnx": "34" * 32} | ({"bundle": "56" * 32} if has_bundle else {})
    folders = {folder: root / folder / name for folder in (BUNDLES, EVALUATION, DIAGNOSIS)}
    manifests = {EVALUATION: make_manifest(folders[EVALUATION], "evaluate", inputs=inputs, settings={"threads": 2})}
    if has_bundle:
        weights = {"bits": 4, "block": 64, "method": "rtn", "scale_bits": 16, "symmetric": False}
        engine = {"memory": "low", "precision": "low", "threads": 4}
        settings = {"decoder": weights, "vision": weights, "engine": engine}
        manifests[BUNDLES] = make_manifest(folders[BUNDLES], "quantize", settings=settings)
        manifests[DIAGNOSIS] = make_manifest(folders[DIAGNOSIS], "diagnose", settings={"threads": 2})
    finding = {"part": "decoder", "point": faulty, "message": f"{faulty} (linear layer): sign flipped"}
    summary = whole["value"].to_dict() | {f"mean_kld_{end}": whole.loc["mean_kld", end] for end in ("low", "high")}
    return VariantEvidence(
        name=name,
        summary={"fault": None, **summary, "bytes": int(4e6 * (1 + 3 * (size == 0)) / (1 + size))},
        figures=figures,
        answers=answers,
        parity=make_parity(min(size, 1.0)),
        layers=make_layers(max(size, 1e-6), faulty) if has_bundle else None,
        budget=make_budget(size) if has_bundle else None,
        findings=[finding] if faulty else [],
        manifests=manifests,
    )


def make_speed(names: list[str]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return benchmark.json and cache.parquet."""
    bundles, speedups = {}, []
    for factor, name in enumerate(names, 1):
        measures = {}
        medians = {"load_s": 0.05, "first_token_s": 0.1, "decode_tokens_per_s": 300, "bundle_mb": 40}
        for measure, median in medians.items():
            ends = {"median": 1, "first_quartile": 0.9, "third_quartile": 1.1}
            values = {end: share * median * factor for end, share in ends.items()}
            measures[measure] = {"unit": "", **values, "ratio": float(factor)}
        bundles[name] = {"bytes": 1, "engine": {}, "measures": measures, "cache": []}
        speedups += [(name, length, 0.001, 0.001 * length, 0.1 * length * factor) for length in (32, 128, 512)]
    machine = {"cpu": "a CPU", "cores": 2, "memory_gb": 8, "system": "an OS", "MNN": "3.6.1"}
    speed = {"machine": machine, "baseline": names[0], "repeats": 3, "threads": 2, "prompt_tokens": 64}
    speed |= {"answer_tokens": 8, "lengths": [32, 128, 512], "image": [224, 224], "broken": {}, "bundles": bundles}
    columns = ["bundle", "length", "cached_s", "recomputed_s", "speedup"]
    return speed, pd.DataFrame(speedups, columns=columns).assign(difference=0.0)


def make_evidence(root: Path, records: list[dict[str, Any]] | None = None, names: tuple[str, ...] = ()) -> Evidence:
    """Return a model with the ONNX graphs and three bundles, the last of which is faulty; only `names` if given."""
    records = RECORDS if records is None else records
    as_called = {"plain": "a red", "chinese": HOSTILE}
    changed = {"plain": "a blue star & more", "chinese": "左下角是红色", "free": HOSTILE}
    variants = {
        "onnxruntime": (0.0,),
        "fp16": (1e-6, None, as_called),
        "int8": (1e-4, None, as_called),
        "int4-hqq-block32-vision-int8": (0.4, changed, as_called, "m.layers.1.q_proj"),
    }
    variants = [make_variant(root, records, name, *variants[name]) for name in names or variants]
    bundles = [variant.name for variant in variants if variant.name != "onnxruntime"]
    speed, cache = make_speed(bundles)
    origin = {"repository": "some/model", "revision": "main"}
    manifests = {
        "checkpoint": make_manifest(root / "checkpoint", "fetch", settings=origin),
        REFERENCE_FOLDER: make_reference(root / REFERENCE_FOLDER, records),
        "onnx": make_manifest(root / "onnx", "export"),
        BENCHMARK: make_manifest(root / BENCHMARK, "benchmark", inputs=dict.fromkeys(bundles, "90" * 32)),
    }
    return Evidence("some-model", root, variants, manifests, speed, cache)


def make_table(evidence: Evidence, failed: dict[str, bool]) -> pd.DataFrame:
    """Return the summary; `failed` holds the variants that miss a gate and whether they are required."""
    reference = {
        "variant": "pytorch",
        "top1_agreement": 1.0,
        "mean_kld": 0.0,
        "verdict": "reference",
        "required": False,
    }
    rows: list[dict[str, Any]] = [reference]
    for variant in evidence.variants:
        missed = variant.name in failed
        rows.append(
            {**variant.summary, "variant": variant.name, "verdict": "FAIL" if missed else "pass"}
            | {"required": failed.get(variant.name, True)}
            | {"reason": "mean_kld 0.4, at most 0.1 wanted" if missed else ""}
        )
    columns = ["variant", "top1_agreement", "mean_kld", "greedy_match", "task_accuracy", "vision_cosine"]
    columns += ["cache_parity", "as_called_accuracy", "bytes", "decode_tokens_per_s"]
    columns += ["verdict", "required", "reason", "cause"]
    return pd.DataFrame(rows, columns=columns).astype({"bytes": "Int64"})
