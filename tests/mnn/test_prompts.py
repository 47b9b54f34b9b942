"""Conversations in MNN's engine have the text and ids of transformers, for tokenizers and templates of every family.

Real tokenizers are not available offline, so each is trained on this repository's examples with its family's settings.
The templates are written for these tests, with the constructs of the families' templates.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.checkpoint_tokenizer import BYTE_TOKENS, META_SPACE
from hf2mnn.mnn.template import engine_messages, render, unsupported
from hf2mnn.mnn.tokenizer import template_differences, write_tokenizer
from tokenizing import Engine

ROOT = Path(__file__).parents[2]
TEMPLATES = Path(__file__).parent / "templates"

# Tokenizers -----------------------------------------------------------------------------------------------------------

PIECES = r"|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+" + PIECES
QWEN2, LLAMA3 = SPLIT.replace("{digits}", r"\p{N}"), SPLIT.replace("{digits}", r"\p{N}{1,3}")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION)
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOOLS = ("<tool_call>", "</tool_call>")
THOUGHT = (*TOOLS, "<tool_response>", "</tool_response>", "<think>", "</think>")
UNREACHED = " Việt"


@functools.cache
def corpus() -> list[str]:
    return [path.read_text() for path in sorted(ROOT.glob("evaluation/*/examples.jsonl"))]


def merges_of(splitter: pre_tokenizers.PreTokenizer, alphabet: list[str], size: int) -> tuple[list[str], list[Any]]:
    """Return the tokens of a trained BPE by id, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def added(tokens: dict[str, int], special: tuple[str, ...]) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": number, "content": text, "special": text in special} | plain for text, number in tokens.items()]


def begun(bos: str, number: int) -> dict[str, Any]:
    """Return a post-processor that adds a token before plain text, and not before a chat."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    token = {"id": bos, "ids": [number], "tokens": [bos]}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": [text], "special_tokens": {bos: token}}


def byte_level(
    pattern: str, special: tuple[str, ...], plain: tuple[str, ...], nfc: bool, bos: str | None = None
) -> dict[str, Any]:
    """Return a tokenizer as of Qwen (NFC) or Llama 3 (`ignore_merges`, a post-processor with `bos`)."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Sequence([cut, letters])
    vocabulary, merges = merges_of(splitter, sorted(pre_tokenizers.ByteLevel.alphabet()), 2000)
    if bos:
        vocabulary.append("".join(piece for piece, _ in letters.pre_tokenize_str(UNREACHED)))
    numbers = {text: len(vocabulary) + at for at, text in enumerate((*special, *plain))}
    bytes_again = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    isolated = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": added(numbers, special),
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [isolated, bytes_again]},
        "post_processor": {"type": "Sequence", "processors": [bytes_again, begun(bos, numbers[bos])]}
        if bos
        else bytes_again,
        "decoder": bytes_again,
        "model": {"type": "BPE", "byte_fallback": False, "fuse_unk": False, "ignore_merges": bool(bos)}
        | {"vocab": {text: number for number, text in enumerate(vocabulary)}, "merges": merges},
    }


