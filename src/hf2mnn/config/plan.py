"""plan.yaml: settings by operator, written by `hf2mnn plan` or by a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hf2mnn.config.messages import Block, error_message
from hf2mnn.config.variants import Bits, BlockSize, Method
from hf2mnn.core.errors import ConfigError
from hf2mnn.core.untrusted import parse_yaml, read_bytes

MAX_YAML, MAX_BLOCKS = 1 << 22, 1 << 16  # bytes, and lists and mappings at one depth


class PlannedWeights(Block):
    """Settings of one operator; the others are those of the variant."""

    bits: Bits | None = None
    block: BlockSize | None = None
    symmetric: bool | None = None
    scale_bits: Literal[16, 32] | None = None
    method: Method | None = None


class Plan(Block):
    """Settings by operator, which is named like its module in transformers."""

    decoder: dict[str, PlannedWeights] = Field({}, description="Operators of the decoder, with lm_head.")
    vision: dict[str, PlannedWeights] = Field({}, description="Operators of the vision tower.")


def read_yaml(kind: str, path: Path) -> Any:
    """Return the contents of an untrusted YAML file; raise ConfigError, which names its `kind`, if that fails."""
    try:
        return parse_yaml(read_bytes(Path(path), MAX_YAML), MAX_BLOCKS)
    except OSError as error:
        raise ConfigError(f"{kind}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{kind}: {path} is not UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{kind}: {path} is not valid YAML: {error}") from None


def load_plan(path: Path) -> Plan:
    """Read a plan; raise ConfigError if the file is missing or is not a plan."""
    try:
        return Plan.model_validate(read_yaml("plan", path) or {})
    except ValidationError as error:
        raise ConfigError(error_message(Plan, error, f"plan: {path}")) from None
