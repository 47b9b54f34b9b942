"""config.json and llm_config.json of a bundle: reading them, the files that they name, and run-time settings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from hf2mnn.config.messages import Block, error_message
from hf2mnn.core.errors import BundleError
from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import NAME, Manifest
from hf2mnn.core.untrusted import path_inside, read_json
from hf2mnn.core.verify import Verdict, verify_folder
from hf2mnn.mnn.engine_facts import BASE_DIR, PATH_KEYS, RUN_TIME_SETTINGS, SETTING_DEFAULTS, VISION_SETTINGS

CONFIG, MODEL_CONFIG = "config.json", "llm_config.json"
DECODER, VISION = "llm.mnn", "visual.mnn"
EMBEDDING, TOKENIZER = "embeddings_bf16.bin", "tokenizer.mtok"
MAX_NEW_TOKENS = 512  # of an answer; also the engine's default


@dataclass(frozen=True)
class EngineSettings:
    """Run-time settings of MNN's engine."""

    precision: str = "high"  # "high", "normal": float32 on a CPU; "low": float16 if the CPU has it
    memory: str = "high"  # "high": dequantize at load time; "low": keep weights quantized, and activations in 8 bits
    threads: int = 4


class _Settings(Block):
    """Settings of exact types: the engine takes "4" for no number."""

    model_config = ConfigDict(strict=True)


def _settings(name: str, kinds: dict[str, Any]) -> type[Block]:
    """Return the block of settings with these types by key; a dictionary is a block below its key."""
    types = {key: _settings(key, kind) if isinstance(kind, dict) else kind for key, kind in kinds.items()}
    return create_model(name, __base__=_Settings, **{key: (kind, None) for key, kind in types.items()})


Settings = _settings("Settings", RUN_TIME_SETTINGS)
"""Run-time settings in config.json; all are optional."""


def written_config(settings: EngineSettings, vision: bool, embedding: bool) -> dict[str, Any]:
    """Return config.json of a bundle, with or without a vision tower and an embedding beside lm_head."""
    engine = {"thread_num": settings.threads, "precision": settings.precision, "memory": settings.memory}
    engine["backend_type"] = "cpu"
    config = {
        "llm_config": MODEL_CONFIG,
        "llm_model": DECODER,
        "llm_weight": f"{DECODER}.weight",
        "tokenizer_file": TOKENIZER,
        **engine,
        "mllm": engine,
        "sampler_type": "greedy",
        "reuse_kv": False,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return config | ({"visual_model": VISION} if vision else {}) | ({"embedding_file": EMBEDDING} if embedding else {})


def run_time_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that does not belong to the model."""
    return {key: value for key, value in config.items() if key in RUN_TIME_SETTINGS}


def read_config(bundle: Path, name: str) -> dict[str, Any]:
    """Return config.json or llm_config.json of an untrusted bundle; raise BundleError if it holds no JSON object."""
    path = bundle / name
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise BundleError(f"{bundle} has no {name}: the bundle is incomplete") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); make the bundle again") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds no JSON object; make the bundle again")
    return content


def outside_paths(bundle: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and reason of each path in a configuration ("mllm" included) that is not inside the bundle."""
    for key, value in sorted(config.items()):
        if (key in PATH_KEYS or key == BASE_DIR) and value not in ("", None):
            try:
                if key == BASE_DIR:
                    raise ValueError("it replaces the folder of all files")
                path_inside(bundle, value)
            except ValueError as error:
                yield key, value, str(error)
        elif isinstance(value, dict):
            yield from outside_paths(bundle, value)


def check_paths(bundle: Path, names: tuple[str, ...]) -> None:
    """Raise BundleError if one of these configuration files refers to a path outside the bundle."""
    for name in names:
        for key, value, reason in outside_paths(bundle, read_config(bundle, name)) if (bundle / name).exists() else ():
            raise BundleError(
                f"{bundle / name}: {key} is {str(value)[:200]!r} ({reason}); remove the key, or put the file into the"
                " bundle"
            )


def with_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of config.json's content with `settings` for the decoder and the vision tower ("mllm").

    Without "mllm" the vision tower has the settings of the decoder.
    """
    changed = {**config, **settings}
    if changed.get("mllm") is not None:
        vision = {key: value for key, value in settings.items() if key in VISION_SETTINGS}
        changed["mllm"] = {**changed["mllm"], **vision}
    return changed


def decoder_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the run-time settings of the decoder, defaults included."""
    return {key: config.get(key, default) for key, default in SETTING_DEFAULTS.items()}


def vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the run-time settings of the vision tower, defaults included."""
    own = config if config.get("mllm") is None else config["mllm"]
    return decoder_settings(config) | {key: own.get(key, SETTING_DEFAULTS[key]) for key in VISION_SETTINGS}


def _by_key(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield dotted key and value, as JSON, of each setting."""
    for key, value in config.items():
        below = _by_key(value) if isinstance(value, dict) else [("", json.dumps(value, ensure_ascii=False))]
        yield from ((f"{key}.{name}".rstrip("."), text) for name, text in below)


def edited_settings(manifest: Manifest) -> dict[str, str]:
    """Return the run-time settings in config.json that differ from those that the bundle was made with.

    Keys are dotted, values "old -> new"; none if the file has the bytes that the manifest lists, or is no bundle's.
    Raise ValueError, which names the key, if another part of the file differs or a setting is invalid.
    """
    path = manifest.settings_file
    if path is None or sha256(path) == manifest.outputs[CONFIG]["sha256"]:
        return {}
    if path.read_bytes().startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark, which the engine does not read: save it without")
    present = read_json(path)
    if not isinstance(present, dict):
        raise ValueError("it holds no JSON object")
    try:
        settings = EngineSettings(**manifest.settings["engine"])
    except (KeyError, TypeError):
        raise ValueError(f"{NAME} has no settings to compare it with") from None
    written = written_config(settings, VISION in manifest.outputs, EMBEDDING in manifest.outputs)
    of_model = {key: value for key, value in written.items() if key not in RUN_TIME_SETTINGS}
    for key, value in of_model.items():
        if present.get(key) != value:
            raise ValueError(f"{key} is {json.dumps(present.get(key))} in place of {json.dumps(value)}")
    try:
        Settings.model_validate({key: value for key, value in present.items() if key not in of_model})
    except ValidationError as error:
        raise ValueError(error_message(Settings, error, "").removeprefix(": ")) from None
    old, new = dict(_by_key(written)), dict(_by_key(present))
    keys = sorted(key for key in old | new if old.get(key) != new.get(key))
    return {key: f"{old.get(key, 'default')} -> {new.get(key, 'default')}" for key in keys}


def verify_bundle(folder: Path) -> Verdict:
    """Compare every file of a bundle, or of another stage's folder, with its manifest, and name edited settings."""
    verdict = verify_folder(folder)
    if CONFIG in verdict.damaged and (manifest := Manifest.load(folder)).settings_file:
        try:
            verdict.edited = edited_settings(manifest)
            del verdict.damaged[CONFIG]
        except (OSError, ValueError) as error:
            verdict.damaged[CONFIG] = f"was changed: {error}"
    return verdict
