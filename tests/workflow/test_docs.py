"""Documentation: examples run, pages are short, and sentences too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPOSITORY, Workspace

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
MOST_WORDS = {"README.md": 1000}
"""Words of a page; 1,500 for the others."""
LONGEST_SENTENCE = 30
"""Words; code counts as one."""


def example(name: str) -> str:
    """Return the first Python block of a page."""
    return re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / name).read_text(), re.DOTALL)[1]


@pytest.mark.parametrize(("name", "answer"), [("onnx.md", "top left: "), ("bundle.md", "\n7\n")])
def test_example_runs(finished: Workspace, name: str, answer: str) -> None:
    """The process of bundle.md may end in the documented segmentation fault, but only after it has answered."""
    done = subprocess.run(
        [sys.executable, "-c", example(name)], cwd=finished.folder, capture_output=True, text=True, timeout=120
    )
    assert answer in done.stdout, done.stderr
    assert done.returncode == 0 or name == "bundle.md"


def sentences(text: str) -> list[str]:
    """Return the sentences of a page without its code, tables and headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*[|#].*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "X", text))
    blocks = re.split(r"\n\s*\n|\n\s*[-*] |\n\s*\d+\. ", text)
    return [
        part for block in blocks for part in re.split(r"(?<=[.:;?!])\s+(?=[A-Z`*\[\"(0-9])", " ".join(block.split()))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_page_is_short_and_so_are_its_sentences(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS.get(page.name, 1500)
    assert [sentence for sentence in sentences(text) if len(sentence.split()) > LONGEST_SENTENCE] == []


def test_links_between_pages_lead_to_files_and_headings() -> None:
    broken = []
    for page in [*PAGES, REPOSITORY / "README.zh.md", REPOSITORY / "results" / "README.md"]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve() if target else page
            headings = (
                re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                if path.suffix == ".md" and path.is_file()
                else []
            )
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if not path.exists() or (anchor and anchor not in anchors):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert broken == []
