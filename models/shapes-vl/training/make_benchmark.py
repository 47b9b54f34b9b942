"""Write the set on which bench/quant.py compares quantization methods, several times as large as the evaluation set.

    python models/shapes-vl/training/make_benchmark.py --out results/bench/shapes-vl/questions

Nearly all of the KL divergence of a model this small is at the few positions where it is unsure, so the set must be
large enough for a stable share of them. The same data generator with another seed; it shares nothing with the
calibration set.
"""

from __future__ import annotations

import random

from PIL import Image

import world
from make_calibration import calibration, draw, new_words
from make_evaluation import about_images, write

# Differs from the seeds of the training (20), of the evaluation and calibration set and of score.py.
SEED = 1_618_033
IMAGES = 100


def benchmark() -> tuple[dict[str, Image.Image], list[dict]]:
    """Return images by file name, and examples."""
    calibrated, records = calibration()
    known, rng = {image.tobytes() for image in calibrated.values()}, random.Random(SEED)
    drawn = [draw(world.SIZES[number % len(world.SIZES)], known, rng) for number in range(IMAGES)]
    images = {f"{number:02}.png": image for number, (_, image) in enumerate(drawn)}
    return images, [*about_images([scene for scene, _ in drawn], rng), *new_words(records, rng)]


if __name__ == "__main__":
    write(benchmark, __doc__)
