"""tokenizer.mtok: its bytes, and ids in MNN's engine against transformers."""

from __future__ import annotations

import importlib
import json
import random
import struct
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.nfc import nfc_replacements
from hf2mnn.mnn.tokenizer import write_tokenizer
from tokenizing import Engine

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
# Constructs of Qwen2-VL's template: a namespace, conditions on keys, text between tags, a newline at the end.
TEMPLATE = """\
{% set images = namespace(value=0) %}{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' or 'image' in part %}{% set images.value = images.value + 1 %}\
{% if add_vision_id %}Image {{ images.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""


def specification(merging: bool = True) -> dict[str, Any]:
    """Return Qwen2's tokenizer with a merge for every pair of bytes, so that any difference in splitting changes ids.

    Merges across characters come before those within one.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges = [[left, right] for left in alphabet for right in alphabet] if merging else []
    random.Random(0).shuffle(merges)
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    continuing = {letters.pre_tokenize_str(chr(code))[0][0][-1] for code in range(0x80, 0xC0)}
    merges.sort(key=lambda merge: merge[1] in continuing)
    added = [(token, True) for token in SPECIAL] + [("<tool_call>", False), ("été <x>", False)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + len(merges) + number, "content": content, "special": special, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
            for number, (content, special) in enumerate(added)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate([*alphabet, *map("".join, merges)])},
            "merges": merges,
        },
    }


