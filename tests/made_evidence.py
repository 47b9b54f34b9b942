"""Evidence about a model that nobody converted: small tables of every kind, for tests of what is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from hf2mnn.core.manifest import Manifest, stage_folder
from hf2mnn.evaluation import figures
from hf2mnn.report.evidence import Evidence, Row

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;<!--'
POINTS = {
    "vision": ["v.patch", "v.blocks.0.norm", "v.blocks.0", "v.blocks.1.norm", "v.blocks.1", "v.merger.mlp.0"],
    "decoder": ["m.layers.0.q_proj", "m.layers.0", "m.layers.1.q_proj", "m.layers.1", "m.norm", "lm_head"],
}


def record(identifier: str, answer: str, **others: Any) -> dict[str, Any]:
    """One of examples.json. `images` are file names; `expected` are right answers."""
    images = others.get("images", [])
    asked = {"type": "text", "text": others.pop("asked", "What is 1 < 2 & why?")}
    parts = [*({"type": "image", "image": name} for name in images), asked]
    made = {"category": "test", "language": "en", "expected": None, "metric": "exact", "images": images}
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}]
    return {**made, "id": identifier, "answer": answer, "messages": messages, "prompt": "", **others}


RECORDS = [
    record("plain", "a red star", expected=["a red star"], images=["images/0.png"]),
    record("chinese", "左上角是红色", language="zh", category="place", asked="左上角是什么？", expected=["红色"]),
    record("two", "<script>alert(1)</script>", images=["images/0.png", "images/1.png"], expected=["yes"]),
    record("free", "whatever", asked="One\ntwo\n" + "averyveryverylongwordwithoutspaces" * 4),
]


def make_reference(folder: Path, records: list[dict[str, Any]]) -> Manifest:
    tensors = {"none": np.zeros(1)}
    for name in {name for made in records for name in made["images"]}:
        shades = np.linspace(0, 255, 28 * 56 * 3).astype(np.uint8).reshape(28, 56, 3)
        kinds = {"pixel_values": np.zeros(1), "grid_thw": np.ones(3), "embeds": np.zeros(1)}
        kinds |= {"original": np.roll(shades, len(name) + int(name[-5]) * 9), "resized": shades}
        tensors |= {f"images/{name}/{kind}": value for kind, value in kinds.items()}
    right = sum(made["answer"] in (made["expected"] or []) for made in records)
    labelled = sum(made["expected"] is not None for made in records)
    manifest = Manifest("reference", {"examples": "ab" * 32}, {"max_new_tokens": 64}, {"torch": "2"})
    manifest.results = {"labelled": labelled, "right": right}
    with stage_folder(folder, manifest) as partial:
        save_file(tensors, partial / "golden.safetensors")
        (partial / "examples.json").write_text(json.dumps(records))
    return Manifest.load(folder)


def make_manifest(folder: Path, stage: str, **kept: Any) -> Manifest:
    with stage_folder(folder, Manifest(stage, **kept)) as partial:
        (partial / "file.bin").write_bytes(stage.encode())
    return Manifest.load(folder)


def make_answers(records: list[dict[str, Any]], said: dict[str, str], called: dict[str, str] | None) -> pd.DataFrame:
    """The table of `hf2mnn.evaluation.score`; `said` and `called` by id where they are not PyTorch's."""

    def score(made: dict[str, Any], text: str | None) -> float | None:
        return None if made["expected"] is None or text is None else float(text in made["expected"])

    rows = []
    for made in records:
        answer = said.get(made["id"], made["answer"])
        plain = None if called is None else called.get(made["id"], answer)
        same = answer == made["answer"]
        rows.append(
            {"id": made["id"], "category": made["category"], "language": made["language"]}
            | {"images": len(made["images"]), "expected": " / ".join(made["expected"] or []) or None}
            | {
                "reference": made["answer"],
                "answer": answer,
                "greedy_match": same,
                "prefix_share": 1.0 if same else 0.3,
                "prefix_tokens": 10 if same else 3,
            }
            | {"repetition": 0.0, "degenerate": False, "as_called": plain, "tokenizer_match": None}
            | {"template_match": None, "template_difference": None}
            | {"as_called_match": None if plain is None else plain == made["answer"]}
            | {"reference_score": score(made, made["answer"]), "score": score(made, answer)}
            | {"as_called_score": score(made, plain)}
        )
    return pd.DataFrame(rows)


