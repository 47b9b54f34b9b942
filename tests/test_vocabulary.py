"""Vocabulary: words of the left column of the style guide, which the field's own terms replace, are not in the tree."""

from __future__ import annotations

import re
import subprocess
from functools import cache

import pytest

from support import REPOSITORY

SCANNED = (
    "src/",
    "tests/",
    "workflow/",
    "docs/",
    "bench/",
    ".github/",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "Snakefile",
    "config.yaml",
)
DATA = re.compile(
    r"tests/test_vocabulary\.py|tests/mnn/templates/.*|tests/.*/data/.*|docs/.*\.(svg|png)|.*\.(png|safetensors)"
)
"""Prompts and data, and this list."""
WORDS = {
    r"pictures?": "image",
    r"hear|hears|heard|listening": "hook, record",
    r"told|said": "report, message",
    r"looks(?! up)": "report",
    r"seen": "detect, known",
    r"(?<!not[ -])found": "detect, result, or the name of the value",
    r"goes? with each stage": "manifest",
    r"(it is|is|was|were|are|what is|been) made of|made_of": "inputs, provenance",
    r"what came|what there is|what is there": "outputs, contents",
    r"(?<!in[ _-])places?": "path, position, location",
    r"what a layer (reads|hears|sees)": "layer input, activations",
    r"(?<!tap[ _])points_of": "tap points",
    r"levels": "q, quantized values",
    r"(?<!bit[ _-])(?<!__)(?<!__un)packed": "nc4hw4, prequantized, quantized",
    r"lsq": "mse",
    r"(?<!turn )in turns": "interleaved runs",
    r"strays?|leaves (its )?tolerance": "exceeds tolerance",
    r"PassingError": "TransientError",
    r"(un)?dress(ed|es)?": "adapt inputs and outputs",
    r"settles?d?": "resolve",
    r"hide_(linear|layer)\w*|show_layers": "strip, restore",
    r"eyesight|nonsense": "image understanding, wrong output",
    r"by hand|by_hand": "manually, user-provided",
    r"strangers?": "untrusted",
    r"sentences?": "message",
    r"departures?": "differences",
    r"vouch(es)?": "list, verify",
}
"""Forbidden words as regular expressions, and the terms to use."""
EXEMPT = {
    # Former names, which are refused or documented.
    "src/hf2mnn/config/messages.py": ("lsq", "picture"),
    "tests/config/test_schema.py": ("lsq", "picture"),
    "CHANGELOG.md": ("lsq", "picture"),
    "docs/quantization.md": ("LSQ",),
    # Bits that are packed into bytes.
    "src/hf2mnn/quant/blob.py": ("packed",),
    "src/hf2mnn/quant/embedding.py": ("packed",),
    "src/hf2mnn/quant/write.py": ("packed",),
    "tests/quant/test_blob.py": ("packed",),
    # Names of tensors, prompts, output of pip, and sentences that are sentences.
    "src/hf2mnn/onnx/deepstack.py": ("seen",),
    "tests/models/test_world.py": ("picture",),
    "tests/config/test_toolchain.py": ("found",),
    "tests/workflow/test_docs.py": ("sentence", "SENTENCE"),
}
"""Words that a file may have, by its path."""


@cache
def lines() -> list[tuple[str, str]]:
    """Return position (file:line) and text of each line of the tracked files that are scanned."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    texts = []
    for name in sorted(filter(None, listing.stdout.split("\0"))):
        path = REPOSITORY / name
        if not name.startswith(SCANNED) or DATA.fullmatch(name) or not path.is_file() or path.is_symlink():
            continue
        text = path.read_text(encoding="utf-8")
        for exempt in EXEMPT.get(name, ()):
            text = text.replace(exempt, "")
        texts += [(f"{name}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]
    return texts


@pytest.mark.parametrize("word", WORDS)
def test_word_is_not_in_the_tree(word: str) -> None:
    """A word counts within snake_case too."""
    pattern = re.compile(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", re.IGNORECASE)
    matches = [f"{position}: {line.strip()[:100]}" for position, line in lines() if pattern.search(line)]
    assert not matches, f"use {WORDS[word]}:\n" + "\n".join(matches)
