"""Write the calibration set of shapes-vl, which shares nothing with its evaluation set.

    python models/shapes-vl/training/make_calibration.py --out models/shapes-vl/calibration

The same data generator with another seed. Empty scenes and sums can repeat with any seed, so examples of the evaluation
set are drawn again or left out.
"""

from __future__ import annotations

import random

from PIL import Image

import world
from make_evaluation import about_images, about_words, evaluation, unlabelled, write

# Differs from the seeds of the training (20), of the evaluation set and of score.py.
SEED = 2_718_281
IMAGES = 20
ODD_SIZES = [(150, 110), (75, 190), (230, 70)]
FREE = "Name 2 colours and 1 number, each on a line of its own:\n\t- 一种颜色？\n\t- 一个数字？ \U0001f4a1"
WORDS = 6
"""Number of sums, and of translations."""


def draw(size: tuple[int, int], known: set[bytes], rng: random.Random) -> tuple[world.Scene, Image.Image]:
    """Draw a scene whose image is not in `known`, and add it there."""
    while True:
        scene = world.draw_scene(rng, size)
        image = world.paint(scene, rng)
        if image.tobytes() not in known:
            known.add(image.tobytes())
            return scene, image


def new_words(records: list[dict], rng: random.Random) -> list[dict]:
    """Return WORDS sums and WORDS translations, each once and none of those in `records`."""
    known, left, new = [record["messages"] for record in records], dict.fromkeys(world.TEXT_CATEGORIES, WORDS), []
    for record in about_words(10 * WORDS, rng):
        if left[record["category"]] and record["messages"] not in known:
            left[record["category"]] -= 1
            known.append(record["messages"])
            new.append(record)
    return new


def calibration() -> tuple[dict[str, Image.Image], list[dict]]:
    """Return images by file name, and examples.

    Categories have about the shares of the evaluation set: unusual examples have a large divergence, and would
    otherwise dominate the choice of mixed precision.
    """
    evaluated, records = evaluation()
    known, rng = {image.tobytes() for image in evaluated.values()}, random.Random(SEED)
    drawn = [draw(world.SIZES[number % len(world.SIZES)], known, rng) for number in range(IMAGES)]
    images = {f"{number:02}.png": image for number, (_, image) in enumerate(drawn)}
    images |= {f"odd-{i}.png": draw(size, known, rng)[1] for i, size in enumerate(ODD_SIZES)}
    questions = about_images([scene for scene, _ in drawn], rng)
    return images, [*questions, *new_words(records, rng), *unlabelled(len(ODD_SIZES), FREE)]


if __name__ == "__main__":
    write(calibration, __doc__)