def save(folder: Path, tokenizer: dict[str, Any], template: str | None = TEMPLATE) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [65792, 65794]}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"), specification())


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(checkpoint, tmp_path_factory.mktemp("engine") / "bundle") as engine:
        yield engine


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint folder and its tokenizer without merges, for tests to change."""
    tokenizer = specification(merging=False)
    return save(tmp_path / "checkpoint", tokenizer), tokenizer


def differences(engine: Engine, reference: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    pairs = zip(texts, engine("tokenizer_encode", texts), strict=True)
    return {text: ids for text, ids in pairs if ids != reference.encode(text, add_special_tokens=False)}


# The file -------------------------------------------------------------------------------------------------------------


class Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from(f"<{form}", self.content, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values if len(values) > 1 else values[0]

    def bytes(self, length: int) -> bytes:
        self.position += length
        return self.content[self.position - length : self.position]

    def string(self) -> str:
        return self.bytes(self.take("H")).decode()


def test_file_holds_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    write_tokenizer(checkpoint, tmp_path / "tokenizer.mtok")
    magic, counts, ids, body = (tmp_path / "tokenizer.mtok").read_bytes().split(b"\n", 3)
    spec, base = specification(), 256 + 256 * 256
    assert magic == b"430 4"
    assert counts == b"6 2 0"
    assert list(map(int, ids.split())) == [*range(base, base + 6), base, base + 2], "special, then stop ids"

    file = Reader(body)
    kind, count = file.take("BI")
    assert kind == 4
    replacements = [(file.take("B"), file.string(), file.string()) for _ in range(count)]
    assert replacements == [(3, *pair) for pair in nfc_replacements()]

    assert file.take("BI") == (6, 2), "a sequence of two pre-tokenizers"
    assert (file.take("B"), file.string(), file.take("BB")) == (4, QWEN2_SPLIT, (0, 0))
    assert file.take("BB") == (1, 0), "bytes to letters, without a pattern"

    kind, size, byte_fallback, byte_level, merges = file.take("BIBBI")
    assert (kind, byte_fallback, byte_level, merges) == (0, 0, 0, 256 * 256)
    rows = [(file.string(), file.take("I")) for _ in range(size)]
    assert [text.encode() for text, _ in rows] == sorted(text.encode() for text, _ in rows)
    assert sorted(number for _, number in rows) == list(range(size))
    vocab = spec["model"]["vocab"]
    assert {text: number for text, number in rows if number < base} == vocab
    assert dict(rows)["<tool_call>"] == base + 6
    pairs = [file.take("III") for _ in range(merges)]
    assert pairs == sorted(pairs)
    assert {(left, right): rank for left, right, rank in pairs} == {
        (vocab[left], vocab[right]): rank for rank, (left, right) in enumerate(spec["model"]["merges"])
    }

    assert file.take("B") == 0
    added = [(*file.take("IBBB"), file.string()) for _ in range(file.take("I"))]
    assert added == [(token["id"], token["special"], 0, 0, token["content"]) for token in spec["added_tokens"]]
    assert file.bytes(file.take("I")).decode() == TEMPLATE.removesuffix("\n"), "Jinja drops the last newline"
    assert (file.string(), file.take("B"), file.string()) == ("<|im_end|>", 0, "")
    assert file.position == len(body)


def test_writing_is_reproducible_and_leaves_no_other_files(small: Any, tmp_path: Path) -> None:
    destination = tmp_path / "tokenizer.mtok"
    write_tokenizer(small[0], destination)
    first = destination.read_bytes()
    write_tokenizer(small[0], destination)
    assert destination.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "tokenizer.mtok"]


# The engine -----------------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "hello world",
    "it's I'M we'Re they'LL DON'T 'x",
    "1234567890 3.14 1,000 ⅷ ½ ١٢٣",
    " leading, trailing  ",
    "a  b   c    d\t\te \t f\v\fg",
    "\n\n\n",
    "a\r\n b\r\n\r\nc \n \n d \r",
    "!!!??? ... --- (a) [b] {c} $5+€6=¥7 ^`~|<> a_b «q» “q” ‘s’",
    "def f(x):\n    return x  # done\n\n\n\tpass",
    "红色圆形在哪里？有没有黑色三角形。",
    "混合 mixed 文字123abc，全角　ＡＢＣ１２３",
    "日本語カ\u3099 한국어 \u1112\u1161\u11ab\u1100\u1161",
    "Привет Ελληνικά שלום مرحبا कि ไทย ก็ \U00020000",
    "😀😃👍🏽👨‍👩‍👧‍👦 🇨🇳 a\u200bb\u200cc\ufeff",
    "café cafe\u0301 A\u030a \u212b \u2126 \u0958 ﬁ ①",
    "ậ a\u0323\u0302 a\u0302\u0323 â\u0323 é\u0323 α\u0313\u0300\u0345",
    "\u0644\u0651\u0650 \u1000\u103a\u1037 \u05d1\u05bc\u05b0 q\u0307\u0323",
    "nbsp\u00a0x \u00a0 y\x1c\x1f\x7f\x1b",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<|vision_start|><|image_pad|><|image_pad|><|vision_end|>y <|im_start <|im_start|><|im_start|>",
    "<tool_call>é <x> été <x><tool_call>",
    "a" * 2000,
    "红，" * 2000,
    "hello world, " * 4000,
    " " * 1000 + "x" + "\n" * 1000,
]


def test_ids_equal_transformers(engine: Engine, reference: PreTrainedTokenizerBase) -> None:
    assert differences(engine, reference, TEXTS) == {}


# Without the characters of the next test, and those newer than Python's Unicode. Parts are joined with a space, so that
# marks do not combine.
characters = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\x00\x01\x02\x03\x85\u017f\u2028\u2029")
part = st.one_of(
    st.text(characters, max_size=12).map(NFC().normalize_str),
    st.text(st.sampled_from(" \t\r\n\u00a0ab'sS1红é！!😀"), max_size=12),
    st.sampled_from([pair[0] for pair in nfc_replacements()]).map(lambda text: unicodedata.normalize("NFD", text)),
    st.sampled_from([*SPECIAL, "<tool_call>", "été <x>", "<|im_", "|>"]),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(part, max_size=6).map(" ".join), min_size=20, max_size=40))
def test_ids_of_random_texts_equal_transformers(
    engine: Engine, reference: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    assert differences(engine, reference, texts) == {}


def test_known_differences_exist(engine: Engine, reference: PreTrainedTokenizerBase) -> None:
    """Differences that docs/tokenizers.md lists: an engine without one makes that text wrong."""
    texts = [f"!{c}a!{c}!{c}{c}# {c}1 #{c}\n{c}b!{c} !{c}?" for c in "\x01\x02\x03\x85\u2028\u2029"]
    texts += [
        "'\u017f\u017f\u017f it'\u017fab",
        "a\u0327\u0301",
        "x\x00y",
        "\U00013853:!\U00013853\U00013853",
    ]
    assert list(differences(engine, reference, texts)) == texts


CHATS = [
    [{"role": "user", "content": "What colour is the circle? 红色"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "  {{ x }} {% if %} \"quoted\" 'so' \\n \\ \t<|im_end|>\n"}],
    [{"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|>Is it red?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "你好 😀"},
        {"role": "assistant", "content": "Yes.\n"},
        {"role": "user", "content": " and now? "},
    ],
]


def test_chats_equal_transformers(engine: Engine, reference: PreTrainedTokenizerBase) -> None:
    expected = [reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    assert engine("apply_chat_template", CHATS) == expected
    questions = [chat[0]["content"] for chat in CHATS[:-1]]
    assert engine("apply_chat_template", questions) == expected[:-1]


def test_tokens_decode_to_text_and_special_tokens_to_nothing(
    engine: Engine, reference: PreTrainedTokenizerBase
) -> None:
    ids = [number for text in ["a", " b", "\n", "ab"] for number in reference.encode(text)]
    ids += [*reference.all_special_ids, *reference.encode("<tool_call>été <x>"), 10**6]
    expected = [reference.decode([number], skip_special_tokens=True) for number in ids]
    assert engine("tokenizer_decode", ids) == expected
    assert {"", "ab", "<tool_call>", "été <x>"} < set(expected)


def test_demo_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Path(__file__).parents[2] / "models" / "shapes-vl" / "training"
    monkeypatch.syspath_prepend(str(training))
    for name in ("tokenizer", "world"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("tokenizer")
    reference = module.train_tokenizer(0, 768)
    reference.save_pretrained(tmp_path / "checkpoint")
    texts = [text for _, text in zip(range(500), module.corpus(7, 100), strict=False)]
    with Engine(tmp_path / "checkpoint", tmp_path / "bundle") as engine:
        assert differences(engine, reference, texts + TEXTS) == {}
        expected = [reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
        assert engine("apply_chat_template", CHATS) == expected


# Unsupported tokenizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_is_that_of_the_checkpoint(small: Any, file: str, tmp_path: Path) -> None:
    folder, tokenizer = small
    save(folder, tokenizer, template=None)
    path = folder / file
    if path.suffix == ".jinja":
        path.write_bytes(b"{{ a }}\r\nb\n\n")
    else:
        config = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(config | {"chat_template": "{{ a }}\r\nb\n\n"}))
    write_tokenizer(folder, tmp_path / "tokenizer.mtok")
    assert struct.pack("<I", 10) + b"{{ a }}\nb\n\x0a\x00<|im_end|>" in (tmp_path / "tokenizer.mtok").read_bytes()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


def split_by(pattern: dict[str, str], behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", {"type": "NFKC"}, "normalizer NFKC"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, "Lowercase"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer Whitespace"),
        ("pre_tokenizer", split_by({"String": " "}), "Split by"),
        ("pre_tokenizer", split_by({"Regex": r"\d+"}), "Split by"),
        ("pre_tokenizer", split_by({"Regex": r"\p{Lu}\p{L}*"}), "Split by"),
        ("pre_tokenizer", split_by({"Regex": r"[^a]*?b"}), "Split by"),
        ("pre_tokenizer", split_by({"Regex": r"(?<=a)b"}), "Split by"),
        ("pre_tokenizer", split_by({"Regex": "[一-龥]+"}), "Split by"),
        ("pre_tokenizer", split_by({"Regex": QWEN2_SPLIT}, "MergedWithNext"), "MergedWithNext"),
        ("pre_tokenizer", split_by({"Regex": QWEN2_SPLIT}), "BPE that is not byte-level"),
        ("decoder", None, "decoder none"),
        ("decoder", {"type": "Fuse"}, "decoder Fuse"),
        ("model", {"type": "Unigram", "vocab": [["a", 0.0]]}, "model Unigram"),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "model WordLevel"),
        ("post_processor", {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}, "processor BertProcessing"),
        ("model", {"type": "BPE"}, "transformers cannot load the tokenizer"),
    ],
)
def test_unsupported_parts_are_named(small: Any, tmp_path: Path, part: str, value: Any, message: str) -> None:
    folder, tokenizer = small
    save(folder, tokenizer | {part: value})
    with pytest.raises(CheckpointError) as error:
        write_tokenizer(folder, tmp_path / "tokenizer.mtok")
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert not (tmp_path / "tokenizer.mtok").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "BPE with end_of_word_suffix"),
        (lambda t: t["model"]["vocab"].pop("A"), "BPE that is not byte-level"),
        (lambda t: t["model"]["merges"].append(["A", "B"]), "transformers cannot load the tokenizer"),
        (lambda t: t["added_tokens"][0].update(single_word=True), "single_word"),
        (lambda t: t["model"]["vocab"].update({"new": 300}), "ids of tokens and added tokens"),
    ],
)
def test_unsupported_tokenizers_are_rejected(small: Any, tmp_path: Path, change: Any, message: str) -> None:
    folder, tokenizer = small
    change(tokenizer)
    save(folder, tokenizer)
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(folder, tmp_path / "tokenizer.mtok")


def test_missing_files_are_named(small: Any, tmp_path: Path) -> None:
    folder, tokenizer = small
    save(folder, tokenizer, template=None)
    with pytest.raises(CheckpointError, match="no chat template"):
        write_tokenizer(folder, tmp_path / "tokenizer.mtok")

    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match="no end-of-text token"):
        write_tokenizer(folder, tmp_path / "tokenizer.mtok")

    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as JSON"):
        write_tokenizer(folder, tmp_path / "tokenizer.mtok")

    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load the tokenizer"):
        write_tokenizer(folder, tmp_path / "tokenizer.mtok")


def test_specification_is_a_valid_tokenizer(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 256 + 256 * 256 + 8
    assert tokenizer.token_to_id("<|im_end|>") == 256 + 256 * 256 + 2
