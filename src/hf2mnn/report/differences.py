"""Where an answer differs from PyTorch's: word by word, and character by character where a script has no spaces."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|\s+|.", re.DOTALL)


def tokens(text: str) -> list[str]:
    """Words, stretches of white space, single marks and single characters of Chinese, Japanese and Korean."""
    return TOKEN.findall(text)


def marked(reference: str, answer: str) -> Markup:
    """`answer` as HTML: in <mark> what PyTorch did not say there, in <del> what it said and the answer leaves out."""
    one, other, pieces = tokens(reference), tokens(answer), []
    for kind, start, end, from_, to in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        said, left_out = escape("".join(other[from_:to])), escape("".join(one[start:end]))
        if kind == "equal":
            pieces.append(said)
        elif kind == "delete":
            pieces.append(Markup("<del>{}</del>").format(left_out))
        else:
            pieces.append(Markup("<mark>{}</mark>").format(said))
    return Markup("").join(pieces)
