"""Write shapes-vl's calibration set: what a quantization may look at, and nothing that the evaluation set holds.

    python models/shapes-vl/training/make_calibration.py --out models/shapes-vl/calibration

The same world under another seed. An empty scene and a sum can come up under any seed: what the evaluation set has
is drawn again or left out.
"""

from __future__ import annotations

import random

from PIL import Image

import world
from make_evaluation import about_pictures, about_words, evaluation, unlabelled, write

# Neither the training's (20), nor the evaluation set's, nor score.py's.
SEED = 2_718_281
PICTURES = 20
ODD_SIZES = [(150, 110), (75, 190), (230, 70)]
FREE = "Name 2 colours and 1 number, each on a line of its own:\n\t- 一种颜色？\n\t- 一个数字？ \U0001f4a1"
WORDS = 6
"""Sums, and as many translations."""


def draw(size: tuple[int, int], known: set[bytes], rng: random.Random) -> tuple[world.Scene, Image.Image]:
    """A scene and its picture, which is none of `known` and is added there."""
    while True:
        scene = world.draw_scene(rng, size)
        picture = world.paint(scene, rng)
        if picture.tobytes() not in known:
            known.add(picture.tobytes())
            return scene, picture


def new_words(asked: list[dict], rng: random.Random) -> list[dict]:
    """WORDS sums and WORDS translations whose questions are not among those of `asked`, and none twice."""
    known, left, made = [record["messages"] for record in asked], dict.fromkeys(world.TEXT_CATEGORIES, WORDS), []
    for record in about_words(10 * WORDS, rng):
        if left[record["category"]] and record["messages"] not in known:
            left[record["category"]] -= 1
            known.append(record["messages"])
            made.append(record)
    return made


def calibration() -> tuple[dict[str, Image.Image], list[dict]]:
    """Pictures by file name, and examples, in about the shares that the evaluation set has: what is unusual weighs much
    in a mean divergence, and would else be all that mixed precision goes by.
    """
    seen, asked = evaluation()
    known, rng = {picture.tobytes() for picture in seen.values()}, random.Random(SEED)
    drawn = [draw(world.SIZES[number % len(world.SIZES)], known, rng) for number in range(PICTURES)]
    pictures = {f"{number:02}.png": picture for number, (_, picture) in enumerate(drawn)}
    pictures |= {f"odd-{i}.png": draw(size, known, rng)[1] for i, size in enumerate(ODD_SIZES)}
    questions = about_pictures([scene for scene, _ in drawn], rng)
    return pictures, [*questions, *new_words(asked, rng), *unlabelled(len(ODD_SIZES), FREE)]


if __name__ == "__main__":
    write(calibration, __doc__)
