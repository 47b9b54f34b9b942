"""Checks of the tokenizer file and of the chat template."""

from __future__ import annotations

from collections.abc import Iterator

from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import BundleError
from hf2mnn.doctor.artifacts import Bundle
from hf2mnn.doctor.checks.config import IDS
from hf2mnn.doctor.findings import Finding, Findings, Severity
from hf2mnn.families import get_family
from hf2mnn.mnn.engine_facts import IMAGE_DEFAULTS
from hf2mnn.mnn.template import unsupported
from hf2mnn.mnn.tokenizer import encode_tokenizer
from hf2mnn.mnn.tokenizer_file import HUGGINGFACE, TokenizerFile, parse_tokenizer
from hf2mnn.mnn.whole_words import find_whole_words

COMPARED = ("pipeline", HUGGINGFACE)
"""Kinds of file that store tokens like the checkpoint."""
NAMED = 3
TAKE_CHECKPOINTS = "use the tokenizer of the checkpoint that the bundle was converted from; 'hf2mnn convert' writes it"


def tokenizer_unreadable(bundle: Bundle) -> Findings:
    """Report a tokenizer file that is truncated or of another format."""
    path = bundle.file("tokenizer_file")
    if not path.is_file():
        return
    try:
        _ = bundle.tokenizer
    except BundleError as error:
        message = "the tokenizer file is truncated or not a tokenizer"
        effect = "the engine does not load the bundle, crashes, or splits texts into wrong tokens"
        cure = "copy it again; in a clone without Git LFS run 'git lfs pull' in its folder"
        yield Finding(path.name, message, str(error).removeprefix(f"{path} "), effect, cure)


def tokenizer_ids(bundle: Bundle) -> Findings:
    """Compare the largest id with the rows of the embedding, which may be more."""
    vocabulary, tokenizer = bundle.decoder_shape.vocabulary, bundle.tokenizer
    beyond = sorted(n for n in {*tokenizer.known, *tokenizer.special, *tokenizer.stop} if n >= vocabulary)
    if vocabulary and beyond:
        message, text = "the tokenizer has ids without an embedding", tokenizer.text(beyond[0])
        evidence = f"{len(beyond)} ids from {beyond[0]} ({text!r}) on; the model has {vocabulary}"
        effect = "the engine reads past the end of the embedding at such a token: a crash or wrong output"
        yield Finding(bundle.file("tokenizer_file").name, message, evidence, effect, TAKE_CHECKPOINTS)


def special_tokens(bundle: Bundle) -> Findings:
    """Check the tokens that mark an image, by text in known families, and the stop ids."""
    tokenizer, name, texts = bundle.tokenizer, bundle.file("tokenizer_file").name, {}
    if bundle.info:
        family = get_family(bundle.info["model_type"], bundle.folder)
        texts = {bundle.info.get(key): text for key, text in family.special_tokens.items()}
    for key in IDS if bundle.model.get("is_visual") is True else ():
        number = bundle.model.get(key, IMAGE_DEFAULTS[key])
        text, expected = tokenizer.text(number), texts.get(number)
        if text is None or (expected is not None and text != expected):
            is_what = f"{text!r}, not {expected!r}" if text is not None else "not a token of this tokenizer"
            message = f"the tokenizer has another token, or none, for {key}"
            effect = "the model does not find images, and reads the marks of the template as text"
            yield Finding(f"{name}: {key}", message, f"{key} is {number}, which is {is_what}", effect, TAKE_CHECKPOINTS)
    unknown = [number for number in tokenizer.stop if number not in tokenizer.known]
    missing = sorted(set(bundle.info["stop_ids"]) - set(tokenizer.stop)) if bundle.info else []
    if not tokenizer.stop or unknown:
        message = "the tokenizer has no valid stop ids"
        evidence = f"stop ids {unknown} are not tokens" if unknown else "it has no stop ids"
        effect = "generation continues until max_new_tokens, as a conversation of the model with itself"
    elif missing:
        message = "the tokenizer lacks stop ids of the checkpoint"
        tokens = ", ".join(f"{number} ({tokenizer.text(number)!r})" for number in missing)
        evidence = f"the checkpoint also stops at {tokens}, the tokenizer only at {list(tokenizer.stop)}"
        effect = "generation continues after the end of the answer"
    else:
        return
    yield Finding(f"{name}: stop ids", message, evidence, effect, TAKE_CHECKPOINTS)


