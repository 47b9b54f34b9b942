"""Reading of evaluation sets; errors name the file and the line."""

from __future__ import annotations

import errno
import json
import struct
import tracemalloc
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.reference import examples
from hf2mnn.reference.examples import read_examples, read_image
from support import SHAPES_VL

QUESTION = {"role": "user", "content": "How many?"}
GOOD = {"id": "one", "messages": [QUESTION]}


def write(folder: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_an_example_is_read_as_it_is_documented(tmp_path: Path) -> None:
    """Images are in the order of the conversation; optional keys may be absent."""
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "它们"}, {"type": "image", "image": "b.png"}]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
    ]
    full = {"id": "two", "category": "count", "language": "zh", "answer": "2", "messages": turns}
    bare, described = read_examples(write(tmp_path, GOOD, "", full))
    assert (bare.id, bare.category, bare.language, bare.answers, bare.images) == ("one", "any", "any", None, [])
    assert described.images == ["a.png", "b.png", "a.png"]
    assert (described.category, described.language, described.answers) == ("count", "zh", ["2"])
    assert described.messages == turns
    assert bare.metric == described.metric == "exact"


def test_several_answers_and_a_metric_of_its_own(tmp_path: Path) -> None:
    (asked,) = read_examples(write(tmp_path, {**GOOD, "answer": ["two", "2"], "metric": "vqa"}))
    assert (asked.answers, asked.metric) == (["two", "2"], "vqa")


def test_the_embedded_set_is_one_and_its_images_open() -> None:
    examples = read_examples(SHAPES_VL / "evaluation")
    names = {name for example in examples for name in example.images}
    assert len(examples) > 20
    assert names
    assert all(read_image(SHAPES_VL / "evaluation" / name).mode == "RGB" for name in names)


@pytest.mark.parametrize(
    "bad",
    [
        "{not json",
        "[]",
        '"text"',
        "null",
        {"messages": [QUESTION]},
        {"id": "x"},
        {"id": "x", "messages": []},
        {"id": "x", "messages": None},
        {"id": "x", "messages": [{"role": "user"}]},
        {"id": "x", "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"id": "x", "messages": ["hello"]},
        {"id": "x", "messages": [{"role": "user", "content": ["hello"]}]},
        {"id": 3, "messages": [QUESTION]},
        {"id": "a/b", "messages": [QUESTION]},
        {**GOOD, "answer": 2},
        {**GOOD, "answer": []},
        {**GOOD, "answer": ["two", 2]},
        {**GOOD, "answer": "2", "metric": "bleu"},
        {**GOOD, "answer": "2", "metric": ["vqa"]},
        {**GOOD, "metric": "vqa"},
        {**GOOD, "answer": None, "metric": "exact"},
    ],
    ids=str,
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, bad: Any) -> None:
    """Blank lines count, as in an editor."""
    with pytest.raises(EvaluationSetError, match=r"examples\.jsonl:3 .*docs/evaluation\.md"):
        read_examples(write(tmp_path, GOOD, "", bad))


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "video", "video": "a.mp4"}, "a video, which MNN 3.6.1 cannot read"),
        ({"video": ["0.png", "1.png"]}, "a video"),
        ({"type": "audio", "audio": "a.wav"}, "audio, which no model family supports"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "an image_url"),
    ],
)
def test_unsupported_parts_are_refused_by_name(part: dict[str, Any], named: str, tmp_path: Path) -> None:
    """A template would write its token, and the model would get no input for it."""
    content = [part, {"type": "text", "text": "What happens?"}]
    with pytest.raises(EvaluationSetError, match=rf"examples\.jsonl:2 is not an example \(ValueError: .*{named}"):
        read_examples(write(tmp_path, GOOD, {"id": "x", "messages": [{"role": "user", "content": content}]}))


UNREADABLE = [
    ("a\0b", "U\\+0000"),
    ("a \ud83d", "is no character"),
    ("\u597d" * 10_001, "30003 bytes without a break"),
    ("a" * 30_001, "30001 bytes"),
    ("!" * 30_001, "30001 bytes"),
]


@pytest.mark.parametrize(("text", "named"), UNREADABLE, ids=["NUL", "surrogate", "Chinese", "letters", "punctuation"])
def test_text_that_the_engine_cannot_encode_is_refused(text: str, named: str, tmp_path: Path) -> None:
    for content in (text, [{"type": "text", "text": text}]):
        record = json.dumps({"id": "x", "messages": [{"role": "user", "content": content}]})  # a surrogate as an escape
        (tmp_path / "examples.jsonl").write_text(record)
        with pytest.raises(EvaluationSetError, match=named):
            read_examples(tmp_path)


def test_long_texts_with_breaks_are_read(tmp_path: Path) -> None:
    text = "\u597d" * 9_000 + "\uff0c" + "a" * 9_000 + " 1" * 30_000
    assert read_examples(write(tmp_path, {"id": "x", "messages": [{"role": "user", "content": text}]}))


def test_an_image_without_a_type_counts(tmp_path: Path) -> None:
    """Templates accept it by its key."""
    content = [{"image": "a.png"}, {"type": "text", "text": "and"}, {"type": "image", "image": "b.png"}]
    (example,) = read_examples(write(tmp_path, {"id": "x", "messages": [{"role": "user", "content": content}]}))
    assert example.images == ["a.png", "b.png"]


def test_an_id_used_twice_is_refused(tmp_path: Path) -> None:
    """Results are stored by id: the second would replace the first."""
    with pytest.raises(EvaluationSetError, match=r"examples\.jsonl uses the id one twice"):
        read_examples(write(tmp_path, GOOD, GOOD))


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    """An empty set would pass every gate."""
    with pytest.raises(EvaluationSetError, match="holds no examples"):
        read_examples(write(tmp_path, "", "  "))


