"""Write the set by which bench/quant.py compares methods of quantization: several times as large as the evaluation set.

    python models/shapes-vl/training/make_benchmark.py --out results/bench/shapes-vl/questions

The KL divergence of a model this small is nearly all in the few positions where it is unsure: how large their share is
must not depend on chance. The same world under another seed, without anything that the calibration set holds.
"""

from __future__ import annotations

import random

from PIL import Image

import world
from make_calibration import calibration, draw, new_words
from make_evaluation import about_pictures, write

# Neither the training's (20), nor those of the evaluation set, the calibration set and score.py.
SEED = 1_618_033
PICTURES = 100


def benchmark() -> tuple[dict[str, Image.Image], list[dict]]:
    """Pictures by file name, and examples."""
    seen, asked = calibration()
    known, rng = {picture.tobytes() for picture in seen.values()}, random.Random(SEED)
    drawn = [draw(world.SIZES[number % len(world.SIZES)], known, rng) for number in range(PICTURES)]
    pictures = {f"{number:02}.png": picture for number, (_, picture) in enumerate(drawn)}
    return pictures, [*about_pictures([scene for scene, _ in drawn], rng), *new_words(asked, rng)]


if __name__ == "__main__":
    write(benchmark, __doc__)
