"""Checks of config.json and llm_config.json, as `llmconfig.hpp`, `llm.cpp` and `omni.cpp` of MNN 3.6.1 read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hf2mnn.core.errors import BundleError
from hf2mnn.doctor.artifacts import SETTING_VALUES, Bundle
from hf2mnn.doctor.findings import Finding, Severity
from hf2mnn.mnn.bundle import CONFIG, TOKENIZER
from hf2mnn.mnn.bundle_config import outside_paths
from hf2mnn.mnn.engine_facts import BASE_DIR, MODEL_DEFAULTS
from hf2mnn.quant.embedding import embedding_in_weights

FALLBACKS = {"backend_type": "the engine uses any backend that it has", "sampler_type": "the engine uses its defaults"}
FALLBACK = "the engine uses 'normal'"
MLLM = ("backend_type", "precision", "memory", "power")
"""Settings of the vision tower, under "mllm"."""
UNREADABLE_CONFIG = {
    True: "tokenizer.txt, no vision, precision low",
    False: "hidden size 4096, int masks, no vision; it crashes or its output is wrong",
}
"""Defaults without config.json (True) or llm_config.json (False)."""
SIZE_KEYS = {
    "hidden_size": (
        Severity.ERROR,
        "the engine reads embeddings of the wrong length: it crashes or its output is wrong",
    ),
    "layer_nums": (Severity.WARNING, "correct output; a prefix cache in files is read into other layers"),
    "key_value_shape": (Severity.ADVICE, "none with MNN 3.6, which does not read it; others allocate a wrong cache"),
}
"""Severity and effect of sizes that differ from the graph."""


def config_unreadable(bundle: Bundle) -> Iterator[Finding]:
    """Report a configuration file that is missing or not a JSON object."""
    for path, error in bundle.config_errors.items():
        message = f"{path.name} is missing or not a JSON object"
        evidence = str(error)
        effect = f"the engine uses its defaults without an error: {UNREADABLE_CONFIG[path.name == CONFIG]}"
        cure = "copy the file again, or convert the checkpoint again"
        yield Finding(where=path.name, message=message, evidence=evidence, effect=effect, cure=cure)


def path_outside(bundle: Bundle) -> Iterator[Finding]:
    """Report keys that name a file outside the bundle."""
    for key, value, reason in outside_paths(bundle.folder, bundle.model):
        message = f"{key} names a path outside the bundle"
        evidence = f"{str(value)[:200]!r}: {reason}"
        effect = "the engine opens a file of another model, or none"
        cure = (
            f"copy the file into {bundle.folder} and set {key} to its bare name{', or remove it' * (key == BASE_DIR)}"
        )
        yield Finding(where=bundle.locate(key), message=message, evidence=evidence, effect=effect, cure=cure)


def _required_files(bundle: Bundle) -> dict[str, str]:
    """Return the keys of required files, and the effect without each; weights and vision have their own checks."""
    in_weights = True
    effects = {
        "llm_model": "the engine does not load the bundle",
        "tokenizer_file": "the engine does not load the bundle: it prints 'tokenizer file not found'",
    }
    with suppress(BundleError):  # reported by tied_embedding
        in_weights = embedding_in_weights(bundle.model)
    if not in_weights:
        effects["embedding_file"] = "the engine loads the bundle, and all tokens have the same embedding: wrong output"
    return effects


def file_missing(bundle: Bundle) -> Iterator[Finding]:
    """Report a missing file that config.json names, or that the engine opens by default."""
    outside = {key for key, *_ in outside_paths(bundle.folder, bundle.model)}
    for key, effect in _required_files(bundle).items():
        path = bundle.file(key)
        if path.is_file() or bundle.config_errors or key in outside:
            continue
        cure = "copy it into the bundle, or convert the checkpoint again"
        if key == "tokenizer_file" and (bundle.folder / TOKENIZER).is_file():
            cure = f'set "tokenizer_file": "{TOKENIZER}" in {CONFIG}: that file exists'
        source = "names" if key in bundle.model else f"has no {key}, and the engine's default is"
        message = f"a required file is missing: {path.name}"
        evidence = f"{CONFIG} {source} {path.name}"
        yield Finding(where=bundle.locate(key), message=message, evidence=evidence, effect=effect, cure=cure)


def vision_missing(bundle: Bundle) -> Iterator[Finding]:
    """Report a configuration and a vision tower of which only one exists."""
    visual, path = bundle.model.get("is_visual") is True, bundle.file("visual_model")
    if bundle.config_errors:
        return
    if visual and not path.is_file():
        message = "the configuration declares a vision tower that is missing"
        evidence = f"is_visual is true, {path.name} is missing"
        effect = "the engine does not load the bundle, or crashes at the first image"
        cure = "convert the vision tower ('hf2mnn convert' does), or copy it with its weight file"
        yield Finding(where=bundle.locate("is_visual"), message=message, evidence=evidence, effect=effect, cure=cure)
    if not visual and path.is_file():
        message = "there is a vision tower, but the configuration does not declare it"
        evidence = f"{path.name} exists, is_visual is {json.dumps(bundle.model.get('is_visual'))}"
        effect = "the engine ignores images"
        cure = f'set "is_visual": true in {bundle.file("llm_config").name}, with image_mean, image_norm and the ids'
        yield Finding(where=bundle.locate("is_visual"), message=message, evidence=evidence, effect=effect, cure=cure)


def attention_mask(bundle: Bundle) -> Iterator[Finding]:
    """Compare the data type of the attention mask with the graph's input."""
    shape, given = bundle.decoder_shape, (MODEL_DEFAULTS | bundle.model)["attention_mask"]
    if not bundle.config_errors and shape and shape.mask and (given == "float") != (shape.mask == "DT_FLOAT"):
        expected = "float" if shape.mask == "DT_FLOAT" else "int"
        default = "" if "attention_mask" in bundle.model else " (the default)"
        yield Finding(
            where=bundle.locate("attention_mask"),
            message=f"the graph reads an attention mask of {expected}, and the engine feeds another type",
            evidence=f"attention_mask is {given!r}{default}, the graph's input is {shape.mask}",
            effect="wrong logits without an error: tokens attend to later tokens, or not to earlier ones",
            cure=f'set "attention_mask": "{expected}" in {bundle.file("llm_config").name}',
        )


