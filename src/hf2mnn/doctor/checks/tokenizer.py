"""The tokenizer's file and the chat template."""

from __future__ import annotations

from collections.abc import Iterator

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import BundleError, CheckpointError
from hf2mnn.doctor.checks.config import place
from hf2mnn.doctor.checks.image import ENGINE, IDS
from hf2mnn.doctor.decoder import decoder_sizes
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle
from hf2mnn.families import family_named
from hf2mnn.mnn.template import unsupported
from hf2mnn.mnn.tokenizer import encode_tokenizer, unreached_words
from hf2mnn.mnn.tokenizer_file import HUGGINGFACE, TokenizerFile, parse_tokenizer

COMPARED = ("pipeline", HUGGINGFACE)
"""Kinds of file whose tokens are stored as the checkpoint has them."""
NAMED = 3
AGAIN = "take the tokenizer of the checkpoint that the bundle was made of; 'hf2mnn mnn' writes it"


def tokenizer_unreadable(bundle: Bundle) -> Iterator[Finding]:
    path = bundle.file("tokenizer_file")
    if not path.is_file():
        return
    try:
        _ = bundle.tokenizer
    except BundleError as error:
        yield Finding(
            "tokenizer_unreadable",
            Severity.ERROR,
            path.name,
            "the tokenizer's file is no tokenizer, or not whole",
            str(error).removeprefix(f"{path} "),
            "the engine does not load the bundle, crashes, or cuts texts into the wrong tokens",
            "copy it again; of a clone without Git LFS run 'git lfs pull' in its folder",
        )


def tokenizer_ids(bundle: Bundle) -> Iterator[Finding]:
    """Rows of the embedding and of the logits are one for each id, and may be more."""
    sizes, tokenizer = decoder_sizes(bundle), bundle.tokenizer
    numbers = {*tokenizer.known, *tokenizer.special, *tokenizer.stop}
    if sizes and sizes.vocabulary and max(numbers, default=0) >= sizes.vocabulary:
        beyond = sorted(number for number in numbers if number >= sizes.vocabulary)
        text = tokenizer.text(beyond[0])
        yield Finding(
            "tokenizer_ids",
            Severity.ERROR,
            bundle.file("tokenizer_file").name,
            "the tokenizer has ids that the model has no embedding of",
            f"{len(beyond)} ids from {beyond[0]} ({text!r}) on; the model has {sizes.vocabulary}",
            "the engine reads past the end of the embedding at such a token: a crash, or nonsense",
            AGAIN,
        )


def _wanted_tokens(bundle: Bundle) -> Iterator[tuple[str, int, str | None]]:
    """Key, id and text of the tokens that an image is marked with; the text where the family is known."""
    texts = {}
    if bundle.facts:
        family = family_named(bundle.facts["model_type"], bundle.folder)
        texts = {bundle.facts.get(key): text for key, text in family.special_tokens.items()}
    if bundle.model.get("is_visual") is True:
        for key in IDS:
            number = bundle.model.get(key, ENGINE[key])
            yield key, number, texts.get(number)


def special_tokens(bundle: Bundle) -> Iterator[Finding]:
    tokenizer, name = bundle.tokenizer, bundle.file("tokenizer_file").name
    for key, number, text in _wanted_tokens(bundle):
        found = tokenizer.text(number)
        if found is None or (text is not None and found != text):
            yield Finding(
                "special_tokens",
                Severity.ERROR,
                f"{name}: {key}",
                f"the token that the engine uses as {key} is not the tokenizer's",
                f"{key} is {number}, which is "
                + (f"{found!r}, not {text!r}" if found is not None else "no token of this tokenizer"),
                "images are not where the model looks for them, and the template's marks are read as text",
                AGAIN,
            )
    unknown = [number for number in tokenizer.stop if number not in tokenizer.known]
    if not tokenizer.stop or unknown:
        yield Finding(
            "special_tokens",
            Severity.ERROR,
            f"{name}: stop ids",
            "the tokenizer does not know what ends an answer",
            f"stop ids {unknown} are no tokens" if unknown else "it has no stop ids",
            "answers go on until max_new_tokens, as a conversation of the model with itself",
            AGAIN,
        )
    elif bundle.facts and (missing := set(bundle.facts["stop_ids"]) - set(tokenizer.stop)):
        named = ", ".join(f"{number} ({tokenizer.text(number)!r})" for number in sorted(missing))
        yield Finding(
            "special_tokens",
            Severity.ERROR,
            f"{name}: stop ids",
            "the tokenizer does not stop at every token that ends an answer",
            f"the checkpoint also stops at {named}, the tokenizer only at {list(tokenizer.stop)}",
            "answers go on after their end",
            AGAIN,
        )