def make_positions(records: list[dict[str, Any]], size: float) -> pd.DataFrame:
    random = np.random.default_rng(3)
    frames = []
    for made in records:
        kld = size * random.exponential(size=8)
        frame = pd.DataFrame({"id": made["id"], "position": range(8), "after_image": bool(made["images"])})
        frame = frame.assign(kld=kld, same_top=kld <= 2 * size, top5_overlap=0.8, reference_logprob=-0.5)
        frames.append(frame.assign(logprob=-0.5 - kld))
    return pd.concat(frames, ignore_index=True)


def make_layers(size: float, astray: str | None = None) -> pd.DataFrame:
    rows = []
    for part, points in POINTS.items():
        for probe in ("image", "text")[: 1 + (part == "decoder")]:
            for order, point in enumerate(points):
                local = 0.9 if point == astray else size / 2
                row = {"probe": probe, "part": part, "order": order, "point": point, "operator": "linear layer"}
                row |= {"onnx_error": 3e-7, "onnx_cosine": 1.0, "mnn_error": size * (1 + order), "mnn_cosine": 1.0}
                row |= {"mnn_local": local, "tolerance": 0.4, "onnx_tolerance": 1e-3}
                rows.append(row | {"looks": "its sign is turned" if point == astray else ""})
    rows[1]["mnn_error"] = rows[1]["mnn_local"] = np.nan  # a point that a conversion has fused away
    return pd.DataFrame(rows)


def make_budget(size: float) -> pd.DataFrame:
    shares = {"conversion": 0.0, "embedding": 0.0, "vision weights": 0.2, "decoder weights": 0.7}
    shares |= {"activation quantization": 0.3, "fp16 arithmetic": 0.0, "image preprocessing": 4.0, "total": 1.0}
    return pd.DataFrame([(source, size * share, 32) for source, share in shares.items()]).set_axis(
        ["source", "mean_kld", "positions"], axis=1
    )


def make_parity(size: float) -> pd.DataFrame:
    rows = [(probe, way, 9, size, size, 1 - size) for probe in ("image", "text") for way in ("in chunks", "two turns")]
    return pd.DataFrame(rows, columns=["probe", "way", "positions", "max_kld", "max_logit_change", "same_top"])


def make_row(
    root: Path,
    records: list[dict[str, Any]],
    name: str,
    size: float,
    said: dict[str, str] | None = None,
    called: dict[str, str] | None = None,
    astray: str | None = None,
) -> Row:
    """A conversion with a mean KL divergence of about `size`; a bundle unless it is "onnxruntime"."""
    positions, bundle = make_positions(records, size), name != "onnxruntime"
    answers = make_answers(records, said or {}, (called or {}) if bundle else None)
    images = pd.DataFrame({"image": ["images/0.png"], "tokens": [4], "cosine": [0.99], "worst_cosine": [0.9]})
    table = figures.figures(positions, answers, images.assign(error=0.01))
    whole = table[table["group"] == "all"].set_index("figure")
    inputs = {"reference": "12" * 32, "onnx": "34" * 32} | ({"bundle": "56" * 32} if bundle else {})
    manifests = {
        "evaluate": make_manifest(root / "evaluation" / name, "evaluate", inputs=inputs, settings={"threads": 2})
    }
    if bundle:
        weights = {"bits": 4, "block": 64, "method": "rtn", "scale_bits": 16, "symmetric": False}
        settings = {
            "decoder": weights,
            "vision": weights,
            "engine": {"memory": "low", "precision": "low", "threads": 4},
        }
        made = make_manifest(root / "bundles" / name, "quantize", inputs=dict.fromkeys(("onnx", "base"), "78" * 32))
        manifests["bundle"] = replace(made, settings=settings)
        manifests["diagnose"] = make_manifest(root / "diagnosis" / name, "diagnose", settings={"threads": 2})
    finding = {"part": "decoder", "point": astray, "sentence": f"{astray} (linear layer): its sign is turned"}
    kinds = whole["value"].to_dict() | {f"mean_kld_{end}": whole.loc["mean_kld", end] for end in ("low", "high")}
    return Row(
        name=name,
        summary={"fault": None, **kinds, "bytes": int(4e6 * (1 + 3 * (size == 0)) / (1 + size))},
        figures=table,
        answers=answers,
        positions=positions,
        parity=make_parity(min(size, 1.0)),
        layers=make_layers(max(size, 1e-6), astray) if bundle else None,
        budget=make_budget(size) if bundle else None,
        findings=[finding] if astray else [],
        manifests=manifests,
    )


