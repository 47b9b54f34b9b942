"""The tokenizer of a checkpoint, as transformers loads it.

AutoTokenizer chooses the class by model_type, tokenizer_class and the files, and changes the contents of tokenizer.json
by its settings: other splitting, more added tokens, other special ones. So nothing is read from tokenizer.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf2mnn.checkpoint.folder import read_json
from hf2mnn.core.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
"""Files that transformers parses without limits."""
UNRELATED = (MemoryError, KeyboardInterrupt, SystemExit)


@contextmanager
def invalid_tokenizer(folder: Path) -> Iterator[None]:
    """Raise CheckpointError in place of errors of transformers and tokenizers, whose panics are no `Exception`."""
    try:
        yield
    except (CheckpointError, *UNRELATED):
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{folder}: transformers cannot load the tokenizer ({reason}); download it again, or save it with"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that AutoTokenizer loads from a local folder, without remote code.

    Raise CheckpointError if a file is invalid, or the tokenizer is not one of the tokenizers library.
    """
    from transformers import AutoTokenizer

    for path in (folder / name for name in JSON_FILES):
        if path.exists():
            read_json(path)
    with invalid_tokenizer(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not getattr(tokenizer, "backend_tokenizer", None):
            raise CheckpointError(
                f"{folder}: transformers loads the tokenizer as {type(tokenizer).__name__}, which is not one of the"
                " tokenizers library; save it as tokenizer.json"
            )
    return tokenizer


def contents(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return a loaded tokenizer in the layout of tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())
