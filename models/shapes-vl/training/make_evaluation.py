"""Write the evaluation set of shapes-vl: held-out images as PNG, and examples.jsonl.

    python models/shapes-vl/training/make_evaluation.py --out models/shapes-vl/evaluation

Most examples have one right answer. The last ones have no label: they cover other faults of a conversion (resized
images, two images, several turns, a system prompt, free text).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import world

SEED = 31_337
IMAGES = 24
# Width and height are not multiples of 28, so the processor resizes.
ODD_SIZES = [(130, 97), (90, 150), (200, 120)]
FREE = "Tell me, in 3 short lines:\n\tWhat is a star? 什么是星形？ \U0001f31f"


def image(name: str) -> dict:
    return {"type": "image", "image": f"images/{name}"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def example(identifier: str, category: str, language: str, messages: list[dict], answer: str | None) -> dict:
    return {"id": identifier, "category": category, "language": language, "answer": answer, "messages": messages}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def about_images(scenes: list[world.Scene], rng: random.Random) -> list[dict]:
    """Return a question of every category about each image, in alternating languages."""
    examples = []
    for number, scene in enumerate(scenes):
        for index, category in enumerate(world.IMAGE_CATEGORIES):
            language = ("en", "zh")[(number + index) % 2]
            question = world.ask(scene, category, language, rng)
            if question:
                messages = [user(image(f"{number:02}.png"), text(question.text))]
                examples.append(example(f"{category}-{number:02}", category, language, messages, question.answer))
    return examples


def about_words(count: int, rng: random.Random) -> list[dict]:
    """Return `count` sums and `count` translations, in alternating languages."""
    examples = []
    for category in world.TEXT_CATEGORIES:
        for number in range(count):
            question = world.ask(None, category, ("en", "zh")[number % 2], rng)
            messages = [user(text(question.text))]
            examples.append(example(f"{category}-{number:02}", category, question.language, messages, question.answer))
    return examples


def unlabelled(odd: int, free: str) -> list[dict]:
    """Return examples without labels, about `odd` images of odd size and the first others, and the text `free`."""
    ask = "Describe the picture."
    examples = [
        example(f"resized-{i}", "resized", "en", [user(image(f"odd-{i}.png"), text(ask))], None) for i in range(odd)
    ]
    turns = [
        user(image("01.png"), text("What is at the top left?")),
        {"role": "assistant", "content": "a star"},
        user(text("右下角是什么？")),
    ]
    examples.append(example("turns-0", "turns", "zh", turns, None))
    examples.append(example("turns-1", "turns", "en", [*turns[:2], user(image("03.png"), text(ask))], None))
    examples.append(example("two-0", "two pictures", "en", [user(image("00.png"), image("02.png"), text(ask))], None))
    examples.append(
        example("two-1", "two pictures", "zh", [user(image("05.png"), text("和"), image("odd-1.png"))], None)
    )
    system = {"role": "system", "content": "You answer in Chinese. 你用中文回答。"}
    examples.append(example("system-0", "system", "en", [system, user(image("04.png"), text(ask))], None))
    examples.append(example("free-0", "free text", "en", [user(text(free))], None))
    return examples


def evaluation() -> tuple[dict[str, Image.Image], list[dict]]:
    """Return images by file name, and examples."""
    rng = random.Random(SEED)
    scenes = [world.draw_scene(rng, world.SIZES[number % len(world.SIZES)]) for number in range(IMAGES)]
    drawn = {f"{number:02}.png": scene for number, scene in enumerate(scenes)}
    drawn |= {f"odd-{i}.png": world.draw_scene(rng, size) for i, size in enumerate(ODD_SIZES)}
    images = {name: world.paint(scene, rng) for name, scene in drawn.items()}
    return images, [*about_images(scenes, rng), *about_words(6, rng), *unlabelled(len(ODD_SIZES), FREE)]


def write(make: Callable[[], tuple[dict[str, Image.Image], list[dict]]], about: str) -> None:
    """Write the images and examples of `make` to the folder of the command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    images, records = make()
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, pixels in images.items():
        pixels.save(out / "images" / name, optimize=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (out / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(records)} examples, {len(images)} images")


if __name__ == "__main__":
    write(evaluation, __doc__)