def meta_space(normalizer: dict[str, Any] | None = None, splitter: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a tokenizer as converted from SentencePiece of Llama 2 and Mistral; unknown characters are bytes."""
    words = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    vocabulary, merges = merges_of(words, [META_SPACE, "\n"], 3000)
    special = ("<unk>", "<s>", "</s>")
    tokens = [*special, *sorted(BYTE_TOKENS), *vocabulary]
    decoders = [{"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "added_tokens": added({text: tokens.index(text) for text in special}, special),
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": begun("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
        | {"vocab": {text: number for number, text in enumerate(tokens)}, "merges": merges},
    }


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": META_SPACE}, REPLACE]}


def metaspace(scheme: str, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": META_SPACE, "prepend_scheme": scheme, "split": split}


@dataclass(frozen=True)
class Style:
    """Tokenizer and template of a family.

    Attributes:
        tokenizer: Returns tokenizer.json.
        template: File of `templates`.
        parts: Whether a message may be a list of parts.
        settings: tokenizer_config.json.
    """

    tokenizer: Callable[[], dict[str, Any]]
    template: str
    parts: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
QWEN = FAST | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
META = FAST | {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BEGUN = FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
OWN = META | {"tokenizer_class": "LlamaTokenizer"}

STYLES = {
    "qwen2": Style(lambda: byte_level(QWEN2, CHATML, (), nfc=True), "chatml", settings=QWEN),
    "qwen2.5": Style(lambda: byte_level(QWEN2, CHATML, TOOLS, nfc=True), "qwen2.5", settings=QWEN),
    "qwen3": Style(lambda: byte_level(QWEN2, CHATML, THOUGHT, nfc=True), "qwen3", settings=QWEN),
    "qwen2-vl": Style(lambda: byte_level(QWEN2, CHATML, (), nfc=True), "qwen2-vl", parts=True, settings=QWEN),
    "qwen3-vl": Style(lambda: byte_level(QWEN2, CHATML, THOUGHT, nfc=True), "qwen3-vl", parts=True, settings=QWEN),
    "llama3": Style(lambda: byte_level(LLAMA3, HEADERS, (), False, HEADERS[0]), "llama3", settings=BEGUN),
    "llama3.2": Style(lambda: byte_level(LLAMA3, HEADERS, (), False, HEADERS[0]), "llama3.2", settings=BEGUN),
    "llama2": Style(lambda: meta_space(normalizer=LEGACY), "llama2", settings=META),
    "mistral": Style(lambda: meta_space(splitter=metaspace("first")), "mistral", settings=META),
    "always": Style(lambda: meta_space(splitter=metaspace("always")), "mistral", settings=META),
    "never, each": Style(lambda: meta_space(splitter=metaspace("never", split=True)), "llama2", settings=META),
    # transformers 5 reads no normalizer and no pre-tokenizer for this class.
    "own class": Style(lambda: meta_space(normalizer=LEGACY), "llama2", settings=OWN),
    "own class, legacy": Style(lambda: meta_space(normalizer=LEGACY), "llama2", settings=OWN | {"legacy": True}),
}


def save(folder: Path, style: Style) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(style.tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps(style.settings))
    (folder / "chat_template.jinja").write_text((TEMPLATES / f"{style.template}.jinja").read_text())
    return folder


@dataclass(frozen=True)
class Pair:
    style: Style
    engine: Engine
    reference: PreTrainedTokenizerBase
    checkpoint: Path

    def expected(self, chat: list[dict[str, Any]]) -> tuple[str, list[int]] | None:
        """Return text and ids of transformers, or None for a conversation that the template rejects."""
        try:
            text = self.reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = self.reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        except (TemplateError, TypeError):
            return None
        return text, ids

    def differences(self, chats: list[list[dict[str, Any]]]) -> list[Any]:
        """Return (chat, engine's, expected) of each conversation whose text or ids differ."""
        valid = [(chat, expected) for chat in chats if (expected := self.expected(chat)) is not None]
        assert len(valid) > len(chats) // 3
        texts = self.engine("apply_chat_template", [engine_messages(chat) for chat, _ in valid])
        ids = self.engine("tokenizer_encode", [text for _, (text, _) in valid])
        results = zip(valid, zip(texts, ids, strict=True), strict=True)
        return [(chat, result, expected) for (chat, expected), result in results if result != expected]


@pytest.fixture(scope="module", params=STYLES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    style, folder = STYLES[request.param], tmp_path_factory.mktemp("style")
    checkpoint = save(folder / "checkpoint", style)
    with Engine(checkpoint, folder / "bundle") as engine:
        yield Pair(style, engine, AutoTokenizer.from_pretrained(checkpoint), checkpoint)


# Conversations --------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello!",
    "",
    "  two   spaces,\ttabs \n\n\n and\r\n lines  \n",
    "红色圆形在哪里？有没有黑色三角形。全角　ＡＢＣ１２３",
    "日本語カ\u3099 한국어 \u1112\u1161\u11ab Tiếng Việtnam nu\u031bo\u031b\u0301c",
    "👨‍👩‍👧‍👦 👍🏽 🇨🇳 ❤️ a\u200bb",
    "1234567890 3.14 1,000,000 ٣٤٥ ½ 2²",
    "def f(x):\n\treturn {'a': x[1:-1]}  # done\n\n\nprint(f\"{f([1, 2, 3])!r}\")\n",
    "it's I'LL don't <b>bold</b> & \"quoted\" \\n \\u00e9 {{ messages }} {% if %}",
    "Привет Ελληνικά שלום مرحبا हिन्दी ไทย cafe\u0301 café ﬁ Å\u0323",
    "<|im_start|>system\nx<|im_end|><|eot_id|></s><s>[INST] a [/INST] <think>b</think><|image_pad|>",
    f"{META_SPACE}meta{META_SPACE}{META_SPACE} space {META_SPACE} <0x0A>",
]
LONG = [
    "The quick brown fox jumps over the lazy dog. " * 700,
    "敏捷的棕色狐狸跳过了懒狗。" * 300,
    "\n".join(f"| {n} | {n * n:,} | {'x' * (n % 40)} |" for n in range(900)),
]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def conversations() -> list[list[dict[str, Any]]]:
    """Return conversations of text alone."""
    chats = [[user(text)] for text in [*TEXTS, *LONG]]
    chats += [[system(text), user("Hi"), reply(text), user(" and now? ")] for text in TEXTS]
    chats += [[user(a), reply(b), user(c)] for a, b, c in zip(TEXTS, TEXTS[3:], TEXTS[5:], strict=False)]
    chats += [
        [user("a"), reply("<think>\nhm, b\n</think>\n\nc\n"), user("d")],
        [user("a"), reply("<think>\n\n</think>\n\nc"), user("d"), reply("no thought"), user("e")],
        # transformers drops the key; with it the engine loses the header of the message.
        [user("a"), reply(None), user("b")],
        [turn for text in TEXTS * 3 for turn in (user(text), reply(f"I see: {text}"))] + [user("Thanks")],
    ]
    return chats


IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def with_images() -> list[list[dict[str, Any]]]:
    """Return conversations with images and videos, which the template writes as three tokens."""
    chats = [[user([IMAGE, text(words)])] for words in TEXTS]
    chats += [
        [user([IMAGE, IMAGE, text("Compare them.")])],
        [user([text("first"), IMAGE, text("second"), {"image": "b.png"}, text("?")])],
        [system("Be brief."), user([VIDEO, text("What happens?")])],
        [user([VIDEO, IMAGE, text("和"), VIDEO])],
        [user([IMAGE, text("a")]), reply("b"), user([text("c"), IMAGE, VIDEO]), reply("d"), user("e")],
        [system("s"), user([IMAGE] * 12), reply(""), user([text("")])],
        [user([]), reply("what?"), user([text("a"), text("b")])],
        [user([{"type": "image_url", "image_url": {"url": "c.png"}}, text("?")])],
    ]
    return chats


def test_conversations_equal_transformers(pair: Pair) -> None:
    assert pair.differences(conversations()) == []


@pytest.mark.parametrize("pair", [name for name, style in STYLES.items() if style.parts], indirect=True)
def test_images_and_videos_equal_transformers(pair: Pair) -> None:
    assert pair.differences(with_images()) == []


# Without the known differences of the engine's tokenizer, as in test_tokenizer.py, and without white space at the ends,
# which texts above have.
characters = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\x00\x01\x02\x03\x85\u017f\u2028\u2029")
words = st.lists(st.sampled_from(TEXTS) | st.text(characters, max_size=12), max_size=4).map(" ".join).map(str.strip)


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.lists(st.tuples(words, st.lists(st.tuples(words, words), max_size=3), words), min_size=10, max_size=20))
def test_random_conversations_equal_transformers(pair: Pair, data: list[Any]) -> None:
    chats = []
    for first, pairs, last in data:
        middle = [message for question, answer in pairs for message in (user(question), reply(answer))]
        chats.append([*([system(first)] if len(pairs) % 2 else []), *middle, user(last)])
    assert pair.differences(chats) == []


# Known differences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["llama3", "llama2"], indirect=True)
def test_white_space_that_the_engine_does_not_trim(pair: Pair) -> None:
    """A difference that docs/bundle.md lists: an engine without it makes that text wrong."""
    chats = [[user(f"{space}红{space}")] for space in "\u3000\u00a0\u2003\x0b\x0c\x1c"]
    assert [chat for chat, _, _ in pair.differences(chats)] == chats


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_thinking_can_be_disabled_as_in_transformers(pair: Pair) -> None:
    chat = [user("What is 3 plus 4?")]
    expected = pair.reference.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    pair.engine("set_config", [{"jinja": {"context": {"enable_thinking": False}}}])
    assert expected.endswith("</think>\n\n")
    assert pair.engine("apply_chat_template", [chat]) == [expected]
    pair.engine("set_config", [{"jinja": {"context": {}}}])


@pytest.mark.parametrize("pair", ["qwen2.5"], indirect=True)
def test_keys_of_tools_are_in_another_order(pair: Pair) -> None:
    """The values are the same; `hf2mnn ask --tools` renders tools itself."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"z": {"enum": [1, None, "é"]}, "a": "<b>"}}}]
    call = {"function": {"name": "f", "arguments": {"z": 1, "a": [2.5, True]}}}
    chat = [user("a"), reply(None) | {"tool_calls": [call]}, {"role": "tool", "content": "1"}]
    expected = pair.reference.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True)
    tokens = {"eos_token": "<|im_end|>"}
    assert render((TEMPLATES / "qwen2.5.jinja").read_text(), chat, tokens, tools) == expected
    pair.engine("set_config", [{"jinja": {"context": {"tools": tools}}}])
    (text,) = pair.engine("apply_chat_template", [engine_messages(chat)])
    pair.engine("set_config", [{"jinja": {"context": {}}}])
    assert text != expected
    assert sorted(text) == sorted(expected)
    assert "the engine writes the keys of tools and their arguments in another order" in template_differences(
        pair.checkpoint
    )


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
UNSUPPORTED = {
    "'</s>' with normalized": ("llama2", lambda stored: stored["added_tokens"][2].update(normalized=True)),
    "model BPE without byte fallback": ("llama2", lambda stored: stored["model"].update(byte_fallback=False)),
    "BPE without byte fallback": ("llama2", lambda stored: stored["model"]["vocab"].pop("<0x00>")),
    "decoder ByteLevel": ("mistral", lambda stored: stored.update(decoder=BYTES)),
    "normalizer Prepend": ("llama2", lambda stored: stored["normalizer"]["normalizers"].pop()),
    "pre-tokenizer Metaspace": ("mistral", lambda stored: stored["pre_tokenizer"].update(replacement="_")),
    "post-processor RobertaProcessing": (
        "llama3",
        lambda stored: stored.update(
            post_processor=BYTES | {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2]}
        ),
    ),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_tokenizers_are_rejected(message: str, tmp_path: Path) -> None:
    style, change = UNSUPPORTED[message]
    checkpoint = save(tmp_path / "checkpoint", STYLES[style])
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    change(stored)
    (checkpoint / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(checkpoint, tmp_path / "tokenizer.mtok")


def test_metaspace_before_the_first_text_needs_a_template_that_begins_with_a_token(tmp_path: Path) -> None:
    """The engine splits a prompt at its added tokens and does not know the first part."""
    checkpoint = save(tmp_path / "checkpoint", STYLES["mistral"])
    write_tokenizer(checkpoint, tmp_path / "tokenizer.mtok")
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match="before the first text"):
        write_tokenizer(checkpoint, tmp_path / "tokenizer.mtok")


def test_merges_across_words_are_kept(tmp_path: Path) -> None:
    """Then text is not split into words."""
    checkpoint = save(tmp_path / "checkpoint", STYLES["llama2"])
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary[f"a{META_SPACE}"] = len(vocabulary)
    stored["model"]["merges"].insert(0, ["a", META_SPACE])
    (checkpoint / "tokenizer.json").write_text(json.dumps(stored))
    reference = AutoTokenizer.from_pretrained(checkpoint)
    with Engine(checkpoint, tmp_path / "bundle") as engine:
        assert (
            Pair(STYLES["llama2"], engine, reference, checkpoint).differences([[user("a a banana")], [user("b")]]) == []
        )
        assert vocabulary[f"a{META_SPACE}"] in engine("tokenizer_encode", ["a a banana"])[0]


@pytest.mark.parametrize("name", STYLES)
def test_templates_have_supported_constructs(name: str) -> None:
    assert unsupported((TEMPLATES / f"{STYLES[name].template}.jinja").read_text()) == []
