"""Facts about MNN have a source and users that exist."""

from __future__ import annotations

import ast
import importlib
import re
from operator import attrgetter

import pytest

from hf2mnn.core import fingerprint
from hf2mnn.mnn import engine_facts
from hf2mnn.mnn.engine_facts import QUIRKS

SOURCE = fingerprint.ROOT / "mnn" / "engine_facts.py"


def documented() -> dict[str, str]:
    """Docstring of each constant and enumeration."""
    body = ast.parse(SOURCE.read_text()).body
    texts = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign):
            text = following.value.value if isinstance(following, ast.Expr) else ""
            texts[node.targets[0].id] = text
        elif isinstance(node, ast.ClassDef):
            texts[node.name] = ast.get_docstring(node)
    return texts


FACTS = documented()


@pytest.mark.parametrize("name", FACTS)
def test_facts_name_their_source_and_their_users(name: str) -> None:
    text = " ".join(FACTS[name].split())
    assert "Source: " in text or name == "QUIRKS"
    users = re.search(r"Used by: ([\w., ]+)\.$", text)[1].split(", ")
    for user in users:
        code = (fingerprint.ROOT / f"{user.replace('.', '/')}.py").read_text()
        assert name == "QUIRKS" or re.search(rf"\b{name}\b", code), user


@pytest.mark.parametrize("name", QUIRKS)
def test_quirks_name_code_that_exists(name: str) -> None:
    parts = QUIRKS[name][1].split(".")
    if "worker" in parts:  # not importable here: it loads the engine
        code = (fingerprint.ROOT / "mnn" / "worker" / f"{parts[2]}.py").read_text()
        assert all(re.search(rf"(class|def) {part}\b", code) for part in parts[3:])
    else:
        module = importlib.import_module(".".join(["hf2mnn", *parts[:-1]]))
        assert callable(attrgetter(parts[-1])(module))


def test_sizes_of_images_are_those_of_families() -> None:
    """They are declared in `families`, which is imported before `mnn`, and listed here."""
    from hf2mnn.families import engine_limits

    names = [name for name in vars(engine_limits) if name.isupper()]
    assert names
    assert {name: getattr(engine_facts, name, None) for name in names} == {
        name: getattr(engine_limits, name) for name in names
    }
