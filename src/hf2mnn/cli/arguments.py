"""Inputs and options of each stage's command, from the configuration.

Paths of results are relative to results/<model>; paths of user-provided files are those of config.yaml.
"""

from __future__ import annotations

import json
from pathlib import Path

from hf2mnn.checkpoint.folder import ADAPTER_FILES, checkpoint_files
from hf2mnn.config.models import Instance, LabelledSet
from hf2mnn.config.schema import Config

SETS = ("evaluation", "calibration")  # sets of examples: keys of a model in config.yaml, folders of its results


def _options(values: dict[str, object]) -> list[str]:
    """Return --name value for each entry that is not None, with "-" for "_"."""
    given = {name.replace("_", "-"): str(value) for name, value in values.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def fetch_options(model: Instance) -> list[str]:
    """Return the options of `hf2mnn fetch`."""
    given = model.source.model_dump(exclude_none=True, exclude_unset=True)
    if isinstance(given.get("adapter"), dict):
        given |= {f"adapter_{name}": value for name, value in given.pop("adapter").items()}
    return _options(given)


def source_files(model: Instance) -> list[str]:
    """Return the files of a local checkpoint and adapter, or a pin; a hub's revision is among the options."""
    source = model.source
    files = [source.pin] if source.pin else checkpoint_files(source.path)
    return files + (checkpoint_files(source.adapter, ADAPTER_FILES) if isinstance(source.adapter, str) else [])


def example_files(model: Instance, name: str) -> list[str]:
    """Return the files of a user-provided set, or of a data set's local copy; a hub's revision is among the options."""
    chosen = getattr(model, name)
    folder = chosen.path if isinstance(chosen, LabelledSet) else chosen
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file()) if folder else []


def example_options(model: Instance, name: str) -> list[str]:
    """Return the options of `hf2mnn examples` for a set."""
    chosen = getattr(model, name)
    if not isinstance(chosen, LabelledSet):
        return _options({"path": chosen})
    origin = {"path": chosen.path} if chosen.path else {"revision": chosen.revision}
    return _options({"dataset": chosen.dataset, "samples": chosen.samples, "seed": chosen.seed} | origin)


def quantize_inputs(config: Config, variant: str) -> dict[str, str]:
    """Return folders below results/<model> that the methods of a variant need, by option of `hf2mnn quantize`."""
    inputs = {"plan": f"plans/{variant}"} if config.variants[variant].auto else {}
    if config.calibrated(variant):
        inputs["calibration"] = "calibration"
    if "checkpoint" in config.methods(variant):
        inputs["checkpoint"] = "checkpoint"
    return inputs


def format_options(config: Config, variant: str) -> list[str]:
    """Return the options of `hf2mnn quantize` for the formats and engine settings of a variant."""
    keys = {"bits", "block", "symmetric", "scale_bits", "method"}
    parts = {"decoder": config.decoder_weights(variant), "vision": config.vision_weights(variant)}
    described = {name: part.model_dump(include=keys) for name, part in parts.items()}
    described["engine"] = config.engine(variant).model_dump()
    texts = {name: json.dumps(settings, sort_keys=True) for name, settings in described.items()}
    return _options(texts | {"embedding": config.variants[variant].embedding})


def method_options(config: Config, variant: str, inputs: dict[str, str]) -> list[str]:
    """Return the options of `hf2mnn quantize` for the folders that the methods of a variant need, by option."""
    plan = {"plan": f"{inputs['plan']}/plan.yaml"} if config.variants[variant].auto else {}
    return _options(inputs | plan)


def benchmark_options(config: Config, model: str) -> list[str]:
    """Return the options of `hf2mnn benchmark` except its bundles and threads."""
    return _options({"baseline": config.baseline(model), **config.benchmark.model_dump(exclude={"threads"})})


def report_variants(config: Config, model: str) -> str:
    """Return the option --variants of `hf2mnn report`: JSON with name and gates of each, and whether it is required."""
    names = ["onnxruntime", *config.variants_of(model)]
    described = [{"name": name, "required": config.required(name), "gates": config.gates_of(name)} for name in names]
    return json.dumps(described, sort_keys=True)


def evidence(config: Config, model: str) -> list[str]:
    """Return the folders below results/<model> that its report reads."""
    variants = config.variants_of(model)
    planned = [name for name in variants if config.variants[name].auto]
    calibrated = [name for name in variants if config.calibrated(name)]
    folders = ["checkpoint", "examples/evaluation", "reference/evaluation", "onnx", "graphs", "benchmark"]
    folders += [f"evaluation/{name}" for name in ("onnxruntime", *variants)]
    folders += [f"{folder}/{name}" for name in variants for folder in ("bundles", "diagnosis")]
    folders += [f"plans/{name}" for name in planned]
    folders += ["examples/calibration", "reference/calibration"] if planned or calibrated else []
    folders += ["sensitivity"] if planned else []
    return folders + (["calibration"] if calibrated else [])
