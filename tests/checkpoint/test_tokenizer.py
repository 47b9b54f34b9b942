"""The tokenizer is the one that AutoTokenizer loads, whatever file or setting determines it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from checkpoints import SHAPES, make_small
from hf2mnn.checkpoint.tokenizer import contents, load_tokenizer
from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.tokenizer import encode_tokenizer
from hf2mnn.mnn.tokenizer_probe import engine_ids
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import SHAPES_VL

PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
TEXTS = [
    "<|new|> red",
    "a<|new|>b",
    "<|im_start|>user\ncaf\u00e9 12345<|im_end|>",
    " a <tool>x</tool>  b",
    "1234567 12",
]
Edit = Callable[[Path], None]


def settings(**changes: Any) -> Edit:
    """Return an edit of tokenizer_config.json."""

    def edit(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def stored(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Return an edit of tokenizer.json."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return edit


def decoder_of_added(folder: Path) -> None:
    """List the tokens, and one more, in tokenizer_config.json; one of them is no longer special."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    listed = {str(token.pop("id")): token for token in tokens} | {"563": {"content": "<|new|>", **PLAIN}}
    settings(added_tokens_decoder=listed)(folder)


def splitter(*parts: dict[str, Any]) -> Edit:
    """Return an edit that puts pre-tokenizers before those of the checkpoint."""
    return stored(lambda content: content["pre_tokenizer"]["pretokenizers"].__setitem__(slice(0, 0), parts))


def digits(individual: bool) -> Edit:
    return splitter({"type": "Digits", "individual_digits": individual})


KINDS: dict[str, Edit] = {
    "added_tokens_decoder": decoder_of_added,
    "extra_special_tokens, a list": settings(extra_special_tokens=["<|new|>", "<tool>"]),
    "extra_special_tokens, by name": settings(extra_special_tokens={"new_token": "<|new|>"}),
    "additional_special_tokens": settings(additional_special_tokens=["<|new|>"]),
    "added_tokens.json": lambda folder: (folder / "added_tokens.json").write_text('{"<|new|>": 563}') and None,
    "a named token": settings(unk_token="<|new|>"),
    "a class of the model": settings(tokenizer_class="Qwen2Tokenizer"),
    "the class of Llama": settings(tokenizer_class="LlamaTokenizerFast"),
    "an unknown class": settings(tokenizer_class="NoSuchTokenizer"),
    "add_prefix_space": settings(add_prefix_space=True),
    "a prefix in tokenizer.json": stored(
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)
    ),
    "no normalizer": stored(lambda content: content.update(normalizer=None)),
    "a replacement": stored(
        lambda content: content.update(normalizer={"type": "Replace", "pattern": {"String": "é"}, "content": "e"})
    ),
    "single digits": digits(True),
    "numbers": digits(False),
    "lstrip and rstrip": stored(lambda content: content["added_tokens"][1].update(lstrip=True, rstrip=True)),
    "a special token made plain": stored(lambda content: content["added_tokens"][5].update(special=False)),
    "truncation and padding": stored(
        lambda content: content.update(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
            | {"pad_id": 549, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
        )
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokenizer of the embedded model, for tests to change."""
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHAPES_VL / name, tmp_path / "checkpoint" / name)
    shutil.copyfile(SHAPES_VL / "chat_template.jinja", tmp_path / "checkpoint" / "chat_template.jinja")
    return tmp_path / "checkpoint"


def check_engine(folder: Path, texts: list[str]) -> list[list[int]]:
    """Check that the engine's ids are those of AutoTokenizer, and return them."""
    file = folder.with_name("tokenizer.mtok")
    file.write_bytes(encode_tokenizer(folder))
    expected = AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False, padding=False, truncation=False)
    ids = engine_ids(file, texts)
    assert ids == expected.input_ids
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_engine_has_the_ids_of_autotokenizer(kind: str, folder: Path) -> None:
    KINDS[kind](folder)
    ids = check_engine(folder, TEXTS)
    if "<|new|>" in load_tokenizer(folder).get_vocab():
        assert len(ids[0]) < len(engine_ids_of_original())


def engine_ids_of_original() -> list[int]:
    return AutoTokenizer.from_pretrained(SHAPES_VL)(TEXTS[0], add_special_tokens=False).input_ids


@pytest.mark.parametrize("shape", ["qwen2", "llama"])
def test_llama_class_over_byte_level_bpe(shape: str, tmp_path: Path) -> None:
    """As distillations of R1 have it; transformers chooses another class for each model type."""
    own = make_small(SHAPES[shape], tmp_path / "own")
    settings(tokenizer_class="LlamaTokenizerFast")(own)
    check_engine(fetch_checkpoint(tmp_path / "checkpoint", own), ["What is 3 plus 4? caf\u00e9\n"])


REFUSED: dict[str, tuple[Edit, str]] = {
    "split_special_tokens": (settings(split_special_tokens=True), "option split_special_tokens cannot be written"),
    "a normalizer": (stored(lambda content: content.update(normalizer={"type": "Lowercase"})), "normalizer Lowercase"),
    "no splitting into bytes": (
        stored(lambda content: content.update(pre_tokenizer=None)),
        "BPE that is not byte-level",
    ),
    "splitting by case": (
        splitter({"type": "Split", "pattern": {"Regex": r"\p{Lu}+"}, "behavior": "Isolated", "invert": False}),
        "pre-tokenizer Split by",
    ),
    "tokens beyond the embedding": (
        settings(extra_special_tokens=[f"<|{number}|>" for number in range(100)]),
        "the model's vocabulary has 640",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}") and None, "cannot load the tokenizer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_fetch_refuses_by_name(kind: str, tmp_path: Path) -> None:
    """Before anything is computed."""
    own = shutil.copytree(SHAPES_VL, tmp_path / "own", ignore=shutil.ignore_patterns("evaluation", "training"))
    edit, message = REFUSED[kind]
    edit(own)
    with pytest.raises(CheckpointError, match=message):
        fetch_checkpoint(tmp_path / "checkpoint", own)
    assert not (tmp_path / "checkpoint").exists()


def test_panics_of_the_library_are_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers raises them as BaseException."""

    def panic(*_: object, **__: object) -> None:
        raise BaseException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(CheckpointError, match="unwrap"):
        load_tokenizer(folder)


def test_nothing_is_fetched_and_no_code_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    original = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, **options: calls.append(options) or original(*args, **options)
    )
    assert contents(load_tokenizer(folder))["model"]["type"] == "BPE"
    assert calls == [{"local_files_only": True, "trust_remote_code": False}]