def test_a_folder_that_is_no_set_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(EvaluationSetError, match=r"has no examples\.jsonl"):
            read_examples(folder)


def test_a_set_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """Chinese questions are easily saved as GBK."""
    text = json.dumps({"id": "x", "messages": [{"role": "user", "content": "红色"}]}, ensure_ascii=False)
    (tmp_path / "examples.jsonl").write_bytes(text.encode("gbk"))
    with pytest.raises(EvaluationSetError, match=r"examples\.jsonl"):
        read_examples(tmp_path)


def test_an_image_without_access_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who has access to everything."""

    def denied(*_: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", "image.png")

    monkeypatch.setattr(examples, "read_bytes", denied)
    with pytest.raises(EvaluationSetError, match=r"image\.png cannot be read \(Permission denied\)"):
        read_image(tmp_path / "image.png")


def test_a_byte_order_mark_before_the_first_line_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_text(
        json.dumps({"id": "a", "messages": [{"role": "user", "content": "?"}]}), encoding="utf-8-sig"
    )
    assert [example.id for example in read_examples(tmp_path)] == ["a"]


def test_a_text_with_a_line_separator_in_it_is_one_line(tmp_path: Path) -> None:
    """U+2028 and U+0085 are valid inside a JSON string, and str.splitlines would split there."""
    record = {"id": "x", "messages": [{"role": "user", "content": "a\u2028b\x85c"}]}
    (example,) = read_examples(write(tmp_path, record))
    assert example.messages[0]["content"] == "a\u2028b\x85c"


def pixels(mode: str) -> Image.Image:
    """Return an image with many values, of which some are transparent if the mode has that."""
    image = Image.linear_gradient("L").resize((24, 16)).transpose(Image.Transpose.ROTATE_90)
    if mode == "I;16":
        return Image.fromarray((np.array(image).astype(np.uint16) << 8) + 7)
    return Image.merge(mode, [image] * len(mode)) if mode in ("LA", "RGBA", "CMYK") else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "transparent P", "transparent L")),
        *((mode, "jpg") for mode in ("L", "RGB", "CMYK")),
        *((mode, "webp") for mode in ("RGB", "RGBA")),
        *((mode, "tif") for mode in ("1", "I;16", "LA", "CMYK")),
    ],
)
def test_images_are_those_of_transformers(mode: str, suffix: str, tmp_path: Path) -> None:
    """In RGB, and upright by EXIF, as phones write photographs."""
    more = {"transparency": 3} if mode.startswith("transparent") else {}
    for orientation in (None, *range(10)):
        exif = Image.Exif()
        if orientation is not None:
            exif[ExifTags.Base.Orientation] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        pixels(mode.removeprefix("transparent ")).save(path, exif=exif.tobytes(), **more)
        # From memory: PIL 13.0 loses the orientation of some TIFF files that it maps.
        image, expected = read_image(path), load_image(Image.open(BytesIO(path.read_bytes())))
        assert (image.mode, image.size) == ("RGB", expected.size)
        assert expected.size == ((24, 16) if orientation in (5, 6, 7, 8) else (16, 24))
        np.testing.assert_array_equal(np.array(image), np.array(expected))


def test_an_invalid_image_is_named(tmp_path: Path) -> None:
    """Missing, empty, text, a folder, or truncated."""
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    for name in ("cut", "empty", "text", "folder"):
        with pytest.raises(EvaluationSetError, match=rf"{name}\.png is not an image"):
            read_image(tmp_path / f"{name}.png")
    for name in ("empty", "text"):
        with pytest.raises(EvaluationSetError, match=r"it is none of PNG, JPEG, .*; convert it") as refused:
            read_image(tmp_path / f"{name}.png")
        assert " object at 0x" not in str(refused.value)
    with pytest.raises(EvaluationSetError, match=r"there is no image .*nowhere\.png"):
        read_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "link.png", 1])
def test_an_image_must_be_in_the_set(name: object, tmp_path: Path) -> None:
    """Reports embed images, and are shared."""
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    content = [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]
    write(folder, {"id": "one", "messages": [{"role": "user", "content": content}]})
    with pytest.raises(EvaluationSetError, match=r"examples\.jsonl:1 is not an example"):
        read_examples(folder)


def png_of(width: int, height: int) -> bytes:
    """Return a PNG with little data and the given size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts.items())


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (12_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_larger_than_the_memory_is_refused_by_its_header(width: int, height: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    tracemalloc.start()
    try:
        with pytest.raises(EvaluationSetError, match="not an image that can be read"):
            read_image(tmp_path / "bomb.png")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL would start Ghostscript, if installed, with an untrusted program."""
    trap = tmp_path / "gs"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/trapped\n")
    trap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (4, 4)).save(tmp_path / "image.eps")
    (tmp_path / "image.eps").rename(tmp_path / "image.png")
    with pytest.raises(EvaluationSetError, match="not an image that can be read"):
        read_image(tmp_path / "image.png")
    assert not (tmp_path / "trapped").exists()


def test_a_chunk_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    """A case of `make fuzz`: reading a file, PIL allocates the 553 MB of this PNG's chunk length."""
    path = tmp_path / "long.png"
    Image.new("RGB", (6, 4)).save(path)
    stored = bytearray(path.read_bytes())
    stored[33:37] = struct.pack(">I", 0x21000015)
    path.write_bytes(stored)
    tracemalloc.start()
    with suppress(EvaluationSetError):
        read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
