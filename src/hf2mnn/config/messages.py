"""Base class of configuration blocks, and messages for invalid ones: key, problem, nearest valid name."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, RootModel, ValidationError

from hf2mnn.core.errors import suggest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RENAMED = {"speed": "benchmark", "picture_side": "image_side", "lsq": "mse"}  # present by former keys and values
FOLDER, REPOSITORY, LABELLED = "[folder]", "[repository]", "[labelled]"  # tags of unions
TAGS = (FOLDER, REPOSITORY, LABELLED, "[key]")
"""Parts of the location in pydantic's errors that are no keys of the configuration."""


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a valid name: use letters, digits, '.', '_' and '-', and start with a letter or digit"
        )
    return value


Name = Annotated[str, AfterValidator(_name)]
"""Name of a model, variant, revision or toolchain, which becomes a part of a path."""


Local = Annotated[str, AfterValidator(os.path.expanduser)]
"""Path that a user gives; ~ and ~user at its beginning are expanded."""


class Block(BaseModel):
    """A block of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _keys_at(annotation: Any, location: tuple[Any, ...]) -> list[str]:
    """Return the valid keys of the blocks at a location below a block or another type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        if issubclass(annotation, RootModel):
            return _keys_at(fields["root"].annotation, location)
        if not location:
            return list(fields)
        return _keys_at(fields[location[0]].annotation, location[1:]) if location[0] in fields else []
    inner = get_args(annotation)
    if get_origin(annotation) in (dict, list):
        return _keys_at(inner[-1], location[1:])
    return [key for part in inner for key in _keys_at(part, location)]


def error_message(block: type[BaseModel], error: ValidationError, prefix: str) -> str:
    """Return the first error in a `block` as one line: what was read ("config", a file, an option), key and problem."""
    errors = error.errors()
    # An unknown key first: it often is the misspelled name of a missing one.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    location = tuple(part for part in first["loc"] if part not in TAGS)
    problem, value = first["msg"].removeprefix("Value error, "), first.get("input")
    if first["type"] == "extra_forbidden":
        problem = f"there is no such key{suggest(location[-1], _keys_at(block, location[:-1]), RENAMED)}"
    elif first["type"] == "missing":
        problem = "this key is missing"
    elif first["type"] == "literal_error":
        expected = first["ctx"]["expected"]
        valid = re.findall("'([^']*)'", expected)
        problem = f"{value!r} is not one of {expected}{suggest(value, valid, RENAMED, listed=True)}"
    elif isinstance(value, str | int | float) and not problem.startswith(repr(value)):
        problem = f"{problem[0].lower()}{problem[1:]}, not {value!r}"
    key = ".".join(map(str, location))
    return " ".join(f"{prefix}: {key + ': ' if key else ''}{problem}".split())
