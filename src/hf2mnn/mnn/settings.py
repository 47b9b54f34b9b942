"""Run-time settings in a bundle's config.json, as `llmconfig.hpp` and `llm.cpp` of MNN 3.6.1 read them."""

from __future__ import annotations

from typing import Any

DEFAULTS = {"thread_num": 4, "precision": "low", "memory": "low", "dynamic_option": 0, "attention_mode": 8}
"""What the engine takes where config.json says nothing."""
SHARED = ("thread_num", "precision", "memory")
"""The vision tower reads these under "mllm"; the others hold for both parts from the top level."""


def with_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of config.json's content with `settings` in it, for the decoder and for the vision tower.

    `set_config` of a loading engine is no way to do this: it does not reach what was under "mllm". Without "mllm" the
    vision tower runs by the decoder's settings.
    """
    if config.get("mllm") is None:
        return {**config, **settings}
    shared = {key: value for key, value in settings.items() if key in SHARED}
    return {**config, **settings, "mllm": {**config["mllm"], **shared}}


def engine_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings by which the decoder runs."""
    return {key: config.get(key, default) for key, default in DEFAULTS.items()}


def vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings by which the vision tower runs."""
    own = config.get("mllm", {}) if config.get("mllm") is not None else config
    return {key: (own if key in SHARED else config).get(key, default) for key, default in DEFAULTS.items()}