def _differences(given: TokenizerFile, right: TokenizerFile) -> Iterator[str]:
    """Yield the differences between the bundle's tokenizer and the checkpoint's."""
    tokens, expected = ({n: file.text(n) for n in file.known} for file in (given, right))
    wrong = sorted(number for number in expected if tokens.get(number) != expected[number])
    if wrong:
        named = ", ".join(f"{n} is {tokens.get(n)!r}, not {expected[n]!r}" for n in wrong[:NAMED])
        yield f"{len(wrong)} of {len(expected)} tokens differ ({named})"
    elif extra := sorted(tokens.keys() - expected.keys()):
        yield f"it has {len(extra)} tokens that the checkpoint lacks (from {tokens[extra[0]]!r} on)"
    merges, expected_merges = (sorted(file.merges, key=file.merges.__getitem__) for file in (given, right))
    if not wrong and merges != expected_merges:
        yield f"its {len(merges)} merges, or their order, differ from the checkpoint's {len(expected_merges)}"
    if set(given.stop) != set(right.stop):
        yield f"it stops at {sorted(given.stop)}, the checkpoint at {sorted(right.stop)}"


def tokenizer_differs(bundle: Bundle) -> Findings:
    """Compare tokens, merges and stop ids with the checkpoint, unless hf2mnn does not write its kind of tokenizer."""
    if bundle.checkpoint is None or bundle.tokenizer.kind not in COMPARED:
        return
    folder = bundle.checkpoint.folder
    if differences := list(_differences(bundle.tokenizer, parse_tokenizer(encode_tokenizer(folder), folder))):
        message = "the tokenizer differs from the checkpoint's"
        effect = "wrong output: texts are encoded and answers are decoded with other tokens"
        yield Finding(bundle.file("tokenizer_file").name, message, "; ".join(differences), effect, TAKE_CHECKPOINTS)


def tokenizer_merges(bundle: Bundle) -> Findings:
    """Report words that are one token by ignore_merges, unless the file marks them: the engine only merges."""
    if bundle.checkpoint is None or bundle.tokenizer.kind not in COMPARED or bundle.tokenizer.whole_words:
        return
    tokenizer = load_tokenizer(bundle.checkpoint.folder)
    if words := [*find_whole_words(tokenizer).pieces]:
        named = ", ".join(repr(tokenizer.convert_tokens_to_string([word])) for word in words[:NAMED])
        message = "some words that are one token are encoded as several"
        evidence = f"ignore_merges of the checkpoint; no merges produce {len(words)} tokens ({named})"
        effect = "the model reads these words, most of them rare, in an encoding that is rarer in its training"
        cure = TAKE_CHECKPOINTS
        yield Finding(bundle.file("tokenizer_file").name, message, evidence, effect, cure, severity=Severity.WARNING)


def template_of(bundle: Bundle) -> tuple[str, str]:
    """Return the chat template that the engine renders, and its location."""
    jinja = bundle.model.get("jinja")
    if isinstance(jinja, dict) and isinstance(jinja.get("chat_template"), str):
        return jinja["chat_template"], bundle.locate("jinja.chat_template")
    return bundle.tokenizer.template, f"{bundle.file('tokenizer_file').name}: chat template"


def chat_template(bundle: Bundle) -> Findings:
    """Report a chat template that is missing, invalid, or uses Jinja that the engine does not implement."""
    template, where = template_of(bundle)
    if bundle.model.get("use_template") is False:
        return
    try:
        constructs = unsupported(template)
    except BundleError as error:
        effect = "the engine renders a part of it: the model gets another chat format"
        cure = "use the checkpoint's chat template"
        yield Finding(where, "the chat template is not valid Jinja", str(error), effect, cure)
        return
    if not template:
        message = "there is no chat template"
        evidence = "neither jinja.chat_template nor the tokenizer file holds one"
        effect = "a chat model gets the bare prompt, and continues it instead of answering"
        cure = "set jinja.chat_template in llm_config.json to the checkpoint's chat template"
        yield Finding(where, message, evidence, effect, cure, severity=Severity.WARNING)
    if constructs:
        message = "the chat template uses Jinja that the engine does not implement"
        effect = "chats that reach it are rendered differently than by transformers, without an error"
        cure = "rewrite the template without it; 'hf2mnn doctor --run' compares both renderings of a chat"
        yield Finding(where, message, "; ".join(constructs), effect, cure, severity=Severity.WARNING)


CHECKS = (tokenizer_unreadable, tokenizer_ids, special_tokens, tokenizer_differs, tokenizer_merges, chat_template)
