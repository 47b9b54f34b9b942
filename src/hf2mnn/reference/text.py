"""The text of an answer, by the tokenizers library alone: the same for PyTorch's answers and every conversion's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class AnswerDecoder:
    """Decodes ids with the tokenizer.json of a checkpoint folder (the `source` or the `onnx` stage's)."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def __call__(self, ids: Sequence[int]) -> str:
        """Without special tokens, the one that ends the answer among them, and without white space around it."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()
