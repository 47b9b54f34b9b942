"""Reading of config.yaml and of JSON options, with all checks that need no job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hf2mnn.config.messages import error_message
from hf2mnn.config.models import Model
from hf2mnn.config.plan import read_yaml
from hf2mnn.config.schema import Config
from hf2mnn.core.errors import ConfigError
from hf2mnn.core.untrusted import parse_json, read_json
from hf2mnn.families import FAMILIES


def parse_config(content: Any) -> Config:
    """Return a mapping `expanded`; raise ConfigError if the schema or a local checkpoint refuses a key."""
    try:
        config = Config.model_validate(content).expanded()
    except ValidationError as error:
        raise ConfigError(error_message(Config, error, "config")) from None
    for model, described in config.models.items():
        _check_blocks(config, model, described)
    return config


def load_config(path: Path) -> Config:
    """Read config.yaml; raise ConfigError if it is missing, not YAML, or invalid."""
    return parse_config(read_yaml("config", path))


def parse_option(kind: type[BaseModel], text: str, option: str) -> Any:
    """Return a block of the configuration in an option as JSON, with defaults; raise ConfigError if it is invalid."""
    try:
        given = kind.model_validate_json(text).model_dump(exclude_none=True)
        parse_json(text)  # refuses duplicate keys
        return given
    except ValidationError as error:
        raise ConfigError(error_message(kind, error, option)) from None
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _check_blocks(config: Config, model: str, described: Model) -> None:
    """Raise ConfigError if a block does not divide the inputs of a linear layer in a local checkpoint's config.json.

    MNN's converter would use one scale per channel without a message.
    """
    path = Path(described.source.path or "", "config.json")
    if described.source.path is None or not path.is_file():
        return
    try:
        checkpoint = read_json(path)
        text, vision = checkpoint.get("text_config") or checkpoint, checkpoint.get("vision_config") or {}
        inputs = FAMILIES[checkpoint.get("model_type")].linear_inputs(text, vision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # the fetch stage refuses such a checkpoint, with its own message
    for variant in config.variants_of(model):
        for part, weights in (("decoder", config.decoder_weights(variant)), ("vision", config.vision_weights(variant))):
            if config.variants[variant].plan or weights.method == "checkpoint" or weights.bits >= 16:
                continue
            for size in inputs.get(part, []):
                if weights.block and size % weights.block:
                    key = f"variants.{variant}.{'vision.' if part == 'vision' else ''}block"
                    raise ConfigError(
                        f"config: {key}: {weights.block} does not divide the {size} inputs of a {part} layer of"
                        f" {model}; use a divisor, or 0 for one scale per channel"
                    )