def _differences(found: TokenizerFile, right: TokenizerFile) -> Iterator[str]:
    """What of the checkpoint's tokenizer is otherwise in the bundle's."""
    wanted, given = ({n: file.text(n) for n in file.known} for file in (right, found))
    wrong = sorted(number for number in wanted if given.get(number) != wanted[number])
    more = sorted(given.keys() - wanted.keys())
    if wrong:
        shown = ", ".join(f"{n} is {given.get(n)!r}, not {wanted[n]!r}" for n in wrong[:NAMED])
        yield f"{len(wrong)} of {len(wanted)} tokens are others ({shown})"
    elif more:
        yield f"it has {len(more)} tokens that the checkpoint has not (from {given[more[0]]!r} on)"
    order = [sorted(file.merges, key=file.merges.__getitem__) for file in (found, right)]
    if not wrong and order[0] != order[1]:
        yield f"its {len(found.merges)} merges are not the checkpoint's {len(right.merges)}, or in another order"
    if set(found.stop) != set(right.stop):
        yield f"it stops at {sorted(found.stop)}, the checkpoint at {sorted(right.stop)}"


def _of_checkpoint(checkpoint: Checkpoint) -> TokenizerFile | None:
    """None for a kind of tokenizer that hf2mnn does not write."""
    try:
        return parse_tokenizer(encode_tokenizer(checkpoint.folder), checkpoint.folder)
    except CheckpointError:
        return None


def tokenizer_differs(bundle: Bundle) -> Iterator[Finding]:
    right = _of_checkpoint(bundle.checkpoint) if bundle.checkpoint else None
    found = bundle.tokenizer
    if right is None or found.kind not in COMPARED:
        return
    if wrong := list(_differences(found, right)):
        yield Finding(
            "tokenizer_differs",
            Severity.ERROR,
            bundle.file("tokenizer_file").name,
            "the tokenizer is not the checkpoint's",
            "; ".join(wrong),
            "the model reads other tokens than were written, and what it answers is spelled with others",
            AGAIN,
        )


def tokenizer_merges(bundle: Bundle) -> Iterator[Finding]:
    if bundle.checkpoint is None or bundle.tokenizer.kind not in COMPARED:
        return
    try:
        words = unreached_words(bundle.checkpoint.folder)
    except CheckpointError:
        return
    if words:
        yield Finding(
            "tokenizer_merges",
            Severity.WARNING,
            bundle.file("tokenizer_file").name,
            "some words that are one token are read as several",
            f"{len(words)} tokens that no merges lead to ({', '.join(map(repr, words[:NAMED]))}); the checkpoint's"
            " tokenizer has ignore_merges, which the engine does not know",
            "the model reads these words, rare ones most of the time, in a spelling that it saw less often",
            "feed the engine the ids of the checkpoint's tokenizer where that matters",
        )


def template_of(bundle: Bundle) -> tuple[str, str]:
    """The chat template that the engine renders, and where it stands."""
    given = bundle.model.get("jinja")
    if isinstance(given, dict) and isinstance(given.get("chat_template"), str):
        return given["chat_template"], place(bundle, "jinja.chat_template")
    return bundle.tokenizer.template, f"{bundle.file('tokenizer_file').name}: chat template"


def chat_template(bundle: Bundle) -> Iterator[Finding]:
    template, where = template_of(bundle)
    if bundle.model.get("use_template") is False:
        return
    if not template:
        yield Finding(
            "chat_template",
            Severity.WARNING,
            where,
            "there is no chat template",
            "neither jinja.chat_template nor the tokenizer's file holds one",
            "a model that was trained on chats gets the bare question, and goes on with it instead of answering",
            "write the checkpoint's chat template into llm_config.json: jinja.chat_template",
        )
        return
    try:
        constructs = unsupported(template)
    except BundleError as error:
        yield Finding(
            "chat_template",
            Severity.ERROR,
            where,
            "the chat template is no Jinja template",
            str(error),
            "the engine renders some part of it: the model gets something else than its format of chats",
            "take the checkpoint's chat template",
        )
        return
    if constructs:
        yield Finding(
            "chat_template",
            Severity.WARNING,
            where,
            "the chat template holds what the engine's Jinja does not run",
            "; ".join(constructs),
            "where a chat comes there, it is rendered otherwise than by transformers, without a word: worse answers",
            "write the template without it; 'hf2mnn doctor --run' renders a chat by both",
        )


CHECKS = (tokenizer_unreadable, tokenizer_ids, special_tokens, tokenizer_differs, tokenizer_merges, chat_template)