def config_differs(bundle: Bundle) -> Iterator[Finding]:
    """Compare hidden_size, layer_nums and key_value_shape with the graph."""
    shape, model = bundle.decoder_shape, MODEL_DEFAULTS | bundle.model
    if shape is None or bundle.config_errors:
        return
    cache = model.get("key_value_shape") or []
    keys = cache[-1] * cache[-2] if len(cache) >= 2 and all(isinstance(size, int) for size in cache) else shape.keys
    given = {"hidden_size": model["hidden_size"], "layer_nums": model["layer_nums"], "key_value_shape": keys}
    expected = {"hidden_size": shape.hidden, "layer_nums": shape.layers, "key_value_shape": shape.keys}
    for key, (severity, effect) in SIZE_KEYS.items():
        if expected[key] and given[key] != expected[key]:
            yield Finding(
                severity=severity,
                where=bundle.locate(key),
                message=f"{key} differs from the graph",
                evidence=f"the configuration has {json.dumps(model.get(key))}, the graph has {expected[key]}",
                effect=effect,
                cure=f"set the graph's value in {bundle.file('llm_config').name}, unless it is another model's file",
            )


def mrope(bundle: Bundle) -> Iterator[Finding]:
    """Compare is_mrope with the rows of the graph's position ids."""
    shape, given = bundle.decoder_shape, (MODEL_DEFAULTS | bundle.model)["is_mrope"]
    if not bundle.config_errors and shape and shape.positions in (1, 3) and bool(given) != (shape.positions == 3):
        message = f"the graph reads {shape.positions} row(s) of position ids, the engine feeds {3 if given else 1}"
        evidence = f"is_mrope is {json.dumps(given)}, position_ids is [{shape.positions}, tokens]"
        effect = "the engine crashes or its output is wrong: it reads past the end of the positions, or one row only"
        cure = f'set "is_mrope": {json.dumps(shape.positions == 3)} in {bundle.file("llm_config").name}'
        yield Finding(where=bundle.locate("is_mrope"), message=message, evidence=evidence, effect=effect, cure=cure)


def _settings(bundle: Bundle) -> Iterator[tuple[str, str, Any]]:
    """Yield the location, name and value of run-time settings."""
    vision = bundle.model.get("mllm")
    for key in SETTING_VALUES:
        if key in bundle.model:
            yield bundle.locate(key), key, bundle.model[key]
        if key in MLLM and isinstance(vision, dict) and key in vision:
            yield f"{CONFIG}: mllm.{key}", key, vision[key]


def setting_unknown(bundle: Bundle) -> Iterator[Finding]:
    """Report run-time settings with a value that the engine does not know."""
    for where, key, value in _settings(bundle):
        if value not in SETTING_VALUES[key]:
            message = f"the engine does not know this value of {key}"
            evidence = f"{json.dumps(value)}; it knows {', '.join(SETTING_VALUES[key])}"
            effect = f"{FALLBACKS.get(key, FALLBACK)} without an error"
            cure = f"set one of these values in {where.partition(':')[0]}"
            yield Finding(
                severity=Severity.WARNING, where=where, message=message, evidence=evidence, effect=effect, cure=cure
            )


CHECKS = (
    config_unreadable,
    path_outside,
    file_missing,
    vision_missing,
    attention_mask,
    config_differs,
    mrope,
    setting_unknown,
)