def make_speed(names: list[str]) -> tuple[dict[str, Any], pd.DataFrame]:
    """benchmark.json and cache.parquet of `hf2mnn.evaluation.benchmark`."""
    bundles, worth = {}, []
    for index, name in enumerate(names, 1):
        measures = {}
        for measure, value in {
            "load_s": 0.05,
            "first_token_s": 0.1,
            "decode_tokens_per_s": 300,
            "bundle_mb": 40,
        }.items():
            kept = {
                "median": value * index,
                "first_quartile": 0.9 * value * index,
                "third_quartile": 1.1 * value * index,
            }
            measures[measure] = {"unit": "", **kept, "ratio": float(index)}
        bundles[name] = {"bytes": 1, "engine": {}, "measures": measures, "cache": []}
        worth += [(name, length, 0.001, 0.001 * length, 0.1 * length * index) for length in (32, 128, 512)]
    machine = {"cpu": "a CPU", "cores": 2, "memory_gb": 8, "system": "an OS", "MNN": "3.6.1"}
    made = {"machine": machine, "baseline": names[0], "repeats": 3, "threads": 2, "prompt_tokens": 64}
    made |= {"answer_tokens": 8, "lengths": [32, 128, 512], "image": [224, 224], "bundles": bundles}
    columns = ["bundle", "length", "cached_s", "recomputed_s", "worth"]
    return made, pd.DataFrame(worth, columns=columns).assign(difference=0.0)


def make_evidence(root: Path, records: list[dict[str, Any]] | None = None) -> Evidence:
    """Of a model with the ONNX graphs and three bundles, the last of which has gone wrong."""
    records = RECORDS if records is None else records
    reference = make_reference(root / "reference", records)
    called = {"plain": "a red", "chinese": HOSTILE}
    rows = [
        make_row(root, records, "onnxruntime", 0.0),
        make_row(root, records, "fp16", 1e-6, called=called),
        make_row(root, records, "int8", 1e-4, called=called),
        make_row(
            root,
            records,
            "int4-hqq-block32-vision-int8",
            0.4,
            {"plain": "a blue star & more", "chinese": "左下角是红色", "free": HOSTILE},
            called,
            "m.layers.1.q_proj",
        ),
    ]
    bundles = [row.name for row in rows[1:]]
    speed, cache = make_speed(bundles)
    settings = {"baseline": "fp16", "repeats": 3, "prompt_tokens": 64, "answer_tokens": 8, "lengths": [32, 128, 512]}
    manifests = {
        "source": make_manifest(
            root / "checkpoint", "source", settings={"repository": "some/model", "revision": "main"}
        ),
        "onnx": make_manifest(root / "onnx", "onnx"),
        "reference": reference,
        "speed": make_manifest(
            root / "benchmark", "speed", inputs=dict.fromkeys(bundles, "90" * 32), settings=settings
        ),
    }
    return Evidence("some-model", root, rows, manifests, speed, cache)


def make_table(evidence: Evidence, failed: dict[str, bool]) -> pd.DataFrame:
    """The summary; `failed` says of those that miss a gate whether they were required."""
    rows: list[dict[str, Any]] = [
        {"variant": "pytorch", "top1_agreement": 1.0, "mean_kld": 0.0, "verdict": "reference", "required": False}
    ]
    for row in evidence.rows:
        missed = row.name in failed
        rows.append(
            {**row.summary, "variant": row.name, "verdict": "FAIL" if missed else "pass"}
            | {"required": failed.get(row.name, True), "reason": "mean_kld 0.4, at most 0.1 wanted" if missed else ""}
        )
    wanted = ["variant", "top1_agreement", "mean_kld", "greedy_match", "task_accuracy", "vision_cosine", "cache_parity"]
    wanted += ["as_called_accuracy", "bytes", "decode_tokens_per_s", "verdict", "required", "reason", "cause"]
    return pd.DataFrame(rows, columns=wanted).astype({"bytes": "Int64"})
