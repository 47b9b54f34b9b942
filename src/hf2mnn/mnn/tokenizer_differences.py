"""Differences between transformers and MNN's engine in the ids and the text of prompts.

Measured with the engine of the 3.6.1 wheel, ids are equal for English, Chinese, digits, punctuation, white space,
emoji, special tokens in text, and composed or decomposed accents; every character of Unicode 14 is split alike. They
differ for

* words that `ignore_merges` (Llama 3) reads as one token although no merges produce it: the engine lacks this option
  and reads them as several tokens of the same text;
* U+0001 to U+0003, which the engine's pre-tokenizer takes for a letter, a number and white space;
* U+0085, U+2028 and U+2029, which it does not take for white space;
* letters and numbers of Unicode 15.1 or later, such as U+13853, which only one of the two knows;
* U+017F after an apostrophe, which tokenizers takes for the `s` of a contraction;
* marks that NFC would only reorder, or compose across a mark between them;
* text after U+0000, which the Python binding drops;
* white space outside ASCII beside an added token with `lstrip` or `rstrip`;
* `<img>...</img>` and `<audio>...</audio>` in a text, which an engine with images takes for files.

Merging takes quadratic time within one piece of a split: 3,300 Chinese characters without punctuation take 4 s, 9,900
take 33 s. Special tokens decode to nothing, as with `skip_special_tokens=True`; the engine's option `prompt_cache`
counts decoded bytes and must stay off. The Python binding cannot decode a token that is a part of a character.

The engine's Jinja renders the templates of Qwen2 to Qwen3-VL, Llama 2 and 3, and Mistral as transformers does, except
that `trim` and `strip` remove only space, tab, newline and carriage return. `hf2mnn.mnn.template` has the constructs
that it renders differently.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from hf2mnn.core.errors import BundleError, CheckpointError
from hf2mnn.mnn.checkpoint_tokenizer import TOKENIZER_FILE, chat_template, read_object
from hf2mnn.mnn.template import unsupported

EXAMPLES = 3
"""Words to name in a message."""


def unreached_words(checkpoint: Path) -> list[str]:
    """Return texts of tokens that only `ignore_merges` reaches.

    Raises:
        CheckpointError: tokenizer.json is not a tokenizer.
    """
    path = checkpoint / TOKENIZER_FILE
    stored = read_object(path) or {}
    try:
        if not stored["model"].get("ignore_merges"):
            return []
        tokenizer = Tokenizer.from_str(json.dumps(stored))
        merging = Tokenizer.from_str(json.dumps(stored | {"model": stored["model"] | {"ignore_merges": False}}))
        unreached = []
        for token, number in stored["model"]["vocab"].items():
            if [piece.id for piece in merging.model.tokenize(token)] != [number]:
                text = tokenizer.decoder.decode([token])
                if [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == [token]:
                    unreached.append(text)
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(
            f"{path} is not a tokenizer of the tokenizers library: {error!r}; save it again"
        ) from error
    return unreached


def tokenizer_differences(checkpoint: Path) -> list[str]:
    """Return a message for each difference of the engine that a checkpoint's tokenizer and chat template cause.

    Raises:
        CheckpointError: The chat template or the tokenizer is invalid.
    """
    messages = []
    if words := unreached_words(checkpoint):
        examples = ", ".join(map(repr, words[:EXAMPLES]))
        messages.append(f"{len(words)} words of one token become several tokens of the same text ({examples})")
    try:
        constructs = unsupported(chat_template(checkpoint))
    except BundleError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    if constructs:
        messages.append(f"the chat template has constructs that the engine's Jinja lacks: {'; '.join(constructs)}")
    return messages
